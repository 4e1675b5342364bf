"""The paper's workloads, simulated: what the bounds say, and that nothing beats them."""

import math

import pytest

from bench.scale import Outcome, platforms, simulate_workload
from bench.scale_workloads import (
    SUITES,
    Workload,
    gemm,
    independent,
    svd_square,
    tree_reduction,
    tsqr,
)
from bench.service import Service, measure_service
from wukong.executor.messages import Status
from wukong.sim import SCHEMES
from wukong.storage import open_store

SERVICE = Service(50e-6, 5e-6)


def outcome(workload: Workload, scheme: str = "wukong", start: str = "warm") -> Outcome:
    return simulate_workload(workload, SCHEMES[scheme], start, platforms(SERVICE)[start])


def test_bounds_are_the_largest_of_path_work_and_bytes() -> None:
    tree = tree_reduction(1_024, 0.5)
    assert tree.critical_s() == pytest.approx(11 * 0.5)
    assert tree.bound_s(85e6) == pytest.approx(5.5)
    assert independent(10_000, 0.5, 250).bound_s(85e6) == pytest.approx(20.0)
    assert gemm(5_000).bound_s(1.0) == pytest.approx(gemm(5_000).compulsory_bytes / 4)


def test_compulsory_bytes_are_those_counted_by_hand() -> None:
    # 2 x 2 blocks of 50 MB on 4 executors: each reads one block of A and one of B that others
    # made, and A, B and C are written once.
    assert gemm(5_000).compulsory_bytes == 4 * 2 * 50e6 + 3 * 4 * 50e6
    # 16 chunks: 15 R of 128 x 128 travel.
    assert tsqr(2**19).compulsory_bytes == 2 * 15 * 128 * 128 * 8
    # 16 executors in a 4 x 4 square, four passes, a thin matrix of 15 columns each way.
    assert svd_square(16_000).compulsory_bytes == 4 * 2 * 4 * 16_000 * 15 * 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_is_faster_than_the_bound(scheme: str) -> None:
    for workload in (tree_reduction(64, 0.1), gemm(5_000), tsqr(2**19)):
        found = outcome(workload, scheme)
        assert found.report.status is Status.DONE
        assert found.ratio >= 1.0


def test_an_outcome_names_its_cost_and_the_server_s_load() -> None:
    found = outcome(tree_reduction(64, 0.1))
    assert 0.0 < found.utilisation < 1.0
    assert found.saturates_at > found.report.n_peak
    assert found.cost.total_usd > found.cost.gb_seconds_usd > 0.0
    assert math.isnan(outcome(tree_reduction(64, 0.0)).ratio)


def test_an_order_of_magnitude_against_numpywren_on_tsqr() -> None:
    ours, theirs = (outcome(tsqr(2**22), name) for name in ("wukong", "numpywren"))
    assert theirs.report.makespan_s > 8 * ours.report.makespan_s
    assert theirs.moved_bytes > 50 * ours.moved_bytes


def test_a_new_function_takes_longer_than_a_warm_one() -> None:
    workload = tree_reduction(64, 0.1)
    assert (
        outcome(workload, start="ramp").report.makespan_s
        > outcome(workload, start="warm").report.makespan_s
    )


def test_a_commit_s_service_time_is_measured_on_a_store() -> None:
    service = measure_service(open_store("memory://"), 5)
    assert 0.0 <= service.fixed_s < 0.01
    assert 0.0 < service.row_s < 0.001
    assert len(SUITES) == 10


@pytest.mark.full
def test_a_million_tasks_are_simulated_within_five_minutes() -> None:
    (make,) = SUITES["million"]
    found = outcome(make())
    assert found.report.n_task_runs == 2**20 - 1
