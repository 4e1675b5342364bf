"""Dask's collections, callbacks and downstream libraries give what Dask's own schedulers give."""

import contextvars
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from operator import add, mul
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.callbacks import Callback
from dask.diagnostics import CacheProfiler, Profiler, ProgressBar, ResourceProfiler
from dask.graph_manipulation import bind, checkpoint, clone, wait_on

import wukong


@pytest.fixture(scope="module", params=["threads", "processes"])
def cluster(request: pytest.FixtureRequest) -> Iterator[wukong.LocalCluster]:
    with wukong.LocalCluster(n_workers=2, processes=request.param == "processes") as cluster:
        # Executors import what their first tasks need; that is no test's time.
        cluster.get({("x", i): (warm_up, i) for i in range(2)}, [("x", 0), ("x", 1)])
        yield cluster


@pytest.fixture(scope="module")
def threads() -> Iterator[wukong.LocalCluster]:
    with wukong.LocalCluster(n_workers=2, processes=False) as cluster:
        yield cluster


def warm_up(i: int) -> int:
    time.sleep(0.2)  # so that each executor gets one
    x = da.ones((4, 4), chunks=2)
    (x @ x).sum().compute(scheduler="sync")
    return i


def inc(x: int) -> int:
    return x + 1


def divide(x: int, y: int) -> float:
    return x / y


# ------------------------------------------------------------------ collections


