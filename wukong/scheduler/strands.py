"""Cut a task graph into strands: pieces that one executor runs without coordination.

Pure: dense task ids and edges go in, arrays go out. It knows nothing of Dask, values or executors.

**The rule.** Tasks are visited in id order, a topological order with locality. Let S be the strands
that hold the inputs of a task, and k the latest of them.
1. If k already waits for all the others, the task joins k while k costs less than the grain:
   nobody waits longer than before. (Not when it reads a value of k that feeds more than a grain of
   work: k then has to end early, so that many executors can start.)
2. Else it opens, or joins, the strand that was opened for exactly the same S, where strands that
   another member of S waits for are left out of S. Leaves (S empty) so share strands too.

**Two repairs.** `_sink` moves a task whose readers all lie in one other strand to them when that
exports no further value: a block product then travels as its shared inputs, which are stored once.
`_merge` joins a strand to its only reader when that reads nothing else, or when both are small.

**Bands.** Where edges have no locality (random layers, wavefronts) the rule gives either one serial
strand or almost one strand a task. The graph is then cut anew by bands of consecutive depths: the
rule ignores edges from earlier bands, and no strand spans two. The best estimate wins.

**Why it is acyclic.** Strands are numbered as they are opened, and the inputs of a task are placed
before it. By rule 1 it joins the latest strand of S, by rule 2 one that is later than all of S;
bands are cut in ascending order. So edges go from lower to higher numbers only. `_sink` moves a
task up to the strand where all its readers were; readers only move up too, and an input moves at
most to the strand where its reader was. `_merge` gives a strand the number of its only reader,
which is above all that the strand reads; what the reader feeds is higher still.
Nobody waits for a strand that it did not wait for before, directly or through others; except that
a small strand, merged, waits for all that its reader waits for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Chosen on 40 graphs (arrays, frames, bags, random layers, wavefronts) for 2 and 16 workers.
_GRAINS_PER_WORKER = 4  # the caller's grain is total cost / (4 workers)
_OVERFULL = 1.25  # tasks that only continue a strand may exceed the grain so far: fewer stumps
_STUFFED = 2.0  # small ones so far: what a costly task has made is mostly taken apart by them
_LITTLE = 1 / 8  # of the mean task's cost: a small task; of a lone task's: what it takes in
_SMALL = 0.25  # of a grain: strands up to this cost, together, are merged into their only reader
_SUNK_PER_TASK = 8  # a strand takes in so many tasks for each of its own: a fan-in stays a fan-in
_STRAND_COST = 1 / 32  # of a grain: what a strand adds to the estimated makespan
_MOVE_COST = 1 / 4  # of a mean task: what writing, or reading, an exported value adds to it
_GOOD_ENOUGH = 1.15  # times the bound: such a cut is taken without trying bands
_TIGHTER = 0.8  # of the grain: tried next, as other sizes may fill the last round of work
_BAND_COUNTS = (16, 64)  # bands that are tried, before one for each depth
_MIN_PIECE = 1 / 16  # of a grain: the least limit of a strand in a band
_FEW_STRANDS_PER_GRAIN = 8  # a cut with more is taken only when no other is better
_MAX_STRANDS_PER_GRAIN = 32  # a cut without locality is given up here
_MAX_REDUCED = 16  # larger sets of strands are keys as they are: reducing them is quadratic

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Marks = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Export:
    """One row of the store: the values that one strand hands to exactly the same readers."""

    strand: int  # that computes the values
    tasks: tuple[int, ...]  # task ids, ascending
    consumers: tuple[int, ...]  # strands that read it, ascending; may be empty when requested
    requested: bool  # the client reads it too


@dataclass(slots=True)
class Strands:
    """A cut of n tasks. An edge between strands goes from a lower to a higher number."""

    n_strands: int
    strand_of: NDArray[np.int32]  # (n,) strand of each task, in the order of the tasks to cut
    tasks_ptr: NDArray[np.int64]  # (n_strands + 1,) s runs tasks[tasks_ptr[s]:tasks_ptr[s + 1]]
    tasks: NDArray[np.int32]  # (n,) task ids, ascending in a strand, which is an execution order
    exports: list[Export]  # by strand, then by first task
    strand_exports: list[tuple[int, ...]]  # strand -> exports that it writes, ascending
    strand_inputs: list[tuple[int, ...]]  # strand -> exports that it reads, ascending


def cut_strands(
    inputs_ptr: NDArray[np.integer],
    inputs: NDArray[np.integer],
    requested: Iterable[int],
    *,
    grain: float,
    costs: NDArray[np.floating] | None = None,
    tasks: Iterable[int] | None = None,
) -> Strands:
    """Cut a graph, or what is left of one strand, into strands of about `grain`.

    Deterministic. With `tasks`, only these are cut, and everything else counts as available:
    edges from and to other tasks are ignored, so a value that a task outside still needs must be in
    `requested`. Ids in the result are those of the whole graph.

    Args:
        inputs_ptr: (n + 1,) task t reads inputs[inputs_ptr[t]:inputs_ptr[t + 1]].
        inputs: task ids, distinct for each reader, each smaller than its reader's.
        requested: ids of tasks whose values the client reads; others than `tasks` are ignored.
        grain: cost of a strand that is worth an invocation; total cost / (4 workers) fills workers.
        costs: (n,) cost of each task, > 0; 1 each if None.
        tasks: ids to cut, ascending; all if None.
    Cost: O(tasks + edges); about 1 us a task where edges are few and local, else up to 20 us.
    Source: design.md, section 2; replaces the static schedules of SoCC '20, section 3.2.
    """
    assert grain > 0, "the grain is a positive cost"
    if len(inputs_ptr) == 2 and tasks is None:
        return _lone_task(bool(list(requested)))  # a call, not a graph: arrays would take longer
    ids = None if tasks is None else np.fromiter(tasks, np.int64)
    graph = _select(np.asarray(inputs_ptr, np.int64), np.asarray(inputs, np.int64), ids)
    n = len(graph.ptr) - 1
    wanted = np.zeros(n, np.bool_)
    marks = np.fromiter(requested, np.int64)
    if ids is not None:
        marks = np.flatnonzero(np.isin(ids, marks))
    wanted[marks] = True
    cost = np.ones(n) if costs is None else np.asarray(costs, np.float64)
    if costs is not None and ids is not None:
        cost = cost[ids]
    strand_of = _cut(graph, cost, wanted, float(grain)) if n else np.zeros(0, np.int64)
    return _pack(graph, strand_of, wanted, ids)


def pack_strands(
    inputs_ptr: NDArray[np.integer],
    inputs: NDArray[np.integer],
    requested: Iterable[int],
    strand_of: NDArray[np.integer],
) -> Strands:
    """Make strands of a cut that is given.

    Args:
        strand_of: (n,) strand of each task, dense; edges go from lower to higher numbers.
    Cost: O(tasks + edges).
    """
    graph = _select(np.asarray(inputs_ptr, np.int64), np.asarray(inputs, np.int64), None)
    wanted = np.zeros(len(strand_of), np.bool_)
    wanted[np.fromiter(requested, np.int64)] = True
    return _pack(graph, np.asarray(strand_of, np.int64), wanted, None)


def _lone_task(requested: bool) -> Strands:
    """The cut of one task."""
    exports = [Export(0, (0,), (), True)] if requested else []
    one = np.zeros(1, np.int32)
    return Strands(1, one, np.arange(2), one, exports, [tuple(range(len(exports)))], [()])


@dataclass(frozen=True, slots=True)
class _Graph:
    """The tasks that are cut, renumbered 0..n-1, and the edges between them."""

    ptr: _Ints  # (n + 1,)
    inputs: _Ints  # (m,) task that is read
    readers: _Ints  # (m,) task that reads it


def _select(ptr: _Ints, inputs: _Ints, ids: _Ints | None) -> _Graph:
    """Keep the given tasks, in the given order, and the edges between them."""
    n = len(ptr) - 1
    if ids is None:
        return _Graph(ptr, inputs, np.repeat(np.arange(n), np.diff(ptr)))
    counts = ptr[ids + 1] - ptr[ids]
    ends = np.cumsum(counts)
    readers = np.repeat(np.arange(len(ids)), counts)
    old = inputs[np.repeat(ptr[ids] - ends + counts, counts) + np.arange(len(readers))]
    by_id = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids, old, sorter=by_id), max(len(ids) - 1, 0))
    new = by_id[place]
    return _keep(new, readers, ids[new] == old, len(ids))


def _keep(inputs: _Ints, readers: _Ints, kept: _Marks, n: int) -> _Graph:
    """The graph with only the edges that are marked; edges are ordered by reader."""
    ptr = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(readers[kept], minlength=n), out=ptr[1:])
    return _Graph(ptr, inputs[kept], readers[kept])


def _cut(graph: _Graph, cost: _Floats, wanted: _Marks, grain: float) -> _Ints:
    """Strand of each task: cut in one band when that is good enough, else the best of some."""
    n, total = len(cost), float(cost.sum())
    n_workers = max(1, round(total / (_GRAINS_PER_WORKER * grain)))
    most = int(_MAX_STRANDS_PER_GRAIN * (total / grain + 2))
    is_wide = np.bincount(graph.inputs, weights=cost[graph.readers], minlength=n) > grain
    first = _grow(graph, is_wide, cost, [(0, n, grain)], most)
    best: _Ints = np.zeros(n, np.int64)
    makespan = np.inf
    if first is not None:
        best = _merge(graph, _sink(graph, first, cost, wanted, grain), cost, grain)
        if best.max() < _FEW_STRANDS_PER_GRAIN * (total / grain + 1):
            makespan = _makespan(graph, best, cost, 0.0, n_workers)
        if makespan <= _GOOD_ENOUGH * total / n_workers:
            return best
    depth, critical = _depths(graph, cost)
    if makespan <= _GOOD_ENOUGH * critical:
        return best
    tried = [first, _grow(graph, is_wide, cost, [(0, n, _TIGHTER * grain)], most)]
    n_depths = int(depth.max()) + 1
    for height in sorted({-(-n_depths // n_bands) for n_bands in _BAND_COUNTS} | {1}):
        cap = n if height == 1 else most
        tried.append(_grow_banded(graph, is_wide, cost, depth // height, grain, cap))
    shortest = np.inf
    for grown in tried:
        for strand_of in () if grown is None else (_sink(graph, grown, cost, wanted, grain), grown):
            cut = _merge(graph, strand_of, cost, grain)
            makespan = _makespan(graph, cut, cost, _overheads(graph, cut, cost, grain), n_workers)
            if makespan < shortest:
                best, shortest = cut, makespan
    return best


def _grow_banded(
    graph: _Graph, is_wide: _Marks, cost: _Floats, band: _Ints, grain: float, most: int
) -> _Ints | None:
    """`_grow`, band after band, each with a limit that gives every worker two pieces."""
    order = np.argsort(band, kind="stable")
    whole = _select(graph.ptr, graph.inputs, order)
    bands = band[order]
    kept = bands[whole.inputs] == bands[whole.readers]
    inside = _keep(whole.inputs, whole.readers, kept, len(bands))
    starts = np.searchsorted(bands, np.arange(int(bands[-1]) + 2))
    work = np.bincount(band, weights=cost)
    limits = np.clip(work * (2 * grain / cost.sum()), _MIN_PIECE * grain, grain)
    ranges = list(zip(starts[:-1].tolist(), starts[1:].tolist(), limits.tolist(), strict=True))
    found = _grow(inside, is_wide[order], cost[order], ranges, most)
    return None if found is None else found[np.argsort(order, kind="stable")]


def _grow(
    graph: _Graph, is_wide: _Marks, cost: _Floats, ranges: list[tuple[int, int, float]], most: int
) -> _Ints | None:
    """Rules 1 and 2 of the module, over ranges (first, end, limit) of tasks that share no strand.

    `is_wide` marks values that feed more than a grain. None: it takes more than `most` strands.
    """
    n = len(cost)
    reads_wide = np.zeros(n, np.bool_)
    reads_wide[graph.readers[is_wide[graph.inputs]]] = True
    ptr, inputs = graph.ptr.tolist(), graph.inputs.tolist()
    costs = [float(cost[0])] * n if (cost == cost[0]).all() else cost.tolist()
    wide, careful = is_wide.tolist(), reads_wide.tolist()
    strand_of = [0] * n
    size: list[float] = []
    waits: list[set[int]] = []  # strand -> strands that it reads
    little = _LITTLE * float(cost.mean()) if len(cost) else 0.0
    for first, end, limit in ranges:
        overfull, stuffed, leaf = limit * _OVERFULL, limit * _STUFFED, -1
        opened: dict[int | frozenset[int], int] = {}
        b = ptr[first]
        for t in range(first, end):
            a, b = b, ptr[t + 1]
            if a == b and leaf >= 0 and size[leaf] < limit:
                strand_of[t] = leaf
                size[leaf] += costs[t]
                continue
            # One input, or two of one strand, need no set: they are most tasks.
            if b - a == 1 or (b - a == 2 and strand_of[inputs[a]] == strand_of[inputs[a + 1]]):
                k = strand_of[inputs[a]]
                sources = {k}
            else:
                sources = {strand_of[d] for d in inputs[a:b]}
                k = max(sources, default=-1)
            if (
                k >= 0
                and size[k] < (overfull if costs[t] > little else stuffed)
                and (len(sources) == 1 or sources - {k} <= waits[k])
                and not (careful[t] and k in {strand_of[d] for d in inputs[a:b] if wide[d]})
            ):
                strand_of[t] = k
                size[k] += costs[t]
                continue
            minimal = sources
            for s in sources if 1 < len(sources) <= _MAX_REDUCED else ():
                minimal = minimal - waits[s]
            # The latest strand is never left out: one that is alone is k, a quicker key.
            key = k if len(minimal) == 1 else frozenset(minimal)
            k = opened.get(key, -1)
            if k < 0 or size[k] >= limit:
                if len(size) >= most:
                    return None
                k = opened[key] = len(size)
                size.append(0.0)
                waits.append(set())
            if a == b:
                leaf = k
            waits[k] |= sources
            strand_of[t] = k
            size[k] += costs[t]
    return np.array(strand_of, np.int64)


def _sink(graph: _Graph, strand_of: _Ints, cost: _Floats, wanted: _Marks, grain: float) -> _Ints:
    """Move tasks to the one strand that reads them, where that exports no further value."""
    n, n_strands = len(strand_of), int(strand_of.max()) + 1
    target = strand_of[graph.readers]
    last = np.full(n, -1, np.int64)
    first = np.full(n, n_strands, np.int64)
    np.maximum.at(last, graph.inputs, target)
    np.minimum.at(first, graph.inputs, target)
    exported = (last > strand_of) | wanted
    at = last[graph.readers]
    adds = ~exported[graph.inputs] & (strand_of[graph.inputs] != at)
    movable = (last > strand_of) & (first == last) & ~wanted
    movable[graph.readers[adds]] = False
    chosen = np.flatnonzero(movable)[::-1]
    size = np.bincount(strand_of, weights=cost, minlength=n_strands)
    n_own = np.bincount(strand_of, minlength=n_strands)
    # A task above the grain takes in its small inputs all the same: nobody else could run them.
    least = np.where(n_own == 1, _LITTLE * size, 0.0)
    room = np.maximum(grain * _OVERFULL - size, least).tolist()
    places = (n_own * _SUNK_PER_TASK).tolist()
    sunk = strand_of.copy()
    for t, k, own in zip(
        chosen.tolist(), last[chosen].tolist(), cost[chosen].tolist(), strict=True
    ):
        if places[k] and room[k] >= own:
            sunk[t] = k
            room[k] -= own
            places[k] -= 1
    return sunk


def _merge(graph: _Graph, strand_of: _Ints, cost: _Floats, grain: float) -> _Ints:
    """Join strands to their only reader, and number the rest densely in the same order."""
    names, strand_of = np.unique(strand_of, return_inverse=True)
    n_strands = len(names)
    size = np.bincount(strand_of, weights=cost).tolist()
    waits: list[set[int]] = [set() for _ in range(n_strands)]
    feeds: list[list[int]] = [[] for _ in range(n_strands)]
    for source, target in _strand_edges(graph, strand_of, n_strands):
        waits[target].add(source)
        feeds[source].append(target)
    merged = list(range(n_strands))
    for s in range(n_strands - 1, -1, -1):
        readers = {merged[r] for r in feeds[s]}
        reader = max(readers, default=s)
        is_small = size[s] + size[reader] <= _SMALL * grain
        if len(readers) == 1 and (is_small or len(waits[reader]) == 1):
            merged[s] = reader
            size[reader] += size[s]
            waits[reader].discard(s)
            waits[reader] |= waits[s]
    renumbered: _Ints = np.unique(np.array(merged)[strand_of], return_inverse=True)[1]
    return renumbered.astype(np.int64)


def _strand_edges(graph: _Graph, strand_of: _Ints, n_strands: int) -> list[tuple[int, int]]:
    """Pairs (strand that is read, strand that reads it), distinct, ascending."""
    source, target = strand_of[graph.inputs], strand_of[graph.readers]
    crossing = source != target
    pairs = np.unique(source[crossing] * n_strands + target[crossing])
    return list(zip((pairs // n_strands).tolist(), (pairs % n_strands).tolist(), strict=True))


def _depths(graph: _Graph, cost: _Floats) -> tuple[_Ints, float]:
    """The longest path to each task, in edges, and the dearest path of the graph."""
    ptr, inputs, costs = graph.ptr.tolist(), graph.inputs.tolist(), cost.tolist()
    depth, ends_at = [0] * len(costs), costs.copy()
    b = 0
    for t, own in enumerate(costs):
        a, b = b, ptr[t + 1]
        if b - a == 1:
            d = inputs[a]
            depth[t] = 1 + depth[d]
            ends_at[t] = own + ends_at[d]
        elif a < b:
            read = inputs[a:b]
            depth[t] = 1 + max([depth[d] for d in read])
            ends_at[t] = own + max([ends_at[d] for d in read])
    return np.array(depth, np.int64), max(ends_at)


def _reads(graph: _Graph, strand_of: _Ints) -> tuple[_Ints, _Ints]:
    """Pairs (value, other strand that reads it), distinct, ascending."""
    crossing = strand_of[graph.inputs] != strand_of[graph.readers]
    base = int(strand_of.max(initial=0)) + 1
    pairs = np.unique(graph.inputs[crossing] * base + strand_of[graph.readers[crossing]])
    return pairs // base, pairs % base


def _overheads(graph: _Graph, strand_of: _Ints, cost: _Floats, grain: float) -> _Floats:
    """What each strand costs beyond its tasks: to invoke, and to write and read exported values."""
    values, consumers = _reads(graph, strand_of)
    n_strands = int(strand_of.max()) + 1
    moved = np.bincount(consumers, minlength=n_strands)
    moved += np.bincount(strand_of[np.unique(values)], minlength=n_strands)
    return np.asarray(_STRAND_COST * grain + _MOVE_COST * cost.mean() * moved)


def _makespan(
    graph: _Graph, strand_of: _Ints, cost: _Floats, overheads: _Floats | float, n_workers: int
) -> float:
    """When greedy workers end that take the lowest ready strand first."""
    work = (np.bincount(strand_of, weights=cost) + overheads).tolist()
    missing = [0] * len(work)
    feeds: list[list[int]] = [[] for _ in work]
    for source, target in _strand_edges(graph, strand_of, len(work)):
        missing[target] += 1
        feeds[source].append(target)
    ready = [s for s, count in enumerate(missing) if count == 0]
    running: list[tuple[float, int]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < n_workers:
            s = heapq.heappop(ready)
            heapq.heappush(running, (now + work[s], s))
        now, s = heapq.heappop(running)
        for r in feeds[s]:
            missing[r] -= 1
            if missing[r] == 0:
                heapq.heappush(ready, r)
    return now


def _pack(graph: _Graph, strand_of: _Ints, wanted: _Marks, ids: _Ints | None) -> Strands:
    """Make the lists of tasks, exports and inputs from the strand of each task."""
    n_strands = int(strand_of.max(initial=-1)) + 1
    tasks = np.argsort(strand_of, kind="stable")
    ptr = np.searchsorted(strand_of[tasks], np.arange(n_strands + 1))
    exports = _exports(graph, strand_of, wanted, n_strands, ids)
    writes: list[list[int]] = [[] for _ in range(n_strands)]
    reads: list[list[int]] = [[] for _ in range(n_strands)]
    for e, export in enumerate(exports):
        writes[export.strand].append(e)
        for s in export.consumers:
            reads[s].append(e)
    return Strands(
        n_strands=n_strands,
        strand_of=strand_of.astype(np.int32),
        tasks_ptr=ptr.astype(np.int64),
        tasks=(tasks if ids is None else ids[tasks]).astype(np.int32),
        exports=exports,
        strand_exports=[tuple(w) for w in writes],
        strand_inputs=[tuple(r) for r in reads],
    )


def _exports(
    graph: _Graph, strand_of: _Ints, wanted: _Marks, n_strands: int, ids: _Ints | None
) -> list[Export]:
    """Group exported values by strand and readers, refining by one reader after the other."""
    values, consumers = _reads(graph, strand_of)
    counts = np.bincount(values, minlength=len(strand_of))
    starts = np.cumsum(counts) - counts
    exported = np.flatnonzero((counts > 0) | wanted)
    found: list[tuple[int, int, Export]] = []
    for count in np.unique(counts[exported]).tolist():
        of_count = exported[counts[exported] == count]
        group = strand_of[of_count] * 2 + wanted[of_count]
        for i in range(count):
            group = group * n_strands + consumers[starts[of_count] + i]
            group = np.unique(group, return_inverse=True)[1]
        by_group = np.argsort(group, kind="stable")
        ordered = of_count[by_group]
        ends = np.flatnonzero(np.diff(group[by_group], append=-1)) + 1
        begin = 0
        for end in ends.tolist():
            members, begin = ordered[begin:end], end
            lead = int(members[0])
            start = int(starts[lead])
            export = Export(
                strand=int(strand_of[lead]),
                tasks=tuple((members if ids is None else ids[members]).tolist()),
                consumers=tuple(consumers[start : start + count].tolist()),
                requested=bool(wanted[lead]),
            )
            found.append((export.strand, lead, export))
    found.sort(key=lambda row: row[:2])
    return [export for _, _, export in found]
