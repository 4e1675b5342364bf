"""Variable, Queue and published datasets: what clients share."""

from __future__ import annotations

import pickle
import time
import uuid
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import pytest
from distributed import Client, Future, Queue, Variable, futures_of, get_client, wait

from tests.dask.client_tasks import div, gate, inc, slow_inc


def fresh(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


@pytest.mark.parametrize(
    "value", [1, "text", None, 1.5, True, [1, 2], {"a": 1}], ids=lambda value: repr(value)
)
def test_a_variable_holds_a_value(client: Client, value: Any) -> None:
    variable = Variable(fresh("variable"))
    variable.set(value)
    assert variable.get() == (value if not isinstance(value, list) else tuple(value)) or (
        list(variable.get()) == value
    )


def test_a_variable_holds_the_last_value(client: Client) -> None:
    variable = Variable(fresh("variable"))
    for n in range(5):
        variable.set(n)
    assert variable.get() == 4


def test_a_variable_holds_a_future(client: Client) -> None:
    variable = Variable(fresh("variable"))
    x = client.submit(inc, 1)
    variable.set(x)
    y = variable.get()
    assert isinstance(y, Future)
    assert y.key == x.key
    assert y.result() == 2


def test_a_variable_keeps_its_future_alive(client: Client) -> None:
    variable = Variable(fresh("variable"))
    variable.set(client.submit(inc, 1, key=fresh("kept")))
    time.sleep(0.02)
    assert variable.get(timeout=10).result(timeout=10) == 2


def test_a_variable_hands_a_future_to_another_client(client: Client, other: Client) -> None:
    name = fresh("variable")
    Variable(name, client=client).set(client.submit(inc, 10))
    future = Variable(name, client=other).get()
    assert future.client is other
    assert future.result() == 11
    assert other.submit(inc, future).result() == 12


def test_a_variable_holds_pending_futures(client: Client, other: Client, tmp_path: Path) -> None:
    name = fresh("variable")
    Variable(name, client=client).set(client.submit(gate, str(tmp_path / "go"), 5))
    future = Variable(name, client=other).get()
    assert future.status == "pending"
    (tmp_path / "go").touch()
    assert future.result() == 5


def test_a_variable_holds_failed_futures(client: Client, other: Client) -> None:
    name = fresh("variable")
    x = client.submit(div, 1, 0)
    wait(x)
    Variable(name, client=client).set(x)
    future = Variable(name, client=other).get()
    with pytest.raises(ZeroDivisionError):
        future.result()


@pytest.mark.parametrize("timeout", [0.05, "50ms"])
def test_a_variable_that_is_not_set_times_out(client: Client, timeout: Any) -> None:
    with pytest.raises(TimeoutError):
        Variable(fresh("variable")).get(timeout=timeout)


def test_a_variable_is_waited_for(client: Client) -> None:
    name = fresh("variable")
    future = client.submit(lambda: Variable(name).get(timeout=15))
    time.sleep(0.02)
    Variable(name).set(7)
    assert future.result(timeout=15) == 7


def test_a_deleted_variable_is_not_set(client: Client, wait_until: Any) -> None:
    variable = Variable(fresh("variable"))
    variable.set(1)
    variable.delete()

    def is_gone() -> bool:
        try:
            variable.get(timeout=0.02)
        except TimeoutError:
            return True
        return False

    wait_until(is_gone)


def test_a_variable_without_a_name_gets_one(client: Client) -> None:
    first, second = Variable(), Variable()
    assert first.name != second.name
    first.set(1)
    assert Variable(first.name).get() == 1


def test_tasks_read_and_set_variables(client: Client) -> None:
    name = fresh("variable")
    client.submit(lambda: Variable(name).set(11)).result()
    assert client.submit(lambda: Variable(name).get(timeout=5) + 1).result() == 12


def test_a_variable_can_be_sent_to_a_task(client: Client) -> None:
    variable = Variable(fresh("variable"))
    variable.set(20)
    assert client.submit(lambda v: v.get(timeout=5) + 1, variable).result() == 21


def test_a_variable_can_be_pickled(client: Client) -> None:
    variable = Variable(fresh("variable"))
    variable.set(1)
    assert pickle.loads(pickle.dumps(variable)).get() == 1


async def test_a_variable_is_awaitable(c: Any) -> None:
    variable = Variable(fresh("variable"))
    await variable.set(c.submit(inc, 1))
    assert await (await variable.get()) == 2
    with pytest.raises(TimeoutError):
        await Variable(fresh("variable")).get(timeout=0.05)


def test_a_queue_is_first_in_first_out(client: Client) -> None:
    queue = Queue(fresh("queue"))
    for n in range(5):
        queue.put(n)
    assert queue.qsize() == 5
    assert [queue.get() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert queue.qsize() == 0


def test_a_queue_holds_futures(client: Client) -> None:
    queue = Queue(fresh("queue"))
    x = client.submit(inc, 1)
    queue.put(x)
    y = queue.get()
    assert isinstance(y, Future)
    assert y.result() == 2


def test_a_queue_keeps_its_futures_alive(client: Client) -> None:
    queue = Queue(fresh("queue"))
    queue.put(client.submit(inc, 1, key=fresh("kept")))
    time.sleep(0.02)
    assert queue.get(timeout=10).result(timeout=10) == 2


def test_a_queue_hands_futures_to_another_client(client: Client, other: Client) -> None:
    name = fresh("queue")
    queue = Queue(name, client=client)
    for future in client.map(inc, range(3)):
        queue.put(future)
    theirs = Queue(name, client=other)
    assert other.gather([theirs.get() for _ in range(3)]) == [1, 2, 3]


def test_a_queue_holds_failed_futures(client: Client) -> None:
    queue = Queue(fresh("queue"))
    x = client.submit(div, 1, 0)
    wait(x)
    queue.put(x)
    with pytest.raises(ZeroDivisionError):
        queue.get().result()


@pytest.mark.parametrize("timeout", [0.05, "50ms"])
def test_an_empty_queue_times_out(client: Client, timeout: Any) -> None:
    with pytest.raises(TimeoutError):
        Queue(fresh("queue")).get(timeout=timeout)


def test_a_full_queue_times_out(client: Client) -> None:
    queue = Queue(fresh("queue"), maxsize=2)
    queue.put(1)
    queue.put(2)
    with pytest.raises(TimeoutError):
        queue.put(3, timeout=0.05)
    assert queue.get() == 1
    queue.put(3, timeout=5)
    assert [queue.get(), queue.get()] == [2, 3]


def test_a_queue_gives_batches(client: Client) -> None:
    queue = Queue(fresh("queue"))
    for n in range(6):
        queue.put(n)
    assert list(queue.get(batch=2)) == [0, 1]
    assert list(queue.get(batch=True)) == [2, 3, 4, 5]
    assert list(queue.get(batch=True)) == []


def test_a_queue_is_waited_for_by_a_task(client: Client) -> None:
    name = fresh("queue")
    future = client.submit(lambda: Queue(name).get(timeout=15))
    time.sleep(0.02)
    Queue(name).put("hello")
    assert future.result(timeout=15) == "hello"


def test_tasks_of_a_producer_and_a_consumer(client: Client) -> None:
    name = fresh("queue")

    def produce() -> int:
        for n in range(5):
            Queue(name).put(n)
        return 5

    def consume() -> int:
        return sum(Queue(name).get(timeout=15) for _ in range(5))

    assert client.gather([client.submit(consume), client.submit(produce)]) == [10, 5]


def test_a_task_may_put_futures_into_a_queue(client: Client) -> None:
    name = fresh("queue")

    def produce() -> None:
        here = get_client()
        future = here.submit(inc, 41)
        Queue(name).put(future)

    client.submit(produce).result(timeout=15)
    assert Queue(name).get(timeout=10).result(timeout=10) == 42


def test_a_queue_can_be_pickled(client: Client) -> None:
    queue = Queue(fresh("queue"))
    queue.put(1)
    assert pickle.loads(pickle.dumps(queue)).get() == 1


async def test_a_queue_is_awaitable(c: Any) -> None:
    queue = await Queue(fresh("queue"))
    await queue.put(c.submit(inc, 1))
    assert await queue.qsize() == 1
    assert await (await queue.get()) == 2
    with pytest.raises(TimeoutError):
        await queue.get(timeout=0.05)


def test_a_dataset_is_published_and_found(client: Client, other: Client) -> None:
    name = fresh("dataset")
    data = client.persist(dask.delayed(inc)(1))
    client.publish_dataset(data, name=name)
    assert name in client.list_datasets()
    assert name in other.list_datasets()
    assert other.get_dataset(name).compute(scheduler=other.get) == 2
    client.unpublish_dataset(name)
    assert name not in client.list_datasets()


def test_datasets_are_published_by_keyword(client: Client) -> None:
    client.publish_dataset(a_keyword_dataset=[1, 2, 3])
    assert list(client.get_dataset("a_keyword_dataset")) == [1, 2, 3]
    client.unpublish_dataset("a_keyword_dataset")


def test_a_published_collection_outlives_its_client(client: Client, cluster: Any) -> None:
    name = fresh("dataset")
    with Client(cluster, set_as_default=False) as short:
        value = short.persist(dask.delayed(inc)(20))
        wait(value)
        short.publish_dataset(value, name=name)
        del value
    assert client.get_dataset(name).compute() == 21
    client.unpublish_dataset(name)


def test_a_published_array_is_computed_by_others(client: Client, other: Client) -> None:
    name = fresh("dataset")
    x = client.persist(da.arange(100, chunks=10))
    client.publish_dataset(x, name=name)
    del x
    got = other.get_dataset(name)
    with other.as_current():
        assert got.sum().compute() == 4950
    client.unpublish_dataset(name)


def test_a_dataset_is_not_published_twice(client: Client) -> None:
    name = fresh("dataset")
    client.publish_dataset(1, name=name)
    with pytest.raises(KeyError, match="already exists"):
        client.publish_dataset(2, name=name)
    client.publish_dataset(3, name=name, override=True)
    assert client.get_dataset(name) == 3
    client.unpublish_dataset(name)


def test_an_unknown_dataset_is_named(client: Client) -> None:
    with pytest.raises(KeyError, match="no-such-dataset"):
        client.get_dataset("no-such-dataset")
    assert client.get_dataset("no-such-dataset", default=5) == 5


def test_datasets_are_a_mapping(client: Client) -> None:
    name = fresh("dataset")
    client.datasets[name] = client.submit(inc, 1)
    assert name in list(client.datasets)
    assert name in client.datasets
    assert client.datasets[name].result() == 2
    n_before = len(client.datasets)
    del client.datasets[name]
    assert len(client.datasets) == n_before - 1


def test_a_dataset_needs_a_name(client: Client) -> None:
    with pytest.raises(ValueError, match="name"):
        client.publish_dataset(name="x")


@pytest.mark.parametrize("name", ["text", 5, ("a", 1)], ids=repr)
def test_names_of_datasets_are_keys(client: Client, name: Any) -> None:
    client.publish_dataset([1], name=name)
    assert name in client.list_datasets()
    client.unpublish_dataset(name)
    assert name not in client.list_datasets()


def test_a_published_result_lives_until_it_is_unpublished(client: Client) -> None:
    name = fresh("dataset")
    future = client.submit(slow_inc, 1)
    wait(future)
    client.publish_dataset(future, name=name)
    del future
    time.sleep(0.02)
    assert client.get_dataset(name).result(timeout=10) == 2
    client.unpublish_dataset(name)


def test_published_futures_are_futures(client: Client) -> None:
    name = fresh("dataset")
    x = client.persist(da.ones(10, chunks=5))
    client.publish_dataset(x, name=name)
    assert len(futures_of(client.get_dataset(name))) == 2
    client.unpublish_dataset(name)


async def test_datasets_are_awaitable(c: Any) -> None:
    name = fresh("dataset")
    await c.publish_dataset(c.submit(inc, 1), name=name)
    assert name in await c.list_datasets()
    assert await (await c.get_dataset(name)) == 2
    await c.unpublish_dataset(name)
    with pytest.raises(KeyError):
        await c.get_dataset(name)
