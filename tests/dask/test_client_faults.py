"""Executors and clients that are killed while a client's work runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, as_completed, wait

from tests.dask.client_tasks import add, inc, pid_after, slow_inc
from tests.dask.conftest import make_cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def doomed(backend: str) -> Iterator[Any]:
    """A client of a cluster of its own, whose workers may be killed."""
    if backend.endswith("threads"):
        pytest.skip("threads die with the test")
    with make_cluster(backend) as cluster, Client(cluster) as client:
        yield client


def kill_one(pids: set[int]) -> int:
    pid = min(pids - {os.getpid()})
    os.kill(pid, signal.SIGKILL)
    return pid


def test_killed_executors_lose_no_task_of_a_map(doomed: Client) -> None:
    first = doomed.map(pid_after, [0.005] * 20, pure=False)
    pids = set(doomed.gather(first))
    futures = doomed.map(slow_inc, range(200), delay_s=0.005)
    time.sleep(0.1)
    kill_one(pids)
    assert doomed.gather(futures) == list(range(1, 201))


def test_executors_killed_again_and_again(doomed: Client) -> None:
    futures = doomed.map(slow_inc, range(300), delay_s=0.004)
    for round_ in range(3):
        pids = set(doomed.gather(doomed.map(pid_after, [0.002] * 8, pure=False, priority=10)))
        kill_one(pids)
        time.sleep(0.05 * round_)
    assert doomed.gather(futures) == list(range(1, 301))


def test_results_are_read_after_their_executor_was_killed(doomed: Client) -> None:
    futures = doomed.map(inc, range(50))
    wait(futures)
    kill_one(set(doomed.gather(doomed.map(pid_after, [0.002] * 8, pure=False))))
    assert doomed.gather(futures) == list(range(1, 51))
    assert doomed.submit(sum, futures).result() == sum(range(1, 51))


def test_a_chain_survives_a_kill(doomed: Client) -> None:
    pids = set(doomed.gather(doomed.map(pid_after, [0.002] * 8, pure=False)))
    future = doomed.submit(inc, 0)
    for n in range(40):
        future = doomed.submit(slow_inc, future, 0.005)
        if n == 20:
            kill_one(pids)
    assert future.result() == 41


def test_as_completed_gives_all_after_a_kill(doomed: Client) -> None:
    pids = set(doomed.gather(doomed.map(pid_after, [0.002] * 8, pure=False)))
    futures = doomed.map(slow_inc, range(60), delay_s=0.01)
    seen = []
    for future in as_completed(futures):
        seen.append(future.result())
        if len(seen) == 10:
            kill_one(pids)
    assert sorted(seen) == list(range(1, 61))


def test_large_results_survive_their_executor(doomed: Client) -> None:
    futures = doomed.map(bytes, [2_000_000] * 3 + [1_000_000] * 3, pure=False)
    wait(futures)
    kill_one(set(doomed.gather(doomed.map(pid_after, [0.002] * 8, pure=False))))
    assert [len(got) for got in doomed.gather(futures)] == [2_000_000] * 3 + [1_000_000] * 3


def test_a_task_that_kills_its_executor_ends_in_an_error(doomed: Client) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    future = doomed.submit(die)
    other = doomed.submit(inc, 1)
    error = future.exception(timeout=60)
    assert error is not None
    assert other.result(timeout=60) == 2
    assert doomed.submit(add, 1, 2).result(timeout=60) == 3


def test_a_task_that_exits_ends_in_an_error(doomed: Client, tmp_path: Path) -> None:
    future = doomed.submit(os._exit, 3)
    assert future.exception(timeout=60) is not None
    assert doomed.submit(inc, 1).result(timeout=60) == 2
