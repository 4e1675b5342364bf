"""Sessions: graphs added to an open job, on real stores and executors."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from wukong.errors import JobCancelled
from wukong.executor.pool import ProcessPool
from wukong.executor.pool_threads import ThreadPool
from wukong.executor.serialize_failures import Failure, Raised
from wukong.executor.work import Policy
from wukong.scheduler.costs import Costs
from wukong.session import News, Session
from wukong.storage import Store, open_store
from wukong.storage.rows import TABLES

LONG_S = 20.0
"""Far more than anything here takes."""


def inc(x: int) -> int:
    return x + 1


def fail(x: object) -> None:
    raise ValueError(x)


def ones(n: int) -> Any:
    return np.ones(n)


def add_up(_: object, array: Any) -> int:
    return int(array.sum())


class Client:
    """A session, and what it has told."""

    def __init__(self, store: Store, invoker: ThreadPool | ProcessPool) -> None:
        self.store = store
        self.news: dict[int, object] = {}
        self._changed = threading.Condition()
        self.session = Session(store, invoker, n_workers=2, costs=Costs(), on_news=self._on_news)

    def _on_news(self, batch: Sequence[News]) -> None:
        with self._changed:
            for news in batch:
                assert self.news.keys().isdisjoint(news.values), "told twice"
                self.news.update((value, news.errors.get(value)) for value in news.values)
            self._changed.notify_all()

    def extend(self, graph: dict[str, Any], *keys: str, **known: int) -> list[int]:
        return self.session.extend(graph, keys, known)

    def wait(self, values: Sequence[int]) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: self.news.keys() >= set(values), LONG_S)
            assert done, f"no news of {set(values) - self.news.keys()}"

    def results(self, values: Sequence[int]) -> list[Any]:
        self.wait(values)
        return self.session.read(values)

    def rows(self) -> dict[str, list[str]]:
        """What the memory store has of the job, but for the job itself."""
        found = self.store.jobs._jobs[self.session.job]  # type: ignore[attr-defined]  # behind it
        ids = {table.code: [key for key, _ in found.scan(table)] for table in TABLES}
        return {code: keys for code, keys in ids.items() if keys and code != "j"}

    def wait_until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + LONG_S
        while not holds():
            assert time.monotonic() < end, "it has not come true"
            time.sleep(0.005)


@pytest.fixture
def client() -> Iterator[Client]:
    store = open_store("memory://")
    pool = ThreadPool(store, 2, Policy(absorb_bytes=0))
    client = Client(store, pool)
    yield client
    client.session.close()
    pool.close()
    assert store.jobs.jobs() == ()


def test_graphs_build_on_each_other(client: Client) -> None:
    (a,) = client.extend({"a": (inc, 1)}, "a")
    (b,) = client.extend({"b": (inc, "a")}, "b", a=a)
    c, a_again = client.extend({"c": (sum, ["a", "b"])}, "c", "a", a=a, b=b)
    assert a_again == a
    assert client.results([a, b, c]) == [2, 3, 5]


def test_a_constant_is_a_value_at_once(client: Client) -> None:
    (a,) = client.extend({"a": 7}, "a")
    assert client.session.read([a]) == [7]
    assert client.results(client.extend({"b": (inc, "a")}, "b", a=a)) == [8]


def test_scattered_values_are_inputs(client: Client) -> None:
    values = client.session.put([1, 2, np.ones(100_000)])
    assert client.session.read(values[:2]) == [1, 2]
    known = dict(zip("xyz", values, strict=True))
    (total,) = client.extend({"t": (sum, ["x", "y"])}, "t", **known)
    assert client.results([total]) == [3]
    client.session.release([*values, total])
    assert client.rows() == {"p": ["manifest"]}


def test_errors_are_values_and_take_dependents_with_them(client: Client) -> None:
    a, b, c = client.extend({"a": (fail, 1), "b": (inc, "a"), "c": (inc, 1)}, "a", "b", "c")
    (d,) = client.extend({"d": (inc, "b")}, "d", b=b)
    values = client.results([a, b, c, d])
    assert values[2] == 2
    for value in (values[0], values[1], values[3]):
        assert isinstance(value, Raised)
        assert isinstance(value.error, ValueError)
    assert [client.news[v] is not None for v in (a, b, c, d)] == [True, True, False, True]


def test_a_map_over_futures_takes_few_strands(client: Client) -> None:
    n = 2_000
    graph = {f"a{i}": (inc, i) for i in range(n)}
    known = dict(zip(graph, client.session.extend(graph, list(graph)), strict=True))
    graph = {f"b{i}": (inc, f"a{i}") for i in range(n)}
    second = client.session.extend(graph, list(graph), known)
    assert client.results(second) == [i + 2 for i in range(n)]
    assert client.session.counters().view.n_strands <= 2 * 10


def test_what_is_released_is_gone(client: Client) -> None:
    a, b = client.extend({"a": (inc, 1), "b": (inc, "a")}, "a", "b")
    client.wait([a, b])
    client.session.release([a])
    with pytest.raises(KeyError):
        client.session.read([a])
    assert client.results(client.extend({"c": (inc, "b")}, "c", b=b)) == [4]
    client.session.cancel([b, *client.news])
    assert client.session.counters().n_held == 0
    assert {code: keys for code, keys in client.rows().items() if code != "n"} == {
        "p": ["manifest"]
    }


def test_objects_are_let_go_one_by_one(client: Client) -> None:
    names = [f"a{i}" for i in range(64)]
    values = client.extend(dict.fromkeys(names, (ones, 10)), *names)
    kept = [weakref.ref(one) for one in client.results(values)]
    assert client.session.counters().view.n_strands < len(values) / 2
    client.session.release(values[::2])
    client.wait_until(lambda: [one() is None for one in kept] == [True, False] * 32)
    assert [one.sum() for one in client.session.read(values[1::2])] == [10] * 32


def test_an_object_is_kept_while_somebody_is_to_read_it(client: Client) -> None:
    gate = threading.Event()
    names = [f"a{i}" for i in range(64)]
    a, *others = client.extend(dict.fromkeys(names, (ones, 10)), *names)
    first = weakref.ref(client.results([a, *others])[0])
    wait = client.extend({"w": (gate.wait, LONG_S)}, "w")[0]
    (total,) = client.extend({"t": (add_up, "w", "a")}, "t", w=wait, a=a)
    client.session.release([a, wait])
    assert first() is not None
    gate.set()
    assert client.results([total]) == [10]
    client.wait_until(lambda: first() is None)


def test_a_value_pinned_twice_is_released_twice(client: Client) -> None:
    (a,) = client.extend({"a": (inc, 1)}, "a")
    client.session.extend({}, ["a"], {"a": a})
    client.wait([a])
    client.session.release([a])
    assert client.session.read([a]) == [2]
    client.session.release([a])
    with pytest.raises(KeyError):
        client.session.read([a])


def test_work_that_nobody_needs_is_dropped(client: Client) -> None:
    gate = threading.Event()
    begun: list[int] = []

    def wait(x: int) -> int:
        begun.append(x)
        gate.wait(LONG_S)
        return x

    running = client.extend({"a": (wait, 1)}, "a") + client.extend({"b": (wait, 2)}, "b")
    client.wait_until(lambda: len(begun) == 2)
    (c,) = client.extend({"c": (wait, 3)}, "c")
    (d,) = client.extend({"d": (wait, "c")}, "d", c=c)
    client.session.release([c])
    assert client.session.counters().n_work == 4
    client.session.release([d])
    client.session.cancel(running[:1])
    assert client.session.counters().n_work == 1
    gate.set()
    assert client.results(running[1:]) == [2]
    assert sorted(begun) == [1, 2]


def test_a_dropped_reader_leaves_what_others_hold(client: Client) -> None:
    go = threading.Event()

    def wait(x: int) -> int:
        assert go.wait(LONG_S)
        return x

    inputs = [client.extend({name: (wait, i)}, name)[0] for i, name in enumerate("abc")]
    reader = client.extend({"r": (max, "a", "b", "c")}, "r", **dict(zip("abc", inputs)))
    client.session.release(reader)
    go.set()
    assert client.results(inputs) == [0, 1, 2]


def test_an_input_that_is_not_held_is_refused(client: Client) -> None:
    (a,) = client.extend({"a": (inc, 1)}, "a")
    client.session.release([a])
    with pytest.raises(KeyError):
        client.extend({"b": (inc, "a")}, "b", a=a)


def test_an_end_that_nobody_asked_for_is_told(client: Client) -> None:
    gate = threading.Event()
    (a,) = client.extend({"a": (gate.wait, LONG_S)}, "a")
    client.store.jobs.cancel(client.session.job)
    client.wait([a])
    assert isinstance(client.news[a], Raised)
    with pytest.raises(JobCancelled):
        client.extend({"b": (inc, 1)}, "b")
    gate.set()


def test_nothing_grows_with_age(client: Client) -> None:
    for i in range(300):
        (value,) = client.extend({"a": (inc, i)}, "a")
        client.wait([value])
        client.session.release([value])
    client.wait_until(lambda: len(client.rows().get("n", [])) <= 1)
    assert client.session.counters().n_work == 0
    assert {code: len(keys) for code, keys in client.rows().items() if code != "n"} == {"p": 1}


def test_what_ended_in_errors_runs_again(client: Client) -> None:
    runs: list[str] = []

    def unlucky(name: str, *inputs: int) -> int:
        runs.append(name)
        if runs.count(name) == 1 and name in "BX":
            raise ValueError(name)
        return len(inputs) + sum(inputs)

    graph = {"a": (unlucky, "A"), "b": (unlucky, "B", "a"), "c": (unlucky, "C", "b")}
    a, b, c = client.extend(graph, "a", "b", "c")
    (x,) = client.extend({"x": (unlucky, "X", "c")}, "x", c=c)
    assert [isinstance(value, Raised) for value in client.results([a, b, c, x])] == [0, 1, 1, 1]
    del client.news[b], client.news[c], client.news[x]
    client.session.retry([b, c, x])
    assert isinstance(client.results([a, b, c, x])[3], Raised)
    del client.news[x]
    client.session.retry([x])
    assert client.results([a, b, c, x]) == [0, 1, 2, 3]
    assert runs.count("A") == 1
    client.session.release([a, b, c, x])
    assert client.session.counters().n_work == 0
    assert {code: ids for code, ids in client.rows().items() if code != "n"} == {"p": ["manifest"]}


@pytest.mark.slow
def test_results_are_told_of_while_their_strand_goes_on(client: Client) -> None:
    gate = threading.Event()

    def wait(i: int) -> int:
        if i == 8:
            gate.wait(LONG_S)
        return i

    client.session.extend({"first": (inc, 1)}, ["first"])
    values = client.session.extend(
        {f"w{i}": (wait, i) for i in range(12)}, [f"w{i}" for i in range(12)]
    )
    (after,) = client.extend({"after": (inc, "w2")}, "after", w2=values[2])
    others = [value for i, value in enumerate(values) if i != 8]
    assert client.results([*others, after]) == [i for i in range(12) if i != 8] + [3]
    assert values[8] not in client.news
    gate.set()
    assert client.results(values[8:9]) == [8]


@pytest.mark.slow
def test_a_task_may_wait_for_one_that_stands_behind_it(client: Client) -> None:
    gate = threading.Event()

    def wait_or_set(i: int) -> bool:
        if i == 39:
            gate.set()
        return gate.wait(LONG_S) if i == 0 else True

    graph = {f"w{i}": (wait_or_set, i) for i in range(40)}
    client.session.n_workers = 1
    (busy,) = client.extend({"busy": (lambda: time.sleep(0.8) or True,)}, "busy")
    assert client.results([*client.session.extend(graph, list(graph)), busy]) == [True] * 41


class Unreadable:
    """Cannot be unpickled."""

    def __init__(self) -> None:
        self.x = 1

    def __setstate__(self, state: object) -> None:
        raise TypeError("hello")


def make_unreadable() -> Unreadable:
    return Unreadable()


@pytest.fixture
def processes(tmp_path: Any) -> Iterator[Client]:
    url = f"local://{tmp_path}/store"
    store = open_store(url)
    assert store.blobs is not None
    pool = ProcessPool(url, 2, Policy(), store=store, folder=tmp_path)
    client = Client(store, pool)
    yield client
    client.session.close()
    pool.close()
    assert store.jobs.jobs() == ()
    store.jobs.close()
    store.blobs.close()


@pytest.mark.slow
def test_what_cannot_be_unpickled_is_an_error_of_what_reads_it(processes: Client) -> None:
    client = processes
    made, read, good = client.extend(
        {"made": (make_unreadable,), "read": (type, "made"), "good": (inc, 1)},
        *("made", "read", "good"),
    )
    (bad,) = client.extend({"bad": (type, Unreadable())}, "bad")
    client.wait([made, read, good, bad])
    failure = client.news[bad]
    assert isinstance(failure, Failure)
    assert (failure.type_name, failure.message) == ("builtins.TypeError", "hello")
    assert client.results([good]) == [2]
    assert client.session.counters().view.status == 1


@pytest.mark.slow
def test_lost_values_are_computed_again(processes: Client, tmp_path: Any) -> None:
    client, store = processes, processes.store
    assert store.blobs is not None
    a, b = client.extend({"a": (ones, 100_000), "b": (inc, "a")}, "a", "b")
    client.wait([a, b])
    (c,) = client.extend({"c": (fail, "b")}, "c", b=b)
    client.wait([c])
    for blob in list((tmp_path / "store" / "blobs").rglob("*")):
        if blob.is_file():
            blob.unlink()
    first, second, third = client.session.read([a, b, c])
    assert (first.sum(), second.sum()) == (100_000, 200_000)
    assert isinstance(third, Failure)
    assert client.session.counters().view.generation == 1
    client.session.release([a, b, c])
    client.wait_until(lambda: not store.blobs.used_bytes())


@pytest.mark.slow
def test_large_values_are_let_go_one_by_one(processes: Client) -> None:
    client, store = processes, processes.store
    assert store.blobs is not None
    names = [f"a{i}" for i in range(32)]
    values = client.extend(dict.fromkeys(names, (ones, 100000)), *names)
    client.wait(values)
    assert client.session.counters().view.n_strands < len(values) / 2
    used_bytes = store.blobs.used_bytes()
    client.session.release(values[::2])
    assert store.blobs.used_bytes() < 0.6 * used_bytes
    assert [one.sum() for one in client.session.read(values[1::2])] == [100_000] * 16
    client.session.release(values[1::2])
    client.wait_until(lambda: not store.blobs.used_bytes())


def test_inputs_outlive_a_reader_that_is_dropped(client: Client) -> None:
    gate = threading.Event()
    graph = {"x": (gate.wait, LONG_S)}
    [x] = client.extend(graph, "x")
    [y] = client.extend({"y": (inc, "x")}, "y", x=x)
    client.session.release([y])
    gate.set()
    assert client.results([x]) == [True]
    client.session.recover()
    assert client.session.read([x]) == [True]
