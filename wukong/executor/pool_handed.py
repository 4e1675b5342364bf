"""Tokens that are handed to a pool of this machine, for stores that are no queue of a pool.

Where the store is far away, and other pools use it too, nobody looks there for queued tokens: who
invokes a token puts it into a queue of the pool, and an idle executor starts it from there. The
queue is a file in memory that the pool's processes share:

    header            how many tokens, where the next record goes, and the lanes: one for each
                      priority, with the places of its first and last record
    two notes a seat  the jobs that the executors on it, of two lanes, were handed last
    records           place of the next one in the lane, length, marshal of (job, token)

A lock of the kernel guards it, which ends with its holder's process. A record is written before the
header that names it, so that a process may die at any instruction. What is in the queue is a hint:
the store decides who runs a token, and a token that was lost here is found by the sweeper.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import marshal
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from wukong.executor.lanes import LaneExecutor
from wukong.executor.messages import Invocation, JobId, TokenId
from wukong.executor.run import Executor
from wukong.storage import Store

N_LANES = 16
"""Priorities that are kept apart; further ones share the lane of the lowest."""
NOTE_BYTES = 256
SHRINK_BYTES = 1 << 20
"""A file that has grown beyond this is cut when it is empty."""

_counts = struct.Struct("<QQ")
_lane = struct.Struct("<qQQ")
_record = struct.Struct("<QI")
_HEADER_BYTES = _counts.size + N_LANES * _lane.size


class HandedTokens:
    """The queue. Thread-safe, and shared by processes; each has an object of its own.

    Args:
        fd: of the file; not owned.
        n_seats: executors of the pool.
        seat: whose tokens this object takes.
    """

    @staticmethod
    def make(store: Store, n_seats: int, undo: contextlib.ExitStack) -> HandedTokens | None:
        """A new queue, which `undo` removes; None: the store itself is the pool's queue."""
        if store.queue is not None:
            return None
        fd = os.memfd_create("wukong-tokens", os.MFD_CLOEXEC)
        undo.callback(os.close, fd)
        return HandedTokens(fd, n_seats)

    def __init__(self, fd: int, n_seats: int, seat: int = 0) -> None:
        self.fd = self._fd = fd
        self._note = 2 * seat
        self._base = _HEADER_BYTES + 2 * n_seats * NOTE_BYTES
        self._lock = threading.Lock()

    def beside(self) -> HandedTokens:
        """The same queue for the seat's second lane."""
        other = copy.copy(self)  # and with it the lock of this process's threads
        other._note += 1
        return other

    def push(self, invocations: Sequence[Invocation], is_repeated: bool = False) -> None:
        """Append tokens.

        Args:
            is_repeated: some may be there already; these are left out.
        """
        if not invocations:
            return
        with self._locked():
            n, end, lanes = self._read_header()
            known = set(self._records(lanes)) if is_repeated else ()
            for job, token, priority in invocations:
                if (job, token) in known:
                    continue
                content = marshal.dumps((job, token))
                os.pwrite(self._fd, _record.pack(0, len(content)) + content, end)
                n += 1
                _append(self._fd, lanes, priority, end)
                end += _record.size + len(content)
            self._write_header(n, end, lanes)

    def pop(self) -> Invocation | None:
        """The first token of the highest priority; None: there is none. Cost: some 10 us."""
        if not self.n_queued():
            return None
        with self._locked():
            n, end, lanes = self._read_header()
            if not lanes:
                return None
            first = max(range(len(lanes)), key=lambda i: lanes[i][0])
            priority, place, last = lanes[first]
            following, job, token = self._read_record(place)
            if place == last:
                del lanes[first]
            else:
                lanes[first] = (priority, following, last)
            self._write_note(job)
            if not lanes and end > self._base + SHRINK_BYTES:
                os.truncate(self._fd, self._base)
            self._write_header(n - 1 if lanes else 0, end if lanes else self._base, lanes)
        return Invocation(JobId(job), TokenId(token), priority)

    def n_queued(self) -> int:
        """Tokens in the queue. Cost: a microsecond."""
        found = os.pread(self._fd, 8, 0)
        return int.from_bytes(found, "little")

    def last_jobs(self, seat: int) -> tuple[JobId, ...]:
        """The jobs that the executors on a seat were handed last."""
        notes = os.pread(self._fd, 2 * NOTE_BYTES, _HEADER_BYTES + 2 * seat * NOTE_BYTES)
        names = [notes[i : i + NOTE_BYTES].partition(b"\0")[0] for i in (0, NOTE_BYTES)]
        return tuple(JobId(name.decode()) for name in dict.fromkeys(names) if name)

    # -------------------------------------------------------------- the file

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The kernel's lock keeps processes apart, the other one the threads of this process.
        with self._lock:
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _read_header(self) -> tuple[int, int, list[tuple[int, int, int]]]:
        header = os.pread(self._fd, _HEADER_BYTES, 0)
        if len(header) < _HEADER_BYTES:
            return 0, self._base, []
        n, end = _counts.unpack_from(header)
        lanes = [_lane.unpack_from(header, _counts.size + i * _lane.size) for i in range(N_LANES)]
        return n, end or self._base, [lane for lane in lanes if lane[1]]

    def _write_header(self, n: int, end: int, lanes: Sequence[tuple[int, int, int]]) -> None:
        packed = _counts.pack(n, end) + b"".join(_lane.pack(*lane) for lane in lanes)
        os.pwrite(self._fd, packed.ljust(_HEADER_BYTES, b"\0"), 0)

    def _read_record(self, place: int) -> tuple[int, str, str]:
        head = os.pread(self._fd, _record.size + 512, place)
        following, size_bytes = _record.unpack_from(head)
        content = head[_record.size : _record.size + size_bytes]
        if len(content) < size_bytes:
            content = os.pread(self._fd, size_bytes, place + _record.size)
        fields: Any = marshal.loads(content)  # written by this pool's processes only
        return following, fields[0], fields[1]

    def _records(self, lanes: Sequence[tuple[int, int, int]]) -> Iterator[tuple[str, str]]:
        for _, place, last in lanes:
            while True:
                following, job, token = self._read_record(place)
                yield job, token
                if place == last:
                    break
                place = following

    def _write_note(self, job: str) -> None:
        note = job.encode()[: NOTE_BYTES - 1].ljust(NOTE_BYTES, b"\0")
        os.pwrite(self._fd, note, _HEADER_BYTES + self._note * NOTE_BYTES)


def _append(fd: int, lanes: list[tuple[int, int, int]], priority: int, place: int) -> None:
    """Link a record that is written into its lane."""
    for i, (own, first, last) in enumerate(lanes):
        if own == priority:
            os.pwrite(fd, place.to_bytes(8, "little"), last)
            lanes[i] = (own, first, place)
            return
    if len(lanes) < N_LANES:
        lanes.append((priority, place, place))
        return
    _append(fd, lanes, min(lanes)[0], place)


class HandedExecutor(Executor):
    """An executor that takes its tokens from the queue of its pool.

    Args:
        tokens: the queue.
        rest: of `Executor`.
    """

    def __init__(self, tokens: HandedTokens, *rest: Any) -> None:
        super().__init__(*rest)
        self._tokens = tokens

    def take(self) -> bool:
        """Run the first token of the queue, and whatever it becomes. False: there was none."""
        if self._core.is_draining:
            return False
        invocation = self._tokens.pop()
        if invocation is None:
            return False
        self.run(invocation.job, invocation.token)
        return True


class HandedLane(HandedExecutor, LaneExecutor):
    """The same in one of two lanes.

    Args:
        tokens: the queue.
        rest: of `LaneExecutor`.
    """
