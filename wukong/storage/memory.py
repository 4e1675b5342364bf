"""The store of one process, `memory://`: rows are the objects themselves, under one lock.

Values inside entries are never copied or pickled. This store is also the model that the others are
compared with, so that it is as plain as it can be.

    jobs    job id -> table code -> row id -> row
    queue   priority -> (job id, token id), first queued first
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    BlobId,
    Commit,
    Create,
    ExportId,
    Extend,
    Feed,
    Grant,
    HolderId,
    Invocation,
    JobId,
    JobView,
    Located,
    News,
    Reason,
    Receipt,
    Refused,
    Relaunch,
    RunningToken,
    StrandId,
    TokenId,
)
from wukong.storage import extension, oversight, state
from wukong.storage import rows as job_rows
from wukong.storage.contract import QueueStore
from wukong.storage.rows import Table, TokenRow

R = TypeVar("R")


class _Queue:
    """The queued tokens of all jobs, in the order in which they are taken."""

    __slots__ = ("_by_priority",)

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[tuple[JobId, str], None]] = {}

    def add(self, job: JobId, token: str, priority: int) -> None:
        """Append a token; one that is queued already keeps its place."""
        self._by_priority.setdefault(priority, OrderedDict()).setdefault((job, token))

    def remove(self, job: JobId, token: str, priority: int) -> None:
        """Remove a token; one that is not queued is no error."""
        line = self._by_priority.get(priority)
        if line is None:
            return
        line.pop((job, token), None)
        if not line:
            del self._by_priority[priority]

    def first(self) -> tuple[JobId, TokenId, int] | None:
        """The next token and its priority."""
        if not self._by_priority:
            return None
        priority = max(self._by_priority)
        job, token = next(iter(self._by_priority[priority]))
        return job, TokenId(token), priority

    def __len__(self) -> int:
        return sum(len(line) for line in self._by_priority.values())


class _MemoryRows:
    """The rows of one job."""

    __slots__ = ("_queue", "_tables", "job")

    def __init__(self, job: JobId, queue: _Queue) -> None:
        self.job = job
        self._queue = queue
        self._tables: dict[str, dict[str, object]] = {table.code: {} for table in job_rows.TABLES}

    def get(self, table: Table[R], key: str) -> R | None:
        return self._tables[table.code].get(key)  # type: ignore[return-value]  # by its table

    def put(self, table: Table[R], key: str, row: R) -> None:
        self._tables[table.code][key] = row
        if isinstance(row, TokenRow):
            if row.running:
                self._queue.remove(self.job, key, row.priority)
            else:
                self._queue.add(self.job, key, row.priority)

    def delete(self, table: Table[R], key: str) -> None:
        row = self._tables[table.code].pop(key, None)
        if isinstance(row, TokenRow):
            self._queue.remove(self.job, key, row.priority)

    def scan(self, table: Table[R]) -> Iterator[tuple[str, R]]:
        # Sorted as the embedded store's keys are, so that both hand out tokens in one order.
        return iter(sorted(self._tables[table.code].items()))  # type: ignore[arg-type]  # by its table


class MemoryJobStore(QueueStore):
    """Jobs in the memory of this process, for threads."""

    def __init__(
        self, silence_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin empty.

        Args:
            silence_s: a running token without heartbeat for this long counts as dead.
            clock: seconds; only tests give another one.
        """
        self._silence_s = silence_s
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._n_waiting = 0
        self._n_waiting_for_progress = 0
        self._jobs: dict[JobId, _MemoryRows] = {}
        self._queue = _Queue()

    def create(self, request: Create) -> tuple[Invocation, ...]:
        with self._lock:
            rows = self._rows(request.job)
            minted = state.create(rows, request, self._silence_s, self._clock())
            self._jobs[request.job] = rows
            return minted

    def start(
        self, job: JobId, token: TokenId, attempt: AttemptId, holder: HolderId
    ) -> Grant | Refused:
        with self._lock:
            return state.start(self._rows(job), token, attempt, holder, self._clock())

    def take(self, holder: HolderId, attempt: AttemptId) -> Grant | None:
        if not self._queue:
            return None
        with self._lock:
            while (first := self._queue.first()) is not None:
                job, token, priority = first
                reply = state.start(self._rows(job), token, attempt, holder, self._clock())
                if isinstance(reply, Grant):
                    return reply
                self._queue.remove(job, token, priority)
            return None

    def n_queued(self) -> int:
        with self._lock:
            return len(self._queue)

    def renew(self, job: JobId, token: TokenId, attempt: AttemptId) -> Reason | None:
        with self._lock:
            return state.renew(self._rows(job), token, attempt, self._clock())

    def absorb(
        self, job: JobId, token: TokenId, attempt: AttemptId, feed: Feed, n_held: int
    ) -> Absorbed | Refused:
        with self._lock:
            return state.absorb(self._rows(job), token, attempt, feed, n_held)

    def commit(self, request: Commit) -> Receipt | Refused:
        with self._lock:
            rows = self._rows(request.job)
            reply = state.commit(rows, request, self._clock())
            if (
                self._n_waiting
                and isinstance(reply, Receipt)
                and (reply.job_over or self._n_waiting_for_progress or _has_news(rows))
            ):
                self._changed.notify_all()
            return reply

    def confirm(self, job: JobId) -> None:
        """Nothing is lost as long as this machine runs."""

    def release(self, holder: HolderId, cause: str) -> tuple[Invocation, ...]:
        with self._lock:
            now = self._clock()
            return tuple(
                invocation
                for _, rows in sorted(self._jobs.items())
                for invocation in oversight.release(rows, holder, cause, now)
            )

    def expired(self, job: JobId) -> tuple[Invocation, ...]:
        with self._lock:
            return oversight.expired(self._rows(job), self._clock())

    def queued(self, job: JobId) -> tuple[Invocation, ...]:
        with self._lock:
            return oversight.queued(self._rows(job))

    def running(self, job: JobId) -> tuple[RunningToken, ...]:
        with self._lock:
            return oversight.running(self._rows(job))

    def duplicate(self, job: JobId, tokens: Sequence[TokenId]) -> tuple[Invocation, ...]:
        with self._lock:
            return oversight.duplicate(self._rows(job), tokens, self._clock())

    def report_lost(
        self, job: JobId, token: TokenId, attempt: AttemptId, exports: Sequence[ExportId]
    ) -> bool:
        with self._lock:
            self._changed.notify_all()
            return oversight.report_lost(self._rows(job), token, attempt, exports)

    def mark_lost(self, job: JobId, exports: Sequence[ExportId]) -> None:
        with self._lock:
            self._changed.notify_all()
            oversight.mark_lost(self._rows(job), exports)

    def recorded(self, job: JobId) -> tuple[ExportId, ...]:
        with self._lock:
            return oversight.recorded(self._rows(job))

    def relaunch(self, request: Relaunch) -> tuple[Invocation, ...]:
        with self._lock:
            self._changed.notify_all()
            return oversight.relaunch(self._rows(request.job), request, self._clock())

    def extend(self, request: Extend) -> tuple[Invocation, ...] | Refused:
        with self._lock:
            return extension.extend(self._rows(request.job), request, self._clock())

    def unpin(self, job: JobId, exports: Sequence[ExportId]) -> None:
        with self._lock:
            extension.unpin(self._rows(job), exports)
            self._changed.notify_all()

    def drop(self, job: JobId, strands: Sequence[tuple[StrandId, tuple[ExportId, ...]]]) -> None:
        with self._lock:
            extension.drop(self._rows(job), strands)
            self._changed.notify_all()

    def news(self, job: JobId, acknowledged: Sequence[str], collected: Sequence[BlobId]) -> News:
        with self._lock:
            return extension.news(self._rows(job), acknowledged, collected)

    def located(self, job: JobId, exports: Sequence[ExportId]) -> tuple[Located, ...]:
        with self._lock:
            return extension.located(self._rows(job), exports)

    def view(self, job: JobId) -> JobView | None:
        with self._lock:
            return oversight.view(self._rows(job))

    def wait(
        self, job: JobId, version: int, timeout_s: float, progress: bool = False
    ) -> JobView | None:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._n_waiting += 1
            self._n_waiting_for_progress += progress
            try:
                while True:
                    rows = self._rows(job)
                    row = rows.get(job_rows.JOB, job_rows.THE_JOB)
                    remaining_s = deadline - time.monotonic()
                    if row is None or remaining_s <= 0 or oversight.is_news(row, version, progress):
                        return oversight.view(rows)
                    self._changed.wait(remaining_s)
            finally:
                self._n_waiting -= 1
                self._n_waiting_for_progress -= progress

    def results(self, job: JobId) -> tuple[Located, ...]:
        with self._lock:
            return oversight.results(self._rows(job))

    def traces(self, job: JobId) -> tuple[object, ...]:
        with self._lock:
            return oversight.traces(self._rows(job))

    def collect(self, job: JobId) -> tuple[tuple[Located, ...], tuple[object, ...]]:
        with self._lock:
            rows = self._rows(job)
            return oversight.results(rows), oversight.traces(rows)

    def manifest(self, job: JobId) -> object | None:
        with self._lock:
            return oversight.manifest(self._rows(job))

    def cancel(self, job: JobId) -> bool:
        with self._lock:
            self._changed.notify_all()
            return oversight.cancel(self._rows(job))

    def forget(self, job: JobId) -> None:
        with self._lock:
            self._changed.notify_all()
            rows = self._jobs.pop(job, None)
            if rows is not None:
                for key, row in rows.scan(job_rows.TOKENS):
                    self._queue.remove(job, key, row.priority)

    def jobs(self) -> tuple[JobId, ...]:
        with self._lock:
            return tuple(sorted(self._jobs))

    def close(self) -> None:
        """Nothing is held outside this object."""

    def _rows(self, job: JobId) -> _MemoryRows:
        return self._jobs.get(job) or _MemoryRows(job, self._queue)


def _has_news(rows: _MemoryRows) -> bool:
    """Whether the last change of a job has brought news for an open job's client."""
    job = rows.get(job_rows.JOB, job_rows.THE_JOB)
    return job is not None and job.is_open and job.news_version == job.version
