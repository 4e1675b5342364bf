"""The stores of a simulated world: the real transitions, behind latencies and faults.

A request travels, takes effect at one moment, and its answer travels back; each of the three may
fail by itself. The job store has a replica that lags; a failover makes it the store. Blobs live in
another store, which does not fail over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from wukong.executor.events import AskAbsorb, Renew, ReportLost, Start
from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    BlobId,
    Commit,
    Create,
    ExportId,
    Grant,
    HolderId,
    Invocation,
    JobView,
    Located,
    Reason,
    Receipt,
    Refused,
    Relaunch,
    Status,
    TokenId,
)
from wukong.sim.checks import Value, Violation
from wukong.sim.world import JOB, World
from wukong.storage import oversight, state
from wukong.storage import rows as job_rows
from wukong.storage.rows import Table

R = TypeVar("R")
T = TypeVar("T")

TIMEOUT_S = 1.0
"""A request without an answer is given up after this time."""

_FIELDS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    table.row: attrgetter(*names)
    for table in job_rows.TABLES
    if len(names := tuple(table.row.__dataclass_fields__)) > 1
}


def _unheard(effect: Callable[[], object]) -> None:
    effect()


def _copied(row: R) -> R:
    fields = _FIELDS.get(type(row))
    return row if fields is None else type(row)(*fields(row))


class SimRows:
    """The rows of the job. A row that is changed in place and not put stays as it was."""

    __slots__ = ("job", "n_writes", "queue", "tables")

    def __init__(self) -> None:
        self.job = JOB
        self.tables: dict[str, dict[str, Any]] = {table.code: {} for table in job_rows.TABLES}
        self.queue: dict[str, None] = {}
        """Queued tokens, in the order in which they are taken."""
        self.n_writes = 0

    def get(self, table: Table[R], key: str) -> R | None:
        """See `job_rows.Rows`."""
        row = self.tables[table.code].get(key)
        return None if row is None else _copied(row)

    def put(self, table: Table[R], key: str, row: R) -> None:
        """See `job_rows.Rows`."""
        self.n_writes += 1
        self.tables[table.code][key] = _copied(row)
        if table is job_rows.TOKENS:
            if row.running:  # type: ignore[attr-defined]  # the rows of this table have it
                self.queue.pop(key, None)
            else:
                self.queue.setdefault(key)

    def delete(self, table: Table[R], key: str) -> None:
        """See `job_rows.Rows`."""
        self.n_writes += 1
        self.tables[table.code].pop(key, None)
        if table is job_rows.TOKENS:
            self.queue.pop(key, None)

    def scan(self, table: Table[R]) -> Iterator[tuple[str, R]]:
        """See `job_rows.Rows`."""
        rows = sorted(self.tables[table.code].items())
        return ((key, _copied(row)) for key, row in rows)

    def saved(self) -> tuple[Any, ...]:
        """All that `restore` needs; rows are never changed in place, so that they can be shared."""
        return {code: rows.copy() for code, rows in self.tables.items()}, self.queue.copy()

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Go back."""
        tables, queue = saved
        self.tables = {code: rows.copy() for code, rows in tables.items()}
        self.queue = queue.copy()
        self.n_writes += 1


