"""Jobs on real Redis servers that are killed, stopped, full, replaced; and executors that die."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fault_tasks as tasks
import psutil
import pytest
from click.testing import CliRunner
from servers import needs

needs("redis", "msgpack")

from redis_servers import Server, ServerCluster, TlsServer, free_port, n_calls, wait_until  # noqa: E402
from test_faults import start_script, storm  # noqa: E402

import wukong  # noqa: E402
from wukong import cli, errors  # noqa: E402
from wukong.executor.messages import JobId  # noqa: E402
from wukong.storage import open_store  # noqa: E402
from wukong.storage.redis_link import slot_of  # noqa: E402

SOON_S = 20.0
KINDS = {"standalone": Server, "cluster": ServerCluster, "TLS and ACL": TlsServer}


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Server | ServerCluster]:
    with tempfile.TemporaryDirectory() as folder:
        server = KINDS[request.param](Path(folder))
        yield server
        server.stop()


@pytest.fixture
def cluster(server: Server | ServerCluster) -> Iterator[wukong.LocalCluster]:
    """Two processes; afterwards the pool works, and nothing is left in Redis."""
    with wukong.LocalCluster(2, store=server.url, timeout_s=60) as cluster:
        yield cluster
        assert cluster.get({"alive": (tasks.increment, 1)}, "alive", timeout_s=SOON_S) == 2
        assert cluster.jobs() == ()
        assert cluster._store.blobs.used_bytes() == 0
    assert n_keys(server) == 0


def n_keys(server: Server | ServerCluster) -> int:
    servers = server.servers if isinstance(server, ServerCluster) else [server]
    return sum(one.n_keys() for one in servers)


def counting_graph(folder: Path, n: int, duration_s: float) -> dict[object, object]:
    """n tasks, and a sum of them all."""
    graph: dict[object, object] = {
        ("x", i): (tasks.counted_sum, str(folder), i, duration_s, i) for i in range(n)
    }
    graph["sum"] = (tasks.add, *[("x", i) for i in range(n)])
    return graph


def total(n: int) -> int:
    return sum(range(1, n + 1))


# ---------------------------------------------------------------- executors that die


@pytest.mark.slow
def test_jobs_survive_random_kills(cluster: wukong.LocalCluster) -> None:
    found = storm(cluster, 2, 0.001)
    assert found["kills"] >= 2
    assert found["worst_s"] < SOON_S


@pytest.mark.slow
def test_a_task_that_kills_its_executors_is_named(cluster: wukong.LocalCluster) -> None:
    graph: dict[object, object] = {("x", i): (tasks.increment, i) for i in range(100)}
    graph["it"] = (tasks.go_wrong, "killed", ("x", 1))
    with pytest.raises(errors.TaskError, match=r"killed its executor 3 times.*SIGKILL"):
        cluster.get(graph, list(graph))


@pytest.mark.slow
@pytest.mark.parametrize("server", ["standalone", "cluster"], indirect=True)
def test_a_lost_blob_is_made_again(
    cluster: wukong.LocalCluster, server: Server | ServerCluster, tmp_path: Path
) -> None:
    folder, size = tmp_path / "runs", 300_000
    folder.mkdir()
    graph: dict[object, object] = {
        ("x", i): (tasks.ones_after, str(folder), i, size) for i in range(4)
    }
    graph["wait"] = (tasks.wait_for, str(folder / "go"))
    graph["it"] = (tasks.n_bytes_after, "wait", *[("x", i) for i in range(4)])
    blobs = cluster._store.blobs

    def damage() -> None:
        wait_until(lambda: len(tasks.runs(folder)) == 4 and blobs.used_bytes() >= 4 * size)
        servers = server.servers if isinstance(server, ServerCluster) else [server]
        names = [(one, name) for one in servers for name in one.keys("wukong:b:*")]
        one, name = names[0]
        one.ask("DEL", name)
        (folder / "go").touch()

    damager = threading.Thread(target=damage)
    damager.start()
    assert cluster.get(graph, "it") == 4 * size
    damager.join(SOON_S)
    runs = tasks.runs(folder)
    assert runs.pop("go") == 0
    assert 4 < sum(runs.values()) <= 8


CLIENT = """
    import sys, fault_tasks as tasks, wukong
    with wukong.LocalCluster(2, store=sys.argv[1]) as cluster:
        graph = {("x", i): (tasks.counted_sum, sys.argv[2], i, 0.05, i) for i in range(40)}
        graph["sum"] = (tasks.add, *graph)
        cluster.get(graph, "sum")
