"""`Future`: status, results, errors, tracebacks, callbacks, release, copies."""

from __future__ import annotations

import pickle
import threading
import traceback
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, Future, wait

from tests.dask.client_tasks import (
    NotLoadable,
    add,
    div,
    fail,
    gate,
    identity,
    inc,
    leave_mark,
    make_not_picklable,
    n_marks,
    raise_two_arguments,
    raise_unpicklable,
    slow_inc,
)


def bound_method() -> Any:
    return [1, 2].index


def method_of_mine() -> Any:
    return Path("x").exists


def generic() -> Any:
    return list[int]


def lambda_of_none() -> Any:
    return lambda: None


def test_a_future_is_pending_until_it_is_done(client: Client, tmp_path: Path) -> None:
    path = str(tmp_path / "go")
    future = client.submit(gate, path, 5)
    assert future.status == "pending"
    assert not future.done()
    assert not future.cancelled()
    Path(path).touch()
    assert future.result() == 5
    assert future.done()
    assert future.status == "finished"


def test_done_comes_true_without_asking_for_the_result(client: Client, wait_until: Any) -> None:
    future = client.submit(inc, 1)
    wait(future)
    assert future.done()
    later = client.submit(slow_inc, 1)
    wait_until(later.done)


def test_result_times_out(client: Client, tmp_path: Path) -> None:
    future = client.submit(gate, str(tmp_path / "go"), 5)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.05)
    with pytest.raises(TimeoutError):
        future.result(timeout="50ms")
    (tmp_path / "go").touch()
    assert future.result(timeout=10) == 5


@pytest.mark.parametrize("ask", ["exception", "traceback"])
def test_exception_and_traceback_time_out(client: Client, tmp_path: Path, ask: str) -> None:
    future = client.submit(gate, str(tmp_path / "go"), 5)
    with pytest.raises(TimeoutError):
        getattr(future, ask)(timeout=0.05)
    (tmp_path / "go").touch()
    assert getattr(future, ask)(timeout=10) is None


def test_a_result_can_be_asked_for_again_and_again(client: Client) -> None:
    future = client.submit(inc, 1)
    assert [future.result() for _ in range(3)] == [2, 2, 2]


def test_the_exception_is_the_tasks_own(client: Client) -> None:
    future = client.submit(div, 1, 0)
    error = future.exception()
    assert isinstance(error, ZeroDivisionError)
    assert str(error) == "division by zero"
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        future.result()
    assert future.status == "error"
    assert future.done()


def test_an_error_can_be_raised_again_and_again(client: Client) -> None:
    future = client.submit(fail, "three times")
    for _ in range(3):
        with pytest.raises(ValueError, match="three times"):
            future.result()


def test_a_finished_future_has_no_exception(client: Client) -> None:
    future = client.submit(inc, 1)
    assert future.exception() is None
    assert future.traceback() is None


def test_the_traceback_shows_the_tasks_frames(client: Client) -> None:
    future = client.submit(div, 1, 0)
    trace = future.traceback()
    text = "".join(traceback.format_tb(trace))
    assert "in div" in text
    assert "return x / y" in text


def test_a_raised_error_shows_the_tasks_frames(client: Client) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        client.submit(div, 1, 0).result()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "div"


def test_gather_raises_with_the_tasks_frames(client: Client) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        client.gather([client.submit(div, 1, 0)])
    assert "div" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_a_dependents_traceback_shows_where_it_began(client: Client) -> None:
    bad = client.submit(div, 1, 0)
    worse = client.submit(inc, client.submit(inc, bad))
    assert "in div" in "".join(traceback.format_tb(worse.traceback()))


def test_nested_frames_are_in_the_traceback(client: Client) -> None:
    def inner() -> None:
        raise KeyError("deep")

    def outer() -> None:
        inner()

    text = "".join(traceback.format_tb(client.submit(outer).traceback()))
    assert "in outer" in text
    assert "in inner" in text


