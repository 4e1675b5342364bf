"""Clients: which one is the default, several of them, what remains when one ends or vanishes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import pytest
from distributed import Client, Lock, default_client, get_task_metadata, wait, worker_client
from distributed.client import ClosedClientError
from distributed.diagnostics import MemorySampler

from tests.dask.client_tasks import add, gate, inc, leave_mark, n_marks, slow_inc
from tests.dask.conftest import N_WORKERS


def test_a_client_is_the_default_until_it_closes(cluster: Any) -> None:
    with Client(cluster) as client:
        assert default_client() is client
        assert Client.current() is client
    with pytest.raises(ValueError, match=r"[Nn]o client"):
        default_client()


def test_a_client_may_not_be_the_default(cluster: Any) -> None:
    with Client(cluster, set_as_default=False), pytest.raises(ValueError, match=r"[Nn]o client"):
        default_client()


def test_the_last_client_is_the_default(client: Client, cluster: Any) -> None:
    with Client(cluster) as second:
        assert default_client() is second
    assert default_client() is client


def test_a_client_is_current_in_a_block(client: Client, other: Client) -> None:
    assert Client.current() is client
    with other.as_current():
        assert Client.current() is other
    assert Client.current() is client


def test_a_client_takes_an_address(cluster: Any) -> None:
    with Client(cluster.scheduler_address) as client:
        assert client.submit(inc, 1).result() == 2


def test_a_client_takes_the_address_from_the_configuration(cluster: Any) -> None:
    with dask.config.set({"scheduler-address": cluster.scheduler_address}), Client() as client:
        assert client.scheduler.address == cluster.scheduler_address
        assert client.submit(inc, 1).result() == 2


def test_a_client_makes_itself_from_a_cluster(cluster: Any) -> None:
    with cluster.get_client() as client:
        assert client.submit(inc, 1).result() == 2


def test_a_client_without_a_server_times_out() -> None:
    with pytest.raises(OSError, match=r"Timed out|connect"):
        Client("tcp://127.0.0.1:9", timeout=0.3)


def test_a_client_refuses_what_is_no_cluster() -> None:
    with pytest.raises(TypeError):
        Client(123.456)


def test_a_client_has_an_id_and_a_name(cluster: Any) -> None:
    with Client(cluster, name="my-name", set_as_default=False) as client:
        assert "my-name" in client.id
    with (
        Client(cluster, set_as_default=False) as first,
        Client(cluster, set_as_default=False) as second,
    ):
        assert first.id != second.id


def test_a_client_knows_its_status(cluster: Any) -> None:
    client = Client(cluster)
    assert client.status == "running"
    client.close()
    assert client.status == "closed"
    client.close()


def test_a_closed_client_computes_nothing(cluster: Any) -> None:
    client = Client(cluster)
    future = client.submit(inc, 1)
    assert future.result() == 2
    client.close()
    assert future.status == "cancelled"
    with pytest.raises((ClosedClientError, RuntimeError, CancelledError)):
        client.submit(inc, 10).result(timeout=5)


def test_work_of_a_closed_client_is_dropped(
    client: Client, cluster: Any, tmp_path: Path, wait_until: Any
) -> None:
    held = [client.submit(gate, str(tmp_path / "go"), n) for n in range(4)]
    with Client(cluster, set_as_default=False) as short:
        name = f"dropped-{uuid.uuid4().hex}"
        futures = short.map(leave_mark, [str(tmp_path)] * 20, [name] * 20, pure=False)
        wait_until(lambda: (tmp_path / "go.runs").exists())
        assert len(futures) == 20
    (tmp_path / "go").touch()
    wait(held)
    assert client.submit(inc, 1).result() == 2
    assert n_marks(tmp_path, name) <= 4


def test_results_of_a_closed_client_are_dropped(
    client: Client, cluster: Any, wait_until: Any
) -> None:
    with Client(cluster, set_as_default=False) as short:
        futures = short.map(inc, range(5000, 5005))
        wait_in(short, futures)
        keys = [future.key for future in futures]
    wait_until(lambda: not set(keys) & set(client.nbytes(summary=False)))


def wait_in(client: Client, futures: list[Any]) -> None:
    """`wait`, for a client that is not the default one."""
    with client.as_current():
        wait(futures)


def test_two_clients_share_a_result(client: Client, other: Client, tmp_path: Path) -> None:
    x = client.submit(leave_mark, str(tmp_path), "shared")
    wait(x)
    y = other.submit(leave_mark, str(tmp_path), "shared")
    assert x.key == y.key
    assert x.result() == y.result() == "shared"
    assert n_marks(tmp_path, "shared") == 1


def test_a_result_lives_for_the_other_client(client: Client, other: Client) -> None:
    x = client.submit(inc, 1)
    wait(x)
    y = other.submit(inc, 1)
    wait_in(other, [y])
    x.release()
    del x
    time.sleep(0.02)
    assert y.result() == 2


def test_a_future_of_one_client_is_an_input_of_another(client: Client, other: Client) -> None:
    x = client.submit(inc, 1)
    assert other.submit(add, x, 10).result() == 12


def test_a_pending_future_of_another_client_is_waited_for(
    client: Client, other: Client, tmp_path: Path, wait_until: Any
) -> None:
    x = client.submit(gate, str(tmp_path / "go"), 5)
    wait_until(lambda: (tmp_path / "go.runs").exists())
    y = other.submit(inc, x)
    (tmp_path / "go").touch()
    assert y.result() == 6


def test_clients_in_threads_of_one_process(cluster: Any) -> None:
    def work(n: int) -> int:
        with Client(cluster, set_as_default=False) as client:
            return client.submit(sum, client.map(inc, range(n))).result()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, [3, 4, 5, 6])) == [6, 10, 15, 21]


def test_one_client_in_several_threads(client: Client) -> None:
    def work(n: int) -> int:
        return client.submit(sum, client.map(inc, range(n))).result()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(3, 11))) == [n * (n + 1) // 2 for n in range(3, 11)]


def test_a_client_counts_its_futures(client: Client, wait_until: Any) -> None:
    x, y = client.submit(inc, 1), client.submit(inc, 2)
    assert {x.key, y.key} <= set(client.futures)
    key = x.key
    del x
    wait_until(lambda: key not in client.futures)
    assert y.key in client.futures


def test_a_client_shows_itself(client: Client) -> None:
    text = repr(client)
    assert client.scheduler.address in text
    assert "processes=2" in text
    html = client._repr_html_()
    assert "Client" in html


def test_a_cluster_shows_itself(cluster: Any, client: Client) -> None:
    assert "LocalCluster" in repr(cluster)
    assert "<" in cluster._repr_html_()


def test_a_client_waits_for_workers(client: Client) -> None:
    client.wait_for_workers(2, timeout=10)
    client.wait_for_workers(n_workers=1, timeout="10s")


def test_a_client_waits_in_vain_for_too_many_workers(client: Client) -> None:
    with pytest.raises(TimeoutError):
        client.wait_for_workers(200, timeout=0.1)


def test_restart_forgets_all_futures(backend: str) -> None:
    from tests.dask.conftest import make_cluster

    with make_cluster(backend) as cluster, Client(cluster) as client:
        future = client.submit(inc, 1)
        assert future.result() == 2
        client.restart()
        assert future.status == "cancelled"
        assert client.submit(inc, 10).result() == 11


def test_shutdown_ends_the_cluster(backend: str) -> None:
    from tests.dask.conftest import make_cluster

    cluster = make_cluster(backend)
    client = Client(cluster)
    assert client.submit(inc, 1).result() == 2
    client.shutdown()
    assert client.status == "closed"
    cluster.close()


def test_a_client_outlives_its_cluster_in_peace(backend: str) -> None:
    from tests.dask.conftest import make_cluster

    cluster = make_cluster(backend)
    client = Client(cluster, timeout=2)
    assert client.submit(inc, 1).result() == 2
    cluster.close()
    client.close(timeout=2)


PROGRAM = """
import sys, time
from distributed import Client
from tests.dask.client_tasks import gate, inc
client = Client(sys.argv[1])
kept = client.map(inc, range(100000, 100010))
client.gather(kept)
shared = client.submit(inc, 777)
assert shared.result() == 778
print("ready", flush=True)
time.sleep(60)
"""


def test_a_client_that_is_killed_leaves_nothing(
    client: Client, cluster: Any, backend: str, wait_until: Any
) -> None:
    if not cluster.scheduler_address.startswith("tcp"):
        pytest.skip("this cluster is reached from its own process only")
    mine = client.submit(inc, 777)
    wait(mine)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, cluster.scheduler_address],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        n_before = len(client.nbytes(summary=False))
        assert n_before >= 11
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
    wait_until(lambda: set(client.nbytes(summary=False)) == {mine.key}, timeout_s=30)
    assert mine.result() == 778


async def test_an_asynchronous_client_is_a_context(cluster: Any, loop: Any) -> None:
    async with Client(cluster.scheduler_address, asynchronous=True) as client:
        assert await client.submit(inc, 1) == 2
        assert client.asynchronous
    assert client.status == "closed"


async def test_many_futures_are_awaited_at_once(c: Any) -> None:
    assert await asyncio.gather(*c.map(inc, range(50))) == list(range(1, 51))


async def test_two_asynchronous_clients(c: Any, cluster: Any) -> None:
    async with Client(cluster.scheduler_address, asynchronous=True) as second:
        x = c.submit(inc, 1)
        await wait([x])
        assert await second.submit(add, x, 1) == 3


async def test_a_loop_stays_free_while_tasks_run(c: Any, tmp_path: Path) -> None:
    future = c.submit(gate, str(tmp_path / "go"), 1)
    ticks = 0
    for _ in range(10):
        await asyncio.sleep(0.002)
        ticks += 1
    assert ticks == 10
    assert not future.done()
    (tmp_path / "go").touch()
    assert await future == 1


async def test_an_awaited_future_can_time_out(c: Any, tmp_path: Path) -> None:
    future = c.submit(gate, str(tmp_path / "go"), 1)
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        await asyncio.wait_for(asyncio.shield(future.result()), 0.05)
    (tmp_path / "go").touch()
    assert await future == 1


async def test_asynchronous_errors(c: Any) -> None:
    future = c.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await future
    assert isinstance(await future.exception(), ZeroDivisionError)
    assert await future.traceback() is not None
    assert future.status == "error"


async def test_asynchronous_callbacks(c: Any) -> None:
    seen: list[str] = []
    done = threading.Event()
    future = c.submit(inc, 1)
    future.add_done_callback(lambda f: (seen.append(f.status), done.set()))
    await future
    await asyncio.get_running_loop().run_in_executor(None, done.wait, 10)
    assert seen == ["finished"]


def test_a_lock_of_a_client_that_closes_can_be_taken_in_time(cluster: Any, client: Client) -> None:
    name = f"lock-{uuid.uuid4().hex}"
    with Client(cluster, set_as_default=False) as short, short.as_current():
        lock = Lock(name)
        assert lock.acquire()
        lock.release()
    assert Lock(name).acquire(timeout=10)


def test_an_age_of_batches_changes_nothing(client: Client) -> None:
    for n in range(10):
        assert sum(client.gather(client.map(inc, range(n * 100, n * 100 + 100)))) == sum(
            range(n * 100 + 1, n * 100 + 101)
        )


def test_arrays_of_two_clients_at_once(client: Client, other: Client) -> None:
    def total(which: Client, n: int) -> int:
        x = da.arange(n, chunks=max(1, n // 10))
        return int(which.compute(x.sum()).result())

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(total, client, 1000)
        second = pool.submit(total, other, 2000)
        assert (first.result(), second.result()) == (499500, 1999000)


def test_slow_tasks_of_one_client_do_not_stop_another(
    client: Client, other: Client, tmp_path: Path
) -> None:
    slow = client.submit(gate, str(tmp_path / "go"))
    assert other.gather(other.map(slow_inc, range(4), delay_s=0.001)) == [1, 2, 3, 4]
    (tmp_path / "go").touch()
    wait(slow)


def test_the_state_of_the_cluster_is_written(client: Client, tmp_path: Path) -> None:
    import yaml

    client.submit(inc, 1).result()
    client.dump_cluster_state(str(tmp_path / "state"), format="yaml")
    state = yaml.unsafe_load((tmp_path / "state.yaml").read_text())
    assert {"scheduler", "workers", "versions"} <= set(state)
    client.dump_cluster_state(f"file://{tmp_path}/elsewhere")
    assert (tmp_path / "elsewhere.msgpack.gz").exists()


def test_memory_is_sampled(client: Client) -> None:
    sampler = MemorySampler()
    with sampler.sample("held", client=client, measure="managed", interval=0.02):
        held = client.submit(bytes, 1_000_000)
        assert len(held.result()) == 1_000_000
        time.sleep(0.3)
    assert len(sampler.to_pandas()) > 1


def test_metadata_of_tasks_name_them(client: Client) -> None:
    with get_task_metadata() as tasks:
        future = client.submit(inc, 1, pure=False)
        future.result()
    assert tasks.state[future.key] == "memory"
    assert future.key in tasks.metadata


def test_an_executor_beside_one_that_waits_is_not_counted(client: Client) -> None:
    def nest(n: int) -> int:
        with worker_client() as inner:
            return sum(inner.gather(inner.map(inc, range(n))))

    assert client.gather(client.map(nest, range(4), pure=False)) == [0, 1, 3, 6]
    assert len(client.run(inc, 1)) == N_WORKERS
    assert len(client.get_versions(check=True)["workers"]) == N_WORKERS
