"""Plain futures: `cluster.executor()`, `wukong.map` and `wukong.call_async`."""

from __future__ import annotations

import concurrent.futures as cf
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wukong
from wukong.errors import JobCancelled
from wukong.futures import CallExecutor


@pytest.fixture(scope="module", params=["threads", "processes"])
def cluster(request: pytest.FixtureRequest) -> Iterator[wukong.LocalCluster]:
    with wukong.LocalCluster(2, processes=request.param == "processes") as cluster:
        yield cluster


@pytest.fixture
def executor(cluster: wukong.LocalCluster) -> Iterator[CallExecutor]:
    with cluster.executor() as executor:
        yield executor


def inc(x: int) -> int:
    return x + 1


def add(x: int, y: int) -> int:
    return x + y


def wait_for(path: str) -> str:
    """Wait until the file is there."""
    Path(path + ".runs").touch()
    end_at = time.monotonic() + 20
    while not os.path.exists(path):
        if time.monotonic() > end_at:
            raise TimeoutError(path)
        time.sleep(0.002)
    return path


def fail(message: str) -> None:
    raise ValueError(message)


def leave_mark(folder: str, n: int) -> int:
    Path(folder, f"{n}.{time.monotonic_ns()}").touch()
    return n


def test_an_executor_is_one_of_the_standard_library(executor: CallExecutor) -> None:
    future = executor.submit(add, 1, y=2)
    assert isinstance(executor, cf.Executor)
    assert isinstance(future, cf.Future)
    assert future.result(20) == 3
    assert future.done()
    assert not future.cancelled()
    assert future.exception() is None


def test_any_callable_is_called(executor: CallExecutor) -> None:
    factor = 3
    assert executor.submit(lambda x: factor * x, 5).result(20) == 15
    assert executor.submit(np.sum, np.arange(5)).result(20) == 10
    assert executor.submit(str.upper, "a").result(20) == "A"
    assert executor.submit(dict, a=1).result(20) == {"a": 1}


@pytest.mark.parametrize(
    "value", [None, "0", ("x", 0), [1, ("a",)], {"k": (inc, 1)}, (inc, 1)], ids=repr
)
def test_arguments_are_taken_as_they_are(executor: CallExecutor, value: Any) -> None:
    """Nothing in them is a key or a task, as it would be in a graph of Dask's."""
    first, second = executor.submit(inc, 1), executor.submit(lambda x: x, value)
    assert first.result(20) == 2
    assert second.result(20) == value


def test_an_error_comes_back(executor: CallExecutor) -> None:
    future = executor.submit(fail, "as it was asked")
    with pytest.raises(ValueError, match="as it was asked"):
        future.result(20)
    assert isinstance(future.exception(), ValueError)


def test_an_error_harms_no_other_call(executor: CallExecutor) -> None:
    futures = [
        executor.submit(fail, "no") if n % 3 == 0 else executor.submit(inc, n) for n in range(9)
    ]
    assert [f.exception(20) is None for f in futures] == [n % 3 != 0 for n in range(9)]


def test_a_call_that_cannot_be_sent_harms_no_other(
    cluster: wukong.LocalCluster, executor: CallExecutor
) -> None:
    lock = threading.Lock()
    futures = [executor.submit(inc, n) for n in range(5)]
    bad = executor.submit(isinstance, lock, object)
    futures += [executor.submit(inc, n) for n in range(5, 9)]
    assert [future.result(20) for future in futures] == list(range(1, 10))
    assert (bad.exception(20) is None) == (not cluster.processes)


def test_map_keeps_the_order(executor: CallExecutor) -> None:
    assert list(executor.map(inc, range(300))) == list(range(1, 301))
    assert list(executor.map(add, [1, 2, 3], [10, 20])) == [11, 22]
    assert list(executor.map(inc, [])) == []


@pytest.mark.parametrize("chunksize", [2, 7, 1000])
def test_map_in_chunks_gives_the_same(executor: CallExecutor, chunksize: int) -> None:
    assert list(executor.map(inc, range(50), chunksize=chunksize)) == list(range(1, 51))
    assert list(executor.map(add, range(5), range(5), chunksize=chunksize)) == [0, 2, 4, 6, 8]


def test_chunks_are_not_empty(executor: CallExecutor) -> None:
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(inc, [1], chunksize=0)


