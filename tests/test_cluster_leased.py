"""Graphs on leased executors: the same results, whoever dies."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import psutil
import pytest

from tests.lambda_world import World, world
from wukong import LeasedCluster
from wukong.errors import LeaseRefused, WukongError
from wukong.rdma import AgentProcess

__all__ = ["world"]
pytestmark = pytest.mark.slow


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path / "agents", 2, ["--grace-s", "0.5"]) as running:
        yield running


def slow_sum(n_tasks: int, delay_s: float) -> object:
    @dask.delayed  # type: ignore[untyped-decorator]
    def wait(number: int) -> int:
        time.sleep(delay_s)
        return number

    return dask.delayed(sum)([wait(number) for number in range(n_tasks)])


def test_graphs_run_on_leased_executors(agent: AgentProcess) -> None:
    with LeasedCluster(2, agents=agent.directory, fallback=None) as cluster:
        x = da.arange(200_000, chunks=20_000)
        assert (x * 2).sum().compute(scheduler=cluster.get) == 199_999 * 200_000
        matrix = da.ones((300, 300), chunks=100)
        product = (matrix @ matrix).compute(scheduler=cluster.get)
        np.testing.assert_array_equal(product, np.full((300, 300), 300.0))

        def where() -> int:
            return os.getppid()

        tasks = [dask.delayed(where)() for _ in range(8)]
        parents = set(dask.compute(*tasks, scheduler=cluster.get))
        assert parents == {agent.process.pid}
        assert not cluster.has_fallen_back


def test_a_task_that_kills_its_executor_once_is_run_again(
    agent: AgentProcess, tmp_path: Path
) -> None:
    def die_once(path: str) -> int:
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return 7

    with LeasedCluster(2, agents=agent.directory, fallback=None) as cluster:
        task = dask.delayed(die_once)(str(tmp_path / "died"))
        assert task.compute(scheduler=cluster.get) == 7


def test_a_job_goes_on_when_its_agent_is_killed(agent: AgentProcess) -> None:
    with LeasedCluster(2, agents=agent.directory) as cluster:
        children = psutil.Process(agent.process.pid).children()
        threading.Timer(0.5, agent.process.kill).start()
        total = slow_sum(60, 0.05).compute(scheduler=cluster.get)  # type: ignore[attr-defined]
        assert total == sum(range(60))
        assert cluster.has_fallen_back
    _, alive = psutil.wait_procs(children, 10)
    assert not alive


def test_a_job_goes_on_when_its_lease_is_revoked(agent: AgentProcess) -> None:
    with LeasedCluster(2, agents=agent.directory) as cluster:
        threading.Timer(0.5, agent.process.terminate).start()
        total = slow_sum(60, 0.05).compute(scheduler=cluster.get)  # type: ignore[attr-defined]
        assert total == sum(range(60))
        assert cluster.has_fallen_back


def test_a_refused_lease_falls_back_or_says_so(agent: AgentProcess) -> None:
    with LeasedCluster(3, agents=agent.directory) as cluster:
        assert cluster.has_fallen_back
        assert da.ones(10, chunks=5).sum().compute(scheduler=cluster.get) == 10
    with pytest.raises(LeaseRefused, match="2 of 2 cores"):
        LeasedCluster(3, agents=agent.directory, fallback=None)
    with pytest.raises(ValueError, match="fallback"):
        LeasedCluster(1, agents=agent.directory, fallback="cloud")


def test_a_job_goes_on_in_functions_when_its_agent_is_killed(
    agent: AgentProcess, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.use_redis()
    service = world.service()
    monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", service.url)
    given = {"agents": agent.directory, "store": world.store}
    with pytest.raises(ValueError, match="leases reach"):
        LeasedCluster(2, agents=agent.directory, fallback="lambda:wukong")
    with LeasedCluster(2, fallback="lambda:wukong", timeout_s=60, **given) as cluster:
        threading.Timer(0.5, agent.process.kill).start()
        total = slow_sum(60, 0.05).compute(scheduler=cluster.get)  # type: ignore[attr-defined]
        assert total == sum(range(60))
        assert cluster.has_fallen_back


def test_a_job_without_executors_and_fallback_ends_in_an_error(agent: AgentProcess) -> None:
    with LeasedCluster(1, agents=agent.directory, fallback=None, timeout_s=20) as cluster:
        threading.Timer(0.3, agent.process.kill).start()
        with pytest.raises(WukongError):
            slow_sum(200, 0.1).compute(scheduler=cluster.get)  # type: ignore[attr-defined]
