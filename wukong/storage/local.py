"""The embedded store, `local:///directory`: jobs in LMDB, shared by the processes of one machine.

Each operation of `wukong.storage.state` is one transaction. What lies where:

    local_files    the directory (its layout stands there), the secret, removing what is stale
    local_env      the LMDB environment: transactions, room, stopped writers
    local_rows     rows <-> bytes, the key schema, the queue
    local_peers    other processes: who lives, waiting and waking

Waiting: a thread that waits for a job has a pipe, whose name stands in a row of the job before it
reads the job's version. Who changes the job writes a byte to the pipes named there, after its
transaction has committed. So a change is either read or announced; nobody polls. Whoever creates a
job registers a pipe in the same transaction.
"""

from __future__ import annotations

import contextlib
import itertools
import marshal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wukong.errors import StoreUnavailable
from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    BlobId,
    Commit,
    Create,
    Entry,
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
    Output,
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
from wukong.storage.local_env import LOOK_BYTES, close_environment, open_environment
from wukong.storage.local_peers import Pipe, sweep, wake
from wukong.storage.local_rows import N_ROW_BYTES, StoredRows

if TYPE_CHECKING:
    import lmdb

T = TypeVar("T")

MAX_JOB_ID_BYTES = 128
"""A token's key holds its job's id twice, and LMDB's keys end at 511 bytes."""


