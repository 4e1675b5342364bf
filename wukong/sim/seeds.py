"""From a seed to a random job in a random world, and a run of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from wukong.executor.work import Policy
from wukong.sim import Setting, SimReport, Violation, cut_parts, run_world
from wukong.sim.dags import SHAPES, Costs, Dag, random_costs
from wukong.sim.faults import NO_FAULTS, Faults, draw_faults
from wukong.sim.services import AWS_LAMBDA, LOCAL_POOL

CALM_EVERY = 4
"""Of so many seeds one has no faults."""


def draw_setting(seed: int) -> Setting:
    """Draw a job and a world.

    Seeds go round the shapes and the switches, so that any stretch of them has all; sizes,
    policies and faults are random.
    """
    rng = Random(seed)
    shape = sorted(SHAPES)[seed % len(SHAPES)]
    number = seed // len(SHAPES)
    is_calm = number % CALM_EVERY == 0
    platform = LOCAL_POOL if number % 2 else AWS_LAMBDA
    platform = rng.choice((LOCAL_POOL, AWS_LAMBDA, platform))
    n_executors = rng.choice((1, 2, 2, 4, 8))
    dag = SHAPES[shape](rng)
    costs = random_costs(dag, rng)
    parts = cut_parts(dag, costs, n_executors, rng.choice((0.3, 1.0, 4.0, 4.0, 12.0)))
    serial_s = sum(costs.durations_s)
    faults = NO_FAULTS
    if not is_calm:
        faults = draw_faults(rng, 1.0 + serial_s / n_executors, rng.random())
        costs = _with_bad_tasks(dag, costs, rng)
    if not platform.takes_queued and rng.random() < 0.3:
        limit_s = 2 * max(costs.durations_s) + rng.choice((3.0, 10.0))
        platform = replace(platform, time_limit_s=limit_s, burst=2.0, rate_per_s=0.5)
    heartbeat_s = rng.choice((0.5, 1.0, 2.0))
    return Setting(
        parts=parts,
        reads=dag.reads(),
        costs=costs,
        platform=platform,
        n_executors=n_executors,
        policy=_with_bounds(_draw_policy(rng, heartbeat_s, faults), seed),
        faults=faults,
        silence_s=heartbeat_s * rng.choice((3.0, 5.0)),
        split_after_s=rng.choice((0.02, 0.1, 0.5)),
        fail_fast=rng.random() < 0.1,
        is_measured=rng.random() < 0.9,
    )


def _with_bad_tasks(dag: Dag, costs: Costs, rng: Random) -> Costs:
    """Some tasks raise, and now and then one kills its executor."""
    tasks = range(dag.n_tasks)
    raising = rng.sample(tasks, min(dag.n_tasks, rng.choice((0, 0, 1, 3))))
    deadly = rng.sample(tasks, min(dag.n_tasks, rng.choice((0, 0, 0, 0, 1, 2))))
    return replace(costs, raising=frozenset(raising), deadly=frozenset(deadly))


def _draw_policy(rng: Random, heartbeat_s: float, faults: Faults) -> Policy:
    return Policy(
        inline_bytes=rng.choice((0, 1_000, 256 * 1024)),
        blob_bytes=rng.choice((50, 64 * 1024)),
        absorb_bytes=rng.choice((0, 50, 1024 * 1024)),
        split=rng.random() < 0.6,
        heartbeat_s=heartbeat_s,
        n_deaths_max=rng.choice((2, 3, 6)),
        give_up_s=rng.choice((5.0, 60.0)),
        confirm=bool(faults.failovers),
    )


def _with_bounds(policy: Policy, seed: int) -> Policy:
    """Half of the seeds put outputs while runs go on; drawn apart, so that old seeds stay."""
    rng = Random(f"bounds {seed}")
    if rng.random() < 0.5:
        return policy
    return replace(
        policy,
        pile_bytes=rng.choice((100, 10_000, 1 << 28)),
        early_bytes=rng.choice((0, 1, 5_000)),
        hand_over_s=rng.choice((0.0, 0.05, 0.5)),
    )


def run_seed(seed: int, trace: Callable[[str], None] | None = None) -> SimReport:
    """Run the world of a seed.

    Raises:
        Violation: something went wrong in it; the message says how to see it again.
    """
    try:
        return run_world(draw_setting(seed), seed, trace=trace)
    except AssertionError as error:
        raise Violation(f"{error}\nreplay: python -m wukong.sim --seed {seed} --trace") from error
