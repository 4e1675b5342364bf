"""`cancel`, `retry`, `fire_and_forget`: what becomes of work and of what depends on it."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, fire_and_forget, wait

from tests.dask.client_tasks import (
    add,
    div,
    fail_first,
    gate,
    inc,
    leave_mark,
    n_marks,
    slow_inc,
)


def blocked(client: Client, tmp_path: Path, n: int = 2) -> list[Any]:
    """Occupy every worker until `go` is there."""
    return [client.submit(gate, str(tmp_path / "go"), k, key=f"{tmp_path}-{k}") for k in range(n)]


def wait_known(client: Client, key: str, is_known: bool) -> None:
    """Wait until the scheduler has a key, or has it no more."""
    deadline = time.monotonic() + 10
    while client.run_on_scheduler(lambda dask_scheduler: key in dask_scheduler.tasks) != is_known:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_cancel_makes_futures_cancelled(client: Client, tmp_path: Path) -> None:
    futures = blocked(client, tmp_path)
    client.cancel(futures)
    assert all(future.cancelled() and future.done() for future in futures)
    assert all(future.status == "cancelled" for future in futures)
    (tmp_path / "go").touch()


def test_a_cancelled_task_does_not_start(client: Client, tmp_path: Path) -> None:
    held = blocked(client, tmp_path, 4)
    never = client.submit(leave_mark, str(tmp_path), "never", held)
    # The client waits neither for the graph nor for the cancellation to arrive.
    wait_known(client, never.key, True)
    never.cancel()
    wait_known(client, never.key, False)
    (tmp_path / "go").touch()
    wait(held)
    assert client.submit(inc, 1).result() == 2
    assert n_marks(tmp_path, "never") == 0


def test_cancel_reaches_dependents(client: Client, tmp_path: Path) -> None:
    x = client.submit(gate, str(tmp_path / "go"), 1)
    y = client.submit(inc, x)
    z = client.submit(inc, y)
    client.cancel(x)
    (tmp_path / "go").touch()
    for future in (y, z):
        with pytest.raises(CancelledError):
            future.result(timeout=10)


def test_what_does_not_depend_on_it_goes_on(client: Client, tmp_path: Path) -> None:
    x = client.submit(gate, str(tmp_path / "go"), 1)
    independent = client.submit(inc, 1)
    x.cancel()
    (tmp_path / "go").touch()
    assert independent.result() == 2


def test_the_inputs_of_a_cancelled_task_stay(client: Client, tmp_path: Path) -> None:
    x = client.submit(inc, 1)
    y = client.submit(gate, str(tmp_path / "go"), x)
    y.cancel()
    (tmp_path / "go").touch()
    assert x.result() == 2


def test_cancel_takes_containers(client: Client, tmp_path: Path) -> None:
    x, y = blocked(client, tmp_path)
    client.cancel({"x": x, "y": [y]})
    assert x.cancelled()
    assert y.cancelled()
    (tmp_path / "go").touch()


def test_cancel_of_a_finished_future(client: Client) -> None:
    future = client.submit(inc, 1)
    assert future.result() == 2
    future.cancel()
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result()


def test_cancel_of_nothing_is_no_error(client: Client) -> None:
    client.cancel([])


def test_cancel_says_the_reason(client: Client, tmp_path: Path) -> None:
    future = client.submit(gate, str(tmp_path / "go"))
    future.cancel(reason="no longer wanted", msg="a message")
    with pytest.raises(CancelledError, match="no longer wanted"):
        future.result()
    (tmp_path / "go").touch()


def test_a_cancelled_input_of_a_new_task_is_refused(client: Client, tmp_path: Path) -> None:
    x = client.submit(gate, str(tmp_path / "go"), 1)
    x.cancel()
    (tmp_path / "go").touch()
    with pytest.raises(CancelledError):
        client.submit(inc, x).result(timeout=10)


def test_a_cancelled_key_can_be_submitted_again(client: Client, tmp_path: Path) -> None:
    x = client.submit(gate, str(tmp_path / "go"), 1, key="cancelled-and-again")
    x.cancel()
    del x
    (tmp_path / "go").touch()
    time.sleep(0.1)  # by then the client has heard that the server has cancelled it
    assert client.submit(inc, 5, key="cancelled-and-again").result(timeout=10) == 6


def test_another_clients_future_survives_cancel(
    client: Client, other: Client, tmp_path: Path, wait_until: Any
) -> None:
    y = other.submit(gate, str(tmp_path / "go"), 7, key=f"shared-{tmp_path}")
    wait_until(lambda: (tmp_path / "go.runs").exists())
    x = client.submit(gate, str(tmp_path / "go"), 7, key=f"shared-{tmp_path}")
    x.cancel()
    (tmp_path / "go").touch()
    assert x.cancelled()
    assert y.result(timeout=10) == 7


def test_force_cancels_for_all_clients(
    client: Client, other: Client, tmp_path: Path, wait_until: Any
) -> None:
    y = other.submit(gate, str(tmp_path / "go"), 7, key=f"forced-{tmp_path}")
    wait_until(lambda: (tmp_path / "go.runs").exists())
    x = client.submit(gate, str(tmp_path / "go"), 7, key=f"forced-{tmp_path}")
    client.cancel(x, force=True)
    time.sleep(0.05)
    (tmp_path / "go").touch()
    with pytest.raises(CancelledError):
        y.result(timeout=10)


def test_a_cancelled_collection_is_cancelled(client: Client, tmp_path: Path) -> None:
    value = client.persist(dask.delayed(gate)(str(tmp_path / "go"), 1))
    client.cancel(value)
    (tmp_path / "go").touch()
    with pytest.raises(CancelledError):
        client.compute(value).result(timeout=10)


def test_cancel_while_it_runs_frees_the_worker_in_the_end(
    client: Client, tmp_path: Path, wait_until: Any
) -> None:
    futures = blocked(client, tmp_path)
    wait_until(lambda: (tmp_path / "go.runs").exists())
    client.cancel(futures)
    (tmp_path / "go").touch()
    assert client.gather(client.map(slow_inc, range(4), delay_s=0.001)) == [1, 2, 3, 4]


def keys_of(dask_scheduler: Any) -> list[str]:
    return [str(key) for key in dask_scheduler.tasks]


def test_a_released_task_is_not_run(client: Client, tmp_path: Path, wait_until: Any) -> None:
    held = blocked(client, tmp_path, 4)
    future = client.submit(leave_mark, str(tmp_path), "released", held)
    key = future.key
    del future
    wait_until(lambda: key not in client.run_on_scheduler(keys_of))
    time.sleep(0.3)  # the work itself is taken back by another thread, a little later
    (tmp_path / "go").touch()
    wait(held)
    assert client.submit(inc, 1000).result() == 1001
    assert n_marks(tmp_path, "released") == 0


def test_retry_runs_a_failed_task_again(client: Client, tmp_path: Path) -> None:
    future = client.submit(fail_first, str(tmp_path), 1, value=5)
    assert isinstance(future.exception(), ZeroDivisionError)
    future.retry()
    assert future.result(timeout=10) == 5
    assert future.status == "finished"


def test_retry_may_fail_again(client: Client, tmp_path: Path) -> None:
    future = client.submit(fail_first, str(tmp_path), 2)
    assert "run 1" in str(future.exception())
    future.retry()
    wait(future)
    with pytest.raises(ZeroDivisionError, match="run 2"):
        future.result(timeout=10)
    client.retry([future])
    assert future.result(timeout=10) == 1


def test_retry_reaches_dependents(client: Client, tmp_path: Path) -> None:
    x = client.submit(fail_first, str(tmp_path), 1, value=5)
    y = client.submit(inc, x)
    z = client.submit(inc, y)
    wait([x, y, z])
    assert {f.status for f in (x, y, z)} == {"error"}
    z.retry()
    assert z.result(timeout=10) == 7
    assert y.result(timeout=10) == 6


def test_forgotten_work_is_done(client: Client, tmp_path: Path, wait_until: Any) -> None:
    fire_and_forget(client.submit(leave_mark, str(tmp_path), "forgotten"))
    wait_until(lambda: n_marks(tmp_path, "forgotten") == 1)


def test_forgotten_work_has_inputs(client: Client, tmp_path: Path, wait_until: Any) -> None:
    x = client.submit(slow_inc, 1)
    y = client.submit(leave_mark, str(tmp_path), "forgotten", x)
    fire_and_forget([y])
    del x, y
    wait_until(lambda: n_marks(tmp_path, "forgotten") == 1)


def test_forgotten_collections_are_done(client: Client, tmp_path: Path, wait_until: Any) -> None:
    value = dask.delayed(leave_mark)(str(tmp_path), "forgotten")
    fire_and_forget(client.persist(value))
    wait_until(lambda: n_marks(tmp_path, "forgotten") == 1)


def test_forgotten_work_outlives_its_client(cluster: Any, tmp_path: Path, wait_until: Any) -> None:
    with Client(cluster, set_as_default=False) as client:
        x = client.submit(gate, str(tmp_path / "go"), key=f"outlives-{tmp_path}")
        fire_and_forget(client.submit(leave_mark, str(tmp_path), "forgotten", x))
        wait_until(lambda: (tmp_path / "go.runs").exists())
    (tmp_path / "go").touch()
    wait_until(lambda: n_marks(tmp_path, "forgotten") == 1)


def test_forgotten_errors_harm_nobody(client: Client) -> None:
    fire_and_forget(client.submit(div, 1, 0))
    assert client.submit(inc, 1).result() == 2


async def test_cancel_is_awaitable(c: Any, tmp_path: Path) -> None:
    x = c.submit(gate, str(tmp_path / "go"), 1)
    y = c.submit(add, x, 1)
    await c.cancel([x])
    assert x.cancelled()
    (tmp_path / "go").touch()
    with pytest.raises(CancelledError):
        await y
    with pytest.raises(CancelledError):
        await x


async def test_retry_is_awaitable(c: Any, tmp_path: Path) -> None:
    future = c.submit(fail_first, str(tmp_path), 1, value=3)
    with pytest.raises(ZeroDivisionError):
        await future
    await future.retry()
    assert await future == 3
