"""The paper's workloads at the paper's sizes, as graphs with estimated seconds and bytes.

Rates of one executor are those of one core here, so that what is simulated can be checked against
what is measured; see `RATES`. Sizes and chunks are stated with each workload. `compulsory_bytes`
are counted by hand, from the mathematics and the number of executors, not from a cut of the graph:
what must be moved if every executor keeps all that it has made or read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from wukong.sim import Costs, Dag
from wukong.sim.dags import DagBuilder

FLOAT = 8
SMALL = 1000
"""Bytes of a number with its wrapping."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one executor computes in a second."""

    gemm_flops: float
    qr_flops: float
    random_bytes: float
    """Of new random numbers."""
    touched_bytes: float
    """Read once: sums, copies."""
    predicted_rows: float
    """Rows of 20 columns through an SVC with the support vectors of 1,000 samples."""


RATES = Rates(
    gemm_flops=20e9, qr_flops=8e9, random_bytes=0.8e9, touched_bytes=4e9, predicted_rows=25e3
)
"""One core of the machine that README's table was measured on, BLAS with one thread: `bench linalg`
divided by the CPU seconds of its tasks, rounded."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One job to simulate."""

    name: str
    dag: Dag
    costs: Costs
    n_executors: int
    compulsory_bytes: float
    """Read and written, all executors together."""

    def critical_s(self) -> float:
        """Seconds of the longest path."""
        ends: list[float] = []
        for inputs, own_s in zip(self.dag.reads(), self.costs.durations_s):
            ends.append(own_s + max((ends[source] for source in inputs), default=0.0))
        return max(ends)

    def bound_s(self, bytes_per_s: float) -> float:
        """No schedule is faster: critical path, work / executors, bytes / bandwidth."""
        return max(
            self.critical_s(),
            sum(self.costs.durations_s) / self.n_executors,
            self.compulsory_bytes / (bytes_per_s * self.n_executors),
        )


def tree_reduction(n_leaves: int, task_s: float, n_executors: int | None = None) -> Workload:
    """A binary tree of tasks that sleep."""
    build = DagBuilder()
    cost = (task_s, SMALL)
    root = build.tree([build.add(cost=cost) for _ in range(n_leaves)], cost=cost)
    n_executors = n_executors or n_leaves
    name = f"tree of {n_leaves:,} leaves, {task_s * 1e3:g} ms"
    return Workload(name, *build.build([root]), n_executors, 2.0 * SMALL * (n_executors - 1))


def independent(n_tasks: int, task_s: float, n_executors: int) -> Workload:
    """Tasks that sleep; all results are wanted."""
    build = DagBuilder()
    dag, costs = build.build([build.add(cost=(task_s, SMALL)) for _ in range(n_tasks)])
    name = f"{n_tasks:,} x {task_s * 1e3:g} ms on {n_executors:,}"
    return Workload(name, dag, costs, n_executors, float(SMALL * n_tasks))


def fan_out(n_tasks: int, task_s: float, n_executors: int) -> Workload:
    """One task, many that read it, and one that reads all of them."""
    build = DagBuilder()
    source = build.add(cost=(0.1, SMALL))
    middle = [build.add(source, cost=(task_s, 100)) for _ in range(n_tasks)]
    dag, costs = build.build([build.add(*middle, cost=(0.1, SMALL))])
    name = f"fan of {n_tasks:,}, {task_s * 1e3:g} ms on {n_executors:,}"
    return Workload(name, dag, costs, n_executors, SMALL * n_executors + 200.0 * n_tasks)