def test_map_begins_before_it_is_read(executor: CallExecutor, tmp_path: Path) -> None:
    results = executor.map(leave_mark, [str(tmp_path)] * 4, range(4))
    end_at = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 4:
        assert time.monotonic() < end_at
        time.sleep(0.002)
    assert list(results) == [0, 1, 2, 3]


def test_map_raises_where_the_call_did(executor: CallExecutor) -> None:
    results = executor.map(divmod, [4, 1, 9], [2, 0, 3])
    assert next(results) == (2, 0)
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_times_out(executor: CallExecutor, tmp_path: Path) -> None:
    results = executor.map(wait_for, [str(tmp_path / "go")], timeout=0.05)
    with pytest.raises(cf.TimeoutError):
        next(results)
    (tmp_path / "go").touch()


def test_a_result_times_out(executor: CallExecutor, tmp_path: Path) -> None:
    future = executor.submit(wait_for, str(tmp_path / "go"))
    with pytest.raises(cf.TimeoutError):
        future.result(0.02)
    with pytest.raises(cf.TimeoutError):
        future.exception(0.02)
    (tmp_path / "go").touch()
    assert future.result(20) == str(tmp_path / "go")


def test_the_standard_librarys_wait(executor: CallExecutor, tmp_path: Path) -> None:
    slow, quick = executor.submit(wait_for, str(tmp_path / "go")), executor.submit(inc, 1)
    done, not_done = cf.wait([slow, quick], 20, return_when=cf.FIRST_COMPLETED)
    assert (done, not_done) == ({quick}, {slow})
    (tmp_path / "go").touch()
    assert cf.wait([slow, quick], 20).not_done == set()


def test_wait_ends_with_the_first_error(executor: CallExecutor, tmp_path: Path) -> None:
    slow, bad = executor.submit(wait_for, str(tmp_path / "go")), executor.submit(fail, "no")
    assert cf.wait([slow, bad], 20, return_when=cf.FIRST_EXCEPTION).done == {bad}
    (tmp_path / "go").touch()


def test_the_standard_librarys_as_completed(executor: CallExecutor) -> None:
    futures = {executor.submit(inc, n): n for n in range(50)}
    assert all(f.result() == futures[f] + 1 for f in cf.as_completed(futures, 20))


def test_results_come_one_by_one(executor: CallExecutor, tmp_path: Path) -> None:
    futures = [executor.submit(inc, n) for n in range(10)]
    futures.append(executor.submit(wait_for, str(tmp_path / "go")))
    finished = cf.as_completed(futures, 20)
    assert sorted(next(finished).result() for _ in range(10)) == list(range(1, 11))
    (tmp_path / "go").touch()
    assert next(finished) is futures[10]


def test_a_callback_is_called(executor: CallExecutor) -> None:
    seen: list[Any] = []
    called = threading.Event()
    future = executor.submit(inc, 1)
    future.add_done_callback(lambda f: (seen.append(f.result()), called.set()))
    assert called.wait(20)
    assert seen == [2]


def test_a_pending_call_is_cancelled(executor: CallExecutor, tmp_path: Path) -> None:
    held = [executor.submit(wait_for, str(tmp_path / f"go{n}")) for n in range(2)]
    future = executor.submit(wait_for, str(tmp_path / "go"))
    assert future.cancel()
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(cf.CancelledError):
        future.result()
    assert cf.wait([future], 20).done == {future}
    for n in range(2):
        (tmp_path / f"go{n}").touch()
    (tmp_path / "go").touch()
    assert all(f.result(20) for f in held)


def test_a_running_call_is_cancelled(executor: CallExecutor, tmp_path: Path) -> None:
    future = executor.submit(wait_for, str(tmp_path / "go"))
    end_at = time.monotonic() + 20
    while not (tmp_path / "go.runs").exists():
        assert time.monotonic() < end_at
        time.sleep(0.002)
    assert future.cancel()
    (tmp_path / "go").touch()
    assert executor.submit(inc, 1).result(20) == 2


def test_a_finished_call_is_not_cancelled(executor: CallExecutor) -> None:
    future = executor.submit(inc, 1)
    assert future.result(20) == 2
    assert not future.cancel()
    assert future.result() == 2


def test_closing_a_map_cancels_the_rest(executor: CallExecutor, tmp_path: Path) -> None:
    results = executor.map(wait_for, [str(tmp_path / f"go{n}") for n in range(6)])
    (tmp_path / "go0").touch()
    assert next(results)
    results.close()  # type: ignore[attr-defined]
    for n in range(1, 6):
        (tmp_path / f"go{n}").touch()
    assert executor.submit(inc, 1).result(20) == 2


