"""`gather`, `scatter`, and how long results live."""

from __future__ import annotations

from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import Client, Future, wait

from tests.dask.client_tasks import add, div, fail, gate, identity, inc, slow_inc


def test_gather_takes_one_future(client: Client) -> None:
    assert client.gather(client.submit(inc, 1)) == 2


@pytest.mark.parametrize(
    ("shape", "result"),
    [
        (lambda x, y: [x, y], [1, 2]),
        (lambda x, y: (x, y), (1, 2)),
        (lambda x, y: {x, y}, {1, 2}),
        (lambda x, y: {"x": x, "y": y}, {"x": 1, "y": 2}),
        (lambda x, y: {"x": [x, {"y": y}]}, {"x": [1, {"y": 2}]}),
        (lambda x, y: [x, [x, [x, y]]], [1, [1, [1, 2]]]),
        (lambda x, y: [1, x, "text"], [1, 1, "text"]),
        (lambda x, y: [], []),
        (lambda x, y: {}, {}),
    ],
    ids=["list", "tuple", "set", "dict", "mixed", "deep", "with-values", "empty", "empty-dict"],
)
def test_gather_keeps_the_shape(client: Client, shape: Any, result: Any) -> None:
    x, y = client.map(inc, [0, 1])
    got = client.gather(shape(x, y))
    assert got == result
    assert type(got) is type(result)


def test_gather_of_many(client: Client) -> None:
    assert client.gather(client.map(inc, range(2000))) == list(range(1, 2001))


def test_gather_of_one_future_twice(client: Client) -> None:
    x = client.submit(inc, 1)
    assert client.gather([x, x, x]) == [2, 2, 2]


def test_gather_raises_the_first_error(client: Client) -> None:
    x, y = client.submit(inc, 1), client.submit(div, 1, 0)
    with pytest.raises(ZeroDivisionError):
        client.gather([x, y])
    with pytest.raises(ZeroDivisionError):
        client.gather({"x": x, "y": y}, errors="raise")


def test_gather_may_skip_errors(client: Client) -> None:
    x, y, z = client.submit(inc, 1), client.submit(div, 1, 0), client.submit(inc, 2)
    assert client.gather([x, y, z], errors="skip") == [2, 3]


def test_gather_does_not_wait_for_all_when_one_failed(client: Client, tmp_path: Path) -> None:
    slow, bad = client.submit(gate, str(tmp_path / "go")), client.submit(fail)
    with pytest.raises(ValueError, match="as the test wants it"):
        client.gather([slow, bad])
    assert not slow.done()
    (tmp_path / "go").touch()
    wait(slow)


def test_gather_of_a_cancelled_future_raises(client: Client, tmp_path: Path) -> None:
    future = client.submit(gate, str(tmp_path / "go"))
    future.cancel()
    with pytest.raises(CancelledError):
        client.gather([future])
    (tmp_path / "go").touch()


def test_gather_refuses_futures_of_another_client(client: Client, other: Client) -> None:
    future = other.submit(inc, 1)
    with pytest.raises(ValueError, match="another client"):
        client.gather([future])
    assert other.gather([future]) == [2]


def test_gather_from_several_threads(client: Client) -> None:
    from concurrent.futures import ThreadPoolExecutor

    futures = client.map(inc, range(60))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda n: client.gather(futures[n::4]), range(4)))
    assert sorted(value for part in parts for value in part) == list(range(1, 61))


@pytest.mark.parametrize("n", [1, 1_000, 2_000_000])
def test_gathered_arrays_are_right(client: Client, n: int) -> None:
    futures = client.map(np.full, [n] * 3, range(3))
    for number, array in enumerate(client.gather(futures)):
        assert array.shape == (n,)
        assert (array == number).all()


def test_gathered_frames_are_right(client: Client) -> None:
    frame = pd.DataFrame({"a": range(1000), "b": [f"text {n}" for n in range(1000)]})
    pd.testing.assert_frame_equal(client.submit(identity, frame).result(), frame)


def test_scatter_gives_a_future(client: Client) -> None:
    future = client.scatter(123)
    assert isinstance(future, Future)
    assert future.status == "finished"
    assert future.result() == 123


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ([1, 2], [1, 2]),
        ((1, 2), (1, 2)),
        ({1, 2}, {1, 2}),
        (frozenset({1}), frozenset({1})),
        ({"x": 1, "y": 2}, {"x": 1, "y": 2}),
        (range(3), [0, 1, 2]),
    ],
    ids=["list", "tuple", "set", "frozenset", "dict", "range"],
)
def test_scatter_keeps_the_shape(client: Client, value: Any, result: Any) -> None:
    futures = client.scatter(value)
    if isinstance(value, dict):
        assert all(isinstance(future, Future) for future in futures.values())
        assert list(futures) == list(value)
    else:
        assert all(isinstance(future, Future) for future in futures)
    got = client.gather(futures)
    assert got == result
    assert type(got) is type(result)


@pytest.mark.parametrize(
    "value",
    [1, "text", b"bytes", None, np.arange(5), pd.Series([1, 2])],
    ids=["int", "str", "bytes", "none", "array", "series"],
)
def test_scatter_of_a_single_value_gives_one_future(client: Client, value: Any) -> None:
    future = client.scatter(value)
    assert isinstance(future, Future)
    got = future.result()
    assert type(got) is type(value)
    assert (np.asarray(got) == np.asarray(value)).all()


def test_a_scattered_value_is_an_argument(client: Client) -> None:
    x = client.scatter(np.arange(1000))
    assert client.submit(np.sum, x).result() == 499500
    assert client.gather(client.map(add, range(3), y=client.scatter(10))) == [10, 11, 12]


