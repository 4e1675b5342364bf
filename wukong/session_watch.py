"""A session's thread that waits for news: it reads notes, tells of values, sweeps, cleans up."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import sub

from wukong import trace
from wukong.errors import InvokeError, JobCancelled, StoreUnavailable
from wukong.executor.invoker import Invoker
from wukong.executor.messages import BlobId, JobId, JobView, Located, Note, Status
from wukong.executor.serialize_failures import Failure, Raised
from wukong.executor.wire import Error, UnreadableExports, Wire
from wukong.scheduler.calls import Call
from wukong.scheduler.costs import Costs
from wukong.scheduler.holdings import FAILED, RECORDED, TOLD, Holdings, Released
from wukong.storage import Store

logger = logging.getLogger(__name__)

SWEEP_S = 2.5
"""Time between looks for silent tokens; also the longest that a note is kept after it was read."""
RETRY_S = 0.2
"""Wait before a store that did not answer is asked again."""
SAMPLE = 64
"""Tasks of one run from which costs are learned."""


@dataclass(frozen=True, slots=True)
class News:
    """Values that are there from now on."""

    values: Sequence[int]
    size_bytes: int
    """Of all of them, encoded; 0 in `memory://`."""
    errors: Mapping[int, Error]
    """Those of them that are errors."""


OnNews = Callable[[Sequence[News]], None]
OnRuns = Callable[[Sequence[trace.RunRecord]], None]


class Watcher:
    """Reads the notes of an open job, and has told of them.

    Args:
        books: guards the holdings; notified when values are recorded.
        on_loss: called when the store has lost values.
        on_released: takes what is needed no more.
    """

    def __init__(
        self,
        job: JobId,
        store: Store,
        invoker: Invoker,
        wire: Wire,
        holdings: Holdings,
        books: threading.Condition,
        costs: Costs,
        *,
        on_news: OnNews,
        on_runs: OnRuns | None,
        on_loss: Callable[[], None],
        on_released: Callable[[Released], None],
    ) -> None:
        self._job = job
        self._jobs = store.jobs
        self._blobs = store.blobs
        self._invoker = invoker
        self._wire = wire
        self._holdings = holdings
        self._books = books
        self._costs = costs
        self._on_news = on_news
        self._on_runs = on_runs
        self._on_loss = on_loss
        self._on_released = on_released
        self._reading = threading.RLock()
        """Notes are read by one thread at a time, and told of in their order."""
        self._read: tuple[str, ...] = ()
        """Names of notes that have been read and not been acknowledged."""
        self._deleted: tuple[BlobId, ...] = ()
        self._sweep_at = time.monotonic() + SWEEP_S
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="wukong-session", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End at the next change of the job."""
        self._is_stopped = True

    def join(self) -> None:
        """Wait for the end, unless this is the thread itself."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        version = 0
        while not self._is_stopped:
            try:
                wait_s = max(0.0, self._sweep_at - time.monotonic())
                view = self._jobs.wait(self._job, version, wait_s)
                if view is None or view.status is not Status.RUNNING:
                    if not self._is_stopped:
                        self._report_end(view)
                    return
                if view.version > version:
                    version = view.version
                    self.read_news()
                if view.lost:
                    self._on_loss()
                self._sweep()
            except StoreUnavailable as error:
                logger.warning("session %s: the store does not answer (%s)", self._job, error)
                time.sleep(RETRY_S)

    def _report_end(self, view: JobView | None) -> None:
        """The job is over, though nobody has closed the session: what is awaited will not come."""
        if view is not None and view.error is not None:
            error = self._wire.read_error(view.error)
        else:
            cause = JobCancelled(f"session {self._job} was ended, or lost by its store")
            error = self._wire.failure(cause, -1)
        logger.warning("session %s is over in the store; what it awaits is an error", self._job)
        with self._books:
            values = self._holdings.awaited()
            self._books.notify_all()
        if values:
            self._on_news([News(values, 0, dict.fromkeys(values, error))])

    def _sweep(self) -> None:
        if time.monotonic() < self._sweep_at:
            return
        self._sweep_at = time.monotonic() + SWEEP_S
        if self._read or self._deleted:
            self.read_news()
        invocations = self._jobs.expired(self._job)
        if invocations:
            try:
                self._invoker.invoke(invocations)
            except InvokeError:
                logger.debug("session %s: tokens stay queued, and are found later", self._job)

    # -------------------------------------------------------------- notes

    def read_news(self) -> None:
        """Read all notes, tell of what they bring, and delete garbage."""
        with self._reading:
            while True:
                news = self._jobs.news(self._job, self._read, self._deleted)
                known = set(self._read)
                notes = [note for note in news.notes if note.name not in known]
                self._read = tuple(note.name for note in notes)
                self._deleted = news.garbage
                if news.garbage and self._blobs is not None:
                    self._blobs.delete_many(news.garbage)
                if not notes:
                    return
                self._take(notes)

    def _take(self, notes: list[Note]) -> None:
        """Enter what notes bring into the books, and tell of it."""
        records = [trace.read(note.trace) for note in notes if note.trace is not None]
        located = [part for note in notes for part in note.recorded]
        failed = self._read_failed(located)
        released = Released()
        told: list[News] = []
        with self._books:
            learned = [self._durations(record) for record in records]
            for part in located:
                values = self._holdings.recorded(part, released)
                if values:
                    n_bytes = sum(entry.size_bytes for entry in part.entries)
                    errors = {v: failed[v] for v in values if v in failed} if failed else {}
                    for value in errors:
                        self._holdings.set_state(value, RECORDED | FAILED | TOLD)
                    told.append(News(values, n_bytes, errors))
            self._books.notify_all()
        if told:
            self._on_news(told)
        if records and self._on_runs is not None:
            self._on_runs(records)
        self._on_released(released)
        for calls, seconds in learned:
            if calls:
                self._costs.learn(calls, seconds)

    def _read_failed(self, located: list[Located]) -> dict[int, Error]:
        """The errors among the values that notes bring."""
        wanted = [part.export for part in located if any(entry.n_errors for entry in part.entries)]
        if not wanted:
            return {}
        tasks = {
            task
            for part in located
            for entry in part.entries
            if entry.n_errors
            for task in entry.tasks
        }
        try:
            found = self._wire.read(self._jobs.located(self._job, wanted), tasks.__contains__)
        except UnreadableExports as lost:
            self._jobs.mark_lost(self._job, lost.exports)
            return {}
        return {t: v for t, v in found.items() if t in tasks and isinstance(v, Failure | Raised)}

    def _durations(self, record: trace.RunRecord) -> tuple[list[Call], list[float]]:
        """Some of what a run called, and how long each call took."""
        tasks = trace.ints(record.tasks)[:SAMPLE]
        if not tasks:
            return [], []
        strand = record.strand
        number = int(strand) if strand.isdecimal() else self._holdings.maker_of(tasks[0])
        work = self._holdings.work.get(number)
        if work is None or work.calls is None:
            return [], []
        ended = trace.floats(record.ended_s)[: len(tasks)]
        places = [bisect_left(work.part.tasks, task) for task in tasks]
        n = len(work.calls)
        calls = [work.calls[i] for i in places if i < n]
        if len(calls) < len(tasks):
            return [], []  # of absorbed work, which is not this strand's
        return calls, list(map(sub, ended, [0.0, *ended]))
