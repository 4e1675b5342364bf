"""The simulator against this machine: predictions of runs beside what they take."""

import math

import pytest

from bench import calibrate
from bench.calibrate import Prediction

FACTOR = 3.0
"""Generous: tests share their machine. `bench calibrate` says it exactly."""


def prediction(predicted_s: float, measured_s: float) -> Prediction:
    return Prediction("x", 1, 1, predicted_s, (measured_s,), 1.0)


def test_errors_in_both_directions_count_alike() -> None:
    found = calibrate.mean_error([prediction(2.0, 1.0), prediction(1.0, 2.0), prediction(1, 1)])
    assert found == pytest.approx(2 ** (2 / 3) - 1)


@pytest.mark.full
def test_the_simulator_predicts_what_workloads_take_here() -> None:
    pytest.importorskip("dask_ml")
    machine = calibrate.measure_platform(lambda _: None)
    with calibrate.open_clusters() as clusters:
        found = [
            calibrate.predict(case, clusters, machine, 3, lambda _: None)
            for case in calibrate.cases(("TSQR", "SVC"), full=False)
        ]
    assert all(abs(math.log(each.ratio)) < math.log(FACTOR) for each in found), found
