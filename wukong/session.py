"""An open job from the client's side: graphs are added to it, results are held until released.

    extend --plan, cut--> Extend --> store --> executors --> notes --> watcher --> on_news
                                                                          |
    read <-- located, wire            release --> unpin, drop             +--> sweep, recover

A session is what a `distributed.Client`'s server works with, and plain futures too. Values have
ids; what is known of them stands in `scheduler.holdings`, and what the store does with an open job
in `storage.extension`. One thread waits for news; everything else happens in the callers' threads.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from wukong.errors import InvokeError, JobCancelled, MissingBlob, StoreUnavailable
from wukong.executor.invoker import Invoker
from wukong.executor.messages import (
    BlobId,
    Entry,
    ExportId,
    Extend,
    Invocation,
    JobId,
    JobView,
    NewExport,
    NewStrand,
    Output,
    Refused,
    StrandId,
)
from wukong.executor.scene import Scene
from wukong.executor.wire import PutRequest, Traffic, UnreadableExports, open_wire
from wukong.scheduler.calls import Key
from wukong.scheduler.costs import Costs
from wukong.scheduler.graph import plan_graph
from wukong.scheduler.holdings import RECORDED, TOLD, Holdings, Released, Work
from wukong.scheduler.piece import Earlier, cut_piece, earlier_values, piece_parts
from wukong.scheduler.plan import Plan
from wukong.scheduler.recovery import plan_restart
from wukong.scheduler.retries import Retry, ancestors, plan_retry
from wukong.session_pieces import new_strand, open_job, retries_of, source_requests
from wukong.session_watch import News, OnNews, OnRuns, Watcher
from wukong.storage import Store
from wukong.submit import choose_grain, make_program, put_program

__all__ = ["News", "Session", "SessionCounters"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

GIVE_UP_S = 60.0
"""A store that has not answered for this long is reported to the caller."""
RETRY_S = 0.05
"""First wait before it is asked again; doubles up to 32 times."""


@dataclass(frozen=True, slots=True)
class SessionCounters:
    """How a session stands."""

    view: JobView
    n_held: int
    """Values that are pinned."""
    n_work: int
    """Strands that may have to run, or to run again."""


class Session:
    """An open job: graphs are added to it, their results are pinned until released. Thread-safe.

    Args:
        store, invoker: of a cluster.
        n_workers: executors, for which graphs are cut.
        costs: what is known of functions; it learns.
        on_news: is told of values that are there, in batches, in the order of the commits; called
            by the watcher's thread, and by `extend` and `put` for values that are there at once.
            News of a value may come before `extend` has returned its id.
        on_runs: takes the records of what ran, for looks and reports.
    """

    def __init__(
        self,
        store: Store,
        invoker: Invoker,
        *,
        n_workers: int,
        costs: Costs,
        on_news: OnNews,
        on_runs: OnRuns | None = None,
    ) -> None:
        self.job = JobId(os.urandom(8).hex())
        self.n_workers = n_workers
        self._store = store
        self._jobs = store.jobs
        self._invoker = invoker
        self._costs = costs
        self._on_news = on_news
        self._wire = open_wire(store, self.job, Traffic())
        self._holdings = Holdings(holds_objects=not self._wire.is_measured)
        self._books = threading.Condition()
        """Guards the holdings; notified when values are recorded."""
        self._order = threading.RLock()
        """Extensions go to the store one after the other."""
        self._n_extended = 0
        self._is_closed = False
        self._ask(lambda: self._jobs.create(open_job(self.job)))
        self._watcher = Watcher(
            self.job,
            store,
            invoker,
            self._wire,
            self._holdings,
            self._books,
            costs,
            on_news=on_news,
            on_runs=on_runs,
            on_loss=self.recover,
            on_released=self._give_back,
        )

    # -------------------------------------------------------------- adding

    def extend(
        self,
        dsk: Any,
        keys: Sequence[Key],
        known: Mapping[Key, int] | None = None,
        *,
        annotations: Mapping[str, Mapping[Any, Any]] | None = None,
        priority: int = 0,
        n_retries: int = 0,
        scene: Scene | None = None,
    ) -> list[int]:
        """Add a graph, and have what the keys need computed.

        Args:
            dsk: as for `plan_graph`.
            keys: what is wanted; each mention pins its value once.
            known: held values by key, finished or not; they are inputs, and need not be in `dsk`.
            annotations: name -> key -> value (`retries`, `repeatable`).
            priority: of all tasks of the graph; higher ones are taken first.
            n_retries: of a task that raises, where the annotations say nothing.
            scene: what is to surround the tasks while they run.
        Returns: for each key the id of its value.
        Raises:
            GraphError: the graph cannot be planned.
            SerializationError: a task cannot be sent.
            KeyError: a known value is not held any more.
            StoreUnavailable, JobCancelled
        Cost: one round trip; some us a task, some 100 us a strand.
        """
        graph = dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__()
        with self._books:
            base = self._holdings.reserve(len(graph))
        plan = plan_graph(graph, list(keys), known=known, base=base, annotations=annotations)
        slots: list[int] = list(plan.requested)  # type: ignore[arg-type]  # a flat list was asked for
        constants = dict.fromkeys(slot for slot in slots if slot < 0)
        ids = {slot: base + len(plan.keys) + i for i, slot in enumerate(constants)}
        retries = retries_of(plan, n_retries)
        with self._order:
            strands, works = self._make_work(plan, slots, retries, priority, scene)
            made = {ids[slot]: plan.literals[~slot] for slot in constants}
            sources = self._make_sources(made)
            values = [ids.get(slot, slot) for slot in slots]
            with self._books:
                self._check_held(works)
                for strand, work in works:
                    self._holdings.add_work(strand, work)
                self._add_sources(sources)
                self._holdings.pin(values)
            self._send(strands, works, sources)
        self._tell_of_sources(sources)
        return values

    def put(self, values: Sequence[Any]) -> list[int]:
        """Store values. Returns: their ids (n), each pinned once."""
        with self._books:
            base = self._holdings.reserve(len(values))
        ids = list(range(base, base + len(values)))
        with self._order:
            sources = self._make_sources(dict(zip(ids, values, strict=True)))
            with self._books:
                self._add_sources(sources)
                self._holdings.pin(ids)
            self._send([], [], sources)
        self._tell_of_sources(sources)
        return ids

    def _make_work(
        self,
        plan: Plan,
        slots: list[int],
        retries: dict[int, int],
        priority: int,
        scene: Scene | None,
    ) -> tuple[list[NewStrand], list[tuple[int, Work]]]:
        """Cut a plan, and make its programs."""
        if not plan.keys:
            return [], []
        earlier = self._look_up(plan)
        tasks = [slot for slot in dict.fromkeys(slots) if slot >= plan.base]
        grain, seconds = 1.0, None
        if len(plan.keys) > 1:
            grain, seconds = choose_grain(plan, self.n_workers, self._costs)
        cut = cut_piece(plan, earlier, tasks, grain=grain, costs=seconds)
        with self._books:
            first, first_export = self._holdings.n_strands, self._holdings.n_exports
            self._holdings.n_strands += cut.n_strands
            self._holdings.n_exports += len(cut.exports)
        parts = piece_parts(plan, cut, earlier, first, first_export)
        strands, works = [], []
        for strand, part in enumerate(parts, first):
            program = make_program(plan, part, retries, False, set(), scene=scene)
            entry = put_program(plan, self._wire, program, self.job, strand)
            n_own = sum(int(export) >= first_export for export, _ in part.inputs)
            strands.append(new_strand(strand, part, n_own, priority))
            works.append((strand, Work(part, entry, n_own, priority, program.calls)))
        return strands, works

    def _look_up(self, plan: Plan) -> Earlier:
        """Where the values are that a plan reads of earlier pieces."""
        values = earlier_values(plan)
        with self._books:
            exports = [self._holdings.export_of(value) for value in values.tolist()]
            states = [self._holdings.state(value) for value in values.tolist()]
        if -1 in exports:
            raise KeyError(f"value {values[exports.index(-1)]} is not held")
        is_there = np.array(states, np.int64) & RECORDED > 0
        return Earlier(values, np.array(exports, np.int64), is_there)

    def _check_held(self, works: list[tuple[int, Work]]) -> None:
        """What a piece reads of earlier ones may have been released while it was cut."""
        for _, work in works:
            for _, values in work.part.inputs[work.n_own :]:
                for value in values:
                    if self._holdings.export_of(value) < 0:
                        raise KeyError(f"value {value} is not held")

    def _make_sources(self, values: dict[int, Any]) -> list[Output]:
        """Exports of values that exist: a large one has its own, small ones share one."""
        with self._books:
            first = self._holdings.n_exports
            self._holdings.n_exports += len(values)
        requests = source_requests(self.job, values, first, self._wire.is_measured)
        made = self._ask(lambda: self._wire.put(requests))
        return [Output(export, (entry,), len(entry.tasks), 1, True, ()) for export, entry in made]

    def _add_sources(self, sources: list[Output]) -> None:
        for output in sources:
            self._holdings.note_source(output)

    def _tell_of_sources(self, sources: list[Output]) -> None:
        if sources:
            entries = [entry for output in sources for entry in output.entries]
            self._on_news([News(list(e.tasks), e.size_bytes, {}) for e in entries])

    def _send(
        self, strands: list[NewStrand], works: list[tuple[int, Work]], sources: list[Output]
    ) -> None:
        """Extend the job in the store, and have executors started."""
        if not strands and not sources:
            return
        request = Extend(
            job=self.job,
            number=self._n_extended + 1,
            programs=tuple((StrandId(str(s)), work.program) for s, work in works),
            strands=tuple(strands),
            exports=tuple(
                NewExport(spec.export, spec.n_values, spec.n_consumers, spec.requested)
                for _, work in works
                for spec in work.part.exports
            ),
            sources=tuple(sources),
            n_tasks=sum(len(work.part.tasks) for _, work in works),
        )
        self._extend(request)

    def _extend(self, request: Extend) -> None:
        reply = self._ask(lambda: self._jobs.extend(request))
        if isinstance(reply, Refused):
            raise JobCancelled(f"session {self.job} was ended, or lost by its store")
        self._n_extended = request.number
        self._invoke(reply)

    def _invoke(self, invocations: tuple[Invocation, ...]) -> None:
        if invocations:
            try:
                self._invoker.invoke(invocations)
            except InvokeError:
                logger.debug("session %s: tokens stay queued, and are found later", self.job)

    # -------------------------------------------------------------- reading

    def read(self, values: Sequence[int]) -> list[Any]:
        """Values that are there (n); the error of a failed task is a `Failure` or a `Raised`.

        A value that the store has lost is computed again first.

        Raises:
            KeyError: a value is not held, or not there yet.
            MissingBlob: a value was lost, and can be made by nobody.
        """
        wanted = set(values)
        while True:
            with self._books:
                exports = {value: self._holdings.export_of(value) for value in wanted}
            missing = [value for value, export in exports.items() if export < 0]
            if missing:
                raise KeyError(f"value {missing[0]} is not held")
            names = [ExportId(str(export)) for export in dict.fromkeys(exports.values())]
            located = self._ask(lambda names=names: self._jobs.located(self.job, names))  # type: ignore[misc]  # bound now
            try:
                found = self._wire.read(located, wanted.__contains__)
            except UnreadableExports as unreadable:
                lost = unreadable.exports
                self._ask(lambda lost=lost: self._jobs.mark_lost(self.job, lost))  # type: ignore[misc]  # bound now
                self.recover()
                self._wait_recorded(wanted)
                continue
            if wanted <= found.keys():
                return [found[value] for value in values]
            self._wait_recorded(wanted)

    def _wait_recorded(self, wanted: set[int]) -> None:
        """Wait for values that were there before."""
        with self._books:
            states = {value: self._holdings.state(value) for value in wanted}
            never = [value for value, state in states.items() if not state & TOLD]
            if never:
                raise KeyError(f"value {never[0]} is not there yet")
            self._books.wait_for(
                lambda: (
                    self._is_closed
                    or all(self._holdings.state(value) & RECORDED for value in wanted)
                    or any(self._holdings.export_of(value) < 0 for value in wanted)
                ),
                timeout=1.0,
            )
            if self._is_closed:
                raise JobCancelled(f"session {self.job} was closed")

    # -------------------------------------------------------------- releasing

    def release(self, values: Sequence[int]) -> None:
        """Unpin values, once for each mention; work that nobody needs any more is dropped."""
        released = Released()
        with self._books:
            self._holdings.unpin(values, released)
        self._give_back(released)

    def cancel(self, values: Sequence[int]) -> None:
        """Unpin values, however often they are pinned."""
        released = Released()
        with self._books:
            self._holdings.unpin(values, released, n_times=1 << 60)
        self._give_back(released)

    def _give_back(self, released: Released) -> None:
        """Tell the store what is needed no more."""
        if released.exports:
            self._ask(lambda: self._jobs.unpin(self.job, released.exports))
        if released.strands:
            self._ask(lambda: self._jobs.drop(self.job, released.strands))
        if released.single:
            exports = [ExportId(str(export)) for export in released.single]
            idle = {value for values in released.single.values() for value in values}
            self._wire.free(self._ask(lambda: self._jobs.located(self.job, exports)), idle)
        blobs = [entry.blob for entry in released.programs if entry.blob is not None]
        if blobs and self._store.blobs is not None:
            self._store.blobs.delete_many(blobs)

    def retry(self, values: Sequence[int]) -> None:
        """Compute held values again that have ended in errors; then there is news of them again.

        Values behind them that are errors, or are not there any more, are computed again too, but
        not told of. Values that have no work left are passed over.
        """
        released = Released()
        with self._order:
            self._watcher.read_news()
            with self._books:
                held = [v for v in dict.fromkeys(values) if self._holdings.maker_of(v) >= 0]
                held = [v for v in held if self._holdings.export_of(v) >= 0]
                exports = list(ancestors(self._holdings, held)[1])
            found = self._ask(lambda: self._jobs.located(self.job, exports))
            located = {part.export: part for part in found}
            with self._books:
                retries = plan_retry(self._holdings, held, located, self._wire.read_program)
            works = []
            for new in retries:
                entry = self._put_again(new)
                works.append((int(new.strand), Work(new.program.part, entry, 0, new.priority)))
            strands = [new_strand(s, work.part, 0, work.priority) for s, work in works]
            with self._books:
                for (strand, work), new in zip(works, retries, strict=True):
                    self._holdings.move(new.results, new.export, released)
                    self._holdings.add_work(strand, work)
            self._send(strands, works, [])
        self._give_back(released)

    def _put_again(self, new: Retry) -> Entry:
        return self._wire.put_program(new.program, BlobId(f"{self.job}/plan/{new.strand}"))

    # -------------------------------------------------------------- faults

    def recover(self) -> None:
        """Have run again what the store has lost; nothing if it has lost nothing."""
        with self._order:
            self._watcher.read_news()
            view = self._ask(lambda: self._jobs.view(self.job))
            if view is None or not view.lost:
                return
            logger.warning("session %s: stored values were lost; running again", self.job)
            complete = self._ask(lambda: self._jobs.recorded(self.job))
            surviving = {int(e) for e in set(complete) - set(view.lost) if e.isdecimal()}
            with self._books:
                request, gone = plan_restart(
                    self._holdings, surviving, self.job, self._n_extended + 1, view.generation + 1
                )
            self._extend(request)
            self._report_gone(gone)

    def _report_gone(self, gone: dict[int, list[int]]) -> None:
        """Values that nobody can make again become errors."""
        values = [value for members in gone.values() for value in members]
        if not values:
            return
        error = MissingBlob("a stored value was lost, and nothing is left that could make it again")
        failure = self._wire.failure(error, -1)
        requests = [
            PutRequest(ExportId(str(export)), tuple(members), [failure] * len(members), None)
            for export, members in gone.items()
        ]
        made = self._wire.put(requests)
        sources = [Output(e, (entry,), len(entry.tasks), 1, True, ()) for e, entry in made]
        with self._books:
            self._add_sources(sources)
        self._send([], [], sources)
        self._on_news([News(values, 0, dict.fromkeys(values, failure))])

    # -------------------------------------------------------------- looking, and the end

    def counters(self) -> SessionCounters:
        """How it stands."""
        view = self._ask(lambda: self._jobs.view(self.job))
        if view is None:
            raise JobCancelled(f"session {self.job} is not in the store")
        with self._books:
            return SessionCounters(view, self._holdings.n_held(), len(self._holdings.work))

    def close(self) -> None:
        """Cancel what runs, and leave nothing in the store. A second call does nothing."""
        with self._order:
            if self._is_closed:
                return
            self._is_closed = True
        self._watcher.stop()
        try:
            self._jobs.cancel(self.job)  # wakes the watcher
            self._watcher.join()
            self._jobs.forget(self.job)
            if self._store.blobs is not None:
                self._store.blobs.delete_job(self.job)
        except StoreUnavailable as error:
            logger.warning("session %s: not removed (%s)", self.job, error)
        with self._books:
            self._books.notify_all()

    def _ask(self, operation: Callable[[], T]) -> T:
        """Perform an operation of the store, again and again when it does not answer."""
        begun_at, wait_s = time.monotonic(), RETRY_S
        while True:
            try:
                return operation()
            except StoreUnavailable:
                if self._is_closed or time.monotonic() - begun_at > GIVE_UP_S:
                    raise
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 32 * RETRY_S)
