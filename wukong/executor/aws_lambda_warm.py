"""What an execution environment keeps between invocations: blobs that were read, within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from wukong.executor.messages import BlobId, JobId
from wukong.storage.contract import BlobStore

SHARE_MAX = 4
"""One blob may take this part of the room, so that a large one does not push out all others."""


class WarmBlobs(BlobStore):
    """A blob store that keeps copies of what was read last. Thread-safe as the other one is.

    A blob is never changed, so a copy is as good as the original. What is handed out is the
    caller's own, as with the other store: tasks may write to arrays in it.

    Args:
        inner: where the blobs are; closed with this.
        limit_bytes: of all copies.
    """

    def __init__(self, inner: BlobStore, limit_bytes: int) -> None:
        self._inner = inner
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[BlobId, bytes] = OrderedDict()
        """The one that was used last stands last."""
        self._n_bytes = 0
        self.n_hits = 0

    def put_many(self, items: Sequence[tuple[BlobId, Sequence[memoryview]]]) -> None:
        """See `BlobStore.put_many`."""
        self._inner.put_many(items)

    def get_many(self, ids: Sequence[BlobId]) -> list[memoryview]:
        """See `BlobStore.get_many`."""
        with self._lock:
            found = {blob: kept for blob in ids if (kept := self._kept.get(blob)) is not None}
            for blob in found:
                self._kept.move_to_end(blob)
            self.n_hits += len(found)
        missing = [blob for blob in ids if blob not in found]
        fetched = dict(zip(missing, self._inner.get_many(missing) if missing else (), strict=True))
        for blob, view in fetched.items():
            self._keep(blob, view)
        return [
            fetched[blob] if blob in fetched else memoryview(bytearray(found[blob])) for blob in ids
        ]

    def _keep(self, blob: BlobId, view: memoryview) -> None:
        if view.nbytes * SHARE_MAX > self._limit_bytes:
            return
        copy = bytes(view)
        with self._lock:
            self._forget(blob)
            self._kept[blob] = copy
            self._n_bytes += len(copy)
            while self._n_bytes > self._limit_bytes:
                self._forget(next(iter(self._kept)))

    def _forget(self, blob: BlobId) -> None:
        kept = self._kept.pop(blob, None)
        if kept is not None:
            self._n_bytes -= len(kept)

    def delete_many(self, ids: Sequence[BlobId]) -> None:
        """See `BlobStore.delete_many`."""
        with self._lock:
            for blob in ids:
                self._forget(blob)
        self._inner.delete_many(ids)

    def delete_job(self, job: JobId) -> None:
        """See `BlobStore.delete_job`."""
        with self._lock:
            for blob in [blob for blob in self._kept if blob.startswith(f"{job}/")]:
                self._forget(blob)
        self._inner.delete_job(job)

    def used_bytes(self) -> int:
        """See `BlobStore.used_bytes`."""
        return self._inner.used_bytes()

    def kept_bytes(self) -> int:
        """Bytes of all copies."""
        return self._n_bytes

    def close(self) -> None:
        """See `BlobStore.close`."""
        self._kept.clear()
        self._inner.close()