"""


def kill_client(url: str, folder: Path) -> JobId:
    """Kill a client in mid-job, and wait for its executors. Returns: the job."""
    with start_script(CLIENT, url, folder) as script:
        try:
            wait_until(lambda: len(tasks.runs(folder)) >= 4, 60.0)
            executors = psutil.Process(script.pid).children(recursive=True)
        finally:
            script.kill()
    assert psutil.wait_procs(executors, timeout=SOON_S)[1] == []
    store = open_store(url)
    (job,) = store.jobs.jobs()
    store.jobs.close()
    return job


@pytest.mark.slow
@pytest.mark.parametrize("server", ["standalone", "TLS and ACL"], indirect=True)
def test_a_job_whose_client_is_killed_can_be_attached_to(
    server: Server | ServerCluster, tmp_path: Path
) -> None:
    job = kill_client(server.url, tmp_path)
    assert wukong.attach(job, server.url, timeout_s=SOON_S) == total(40)
    assert set(tasks.runs(tmp_path).values()) == {1}
    with pytest.raises(errors.JobNotFound):
        wukong.attach(job, server.url)
    assert n_keys(server) == 0


@pytest.mark.slow
@pytest.mark.parametrize("server", ["cluster"], indirect=True)
def test_the_sweeper_offers_a_job_without_client_to_the_pools(
    server: Server | ServerCluster, tmp_path: Path
) -> None:
    job = kill_client(server.url, tmp_path)
    run = CliRunner().invoke(cli.main, ["sweep", server.url, "--once"])
    assert run.exit_code == 0
    assert f"job {job}: running" in run.output
    assert "no executors wait there" in run.output
    with wukong.LocalCluster(1, store=server.url) as cluster:

        def is_done() -> bool:
            run = CliRunner().invoke(cli.main, ["sweep", server.url, "--once"])
            time.sleep(0.1)
            return f"job {job}: done, 41 of 41 tasks done" in run.output

        wait_until(is_done)
        assert cluster.attach(job) == total(40)
        assert set(tasks.runs(tmp_path).values()) == {1}


# ---------------------------------------------------------------- servers that die


@contextlib.contextmanager
def running(url: str, folder: Path, n: int, duration_s: float) -> Iterator[wukong.LocalCluster]:
    """A job in another thread; on leaving, it has ended right."""
    graph = counting_graph(folder, n, duration_s)
    found: list[object] = []
    with wukong.LocalCluster(2, store=url, timeout_s=90) as cluster:
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        thread = threading.Thread(target=lambda: found.append(cluster.get(graph, "sum")))
        thread.start()
        wait_until(lambda: len(tasks.runs(folder)) >= n // 5)
        yield cluster
        thread.join(90)
        assert found == [total(n)]


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_loses_no_job(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), "appendonly yes") as server:
        with running(server.url, tmp_path, 100, 0.02):
            server.kill()
            time.sleep(0.5)
            server.start()
        # Nothing that was committed has run again: only what was on its way.
        assert sum(tasks.runs(tmp_path).values()) <= 110


@pytest.mark.slow
def test_a_server_that_hangs_for_ten_seconds_holds_a_job_up_and_no_more(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        with running(server.url, tmp_path, 100, 0.02):
            server.pause(10.0)
        assert sum(tasks.runs(tmp_path).values()) <= 110


@pytest.mark.slow
def test_a_master_that_dies_is_followed_by_its_replica(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerCluster(Path(folder), 1) as servers,
        running(f"{servers.url}?replicas=1", tmp_path, 200, 0.02) as cluster,
    ):
        (job,) = cluster._store.jobs.jobs()
        slot = slot_of(f"wukong:{{{job}}}:j".encode())
        servers.servers[min(slot // 5461, 2)].kill()


@pytest.mark.slow
def test_a_result_is_reported_when_the_replica_has_it() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder) / "master", port=free_port()) as master,
        Server(Path(folder) / "replica", f"replicaof 127.0.0.1 {master.port}") as replica,
    ):
        wait_until(lambda: "master_link_status:up" in replica.ask("INFO", "replication"))
        with wukong.LocalCluster(1, store=f"{master.url}?replicas=1", timeout_s=60) as cluster:
            assert cluster.get({"x": (tasks.increment, 1)}, "x") == 2
            assert n_calls(master, "wait") == 1
            replica.stop()
            wait_until(lambda: "connected_slaves:0" in master.ask("INFO", "replication"))
            assert cluster.get({"x": (tasks.increment, 1)}, "x") == 2


@pytest.mark.slow
def test_a_full_server_is_named_and_loses_nothing(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder), "maxmemory 12mb", "maxmemory-policy noeviction") as server,
    ):
        graph: dict[object, object] = {("x", i): (tasks.ones, 4_000_000, i) for i in range(6)}
        with wukong.LocalCluster(2, store=server.url, timeout_s=60) as cluster:
            with pytest.raises(errors.StoreFull, match="raise maxmemory") as caught:
                cluster.get(graph, list(graph))
            assert "OOM" in str(caught.value)
            small = {("x", i): (tasks.increment, i) for i in range(10)}
            assert cluster.get(small, list(small)) == tuple(range(1, 11))
            server.ask("CONFIG", "SET", "maxmemory", "200mb")
            assert sum(map(len, cluster.get(graph, list(graph)))) == 24_000_000
        assert n_keys(server) == 0


@pytest.mark.slow
def test_a_job_whose_server_is_not_there_ends_at_its_deadline() -> None:
    with (
        wukong.LocalCluster(1, store="redis://127.0.0.1:1", timeout_s=0.5) as cluster,
        pytest.raises(errors.StoreUnavailable, match="attach to job"),
    ):
        cluster.get({"x": (tasks.increment, 1)}, "x")
