"""Random jobs in random worlds: nothing wrong is ever seen, and broken rules are found out.

The seeds are fixed. New ones are explored by hand: `python -m wukong.sim --seed 9000 --count 999`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from sim_mutations import MUTATIONS, Patch

from wukong.executor.messages import Status
from wukong.executor.work import Policy
from wukong.sim import (
    AWS_LAMBDA,
    LOCAL_POOL,
    Costs,
    Faults,
    Setting,
    Violation,
    cut_parts,
    run_world,
    simulate,
)
from wukong.sim.dags import prediction, tree_reduction
from wukong.sim.seeds import CALM_EVERY, draw_setting, run_seed

N_SEEDS = 2_000
N_FAST = 100
FAST_BLOCK = 5
SLOW_BLOCK = 100

# A seed that catches a mutation which few others catch; if it no longer does, all seeds are tried.
CAUGHT_BY = {
    "a_split_counts_inputs_by_occurrence": 1221,
    "blob_ids_without_the_attempt": 26,
    "token_ids_from_a_counter_of_the_store": 601,
}


def block_id(first: int) -> str:
    return f"from-{first}"


@pytest.mark.parametrize("first", range(0, N_FAST, FAST_BLOCK), ids=block_id)
def test_nothing_wrong_is_seen(first: int) -> None:
    for seed in range(first, first + FAST_BLOCK):
        run_seed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(N_FAST, N_SEEDS, SLOW_BLOCK), ids=block_id)
def test_nothing_wrong_is_seen_in_many_worlds(first: int) -> None:
    for seed in range(first, first + SLOW_BLOCK):
        run_seed(seed)


@pytest.mark.slow
def test_the_seeds_see_every_kind_of_fault() -> None:
    seen: Counter[str] = Counter()
    for seed in range(300):
        report = run_seed(seed)
        seen.update(report.counts)
        seen[report.status.name] += 1
    for kind in ("deaths", "stops", "failovers", "blobs lost", "relaunches", "condemned", "FAILED"):
        assert seen[kind] >= 10, f"{kind}: {seen[kind]}"


def test_the_seeds_go_round_all_shapes_with_each_switch() -> None:
    settings = [draw_setting(seed) for seed in range(84)]
    assert {(s.policy.split, s.policy.absorb_bytes > 0) for s in settings} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }
    assert {s.platform.name for s in settings} == {"local", "lambda"}
    assert sum(s.faults.are_none for s in settings) * CALM_EVERY == len(settings)


@pytest.mark.parametrize("broken", MUTATIONS, ids=lambda broken: str(broken.__name__))
@pytest.mark.slow
def test_a_broken_rule_is_found_out(
    broken: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    seeds = [CAUGHT_BY.get(broken.__name__, 0), *range(N_SEEDS)]
    assert any(fails(seed) for seed in seeds), "no seed has seen it"


def fails(seed: int) -> bool:
    try:
        run_seed(seed)
    except Violation:
        return True
    return False


def test_a_failure_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = (m for m in MUTATIONS if m.__name__ == "a_commit_leaves_its_token")
    broken(monkeypatch)
    with pytest.raises(Violation, match=r"replay: python -m wukong\.sim --seed \d --trace"):
        list(map(run_seed, range(10)))  # not every job has a second strand to commit


@pytest.mark.slow
def test_the_trace_of_a_seed_is_the_same_under_any_hash_seed() -> None:
    command = [sys.executable, "-m", "wukong.sim", "--seed", "5", "--count", "12", "--trace"]
    traces = [
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.splitlines()[:-1]
        for hash_seed in ("1", "2")
    ]
    assert len(traces[0]) > 1_000
    assert traces[0] == traces[1]


# ------------------------------------------------------------------ the world itself


def even_costs(n_tasks: int, duration_s: float = 1.0) -> Costs:
    return Costs([duration_s] * n_tasks, [100] * n_tasks)


def test_a_calm_job_runs_every_task_once() -> None:
    dag = tree_reduction(32)
    report = simulate(dag, even_costs(dag.n_tasks), n_executors=2, policy=Policy(split=False))
    assert report.status is Status.DONE
    assert (report.n_tasks, report.n_task_runs) == (63, 63)
    assert report.n_commits == report.n_strands == report.n_runs
    assert 31.5 <= report.makespan_s < 40


def test_more_executors_end_earlier() -> None:
    dag = prediction(64)
    costs = even_costs(dag.n_tasks)
    spans = [simulate(dag, costs, n_executors=n).makespan_s for n in (1, 2, 4, 8)]
    assert spans == sorted(spans, reverse=True)
    assert spans[0] > 6 * spans[3]


def test_splitting_repairs_a_wrong_cut() -> None:
    dag = prediction(64)
    costs = even_costs(dag.n_tasks)
    setting = Setting(
        parts=cut_parts(dag, costs, 1, 0.1),
        reads=dag.reads(),
        costs=costs,
        platform=LOCAL_POOL,
        n_executors=8,
        policy=Policy(),
    )
    unsplit = replace(setting, policy=Policy(split=False))
    assert len(setting.parts) == 1
    assert run_world(unsplit, 0).makespan_s == pytest.approx(129, abs=0.1)
    assert run_world(setting, 0).makespan_s < 30


def test_delayed_output_saves_bytes() -> None:
    dag = tree_reduction(32)
    costs = Costs([0.01] * dag.n_tasks, [10_000_000] * dag.n_tasks)
    held, put = (
        simulate(dag, costs, n_executors=2, policy=Policy(absorb_bytes=limit)).put_bytes
        for limit in (1, 0)
    )
    assert held < put


def test_a_task_that_kills_its_executors_becomes_an_error() -> None:
    dag = prediction(16)
    costs = replace(even_costs(dag.n_tasks, 0.01), deadly=frozenset({5}))
    setting = Setting(
        parts=cut_parts(dag, costs, 2, 0.1),
        reads=dag.reads(),
        costs=costs,
        platform=LOCAL_POOL,
        n_executors=2,
        policy=Policy(split=False),
    )
    report = run_world(setting, 0)
    assert (report.status, report.counts["condemned"]) == (Status.DONE, 1)
    assert report.n_deaths == 5


def test_a_function_in_the_cloud_that_dies_is_retried() -> None:
    dag = prediction(4)
    costs = even_costs(dag.n_tasks)
    setting = Setting(
        parts=cut_parts(dag, costs, 2),
        reads=dag.reads(),
        costs=costs,
        platform=AWS_LAMBDA,
        n_executors=2,
        policy=Policy(),
        faults=Faults(until_s=5.0, run_death=0.5),
        silence_s=3.0,
    )
    report = run_world(setting, 3)
    assert report.status is Status.DONE
    assert report.n_deaths > 0
