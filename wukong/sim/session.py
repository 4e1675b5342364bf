"""A simulated client of an open job: extends it, releases, drops, recovers, and repeats itself.

The books (`scheduler.holdings`), the cut of pieces and the plan of a restart are the real ones;
what `wukong.session` does with them on real stores is done here in virtual time. Each request that
fails is sent again, whether it has taken effect or not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

import numpy as np

from wukong.executor.messages import (
    Create,
    Entry,
    ExportId,
    Extend,
    JobView,
    Located,
    NewExport,
    News,
    NewStrand,
    Refused,
    Status,
    StrandId,
)
from wukong.scheduler.holdings import RECORDED, Holdings, Released, Work
from wukong.scheduler.piece import Earlier, cut_piece, earlier_values, piece_parts
from wukong.scheduler.plan import Plan
from wukong.scheduler.recovery import plan_restart
from wukong.sim.checks import Value, Violation
from wukong.sim.checks_open import OpenChecker
from wukong.sim.invokers import SimInvoker
from wukong.sim.store_open import OpenSimStore
from wukong.sim.world import JOB, World

T = TypeVar("T")
Life = Generator[Any, Any, Any]
"""Yields what is to be asked of the store, or seconds to sleep; is sent the answer."""

RETRY_S = 0.2
LOOK_S = 0.2
"""Time between looks for news."""
PROGRAM = Entry((), None, None, 0, 0)


class SimSession:
    """Whoever holds values of an open job.

    Args:
        pieces: task ids of each extension: (first, end), without gaps.
    """

    def __init__(
        self,
        world: World,
        store: OpenSimStore,
        invoker: SimInvoker,
        checker: OpenChecker,
        pieces: list[tuple[int, int]],
    ) -> None:
        self._world = world
        self._store = store
        self._invoker = invoker
        self._checker = checker
        self._pieces = pieces
        self._holdings = Holdings()
        self._n_extended = 0
        self._read: tuple[str, ...] = ()
        self._deleted: tuple[Any, ...] = ()
        self._swept_at = 0.0
        self.pinned: set[int] = set()
        self.status: Status | None = None
        self.finished_at: float | None = None
        for time in world.setting.faults.second_starts:
            world.at(time, self._duplicate)

    def start(self) -> None:
        """Begin."""
        self._go_on(self._live(), None)

    def _duplicate(self) -> None:
        if not self._store.is_forgotten:
            self._invoker.invoke(self._store.duplicate_all())

    # -------------------------------------------------------------- the loop over wishes

    def _go_on(self, life: Life, answer: object) -> None:
        try:
            wish = life.send(answer)
        except StopIteration:
            return
        if isinstance(wish, float):
            self._world.after(wish, self._go_on, life, None)
        else:
            self._ask(life, wish, may_be_late=True)

    def _ask(self, life: Life, effect: Callable[[], object], may_be_late: bool) -> None:
        self._store.call(
            effect,
            lambda _, answer: self._go_on(life, answer),
            lambda: self._world.after(RETRY_S, self._ask, life, effect, may_be_late),
            may_be_late=may_be_late and self._n_extended > 0,
        )

    # -------------------------------------------------------------- a client's life

    def _live(self) -> Life:
        rng, store = self._world.rng, self._store
        yield lambda: store.create(_open_job())
        pause_s = rng.choice((0.0, 0.1, 1.0))
        for first, end in self._pieces:
            yield from self._extend(first, end)
            yield pause_s * rng.random()
            if rng.random() < 0.7:
                yield from self._look()
            yield from self._release([v for v in sorted(self.pinned) if rng.random() < 0.2], end)
        while not all(self._holdings.state(value) & RECORDED for value in self.pinned):
            yield LOOK_S
            yield from self._look()
        yield from self._read_values()
        yield from self._release(sorted(self.pinned), len(self._world.setting.reads))
        yield from self._take_news()
        while self._read or self._deleted:
            yield from self._take_news()
        self._checker.check_nothing_is_left(store.rows.tables)
        self._end()

    def _extend(self, first: int, end: int) -> Life:
        """Add the tasks of a piece; those that are pinned are requested."""
        setting, holdings, rng = self._world.setting, self._holdings, self._world.rng
        assert holdings.reserve(end - first) == first
        read_later = {s for task in range(end, len(setting.reads)) for s in setting.reads[task]}
        sinks = set(range(first, end)) - {s for t in range(first, end) for s in setting.reads[t]}
        wanted = [
            t for t in range(first, end) if t in read_later or t in sinks or rng.random() < 0.1
        ]
        plan = _plan(setting.reads[first:end], first)
        values = earlier_values(plan)
        exports = np.array([holdings.export_of(v) for v in values.tolist()], np.int64)
        states = np.array([holdings.state(v) for v in values.tolist()], np.int64)
        earlier = Earlier(values, exports, states & RECORDED > 0)
        grain = (end - first) / rng.choice((1, 2, 4, 8))
        cut = cut_piece(plan, earlier, wanted, grain=grain, costs=None)
        first_strand, first_export = holdings.n_strands, holdings.n_exports
        holdings.n_strands += cut.n_strands
        holdings.n_exports += len(cut.exports)
        parts = piece_parts(plan, cut, earlier, first_strand, first_export)
        self._world.setting.parts.extend(parts)  # type: ignore[attr-defined]  # a list in an open world
        strands, new = [], []
        for strand, part in enumerate(parts, first_strand):
            n_own = sum(int(export) >= first_export for export, _ in part.inputs)
            own = tuple(export for export, _ in part.inputs[:n_own])
            strands.append(NewStrand(StrandId(str(strand)), own, part.inputs[n_own:]))
            new += [
                NewExport(s.export, s.n_values, s.n_consumers, s.requested) for s in part.exports
            ]
            holdings.add_work(strand, Work(part, PROGRAM, n_own))
        holdings.pin(wanted)
        self.pinned.update(wanted)
        programs = tuple((s.strand, PROGRAM) for s in strands)
        yield from self._send(
            Extend(JOB, self._n_extended + 1, programs, tuple(strands), tuple(new), (), end - first)
        )

    def _send(self, request: Extend) -> Life:
        self._n_extended = request.number
        reply = yield lambda: self._store.extend(request)
        if isinstance(reply, Refused):
            raise Violation(f"extension {request.number} was refused: {reply.reason.name}")
        self._invoker.invoke(reply)

    def _release(self, values: list[int], end: int) -> Life:
        """Give up values that no later piece reads."""
        reads = self._world.setting.reads
        still_read = {source for task in range(end, len(reads)) for source in reads[task]}
        released = Released()
        chosen = [value for value in values if value not in still_read]
        self.pinned.difference_update(chosen)
        self._holdings.unpin(chosen, released)
        yield from self._give_back(released)

    def _give_back(self, released: Released) -> Life:
        if released.exports:
            yield lambda: self._store.unpin(released.exports)
        if released.strands:
            self._world.counts["drops"] += len(released.strands)
            yield lambda: self._store.drop(released.strands)
        if released.single:
            names = [ExportId(str(export)) for export in released.single]
            found: tuple[Located, ...] = yield lambda: self._store.located(names)
            idle = {value for values in released.single.values() for value in values}
            entries = [entry for _, entries in found for entry in entries]
            blobs = [e.blob for e in entries if e.blob is not None and idle.issuperset(e.tasks)]
            self._world.counts["blobs freed alone"] += len(blobs)
            yield lambda: self._store.free(blobs)

    # -------------------------------------------------------------- looking after it

    def _look(self) -> Life:
        yield from self._take_news()
        view: JobView | None = yield self._store.view
        if view is not None and view.lost:
            yield from self._recover()
        if self._world.now - self._swept_at >= self._world.setting.silence_s / 2:
            self._swept_at = self._world.now
            self._invoker.invoke((yield self._store.expired))

    def _take_news(self) -> Life:
        known, deleted = self._read, self._deleted
        news: News = yield lambda: self._store.news(known, deleted)
        released = Released()
        notes = [note for note in news.notes if note.name not in known]
        for note in notes:
            for located in note.recorded:
                self._holdings.recorded(located, released)
        yield from self._give_back(released)
        self._read = tuple(note.name for note in notes)
        self._deleted = ()
        if news.garbage:
            yield lambda: self._store.delete(news.garbage)
            self._deleted = news.garbage

    def _recover(self) -> Life:
        yield from self._take_news()
        view: JobView | None = yield self._store.view
        if view is None or not view.lost:
            return
        complete: tuple[ExportId, ...] = yield self._store.recorded
        surviving = {int(e) for e in set(complete) - set(view.lost) if e.isdecimal()}
        request, gone = plan_restart(
            self._holdings, surviving, JOB, self._n_extended + 1, view.generation + 1
        )
        if gone:
            raise Violation(f"the values of {gone} can be made by nobody any more")
        self._world.counts["relaunches"] += 1
        yield from self._send(request)

    # -------------------------------------------------------------- results

    def _read_values(self) -> Life:
        """Read all that is pinned, again after each loss, and have it checked."""
        while True:
            exports = sorted({self._holdings.export_of(value) for value in self.pinned})
            names = [ExportId(str(export)) for export in exports]
            found: tuple[Located, ...] = yield lambda: self._store.located(names)  # noqa: B023
            values, lost = self._decode(found)
            if lost:
                yield lambda: self._store.mark_lost(lost)  # noqa: B023
                yield from self._look()
            elif self.pinned <= values.keys():
                self._checker.ended(Status.DONE, values, self.pinned)
                return
            yield LOOK_S
            yield from self._look()

    def _decode(self, found: tuple[Located, ...]) -> tuple[dict[int, Value], list[ExportId]]:
        values: dict[int, Value] = {}
        lost: list[ExportId] = []
        for export, entries in found:
            for entry in entries:
                payload = entry.payload
                if self.pinned.isdisjoint(entry.tasks):
                    continue
                if entry.blob is not None:
                    if self._store.get([entry.blob], lambda: not self._store.is_forgotten):
                        lost.append(export)
                        continue
                    payload = self._store.blobs[entry.blob]
                assert isinstance(payload, tuple)
                values.update(zip(entry.tasks, payload, strict=True))
        return values, lost

    def _end(self) -> None:
        self.status = Status.DONE
        self._world.is_over = True
        self.finished_at = self._world.now


def _plan(reads: Any, base: int) -> Plan:
    ptr = np.zeros(len(reads) + 1, np.int64)
    np.cumsum([len(sources) for sources in reads], out=ptr[1:])
    flat = np.array([source for sources in reads for source in sources], np.int32)
    return Plan(list(range(len(reads))), [], ptr, flat, [], (), {}, base)


def _open_job() -> Create:
    return Create(JOB, (), (), (), (), 0, 0, 0, False, is_open=True)
