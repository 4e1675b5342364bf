"""What runs again when values that ended in errors are retried: new strands for the same values.

A retry makes new strands, exports and programs, since what the old ones have recorded may still be
read. Of a strand only those tasks run again that the wanted values need; values of other strands
are read where they are there and no errors, and made again where they are not.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from wukong.executor.messages import Entry, ExportId, ExportSpec, Located, Part, StrandId
from wukong.executor.serialize_programs import Program
from wukong.scheduler.calls import Call
from wukong.scheduler.holdings import Holdings, Work


@dataclass(slots=True)
class _Again:
    """A strand of which something has to run again."""

    work: Work
    results: set[int] = field(default_factory=set)
    """Values that are held, to be recorded anew."""
    read: set[int] = field(default_factory=set)
    """Values that other strands which run again read."""


@dataclass(frozen=True, slots=True)
class Retry:
    """A strand that is to be added."""

    strand: StrandId
    program: Program
    """Its part is that of the new strand."""
    priority: int
    results: tuple[int, ...]
    export: int
    """The number of the export that the results will be in."""


def ancestors(holdings: Holdings, values: list[int]) -> tuple[set[int], set[ExportId]]:
    """Strands behind values, as far as they are kept, and the exports that they read."""
    strands: set[int] = set()
    exports: set[ExportId] = set()
    stack = [holdings.maker_of(value) for value in values]
    while stack:
        strand = stack.pop()
        if strand < 0 or strand in strands:
            continue
        strands.add(strand)
        for export, _ in holdings.work[strand].part.inputs:
            exports.add(export)
            stack.append(holdings.maker_of_export(int(export)))
    return strands, exports


def plan_retry(
    holdings: Holdings,
    values: list[int],
    located: Mapping[ExportId, Located],
    read_program: Callable[[Entry], Program],
) -> list[Retry]:
    """The strands to add so that values are computed again.

    Args:
        values: held ones, whose work is kept.
        located: the exports that any of the work behind them reads, as far as they are there.
    Returns: new strands, makers before readers; the books have their numbers.
    """
    again: dict[int, _Again] = {}
    queue: list[int] = []

    def want(strand: int) -> _Again:
        if strand not in again:
            again[strand] = _Again(holdings.work[strand])
            heapq.heappush(queue, -strand)
        return again[strand]

    for value in values:
        want(holdings.maker_of(value)).results.add(value)
    runs: list[tuple[int, Program, tuple[int, ...], dict[int, ExportId]]] = []
    while queue:  # readers before makers: a maker has the smaller number
        strand = -heapq.heappop(queue)
        found = again[strand]
        program = read_program(found.work.program)
        tasks, reads = _needed(holdings, program, found.results | found.read)
        sources = {v: e for e, members in found.work.part.inputs for v in members if v in reads}
        for value in reads:
            if holdings.is_well(value):
                sources[value] = ExportId(str(holdings.export_of(value)))
                continue
            maker = holdings.maker_of_export(int(sources[value]))
            if maker >= 0 and not _is_well(located.get(sources[value]), value):
                want(maker).read.add(value)
        runs.append((strand, program, tasks, sources))
    return _number(holdings, again, runs[::-1])


def _needed(
    holdings: Holdings, program: Program, wanted: set[int]
) -> tuple[tuple[int, ...], set[int]]:
    """Tasks of a strand that values need, and what they read: of other strands, or held."""
    call_of = dict(zip(program.part.tasks, program.calls, strict=True))
    needed: set[int] = set()
    reads: set[int] = set()
    stack = list(wanted)
    while stack:
        task = stack.pop()
        if task in needed:
            continue
        if task not in call_of or (task not in wanted and holdings.is_well(task)):
            reads.add(task)
            continue
        needed.add(task)
        stack.extend(_slots(call_of[task]))
    return tuple(sorted(needed)), reads


def _slots(call: Call) -> list[int]:
    """The tasks that a call reads, nested ones too."""
    found: list[int] = []
    stack = [call]
    while stack:
        for slot in stack.pop()[1]:
            if isinstance(slot, tuple):
                stack.append(slot)
            elif slot >= 0:
                found.append(slot)
    return found


def _is_well(located: Located | None, value: int) -> bool:
    entries = () if located is None else located.entries
    return any(value in entry.tasks and not entry.n_errors for entry in entries)


def _number(
    holdings: Holdings,
    again: Mapping[int, _Again],
    runs: list[tuple[int, Program, tuple[int, ...], dict[int, ExportId]]],
) -> list[Retry]:
    """Give the strands and their exports numbers, and make their parts."""
    passed: dict[int, ExportId] = {}
    retries = []
    for strand, program, tasks, sources in runs:
        found = again[strand]
        export, between = holdings.n_exports, ExportId(str(holdings.n_exports + 1))
        holdings.n_exports += 2
        results, read = tuple(sorted(found.results)), tuple(sorted(found.read))
        exports = []
        if results:
            exports.append(ExportSpec(ExportId(str(export)), results, len(results), 1, True, ()))
        if read:
            exports.append(ExportSpec(between, read, len(read), 0, False, ()))
        inputs: dict[ExportId, list[int]] = {}
        for value in sorted(sources):
            inputs.setdefault(passed.get(value, sources[value]), []).append(value)
        passed.update(dict.fromkeys(read, between))
        part = Part(tasks, tuple((e, tuple(inputs[e])) for e in sorted(inputs)), tuple(exports))
        calls = dict(zip(program.part.tasks, program.calls, strict=True))
        again_program = replace(program, part=part, calls=[calls[task] for task in tasks])
        new = StrandId(str(holdings.n_strands))
        holdings.n_strands += 1
        retries.append(Retry(new, again_program, found.work.priority, results, export))
    return retries
