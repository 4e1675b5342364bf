"""The server for Dask clients, beside what `tests/dask` holds of clients themselves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.config
import pytest

import wukong
from wukong.errors import WukongError

distributed = pytest.importorskip("distributed")
FIRST_BEAT_S = pytest.importorskip("wukong.scheduler.dask_server").FIRST_BEAT_S

LONG_S = 30.0
"""Far more than anything here takes."""


def inc(x: int) -> int:
    return x + 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[wukong.LocalCluster]:
    with wukong.LocalCluster(2, processes=False) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: wukong.LocalCluster) -> Iterator[Any]:
    with distributed.Client(cluster) as client:
        yield client


def n_keys(client: Any) -> int:
    found = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    assert isinstance(found, int)
    return found


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_cluster_that_only_computes_starts_no_server() -> None:
    with wukong.LocalCluster(1, processes=False) as cluster:
        assert cluster.get({"x": (inc, 1)}, "x") == 2
        assert not cluster.is_serving
        assert cluster.dashboard_link == ""


@pytest.mark.slow
def test_importing_wukong_imports_no_distributed() -> None:
    code = "import sys, wukong; sys.exit('distributed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG_S)


def test_a_closed_cluster_serves_nobody() -> None:
    cluster = wukong.LocalCluster(1, processes=False)
    cluster.serve()
    cluster.close()
    cluster.close()
    assert not cluster.is_serving
    with pytest.raises(WukongError, match="closed"):
        wukong.LocalCluster.serve(cluster)


def test_shuffles_need_no_workers_while_there_is_a_server() -> None:
    before = dask.config.get("dataframe.shuffle.method", None)
    with wukong.LocalCluster(1, processes=False) as cluster:
        cluster.serve()
        assert dask.config.get("dataframe.shuffle.method") == "tasks"
    assert dask.config.get("dataframe.shuffle.method", None) == before


def test_a_shuffle_from_peer_to_peer_is_warned_of_once(client: Any) -> None:
    array = pytest.importorskip("dask.array")
    x = array.arange(16, chunks=4).reshape(4, 4).rechunk((4, 1), method="p2p")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            assert client.compute(x.sum()).result() == 120
        wait_until(lambda: len(warned) > 0)
    assert ["do not talk to each other" in str(one.message) for one in warned] == [True]


def test_each_shown_worker_can_be_connected_to(client: Any) -> None:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    assert len(workers) == 2
    future = client.submit(inc, 1)
    assert client.gather(future, direct=True) == 2
    [address] = client.who_has(future)[future.key]
    assert address in workers


def test_a_page_shows_the_counters(client: Any, cluster: wukong.LocalCluster) -> None:
    assert client.gather(client.map(inc, range(3))) == [1, 2, 3]
    assert client.dashboard_link == cluster.dashboard_link
    with urllib.request.urlopen(client.dashboard_link, timeout=LONG_S) as page:
        assert "Tasks run" in page.read().decode()


def test_a_report_names_functions_and_code(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with distributed.performance_report(filename=str(path)):
        client.gather(client.map(inc, range(100, 105)))
    text = path.read_text()
    assert "<svg" in text
    assert "inc" in text
    assert "performance_report(filename" in text


def test_actors_are_refused(client: Any) -> None:
    with pytest.raises(NotImplementedError, match="no actors"):
        client.submit(dict, actor=True).result()


def test_a_client_of_another_version_is_told_what_to_install(
    cluster: wukong.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import versions

    packages = {"packages": {"distributed": "2020.1.0"}}
    monkeypatch.setattr(versions, "get_versions", lambda packages=packages: packages)
    with pytest.raises(ImportError, match="pip install 'distributed>="):
        distributed.Client(cluster)


def test_a_coroutine_may_close_its_cluster() -> None:
    async def run() -> int:
        async with (
            wukong.LocalCluster(1, processes=False) as cluster,
            distributed.Client(cluster, asynchronous=True) as client,
        ):
            result = await client.submit(inc, 1)
            assert isinstance(result, int)
            return result

    import asyncio

    assert asyncio.run(run()) == 2


def test_a_client_shuts_its_cluster_down() -> None:
    cluster = wukong.LocalCluster(1, processes=False)
    client = distributed.Client(cluster)
    assert client.submit(inc, 1).result() == 2
    client.shutdown()
    wait_until(lambda: not cluster.is_serving)
    cluster.close()


VANISHING = """
    import os, sys, distributed
    client = distributed.Client(sys.argv[1])
    futures = client.map(abs, range(50), key="vanished")
    distributed.wait(futures)
    print("ready", flush=True)
    input()
    try:
        futures[0].result(timeout=20)
    except distributed.CancelledError as error:
        print("ended:", error.reason, flush=True)
    print("again:", client.submit(abs, -7).result(timeout=20), flush=True)
    client.close()
"""


@contextmanager
def vanishing() -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """A client, and another in a process of its own that holds 50 futures of its cluster."""
    with (
        wukong.LocalCluster(1, processes=False) as cluster,
        distributed.Client(cluster.serve("tcp://127.0.0.1:0")) as client,
    ):
        mine = client.submit(inc, 1)
        assert mine.result() == 2
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(VANISHING), cluster.scheduler_address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            assert n_keys(client) == 51
            yield client, child
            assert mine.result() == 2
        finally:
            child.kill()
            child.communicate()


@pytest.mark.slow
def test_futures_of_a_killed_client_are_released() -> None:
    with vanishing() as (client, child):
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: n_keys(client) == 1)


@pytest.mark.slow
def test_futures_of_a_silent_client_are_released_and_it_is_told_so() -> None:
    with dask.config.set({"wukong.dask.client-silence-s": 3}), vanishing() as (client, child):
        # Its first heartbeat is late; from then on a client tells as often as it is asked to.
        time.sleep(FIRST_BEAT_S)
        assert n_keys(client) == 51, "a client that lives keeps its futures"
        os.kill(child.pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        wait_until(lambda: n_keys(client) == 1)
        assert time.monotonic() - stopped_at > 2
        os.kill(child.pid, signal.SIGCONT)
        said, _ = child.communicate("\n", timeout=LONG_S)
        assert said.splitlines() == ["ended: scheduler-connection-lost", "again: 7"]


@pytest.mark.slow
def test_the_command_serves_until_a_client_shuts_it_down() -> None:
    command = "from wukong.cli import main; main()"
    arguments = ["scheduler", "--port", "0", "--n-workers", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        found = re.search(r"tcp://\S+", server.stdout.readline())
        assert found
        with distributed.Client(found.group()) as client:
            assert client.submit(abs, -1).result(timeout=LONG_S) == 1
            client.shutdown()
        assert server.wait(LONG_S) == 0


@pytest.mark.slow
def test_wukong_s_client_computes_directly_and_serves_futures() -> None:
    with (
        wukong.LocalCluster(1, processes=False) as cluster,
        wukong.Client(cluster) as client,
    ):
        graph = {"x": (inc, 1), "y": (inc, "x")}
        assert client.get(graph, ["x", ["y"]]) == [2, [3]]
        assert n_keys(client) == 0
        future = client.submit(inc, 1)
        assert dask.delayed(inc)(future).compute() == 3
        assert isinstance(client, distributed.Client)
