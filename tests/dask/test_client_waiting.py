"""`wait` and `as_completed`."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, as_completed, futures_of, wait

from tests.dask.client_tasks import div, fail, gate, identity, inc, slow_fail, slow_inc


def test_wait_gives_done_and_not_done(client: Client) -> None:
    futures = client.map(inc, range(5))
    done, not_done = wait(futures)
    assert done == set(futures)
    assert not_done == set()
    assert all(future.status == "finished" for future in futures)


def test_wait_takes_a_single_future(client: Client) -> None:
    future = client.submit(inc, 1)
    assert wait(future).done == {future}


def test_wait_of_nothing_ends(client: Client) -> None:
    assert wait([]) == (set(), set())


def test_wait_takes_containers_of_futures(client: Client) -> None:
    x, y, z = client.map(inc, range(3))
    assert wait({"a": x, "b": [y, (z,)]}).done == {x, y, z}


def test_wait_takes_collections(client: Client) -> None:
    value = dask.delayed(inc)(1).persist()
    wait(value)
    assert all(future.done() for future in futures_of(value))


def test_wait_does_not_raise_errors(client: Client) -> None:
    x, y = client.submit(div, 1, 0), client.submit(inc, 1)
    assert wait([x, y]).done == {x, y}
    assert (x.status, y.status) == ("error", "finished")


def test_wait_for_the_first(client: Client, tmp_path: Path) -> None:
    slow = client.submit(gate, str(tmp_path / "go"))
    quick = client.submit(inc, 1)
    done, not_done = wait([slow, quick], return_when="FIRST_COMPLETED")
    assert done == {quick}
    assert not_done == {slow}
    (tmp_path / "go").touch()
    wait(slow)


def test_wait_knows_no_other_condition(client: Client) -> None:
    with pytest.raises(NotImplementedError):
        wait(client.submit(inc, 1), return_when="FIRST_EXCEPTION")


@pytest.mark.parametrize("timeout", [0.05, "50 ms", 0])
def test_wait_times_out(client: Client, tmp_path: Path, timeout: Any) -> None:
    future = client.submit(gate, str(tmp_path / "go"))
    with pytest.raises(TimeoutError):
        wait(future, timeout=timeout)
    assert future.status == "pending"
    (tmp_path / "go").touch()
    wait(future, timeout="10 s")


def test_wait_wants_a_list_of_futures(client: Client) -> None:
    x, y = client.map(inc, range(2))
    with pytest.raises(TypeError, match="list"):
        wait(x, y)


def test_wait_raises_for_cancelled_futures(client: Client, tmp_path: Path) -> None:
    future = client.submit(gate, str(tmp_path / "go"))
    future.cancel()
    with pytest.raises(CancelledError):
        wait(future)
    (tmp_path / "go").touch()


def test_as_completed_gives_every_future_once(client: Client) -> None:
    futures = client.map(inc, range(20))
    seen = list(as_completed(futures))
    assert len(seen) == 20
    assert set(seen) == set(futures)
    assert sorted(client.gather(seen)) == list(range(1, 21))


def test_as_completed_gives_quick_ones_first(client: Client, tmp_path: Path) -> None:
    slow = client.submit(gate, str(tmp_path / "go"))
    quick = client.submit(inc, 1)
    waiting = as_completed([slow, quick])
    assert next(waiting) is quick
    (tmp_path / "go").touch()
    assert next(waiting) is slow
    with pytest.raises(StopIteration):
        next(waiting)


def test_as_completed_reports_before_all_are_done(client: Client, tmp_path: Path) -> None:
    futures = client.map(inc, range(10))
    futures.append(client.submit(gate, str(tmp_path / "go"), 0))
    waiting = as_completed(futures)
    first = [next(waiting).result() for _ in range(10)]
    assert sorted(first) == list(range(1, 11))
    (tmp_path / "go").touch()
    assert [future.result() for future in waiting] == [0]


def test_as_completed_gives_errors_too(client: Client) -> None:
    futures = [client.submit(div, 1, 0), client.submit(inc, 1)]
    assert {future.status for future in as_completed(futures)} == {"error", "finished"}


def test_as_completed_of_nothing_ends(client: Client) -> None:
    assert list(as_completed([])) == []
    assert list(as_completed()) == []


def test_futures_can_be_added(client: Client) -> None:
    waiting = as_completed(client.map(inc, range(3)))
    results = []
    for future in waiting:
        result = future.result()
        results.append(result)
        if result < 20:
            waiting.add(client.submit(inc, result + 10))
    assert sorted(results) == [1, 2, 3, 12, 13, 14, 23, 24, 25]


def test_futures_can_be_added_in_number(client: Client) -> None:
    waiting = as_completed([client.submit(inc, 0)])
    waiting.update(client.map(inc, range(10, 15)))
    assert sorted(future.result() for future in waiting) == [1, 11, 12, 13, 14, 15]


def test_futures_can_be_added_when_it_had_ended(client: Client) -> None:
    waiting = as_completed(client.map(inc, range(2)))
    assert len(list(waiting)) == 2
    waiting.add(client.submit(inc, 5))
    assert [future.result() for future in waiting] == [6]


def test_a_future_added_twice_comes_twice(client: Client) -> None:
    future = client.submit(inc, 1)
    assert list(as_completed([future, future])) == [future, future]


def test_futures_of_one_key_all_come(client: Client) -> None:
    futures = [client.submit(inc, 1) for _ in range(3)]
    assert set(as_completed(futures)) == set(futures)


@pytest.mark.parametrize("wrong", [1, [1], "text"])
def test_only_futures_can_be_added(client: Client, wrong: Any) -> None:
    with pytest.raises(TypeError):
        as_completed().add(wrong)


def test_as_completed_may_bring_results(client: Client) -> None:
    futures = client.map(inc, range(5))
    for future, result in as_completed(futures, with_results=True):
        assert result == future.result()


def test_results_of_as_completed_raise_errors(client: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        list(as_completed([client.submit(div, 1, 0)], with_results=True))


def test_results_of_as_completed_may_be_errors(client: Client) -> None:
    futures = [client.submit(fail, "one"), client.submit(inc, 1)]
    found = dict(as_completed(futures, with_results=True, raise_errors=False))
    assert found[futures[1]] == 2
    kind, error, _ = found[futures[0]]
    assert kind is ValueError
    assert str(error) == "one"


def test_cancelled_futures_come_too(client: Client, tmp_path: Path) -> None:
    futures = [client.submit(gate, str(tmp_path / f"go{n}")) for n in range(3)]
    waiting = as_completed(futures)
    client.cancel(futures[1])
    assert next(waiting) is futures[1]
    for n in range(3):
        (tmp_path / f"go{n}").touch()
    assert set(waiting) == {futures[0], futures[2]}


def test_results_of_cancelled_futures_are_errors(client: Client, tmp_path: Path) -> None:
    future = client.submit(gate, str(tmp_path / "go"))
    waiting = as_completed([future], with_results=True)
    future.cancel()
    _, result = next(waiting)
    assert isinstance(result, CancelledError)
    (tmp_path / "go").touch()


def test_as_completed_times_out(client: Client, tmp_path: Path) -> None:
    future = client.submit(gate, str(tmp_path / "go"))
    with pytest.raises(TimeoutError):
        next(as_completed([future], timeout=0.05))
    (tmp_path / "go").touch()
    wait(future)


def test_as_completed_counts(client: Client, tmp_path: Path, wait_until: Any) -> None:
    waiting = as_completed()
    assert waiting.is_empty()
    assert not waiting.has_ready()
    waiting.add(client.submit(gate, str(tmp_path / "go")))
    assert waiting.count() == 1
    assert not waiting.is_empty()
    assert not waiting.has_ready()
    (tmp_path / "go").touch()
    wait_until(waiting.has_ready)
    assert waiting.count() == 1
    next(waiting)
    assert waiting.is_empty()


def test_as_completed_gives_batches(client: Client) -> None:
    batches = list(as_completed(client.map(inc, range(30)), with_results=True).batches())
    assert sorted(result for batch in batches for _, result in batch) == list(range(1, 31))
    assert all(batches)


def test_next_batch_may_be_empty(client: Client, tmp_path: Path, wait_until: Any) -> None:
    waiting = as_completed([client.submit(gate, str(tmp_path / "go"), 3)])
    assert waiting.next_batch(block=False) == []
    (tmp_path / "go").touch()
    wait_until(waiting.has_ready)
    assert client.gather(waiting.next_batch(block=False)) == [3]


def test_as_completed_can_be_cleared(client: Client) -> None:
    waiting = as_completed(client.map(inc, range(3)))
    waiting.clear()
    assert waiting.is_empty()
    assert list(waiting) == []


def test_as_completed_has_a_repr(client: Client) -> None:
    futures = client.map(inc, range(3))
    wait(futures)
    assert "waiting" in repr(as_completed(futures))


def test_results_come_one_by_one_from_one_worker_queue(client: Client) -> None:
    """The first results of many slow tasks are there long before the last."""
    futures = client.map(slow_inc, range(20), delay_s=0.01)
    waiting = as_completed(futures)
    next(waiting)
    assert sum(future.done() for future in futures) < 20
    assert len(list(waiting)) == 19


def test_an_error_is_seen_while_others_run(client: Client, tmp_path: Path) -> None:
    slow = client.submit(gate, str(tmp_path / "go"))
    bad = client.submit(slow_fail, 0.01)
    assert next(as_completed([slow, bad])) is bad
    (tmp_path / "go").touch()
    wait(slow)


def test_wait_with_a_timeout_that_suffices(client: Client) -> None:
    start = time.monotonic()
    wait(client.map(identity, range(3)), timeout=20)
    assert time.monotonic() - start < 10


async def test_wait_is_awaitable(c: Any) -> None:
    futures = c.map(inc, range(5))
    done, not_done = await wait(futures)
    assert done == set(futures)
    assert not_done == set()


async def test_wait_for_the_first_is_awaitable(c: Any, tmp_path: Path) -> None:
    slow, quick = c.submit(gate, str(tmp_path / "go")), c.submit(inc, 1)
    done, not_done = await wait([slow, quick], return_when="FIRST_COMPLETED")
    assert (done, not_done) == ({quick}, {slow})
    (tmp_path / "go").touch()
    await slow


async def test_an_awaited_wait_times_out(c: Any, tmp_path: Path) -> None:
    future = c.submit(gate, str(tmp_path / "go"))
    with pytest.raises(TimeoutError):
        await wait(future, timeout=0.05)
    (tmp_path / "go").touch()
    await future


async def test_as_completed_is_an_async_iterator(c: Any) -> None:
    results = []
    waiting = as_completed(c.map(inc, range(5)))
    async for future in waiting:
        result = await future
        results.append(result)
        if result < 3:
            waiting.add(c.submit(inc, result + 100))
    assert sorted(results) == [1, 2, 3, 4, 5, 102, 103]


async def test_async_as_completed_brings_results(c: Any) -> None:
    found = [pair async for pair in as_completed(c.map(inc, range(4)), with_results=True)]
    assert sorted(result for _, result in found) == [1, 2, 3, 4]


async def test_async_as_completed_times_out(c: Any, tmp_path: Path) -> None:
    future = c.submit(gate, str(tmp_path / "go"))
    with pytest.raises(TimeoutError):
        async for _ in as_completed([future], timeout=0.05):
            pass
    (tmp_path / "go").touch()
    await future
