"""Lock, MultiLock, Semaphore and Event, between clients and inside tasks."""

from __future__ import annotations

import pickle
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Event, Lock, MultiLock, Semaphore, wait, worker_client

from tests.dask.client_tasks import inc


def fresh(kind: str) -> str:
    """A name that no other test uses."""
    return f"{kind}-{uuid.uuid4().hex}"


def test_a_lock_is_held_by_one(client: Client) -> None:
    name = fresh("lock")
    first, second = Lock(name), Lock(name)
    assert first.acquire()
    assert first.locked()
    assert second.locked()
    assert second.acquire(blocking=False) is False
    assert second.acquire(timeout=0.05) is False
    first.release()
    assert second.acquire(timeout=5)
    second.release()
    assert not first.locked()


def test_a_lock_is_a_context(client: Client) -> None:
    lock = Lock(fresh("lock"))
    with lock:
        assert lock.locked()
    assert not lock.locked()


def test_a_lock_that_is_not_held_cannot_be_released(client: Client) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        Lock(fresh("lock")).release()


def test_a_lock_without_waiting_has_no_timeout(client: Client) -> None:
    with pytest.raises(ValueError, match="timeout"):
        Lock(fresh("lock")).acquire(blocking=False, timeout=1)


@pytest.mark.parametrize("timeout", ["50ms", 0.05])
def test_a_locks_timeout_may_be_text(client: Client, timeout: Any) -> None:
    name = fresh("lock")
    with Lock(name):
        assert Lock(name).acquire(timeout=timeout) is False


def test_locks_of_different_names_are_apart(client: Client) -> None:
    with Lock(fresh("lock")), Lock(fresh("lock")), Lock():
        pass


def test_a_lock_is_shared_between_clients(client: Client, other: Client) -> None:
    name = fresh("lock")
    mine = Lock(name)
    assert mine.acquire()
    with other.as_current():
        theirs = Lock(name)
        assert theirs.acquire(timeout=0.05) is False
    mine.release()


def test_a_waiter_gets_the_lock_when_it_is_released(client: Client) -> None:
    name = fresh("lock")
    first = Lock(name)
    first.acquire()
    got = threading.Event()

    def take() -> None:
        with Lock(name):
            got.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not got.wait(0.05)
    first.release()
    assert got.wait(10)
    thread.join()


def test_tasks_exclude_each_other(client: Client, tmp_path: Path) -> None:
    name = fresh("lock")

    def alone(n: int) -> bool:
        with Lock(name):
            path = tmp_path / "inside"
            path.open("x").close()
            time.sleep(0.002)
            path.unlink()
        return True

    assert all(client.gather(client.map(alone, range(8))))


def test_a_lock_can_be_sent_to_tasks(client: Client) -> None:
    lock = Lock(fresh("lock"))

    def use(lock: Lock, n: int) -> int:
        with lock:
            return n

    assert client.gather([client.submit(use, lock, n) for n in range(4)]) == [0, 1, 2, 3]


def test_a_lock_can_be_pickled(client: Client) -> None:
    lock = Lock(fresh("lock"))
    again = pickle.loads(pickle.dumps(lock))
    assert again.name == lock.name
    with again:
        assert lock.locked()


def test_a_task_waits_for_a_lock_of_the_client(client: Client) -> None:
    name = fresh("lock")
    lock = Lock(name)
    lock.acquire()

    def take() -> str:
        with Lock(name):
            return "taken"

    future = client.submit(take)
    time.sleep(0.05)
    assert not future.done()
    lock.release()
    assert future.result(timeout=15) == "taken"


async def test_a_lock_is_awaitable(c: Any) -> None:
    name = fresh("lock")
    lock = Lock(name)
    assert await lock.acquire()
    assert await Lock(name).acquire(timeout=0.05) is False
    await lock.release()
    async with lock:
        assert await lock.locked()
    assert not await lock.locked()


def test_a_multilock_takes_all_its_names(client: Client) -> None:
    names = [fresh("multi") for _ in range(3)]
    lock = MultiLock(names=names)
    assert lock.acquire()
    assert lock.locked()
    assert MultiLock(names=names[:1]).acquire(timeout=0.05) is False
    assert MultiLock(names=[names[2], fresh("multi")]).acquire(timeout=0.05) is False
    lock.release()
    second = MultiLock(names=names[1:])
    assert second.acquire(timeout=5)
    second.release()


def test_multilocks_of_other_names_do_not_wait(client: Client) -> None:
    with MultiLock(names=[fresh("multi")]), MultiLock(names=[fresh("multi"), fresh("multi")]):
        pass


def test_a_multilock_may_take_some_of_its_names(client: Client) -> None:
    names = [fresh("multi") for _ in range(3)]
    first, second = MultiLock(names=names), MultiLock(names=names)
    assert first.acquire(num_locks=2)
    assert second.acquire(num_locks=1, timeout=5)
    first.release()
    second.release()


def test_a_multilock_that_is_not_held_cannot_be_released(client: Client) -> None:
    with pytest.raises(ValueError, match="not yet acquired"):
        MultiLock(names=[fresh("multi")]).release()


def test_multilocks_exclude_tasks(client: Client, tmp_path: Path) -> None:
    names = [fresh("multi") for _ in range(2)]

    def alone(n: int) -> int:
        with MultiLock(names=names if n % 2 else names[:1]):
            path = tmp_path / "inside"
            path.open("x").close()
            time.sleep(0.002)
            path.unlink()
        return n

    assert client.gather(client.map(alone, range(6))) == list(range(6))


