"""Other ways to run a graph over the simulated stores and executors."""

import dataclasses
from typing import Any

import pytest

from wukong.executor.messages import Status
from wukong.sim import AWS_LAMBDA, LOCAL_POOL, OURS, SCHEMES, Costs, Scheme, SimReport, simulate
from wukong.sim.dags import Dag, gemm, prediction, tree_reduction

CLOUD = dataclasses.replace(AWS_LAMBDA, service_s=20e-6, service_row_s=2e-6, invokes_per_s=500.0)
SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def run(dag: Dag, scheme: Scheme, size_bytes: int = 1000, **changes: Any) -> SimReport:
    costs = Costs([0.1] * dag.n_tasks, [size_bytes] * dag.n_tasks)
    platform = dataclasses.replace(CLOUD, **changes)
    return simulate(dag, costs, platform, n_executors=8, scheme=scheme)


@SCHEME
def test_every_scheme_runs_every_task_once(scheme: Scheme) -> None:
    for dag in (tree_reduction(16), gemm(2), prediction(5)):
        report = run(dag, scheme)
        assert report.status is Status.DONE
        assert report.n_task_runs == dag.n_tasks


@SCHEME
def test_a_scheme_also_runs_on_the_local_pool(scheme: Scheme) -> None:
    dag = tree_reduction(8)
    costs = Costs([0.01] * dag.n_tasks, [100] * dag.n_tasks)
    assert simulate(dag, costs, LOCAL_POOL, 2, scheme=scheme).status is Status.DONE


def test_without_strands_a_chain_is_one_piece_and_for_numpywren_each_task() -> None:
    dag = prediction(5)  # the model, and for each chunk two tasks, the second of which reads both
    assert run(dag, SCHEMES["without strands"]).n_strands == 11
    assert run(tree_reduction(4), SCHEMES["wukong2020"]).n_strands == 7
    assert run(tree_reduction(4), SCHEMES["numpywren"]).n_strands == 7


def test_numpywren_invokes_every_task_and_stores_every_value() -> None:
    report = run(tree_reduction(16), SCHEMES["numpywren"])
    assert report.n_invocations == 31
    assert report.put_bytes == 31 * 1000


def test_wukong2020_pays_a_set_for_each_output_and_an_increment_for_each_edge() -> None:
    ours = run(tree_reduction(16), SCHEMES["without strands"])
    theirs = run(tree_reduction(16), SCHEMES["wukong2020"])
    assert ours.n_commits == theirs.n_commits == 31
    # 31 sets (one a commit) beside the increments, of which the last commit, of the root, has none
    # and sends one message all the same; and a get of each of the 30 inputs that are inline.
    more = theirs.counts["store operations"] - ours.counts["store operations"]
    assert more == 31 + theirs.counts["gets"]


def test_stages_wait_for_their_last_task() -> None:
    dag = tree_reduction(4)
    costs = Costs([5.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [100] * 7)
    staged = simulate(dag, costs, CLOUD, 8, scheme=SCHEMES["pywren"])
    free = simulate(dag, costs, CLOUD, 8, scheme=SCHEMES["strawman"])
    assert staged.makespan_s > free.makespan_s > 5.0


def test_operations_on_one_job_follow_each_other() -> None:
    dag = tree_reduction(64)
    quick = run(dag, OURS)
    slow = run(dag, OURS, service_s=0.05)
    assert slow.makespan_s > quick.makespan_s
    assert slow.store_busy_s == pytest.approx(0.05 * slow.counts["store operations"], rel=0.1)
    assert slow.store_busy_s <= slow.makespan_s + 0.1


def test_a_cloud_bills_what_its_invocations_take() -> None:
    report = run(tree_reduction(16), OURS)
    assert report.billed_s >= 31 * 0.1
    assert 1 <= report.n_peak <= 8