def gemm(n: int, chunk: int = 2_500) -> Workload:
    """C = A B, square, of random matrices; an executor for each block of C.

    Compulsory: A and B are made in blocks by one executor each, so each executor lacks all but its
    share of the row and the column that it multiplies; it writes what others read, and C.
    """
    span = range(n // chunk)
    block_bytes = chunk * chunk * FLOAT
    build = DagBuilder()
    made = (block_bytes / RATES.random_bytes, block_bytes)
    a, b = ([[build.add(cost=made) for _ in span] for _ in span] for _ in range(2))
    product = (2 * chunk**3 / RATES.gemm_flops, block_bytes)
    added = (3 * block_bytes / RATES.touched_bytes, block_bytes)
    blocks = [
        build.tree([build.add(a[i][k], b[k][j], cost=product) for k in span], cost=added)
        for i in span
        for j in span
    ]
    n_executors = len(span) ** 2
    rows = 2 * len(span) * block_bytes
    read = n_executors * rows - 2 * n_executors * block_bytes
    written = 3 * n_executors * block_bytes
    return Workload(f"GEMM {n:,}", *build.build(blocks), n_executors, float(read + written))


def tsqr(n_rows: int, n_columns: int = 128, chunk: int = 32_768) -> Workload:
    """R of a tall random matrix; an executor for each chunk. Compulsory: all R but one travel."""
    build = DagBuilder()
    n_chunks = max(1, n_rows // chunk)
    chunk_bytes, r_bytes = chunk * n_columns * FLOAT, n_columns * n_columns * FLOAT
    made = (chunk_bytes / RATES.random_bytes, chunk_bytes)
    factored = (2 * chunk * n_columns**2 / RATES.qr_flops, r_bytes)
    joined = (4 * n_columns**3 / RATES.qr_flops, r_bytes)
    leaves = [build.add(build.add(cost=made), cost=factored) for _ in range(n_chunks)]
    root = build.tree(leaves, cost=joined)
    name = f"TSQR {n_rows / 1e6:.1f} M x {n_columns}"
    return Workload(name, *build.build([root]), n_chunks, 2.0 * r_bytes * (n_chunks - 1))


def svd_tall(n_rows: int, n_columns: int = 100, chunk: int = 32_768) -> Workload:
    """Singular values and V of a tall matrix, as dask.array does it: all R in one stack."""
    build = DagBuilder()
    n_chunks = max(1, n_rows // chunk)
    chunk_bytes, r_bytes = chunk * n_columns * FLOAT, n_columns * n_columns * FLOAT
    made = (chunk_bytes / RATES.random_bytes, chunk_bytes)
    factored = (2 * chunk * n_columns**2 / RATES.qr_flops, r_bytes)
    leaves = [build.add(build.add(cost=made), cost=factored) for _ in range(n_chunks)]
    stack_s = 2 * n_chunks * n_columns**3 / RATES.qr_flops
    stacked = build.add(*leaves, cost=(stack_s, r_bytes))
    small = build.add(stacked, cost=(20 * n_columns**3 / RATES.qr_flops, r_bytes))
    ends = [build.add(small, cost=(0.0, n)) for n in (n_columns * FLOAT, r_bytes)]
    name = f"SVD1 {n_rows / 1e6:.1f} M x {n_columns}"
    return Workload(name, *build.build(ends), n_chunks, 2.0 * r_bytes * (n_chunks - 1))


def svd_square(n: int, k: int = 15, chunk: int = 4_000, n_executors: int = 1_000) -> Workload:
    """Compressed SVD of a square random matrix: A is passed over four times.

    Compulsory: A stays where it was made; each executor holds a square of it, so for each pass the
    thin matrix's part of its side is read, and its part of the product written.
    """
    span = range(max(1, n // chunk))
    n_executors = min(n_executors, len(span) ** 2)
    block_bytes, thin_bytes = chunk * chunk * FLOAT, chunk * k * FLOAT
    build = DagBuilder()
    made = (block_bytes / RATES.random_bytes, block_bytes)
    product = (block_bytes / RATES.touched_bytes, thin_bytes)
    added = (3 * thin_bytes / RATES.touched_bytes, thin_bytes)
    thin_qr = (2 * chunk * k**2 / RATES.qr_flops, thin_bytes)
    whole_qr = (2 * len(span) * k**3 / RATES.qr_flops, len(span) * k * k * FLOAT)
    a = [[build.add(cost=made) for _ in span] for _ in span]
    thin = [build.add(cost=(thin_bytes / RATES.random_bytes, thin_bytes)) for _ in span]
    n_passes = 4
    for _ in range(n_passes):
        # Alternately by rows and by columns of A.
        a = [list(column) for column in zip(*a)]
        parts = [
            build.tree([build.add(a[i][j], thin[j], cost=product) for j in span], cost=added)
            for i in span
        ]
        factored = [build.add(part, cost=thin_qr) for part in parts]
        whole = build.add(*factored, cost=whole_qr)
        thin = [build.add(part, whole, cost=thin_qr) for part in factored]
    small = build.add(*thin, cost=(10 * n * k**2 / RATES.qr_flops, k * k * FLOAT))
    side = math.sqrt(n_executors)
    compulsory = n_passes * 2 * side * n * k * FLOAT
    return Workload(f"SVD2 {n / 1e3:g}k^2", *build.build([small]), n_executors, compulsory)


def prediction(n_rows: int, n_columns: int = 20, chunk: int = 100_000) -> Workload:
    """A fitted model applied to every chunk of a random matrix."""
    build = DagBuilder()
    n_chunks = max(1, n_rows // chunk)
    model_bytes = 100_000
    model = build.add(cost=(0.01, model_bytes))
    made = (chunk * n_columns * FLOAT / RATES.random_bytes, chunk * n_columns * FLOAT)
    predicted = (chunk / RATES.predicted_rows, chunk * FLOAT)
    ends = [build.add(build.add(cost=made), model, cost=predicted) for _ in range(n_chunks)]
    compulsory = n_chunks * (model_bytes + chunk * FLOAT)
    name = f"SVC {n_rows / 1e6:.1f} M x {n_columns}"
    return Workload(name, *build.build(ends), n_chunks, float(compulsory))


SUITES: dict[str, list[Callable[[], Workload]]] = {
    "tree": [
        *(partial(tree_reduction, 1_024, s) for s in (0.0, 0.1, 0.25, 0.5)),
        partial(tree_reduction, 16_384, 0.5),
    ],
    "strong": [partial(independent, 10_000, 0.5, 250), partial(independent, 100_000, 0.5, 10_000)],
    "weak": [partial(independent, 10 * n, 0.5, n) for n in (10, 100, 1_000, 10_000, 100_000)],
    "gemm": [partial(gemm, n) for n in (5_000, 10_000, 25_000, 50_000)],
    "tsqr": [partial(tsqr, n * 2**19) for n in (1, 4, 8, 32, 640)],
    "svd1": [partial(svd_tall, n) for n in (500_000, 2_000_000, 8_100_000)],
    "svd2": [partial(svd_square, n) for n in (16_000, 64_000, 256_000)],
    "svc": [partial(prediction, n) for n in (1_000_000, 4_100_000, 16_300_000)],
    "fan": [partial(fan_out, n, 1.0, min(n, 10_000)) for n in (1_000, 10_000, 100_000)],
    "million": [partial(tree_reduction, 2**19, 0.01, 1_000)],
}
"""By name: what `bench scale` simulates. 640 x 2^19 rows make 10,240 chunks of TSQR."""
