"""Libraries on top of Dask's client: joblib, dask-ml, xarray, dataframes and bags that shuffle."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, Lock

from tests.dask.client_tasks import inc

pytestmark = pytest.mark.slow


@pytest.fixture
def sgd() -> Any:
    linear_model = pytest.importorskip("sklearn.linear_model")
    return linear_model.SGDClassifier(tol=1e-3, random_state=0)


@pytest.fixture
def digits() -> tuple[np.ndarray, np.ndarray]:
    datasets = pytest.importorskip("sklearn.datasets")
    return datasets.make_classification(n_samples=400, n_features=10, random_state=0)


@pytest.fixture(autouse=True)
def loud_libraries() -> Iterator[None]:
    """What these libraries themselves warn of is not tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_joblib_runs_on_the_client(client: Client) -> None:
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend="dask"):
        assert joblib.Parallel()(joblib.delayed(inc)(n) for n in range(50)) == list(range(1, 51))


def test_joblib_uses_the_executors(client: Client, backend: str) -> None:
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend="dask"):
        pids = set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(20)))
    assert (os.getpid() in pids) == backend.endswith("threads")


def test_joblib_raises_what_a_call_raised(client: Client) -> None:
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend="dask"), pytest.raises(ZeroDivisionError):
        joblib.Parallel()(joblib.delayed(divmod)(1, n) for n in (1, 0))


def test_joblib_scatters_large_arguments(client: Client) -> None:
    joblib = pytest.importorskip("joblib")
    array = np.arange(200_000.0)
    with joblib.parallel_config(backend="dask", scatter=[array]):
        sums = joblib.Parallel()(joblib.delayed(np.sum)(array) for _ in range(4))
    assert sums == [array.sum()] * 4


def test_joblib_nests(client: Client) -> None:
    joblib = pytest.importorskip("joblib")

    def outer(n: int) -> int:
        return sum(joblib.Parallel(n_jobs=2)(joblib.delayed(inc)(k) for k in range(n)))

    with joblib.parallel_config(backend="dask"):
        assert joblib.Parallel()(joblib.delayed(outer)(n) for n in range(4)) == [0, 1, 3, 6]


def test_a_grid_search_of_scikit_learn(client: Client, sgd: Any, digits: Any) -> None:
    joblib = pytest.importorskip("joblib")
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(sgd, {"alpha": [1e-4, 1e-3, 1e-2]}, cv=3, n_jobs=-1)
    with joblib.parallel_config(backend="dask"):
        search.fit(*digits)
    assert search.best_params_["alpha"] in (1e-4, 1e-3, 1e-2)
    assert search.best_score_ > 0.6


@pytest.mark.parametrize(
    "name", ["HyperbandSearchCV", "SuccessiveHalvingSearchCV", "IncrementalSearchCV"]
)
def test_searches_of_dask_ml(client: Client, sgd: Any, digits: Any, name: str) -> None:
    model_selection = pytest.importorskip("dask_ml.model_selection")
    import dask.array as da

    x, y = (da.from_array(part, chunks=100) for part in digits)
    options: dict[str, Any] = {
        "HyperbandSearchCV": {"max_iter": 9, "random_state": 0},
        "SuccessiveHalvingSearchCV": {
            "n_initial_parameters": 6,
            "n_initial_iter": 2,
            "max_iter": 6,
            "random_state": 0,
        },
        "IncrementalSearchCV": {"n_initial_parameters": 4, "max_iter": 5, "random_state": 0},
    }[name]
    parameters = {"alpha": np.logspace(-4, -1, 20), "average": [True, False]}
    search = getattr(model_selection, name)(sgd, parameters, **options)
    # dask-ml persists inside a coroutine, which Dask refuses unless the scheduler is named.
    with dask.config.set(scheduler=client.get):
        search.fit(x, y, classes=[0, 1])
    assert search.best_score_ > 0.5
    assert set(search.best_params_) == {"alpha", "average"}


def test_a_grid_search_of_dask_ml(client: Client, sgd: Any, digits: Any) -> None:
    model_selection = pytest.importorskip("dask_ml.model_selection")
    search = model_selection.GridSearchCV(sgd, {"alpha": [1e-4, 1e-2]}, cv=3)
    search.fit(*digits)
    assert search.best_score_ > 0.6


def test_k_means_of_dask_ml(client: Client) -> None:
    cluster = pytest.importorskip("dask_ml.cluster")
    datasets = pytest.importorskip("dask_ml.datasets")
    x, _ = datasets.make_blobs(n_samples=300, centers=3, chunks=100, random_state=0)
    model = cluster.KMeans(n_clusters=3, random_state=0, max_iter=10)
    model.fit(x)
    assert model.cluster_centers_.shape == (3, 2)


def grid(n: int = 40) -> Any:
    xr = pytest.importorskip("xarray")
    values = np.arange(n * 10.0).reshape(n, 10)
    return xr.Dataset({"t": (("time", "x"), values)}, coords={"time": np.arange(n)})


def test_xarray_computes(client: Client) -> None:
    chunked = grid().chunk({"time": 10})
    np.testing.assert_allclose(chunked.t.mean("time").compute(), grid().t.mean("time"))
    assert float(client.compute(chunked.t.sum()).result()) == float(grid().t.sum())


def test_xarray_persists(client: Client) -> None:
    chunked = client.persist(grid().chunk({"time": 10}))
    assert float((chunked.t + 1).sum().compute()) == float((grid().t + 1).sum())


def test_xarray_groups(client: Client) -> None:
    labels = grid().time % 4
    got = grid().chunk({"time": 10}).groupby(labels).mean().compute()
    np.testing.assert_allclose(got.t, grid().groupby(labels).mean().t)