def test_the_cause_of_an_error_comes_along(client: Client) -> None:
    def chained() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    error = client.submit(chained).exception()
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize(
    "error",
    [ValueError("v"), KeyError("k"), OSError(2, "no such file"), RuntimeError(), StopIteration(3)],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_type_and_arguments(client: Client, error: Exception) -> None:
    def throw() -> None:
        raise error

    got = client.submit(throw, pure=False).exception()
    assert type(got) is type(error)
    assert got.args == error.args


def test_an_error_of_a_local_class_comes_back(client: Client) -> None:
    class Mine(Exception):
        pass

    def throw() -> None:
        raise Mine("mine")

    error = client.submit(throw).exception()
    assert type(error).__name__ == "Mine"
    assert str(error) == "mine"


def test_an_error_with_unpicklable_state_is_told(client: Client) -> None:
    future = client.submit(raise_unpicklable)
    error = future.exception(timeout=10)
    assert isinstance(error, Exception)
    assert "UnpicklableState" in repr(error) + type(error).__name__ or "lock" in str(error)
    with pytest.raises(Exception, match="lock"):
        future.result(timeout=10)
    assert future.status == "error"


def test_an_error_that_cannot_be_made_anew_is_told(client: Client) -> None:
    future = client.submit(raise_two_arguments)
    with pytest.raises(Exception, match=r".") as caught:
        future.result(timeout=10)
    assert not isinstance(caught.value, TimeoutError)
    assert future.status == "error"


def test_long_error_messages_do_not_stop_the_client(client: Client) -> None:
    error = client.submit(fail, "long " * 100_000).exception(timeout=10)
    assert "long long" in str(error)
    assert "ValueError" in repr(error)


def test_a_result_that_cannot_be_pickled_ends_in_an_error(client: Client, backend: str) -> None:
    if backend.endswith("threads"):
        pytest.skip("threads share objects without pickling them")
    future = client.submit(make_not_picklable)
    with pytest.raises(Exception, match=r"stays here|serialize|pickle|Unable"):
        future.result(timeout=10)
    assert client.submit(inc, 1).result(timeout=10) == 2


def test_a_result_that_cannot_be_loaded_ends_in_an_error(client: Client, backend: str) -> None:
    if backend.startswith("distributed"):
        pytest.skip("ends distributed's own scheduler")
    future = client.submit(identity, NotLoadable(), key="not-loadable")
    with pytest.raises(Exception, match=r"refused to load|deserial|pickle"):
        future.result(timeout=10)
    assert client.submit(inc, 1).result(timeout=10) == 2


@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"]
)
def test_exit_in_a_task_is_its_error(client: Client, backend: str, error: BaseException) -> None:
    if backend.startswith("distributed"):
        pytest.skip("ends distributed's own worker")

    def leave() -> None:
        raise error

    future = client.submit(leave, pure=False)
    wait(future, timeout=15)
    assert future.status == "error"
    assert client.submit(inc, 1).result(timeout=10) == 2


def test_base_exceptions_come_back(client: Client, backend: str) -> None:
    if backend.startswith("distributed"):
        pytest.skip("ends distributed's own worker")

    class Mine(BaseException):
        pass

    def throw() -> None:
        raise Mine("base")

    future = client.submit(throw)
    wait(future, timeout=10)
    assert future.status == "error"
    assert "base" in str(future.exception())


def test_a_callback_is_called_with_the_future(client: Client) -> None:
    called = threading.Event()
    seen: list[Any] = []

    def note(future: Future) -> None:
        seen.append((future.key, future.status))
        called.set()

    future = client.submit(inc, 1, key="with-callback")
    future.add_done_callback(note)
    assert called.wait(10)
    assert seen == [("with-callback", "finished")]


def test_a_callback_after_the_end_is_called(client: Client) -> None:
    future = client.submit(inc, 1)
    wait(future)
    called = threading.Event()
    future.add_done_callback(lambda _: called.set())
    assert called.wait(10)


def test_a_callback_is_called_for_errors(client: Client) -> None:
    statuses: list[str] = []
    called = threading.Event()

    def note(future: Future) -> None:
        statuses.append(future.status)
        called.set()

    future = client.submit(div, 1, 0)
    future.add_done_callback(note)
    assert called.wait(10)
    assert statuses == ["error"]


def test_a_callback_is_called_for_cancelled_futures(client: Client, tmp_path: Path) -> None:
    called = threading.Event()
    future = client.submit(gate, str(tmp_path / "go"))
    future.add_done_callback(lambda _: called.set())
    future.cancel()
    (tmp_path / "go").touch()
    assert called.wait(10)


def test_several_callbacks_are_all_called(client: Client, wait_until: Any) -> None:
    seen: list[int] = []
    future = client.submit(slow_inc, 1)
    for n in range(5):
        future.add_done_callback(lambda _, n=n: seen.append(n))
    wait_until(lambda: sorted(seen) == [0, 1, 2, 3, 4])


def test_a_callback_may_ask_for_the_result(client: Client, wait_until: Any) -> None:
    seen: list[int] = []
    for future in [client.submit(inc, n) for n in range(3)]:
        future.add_done_callback(lambda future: seen.append(future.result()))
    wait_until(lambda: sorted(seen) == [1, 2, 3])


def test_the_repr_says_status_and_key(client: Client) -> None:
    future = client.submit(inc, 1, key="shown")
    wait(future)
    text = repr(future)
    assert "shown" in text
    assert "finished" in text
    assert str(future) == text


