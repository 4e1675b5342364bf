"""What the client of an open job holds: values, their exports, the work behind them. Pure.

    value --page--> export --maker--> work (a strand, with its part and program) --inputs--> export

**Values** are ids that only grow. What is known of each (its export, its state, its pins) stands in
arrays, one page for some thousand ids; a page goes when nothing in it is pinned any more. There is
no object for a value.

**Work** is kept as long as it may have to run, or to run again: while values that it was asked for
are not recorded; while a recorded one may be lost (it is a blob) or retried (it is an error); and
while other work that is kept reads from it. What is inline in the store cannot be lost alone, so
that work whose results are small is forgotten as soon as they are recorded.

**Single values.** The store keeps exports whole. Where a value has a blob of its own, or is an
object in this process, its memory is given back alone, when nothing pins it while other values of
its export are pinned, and no work that is kept reads from the export: work that is not kept will
never read again.

**Dropping.** When pins go, work that nobody needs is found here: unfinished, without awaited
values, and read by nothing that is kept. With it goes what only it has read from, and so on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from wukong.executor.messages import Entry, ExportId, Located, Output, Part, StrandId
from wukong.scheduler.calls import Call

PAGE = 4096
"""Values of a page."""
MANY = 255
"""Pins beyond this number are counted elsewhere."""
RECORDED, FAILED, TOLD = 1, 2, 4
"""Bits of a value's state: it is in the store; it is an error; the user knows that it is there."""

Dropped = tuple[StrandId, tuple[ExportId, ...]]
"""A strand that is to be dropped, with what it writes."""


class _Page:
    __slots__ = ("exports", "n_held", "pins", "states")

    def __init__(self) -> None:
        self.exports = array("q", [-1]) * PAGE
        self.states = bytearray(PAGE)
        self.pins = bytearray(PAGE)
        self.n_held = 0


@dataclass(slots=True)
class Work:
    """A strand that may have to run, or to run again."""

    part: Part
    program: Entry
    n_own: int
    """Inputs, the first ones, that are exports of the same piece."""
    priority: int = 0
    calls: Sequence[Call] | None = None
    """What its tasks call, until it is known how long that takes."""
    unrecorded: dict[int, int] = field(default_factory=dict)
    """Requested export -> values of it that are not recorded."""
    n_readers: int = 0
    """Reads of its exports by work that is kept."""
    is_cut: bool = False
    """Work that has read from it was dropped, so that it may never end by itself."""
    frail: set[int] = field(default_factory=set)
    """Its pinned exports that may be lost, or retried."""


@dataclass(slots=True)
class Released:
    """What the end of pins has made needless: for the store."""

    exports: list[ExportId] = field(default_factory=list)
    """To be unpinned."""
    strands: list[Dropped] = field(default_factory=list)
    programs: list[Entry] = field(default_factory=list)
    """Programs of work that was forgotten, which may have blobs."""
    single: dict[int, list[int]] = field(default_factory=dict)
    """Export that stays -> values of it whose memory is not needed any more."""


