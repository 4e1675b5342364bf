"""Cuts of hand-made, random and real Dask graphs: their invariants, counts and makespans."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable

import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strand_invariants import check_strands
from wukong.scheduler.graph import plan_graph
from wukong.scheduler.strands import Export, Strands, cut_strands

Edges = tuple[np.ndarray, np.ndarray, list[int]]  # inputs_ptr, inputs, requested


def as_edges(inputs_of: Iterable[Iterable[int]], requested: Iterable[int]) -> Edges:
    ptr, inputs = [0], []
    for read in inputs_of:
        inputs.extend(read)
        ptr.append(len(inputs))
    return np.array(ptr, np.int64), np.array(inputs, np.int32), list(requested)


def depth_first(inputs_of: list[list[int]], sinks: Iterable[int]) -> Edges:
    """Renumber as a plan does: a depth-first post-order from the sinks."""
    ids: dict[int, int] = {}
    ordered = []
    sinks = list(sinks)
    for sink in sinks:
        stack = [] if sink in ids else [(sink, iter(inputs_of[sink]))]
        while stack:
            task, rest = stack[-1]
            below = next((d for d in rest if d not in ids), None)
            if below is None:
                stack.pop()
                ids[task] = len(ids)
                ordered.append(sorted(ids[d] for d in inputs_of[task]))
            else:
                stack.append((below, iter(inputs_of[below])))
    return as_edges(ordered, sorted(ids[s] for s in sinks))


def tree(n_leaves: int) -> Edges:
    inputs_of: list[list[int]] = []
    waiting: list[tuple[int, int]] = []  # (height, task) of subtrees without a sibling yet
    for _ in range(n_leaves):
        inputs_of.append([])
        height = 0
        while waiting and waiting[-1][0] == height:
            inputs_of.append([waiting.pop()[1], len(inputs_of) - 1])
            height += 1
        waiting.append((height, len(inputs_of) - 1))
    return as_edges(inputs_of, [len(inputs_of) - 1])


def independent(n: int) -> Edges:
    return as_edges([[]] * n, range(n))


def chain(n: int) -> Edges:
    return as_edges([[]] + [[t] for t in range(n - 1)], [n - 1])


def fan(width: int) -> Edges:
    return as_edges([[], *[[0]] * width, range(1, width + 1)], [width + 1])


def random_layers(n_layers: int, width: int, fan_in: int, seed: int = 0) -> Edges:
    draw = np.random.default_rng(seed)
    inputs_of: list[list[int]] = [[] for _ in range(width)]
    for layer in range(1, n_layers):
        for _ in range(width):
            picks = {int(d) for d in draw.integers(0, width, fan_in)}
            inputs_of.append([(layer - 1) * width + d for d in sorted(picks)])
    return depth_first(inputs_of, range((n_layers - 1) * width, n_layers * width))


def lattice(side: int) -> Edges:
    """A wavefront: each cell reads the one above and the one to the left."""
    inputs_of = [
        [c - side for _ in range(row > 0)] + [c - 1 for _ in range(column > 0)]
        for row in range(side)
        for column in range(side)
        for c in [row * side + column]
    ]
    return depth_first(inputs_of, [side * side - 1])


def diamonds(n: int) -> Edges:
    inputs_of: list[list[int]] = [[]]
    for i in range(n):
        inputs_of += [[3 * i], [3 * i], [3 * i + 1, 3 * i + 2]]
    return as_edges(inputs_of, [3 * n])


def of_dask(collection: object) -> Edges:
    if hasattr(collection, "optimize"):  # frames; the others have no such method
        best = collection.optimize()
    else:
        # Fusing low-level tasks depends on the order of sets of strings: not the same in each run.
        with dask.config.set({"optimization.fuse.active": False}):
            (best,) = dask.optimize(collection)
    plan = plan_graph(best.__dask_graph__(), best.__dask_keys__())

    def slots(requested: object) -> list[int]:
        if isinstance(requested, int):
            return [requested] if requested >= 0 else []
        return [slot for part in requested for slot in slots(part)]

    return plan.inputs_ptr, plan.inputs, sorted(set(slots(plan.requested)))


def noise(*shape: int, chunks: int | tuple[int, ...], seed: int = 0) -> da.Array:
    return da.random.default_rng(seed).random(shape, chunks=chunks)


def gemm(n_blocks: int = 8) -> Edges:
    side = n_blocks * 10
    return of_dask(noise(side, side, chunks=10, seed=1) @ noise(side, side, chunks=10, seed=2))


def stencil() -> Edges:
    x = noise(120, 120, chunks=10)
    for _ in range(3):
        x = x.map_overlap(np.copy, depth=1, boundary="none", dtype=float)
    return of_dask(x)


def tsqr() -> Edges:
    return of_dask(da.linalg.qr(noise(6400, 10, chunks=(50, 10)))[1])


def svd_compressed() -> Edges:
    return of_dask(da.linalg.svd_compressed(noise(120, 120, chunks=10), k=5)[1])


def cholesky() -> Edges:
    return of_dask(da.linalg.cholesky(noise(100, 100, chunks=10)))


def frequencies() -> Edges:
    bag = db.from_sequence(range(800), npartitions=400)
    return of_dask(bag.map(lambda i: i % 7).frequencies())


def frame_graph(method: str) -> Edges:
    pd = pytest.importorskip("pandas")
    dd = pytest.importorskip("dask.dataframe")
    frame = dd.from_pandas(pd.DataFrame({"a": np.arange(400) % 7, "b": 1.0}), npartitions=100)
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        return of_dask(frame.groupby("a").b.mean() if method == "groupby" else frame.shuffle("a"))


def grain_for(edges: Edges, n_workers: int) -> float:
    return (len(edges[0]) - 1) / (4 * n_workers)


def cut(edges: Edges, n_workers: int) -> Strands:
    strands = cut_strands(*edges, grain=grain_for(edges, n_workers))
    check_strands(strands, *edges)
    return strands


def exported_values(strands: Strands) -> int:
    return sum(len(export.tasks) for export in strands.exports)


def stretch(edges: Edges, strands: Strands, n_workers: int) -> float:
    """Makespan of the strands on greedy workers, over the larger of tasks / P and longest path."""
    ptr, inputs = edges[0].tolist(), edges[1].tolist()
    length: list[int] = []
    for t in range(len(ptr) - 1):
        length.append(1 + max((length[d] for d in inputs[ptr[t] : ptr[t + 1]]), default=0))
    sources = [{strands.exports[e].strand for e in read} for read in strands.strand_inputs]
    size = np.diff(strands.tasks_ptr).tolist()
    ready = [s for s in range(strands.n_strands) if not sources[s]]
    running: list[tuple[int, int]] = []
    now = 0
    while ready or running:
        while ready and len(running) < n_workers:
            s = heapq.heappop(ready)
            heapq.heappush(running, (now + size[s], s))
        now, done = heapq.heappop(running)
        for s in range(done + 1, strands.n_strands):
            if done in sources[s]:
                sources[s].remove(done)
                if not sources[s]:
                    heapq.heappush(ready, s)
    return now / max(len(length) / n_workers, max(length))


# graph, most strands, most exported values, most stretch; on 2 workers.
TWO_WORKERS = [
    ("tree", lambda: tree(4096), 9, 55, 1.02),
    ("independent", lambda: independent(10_000), 8, 10_000, 1.0),
    ("chain", lambda: chain(2_000), 1, 1, 1.0),
    ("fan", lambda: fan(2_000), 10, 2_001, 1.02),
    ("gemm", gemm, 20, 220, 1.07),
    ("stencil", stencil, 20, 800, 1.08),
    ("tsqr", tsqr, 13, 40, 1.12),
    ("svd_compressed", svd_compressed, 25, 350, 1.1),
    ("cholesky", cholesky, 45, 330, 1.17),
    ("groupby", lambda: frame_graph("groupby"), 16, 110, 1.17),
    ("shuffle", lambda: frame_graph("shuffle"), 16, 350, 1.1),
    ("frequencies", frequencies, 14, 60, 1.08),
    ("random layers", lambda: random_layers(20, 200, 2), 80, 2_200, 1.12),
]
SIXTEEN_WORKERS = [
    ("tree", lambda: tree(4096), 95, 350, 1.15),
    ("independent", lambda: independent(10_000), 64, 10_000, 1.01),
    ("fan", lambda: fan(2_000), 67, 2_001, 1.12),
    ("gemm", gemm, 120, 720, 1.1),
    ("stencil", stencil, 300, 1_000, 1.15),
    ("shuffle", lambda: frame_graph("shuffle"), 150, 2_400, 1.1),
    ("random layers", lambda: random_layers(20, 200, 2), 600, 2_600, 1.1),
]


def names(table: list[tuple[object, ...]]) -> list[object]:
    return [row[0] for row in table]


def check_row(
    make: Callable[[], Edges], n_workers: int, most_strands: int, most_values: int, most: float
) -> None:
    edges = make()
    strands = cut(edges, n_workers)
    assert strands.n_strands <= most_strands
    assert exported_values(strands) <= most_values
    assert stretch(edges, strands, n_workers) <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "strands", "values", "most"), TWO_WORKERS, ids=names(TWO_WORKERS)
)
def test_two_workers_are_kept_busy_by_few_strands(
    name: str, make: Callable[[], Edges], strands: int, values: int, most: float
) -> None:
    check_row(make, 2, strands, values, most)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "strands", "values", "most"), SIXTEEN_WORKERS, ids=names(SIXTEEN_WORKERS)
)
def test_sixteen_workers_are_kept_busy_by_few_strands(
    name: str, make: Callable[[], Edges], strands: int, values: int, most: float
) -> None:
    check_row(make, 16, strands, values, most)


def test_a_strand_runs_its_tasks_in_ascending_order() -> None:
    strands = cut(tree(16), 2)
    for s in range(strands.n_strands):
        tasks = strands.tasks[strands.tasks_ptr[s] : strands.tasks_ptr[s + 1]]
        assert (np.diff(tasks) > 0).all()


def test_independent_results_are_one_export_a_strand() -> None:
    strands = cut(independent(10_000), 2)
    assert [len(export.tasks) for export in strands.exports] == [1250] * 8
    assert all(export.requested and not export.consumers for export in strands.exports)


def test_values_with_the_same_readers_share_an_export() -> None:
    # Two leaves read by both wide halves, two more by one half each.
    strands = cut_strands(
        *as_edges([[], [], *[[0, 1]] * 40, range(2, 22), range(22, 42)], [42, 43]), grain=10
    )
    assert strands.exports[0] == Export(0, (0, 1), strands.exports[0].consumers, False)
    assert len(strands.exports[0].consumers) > 1


def test_a_value_that_is_read_and_requested_says_so() -> None:
    edges = as_edges([[], *[[0]] * 20], [0, *range(1, 21)])
    strands = cut_strands(*edges, grain=5)
    check_strands(strands, *edges)
    assert strands.exports[0].tasks == (0,)
    assert strands.exports[0].requested
    assert strands.exports[0].consumers == tuple(range(1, strands.n_strands))


def test_a_graph_below_the_grain_is_one_strand() -> None:
    edges = tree(64)
    strands = cut_strands(*edges, grain=1000)
    assert strands.n_strands == 1
    assert strands.exports == [Export(0, (126,), (), True)]
    assert strands.strand_inputs == [()]


def test_no_tasks_are_no_strands() -> None:
    edges = as_edges([], [])
    strands = cut_strands(*edges, grain=1)
    check_strands(strands, *edges)
    assert strands.n_strands == 0
    assert strands.exports == []


def test_the_source_of_a_wide_fan_ends_its_strand() -> None:
    strands = cut(fan(2_000), 2)
    assert strands.tasks[: strands.tasks_ptr[1]].tolist() == [0]


def test_strands_that_only_follow_each_other_are_one() -> None:
    edges = as_edges([[], *[[t] for t in range(99)]], [50, 99])
    strands = cut_strands(*edges, grain=10)
    check_strands(strands, *edges)
    assert strands.n_strands == 1
    assert [export.tasks for export in strands.exports] == [(50, 99)]


def test_block_products_travel_as_their_inputs() -> None:
    edges = gemm(4)
    ptr, _, requested = edges
    strands = cut(edges, 2)
    leaves = {t for t in range(len(ptr) - 1) if ptr[t] == ptr[t + 1]}
    exported = {t for export in strands.exports for t in export.tasks}
    assert len(leaves) == 32
    assert exported <= leaves | set(requested)


def test_costs_count_instead_of_tasks() -> None:
    edges = independent(100)
    costs = np.where(np.arange(100) < 10, 10.0, 1.0)
    strands = cut_strands(*edges, grain=19, costs=costs)
    check_strands(strands, *edges)
    sizes = np.bincount(strands.strand_of, weights=costs)
    assert strands.n_strands == 10
    assert sizes.max() < 19 + 10


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda: lattice(40), 0.1),
        (lambda: diamonds(500), 0.01),
        (lambda: random_layers(20, 60, 3), 0.2),
        (lambda: chain(2_000), 0.001),
        (lambda: fan(2_000), 0.01),
    ],
    ids=["lattice", "diamonds", "random layers", "chain", "fan"],
)
def test_graphs_without_locality_are_not_one_strand_a_task(
    make: Callable[[], Edges], share: float
) -> None:
    edges = make()
    assert cut(edges, 2).n_strands <= share * (len(edges[0]) - 1)


def test_a_wavefront_keeps_two_workers_busy() -> None:
    edges = lattice(40)
    assert stretch(edges, cut(edges, 2), 2) <= 1.2


def test_the_rest_of_a_strand_is_cut_alone() -> None:
    edges = tree(256)
    rest = list(range(200, 511))
    strands = cut_strands(*edges, grain=30, tasks=rest)
    check_strands(strands, *edges, tasks=rest)
    assert sorted(strands.tasks.tolist()) == rest
    assert 8 < strands.n_strands < 20
    assert strands.exports[-1] == Export(strands.n_strands - 1, (510,), (), True)


def test_what_others_need_of_a_rest_is_an_export_when_asked_for() -> None:
    edges = chain(100)
    strands = cut_strands(*edges[:2], [60, 99], grain=100, tasks=range(50, 80))
    check_strands(strands, *edges[:2], [60, 99], tasks=range(50, 80))
    assert strands.exports == [Export(0, (60,), (), True)]


def test_costs_of_a_rest_are_those_of_its_tasks() -> None:
    costs = np.where(np.arange(100) < 50, 1000.0, 1.0)
    strands = cut_strands(*independent(100), grain=10, costs=costs, tasks=range(50, 100))
    assert np.diff(strands.tasks_ptr).tolist() == [10] * 5


def test_the_same_graph_gives_the_same_strands() -> None:
    first, second = (cut(random_layers(12, 60, 3), 2) for _ in range(2))
    assert first.exports == second.exports
    assert first.strand_of.tolist() == second.strand_of.tolist()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.exports.pop(), "exactly one export"),
        (lambda s: s.strand_inputs.reverse(), "strand_inputs differ"),
        (lambda s: s.strand_exports.reverse(), "strand_exports differ"),
        (lambda s: s.strand_of.sort(), "another strand"),
        (lambda s: s.tasks.fill(0), "exactly one strand"),
    ],
    ids=["exports", "inputs", "writes", "strand_of", "tasks"],
)
def test_the_checker_sees_a_spoiled_cut(spoil: Callable[[Strands], object], message: str) -> None:
    edges = random_layers(6, 40, 2)
    strands = cut(edges, 4)
    spoil(strands)
    with pytest.raises(AssertionError, match=message):
        check_strands(strands, *edges)


@st.composite
def random_graphs(draw: st.DrawFn) -> tuple[Edges, list[float]]:
    n = draw(st.integers(1, 60))
    reach = draw(st.sampled_from([2, 5, 60]))
    inputs_of = [
        draw(st.sets(st.integers(max(0, t - reach), t - 1), max_size=4)) if t else set()
        for t in range(n)
    ]
    requested = draw(st.sets(st.integers(0, n - 1), max_size=n))
    costs = draw(st.lists(st.sampled_from([0.5, 1.0, 20.0]), min_size=n, max_size=n))
    return as_edges([sorted(read) for read in inputs_of], sorted(requested)), costs


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(random_graphs(), st.sampled_from([0.3, 1.0, 3.0, 10.0, 1000.0]), st.booleans())
def test_any_graph_gives_strands_that_hold_every_invariant(
    graph: tuple[Edges, list[float]], grain: float, priced: bool
) -> None:
    edges, costs = graph
    strands = cut_strands(*edges, grain=grain, costs=np.array(costs) if priced else None)
    check_strands(strands, *edges)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_graphs(), st.data(), st.sampled_from([0.3, 2.0, 1000.0]))
def test_any_part_of_a_graph_is_cut_as_if_alone(
    graph: tuple[Edges, list[float]], data: st.DataObject, grain: float
) -> None:
    edges, _ = graph
    rest = sorted(data.draw(st.sets(st.integers(0, len(edges[0]) - 2))))
    strands = cut_strands(*edges, grain=grain, tasks=rest)
    check_strands(strands, *edges, tasks=rest)


def seconds(edges: Edges) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        cut_strands(*edges, grain=grain_for(edges, 2))
        best = min(best, time.perf_counter() - started)
    return best


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda n: tree(n // 2),
        fan,
        lambda n: random_layers(20, n // 20, 2),
        lambda n: lattice(int(n**0.5)),
    ],
    ids=["tree", "fan", "random layers", "lattice"],
)
def test_time_grows_linearly(make: Callable[[int], Edges]) -> None:
    assert seconds(make(48_000)) < 8 * seconds(make(12_000))
