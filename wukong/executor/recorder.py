"""What an executor notes while it works, to be sent along with the next commit."""

from __future__ import annotations

import resource
import sys
import time

from wukong import trace
from wukong.executor.messages import Grant
from wukong.executor.wire import Traffic

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss`."""


class Recorder:
    """Collects one `RunRecord` after the other.

    Args:
        holder: the executor's name.
        shares_client: the executor is a thread of the client, whose memory is not its own.
    """

    def __init__(self, holder: str, shares_client: bool) -> None:
        self._holder = holder
        self._shares_client = shares_client
        self.ended: list[float] = []
        """`time.perf_counter()` after each task since the last record."""
        self.retried: dict[int, int] = {}
        """Task -> how often it was run again."""
        self._tasks: list[int] = []
        self._grant: Grant | None = None
        self._is_invoked = False
        self._begun_at = self._fetched_at = self._ran_at = 0.0
        self._clock_at = 0.0

    def begin(self, grant: Grant, is_invoked: bool) -> None:
        """A token is held from now on; `is_invoked` says that it was not become."""
        self._grant = grant
        self._is_invoked = is_invoked
        self._begun_at = self._fetched_at = self._ran_at = time.time()
        self._clock_at = time.perf_counter()

    def fetched(self) -> None:
        """Tasks run from now on; a second call under one token (absorb) changes nothing."""
        if not self._tasks and not self.ended:
            self._fetched_at = time.time()
            self._clock_at = time.perf_counter()

    @property
    def task_begun_at(self) -> float:
        """When the task that runs was begun, on the clock of `ended`."""
        return self.ended[-1] if self.ended else self._clock_at

    @property
    def n_ended(self) -> int:
        """Tasks that have ended and are not closed."""
        return len(self.ended) - len(self._tasks)

    def close(self, tasks: tuple[int, ...]) -> None:
        """These tasks have ended, in this order, and belong to the next record."""
        self._tasks.extend(tasks)

    def reopen(self, n_tasks: int) -> None:
        """The last tasks belong to a later record after all."""
        if n_tasks:
            del self._tasks[-n_tasks:]

    def ran(self, tasks: tuple[int, ...]) -> int:
        """A run of these tasks has ended. Returns: how many of them it has done."""
        self._ran_at = time.time()
        n_done = self.n_ended
        self.close(tasks[:n_done])
        return n_done

    def pack(self, traffic: Traffic) -> trace.RunRecord:
        """Make the record of what has been closed, and start the next one."""
        grant = self._grant
        assert grant is not None, "no token is held"
        n_tasks = len(self._tasks)
        ended = [end - self._clock_at for end in self.ended[:n_tasks]]
        now = time.time()
        # A split commits in the middle of a run, which then has not ended by itself.
        worked_s = ended[-1] if ended else 0.0
        record = trace.RunRecord(
            strand=grant.strand,
            token=grant.token,
            attempt=grant.attempt,
            holder=self._holder,
            n_starts=grant.n_starts,
            n_deaths=grant.n_deaths,
            cause=grant.cause,
            is_invoked=self._is_invoked,
            begun_at=self._begun_at,
            fetched_at=self._fetched_at,
            ran_at=max(self._ran_at, self._fetched_at + worked_s),
            sent_at=now,
            bytes_read=traffic.bytes_read,
            bytes_written=traffic.bytes_written,
            blob_bytes_written=traffic.blob_bytes_written,
            n_blobs_read=traffic.n_blobs_read,
            n_blobs_written=traffic.n_blobs_written,
            n_round_trips=traffic.n_round_trips,
            copied_bytes=traffic.copied_bytes,
            peak_memory_bytes=0 if self._shares_client else peak_memory_bytes(),
            tasks=trace.int32(self._tasks),
            ended_s=trace.float32(ended),
            retried=tuple(sorted(self.retried.items())),
        )
        traffic.reset()
        del self.ended[:n_tasks]
        self._tasks.clear()
        self.retried.clear()
        return record


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