def test_shutdown_waits_for_what_was_submitted(cluster: wukong.LocalCluster) -> None:
    executor = cluster.executor()
    futures = [executor.submit(inc, n) for n in range(20)]
    executor.shutdown()
    assert [future.result(0) for future in futures] == list(range(1, 21))
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(inc, 1)
    executor.shutdown()


def test_shutdown_need_not_wait(cluster: wukong.LocalCluster, tmp_path: Path) -> None:
    executor = cluster.executor()
    future = executor.submit(wait_for, str(tmp_path / "go"))
    executor.shutdown(wait=False)
    assert not future.done()
    (tmp_path / "go").touch()
    assert future.result(20)


def test_shutdown_may_cancel(cluster: wukong.LocalCluster, tmp_path: Path) -> None:
    executor = cluster.executor()
    futures = [executor.submit(wait_for, str(tmp_path / "go")) for _ in range(5)]
    executor.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    (tmp_path / "go").touch()


def test_an_executor_leaves_no_job_behind(cluster: wukong.LocalCluster) -> None:
    with cluster.executor() as executor:
        assert executor.submit(inc, 1).result(20) == 2
    assert cluster.jobs() == ()


def test_executors_are_apart(cluster: wukong.LocalCluster) -> None:
    with cluster.executor() as first, cluster.executor() as second:
        x, y = first.submit(inc, 1), second.submit(inc, 2)
        assert (x.result(20), y.result(20)) == (2, 3)
        first.shutdown()
        assert second.submit(inc, 3).result(20) == 4


def test_large_arguments_and_results(executor: CallExecutor) -> None:
    array = np.arange(300_000)
    got = executor.submit(np.add, array, 1).result(20)
    assert (got == array + 1).all()


def test_submits_from_several_threads(executor: CallExecutor) -> None:
    def work(base: int) -> list[int]:
        return [f.result(20) for f in [executor.submit(inc, base + n) for n in range(50)]]

    with cf.ThreadPoolExecutor(4) as threads:
        assert [*threads.map(work, [0, 100, 200, 300])] == [
            list(range(base + 1, base + 51)) for base in (0, 100, 200, 300)
        ]


def test_a_burst_of_submits_is_a_few_extensions(executor: CallExecutor) -> None:
    futures = [executor.submit(inc, n) for n in range(2_000)]
    assert [future.result(20) for future in futures] == list(range(1, 2_001))
    assert executor.n_extensions < 200


def test_calls_that_submit_calls(cluster: wukong.LocalCluster) -> None:
    if cluster.processes:
        pytest.skip("an executor does not leave its process")
    with cluster.executor() as executor:

        def outer(n: int) -> int:
            return executor.submit(inc, n).result(20)

        assert list(executor.map(outer, range(6))) == list(range(1, 7))


def test_a_cluster_that_closes_ends_its_calls(tmp_path: Path) -> None:
    cluster = wukong.LocalCluster(1, processes=False)
    executor = cluster.executor()
    future = executor.submit(wait_for, str(tmp_path / "go"))
    closing = threading.Timer(0.02, (tmp_path / "go").touch)
    closing.start()
    cluster.close()
    closing.join()
    assert isinstance(future.exception(20), JobCancelled | type(None))
    with pytest.raises(RuntimeError):
        executor.submit(inc, 1)


def test_a_closed_cluster_has_no_executor() -> None:
    cluster = wukong.LocalCluster(1, processes=False)
    cluster.close()
    with pytest.raises(wukong.errors.WukongError, match="closed"):
        cluster.executor()


@pytest.mark.slow
def test_a_killed_executor_loses_no_call() -> None:
    with wukong.LocalCluster(2) as cluster, cluster.executor() as executor:
        pids = {f.result(30) for f in [executor.submit(os.getpid) for _ in range(20)]}
        futures = [executor.submit(slow_inc, n) for n in range(200)]
        os.kill(min(pids), 9)
        assert [future.result(60) for future in futures] == list(range(1, 201))


def slow_inc(x: int) -> int:
    time.sleep(0.002)
    return x + 1


@pytest.mark.slow
def test_pywrens_calls_run_on_the_default_cluster() -> None:
    future = wukong.call_async(inc, 1)
    assert future.result(60) == 2
    futures = wukong.map(inc, range(20))
    assert [future.result(60) for future in futures] == list(range(1, 21))
    with pytest.raises(ValueError, match="no"):
        wukong.call_async(fail, "no").result(60)