class SimStore:
    """The job store and the blob store of one job."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows = SimRows()
        self.blobs: dict[BlobId, tuple[Value, ...]] = {}
        self.freed: set[BlobId] = set()
        """Blobs that are gone though their exports are there: who reads one is wrong."""
        self.sizes: dict[BlobId, int] = {}
        self.epoch = 0
        """Failovers so far. What was known in another epoch need not hold."""
        self.is_forgotten = False
        self._put_at: dict[BlobId, float] = {}
        self._lost: set[BlobId] = set()
        self._watchers: list[tuple[int, Callable[[JobView | None], None]]] = []
        self._log: deque[tuple[float, tuple[Any, ...], tuple[Any, ...]]] = deque()
        self._line: deque[Callable[[], None]] = deque()
        """Operations that the server has received and not begun; it does one at a time."""
        self._is_serving = False
        self._n_writes_seen = 0
        faults = world.setting.faults
        self._is_replicated = bool(faults.failovers)
        if self._is_replicated:
            self._remember()
        for time in faults.failovers:
            world.at(time, self._fail_over)
        for time in faults.blob_losses:
            world.at(time, self._lose_blob)

    # -------------------------------------------------------------- messages

    def call(
        self,
        effect: Callable[[], T],
        on_reply: Callable[[int, T], None],
        on_failure: Callable[[], None],
        *,
        typical_s: float | None = None,
        may_be_late: bool = True,
        n_operations: int = 1,
    ) -> None:
        """Send a request. Exactly one of the two is called back, unless its sender is dead by then.

        Args:
            effect: happens at one moment, or never, or after `on_failure`.
            on_reply: takes the epoch in which the effect happened, and its result.
            n_operations: of the job's server; 0 for the blob store, which has many.
        """
        world, faults = self.world, self.world.setting.faults
        typical_s = world.setting.platform.store_s if typical_s is None else typical_s
        world.counts["store calls"] += 1
        world.counts["store operations"] += n_operations
        if self._is_out() or world.hits(faults.request_lost):
            world.after(TIMEOUT_S, on_failure)
            return
        if may_be_late and world.hits(faults.late):
            world.after(TIMEOUT_S * world.rng.uniform(1.0, 5.0), _unheard, effect)
            world.after(TIMEOUT_S, on_failure)
            return

        def happen() -> None:
            before = self.rows.n_writes
            result = effect()
            taken_s = self._serve(self.rows.n_writes - before, n_operations) if is_served else 0.0
            if world.hits(faults.reply_lost):
                world.after(TIMEOUT_S, on_failure)
            else:
                back_s = taken_s + world.latency_s(typical_s / 2)
                world.after(back_s, on_reply, self.epoch, result)

        is_served = n_operations > 0 and world.setting.platform.service_s > 0.0
        if is_served:
            world.after(world.latency_s(typical_s / 2), self._receive, happen)
        else:
            world.after(world.latency_s(typical_s / 2), happen)

    def _receive(self, operation: Callable[[], None]) -> None:
        """An operation has come to the job's server."""
        if self._is_serving:
            self._line.append(operation)
        else:
            operation()

    def _serve(self, n_rows: int, n_operations: int) -> float:
        """Occupy the server for what an operation takes."""
        platform = self.world.setting.platform
        taken_s = platform.service_s * n_operations + platform.service_row_s * n_rows
        self.world.busy_s["store"] += taken_s
        self._is_serving = True
        self.world.after(taken_s, self._serve_next)
        return taken_s

    def _serve_next(self) -> None:
        self._is_serving = False
        if self._line:
            self._line.popleft()()

    def confirm(
        self, epoch: int, on_reply: Callable[[], None], on_failure: Callable[[], None]
    ) -> None:
        """Wait until everything so far is on the replica.

        Like `WAIT`, it speaks for the connection on which the changes were made: after a failover
        that is broken, and nothing can be said.
        """
        if epoch != self.epoch:
            self.world.after(0.0, on_failure)
            return
        lag_s = self.world.setting.faults.lag_s if self._is_replicated else 0.0
        self.world.after(lag_s * 1.001, lambda: on_reply() if epoch == self.epoch else on_failure())

    def _is_out(self) -> bool:
        now = self.world.now
        return any(a <= now < b for a, b in self.world.setting.faults.outages)

    # -------------------------------------------------------------- what changes rows

    def create(self, request: Create) -> tuple[Invocation, ...]:
        """See `JobStore.create`."""
        invocations = state.create(self.rows, request, self.world.setting.silence_s, self.world.now)
        self._changed()
        return invocations

    def start(self, request: Start, holder: HolderId) -> Grant | Refused:
        """See `JobStore.start`."""
        reply = state.start(self.rows, request.token, request.attempt, holder, self.world.now)
        self._changed()
        return reply

    def take(self, holder: HolderId, attempt: AttemptId) -> Grant | None:
        """See `QueueStore.take`."""
        token = next(iter(self.rows.queue), None)
        if token is None:
            return None
        reply = state.start(self.rows, TokenId(token), attempt, holder, self.world.now)
        self._changed()
        if isinstance(reply, Refused):
            del self.rows.queue[token]
            return None
        return reply

    def renew(self, request: Renew) -> Reason | None:
        """See `JobStore.renew`."""
        reply = state.renew(self.rows, request.token, request.attempt, self.world.now)
        self._changed()
        return reply

    def absorb(self, request: AskAbsorb) -> Absorbed | Refused:
        """See `JobStore.absorb`."""
        return state.absorb(self.rows, request.token, request.attempt, request.feed, request.n_held)

    def commit(self, request: Commit, made: Mapping[int, Value]) -> Receipt | Refused:
        """See `JobStore.commit`.

        Args:
            made: the tasks that the work has done, for the checker.
        """
        version = self._version()
        reply = state.commit(self.rows, request, self.world.now)
        if self._version() != version:
            self.world.counts["commits"] += 1
            if self.world.checker is not None:
                self.world.checker.committed(
                    request, made, self.rows.tables, self.blobs, self._lost
                )
        self._changed()
        return reply

    def release(self, holder: HolderId, cause: str) -> tuple[Invocation, ...]:
        """See `JobStore.release`."""
        invocations = oversight.release(self.rows, holder, cause, self.world.now)
        self._changed()
        return invocations

    def expired(self) -> tuple[Invocation, ...]:
        """See `JobStore.expired`."""
        invocations = oversight.expired(self.rows, self.world.now)
        self._changed()
        return invocations

    def duplicate_all(self) -> tuple[Invocation, ...]:
        """See `JobStore.duplicate`: of everything that runs."""
        tokens = [running.token for running in oversight.running(self.rows)]
        invocations = oversight.duplicate(self.rows, tokens, self.world.now)
        self._changed()
        return invocations

    def report_lost(self, request: ReportLost) -> bool:
        """See `JobStore.report_lost`."""
        reply = oversight.report_lost(self.rows, request.token, request.attempt, request.exports)
        if reply:
            self._check_lost_exports(request.exports)
        self._changed()
        return reply

    def mark_lost(self, exports: Sequence[ExportId]) -> JobView | None:
        """See `JobStore.mark_lost`; returns the view after it."""
        oversight.mark_lost(self.rows, exports)
        self._changed()
        return oversight.view(self.rows)

    def recorded(self) -> tuple[ExportId, ...]:
        """See `JobStore.recorded`."""
        return oversight.recorded(self.rows)

    def relaunch(self, request: Relaunch) -> tuple[Invocation, ...]:
        """See `JobStore.relaunch`."""
        before = self._generation()
        invocations = oversight.relaunch(self.rows, request, self.world.now)
        if self._generation() != before:
            self.world.counts["relaunches"] += 1
            if self.world.checker is not None:
                self.world.checker.relaunched(request, self.rows.tables)
        self._changed()
        return invocations

    # -------------------------------------------------------------- looking, and the end

    def collect(self) -> tuple[tuple[Located, ...], JobView | None]:
        """See `JobStore.collect`; with a view of the job, and without traces."""
        return oversight.results(self.rows), oversight.view(self.rows)

    def view(self) -> JobView | None:
        """See `JobStore.view`."""
        return oversight.view(self.rows)

    def forget(self) -> None:
        """See `JobStore.forget`."""
        self.is_forgotten = True
        for rows in self.rows.tables.values():
            rows.clear()
        self.rows.queue.clear()
        self.rows.n_writes += 1
        self._changed()

    # -------------------------------------------------------------- watching

    def watch(self, version: int, tell: Callable[[JobView | None], None]) -> None:
        """Tell once of news since a version, as soon as there are; the message may get lost."""
        self._watchers.append((version, tell))
        self._tell()

    def _tell(self) -> None:
        job = self.rows.tables["j"].get(job_rows.THE_JOB)
        waiting = []
        for version, tell in self._watchers:
            if job is not None and not oversight.is_news(job, version, False):
                waiting.append((version, tell))
            elif not self.world.hits(self.world.setting.faults.news_lost):
                delay_s = self.world.latency_s(self.world.setting.platform.store_s / 2)
                self.world.after(delay_s, tell, oversight.view(self.rows))
        self._watchers = waiting

    def _generation(self) -> int:
        job = self.rows.tables["j"].get(job_rows.THE_JOB)
        return -1 if job is None else int(job.generation)

    def _version(self) -> int:
        job = self.rows.tables["j"].get(job_rows.THE_JOB)
        return -1 if job is None else int(job.version)

    def _changed(self) -> None:
        if self.rows.n_writes != self._n_writes_seen:
            self._n_writes_seen = self.rows.n_writes
            if self._watchers:
                self._tell()
            if self._is_replicated:
                self._remember()

    # -------------------------------------------------------------- failover

    def _remember(self) -> None:
        checker = self.world.checker
        saved = (self.rows.saved(), () if checker is None else checker.saved())
        self._log.append((self.world.now, *saved))
        while len(self._log) > 1 and self._log[1][0] <= self._replicated_until():
            self._log.popleft()

    def _replicated_until(self) -> float:
        return self.world.now - self.world.setting.faults.lag_s

    def _fail_over(self) -> None:
        if self.is_forgotten:
            return  # rows that come back after that expire with the job's lease
        world, until = self.world, self._replicated_until()
        while len(self._log) > 1 and self._log[1][0] <= until:
            self._log.popleft()
        _, rows, seen = self._log[0]
        world.log("store", "fails over")
        world.counts["failovers"] += 1
        self._log.clear()
        self.rows.restore(rows)
        self.epoch += 1
        if world.checker is not None:
            world.checker.restore(seen)
            world.checker.check_rows(self.rows.tables)
        if world.setting.faults.takes_blobs:
            for blob in [b for b, time in self._put_at.items() if time > until]:
                self._lose(blob)
        for row in self.rows.tables["e"].values():
            for entry in row.entries:
                if entry.blob is not None and entry.blob not in self.blobs.keys() | self.freed:
                    self._check_lost(entry.blob)
        self._changed()

    # -------------------------------------------------------------- blobs

    def put(self, blobs: Mapping[BlobId, tuple[tuple[Value, ...], int]]) -> None:
        """Make values, each with its size, durable."""
        for blob, (values, size_bytes) in blobs.items():
            self.blobs[blob] = values
            self.sizes[blob] = size_bytes
            self._put_at[blob] = self.world.now
            self.world.counts["put bytes"] += size_bytes
            self.world.counts["blobs put"] += 1

    def get(self, blobs: Sequence[BlobId], is_live: Callable[[], bool]) -> list[BlobId]:
        """Read blobs. Returns: those that are gone."""
        missing = [blob for blob in blobs if blob not in self.blobs]
        if missing and is_live():
            for blob in missing:
                self._check_lost(blob)
        return missing

    def delete(self, blobs: Sequence[BlobId]) -> None:
        """Delete blobs; those that are gone already are no error."""
        for blob in blobs:
            if self.world.checker is not None and blob not in self.freed:
                self.world.checker.deleted(blob, self.rows.tables)
            self._remove(blob)

    def delete_job(self) -> None:
        """Delete all blobs."""
        self.blobs.clear()
        self._put_at.clear()

    def check_nothing_else_is_kept(self) -> None:
        """Without faults, blobs are values that are still wanted, or known garbage."""
        tables = self.rows.tables
        kept = {entry.blob for row in tables["e"].values() for entry in row.entries}
        kept.update(*(job.garbage for job in tables["j"].values()))
        forgotten = sorted(self.blobs.keys() - kept)
        if forgotten:
            raise Violation(f"nobody knows of the blobs {forgotten}")

    def is_live(self, token: TokenId) -> bool:
        """Say whether the work under a token is still wanted."""
        job = self.rows.tables["j"].get(job_rows.THE_JOB)
        return job is not None and job.status is Status.RUNNING and token in self.rows.tables["t"]

    def _check_lost(self, blob: BlobId) -> None:
        if blob not in self._lost:
            raise Violation(f"blob {blob} is needed, and nobody has taken it away")

    def _check_lost_exports(self, exports: Sequence[ExportId]) -> None:
        for export in exports:
            row = self.rows.tables["e"].get(export)
            if row is None or self._lost.isdisjoint(entry.blob for entry in row.entries):
                raise Violation(f"export {export} counts as lost, and nobody has taken it away")

    def _lose_blob(self) -> None:
        if self.blobs:
            self._lose(self.world.rng.choice(sorted(self.blobs)))

    def _lose(self, blob: BlobId) -> None:
        self.world.log("store", f"loses {blob}")
        self.world.counts["blobs lost"] += 1
        self._lost.add(blob)
        self._remove(blob)

    def _remove(self, blob: BlobId) -> None:
        self.blobs.pop(blob, None)
        self._put_at.pop(blob, None)