def test_xarray_writes_zarr(client: Client, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    xr = pytest.importorskip("xarray")
    path = str(tmp_path / "store.zarr")
    grid().chunk({"time": 10}).to_zarr(path)
    with xr.open_zarr(path) as stored:
        assert float(stored.t.sum().compute()) == float(grid().t.sum())


def test_xarray_writes_zarr_later(client: Client, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    xr = pytest.importorskip("xarray")
    path = str(tmp_path / "later.zarr")
    writing = grid().chunk({"time": 10}).to_zarr(path, compute=False)
    client.compute(writing).result()
    with xr.open_zarr(path) as stored:
        np.testing.assert_array_equal(stored.t, grid().t)


def test_xarray_writes_netcdf_with_locks(client: Client, tmp_path: Path) -> None:
    pytest.importorskip("netCDF4")
    xr = pytest.importorskip("xarray")
    path = str(tmp_path / "store.nc")
    grid().chunk({"time": 10}).to_netcdf(path, engine="netcdf4")
    with xr.open_dataset(path, engine="netcdf4") as stored:
        np.testing.assert_array_equal(stored.t, grid().t)


def test_xarray_opens_many_files(client: Client, tmp_path: Path, backend: str) -> None:
    pytest.importorskip("netCDF4")
    xr = pytest.importorskip("xarray")
    whole = grid()
    for n in range(4):
        whole.isel(time=slice(10 * n, 10 * n + 10)).to_netcdf(
            tmp_path / f"{n}.nc", engine="netcdf4"
        )
    paths = sorted(map(str, tmp_path.glob("*.nc")))
    # netCDF's library is not made for threads: opening files in several of them at once crashes
    # programs, with dask.threaded and distributed's threads as well as here.
    options = {"parallel": not backend.endswith("threads"), "combine": "by_coords"}
    with xr.open_mfdataset(paths, engine="netcdf4", **options) as found:
        assert float(found.t.sum().compute()) == float(whole.t.sum())


def test_a_lock_of_the_cluster_guards_a_file(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "appended"

    def append(n: int) -> int:
        with Lock("appending"):
            text = path.read_text() if path.exists() else ""
            path.write_text(text + "x")
        return n

    assert client.gather(client.map(append, range(12))) == list(range(12))
    assert path.read_text() == "x" * 12


def frame(n: int = 200) -> pd.DataFrame:
    return pd.DataFrame({"k": [i % 7 for i in range(n)], "v": range(n)})


METHODS = pytest.mark.parametrize("method", [None, "tasks", "p2p"])


@METHODS
def test_frames_shuffle(client: Client, method: str | None) -> None:
    parts = dd.from_pandas(frame(), npartitions=5)
    shuffled = parts.shuffle("k", shuffle_method=method)
    got = shuffled.map_partitions(lambda part: part.groupby("k").v.sum())
    want = frame().groupby("k").v.sum()
    assert got.compute().sort_index().tolist() == want.tolist()
    one = parts.shuffle("k", shuffle_method=method, npartitions=3).partitions[1].compute()
    assert set(one.k) < set(range(7))


@METHODS
@pytest.mark.parametrize("how", ["inner", "outer"])
def test_frames_merge_on_columns(client: Client, method: str | None, how: Any) -> None:
    left, right = frame(), pd.DataFrame({"k": range(2, 9), "w": range(70, 77)})
    got = dd.merge(
        dd.from_pandas(left, npartitions=4),
        dd.from_pandas(right, npartitions=2),
        on="k",
        how=how,
        shuffle_method=method,
        broadcast=False,
    ).compute()
    want = left.merge(right, on="k", how=how)
    for found in (got, want):
        found.sort_values(["k", "v"], inplace=True, ignore_index=True)
    pd.testing.assert_frame_equal(got, want)


@METHODS
def test_frames_are_sorted_and_indexed(client: Client, method: str | None) -> None:
    mixed = frame().sample(frac=1, random_state=0).reset_index(drop=True)
    parts = dd.from_pandas(mixed, npartitions=5)
    indexed = parts.set_index("v", shuffle_method=method)
    assert indexed.compute().index.tolist() == list(range(200))
    assert parts.sort_values("v", shuffle_method=method).v.compute().tolist() == list(range(200))


def test_frames_are_written_and_read(client: Client, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    dd.from_pandas(frame(), npartitions=4).to_parquet(tmp_path / "frame")
    back = dd.read_parquet(tmp_path / "frame")
    assert back.v.sum().compute() == frame().v.sum()
    assert len(back) == 200


def test_bags_shuffle(client: Client) -> None:
    bag = db.from_sequence(range(60), npartitions=4)
    groups = dict(bag.groupby(lambda x: x % 5).compute())
    assert {k: sorted(v) for k, v in groups.items()} == {k: list(range(k, 60, 5)) for k in range(5)}
    with dask.config.set(shuffle="tasks"):
        assert len(bag.groupby(lambda x: x % 5).compute()) == 5


@METHODS
def test_arrays_are_rechunked(client: Client, method: str | None) -> None:
    import dask.array as da

    values = np.arange(1200.0).reshape(20, 6, 10)
    x = (da.from_array(values, chunks=(7, 3, 10)) + 1).rechunk((4, 6, 3), method=method)
    np.testing.assert_array_equal((x * 2).compute(), (values + 1) * 2)
    np.testing.assert_array_equal(x[3:9, :, 2].compute(), values[3:9, :, 2] + 1)
    back = client.persist(x).rechunk((10, 3, 10), method=method)
    np.testing.assert_array_equal(back.compute(), values + 1)
