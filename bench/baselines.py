"""Ideas side by side: the schemes of `wukong.sim.schemes` on one real store, in turns, counted.

Every scheme has a cluster of its own with as many processes, the same embedded store, blobs and
executors, so that what differs is who invokes, what is cut, and what is asked of the store.
Everything asked is counted where it is asked; results are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rich import box
from rich.table import Table

from bench import N_WORKERS
from bench import linalg as linalg_suite
from bench import micro as micro_suite
from bench.baseline_cluster import BaselineCluster, sizes_of
from bench.measure import Case, Timing, compare
from bench.present import seconds_text
from bench.sides import Side
from wukong.sim.schemes import OURS, SCHEMES, WUKONG2020
from wukong.workloads import WORKLOADS

N_LARGE = 8
"""Bytes of a number."""
LIMIT_S = 20.0
"""Seconds of the rounds of one scheme with one case."""
OPERATIONS_MUST = 1 / 20
COUNTED_CASES = ("tree of 8,191", "GEMM")
"""Where ours may make at most so many operations, as a part of `wukong2020`'s."""
LEAST_COMPARED_BYTES = 100_000
"""Below this the headers of encoded values are most of what is moved."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case by one scheme."""

    case: str
    scheme: str
    timing: Timing
    counts: dict[str, int]
    """Of the last round; see `baseline_store.FIELDS`."""
    compulsory_bytes: int
    """Written and read, whoever runs it."""

    @property
    def moved_bytes(self) -> int:
        """Of values, written and read."""
        return self.counts["written_bytes"] + self.counts["read_bytes"]

    @property
    def least_operations(self) -> int:
        """Without what the engine adds: an executor of 2020 is started with its schedule."""
        is_theirs = self.scheme == WUKONG2020.name
        return self.counts["operations"] - is_theirs * self.counts["invocations"]

    def to_dict(self) -> dict[str, object]:
        """All numbers, ready for JSON."""
        return {
            "case": self.case,
            "scheme": self.scheme,
            "seconds": self.timing.seconds,
            "median_s": self.timing.median_s,
            "min_s": self.timing.min_s,
            "compulsory_bytes": self.compulsory_bytes,
            **self.counts,
        }


def compulsory_bytes(case: str, n_executors: int) -> int:
    """What must be moved if every executor keeps all that it has made: written plus read.

    By hand, for the sizes of `micro` and of the demo's workloads; bytes of the numbers alone.
    The client's constants (the model of SVC) are not counted, its results are.
    """
    away = 1 - 1 / n_executors
    """Part of what is spread evenly over the executors that is not on a given one."""
    n, columns, chunks = 100_000, 64, 32  # SVD1, TSQR
    square, wide = 4_000, 15  # SVD2: five values, ten vectors more
    small = columns * columns
    numbers = {
        "10,000 independent": 10_000,
        # Of a tree each executor but one sends its sum.
        "tree of 8,191": n_executors - 1 + 1,
        "chain of 2,000": 1,
        # The source to the others, their middle values to whoever adds them up, the sum.
        "fan 1-2,000-1": (1 + 1) + 2_000 * away,
        "TR": n_executors - 1 + 1,
        # An executor has some rows of A and of C; half of B (of two executors) is made elsewhere.
        # Read once more by each that lacks it, so that B counts (P - 1 + 1) / 2 times.
        "GEMM": 2_048**2 * n_executors / 2 + 2_048**2,
        # Every R but those made where all are stacked; the results.
        "SVD1": chunks * small * away + columns + small,
        "TSQR": chunks * small * away + small,
        # A stays in rows where it was made. Omega is made in parts and read by all; one partial
        # product Q'A of each other executor; U and V of five columns, and S.
        "SVD2": square * wide * n_executors / 2
        + square * wide * (n_executors - 1)
        + 2 * 5 * square
        + 5,
        "SVC": 20_000,
    }[case]
    assert n == 100_000
    return int(2 * N_LARGE * numbers)


def cases(only: Sequence[str]) -> list[Case]:
    """Micro graphs and workloads, at the sizes of the demo."""
    micro = [case for case in micro_suite.cases("tasks") if case.n_calls == 1]
    names = [case.name for case in micro] + [workload.name for workload in WORKLOADS]
    chosen = {name for name in names if not only or any(text in name for text in only)}
    wanted = [name for name in chosen if name in {w.name for w in WORKLOADS}]
    linalg = linalg_suite.cases(wanted, full=False) if wanted else []
    return [case for case in micro if case.name in chosen] + linalg


@contextmanager
def open_schemes(names: Sequence[str]) -> Iterator[list[BaselineCluster]]:
    """Open a cluster for each scheme; all are closed at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(BaselineCluster(SCHEMES[n], N_WORKERS)) for n in names]


def run_case(
    case: Case, clusters: Sequence[BaselineCluster], n_rounds: int, tell: Callable[[str], None]
) -> list[Outcome]:
    """Time and count one case by every scheme."""
    tell(f"{case.name}: sizes of its values")
    sizes = sizes_of(*case.build("sizes"))
    for cluster in clusters:
        cluster.sizes = sizes
    comparison = compare(case, list(map(_side, clusters)), n_rounds, tell, limit_s=LIMIT_S)
    least = compulsory_bytes(case.name, N_WORKERS)
    return [
        Outcome(case.name, timing.side, timing, cluster.counts.total(), least)
        for cluster, timing in zip(clusters, comparison.timings, strict=True)
    ]


def _side(cluster: BaselineCluster) -> Side:
    def get(graph: object, keys: object) -> object:
        cluster.counts.clear()
        return cluster.get(graph, keys)

    return Side(cluster.scheme.name, get, cluster.settle)


def table(outcomes: Sequence[Outcome]) -> Table:
    """The outcomes, a line each; times and operations also as multiples of ours."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Schemes on the real engine")
    for name in ("case", "scheme"):
        found.add_column(name)
    for name in (
        "median",
        "/ ours",
        "invo-\ncations",
        "opera-\ntions",
        "/ ours",
        "round\ntrips",
        "written\nMB",
        "read\nMB",
        "/ compul-\nsory",
    ):
        found.add_column(name, justify="right", no_wrap=True)
    ours = {outcome.case: outcome for outcome in outcomes if outcome.scheme == OURS.name}
    for outcome in outcomes:
        counts, base = outcome.counts, ours.get(outcome.case, outcome)
        is_large = outcome.compulsory_bytes >= LEAST_COMPARED_BYTES
        found.add_row(
            outcome.case,
            outcome.scheme,
            seconds_text(outcome.timing.median_s),
            f"{outcome.timing.median_s / base.timing.median_s:.2f}",
            f"{counts['invocations']:,}",
            f"{counts['operations']:,}",
            f"{counts['operations'] / base.counts['operations']:.1f}",
            f"{counts['round_trips']:,}",
            f"{counts['written_bytes'] / 1e6:.3g}",
            f"{counts['read_bytes'] / 1e6:.3g}",
            f"{outcome.moved_bytes / outcome.compulsory_bytes:.2f}" if is_large else "",
        )
    return found


def operation_ratios(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Operations of ours over `wukong2020`'s, for the cases where a bound is set."""
    found = {(outcome.case, outcome.scheme): outcome for outcome in outcomes}
    return {
        case: found[case, OURS.name].counts["operations"] / theirs.least_operations
        for (case, scheme), theirs in found.items()
        if scheme == WUKONG2020.name and (case, OURS.name) in found
        if any(fnmatchcase(case, counted) for counted in COUNTED_CASES)
    }
