"""Jobs on real Redis servers that are killed, stopped, full, replaced, or give slots away.

Executors and clients that die are in `test_faults`, for all stores.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import fault_tasks as tasks
import pytest
from servers import needs

needs("redis", "msgpack")
pytest.register_assert_rewrite("storage_contract")

from redis_servers import (  # noqa: E402
    Server,
    ServerCluster,
    ValkeyServer,
    free_port,
    n_calls,
    wait_until,
)
from storage_contract import T0, commit, create  # noqa: E402

import wukong  # noqa: E402
from wukong import errors  # noqa: E402
from wukong.executor.messages import Receipt  # noqa: E402
from wukong.storage import open_store  # noqa: E402
from wukong.storage.redis_link import slot_of  # noqa: E402


def counting_graph(folder: Path, n: int, duration_s: float) -> dict[object, object]:
    """n tasks, and a sum of them all."""
    graph: dict[object, object] = {
        ("x", i): (tasks.counted_sum, str(folder), i, duration_s, i) for i in range(n)
    }
    graph["sum"] = (tasks.add, *[("x", i) for i in range(n)])
    return graph


def total(n: int) -> int:
    return sum(range(1, n + 1))


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
def test_what_is_confirmed_is_on_disk() -> None:
    """On Valkey, whatever Redis is installed: WAITAOF is not older than Redis 7.2."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ValkeyServer(Path(folder), "appendonly yes", "appendfsync everysec") as server,
    ):
        with wukong.LocalCluster(1, store=f"{server.url}?on_disk=yes", timeout_s=60) as cluster:
            assert cluster.get({"x": (tasks.increment, 1)}, "x") == 2
        assert n_calls(server, "waitaof") == 2  # at the job's start, whether it can, and its end
        store = open_store(f"{server.url}?on_disk=yes")
        store.jobs.create(create())
        assert isinstance(store.jobs.commit(commit(T0)), Receipt)
        store.jobs.confirm("job")
        server.kill()
        # As a machine that loses its power: what was not on disk is gone.
        server.start()
        view = store.jobs.view("job")
        assert view is not None
        assert view.n_commits == 1
        store.jobs.close()


@pytest.mark.slow
def test_a_server_that_keeps_nothing_on_disk_says_so() -> None:
    with tempfile.TemporaryDirectory() as folder, ValkeyServer(Path(folder)) as server:
        store = open_store(f"{server.url}?on_disk=yes")
        with pytest.raises(errors.StoreError, match=r"needs Valkey.*appendonly"):
            store.jobs.create(create())
        store.jobs.close()
        assert server.n_keys() == 0


@pytest.mark.full  # on a busy machine the job may be over before its slot moves
def test_slots_that_move_to_another_node_in_mid_job_are_followed(tmp_path: Path) -> None:
    n = 60
    graph: dict[object, object] = {
        ("x", i): (tasks.ones_after, str(tmp_path), i, 100_000) for i in range(n)
    }
    graph |= {("y", i): (tasks.sleep_and_pass, 0.05, ("x", i)) for i in range(n)}
    graph["sum"] = (tasks.n_bytes, *[("y", i) for i in range(n)])
    with tempfile.TemporaryDirectory() as folder, ServerCluster(Path(folder)) as servers:
        found: list[object] = []
        with (
            dask.config.set({"wukong.executor.strands": False}),
            wukong.LocalCluster(2, store=servers.url, timeout_s=90) as cluster,
        ):
            cluster.get({"warm": (tasks.increment, 1)}, "warm")
            cluster.jobs()
            thread = threading.Thread(target=lambda: found.append(cluster.get(graph, "sum")))
            thread.start()
            wait_until(lambda: len(tasks.runs(tmp_path)) >= 10)
            (job,) = cluster._store.jobs.jobs()
            blobs = [key for server in servers.servers for key in server.keys("wukong:b:*")]
            for key in (f"wukong:{{{job}}}:j", *blobs[:5]):
                servers.move_slot(slot_of(key.encode()), pause_s=0.2)
            thread.join(90)
            assert found == [n * 100_000]
            assert cluster.jobs() == ()
        redirections = servers.n_errors()
        assert redirections["MOVED"] >= 1
        assert redirections["ASK"] + redirections["TRYAGAIN"] >= 1
        assert sum(server.n_keys() for server in servers.servers) == 0
    assert set(tasks.runs(tmp_path).values()) == {1}


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
        assert server.n_keys() == 0


@pytest.mark.slow
def test_a_job_whose_server_is_not_there_ends_at_its_deadline() -> None:
    with (
        wukong.LocalCluster(1, store="redis://127.0.0.1:1", timeout_s=0.5) as cluster,
        pytest.raises(errors.StoreUnavailable, match="attach to job"),
    ):
        cluster.get({"x": (tasks.increment, 1)}, "x")
