"""Large scale, simulated: the real cores and transitions, with a cloud's latencies and prices.

Each workload runs twice with ours: on a function that has never run (`ramp`: cold starts, and 1,000
new environments in 10 seconds), and on one whose environments are warm (`warm`: what provisioned
concurrency is for). The other schemes run warm, where the graph is small enough for a minute.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from bench.scale_workloads import Workload
from bench.service import Service
from wukong.aws.prices import JobCost, Usage, price
from wukong.executor.work import Policy
from wukong.sim import AWS_LAMBDA, OURS, Platform, Scheme, SimReport, simulate
from wukong.sim.schemes import NUMPYWREN, WUKONG2020

INVOKES_PER_S = 1_000.0
"""By one caller: aiobotocore takes 0.8-1.0 ms of a core for each call (measured here)."""
RELAY = 32
"""A caller with more invocations sends so many, and those send on the others."""
TIER_BYTES = 1_000_000
"""The tiered store's default: smaller blobs are in Redis."""
POLICY = Policy(heartbeat_s=20.0, hand_over_s=0.25)
"""As on Lambda: heartbeats of ten thousand executors each second would fill the store's server, and
an invocation, a start and a commit take a quarter of a second until another executor has begun."""
SILENCE_S = 60.0
MEMORY_GB = 3.0
N_OTHERS_MAX = 20_000
"""Tasks of a graph that the other schemes run too."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One workload by one scheme."""

    workload: Workload
    scheme: str
    start: str
    """`ramp` or `warm`."""
    report: SimReport
    bound_s: float
    cost: JobCost

    @property
    def ratio(self) -> float:
        """Makespan over the bound; the bound of tasks that take no time is none."""
        return self.report.makespan_s / self.bound_s if self.bound_s > 1e-3 else float("nan")

    @property
    def utilisation(self) -> float:
        """Of the job's server, over the whole job."""
        return self.report.store_busy_s / self.report.makespan_s

    @property
    def moved_bytes(self) -> int:
        """Read and written."""
        return self.report.put_bytes + self.report.read_bytes

    @property
    def saturates_at(self) -> float:
        """Executors at which the server would be occupied all the time, doing the same each."""
        return self.report.n_peak / self.utilisation if self.utilisation else float("inf")

    def to_dict(self) -> dict[str, object]:
        """All numbers, ready for JSON."""
        report = self.report
        return {
            "workload": self.workload.name,
            "scheme": self.scheme,
            "start": self.start,
            "n_tasks": report.n_tasks,
            "n_executors": self.workload.n_executors,
            "bound_s": self.bound_s,
            "makespan_s": report.makespan_s,
            "ratio": self.ratio,
            "cost_usd": self.cost.total_usd,
            "n_strands": report.n_strands,
            "n_invocations": report.n_invocations,
            "n_store_operations": report.counts.get("store operations", 0),
            "n_peak": report.n_peak,
            "moved_bytes": self.moved_bytes,
            "compulsory_bytes": self.workload.compulsory_bytes,
            "utilisation": self.utilisation,
            "saturates_at": self.saturates_at,
        }


def platforms(service: Service) -> dict[str, Platform]:
    """Lambda with Redis and S3, from the ground up and warm."""
    ramp = dataclasses.replace(
        AWS_LAMBDA,
        service_s=service.fixed_s,
        service_row_s=service.row_s,
        invokes_per_s=INVOKES_PER_S,
        relay=RELAY,
        tier_bytes=TIER_BYTES,
    )
    warm = dataclasses.replace(ramp, cold_start_s=ramp.warm_start_s, burst=float("inf"))
    return {"ramp": ramp, "warm": warm}


def run_suite(
    make: Iterable[Callable[[], Workload]], service: Service, tell: Callable[[str], None]
) -> list[Outcome]:
    """Simulate workloads, ours and others."""
    outcomes = []
    for each in make:
        workload = each()
        for start, platform in platforms(service).items():
            schemes = [OURS]
            if start == "warm" and workload.dag.n_tasks <= N_OTHERS_MAX:
                schemes += [WUKONG2020, NUMPYWREN]
            for scheme in schemes:
                tell(f"{workload.name}: {scheme.name}, {start}")
                outcomes.append(simulate_workload(workload, scheme, start, platform))
    return outcomes


def simulate_workload(
    workload: Workload, scheme: Scheme, start: str, platform: Platform
) -> Outcome:
    """One workload by one scheme."""
    report = simulate(
        workload.dag,
        workload.costs,
        platform,
        workload.n_executors,
        POLICY,
        scheme=scheme,
        silence_s=SILENCE_S,
    )
    usage = Usage(
        requests=report.n_invocations,
        gb_seconds=report.billed_s * MEMORY_GB,
        redis_operations=report.counts.get("store operations", 0),
        s3_puts=report.counts.get("blobs put", 0),
        s3_gets=report.counts.get("blobs read", 0),
    )
    bound_s = workload.bound_s(platform.blob_bytes_per_s)
    return Outcome(workload, scheme.name, start, report, bound_s, price(usage, is_arm=False))


def table(outcomes: Iterable[Outcome]) -> Table:
    """The outcomes, a line each."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Simulated")
    for name in ("workload", "scheme", "start"):
        found.add_column(name)
    for name in (
        "bound\ns",
        "makespan\ns",
        "times\nbound",
        "USD",
        "invo-\ncations",
        "store\noperations",
        "moved\nGB",
        "compul-\nsory GB",
        "peak",
        "server\nbusy",
        "saturates\nat",
    ):
        found.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        report = outcome.report
        found.add_row(
            outcome.workload.name,
            outcome.scheme,
            outcome.start,
            f"{outcome.bound_s:.2f}",
            f"{report.makespan_s:.2f}",
            f"{outcome.ratio:.2f}",
            f"{outcome.cost.total_usd:.4f}",
            f"{report.n_invocations:,}",
            f"{report.counts.get('store operations', 0):,}",
            f"{outcome.moved_bytes / 1e9:.3g}",
            f"{outcome.workload.compulsory_bytes / 1e9:.3g}",
            f"{report.n_peak:,}",
            f"{outcome.utilisation:.1%}",
            f"{outcome.saturates_at:,.0f}",
        )
    return found


def draw(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Draw makespans over the number of executors, a line for each scheme, beside the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for outcome in outcomes:
        at = outcome.workload.n_executors
        label = f"{outcome.scheme}, {outcome.start}"
        lines.setdefault(label, []).append((at, outcome.report.makespan_s))
        lines.setdefault("bound", []).append((at, outcome.bound_s))
    for label, points in lines.items():
        ordered = sorted(set(points))
        axes.plot(*zip(*ordered), "k_" if label == "bound" else ".", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("executors")
    axes.set_ylabel("seconds")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
