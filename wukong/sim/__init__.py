"""The world on a virtual clock: real cores and transitions, simulated stores, platforms, faults.

    Setting --> World (clock, dice) --> SimStore <-- SimExecutor(ExecutorCore), SimClient(JobCore)
                                           |              ^
                                        Checker       LocalPool, Functions

`simulate` predicts what a job takes; `wukong.sim.seeds` tries random jobs in worlds full of faults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from wukong.executor.messages import Part, Status
from wukong.executor.work import Policy
from wukong.scheduler.costs import strands_per_executor
from wukong.scheduler.parts import static_parts
from wukong.scheduler.strands import cut_strands
from wukong.sim.checks import Checker, Violation
from wukong.sim.client import SimClient
from wukong.sim.dags import Costs, Dag
from wukong.sim.faults import Faults
from wukong.sim.invokers import open_invoker
from wukong.sim.schemes import OURS, SCHEMES, Scheme, cut_by_scheme
from wukong.sim.services import AWS_LAMBDA, LOCAL_POOL, Platform
from wukong.sim.store import SimStore
from wukong.sim.world import Setting, World

__all__ = [
    "AWS_LAMBDA",
    "LOCAL_POOL",
    "OURS",
    "SCHEMES",
    "Costs",
    "Dag",
    "Faults",
    "Platform",
    "Policy",
    "Scheme",
    "Setting",
    "SimReport",
    "Violation",
    "cut_parts",
    "cut_tasks",
    "run_world",
    "simulate",
]


@dataclass(frozen=True, slots=True)
class SimReport:
    """What happened in a simulated world."""

    status: Status
    makespan_s: float
    n_tasks: int
    n_strands: int
    n_commits: int
    n_invocations: int
    n_runs: int
    """Runs of strands and pieces, repeated ones included."""
    n_task_runs: int
    n_deaths: int
    n_store_calls: int
    put_bytes: int
    read_bytes: int
    store_busy_s: float = 0.0
    """How long the job's server has been occupied."""
    billed_s: float = 0.0
    """Seconds of all invocations, as a cloud bills them."""
    n_peak: int = 0
    """Most executors that ran at a time, in a cloud."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """All counters of the world."""


def simulate(
    dag: Dag,
    costs: Costs,
    platform: Platform = LOCAL_POOL,
    n_executors: int = 2,
    policy: Policy | None = None,
    seed: int = 0,
    *,
    scheme: Scheme = OURS,
    silence_s: float = 10.0,
    trace: Callable[[str], None] | None = None,
) -> SimReport:
    """Predict what a job takes when nothing fails.

    Args:
        dag: what is computed.
        costs: of its tasks.
        platform: where; see `wukong.sim.services`.
        n_executors: at most so many at a time.
        policy: of the executors; None: as it comes.
        scheme: another way to run the graph.
        silence_s: a running token without heartbeat for this long counts as dead.
        seed: of all latencies.
        trace: takes a line of text for each action and event, as it happens.
    Cost: about 1 us a task and 100 us a strand.
    """
    is_cut = scheme.strands
    parts = cut_parts(dag, costs, n_executors) if is_cut else cut_tasks(dag, costs, scheme)
    setting = Setting(
        parts=parts,
        reads=dag.reads(),
        costs=costs,
        platform=platform,
        n_executors=n_executors,
        policy=scheme.policy(Policy() if policy is None else policy),
        scheme=scheme,
        silence_s=silence_s,
    )
    return run_world(setting, seed, is_checked=False, trace=trace)


def cut_parts(
    dag: Dag, costs: Costs, n_executors: int, grains_per_executor: float | None = None
) -> list[Part]:
    """Cut a graph as a client does."""
    cost = np.maximum(np.array(costs.durations_s, np.float64), 1e-9)
    grains_per_executor = grains_per_executor or strands_per_executor(n_executors)
    grain = float(cost.sum()) / (grains_per_executor * n_executors)
    strands = cut_strands(dag.inputs_ptr, dag.inputs, dag.requested, grain=grain, costs=cost)
    return static_parts(strands)


def cut_tasks(dag: Dag, costs: Costs, scheme: Scheme) -> list[Part]:
    """Cut a graph as a scheme without strands does."""
    cut = cut_by_scheme(scheme, dag.inputs_ptr, dag.inputs, dag.requested, costs.sizes_bytes)
    return static_parts(cut)


def run_world(
    setting: Setting,
    seed: int,
    *,
    is_checked: bool = True,
    trace: Callable[[str], None] | None = None,
) -> SimReport:
    """Let one world go from the job's start to the end of everything in it.

    Raises:
        AssertionError: something was seen that must never be: a `Violation`, or what a core or a
            transition asserts.
    """
    wrong = setting.costs.raising | setting.costs.deadly
    checker = Checker(setting.parts, wrong) if is_checked else None
    world = World(setting, seed, checker, trace)
    store = SimStore(world)
    client = SimClient(world, store, open_invoker(world, store))
    client.start()
    world.run(_time_limit_s(setting), lambda: world.is_over)
    if client.status is None:
        raise Violation(f"the job has not ended after {world.now:.0f} s")
    if is_checked:
        _check_end(world, store)
    counts = world.counts
    assert client.finished_at is not None
    return SimReport(
        status=client.status,
        makespan_s=client.finished_at,
        n_tasks=sum(len(part.tasks) for part in setting.parts),
        n_strands=len(setting.parts),
        n_commits=counts["commits"],
        n_invocations=counts["invocations"],
        n_runs=counts["runs"],
        n_task_runs=counts["tasks"],
        n_deaths=counts["deaths"],
        n_store_calls=counts["store calls"],
        put_bytes=counts["put bytes"],
        read_bytes=counts["read bytes"],
        store_busy_s=world.busy_s["store"],
        billed_s=world.busy_s["executors"],
        n_peak=counts["peak"],
        counts=dict(counts),
    )


def _time_limit_s(setting: Setting) -> float:
    """When the job must have ended, at the latest: generous, but far from for ever.

    After the last fault all tasks one after the other; the longest back-off of a queued token; and
    for each task that kills executors its attempts.
    """
    serial_s = sum(setting.costs.durations_s)
    per_death_s = 3 * setting.silence_s + 120.0
    n_deaths = len(setting.costs.deadly) * (setting.policy.n_deaths_max + 4)
    return setting.faults.until_s + 3 * serial_s + 600.0 + n_deaths * per_death_s


def _check_end(world: World, store: SimStore) -> None:
    """Let everybody come to an end, and look at what is left."""
    setting = world.setting
    is_calm = setting.faults.are_none and not world.counts["deaths"] + world.counts["drains"]
    if is_calm and not setting.fail_fast and world.counts["tasks"] != len(setting.reads):
        raise Violation(f"{world.counts['tasks']} runs of {len(setting.reads)} tasks, and no fault")
    if is_calm:
        store.check_nothing_else_is_kept()
    world.run(float("inf"), lambda: False)
    if any(store.rows.tables.values()):
        raise Violation("rows are left after the job was forgotten")
    for blob in store.blobs:
        attempt = blob.split("/")[1]
        if attempt not in world.excused and blob not in world.excused_blobs:
            raise Violation(f"blob {blob} is left, and its attempt {attempt} has not died")