def test_a_scattered_dict_has_its_keys(client: Client) -> None:
    futures = client.scatter({"scattered-a": 1, "scattered-b": 2})
    assert {name: future.key for name, future in futures.items()} == {
        "scattered-a": "scattered-a",
        "scattered-b": "scattered-b",
    }
    assert client.submit(add, **dict(zip("xy", futures.values()))).result() == 3


def test_equal_values_have_equal_keys(client: Client) -> None:
    x, y = client.scatter([1, 1])
    assert x.key == y.key
    assert client.scatter(1).key == x.key
    assert client.scatter(2).key != x.key


def test_scatter_without_hash_gives_new_keys(client: Client) -> None:
    x, y = client.scatter(5, hash=False), client.scatter(5, hash=False)
    assert x.key != y.key
    assert client.gather([x, y]) == [5, 5]


def test_scattered_futures_know_their_type(client: Client) -> None:
    assert client.scatter(5).type is int
    assert client.scatter(np.ones(3)).type is np.ndarray


@pytest.mark.parametrize("broadcast", [True, 2])
def test_scatter_may_broadcast(client: Client, broadcast: Any) -> None:
    x = client.scatter(np.arange(10), broadcast=broadcast)
    assert client.submit(np.sum, x).result() == 45
    futures = client.scatter([1, 2, 3], broadcast=broadcast)
    assert client.gather(client.map(inc, futures)) == [2, 3, 4]


def test_scatter_to_a_worker(client: Client) -> None:
    address = next(iter(client.scheduler_info()["workers"]))
    assert client.submit(inc, client.scatter(41, workers=[address])).result() == 42


def test_scatter_direct_is_as_good(client: Client) -> None:
    assert client.submit(inc, client.scatter(7, direct=True)).result() == 8
    assert client.submit(inc, client.scatter(8, direct=False)).result() == 9


def test_gather_direct_is_as_good(client: Client) -> None:
    futures = client.map(inc, range(5))
    assert client.gather(futures, direct=True) == [1, 2, 3, 4, 5]
    assert client.gather(futures, direct=False) == [1, 2, 3, 4, 5]


def test_scatter_of_large_values(client: Client) -> None:
    array = np.random.default_rng(0).random(1_000_000)
    x = client.scatter(array)
    assert client.submit(np.sum, x).result() == pytest.approx(array.sum())
    assert (x.result() == array).all()


def test_scattered_values_are_released(client: Client, wait_until: Any) -> None:
    x = client.scatter("a value that is released", hash=False)
    key = x.key
    del x
    wait_until(lambda: key not in client.futures)
    again = client.submit(inc, 1, key=key)
    assert again.result() == 2


def test_a_scattered_value_lives_for_its_readers(client: Client) -> None:
    x = client.scatter(10)
    y = client.submit(slow_inc, x)
    del x
    assert y.result() == 11


def test_functions_can_be_scattered(client: Client) -> None:
    function = client.scatter(inc)
    assert client.submit(lambda f, x: f(x), function, 1).result() == 2


def test_scatter_in_a_loop(client: Client) -> None:
    futures = [client.scatter(n) for n in range(50)]
    assert client.gather(client.map(inc, futures)) == list(range(1, 51))


def test_results_that_nobody_holds_are_dropped(client: Client, wait_until: Any) -> None:
    futures = client.map(inc, range(20))
    wait(futures)
    keys = [future.key for future in futures]
    del futures
    wait_until(lambda: not set(keys) & set(client.nbytes(summary=False)))


@pytest.mark.parametrize("n", [10, 3000])
def test_futures_that_are_dropped_at_once_leave_nothing(
    client: Client, wait_until: Any, n: int, backend: str
) -> None:
    """The client's release may overtake a graph that is still being read."""
    if backend.startswith("distributed"):
        pytest.skip("distributed's scheduler may keep them until the client ends")
    client.map(inc, range(n), pure=False, key="dropped-at-once")
    assert client.submit(inc, 1).result() == 2
    wait_until(lambda: not client.run_on_scheduler(n_dropped))


def n_dropped(dask_scheduler: Any) -> int:
    return sum(str(key).startswith("dropped-at-once") for key in dask_scheduler.tasks)


def test_inner_results_of_a_chain_are_not_held(client: Client) -> None:
    x = client.submit(np.ones, 1000)
    y = client.submit(np.sum, x)
    key = x.key
    del x
    assert y.result() == 1000
    assert key not in client.futures


async def test_gather_is_awaitable(c: Any) -> None:
    futures = c.map(inc, range(5))
    assert await c.gather(futures) == [1, 2, 3, 4, 5]
    assert await c.gather({"x": futures[0]}) == {"x": 1}
    with pytest.raises(ZeroDivisionError):
        await c.gather([c.submit(div, 1, 0), *futures])
    assert await c.gather([c.submit(div, 1, 0), futures[0]], errors="skip") == [1]


async def test_concurrent_gathers_all_get_theirs(c: Any) -> None:
    import asyncio

    futures = c.map(inc, range(100))
    parts = await asyncio.gather(*(c.gather(futures[n : n + 10]) for n in range(0, 100, 10)))
    assert [value for part in parts for value in part] == list(range(1, 101))


async def test_scatter_is_awaitable(c: Any) -> None:
    future = await c.scatter(10)
    assert await c.submit(inc, future) == 11
    x, y = await c.scatter([1, 2])
    assert await c.gather([x, y]) == [1, 2]
    named = await c.scatter({"an-async-key": 3})
    assert named["an-async-key"].key == "an-async-key"
