"""PURE: which parts of an arena are in use.

An arena is memory of a receiver. Its sender alone allocates in it, so there is no lock and no
message for that; the receiver only says which extents it needs no longer.
"""

from __future__ import annotations

from bisect import bisect_left

from wukong.errors import FrameError

ALIGNMENT_BYTES = 64
"""Arrays start on a cache line, as numpy's own large ones do."""


class Arena:
    """Allocates extents, first fit. Not thread-safe.

    Cost: O(free pieces) to allocate, O(log) and a list insertion to free.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._used: dict[int, tuple[int, int]] = {}
        """Offset -> aligned size, users."""
        self._free_at: list[int] = [0] if size_bytes else []
        """Offsets of free pieces, ascending; no two of them touch."""
        self._free_bytes: list[int] = [size_bytes] if size_bytes else []

    def allocate(self, size_bytes: int) -> int | None:
        """Return the offset of an extent with one user; None: there is no room now."""
        need = -(-max(1, size_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        number = next((n for n, has in enumerate(self._free_bytes) if has >= need), None)
        if number is None:
            return None
        has = self._free_bytes[number]
        offset = self._free_at[number]
        if has == need:
            del self._free_at[number], self._free_bytes[number]
        else:
            self._free_at[number] += need
            self._free_bytes[number] -= need
        self._used[offset] = (need, 1)
        return offset

    def share(self, offset: int) -> None:
        """Add a user to an extent, which is free when all of them have freed it."""
        size, n_users = self._used[offset]
        self._used[offset] = (size, n_users + 1)

    def free(self, offset: int) -> None:
        """Take one user from an extent.

        Raises:
            FrameError: nothing is allocated there; whoever asked for it lies.
        """
        if offset not in self._used:
            raise FrameError(f"no extent begins at {offset}: it is free already, or never was one")
        size, n_users = self._used[offset]
        if n_users > 1:
            self._used[offset] = (size, n_users - 1)
            return
        del self._used[offset]
        number = bisect_left(self._free_at, offset)
        if number < len(self._free_at) and offset + size == self._free_at[number]:
            size += self._free_bytes[number]
            del self._free_at[number], self._free_bytes[number]
        if number and self._free_at[number - 1] + self._free_bytes[number - 1] == offset:
            self._free_bytes[number - 1] += size
            return
        self._free_at.insert(number, offset)
        self._free_bytes.insert(number, size)

    def start_of(self, offset: int, size_bytes: int) -> int | None:
        """The extent in which a piece of the arena lies; None: it is not (only) in one."""
        for start, (size, _) in self._used.items():
            if start <= offset and offset + size_bytes <= start + size:
                return start
        return None

    @property
    def n_used(self) -> int:
        """How many extents are in use."""
        return len(self._used)

    def check(self) -> None:
        """Every byte is in exactly one piece, and free neighbours are joined."""
        pieces = sorted(
            [(offset, size, True) for offset, (size, _) in self._used.items()]
            + [(offset, size, False) for offset, size in zip(self._free_at, self._free_bytes)]
        )
        end, was_free = 0, False
        for offset, size, is_used in pieces:
            assert offset == end, "pieces overlap or leave a hole"
            assert size > 0
            assert is_used or not was_free, "free neighbours are apart"
            end, was_free = offset + size, not is_used
        assert end == self.size_bytes
