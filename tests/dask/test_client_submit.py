"""`Client.submit` and `Client.map`: arguments, keys, purity, order, errors in the call itself."""

from __future__ import annotations

import operator
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from distributed import Client, Future

from tests.dask.client_tasks import (
    add,
    async_inc,
    div,
    double,
    fail_first,
    identity,
    inc,
    leave_mark,
    mul,
    n_marks,
)


def test_submit_gives_a_future_of_the_result(client: Client) -> None:
    future = client.submit(inc, 10)
    assert isinstance(future, Future)
    assert future.result() == 11
    assert future.status == "finished"


def test_submit_takes_keywords(client: Client) -> None:
    assert client.submit(add, 1, y=2).result() == 3
    assert client.submit(add, x=5, y=2).result() == 7


def test_a_future_is_an_argument(client: Client) -> None:
    x = client.submit(inc, 10)
    y = client.submit(inc, x)
    assert client.submit(add, x, y=y).result() == 23


@pytest.mark.parametrize(
    ("shape", "result"),
    [
        (lambda f: [f, f], [2, 2]),
        (lambda f: {"a": f, "b": [f]}, {"a": 2, "b": [2]}),
        (lambda f: (f, 1), (2, 1)),
        (lambda f: [[f], {"x": (f, 0)}], [[2], {"x": (2, 0)}]),
        (lambda f: [1, 2], [1, 2]),
        (lambda f: {}, {}),
        (lambda f: [], []),
        (lambda f: {f"k{n}": f for n in range(3)}, {"k0": 2, "k1": 2, "k2": 2}),
    ],
    ids=["list", "dict", "tuple", "nested", "literal", "empty-dict", "empty-list", "wide"],
)
def test_futures_inside_containers_are_replaced(client: Client, shape: Any, result: Any) -> None:
    assert client.submit(identity, shape(client.submit(inc, 1))).result() == result


def test_futures_in_keyword_containers_are_replaced(client: Client) -> None:
    x, y = client.map(inc, [1, 2])
    assert client.submit(dict, a=[x, y], b={"x": x}).result() == {"a": [2, 3], "b": {"x": 2}}


def test_the_function_may_be_a_lambda(client: Client) -> None:
    assert client.submit(lambda a, b=1: a * b, 3, b=4).result() == 12


def test_the_function_may_be_a_closure(client: Client) -> None:
    factor = 7

    def times(x: int) -> int:
        return factor * x

    assert client.gather(client.map(times, range(3))) == [0, 7, 14]


@pytest.mark.parametrize(
    ("function", "arguments", "result"),
    [
        (partial(add, 1), (2,), 3),
        (operator.itemgetter(1), ([4, 5],), 5),
        (str.upper, ("a",), "A"),
        ([1, 2, 3].index, (2,), 1),
        (int, ("12",), 12),
        (np.sum, (np.arange(4),), 6),
    ],
    ids=["partial", "callable-object", "descriptor", "bound-method", "type", "numpy"],
)
def test_any_callable_can_be_submitted(
    client: Client, function: Any, arguments: Any, result: Any
) -> None:
    assert client.submit(function, *arguments).result() == result


def test_an_unhashable_function_can_be_submitted(client: Client) -> None:
    function = {"a": 1}.get
    assert client.submit(function, "a").result() == 1


def test_a_coroutine_function_is_awaited(client: Client) -> None:
    assert client.submit(async_inc, 1).result() == 2
    assert client.gather(client.map(async_inc, range(3))) == [1, 2, 3]


@pytest.mark.parametrize("call", ["submit", "map"])
def test_what_is_not_callable_is_refused(client: Client, call: str) -> None:
    with pytest.raises(TypeError):
        getattr(client, call)(1, [2])


def test_pure_calls_with_equal_arguments_are_one_task(client: Client, tmp_path: Path) -> None:
    x = client.submit(leave_mark, str(tmp_path))
    y = client.submit(leave_mark, str(tmp_path))
    assert x.key == y.key
    assert client.gather([x, y]) == ["mark", "mark"]
    assert n_marks(tmp_path) == 1


def test_impure_calls_are_tasks_of_their_own(client: Client, tmp_path: Path) -> None:
    futures = [client.submit(leave_mark, str(tmp_path), pure=False) for _ in range(3)]
    assert len({future.key for future in futures}) == 3
    client.gather(futures)
    assert n_marks(tmp_path) == 3


def test_map_may_be_impure(client: Client, tmp_path: Path) -> None:
    futures = client.map(leave_mark, [str(tmp_path)] * 3, pure=False)
    client.gather(futures)
    assert len({future.key for future in futures}) == 3
    assert n_marks(tmp_path) == 3