class Holdings:
    """The books of one open job's client. Not thread-safe.

    Args:
        holds_objects: the store has the values themselves, of this process.
    """

    def __init__(self, holds_objects: bool = False) -> None:
        self._holds_objects = holds_objects
        self._pages: dict[int, _Page] = {}
        self._pinned_often: dict[int, int] = {}
        """Pins of a value beyond `MANY`."""
        self._pinned: dict[int, int] = {}
        """Export -> values of it that are pinned."""
        self._maker: dict[int, int] = {}
        """Export -> the strand that makes it, if its work is kept."""
        self._n_readers: dict[int, int] = {}
        """Export -> reads of it by work that is kept; 0 is left out."""
        self._unpinned_late: set[int] = set()
        """Exports of small values that are not pinned, and stay for work that may run again."""
        self._idle: dict[int, list[int]] = {}
        """Pinned export with values that can be freed alone -> those that are not pinned, and not
        freed yet."""
        self.work: dict[int, Work] = {}
        self.n_values = 0
        self.n_strands = 0
        self.n_exports = 0

    # -------------------------------------------------------------- what is added

    def reserve(self, n: int) -> int:
        """Ids for n values. Returns: the first."""
        first = self.n_values
        self.n_values += n
        return first

    def add_work(self, strand: int, work: Work) -> None:
        """Keep a strand whose makers, if any, have been added before."""
        self.work[strand] = work
        for spec in work.part.exports:
            export = int(spec.export)
            self._maker[export] = strand
            if spec.requested:
                work.unrecorded[export] = len(spec.tasks)
                self.set_export(spec.tasks, export)
        for export_id, _ in work.part.inputs:
            export = int(export_id)
            self._n_readers[export] = self._n_readers.get(export, 0) + 1
            maker = self.work.get(self._maker.get(export, -1))
            if maker is not None:
                maker.n_readers += 1

    def set_export(self, values: Iterable[int], export: int) -> None:
        """Note which export has values."""
        page, number = None, -1
        for value in values:
            if value // PAGE != number:
                number = value // PAGE
                page = self._pages.get(number)
                if page is None:
                    page = self._pages[number] = _Page()
            assert page is not None
            page.exports[value % PAGE] = export

    def pin(self, values: Iterable[int]) -> None:
        """Hold each value once more."""
        pages, pinned = self._pages, self._pinned
        for value in values:
            page, i = pages[value // PAGE], value % PAGE
            pins = page.pins
            n_pins = pins[i]
            if n_pins == MANY:
                self._pinned_often[value] = self._pinned_often.get(value, 0) + 1
                continue
            pins[i] = n_pins + 1
            if n_pins == 0:
                page.n_held += 1
                export = page.exports[i]
                pinned[export] = pinned.get(export, 0) + 1

    # -------------------------------------------------------------- what is known

    def state(self, value: int) -> int:
        """The bits of a value's state; 0 also when nothing of it is held."""
        page = self._pages.get(value // PAGE)
        return 0 if page is None else page.states[value % PAGE]

    def export_of(self, value: int) -> int:
        """The number of the export that has a value; negative when it is not held."""
        page = self._pages.get(value // PAGE)
        if page is None or not page.pins[value % PAGE]:
            return -1
        return page.exports[value % PAGE]

    def is_well(self, value: int) -> bool:
        """Whether a value is held, in the store, and no error."""
        return self.export_of(value) >= 0 and self.state(value) & (RECORDED | FAILED) == RECORDED

    def maker_of(self, value: int) -> int:
        """The strand that makes a value, if its work is kept; else negative."""
        page = self._pages.get(value // PAGE)
        return -1 if page is None else self._maker.get(page.exports[value % PAGE], -1)

    def maker_of_export(self, export: int) -> int:
        """The strand that makes an export, if its work is kept; else negative."""
        return self._maker.get(export, -1)

    def held_values(self, export: int) -> list[int]:
        """The pinned values of an export. Cost: O(values held)."""
        return [
            number * PAGE + i
            for number, page in sorted(self._pages.items())
            for i in range(PAGE)
            if page.exports[i] == export and page.pins[i]
        ]

    def is_pinned(self, export: int) -> bool:
        """Whether any value of an export is held, or all of it is."""
        return export in self._pinned or export in self._unpinned_late

    def set_state(self, value: int, bits: int) -> None:
        """Replace the bits of a value's state, if anything of it is held."""
        page = self._pages.get(value // PAGE)
        if page is not None:
            page.states[value % PAGE] = bits

    def awaited(self) -> list[int]:
        """Values that are held and not recorded. Cost: O(values held)."""
        return [
            number * PAGE + i
            for number, page in sorted(self._pages.items())
            for i in range(PAGE)
            if page.pins[i] and not page.states[i] & RECORDED
        ]

    def n_held(self) -> int:
        """How many values are pinned."""
        return sum(page.n_held for page in self._pages.values())

    # -------------------------------------------------------------- what happens

    def recorded(self, located: Located, released: Released) -> list[int]:
        """Values of a requested export are in the store. Returns: those that were not told of."""
        export = int(located.export)
        if export not in self._pinned:
            return []
        self._note_single(export, located.entries, released)
        strand = self._maker.get(export, -1)
        work = self.work.get(strand)
        news: list[int] = []
        for entry in located.entries:
            for value in entry.tasks:
                page = self._pages.get(value // PAGE)
                if page is None:
                    continue
                before = page.states[value % PAGE]
                page.states[value % PAGE] = RECORDED | TOLD
                if not before & TOLD:
                    news.append(value)
            if work is not None:
                # A note of an earlier generation may come late.
                left = work.unrecorded.get(export, 0) - len(entry.tasks)
                work.unrecorded[export] = max(0, left)
                if entry.blob is not None or entry.n_errors:
                    work.frail.add(export)
        if work is not None:
            self._retire([strand], released)
        return news

    def note_source(self, output: Output) -> None:
        """Values that their user has put into the store, in an export of their own."""
        export = int(output.export)
        for entry in output.entries:
            self.set_export(entry.tasks, export)
            for value in entry.tasks:
                self.set_state(value, RECORDED | TOLD)
            if self._is_freed_alone(entry):
                self._idle.setdefault(export, [])

    def _note_single(self, export: int, entries: Iterable[Entry], released: Released) -> None:
        """Some entries of an export may be such that their values can be freed alone."""
        single = [entry.tasks for entry in entries if self._is_freed_alone(entry)]
        if single:
            idle = self._idle.setdefault(export, [])
            idle += [value for tasks in single for value in tasks if self.export_of(value) < 0]
            self._free_idle(export, released)

    def _is_freed_alone(self, entry: Entry) -> bool:
        """Whether the memory of an entry's values can be given back while its export stays."""
        return self._holds_objects or (entry.blob is not None and len(entry.tasks) == 1)

    def _free_idle(self, export: int, released: Released) -> None:
        """Free values of an export that nobody pins, if nobody is to read from it."""
        if export not in self._n_readers and (idle := self._idle.get(export)):
            released.single.setdefault(export, []).extend(idle)
            idle.clear()

    def unpin(self, values: Iterable[int], released: Released, n_times: int = 1) -> None:
        """Hold values once less, or `n_times`; those that are not held are passed over."""
        idle: list[int] = []
        single: dict[int, None] = {}
        for value in values:
            page, i = self._pages.get(value // PAGE), value % PAGE
            if page is None or not page.pins[i]:
                continue
            export = page.exports[i]
            if page.pins[i] == 1 and page.n_held > 1 and self._pinned[export] > 1:
                page.pins[i] = 0  # most of many that are released together
                page.n_held -= 1
                self._pinned[export] -= 1
                if export in self._idle:
                    self._idle[export].append(value)
                    single[export] = None
                continue
            often = self._pinned_often.pop(value, 0)
            n_pins = max(0, page.pins[i] + often - n_times)
            page.pins[i] = min(n_pins, MANY)
            if n_pins > MANY:
                self._pinned_often[value] = n_pins - MANY
            if n_pins == 0:
                if export in self._idle:
                    self._idle[export].append(value)
                    single[export] = None
                self._let_go(value // PAGE, page, export, idle, released)
        for export in single:
            self._free_idle(export, released)
        self._retire(idle, released)

    def move(self, values: Iterable[int], export: int, released: Released) -> None:
        """Values that are held will be in another export, and are not there yet."""
        idle: list[int] = []
        for value in values:
            page, i = self._pages[value // PAGE], value % PAGE
            self._pinned[export] = self._pinned.get(export, 0) + 1
            old, page.exports[i], page.states[i] = page.exports[i], export, 0
            page.n_held += 1
            self._let_go(value // PAGE, page, old, idle, released)
        self._retire(idle, released)

    def _let_go(
        self, number: int, page: _Page, export: int, idle: list[int], released: Released
    ) -> None:
        """A value of an export is held no more."""
        self._pinned[export] -= 1
        if not self._pinned[export]:
            del self._pinned[export]
            if self._is_read_again(export):
                self._unpinned_late.add(export)
            else:
                released.exports.append(ExportId(str(export)))
            self._idle.pop(export, None)
            strand = self._maker.get(export, -1)
            work = self.work.get(strand)
            if work is not None:
                work.frail.discard(export)
                idle.append(strand)
        page.n_held -= 1
        if not page.n_held and (number + 1) * PAGE <= self.n_values:
            del self._pages[number]

    def _is_read_again(self, export: int) -> bool:
        """Whether kept work reads from small values whose own work was forgotten (seed 21264)."""
        is_small = not self._holds_objects and export not in self._idle
        return is_small and export in self._n_readers and export not in self._maker

    def _retire(self, strands: list[int], released: Released) -> None:
        """Forget work that is needed no more, and with it what only it has read from."""
        while strands:
            strand = strands.pop()
            work = self.work.get(strand)
            if work is None or work.n_readers or work.frail or self._is_awaited(work):
                continue
            del self.work[strand]
            for spec in work.part.exports:
                del self._maker[int(spec.export)]
            released.programs.append(work.program)
            is_dropped = work.is_cut or any(work.unrecorded.values())
            if is_dropped:
                # What is pinned has been recorded, and stays.
                made = [spec.export for spec in work.part.exports]
                exports = tuple(e for e in made if int(e) not in self._pinned)
                released.strands.append((StrandId(str(strand)), exports))
            for export_id, _ in work.part.inputs:
                export = int(export_id)
                self._n_readers[export] -= 1
                if not self._n_readers[export]:
                    del self._n_readers[export]
                    self._free_idle(export, released)
                    if export in self._unpinned_late:
                        self._unpinned_late.remove(export)
                        released.exports.append(ExportId(str(export)))
                maker = self._maker.get(export, -1)
                if maker >= 0:
                    self.work[maker].n_readers -= 1
                    self.work[maker].is_cut |= is_dropped
                    strands.append(maker)

    def _is_awaited(self, work: Work) -> bool:
        return any(n_left and export in self._pinned for export, n_left in work.unrecorded.items())

    # -------------------------------------------------------------- after a loss

    def missing(self, surviving: set[int]) -> tuple[list[int], list[int]]:
        """What has to run again when only some exports are left.

        Returns: strands to run again, ascending; and pinned exports that nothing can make again.
        """
        again: set[int] = set()
        gone: set[int] = set()
        stack = [export for export in self._pinned if export not in surviving]
        while stack:
            export = stack.pop()
            strand = self._maker.get(export, -1)
            if strand < 0:
                gone.add(export)
            elif strand not in again:
                again.add(strand)
                inputs = (int(e) for e, _ in self.work[strand].part.inputs)
                stack.extend(e for e in inputs if e not in surviving)
        if gone:
            self._spread(again, gone, surviving)
        return sorted(again), sorted(export for export in gone if export in self._pinned)

    def _spread(self, again: set[int], gone: set[int], surviving: set[int]) -> None:
        """Strands that read what is gone cannot run: what they make is gone, too."""
        for strand in sorted(again):
            part = self.work[strand].part
            if any(int(e) in gone and int(e) not in surviving for e, _ in part.inputs):
                again.discard(strand)
                gone.update(int(spec.export) for spec in part.exports)

    def forget_recorded(self, strands: Sequence[int]) -> None:
        """Count the values of strands as not recorded: they are about to run again."""
        for strand in strands:
            work = self.work[strand]
            work.frail.clear()
            work.is_cut = True  # it may make values, too, that nobody reads again (seed 1819)
            for spec in work.part.exports:
                if not spec.requested:
                    continue
                work.unrecorded[int(spec.export)] = len(spec.tasks)
                for value in spec.tasks:
                    self.set_state(value, self.state(value) & TOLD)
