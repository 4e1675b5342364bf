"""Tasks that use the cluster: worker_client, get_client, get_worker, secede, nested compute."""

from __future__ import annotations

import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import pytest
from distributed import (
    Client,
    Variable,
    as_completed,
    get_client,
    get_worker,
    rejoin,
    secede,
    wait,
    worker_client,
)

from tests.dask.client_tasks import add, div, double, inc, leave_mark, n_marks, slow_inc


def test_a_task_submits_tasks(client: Client) -> None:
    def outer(x: int) -> int:
        with worker_client() as here:
            a = here.submit(inc, x)
            b = here.submit(double, x)
            return here.submit(add, a, b).result()

    assert client.submit(outer, 10).result(timeout=20) == 31


def test_a_task_gathers_what_it_maps(client: Client) -> None:
    def outer(n: int) -> list[int]:
        with worker_client() as here:
            return here.gather(here.map(inc, range(n)))

    assert client.submit(outer, 20).result(timeout=20) == list(range(1, 21))


def test_more_nesting_tasks_than_workers(client: Client) -> None:
    """Every worker waits for a task of its own, which somebody must run."""

    def outer(x: int) -> int:
        with worker_client() as here:
            return here.submit(inc, x).result()

    assert client.gather(client.map(outer, range(8))) == list(range(1, 9))


def test_tasks_nest_deeply(client: Client) -> None:
    def fib(n: int) -> int:
        if n < 2:
            return n
        with worker_client() as here:
            a, b = here.submit(fib, n - 1), here.submit(fib, n - 2)
            return sum(here.gather([a, b]))

    assert client.submit(fib, 6).result(timeout=30) == 8


def test_get_client_gives_the_tasks_client(client: Client) -> None:
    def outer() -> int:
        here = get_client()
        future = here.submit(inc, 1)
        secede()
        return future.result()

    assert client.submit(outer).result(timeout=20) == 2


def test_get_client_without_a_task_gives_the_default(client: Client) -> None:
    assert get_client() is client


def test_get_client_waits_without_seceding(client: Client) -> None:
    """A task may block on its own tasks without having said so."""

    def outer(x: int) -> int:
        return get_client().submit(inc, x).result()

    assert client.submit(outer, 1).result(timeout=20) == 2


def test_secede_and_rejoin(client: Client) -> None:
    def outer(x: int) -> int:
        secede()
        result = get_client().submit(inc, x).result()
        rejoin()
        return result

    assert client.gather(client.map(outer, range(4))) == [1, 2, 3, 4]


def test_worker_client_in_the_same_thread(client: Client) -> None:
    def outer(x: int) -> int:
        with worker_client(separate_thread=False) as here:
            future = here.submit(inc, x)
            return x if future.key else -1

    assert client.submit(outer, 1).result(timeout=20) == 1


def test_a_task_waits_for_its_futures(client: Client) -> None:
    def outer() -> int:
        with worker_client() as here:
            futures = here.map(inc, range(5))
            wait(futures)
            return sum(future.result() for future in as_completed(futures))

    assert client.submit(outer).result(timeout=20) == 15


def test_errors_of_inner_tasks_reach_the_outer(client: Client) -> None:
    def outer() -> Any:
        with worker_client() as here:
            return here.submit(div, 1, 0).result()

    with pytest.raises(ZeroDivisionError):
        client.submit(outer).result(timeout=20)


def test_an_outer_task_may_catch_an_inner_error(client: Client) -> None:
    def outer() -> str:
        with worker_client() as here:
            try:
                here.submit(div, 1, 0).result()
            except ZeroDivisionError:
                return "caught"
        return "not raised"

    assert client.submit(outer).result(timeout=20) == "caught"


def test_a_task_scatters(client: Client) -> None:
    def outer() -> int:
        with worker_client() as here:
            future = here.scatter(41)
            futures = here.scatter([1, 2])
            return here.submit(inc, future).result() + sum(here.gather(futures))

    assert client.submit(outer).result(timeout=20) == 45


def test_a_task_computes_a_collection(client: Client) -> None:
    def outer() -> int:
        with worker_client():
            return int(da.ones(100, chunks=10).sum().compute())

    assert client.submit(outer).result(timeout=20) == 100


def test_a_task_computes_a_delayed(client: Client) -> None:
    def outer() -> int:
        with worker_client() as here:
            x = dask.delayed(inc)(1)
            y = dask.delayed(double)(x)
            return here.compute(y, sync=True)

    assert client.submit(outer).result(timeout=20) == 4


def test_nested_compute_without_a_client(client: Client) -> None:
    """`compute` in a task finds the cluster by itself, or runs where it is."""

    def outer(n: int) -> int:
        return int(da.arange(n, chunks=5).sum().compute())

    assert client.gather(client.map(outer, [10, 20, 30])) == [45, 190, 435]