async def test_a_multilock_is_awaitable(c: Any) -> None:
    names = [fresh("multi")]
    async with MultiLock(names=names):
        assert await MultiLock(names=names).acquire(timeout=0.05) is False


def test_a_semaphore_gives_so_many_leases(client: Client) -> None:
    semaphore = Semaphore(max_leases=2, name=fresh("semaphore"))
    assert semaphore.acquire()
    assert semaphore.get_value() == 1
    assert semaphore.acquire()
    assert semaphore.get_value() == 2
    assert semaphore.acquire(timeout=0.05) is False
    semaphore.release()
    assert semaphore.acquire(timeout=5)
    semaphore.release()
    semaphore.release()
    assert semaphore.get_value() == 0


def test_a_semaphore_is_a_context(client: Client) -> None:
    semaphore = Semaphore(max_leases=1, name=fresh("semaphore"))
    with semaphore:
        assert semaphore.get_value() == 1
    assert semaphore.get_value() == 0


def test_a_semaphore_cannot_be_released_too_often(client: Client) -> None:
    with pytest.raises(RuntimeError, match="too often"):
        Semaphore(name=fresh("semaphore")).release()


def test_a_semaphore_bounds_tasks(client: Client, tmp_path: Path) -> None:
    semaphore = Semaphore(max_leases=1, name=fresh("semaphore"))

    def use(n: int, semaphore: Semaphore) -> int:
        with semaphore:
            path = tmp_path / "inside"
            path.open("x").close()
            time.sleep(0.002)
            path.unlink()
        return n

    futures = client.map(use, range(6), semaphore=semaphore)
    assert client.gather(futures) == list(range(6))
    assert semaphore.get_value() == 0


def test_a_closed_semaphore_is_unknown(client: Client) -> None:
    semaphore = Semaphore(name=fresh("semaphore"))
    with semaphore:
        pass
    semaphore.close()
    with pytest.raises(RuntimeError):
        semaphore.acquire(timeout=1)


def test_a_semaphore_can_be_pickled(client: Client) -> None:
    semaphore = Semaphore(max_leases=3, name=fresh("semaphore"))
    again = pickle.loads(pickle.dumps(semaphore))
    assert again.name == semaphore.name
    assert again.max_leases == 3
    with again:
        assert semaphore.get_value() == 1


async def test_a_semaphore_is_awaitable(c: Any) -> None:
    semaphore = await Semaphore(max_leases=1, name=fresh("semaphore"))
    assert await semaphore.acquire()
    assert await semaphore.acquire(timeout=0.05) is False
    assert await semaphore.release()
    async with semaphore:
        assert await semaphore.get_value() == 1


def test_an_event_is_set_and_cleared(client: Client) -> None:
    name = fresh("event")
    event = Event(name)
    assert not event.is_set()
    assert event.wait(timeout=0.05) is False
    event.set()
    assert event.is_set()
    assert Event(name).wait(timeout=5) is True
    event.clear()
    assert not Event(name).is_set()


def test_an_event_wakes_all_waiters(client: Client) -> None:
    name = fresh("event")
    woken = []

    def sleeper(n: int) -> None:
        if Event(name).wait(timeout=15):
            woken.append(n)

    threads = [threading.Thread(target=sleeper, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.03)
    assert woken == []
    Event(name).set()
    for thread in threads:
        thread.join()
    assert sorted(woken) == [0, 1, 2]


def test_an_event_is_shared_between_clients(client: Client, other: Client) -> None:
    name = fresh("event")
    Event(name, client=client).set()
    assert Event(name, client=other).wait(timeout=5)


def test_a_task_waits_for_the_clients_event(client: Client) -> None:
    name = fresh("event")

    def sleeper() -> bool:
        return Event(name).wait(timeout=15)

    future = client.submit(sleeper)
    time.sleep(0.03)
    assert not future.done()
    Event(name).set()
    assert future.result(timeout=15) is True


def test_a_task_waits_for_another_tasks_event(client: Client) -> None:
    name = fresh("event")

    def sleeper() -> bool:
        return Event(name).wait(timeout=15)

    def setter() -> str:
        Event(name).set()
        return "set"

    futures = [client.submit(sleeper), client.submit(setter)]
    assert client.gather(futures) == [True, "set"]


def test_a_waiter_and_its_setter_may_be_in_one_graph(client: Client) -> None:
    """A strand that waits must not hold back the task that would wake it."""
    name = fresh("event")

    def step(n: int) -> int:
        if n == 0:
            assert Event(name).wait(timeout=15)
        if n == 9:
            Event(name).set()
        return n

    assert client.gather(client.map(step, range(10))) == list(range(10))


def test_tasks_wake_the_client(client: Client) -> None:
    name = fresh("event")
    future = client.submit(lambda: Event(name).set())
    assert Event(name).wait(timeout=10)
    wait(future)


def test_an_event_can_be_sent_to_a_task(client: Client) -> None:
    event = Event(fresh("event"))
    client.submit(lambda event: event.set(), event).result()
    assert event.is_set()


async def test_an_event_is_awaitable(c: Any) -> None:
    event = await Event(fresh("event"))
    assert await event.wait(timeout=0.05) is False
    await event.set()
    assert await event.wait(timeout=5)
    await event.clear()
    assert not await event.is_set()


def test_a_lock_works_in_a_task_with_a_client(client: Client) -> None:
    name = fresh("lock")

    def nested(n: int) -> int:
        with worker_client() as here, Lock(name):
            return here.submit(inc, n).result()

    assert client.gather(client.map(nested, range(3))) == [1, 2, 3]