def test_pure_map_runs_equal_arguments_once(client: Client, tmp_path: Path) -> None:
    client.gather(client.map(leave_mark, [str(tmp_path)] * 3))
    assert n_marks(tmp_path) == 1


def test_equal_calls_have_equal_keys(client: Client) -> None:
    assert client.submit(inc, 1).key == client.submit(inc, 1).key
    assert client.submit(inc, 1).key != client.submit(inc, 2).key
    assert client.submit(add, 1, y=2).key != client.submit(add, 1, y=3).key


def test_keys_name_the_function(client: Client) -> None:
    assert client.submit(inc, 1).key.startswith("inc-")
    assert all(future.key.startswith("inc-") for future in client.map(inc, range(3)))


@pytest.mark.parametrize("key", ["a-key-of-mine", ("block", 0, 1), ("x", 5)])
def test_submit_takes_a_key(client: Client, key: Any) -> None:
    future = client.submit(inc, 1, key=key)
    assert future.key == key
    assert future.result() == 2


def test_map_takes_a_prefix_or_all_keys(client: Client) -> None:
    assert all(f.key.startswith("INC-") for f in client.map(inc, range(3), key="INC"))
    named = client.map(inc, range(3), key=["inc-0", "inc-1", "inc-2"])
    assert [f.key for f in named] == ["inc-0", "inc-1", "inc-2"]
    assert client.gather(named) == [1, 2, 3]


def test_a_key_that_lives_is_not_computed_again(client: Client) -> None:
    x = client.submit(inc, 1, key="lives")
    assert x.result() == 2
    y = client.submit(inc, 100, key="lives")
    assert y.result() == 2


def test_a_released_key_can_be_used_anew(client: Client, wait_until: Any) -> None:
    x = client.submit(inc, 1, key="used-anew")
    assert x.result() == 2
    del x
    wait_until(lambda: "used-anew" not in client.futures)
    assert client.submit(inc, 100, key="used-anew").result() == 101


def test_map_keeps_the_order(client: Client) -> None:
    assert client.gather(client.map(inc, range(100))) == list(range(1, 101))


def test_map_takes_several_sequences(client: Client) -> None:
    assert client.gather(client.map(add, range(5), range(5))) == [0, 2, 4, 6, 8]


def test_map_ends_with_the_shortest_sequence(client: Client) -> None:
    assert client.gather(client.map(add, [1, 2, 3], [10, 20])) == [11, 22]


def test_map_passes_keywords_to_each_call(client: Client) -> None:
    assert client.gather(client.map(add, range(3), y=10)) == [10, 11, 12]


def test_a_keyword_of_map_may_be_a_future(client: Client) -> None:
    y = client.submit(inc, 9)
    assert client.gather(client.map(add, range(3), y=y)) == [10, 11, 12]


def test_map_takes_futures_and_values_mixed(client: Client) -> None:
    x = client.submit(inc, 0)
    assert client.gather(client.map(add, [x, 5, x], [1, x, x])) == [2, 6, 2]


def test_map_of_nothing_is_nothing(client: Client) -> None:
    assert client.map(inc, []) == []
    assert client.gather([]) == []


def test_map_refuses_iterators_and_queues(client: Client) -> None:
    with pytest.raises(TypeError):
        client.map(inc, iter([1, 2]))
    with pytest.raises(TypeError):
        client.map(inc, Queue())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_map_in_batches_gives_the_same(client: Client, batch_size: int) -> None:
    assert client.gather(client.map(inc, range(10), batch_size=batch_size)) == list(range(1, 11))


def test_map_in_batches_takes_keys(client: Client) -> None:
    keys = [f"batched-{n}" for n in range(7)]
    futures = client.map(inc, range(7), batch_size=2, key=keys)
    assert [f.key for f in futures] == keys
    assert client.gather(futures) == list(range(1, 8))


def test_map_of_futures_is_a_pipeline(client: Client) -> None:
    futures = client.map(inc, range(10))
    for _ in range(5):
        futures = client.map(double, futures)
    assert client.submit(sum, futures).result() == 32 * sum(range(1, 11))


def test_a_task_may_read_many_futures(client: Client) -> None:
    assert client.submit(sum, client.map(inc, range(500))).result() == sum(range(1, 501))


def test_a_tree_of_futures_is_reduced(client: Client) -> None:
    level = client.map(inc, range(16))
    while len(level) > 1:
        level = client.map(add, level[::2], level[1::2])
    assert level[0].result() == sum(range(1, 17))


def test_a_long_chain_of_futures_ends(client: Client) -> None:
    future = client.submit(inc, 0)
    for _ in range(100):
        future = client.submit(inc, future)
    assert future.result() == 101