def test_nested_compute_of_delayed_in_delayed(client: Client) -> None:
    @dask.delayed
    def outer(n: int) -> int:
        parts = [dask.delayed(inc)(k) for k in range(n)]
        return sum(dask.compute(*parts))

    assert dask.compute(outer(3), outer(5)) == (6, 15)


def test_a_task_persists(client: Client) -> None:
    def outer() -> int:
        with worker_client() as here:
            x = here.persist(da.arange(50, chunks=10))
            return int(x.sum().compute())

    assert client.submit(outer).result(timeout=20) == 1225


def test_a_task_knows_its_worker(client: Client) -> None:
    def outer() -> tuple[str, Any]:
        worker = get_worker()
        return worker.address, worker.name

    address, _ = client.submit(outer).result(timeout=20)
    assert isinstance(address, str)
    assert address


def test_get_worker_outside_a_task_is_an_error(client: Client) -> None:
    with pytest.raises(ValueError, match=r"[Ww]orker"):
        get_worker()


def test_a_worker_knows_the_running_task(client: Client) -> None:
    future = client.submit(lambda: get_worker().get_current_task(), key="the-running-task")
    assert future.result(timeout=20) == "the-running-task"


def test_a_task_leaves_something_with_its_worker(client: Client) -> None:
    def remember(n: int) -> int:
        worker = get_worker()
        worker.a_test_counter = getattr(worker, "a_test_counter", 0) + 1
        return worker.a_test_counter

    assert max(client.gather(client.map(remember, range(20)))) >= 2


def test_a_task_uses_futures_of_its_client(client: Client) -> None:
    name = f"variable-{uuid.uuid4().hex}"
    Variable(name).set(client.submit(inc, 10))

    def outer() -> int:
        with worker_client():
            return Variable(name).get(timeout=10).result() + 1

    assert client.submit(outer).result(timeout=20) == 12


def test_an_argument_of_an_inner_task_may_be_large(client: Client) -> None:
    import numpy as np

    def outer() -> float:
        array = np.ones(200_000)
        with worker_client() as here:
            return float(here.submit(np.sum, here.scatter(array)).result())

    assert client.submit(outer).result(timeout=20) == 200_000


def test_inner_tasks_run_at_the_same_time(client: Client, tmp_path: Path) -> None:
    def outer() -> int:
        with worker_client() as here:
            return len({*here.gather(here.map(pid_and_thread, range(12)))})

    assert client.submit(outer).result(timeout=20) >= 1


def pid_and_thread(n: int) -> tuple[int, int]:
    time.sleep(0.002)
    return os.getpid(), threading.get_ident()


def test_inner_work_that_is_forgotten_is_done(
    client: Client, tmp_path: Path, wait_until: Any
) -> None:
    from distributed import fire_and_forget

    def outer() -> None:
        with worker_client() as here:
            fire_and_forget(here.submit(leave_mark, str(tmp_path), "inner"))

    client.submit(outer).result(timeout=20)
    wait_until(lambda: n_marks(tmp_path, "inner") == 1)


def test_an_async_task_uses_an_async_client(client: Client) -> None:
    async def outer(x: int) -> int:
        here = get_client()
        future = here.submit(inc, x)
        return await future

    assert client.submit(outer, 1).result(timeout=20) == 2


def test_tasks_and_clients_share_keys(client: Client, tmp_path: Path) -> None:
    mine = client.submit(leave_mark, str(tmp_path), "shared-key")
    wait(mine)

    def outer(folder: str) -> str:
        with worker_client() as here:
            return here.submit(leave_mark, folder, "shared-key").result()

    assert client.submit(outer, str(tmp_path)).result(timeout=20) == "shared-key"
    assert n_marks(tmp_path, "shared-key") == 1


def test_a_tree_of_tasks_in_tasks(client: Client) -> None:
    def tree(depth: int) -> int:
        if depth == 0:
            return 1
        with worker_client() as here:
            children = here.map(tree, [depth - 1] * 2, pure=False)
            return 1 + sum(here.gather(children))

    assert client.submit(tree, 3).result(timeout=30) == 15


def test_ordinary_tasks_run_beside_nesting_ones(client: Client) -> None:
    def outer(x: int) -> int:
        with worker_client() as here:
            return here.submit(slow_inc, x).result()

    nesting = client.map(outer, range(6))
    plain = client.map(slow_inc, range(100, 110), delay_s=0.001)
    assert client.gather(plain) == list(range(101, 111))
    assert client.gather(nesting) == list(range(1, 7))


async def test_a_coroutines_client_runs_nesting_tasks(c: Any) -> None:
    def outer(x: int) -> int:
        with worker_client() as here:
            return here.submit(inc, x).result()

    assert await c.gather(c.map(outer, range(4))) == [1, 2, 3, 4]
