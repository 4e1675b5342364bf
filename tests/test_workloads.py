"""The six workloads give right results, and their checks notice wrong ones."""

import dask
import numpy as np
import pytest

from wukong.workloads import WORKLOADS, Check, Workload, prepare


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS, ids=[workload.name for workload in WORKLOADS])
def test_every_check_accepts_the_result_and_rejects_a_wrong_one(workload: Workload) -> None:
    problem = workload.build(False)
    prepared = prepare(problem)
    values = prepared.finish(dask.get(prepared.graph, prepared.keys))
    assert all(check.passed for check in problem.check(values))
    wrong = [np.asarray(value) * 1.5 + 1 for value in values]
    assert not all(check.passed for check in problem.check(wrong))


def test_the_six_are_the_papers() -> None:
    assert [workload.name for workload in WORKLOADS] == [
        "TR",
        "GEMM",
        "SVD1",
        "SVD2",
        "TSQR",
        "SVC",
    ]


def test_an_error_that_is_no_number_fails_a_check() -> None:
    assert not Check("anything", float("nan"), 1.0).passed
