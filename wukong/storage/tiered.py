"""Two blob stores as one: small blobs in the one that is fast, large ones in the one with room.

A blob's id says its size (`contract.sized_id`), so everybody finds a blob without asking: where it
lies is decided before it is put, by its size and the threshold, which all users of a store share.
Both stores are worked on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from wukong.executor.messages import BlobId, JobId
from wukong.storage.contract import BlobStore, size_of_blob

N_THREADS = 4
"""Callers that can work on both stores at once; more of them wait for each other."""


class TieredBlobs(BlobStore):
    """Blobs by size in one of two stores. Thread-safe as these are.

    Args:
        small: for blobs below the threshold, and those whose ids do not say their size.
        large: for the others.
        tier_bytes: the threshold; 0 or 1: everything whose size is known is large.
    """

    def __init__(self, small: BlobStore, large: BlobStore, tier_bytes: int) -> None:
        self.small = small
        self.large = large
        self._tier_bytes = max(1, tier_bytes)
        self._second = ThreadPoolExecutor(N_THREADS, thread_name_prefix="wukong-tier")
        """Work on the small store while their callers work on the large one."""

    def put_many(self, items: Sequence[tuple[BlobId, Sequence[memoryview]]]) -> None:
        """See `BlobStore.put_many`."""
        small = [item for item in items if not self._is_large(item[0])]
        large = [item for item in items if self._is_large(item[0])]
        try:
            self._both(
                small,
                large,
                lambda: self.small.put_many(small),
                lambda: self.large.put_many(large),
            )
        except BaseException:
            # Each store has cleared away its own half only, when that failed.
            self.delete_many([blob for blob, _ in items])
            raise

    def get_many(self, ids: Sequence[BlobId]) -> list[memoryview]:
        """See `BlobStore.get_many`."""
        small = [blob for blob in ids if not self._is_large(blob)]
        large = [blob for blob in ids if self._is_large(blob)]
        found: dict[BlobId, memoryview] = {}
        self._both(
            small,
            large,
            lambda: found.update(zip(small, self.small.get_many(small), strict=True)),
            lambda: found.update(zip(large, self.large.get_many(large), strict=True)),
        )
        return [found[blob] for blob in ids]

    def delete_many(self, ids: Sequence[BlobId]) -> None:
        """See `BlobStore.delete_many`."""
        small = [blob for blob in ids if not self._is_large(blob)]
        large = [blob for blob in ids if self._is_large(blob)]
        self._both(
            small,
            large,
            lambda: self.small.delete_many(small),
            lambda: self.large.delete_many(large),
        )

    def delete_job(self, job: JobId) -> None:
        """See `BlobStore.delete_job`."""
        self._both(
            True, True, lambda: self.small.delete_job(job), lambda: self.large.delete_job(job)
        )

    def used_bytes(self) -> int:
        """See `BlobStore.used_bytes`."""
        return self.small.used_bytes() + self.large.used_bytes()

    def close(self) -> None:
        """See `BlobStore.close`."""
        self._second.shutdown()
        self.small.close()
        self.large.close()

    def _is_large(self, blob: BlobId) -> bool:
        return size_of_blob(blob) >= self._tier_bytes

    def _both(
        self,
        small: object,
        large: object,
        on_small: Callable[[], None],
        on_large: Callable[[], None],
    ) -> None:
        """Work on the stores that have something to do, at once; on return neither is at work."""
        if not small or not large:
            if small:
                on_small()
            if large:
                on_large()
            return
        other = self._second.submit(on_small)
        try:
            on_large()
        finally:
            error = other.exception()
        if error is not None:
            raise error
