"""Values that an executor keeps beyond the strand that made or read them, by the id of their blob.

A blob never changes, so who has made its values, or has read and checked them once, need not map
and check them again. What is kept is a copy of what is stored: dropping it at any moment costs time
only. Values are lent as they are, as between the tasks of one strand; so only those are kept that
tasks do not alter, as arrays and frames, and not the containers and objects of a user.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from wukong.executor.messages import BlobId

_KEPT_PACKAGES = frozenset({"numpy", "pandas", "pyarrow", "scipy"})


class Kept:
    """The values that were used last, up to a number of bytes. Thread-safe.

    Args:
        limit_bytes: of all values together; 0: nothing is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._found: OrderedDict[BlobId, tuple[Sequence[object], int]] = OrderedDict()
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of what is kept."""
        return self._n_bytes

    def get(self, blob: BlobId) -> Sequence[object] | None:
        """The values of a blob, or None if they are not here."""
        with self._lock:
            if blob not in self._found:
                return None
            self._found.move_to_end(blob)
            return self._found[blob][0]

    def add(self, blob: BlobId, values: Sequence[object], size_bytes: int) -> None:
        """Keep the values of a blob that exists, in place of those that were used longest ago."""
        if size_bytes > self._limit_bytes or not all(map(_may_be_kept, values)):
            return
        with self._lock:
            if blob in self._found:
                return
            self._found[blob] = (tuple(values), size_bytes)
            self._n_bytes += size_bytes
            while self._n_bytes > self._limit_bytes:
                _, (_, dropped_bytes) = self._found.popitem(last=False)
                self._n_bytes -= dropped_bytes

    def drop(self, blobs: Sequence[BlobId]) -> None:
        """Drop the values of blobs that are deleted."""
        with self._lock:
            for blob in blobs:
                if blob in self._found:
                    self._n_bytes -= self._found.pop(blob)[1]

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._found.clear()
            self._n_bytes = 0


def _may_be_kept(value: object) -> bool:
    if isinstance(value, np.ndarray):
        # A piece of a larger array would keep all of it.
        base = value.base
        is_whole = not isinstance(base, np.ndarray) or base.nbytes <= value.nbytes
        return is_whole and not value.dtype.hasobject
    return type(value).__module__.partition(".")[0] in _KEPT_PACKAGES