ARRAYS: dict[str, Callable[[da.Array], da.Array]] = {
    "mean": lambda x: x.mean(axis=0),
    "std": lambda x: x.std(),
    "transpose": lambda x: x @ x.T,
    "rechunk": lambda x: x.rechunk((3, 16)).cumsum(axis=1),
    "overlap": lambda x: x.map_overlap(lambda block: block * 2, depth=1, boundary="reflect"),
    "singular values": lambda x: da.linalg.svd(x.rechunk((8, -1)))[1],
    "index": lambda x: x[x[:, 0] > 0.5].sum(axis=1),
    "histogram": lambda x: da.histogram(x, bins=5, range=(0, 1))[0],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_what_dask_makes_of_it(cluster: wukong.LocalCluster, name: str) -> None:
    x = da.random.default_rng(0).random((32, 16), chunks=(8, 8))
    y = ARRAYS[name](x)
    ours, theirs = y.compute(scheduler=cluster.get), y.compute(scheduler="sync")
    assert type(ours) is type(theirs)
    np.testing.assert_array_equal(ours, theirs)


FRAMES: dict[str, Callable[[Any], Any]] = {
    "groupby": lambda df: df.groupby("k").agg({"v": ["sum", "mean"], "w": "max"}),
    "shuffle": lambda df: df.set_index("w"),
    "merge": lambda df: df.merge(df.groupby("k").v.sum().reset_index(), on="k"),
    "rolling": lambda df: df.v.rolling(3).mean(),
    "quantile": lambda df: df.v.quantile([0.1, 0.9]),
    "values": lambda df: df.k.value_counts(),
    "text": lambda df: df.k.str.upper().drop_duplicates(),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_is_what_dask_makes_of_it(cluster: wukong.LocalCluster, name: str) -> None:
    pdf = pd.DataFrame({"k": list("abcab") * 8, "v": np.arange(40.0), "w": np.arange(40)[::-1] % 7})
    frame = FRAMES[name](dd.from_pandas(pdf, npartitions=4))
    ours, theirs = frame.compute(scheduler=cluster.get), frame.compute(scheduler="sync")
    assert type(ours) is type(theirs)
    order = list(theirs.columns) if isinstance(theirs, pd.DataFrame) else None
    by_row = (lambda x: x.sort_values(order)) if order else (lambda x: x.sort_index())
    if name in ("shuffle", "merge"):  # rows with one key have no order
        ours, theirs = by_row(ours).reset_index(), by_row(theirs).reset_index()
    equal = pd.testing.assert_frame_equal if order else pd.testing.assert_series_equal
    equal(ours, theirs)


BAGS: dict[str, Callable[[Any], Any]] = {
    "fold": lambda bag: bag.fold(add),
    "frequencies": lambda bag: bag.map(lambda x: x % 3).frequencies(sort=True),
    "groupby": lambda bag: bag.groupby(lambda x: x % 3).map(lambda g: (g[0], sorted(g[1]))),
    "product": lambda bag: bag.product(bag).filter(lambda pair: pair[0] < pair[1]).count(),
    "topk": lambda bag: bag.topk(3),
}


@pytest.mark.parametrize("name", BAGS)
def test_a_bag_is_what_dask_makes_of_it(cluster: wukong.LocalCluster, name: str) -> None:
    bag = BAGS[name](db.from_sequence(range(30), npartitions=4))
    ours = bag.compute(scheduler=cluster.get)
    theirs = bag.compute(scheduler="sync")
    assert (sorted(ours) if name == "groupby" else ours) == (
        sorted(theirs) if name == "groupby" else theirs
    )


def test_a_pipeline_of_delayed_functions(cluster: wukong.LocalCluster) -> None:
    parts = [dask.delayed(inc)(i) for i in range(10)]
    nested = dask.delayed(sum)([parts, [1]][0]) + dask.delayed(dict)(a=parts[0])["a"]
    pair = dask.delayed(divmod, nout=2)(nested, 7)
    ours = dask.compute(pair[0], {"rest": pair[1]}, parts, scheduler=cluster.get)
    assert ours == dask.compute(pair[0], {"rest": pair[1]}, parts, scheduler="sync")


def test_a_persisted_collection_is_read_again(cluster: wukong.LocalCluster) -> None:
    x = da.arange(20, chunks=5).persist(scheduler=cluster.get)
    assert int(x.sum().compute(scheduler=cluster.get)) == 190


def test_graph_manipulation(cluster: wukong.LocalCluster) -> None:
    x = da.arange(20, chunks=5)
    made = bind(clone(x) + 1, checkpoint(x))
    waited = wait_on(made)
    np.testing.assert_array_equal(waited.compute(scheduler=cluster.get), np.arange(20) + 1)


def test_xarray_groups_and_resamples(cluster: wukong.LocalCluster) -> None:
    xarray = pytest.importorskip("xarray")
    days = pd.date_range("2001-01-01", periods=60)
    data = xarray.DataArray(
        np.arange(240.0).reshape(60, 4), dims=("time", "x"), coords={"time": days}
    )
    chunked = data.chunk({"time": 20, "x": 2})
    for ask in (
        lambda a: a.groupby("time.month").mean(),
        lambda a: a.resample(time="7D").sum(),
        lambda a: (a - a.mean("time")).std("x"),
    ):
        ours = ask(chunked).compute(scheduler=cluster.get)
        xarray.testing.assert_identical(ours, ask(chunked).compute(scheduler="sync"))


@pytest.mark.slow
def test_dask_ml_scales_and_predicts(cluster: wukong.LocalCluster) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    from dask_ml.preprocessing import StandardScaler
    from dask_ml.wrappers import ParallelPostFit

    x = da.random.default_rng(1).random((60, 3), chunks=(20, 3))
    y = (x[:, 0] > 0.5).astype(int)
    results = []
    for scheduler in (cluster.get, "sync"):
        with dask.config.set(scheduler=scheduler):
            scaled = StandardScaler().fit_transform(x)
            model = ParallelPostFit(linear.LogisticRegression())
            model.fit(scaled.compute(), y.compute())
            results.append((scaled.compute(), model.predict_proba(scaled).compute()))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_dask_ml_clusters(cluster: wukong.LocalCluster) -> None:
    kmeans = pytest.importorskip("dask_ml.cluster").KMeans
    x = da.random.default_rng(1).random((80, 2), chunks=(20, 2))
    centres = []
    for scheduler in (cluster.get, "sync"):
        with dask.config.set(scheduler=scheduler):
            model = kmeans(n_clusters=2, random_state=0, max_iter=5).fit(x)
            centres.append(model.cluster_centers_)
    np.testing.assert_allclose(*centres, rtol=1e-12)


# ------------------------------------------------------------------ callbacks

GRAPH = {
    "a": 1,
    "b": (inc, "a"),
    "c": (mul, "b", 10),
    "d": (add, "b", "c"),
    "alias": "d",
    "unneeded": (inc, "d"),
}


class Recorded(Callback):
    """Everything that Dask tells a callback."""

    def __init__(self) -> None:
        self.started: set[Any] = set()
        self.values: dict[Any, Any] = {}
        self.begun: list[Any] = []
        self.order: list[str] = []
        self.left: dict[str, Any] = {}

    def _start(self, dsk: Any) -> None:
        self.order.append("start")
        self.started = set(dsk)

    def _start_state(self, dsk: Any, state: Any) -> None:
        self.order.append("start_state")
        self.dependencies = dict(state["dependencies"])
        self.dependents = dict(state["dependents"])

    def _pretask(self, key: Any, dsk: Any, state: Any) -> None:
        assert key in state["running"]
        self.begun.append(key)

    def _posttask(self, key: Any, value: Any, dsk: Any, state: Any, worker: Any) -> None:
        assert key in state["finished"]
        self.values[key] = value

    def _finish(self, dsk: Any, state: Any, failed: bool) -> None:
        self.order.append(f"finish {failed}")
        names = ("waiting", "ready", "running", "finished", "released", "cache")
        self.left = {name: state.get(name) for name in names}


def test_callbacks_are_told_what_dask_tells_them(cluster: wukong.LocalCluster) -> None:
    with Recorded() as ours:
        assert cluster.get(GRAPH, ["alias", "b"]) == (22, 2)
    with Recorded() as theirs:
        dask.get(GRAPH, ["alias", "b"])
    assert vars(ours).keys() == vars(theirs).keys()
    assert ours.begun == theirs.begun
    assert ours.started == theirs.started
    assert ours.dependencies == theirs.dependencies
    assert ours.dependents == theirs.dependents
    assert ours.values == theirs.values
    assert ours.order == theirs.order == ["start", "start_state", "finish False"]
    assert ours.left == theirs.left


def test_callbacks_finish_when_a_task_fails(cluster: wukong.LocalCluster) -> None:
    with Recorded() as recorded, pytest.raises(ZeroDivisionError):
        cluster.get({"x": (divide, 1, 0)}, "x")
    assert recorded.order == ["start", "start_state", "finish True"]


def test_a_callback_that_fails_is_heard_and_the_others_finish(
    cluster: wukong.LocalCluster,
) -> None:
    def fail(dsk: Any) -> None:
        raise ValueError("my callback")

    recorded = Recorded()
    with pytest.raises(ValueError, match="my callback"), recorded:
        cluster.get(GRAPH, "d", callbacks=[recorded._callback, (fail, None, None, None, None)])
    assert recorded.order == ["start", "finish True"]


def test_a_start_callback_may_give_values(cluster: wukong.LocalCluster) -> None:
    def give(dsk: Any) -> None:
        dsk["c"] = 100

    with Callback(start=give):
        assert cluster.get(GRAPH, "d") == 102


def test_profilers_name_the_tasks_that_dask_runs(cluster: wukong.LocalCluster) -> None:
    with Profiler() as profiler, CacheProfiler() as cached, ResourceProfiler(dt=0.01):
        cluster.get(GRAPH, "alias")
    assert [result.key for result in profiler.results] == ["b", "c", "d", "alias"]
    assert sorted(result.key for result in cached.results) == ["alias", "b", "c", "d"]
    assert {result.worker_id for result in profiler.results} - {"wukong"}


def test_a_progress_bar_ends_full(
    cluster: wukong.LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar(dt=0.01):
        cluster.get({("x", i): (inc, i) for i in range(50)}, [("x", i) for i in range(50)])
    assert "100% Completed" in capsys.readouterr().out


# ------------------------------------------------------------------ arguments of Dask's schedulers


def test_a_cache_gives_values_and_gets_the_results(cluster: wukong.LocalCluster) -> None:
    cache = {"b": 5}
    assert cluster.get(GRAPH, ["d"], cache=cache) == (55,)
    assert cache == {"b": 5, "d": 55}
    empty: dict[str, int] = {}
    assert cluster.get(GRAPH, "d", cache=empty) == 22
    assert empty == {"a": 1, "d": 22}
    with dask.config.set(cache={"c": 1}):
        assert cluster.get(GRAPH, "d") == 3


def test_num_workers_and_pool_say_how_many_executors_run(threads: wukong.LocalCluster) -> None:
    from concurrent.futures import ThreadPoolExecutor

    for n_workers in (1, 3):
        barrier = threading.Barrier(n_workers)
        graph = {("x", i): (barrier.wait, 10) for i in range(n_workers)}
        assert set(threads.get(graph, list(graph), num_workers=n_workers)) == set(range(n_workers))
        with ThreadPoolExecutor(n_workers) as pool, dask.config.set(pool=pool):
            assert set(threads.get(graph, list(graph))) == set(range(n_workers))


def test_tasks_that_wait_for_each_other_all_run(threads: wukong.LocalCluster) -> None:
    for _ in range(3):  # once their durations are known, they are cut into fewer strands
        barrier = threading.Barrier(2)
        graph = {("x", i): (barrier.wait, 10) for i in range(2)}
        assert sorted(threads.get(graph, list(graph))) == [0, 1]


# ------------------------------------------------------------------ threads of one process

VARIABLE = contextvars.ContextVar("VARIABLE", default=0)


def test_tasks_see_the_context_variables_of_the_client(threads: wukong.LocalCluster) -> None:
    token = VARIABLE.set(7)
    try:
        assert threads.get({"x": (VARIABLE.get,)}, "x") == 7
    finally:
        VARIABLE.reset(token)
    assert threads.get({"x": (VARIABLE.get,)}, "x") == 0


def test_numpy_ignores_in_tasks_what_the_client_ignores(threads: wukong.LocalCluster) -> None:
    x = da.ones(4, chunks=2)
    with np.errstate(divide="ignore"):
        assert np.isinf((x / 0).compute(scheduler=threads.get)).all()


def test_values_are_the_objects_themselves(threads: wukong.LocalCluster) -> None:
    value = object()
    found = threads.get({"x": (lambda: value,), "y": (lambda x: x, "x")}, ["x", "y"])
    assert found[0] is value
    assert found[1] is value


def test_graphs_inside_graphs_find_an_executor(threads: wukong.LocalCluster) -> None:
    def nested(depth: int) -> int:
        if depth == 0:
            return 1
        graph = {("k", i): (nested, depth - 1) for i in range(2)}
        return sum(threads.get(graph, list(graph)))

    assert nested(3) == 8


def test_many_threads_may_get_at_once(cluster: wukong.LocalCluster) -> None:
    found: list[int] = []

    def run(i: int) -> None:
        found.append(cluster.get({"x": (time.sleep, 0.001), "y": (lambda x: i, "x")}, "y"))

    clients = [threading.Thread(target=run, args=(i,)) for i in range(12)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert sorted(found) == list(range(12))


def test_a_shortened_traceback_has_the_users_frames_only(cluster: wukong.LocalCluster) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        dask.delayed(divide)(1, 0).compute(scheduler=cluster.get)
    names = [entry.name for entry in caught.traceback]
    assert names == [
        "test_a_shortened_traceback_has_the_users_frames_only",
        "compute",
        "compute",
        "divide",
    ]


@pytest.mark.slow
def test_a_value_that_owns_a_folder_outlives_its_copies(cluster: wukong.LocalCluster) -> None:
    # partd's files remove their folder when the object that has made it ends.
    bag = db.from_sequence(range(30), npartitions=6).groupby(lambda x: x % 3, shuffle="disk")
    for _ in range(3):
        assert sorted(map(len, dict(bag.compute(scheduler=cluster.get)).values())) == [10] * 3


@pytest.mark.slow
def test_a_frame_is_shuffled_by_way_of_a_disk(cluster: wukong.LocalCluster) -> None:
    pdf = pd.DataFrame({"k": list("abcd") * 10, "v": range(40)})
    frame = dd.from_pandas(pdf, npartitions=4).shuffle("k", shuffle_method="disk")
    ours = frame.compute(scheduler=cluster.get).sort_values("v")
    pd.testing.assert_frame_equal(ours, pdf, check_dtype=False)


class NotToBeUnpickled:
    def __getstate__(self) -> tuple[()]:
        return ()

    def __setstate__(self, state: tuple[()]) -> None:
        raise ValueError("not here")


@pytest.mark.slow
def test_what_unpickling_raises_comes_back_as_itself() -> None:
    with wukong.LocalCluster(n_workers=1) as cluster, pytest.raises(ValueError, match="not here"):
        cluster.get({"x": (bool, NotToBeUnpickled())}, "x")


@pytest.mark.slow
def test_a_task_may_use_a_manager_of_multiprocessing() -> None:
    with multiprocessing.Manager() as manager, wukong.LocalCluster(2) as cluster:
        shared = manager.dict()
        graph = {f"k{i}": (shared.__setitem__, i, 2 * i) for i in range(3)}
        cluster.get(graph, list(graph))
        assert dict(shared) == {0: 0, 1: 2, 2: 4}
