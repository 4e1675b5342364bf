"""Collections: `compute`, `persist`, `get`, annotations, arrays, bags, frames, delayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from distributed import Client, Future, futures_of, wait

from tests.dask.client_tasks import (
    add,
    div,
    double,
    fail_first,
    gate,
    inc,
    leave_mark,
    n_marks,
)

dd = pytest.importorskip("dask.dataframe")


def test_compute_gives_futures(client: Client) -> None:
    x, y = delayed(inc)(1), delayed(inc)(2)
    futures = client.compute([x, y])
    assert all(isinstance(future, Future) for future in futures)
    assert client.gather(futures) == [2, 3]


def test_compute_of_one_collection_gives_one_future(client: Client) -> None:
    future = client.compute(delayed(add)(1, 2))
    assert isinstance(future, Future)
    assert future.result() == 3


def test_compute_may_wait(client: Client) -> None:
    assert client.compute(delayed(inc)(1), sync=True) == 2
    assert client.compute([delayed(inc)(1), delayed(inc)(2)], sync=True) == [2, 3]


def test_compute_leaves_other_values_alone(client: Client) -> None:
    future, number = client.compute([delayed(inc)(1), 5])
    assert future.result() == 2
    assert number == 5


def test_compute_of_arrays(client: Client) -> None:
    x = da.arange(100, chunks=10)
    total, mean = client.compute([x.sum(), x.mean()])
    assert total.result() == 4950
    assert mean.result() == 49.5
    assert (client.compute(x).result() == np.arange(100)).all()


def test_the_default_scheduler_is_the_client(client: Client) -> None:
    assert da.ones((20, 20), chunks=(10, 10)).sum().compute() == 400
    assert dask.compute(delayed(inc)(1), delayed(inc)(2)) == (2, 3)


def test_scheduler_of_a_call_goes_first(client: Client) -> None:
    assert delayed(inc)(1).compute(scheduler="sync") == 2
    assert delayed(inc)(1).compute(scheduler=client) == 2


def test_persist_keeps_the_type(client: Client) -> None:
    x = client.persist(da.ones((20, 20), chunks=(10, 10)))
    assert isinstance(x, da.Array)
    assert x.chunks == ((10, 10), (10, 10))
    assert len(futures_of(x)) == 4
    assert x.sum().compute() == 400


def test_persist_of_several_collections(client: Client) -> None:
    x, y = client.persist([delayed(inc)(1), delayed(inc)(2)])
    assert dask.compute(x, y) == (2, 3)


def test_persisted_results_are_not_computed_again(client: Client, tmp_path: Path) -> None:
    x = client.persist(delayed(leave_mark)(str(tmp_path)))
    assert x.compute() == "mark"
    assert client.compute(delayed(str.upper)(x)).result() == "MARK"
    assert n_marks(tmp_path) == 1


def test_persist_is_found_by_dask_persist(client: Client) -> None:
    (x,) = dask.persist(da.arange(10, chunks=5))
    assert len(futures_of(x)) == 2
    assert (x + 1).sum().compute() == 55


def test_futures_of_finds_them_all(client: Client) -> None:
    x = client.persist(delayed(inc)(1))
    y = client.submit(inc, 2)
    assert {future.key for future in futures_of([x, {"y": [y]}])} == {x.key, y.key}
    assert futures_of([1, 2]) == []


def test_a_future_is_an_input_of_a_delayed(client: Client) -> None:
    x = client.submit(inc, 1)
    assert delayed(double)(x).compute() == 4
    assert client.compute(delayed(sum)([x, x])).result() == 4


def test_futures_become_an_array(client: Client) -> None:
    futures = client.map(np.full, [5, 5], [1, 2])
    parts = [da.from_delayed(delayed(f), shape=(5,), dtype=int) for f in futures]
    assert da.concatenate(parts).sum().compute() == 15


def test_futures_become_a_frame(client: Client) -> None:
    futures = client.map(lambda n: pd.DataFrame({"a": [n, n + 1]}), range(3))
    frame = dd.from_delayed(futures, meta=pd.DataFrame({"a": [0]}))
    assert frame.a.sum().compute() == 9


def test_get_takes_a_graph(client: Client) -> None:
    graph = {"x": (inc, 1), "y": (add, "x", 10)}
    assert client.get(graph, "y") == 12
    assert client.get(graph, ["x", "y"]) == [2, 12]
    assert client.get(graph, [["x"], "y"]) == [[2], 12]


def test_get_takes_aliases_and_literals(client: Client) -> None:
    assert client.get({"a": 5, "b": "a"}, ["a", "b"]) == [5, 5]


def test_get_may_give_futures(client: Client) -> None:
    (future,) = client.get({"x-async": (inc, 1)}, ["x-async"], sync=False)
    assert isinstance(future, Future)
    assert future.result() == 2


def test_get_takes_futures_in_the_graph(client: Client) -> None:
    x = client.submit(inc, 1)
    assert client.get({"from-a-future": (add, x, 10)}, "from-a-future") == 12


def test_get_raises_the_tasks_error(client: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        client.get({"x": (div, 1, 0)}, "x")


def test_compute_raises_the_tasks_error(client: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        delayed(div)(1, 0).compute()
    with pytest.raises(ZeroDivisionError):
        dask.compute(delayed(div)(1, 0), delayed(inc)(1))


def test_errors_in_one_collection_leave_others(client: Client) -> None:
    bad, good = client.compute([delayed(div)(1, 0), delayed(inc)(1)])
    assert good.result() == 2
    assert isinstance(bad.exception(), ZeroDivisionError)


def test_tuple_keys_are_keys(client: Client) -> None:
    x = da.arange(20, chunks=10)
    keys = x.__dask_keys__()
    first, second = client.get(x.__dask_graph__(), keys)
    assert first.tolist() + second.tolist() == list(range(20))


def test_normalize_collection_uses_futures(client: Client) -> None:
    x = delayed(inc)(1)
    client.persist(x)
    assert client.normalize_collection(x).key == x.key


@pytest.mark.parametrize("annotation", [{"priority": 5}, {"retries": 2}, {"a": "word"}], ids=repr)
def test_annotations_are_taken(client: Client, annotation: dict[str, Any]) -> None:
    with dask.annotate(**annotation):
        x = delayed(inc)(1)
    assert client.compute(x, optimize_graph=False).result() == 2


def test_retries_by_annotation(client: Client, tmp_path: Path) -> None:
    with dask.annotate(retries=2):
        x = delayed(fail_first)(str(tmp_path), 2, 7)
    assert client.compute(x, optimize_graph=False).result() == 7


def test_retries_of_compute(client: Client, tmp_path: Path) -> None:
    x = delayed(fail_first)(str(tmp_path), 2, 7)
    assert client.compute(x, retries=2).result() == 7


def test_retries_of_persist(client: Client, tmp_path: Path) -> None:
    x = client.persist(delayed(fail_first)(str(tmp_path), 1, 7), retries=1)
    assert x.compute() == 7


def test_retries_in_a_block(client: Client, tmp_path: Path) -> None:
    with dask.annotate(retries=1):
        future = client.submit(fail_first, str(tmp_path), 1, 8)
        assert future.result() == 8


def test_workers_by_annotation_that_may_be_others(client: Client) -> None:
    with dask.annotate(workers=["nobody-here"], allow_other_workers=True):
        x = delayed(inc)(1)
    assert client.compute(x, optimize_graph=False).result() == 2


def test_an_optimized_graph_gives_the_same(client: Client) -> None:
    x = da.random.default_rng(0).random(1000, chunks=100)
    y = (x + 1).sum()
    assert client.compute(y, optimize_graph=False).result() == pytest.approx(
        client.compute(y, optimize_graph=True).result()
    )


def test_a_bag_is_counted(client: Client) -> None:
    bag = db.from_sequence(range(100), npartitions=5)
    assert bag.map(inc).filter(lambda x: x % 2 == 0).sum().compute() == 2550
    assert dict(bag.map(lambda x: x % 3).frequencies().compute()) == {0: 34, 1: 33, 2: 33}


def test_a_bag_is_grouped(client: Client) -> None:
    bag = db.from_sequence(range(30), npartitions=3)
    groups = dict(bag.groupby(lambda x: x % 3).compute())
    assert {key: sorted(group) for key, group in groups.items()} == {
        n: list(range(n, 30, 3)) for n in range(3)
    }


def test_a_frame_is_grouped(client: Client) -> None:
    pdf = pd.DataFrame({"a": [1, 2, 3] * 20, "b": range(60)})
    frame = dd.from_pandas(pdf, npartitions=4)
    got = frame.groupby("a").b.sum().compute()
    pd.testing.assert_series_equal(got.sort_index(), pdf.groupby("a").b.sum())


def test_a_persisted_frame_is_reduced(client: Client) -> None:
    frame = client.persist(dd.from_pandas(pd.DataFrame({"b": range(60)}), npartitions=3))
    wait(frame)
    assert frame.b.sum().compute() == 1770
    assert len(frame) == 60


def test_arrays_are_multiplied(client: Client) -> None:
    a = np.random.default_rng(0).random((40, 40))
    x = da.from_array(a, chunks=(20, 20))
    np.testing.assert_allclose((x @ x.T).compute(), a @ a.T)


def test_a_store_of_an_array(client: Client, backend: str) -> None:
    if backend.endswith("processes"):
        pytest.skip("an array of this process is out of another one's reach")
    target = np.zeros(100)
    da.arange(100, chunks=10).store(target, lock=False)
    assert (target == np.arange(100)).all()


def test_delayed_results_and_futures_in_one_gather(client: Client) -> None:
    future = client.submit(inc, 1)
    computed = client.compute(delayed(double)(future))
    assert client.gather([future, computed]) == [2, 4]


def test_a_delayed_with_several_outputs(client: Client) -> None:
    pair = delayed(lambda: (1, 2), nout=2)()
    a, b = pair
    assert dask.compute(a, b, a + b) == (1, 2, 3)


def test_a_wide_and_deep_graph(client: Client) -> None:
    layer = [delayed(inc)(n) for n in range(64)]
    while len(layer) > 1:
        layer = [delayed(add)(x, y) for x, y in zip(layer[::2], layer[1::2])]
    assert layer[0].compute() == sum(range(1, 65))


def test_a_graph_with_a_key_that_lives(client: Client, tmp_path: Path) -> None:
    x = delayed(leave_mark)(str(tmp_path), "living", dask_key_name="a-living-key")
    future = client.compute(x)
    assert future.result() == "living"
    y = delayed(str.upper)(x)
    assert client.compute(y).result() == "LIVING"
    assert n_marks(tmp_path, "living") == 1


def test_a_pending_future_is_an_input_of_a_graph(client: Client, tmp_path: Path) -> None:
    x = client.submit(gate, str(tmp_path / "go"), 5)
    y = client.compute(delayed(inc)(x))
    assert not y.done()
    (tmp_path / "go").touch()
    assert y.result() == 6


def test_a_cancelled_input_of_a_graph_is_an_error(client: Client, tmp_path: Path) -> None:
    from concurrent.futures import CancelledError

    x = client.submit(gate, str(tmp_path / "go"), 5)
    x.cancel()
    (tmp_path / "go").touch()
    with pytest.raises(CancelledError):
        client.compute(delayed(inc)(x)).result(timeout=10)


def test_a_failed_input_of_a_graph_is_its_error(client: Client) -> None:
    x = client.submit(div, 1, 0)
    with pytest.raises(ZeroDivisionError):
        client.compute(delayed(inc)(x)).result(timeout=10)


def test_recreate_error_locally(client: Client, backend: str) -> None:
    if backend.endswith("threads"):
        pytest.skip("distributed's client cannot, where the server is in its process")
    future = client.submit(div, 1, 0)
    wait(future)
    with pytest.raises(ZeroDivisionError):
        client.recreate_error_locally(future)


async def test_graphs_of_a_coroutine(c: Any) -> None:
    x = await c.compute(delayed(inc)(1))
    assert x == 2
    assert await c.gather(c.compute([delayed(inc)(1), delayed(inc)(2)])) == [2, 3]
    y = c.persist(da.arange(10, chunks=5))
    await wait(y)
    assert await c.compute(y.sum()) == 45
    (future,) = c.get({"async-x": (inc, 1)}, ["async-x"], sync=False)
    assert await future == 2


async def test_errors_of_a_coroutines_graph(c: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        await c.compute(delayed(div)(1, 0))
