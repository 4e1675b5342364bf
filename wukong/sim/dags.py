"""Task graphs to simulate: the shapes of the six workloads, and random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Dag:
    """A task graph without its functions. Task ids are 0 to n - 1; inputs have smaller ids."""

    inputs_ptr: NDArray[np.int64]
    """(n + 1,) task t reads inputs[inputs_ptr[t]:inputs_ptr[t + 1]]."""
    inputs: NDArray[np.int64]
    requested: tuple[int, ...]
    """Tasks whose values the client reads, ascending."""

    @property
    def n_tasks(self) -> int:
        """How many tasks it has."""
        return len(self.inputs_ptr) - 1

    def reads(self) -> list[tuple[int, ...]]:
        """For each task the tasks that it reads."""
        ends, inputs = self.inputs_ptr.tolist(), self.inputs.tolist()
        return [tuple(inputs[a:b]) for a, b in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Costs:
    """What the tasks of a graph take, and what they do to their executors."""

    durations_s: Sequence[float]
    """One a task."""
    sizes_bytes: Sequence[int]
    """Of each task's value, encoded."""
    raising: frozenset[int] = frozenset()
    """Tasks that raise an exception, however often they are retried."""
    deadly: frozenset[int] = frozenset()
    """Tasks that kill whatever executor runs them."""


class DagBuilder:
    """Numbers tasks as they are added."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, ...]] = []
        self.costs: list[tuple[float, int]] = []

    def add(self, *inputs: int, cost: tuple[float, int] = (0.0, 0)) -> int:
        """Add a task that reads others, with its seconds and bytes. Returns: its id."""
        self.reads.append(tuple(dict.fromkeys(inputs)))
        self.costs.append(cost)
        return len(self.reads) - 1

    def tree(self, tasks: Sequence[int], width: int = 2, cost: tuple[float, int] = (0.0, 0)) -> int:
        """Reduce values level by level. Returns: the root."""
        level = list(tasks)
        while len(level) > 1:
            level = [
                self.add(*level[i : i + width], cost=cost) if i + 1 < len(level) else level[i]
                for i in range(0, len(level), width)
            ]
        return level[0]

    def dag(self, requested: Iterable[int]) -> Dag:
        """Keep what the requested tasks need, in depth-first post-order as the planner does."""
        return self.build(requested)[0]

    def build(self, requested: Iterable[int]) -> tuple[Dag, Costs]:
        """As `dag`, with what the tasks take."""
        number: dict[int, int] = {}
        order: list[int] = []
        wanted = list(dict.fromkeys(requested))
        stack = [(task, False) for task in reversed(wanted)]
        while stack:
            task, is_ready = stack.pop()
            if task in number:
                continue
            if is_ready:
                number[task] = len(order)
                order.append(task)
            else:
                stack.append((task, True))
                stack.extend((d, False) for d in reversed(self.reads[task]) if d not in number)
        ptr = np.zeros(len(order) + 1, np.int64)
        np.cumsum([len(self.reads[task]) for task in order], out=ptr[1:])
        flat = [number[d] for task in order for d in self.reads[task]]
        dag = Dag(ptr, np.array(flat, np.int64), tuple(sorted(number[t] for t in wanted)))
        kept = [self.costs[task] for task in order]
        return dag, Costs([seconds for seconds, _ in kept], [n_bytes for _, n_bytes in kept])


def tree_reduction(n_leaves: int) -> Dag:
    """Sum of n chunks, two by two."""
    build = DagBuilder()
    return build.dag([build.tree([build.add() for _ in range(n_leaves)])])


def gemm(n_blocks: int) -> Dag:
    """Product of two square matrices in n x n blocks; all blocks of the product are requested."""
    build = DagBuilder()
    span = range(n_blocks)
    a = [[build.add() for _ in span] for _ in span]
    b = [[build.add() for _ in span] for _ in span]
    return build.dag(
        build.tree([build.add(a[i][k], b[k][j]) for k in span]) for i in span for j in span
    )


def tsqr(n_chunks: int) -> Dag:
    """R of a tall matrix: a QR of each chunk, then of pairs of R."""
    build = DagBuilder()
    return build.dag([build.tree([build.add(build.add()) for _ in range(n_chunks)])])


def svd_tall(n_chunks: int) -> Dag:
    """SVD of a tall matrix: all R are stacked, and each chunk's Q is multiplied by a part of U."""
    build = DagBuilder()
    qr = [build.add(build.add()) for _ in range(n_chunks)]
    stacked = build.add(*(build.add(task) for task in qr))
    small = build.add(stacked)
    singular, v = build.add(small), build.add(small)
    u = [build.add(build.add(task), build.add(small)) for task in qr]
    return build.dag([singular, v, *u])


def svd_square(n_blocks: int) -> Dag:
    """Compressed SVD of a square matrix: products with a thin matrix, and QRs between them."""
    build = DagBuilder()
    span = range(n_blocks)
    a = [[build.add() for _ in span] for _ in span]
    thin = [build.add() for _ in span]
    for _ in range(2):
        product = [build.tree([build.add(a[i][k], thin[k]) for k in span]) for i in span]
        qr = [build.add(task) for task in product]
        whole = build.add(*qr)
        thin = [build.add(task, whole) for task in qr]
    small = build.add(*(build.add(task) for task in thin))
    return build.dag([build.add(small), build.add(small), *(build.add(t, small) for t in thin)])


def prediction(n_chunks: int) -> Dag:
    """One model applied to every chunk."""
    build = DagBuilder()
    model = build.add()
    return build.dag([build.add(build.add(), model) for _ in range(n_chunks)])


def random_dag(n_tasks: int, rng: Random) -> Dag:
    """Edges to recent tasks and, less often, to any; sinks and some others are requested."""
    build = DagBuilder()
    reach = rng.choice((3, 8, n_tasks))
    n_inputs_max = rng.choice((1, 2, 3, 6))
    is_read = [False] * n_tasks
    for task in range(n_tasks):
        n_inputs = min(task, rng.randint(0, n_inputs_max))
        inputs = {rng.randrange(max(0, task - reach), task) for _ in range(n_inputs)}
        for source in inputs:
            is_read[source] = True
        build.add(*sorted(inputs))
    chance = rng.choice((0.0, 0.1))
    return build.dag(t for t in range(n_tasks) if not is_read[t] or rng.random() < chance)


SHAPES: dict[str, Callable[[Random], Dag]] = {
    "random": lambda rng: random_dag(rng.randint(3, 60), rng),
    "tree": lambda rng: tree_reduction(rng.randint(2, 32)),
    "gemm": lambda rng: gemm(rng.randint(1, 3)),
    "tsqr": lambda rng: tsqr(rng.randint(2, 24)),
    "svd_tall": lambda rng: svd_tall(rng.randint(1, 8)),
    "svd_square": lambda rng: svd_square(rng.randint(1, 3)),
    "prediction": lambda rng: prediction(rng.randint(1, 24)),
}
"""A graph of each shape, of a random size that keeps a seed under 50 ms."""


def random_costs(dag: Dag, rng: Random) -> Costs:
    """Tasks of one kind of length, or of very different ones; values from bytes to megabytes."""
    n = dag.n_tasks
    mean_s = rng.choice((0.001, 0.05, 0.5))
    spread = rng.choice((0.0, 1.0, 2.0))
    durations_s = [min(mean_s * rng.lognormvariate(0.0, spread), 4.0) for _ in range(n)]
    kinds = rng.choice(((100,), (100, 100_000), (100, 20_000, 300_000, 3_000_000), (3_000_000,)))
    return Costs(durations_s, [rng.choice(kinds) for _ in range(n)])