def test_retries_run_a_failing_task_again(client: Client, tmp_path: Path) -> None:
    assert client.submit(fail_first, str(tmp_path), 2, retries=2).result() == 1
    assert n_marks(tmp_path, "run") == 3


def test_too_few_retries_give_the_last_error(client: Client, tmp_path: Path) -> None:
    future = client.submit(fail_first, str(tmp_path), 5, retries=2)
    with pytest.raises(ZeroDivisionError, match="run 3"):
        future.result()
    assert n_marks(tmp_path, "run") == 3


def test_map_retries_each_task(client: Client, tmp_path: Path) -> None:
    folders = [tmp_path / str(n) for n in range(3)]
    for folder in folders:
        folder.mkdir()
    futures = client.map(fail_first, [str(folder) for folder in folders], n_failures=1, retries=1)
    assert client.gather(futures) == [1, 1, 1]
    assert [n_marks(folder, "run") for folder in folders] == [2, 2, 2]


def test_without_retries_a_task_runs_once(client: Client, tmp_path: Path) -> None:
    assert client.submit(fail_first, str(tmp_path), 1).exception() is not None
    assert n_marks(tmp_path, "run") == 1


@pytest.mark.parametrize("priority", [-5, 0, 10])
def test_priority_is_taken(client: Client, priority: int) -> None:
    assert client.submit(inc, 1, priority=priority, key=f"priority-{priority}").result() == 2
    assert client.gather(client.map(inc, range(3), priority=priority)) == [1, 2, 3]


def test_allow_other_workers_needs_workers(client: Client) -> None:
    with pytest.raises(ValueError, match="workers"):
        client.submit(inc, 1, allow_other_workers=True)
    with pytest.raises(ValueError, match="workers"):
        client.map(inc, [1], allow_other_workers=True)


def test_allow_other_workers_must_be_a_bool(client: Client) -> None:
    with pytest.raises(TypeError):
        client.submit(inc, 1, allow_other_workers="yes")


def test_workers_of_map_must_be_a_list(client: Client) -> None:
    with pytest.raises(TypeError):
        client.map(inc, [1], workers=(1,))


def test_workers_that_may_be_others_do_not_stop_a_task(client: Client) -> None:
    future = client.submit(inc, 41, workers=["nobody-here"], allow_other_workers=True)
    assert future.result() == 42


def test_a_worker_of_the_cluster_may_be_asked_for(client: Client) -> None:
    address = next(iter(client.scheduler_info()["workers"]))
    assert client.submit(inc, 1, workers=[address], key="on-a-worker").result() == 2
    assert client.submit(inc, 1, workers=address, key="on-one-worker").result() == 2


def test_arguments_may_be_large(client: Client) -> None:
    array = np.arange(200_000, dtype="f8")
    with pytest.warns(UserWarning, match="[Ll]arge|MiB"):
        future = client.submit(np.sum, np.zeros(2_000_000))
    assert future.result() == 0
    assert client.submit(np.sum, array).result() == array.sum()


def test_arguments_that_cannot_be_pickled_are_refused_at_once(client: Client) -> None:
    import threading

    with pytest.raises((TypeError, RuntimeError)):
        client.submit(identity, threading.Lock(), key="not-picklable").result()


def test_many_submits_are_all_run(client: Client) -> None:
    futures = [client.submit(inc, n) for n in range(300)]
    assert client.gather(futures) == list(range(1, 301))


def test_an_error_takes_down_its_dependents_only(client: Client) -> None:
    bad = client.submit(div, 1, 0)
    worse = client.submit(inc, bad)
    worst = client.submit(add, worse, client.submit(inc, 1))
    good = client.submit(mul, client.submit(inc, 1), 3)
    assert good.result() == 6
    for future in (bad, worse, worst):
        with pytest.raises(ZeroDivisionError):
            future.result()
        assert future.status == "error"


def test_a_task_of_an_error_that_is_known_fails_too(client: Client) -> None:
    bad = client.submit(div, 1, 0)
    assert isinstance(bad.exception(), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        client.submit(inc, bad).result()


def test_strings_that_are_keys_elsewhere_stay_strings(client: Client) -> None:
    x = client.submit(inc, 1, key="a-name-of-a-key")
    assert x.result() == 2
    assert client.submit(identity, "a-name-of-another").result() == "a-name-of-another"


def test_none_is_a_result(client: Client) -> None:
    future = client.submit(identity, None)
    assert future.result() is None
    assert client.submit(identity, [future, None]).result() == [None, None]


def test_submit_before_and_after_a_failed_one(client: Client) -> None:
    futures = []
    for n in range(10):
        futures.append(client.submit(div, 10, n, key=f"division-{n}"))
    assert isinstance(futures[0].exception(), ZeroDivisionError)
    assert client.gather(futures[1:]) == [10 / n for n in range(1, 10)]
