"""`Client.get_executor`: the interface of `concurrent.futures`."""

from __future__ import annotations

import concurrent.futures as cf
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from tests.dask.client_tasks import add, div, fail_first, gate, inc, leave_mark, n_marks, slow_inc


def test_an_executor_submits(client: Client) -> None:
    with client.get_executor() as executor:
        future = executor.submit(add, 1, y=2)
        assert isinstance(future, cf.Future)
        assert future.result() == 3
        assert future.done()
        assert future.exception() is None


def test_an_executor_maps(client: Client) -> None:
    with client.get_executor() as executor:
        assert list(executor.map(inc, range(20))) == list(range(1, 21))
        assert list(executor.map(add, [1, 2], [3, 4])) == [4, 6]


def test_an_executors_errors(client: Client) -> None:
    with client.get_executor() as executor:
        future = executor.submit(div, 1, 0)
        assert isinstance(future.exception(), ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            future.result()
        results = executor.map(div, [1, 1, 1], [1, 0, 1])
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_an_executor_waits(client: Client, tmp_path: Path) -> None:
    with client.get_executor() as executor:
        slow = executor.submit(gate, str(tmp_path / "go"))
        quick = executor.submit(inc, 1)
        done, not_done = cf.wait([slow, quick], return_when=cf.FIRST_COMPLETED)
        assert (done, not_done) == ({quick}, {slow})
        (tmp_path / "go").touch()
        assert cf.wait([slow, quick]).not_done == set()


def test_as_completed_of_an_executor(client: Client) -> None:
    with client.get_executor() as executor:
        futures = [executor.submit(slow_inc, n, 0.002) for n in range(5)]
        assert sorted(f.result() for f in cf.as_completed(futures)) == [1, 2, 3, 4, 5]


def test_an_executors_futures_can_be_cancelled(client: Client, tmp_path: Path) -> None:
    with client.get_executor() as executor:
        future = executor.submit(gate, str(tmp_path / "go"))
        assert future.cancel()
        assert future.cancelled()
        (tmp_path / "go").touch()


def test_results_of_an_executor_time_out(client: Client, tmp_path: Path) -> None:
    with client.get_executor() as executor:
        future = executor.submit(gate, str(tmp_path / "go"), 1)
        with pytest.raises(cf.TimeoutError):
            future.result(timeout=0.05)
        (tmp_path / "go").touch()
        assert future.result(timeout=10) == 1


def test_map_of_an_executor_times_out(client: Client, tmp_path: Path) -> None:
    with client.get_executor() as executor:
        results = executor.map(gate, [str(tmp_path / "go")], timeout=0.05)
        with pytest.raises(cf.TimeoutError):
            next(results)
        (tmp_path / "go").touch()


def test_callbacks_of_an_executors_futures(client: Client, wait_until: Any) -> None:
    seen: list[int] = []
    with client.get_executor() as executor:
        executor.submit(inc, 1).add_done_callback(lambda future: seen.append(future.result()))
        wait_until(lambda: seen == [2])


def test_an_executor_that_is_shut_down_takes_nothing(client: Client) -> None:
    executor = client.get_executor()
    executor.submit(inc, 1)
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(RuntimeError):
        executor.submit(inc, 2)


def test_shutdown_waits(client: Client) -> None:
    executor = client.get_executor()
    futures = [executor.submit(slow_inc, n) for n in range(4)]
    executor.shutdown(wait=True)
    assert [future.result(timeout=5) for future in futures] == [1, 2, 3, 4]


def test_shutdown_without_waiting_cancels(client: Client, tmp_path: Path) -> None:
    executor = client.get_executor()
    future = executor.submit(gate, str(tmp_path / "go"))
    start = time.monotonic()
    executor.shutdown(wait=False)
    assert time.monotonic() - start < 5
    (tmp_path / "go").touch()
    with pytest.raises(cf.CancelledError):
        future.result(timeout=10)


def test_an_executor_may_be_impure(client: Client, tmp_path: Path) -> None:
    with client.get_executor(pure=False) as executor:
        cf.wait([executor.submit(leave_mark, str(tmp_path)) for _ in range(3)])
    assert n_marks(tmp_path) == 3


def test_an_executor_retries(client: Client, tmp_path: Path) -> None:
    with client.get_executor(retries=2) as executor:
        assert executor.submit(fail_first, str(tmp_path), 2, 5).result() == 5


def test_unknown_options_of_an_executor_are_refused(client: Client) -> None:
    with pytest.raises(TypeError):
        client.get_executor(no_such_option=1)


def test_an_executor_in_an_event_loop(client: Client) -> None:
    import asyncio

    async def main() -> int:
        loop = asyncio.get_running_loop()
        with client.get_executor() as executor:
            return await loop.run_in_executor(executor, inc, 1)

    assert asyncio.run(main()) == 2
