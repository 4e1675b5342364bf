"""A graph as a further piece of an open job: how it is cut beside what is computed already.

What it reads of earlier pieces is there, or is being computed by strands that nobody can join any
more. So it is cut as if each such export were a strand that is full: tasks that wait for different
exports are kept apart, and tasks that wait for the same ones, or for none, share strands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wukong.executor.messages import ExportId, Feed, Part, StrandId
from wukong.scheduler.parts import static_parts
from wukong.scheduler.plan import Plan
from wukong.scheduler.strands import Strands, cut_strands, pack_strands

FULL = 2.01
"""Times the grain: a strand of this cost takes in nothing more, not even small tasks."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a piece reads of earlier ones: distinct values (n), ascending."""

    values: NDArray[np.int64]
    exports: NDArray[np.int64]
    """The number of the export that has each value."""
    is_there: NDArray[np.bool_]
    """It is recorded."""


def earlier_values(plan: Plan) -> NDArray[np.int64]:
    """The values of earlier pieces that a plan reads, ascending."""
    return np.unique(plan.inputs[plan.inputs < plan.base]).astype(np.int64)


def cut_piece(
    plan: Plan,
    earlier: Earlier,
    requested: list[int],
    *,
    grain: float,
    costs: NDArray[np.float64] | None,
) -> Strands:
    """Cut a piece; the ids in the result begin at 0.

    Args:
        requested: ids of tasks of the plan.
        grain, costs: as for `cut_strands`.
    Cost: as `cut_strands`.
    """
    wanted = [task - plan.base for task in requested]
    if not len(earlier.values):
        inputs = plan.inputs - plan.base
        return cut_strands(plan.inputs_ptr, inputs, wanted, grain=grain, costs=costs)
    n = len(plan.keys)
    readers = np.repeat(np.arange(n), np.diff(plan.inputs_ptr))
    is_own = plan.inputs >= plan.base
    own_ptr = _pointers(readers[is_own], n)
    own = plan.inputs[is_own].astype(np.int64) - plan.base
    groups, group_of = np.unique(earlier.exports[~earlier.is_there], return_inverse=True)
    if not len(groups):
        return cut_strands(own_ptr, own, wanted, grain=grain, costs=costs)
    k = len(groups)
    place = np.full(len(earlier.values), -1)
    place[~earlier.is_there] = group_of
    waited = place[np.searchsorted(earlier.values, plan.inputs[~is_own])]
    pairs = np.unique(readers[~is_own][waited >= 0] * k + waited[waited >= 0])
    all_readers = np.concatenate([pairs // k, readers[is_own]]) + k
    all_inputs = np.concatenate([pairs % k, own + k])
    order = np.argsort(all_readers, kind="stable")
    all_costs = np.concatenate([np.full(k, FULL * grain), np.ones(n) if costs is None else costs])
    cut = cut_strands(
        _pointers(all_readers, n + k),
        all_inputs[order],
        [*range(k), *(task + k for task in wanted)],
        grain=grain,
        costs=all_costs,
    )
    strand_of = np.unique(cut.strand_of[k:], return_inverse=True)[1]
    return pack_strands(own_ptr, own, wanted, strand_of)


def _pointers(readers: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    ptr = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(readers, minlength=n), out=ptr[1:])
    return ptr


def piece_parts(
    plan: Plan, strands: Strands, earlier: Earlier, first_strand: int, first_export: int
) -> list[Part]:
    """The parts of a piece's strands; what they read of earlier pieces comes last in their inputs.

    Args:
        first_strand, first_export: the numbers of the piece's first strand and export.
    """
    parts = static_parts(strands, plan.base, first_strand, first_export)
    if not len(earlier.values):
        return parts
    reads = _reads_of_earlier(plan, strands, earlier)
    parts = [
        part._replace(inputs=part.inputs + reads[s]) if s in reads else part
        for s, part in enumerate(parts)
    ]
    return [_recounted(part, parts, first_strand) for part in parts]


def _reads_of_earlier(
    plan: Plan, strands: Strands, earlier: Earlier
) -> dict[int, tuple[tuple[ExportId, tuple[int, ...]], ...]]:
    """Strand -> the exports of earlier pieces that it reads, each with the values."""
    readers = np.repeat(np.arange(len(plan.keys)), np.diff(plan.inputs_ptr))
    is_read = plan.inputs < plan.base
    place = np.searchsorted(earlier.values, plan.inputs[is_read])
    strand = strands.strand_of[readers[is_read]].astype(np.int64)
    pairs = np.unique(strand * len(earlier.values) + place)
    strand, place = pairs // len(earlier.values), pairs % len(earlier.values)
    found: dict[int, dict[int, list[int]]] = {}
    exports, values = earlier.exports[place].tolist(), earlier.values[place].tolist()
    for s, export, value in zip(strand.tolist(), exports, values, strict=True):
        found.setdefault(s, {}).setdefault(export, []).append(value)
    return {
        s: tuple((ExportId(str(e)), tuple(found[s][e])) for e in sorted(found[s])) for s in found
    }


def _recounted(part: Part, parts: list[Part], first_strand: int) -> Part:
    """Tell a producer how many inputs its readers have, earlier ones included."""
    if not any(spec.feeds for spec in part.exports):
        return part

    def feed(strand: StrandId) -> Feed:
        return Feed(strand, len(parts[int(strand) - first_strand].inputs))

    exports = tuple(
        spec._replace(feeds=tuple(feed(f.strand) for f in spec.feeds)) for spec in part.exports
    )
    return part._replace(exports=exports)
