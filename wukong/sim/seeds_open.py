"""From a seed to a random open job in a random world, and a run of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from wukong.sim.checks import Violation
from wukong.sim.checks_open import OpenChecker
from wukong.sim.invokers import open_invoker
from wukong.sim.seeds import draw_setting
from wukong.sim.session import SimSession
from wukong.sim.store_open import OpenSimStore
from wukong.sim.world import Setting, World


def draw_open_setting(seed: int) -> tuple[Setting, list[tuple[int, int]]]:
    """Draw an open job and a world: those of a closed one, added piece by piece.

    The store does not fail over, and the client, which alone has the books, does not die.

    Returns: the setting, and the first and the end task of each piece.
    """
    setting = draw_setting(seed)
    rng = Random(f"open {seed}")
    n = len(setting.reads)
    n_cuts = min(n - 1, rng.choice((0, 1, 3, 8)))
    cuts = sorted(rng.sample(range(1, n), n_cuts)) if n > 1 else []
    pieces = list(zip([0, *cuts], [*cuts, n], strict=True))
    faults = replace(setting.faults, failovers=(), lag_s=0.0, takes_blobs=False, client_deaths=())
    policy = replace(setting.policy, confirm=False, long_s=rng.choice((0.05, 0.5, 5.0)))
    changed = replace(
        setting, parts=[], faults=faults, policy=policy, fail_fast=False, is_open=True
    )
    return changed, pieces


def run_open_seed(seed: int, trace: Callable[[str], None] | None = None) -> dict[str, int]:
    """Run the open job of a seed to its end. Returns: the counters of its world.

    Raises:
        Violation: something went wrong in it; the message says how to see it again.
    """
    try:
        return _run(*draw_open_setting(seed), seed, trace)
    except AssertionError as error:
        again = f"python -m wukong.sim --open --seed {seed} --trace"
        raise Violation(f"{error}\nreplay: {again}") from error


def _run(
    setting: Setting,
    pieces: list[tuple[int, int]],
    seed: int,
    trace: Callable[[str], None] | None,
) -> dict[str, int]:
    assert isinstance(setting.parts, list)
    checker = OpenChecker(setting.parts, setting.costs.raising | setting.costs.deadly)
    world = World(setting, seed, checker, trace)
    store = OpenSimStore(world)
    session = SimSession(world, store, open_invoker(world, store), checker, pieces)
    session.start()
    serial_s = sum(setting.costs.durations_s)
    n_deaths = len(setting.costs.deadly) * (setting.policy.n_deaths_max + 4)
    limit_s = setting.faults.until_s + 3 * serial_s + 600.0
    limit_s += n_deaths * (3 * setting.silence_s + 120.0)
    world.run(limit_s, lambda: world.is_over)
    if session.status is None:
        raise Violation(f"values are awaited after {world.now:.0f} s")
    # Nothing is deleted with the job: everything that was released has been, or is an executor's.
    store.forget()
    world.run(float("inf"), lambda: False)
    for blob in store.blobs:
        attempt = blob.split("/")[1]
        if attempt not in world.excused and blob not in world.excused_blobs:
            raise Violation(f"blob {blob} is left, and its attempt {attempt} has not died")
    return dict(world.counts)