def test_the_repr_knows_the_type(client: Client) -> None:
    future = client.submit(inc, 1)
    wait(future)
    assert future.type is int
    assert "int" in repr(future)
    array = client.submit(np.ones, 3)
    wait(array)
    assert array.type is np.ndarray


def test_the_html_of_a_future_shows_its_key(client: Client) -> None:
    future = client.submit(inc, 1, key="shown-as-html")
    assert "shown-as-html" in future._repr_html_()
    wait(future)
    html = future._repr_html_()
    assert "finished" in html
    assert "int" in html


def test_a_future_knows_its_client(client: Client) -> None:
    future = client.submit(inc, 1)
    assert future.client is client
    assert future.executor is client


def test_futures_of_one_key_are_different_objects(client: Client) -> None:
    x, y = client.submit(inc, 1), client.submit(inc, 1)
    assert x is not y
    assert x != y
    assert len({x, y}) == 2
    assert x.result() == y.result() == 2


def test_a_result_lives_while_one_future_of_its_key_does(client: Client, tmp_path: Path) -> None:
    x = client.submit(leave_mark, str(tmp_path), "kept")
    wait(x)
    y = client.submit(leave_mark, str(tmp_path), "kept")
    x.release()
    del x
    assert y.result() == "kept"
    assert n_marks(tmp_path, "kept") == 1


def test_a_released_result_is_computed_anew(
    client: Client, tmp_path: Path, wait_until: Any
) -> None:
    future = client.submit(leave_mark, str(tmp_path), "anew")
    wait(future)
    key = future.key
    del future
    wait_until(lambda: key not in client.futures)
    assert client.submit(leave_mark, str(tmp_path), "anew").result() == "anew"
    assert n_marks(tmp_path, "anew") == 2


def test_inputs_may_be_released_when_their_reader_is_submitted(client: Client) -> None:
    future = client.submit(slow_inc, 1)
    for _ in range(5):
        future = client.submit(slow_inc, future, 0.005)  # the input's only future is gone
    assert future.result() == 7


def test_a_future_that_was_pickled_can_be_bound_to_a_client(client: Client) -> None:
    future = client.submit(inc, 1)
    again = pickle.loads(pickle.dumps(future))
    assert again.status is None
    with pytest.raises(RuntimeError):
        again.result()
    again.bind_client(client)
    assert again.key == future.key
    assert again.result() == 2


def test_a_future_bound_again_keeps_the_result(client: Client) -> None:
    future = client.submit(inc, 1, key="pickled-and-kept")
    again = pickle.loads(pickle.dumps(future))
    again.bind_client(client)
    del future
    assert again.result() == 2


def test_a_cancelled_future_raises(client: Client, tmp_path: Path) -> None:
    future = client.submit(gate, str(tmp_path / "go"))
    future.cancel()
    assert future.cancelled()
    assert future.status == "cancelled"
    assert future.done()
    with pytest.raises(CancelledError):
        future.result()
    (tmp_path / "go").touch()


@pytest.mark.parametrize("size_bytes", [0, 1, 1_000, 100_000, 10_000_000])
def test_results_of_all_sizes_come_back(client: Client, size_bytes: int) -> None:
    got = client.submit(bytes, size_bytes).result()
    assert len(got) == size_bytes


@pytest.mark.parametrize("n", [0, 1, 1_000, 1_000_000])
def test_arrays_of_all_sizes_come_back(client: Client, n: int) -> None:
    got = client.submit(np.arange, n).result()
    assert got.shape == (n,)
    assert got[-1:].tolist() == ([n - 1] if n else [])


@pytest.mark.parametrize(
    "value",
    [
        0,
        None,
        True,
        "text",
        b"bytes",
        1.5,
        (1, 2),
        [],
        {},
        {"a": [1, {"b": (2,)}]},
        {1, 2},
        frozenset([3]),
        Ellipsis,
        int,
        slice(1, 2),
        np.float64(3),
        2**100,
    ],
    ids=repr,
)
def test_values_come_back_as_they_are(client: Client, value: Any) -> None:
    got = client.submit(identity, value, pure=False).result()
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "make", [bound_method, method_of_mine, generic, lambda_of_none], ids=lambda f: f.__name__
)
def test_values_of_types_without_a_name_come_back(client: Client, make: Any) -> None:
    future = client.submit(make)
    wait(future, timeout=10)
    assert future.status == "finished"
    assert callable(future.result())


def test_a_large_result_is_an_input(client: Client) -> None:
    x = client.submit(np.ones, 500_000)
    y = client.submit(np.ones, 500_000)
    assert client.submit(np.sum, client.submit(add, x, y)).result() == 1_000_000


async def test_a_future_can_be_awaited(c: Any) -> None:
    assert await c.submit(inc, 1) == 2
    with pytest.raises(ZeroDivisionError):
        await c.submit(div, 1, 0)