class LocalJobStore(QueueStore):
    """Jobs in an LMDB file. Thread-safe; open it after forking, not before."""

    def __init__(
        self,
        directory: Path,
        silence_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open a store, and make it when it is new.

        Args:
            directory: of this user only; see `local_files`.
            silence_s: a running token without heartbeat for this long counts as dead.
            clock: seconds, the same for all processes of the machine; only tests give another one.
        Raises:
            SecurityError: others may write to the directory.
            StoreUnavailable: there is no room, or it cannot be made.
        """
        self._environment = open_environment(directory)
        self._silence_s = silence_s
        self._clock = clock
        self._closed = False
        self._pipes = _Pipes(self._environment.directory)

    @property
    def secret(self) -> bytes:
        """From which the keys of all jobs are derived."""
        return self._environment.secret

    @property
    def directory(self) -> Path:
        """Where the store lies."""
        return self._environment.directory

    # -------------------------------------------------------------- executors

    def create(self, request: Create) -> tuple[Invocation, ...]:
        job = request.job
        if not job or "\0" in job or len(job.encode()) > MAX_JOB_ID_BYTES:
            raise ValueError(f"a job's id has 1 to {MAX_JOB_ID_BYTES} bytes and no NUL: {job!r}")
        pipe = self._pipes.default()

        def operation(rows: StoredRows) -> tuple[Invocation, ...]:
            minted = state.create(rows, request, self._silence_s, self._clock())
            rows.set_watch(pipe, progress=False)
            return minted

        n_bytes = _size_bytes(request.programs, request.sources, len(request.entries))
        return self._change(job, operation, n_bytes)

    def start(
        self, job: JobId, token: TokenId, attempt: AttemptId, holder: HolderId
    ) -> Grant | Refused:
        return self._change(
            job, lambda rows: state.start(rows, token, attempt, holder, self._clock())
        )

    def take(self, holder: HolderId, attempt: AttemptId) -> Grant | None:
        queue = self._environment.queue
        if not self._environment.read(lambda txn: txn.cursor(db=queue).first()):
            return None

        def transaction(txn: lmdb.Transaction[bytes]) -> tuple[Grant | None, int]:
            cursor = txn.cursor(db=queue)
            number = itertools.count()
            n_bytes = 0
            while cursor.first():
                place, packed = cursor.item()
                job, token = marshal.loads(packed)
                rows = StoredRows(job, txn, queue, number)
                reply = state.start(rows, token, attempt, holder, self._clock())
                n_bytes += rows.n_dirty_bytes + N_ROW_BYTES
                if isinstance(reply, Grant):
                    return reply, n_bytes
                # The job is over: its tokens are nobody's work any more.
                txn.delete(place, db=queue)
            return None, n_bytes

        return self._environment.write(transaction)

    def n_queued(self) -> int:
        queue = self._environment.queue
        return self._environment.read(lambda txn: txn.stat(queue)["entries"])

    def renew(self, job: JobId, token: TokenId, attempt: AttemptId) -> Reason | None:
        return self._change(job, lambda rows: state.renew(rows, token, attempt, self._clock()))

    def absorb(
        self, job: JobId, token: TokenId, attempt: AttemptId, feed: Feed, n_held: int
    ) -> Absorbed | Refused:
        return self._look(job, lambda rows: state.absorb(rows, token, attempt, feed, n_held))

    def commit(self, request: Commit) -> Receipt | Refused:
        return self._change(request.job, lambda rows: state.commit(rows, request, self._clock()))

    def confirm(self, job: JobId) -> None:
        """Nothing is lost as long as this machine runs."""

    # -------------------------------------------------------------- faults

    def release(self, holder: HolderId, cause: str) -> tuple[Invocation, ...]:
        def transaction(txn: lmdb.Transaction[bytes]) -> tuple[tuple[Invocation, ...], int]:
            number = itertools.count()
            found: list[Invocation] = []
            n_bytes = 0
            for job in _jobs(txn):
                rows = StoredRows(job, txn, self._environment.queue, number)
                found += oversight.release(rows, holder, cause, self._clock())
                n_bytes += rows.n_dirty_bytes
            return tuple(found), n_bytes

        self._environment.clear_dead_readers()
        sweep(self._environment.directory)
        return self._environment.write(transaction)

    def expired(self, job: JobId) -> tuple[Invocation, ...]:
        return self._change(job, lambda rows: oversight.expired(rows, self._clock()))

    def queued(self, job: JobId) -> tuple[Invocation, ...]:
        return self._look(job, oversight.queued)

    def running(self, job: JobId) -> tuple[RunningToken, ...]:
        return self._look(job, oversight.running)

    def duplicate(self, job: JobId, tokens: Sequence[TokenId]) -> tuple[Invocation, ...]:
        return self._change(job, lambda rows: oversight.duplicate(rows, tokens, self._clock()))

    def report_lost(
        self, job: JobId, token: TokenId, attempt: AttemptId, exports: Sequence[ExportId]
    ) -> bool:
        return self._change(job, lambda rows: oversight.report_lost(rows, token, attempt, exports))

    def mark_lost(self, job: JobId, exports: Sequence[ExportId]) -> None:
        self._change(job, lambda rows: oversight.mark_lost(rows, exports))

    def recorded(self, job: JobId) -> tuple[ExportId, ...]:
        return self._look(job, oversight.recorded)

    def relaunch(self, request: Relaunch) -> tuple[Invocation, ...]:
        return self._change(
            request.job,
            lambda rows: oversight.relaunch(rows, request, self._clock()),
            rewrites_all=True,
        )

    # -------------------------------------------------------------- open jobs

    def extend(self, request: Extend) -> tuple[Invocation, ...] | Refused:
        return self._change(
            request.job,
            lambda rows: extension.extend(rows, request, self._clock()),
            _size_bytes(request.programs, request.sources, len(request.strands)),
            rewrites_all=request.restart is not None,
        )

    def unpin(self, job: JobId, exports: Sequence[ExportId]) -> None:
        self._change(job, lambda rows: extension.unpin(rows, exports))

    def drop(self, job: JobId, strands: Sequence[tuple[StrandId, tuple[ExportId, ...]]]) -> None:
        self._change(job, lambda rows: extension.drop(rows, strands))

    def news(self, job: JobId, acknowledged: Sequence[str], collected: Sequence[BlobId]) -> News:
        if not acknowledged and not collected:
            return self._look(job, lambda rows: extension.news(rows, (), ()))
        return self._change(job, lambda rows: extension.news(rows, acknowledged, collected))

    def located(self, job: JobId, exports: Sequence[ExportId]) -> tuple[Located, ...]:
        return self._look(job, lambda rows: extension.located(rows, exports))

    # -------------------------------------------------------------- clients

    def view(self, job: JobId) -> JobView | None:
        return self._look(job, oversight.view)

    def wait(
        self, job: JobId, version: int, timeout_s: float, progress: bool = False
    ) -> JobView | None:
        deadline = time.monotonic() + timeout_s
        with self._pipes.borrow() as pipe:

            def look(rows: StoredRows) -> tuple[bool, JobView | None, bool]:
                row = rows.get(job_rows.JOB, job_rows.THE_JOB)
                over = row is None or time.monotonic() >= deadline
                if row is None or over or oversight.is_news(row, version, progress):
                    return True, oversight.view(rows), True
                return False, None, rows.get_watch(pipe.name) is progress

            def register(rows: StoredRows) -> None:
                if rows.get(job_rows.JOB, job_rows.THE_JOB) is not None:
                    rows.set_watch(pipe.name, progress)

            while True:
                # Whatever comes after the look wakes the pipe.
                settled, view, registered = self._look(job, look)
                if settled:
                    return view
                if self._closed:
                    raise StoreUnavailable(f"{self.directory}: closed while a thread was waiting")
                if registered:
                    pipe.wait(deadline - time.monotonic())
                else:
                    self._change(job, register)

    def results(self, job: JobId) -> tuple[Located, ...]:
        return self._look(job, oversight.results)

    def traces(self, job: JobId) -> tuple[object, ...]:
        return self._look(job, oversight.traces)

    def collect(self, job: JobId) -> tuple[tuple[Located, ...], tuple[object, ...]]:
        return self._look(job, lambda rows: (oversight.results(rows), oversight.traces(rows)))

    def manifest(self, job: JobId) -> object | None:
        return self._look(job, oversight.manifest)

    def cancel(self, job: JobId) -> bool:
        return self._change(job, oversight.cancel, rewrites_all=True)

    def forget(self, job: JobId) -> None:
        self._change(job, StoredRows.delete_all, rewrites_all=True)

    def jobs(self) -> tuple[JobId, ...]:
        return self._environment.read(lambda txn: tuple(_jobs(txn)))

    def close(self) -> None:
        # In a forked child all of it is the parent's.
        if not self._closed and not self._environment.is_forked:
            self._closed = True
            self._pipes.close()
            close_environment(self._environment)

    # -------------------------------------------------------------- transactions

    def _look(self, job: JobId, operation: Callable[[StoredRows], T]) -> T:
        """Read a job, at one moment."""
        queue = self._environment.queue
        return self._environment.read(
            lambda txn: operation(StoredRows(job, txn, queue, itertools.count()))
        )

    def _change(
        self,
        job: JobId,
        operation: Callable[[StoredRows], T],
        n_expected_bytes: int = 0,
        rewrites_all: bool = False,
    ) -> T:
        """Change a job, wholly or not at all, and wake whom it concerns."""
        to_wake: list[str] = []

        def transaction(txn: lmdb.Transaction[bytes]) -> tuple[T, int]:
            rows = StoredRows(job, txn, self._environment.queue, itertools.count())
            reply = operation(rows)
            to_wake.extend(rows.to_wake())
            return reply, rows.n_dirty_bytes

        reply = self._environment.write(transaction, n_expected_bytes, rewrites_all)
        if to_wake:
            self._wake(job, to_wake)
        return reply

    def _wake(self, job: JobId, names: list[str]) -> None:
        gone = list(wake(self.directory, names))

        def unregister(rows: StoredRows) -> None:
            for name in gone:
                rows.delete_watch(name)

        if gone:
            self._change(job, unregister)


class _Pipes:
    """The pipes of one store object: as many as its threads have ever waited at once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._pipes: list[Pipe] = []
        self._lent: set[Pipe] = set()
        self._closed = threading.Event()

    def default(self) -> str:
        """The name of the pipe that is lent first."""
        with self._lock:
            return (self._pipes[0] if self._pipes else self._new()).name

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Pipe]:
        """Lend the first pipe that is free."""
        with self._lock:
            if self._closed.is_set():
                raise StoreUnavailable(f"{self._directory}: this store object has been closed")
            pipe = next((p for p in self._pipes if p not in self._lent), None)
            if pipe is None:
                pipe = self._new()
            self._lent.add(pipe)
        try:
            yield pipe
        finally:
            with self._lock:
                self._lent.discard(pipe)
                if self._closed.is_set():
                    pipe.close()

    def _new(self) -> Pipe:
        try:
            pipe = Pipe(self._directory)
        except OSError as error:
            raise StoreUnavailable(f"{self._directory}: no pipe to wait on: {error}") from error
        self._pipes.append(pipe)
        return pipe

    def close(self) -> None:
        """Close the free pipes and wake those who wait on the others, which then are closed too."""
        with self._lock:
            self._closed.set()
            for pipe in self._pipes:
                if pipe not in self._lent:
                    pipe.close()
            lent = [pipe.name for pipe in self._lent]
        for _ in wake(self._directory, lent):
            pass


def _jobs(txn: lmdb.Transaction[bytes]) -> Iterator[JobId]:
    """The ids of all jobs, ascending; leaps from job to job."""
    cursor = txn.cursor()
    there = cursor.first()
    while there:
        job, _, _ = cursor.key().partition(b"\0")
        yield JobId(job.decode())
        there = cursor.set_range(job + b"\1")


def _size_bytes(
    programs: Sequence[tuple[StrandId, Entry]], sources: Sequence[Output], n_strands: int
) -> int:
    """What a new job or a piece of one writes, when that is much; else 0."""
    entries = [entry for _, entry in programs]
    entries += [entry for output in sources for entry in output.entries]
    n_rows = len(entries) + n_strands
    n_bytes = sum(len(e.payload) for e in entries if isinstance(e.payload, bytes)) + n_rows * 1024
    return n_bytes if n_bytes > LOOK_BYTES else 0
