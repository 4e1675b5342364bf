"""Other people's executors run Wukong's tokens: what comes back, what a death or a loss does."""

import concurrent.futures as futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dask
import dask.array as da
import fault_tasks as tasks
import pytest
from moto_service import KEY, SECRET, make_bucket, needs
from redis_servers import Server

import wukong
from wukong import errors
from wukong.executor.futures import width_of
from wukong.scheduler.graph import plan_graph
from wukong.submit import cut_plan, submit_plan

SOON_S = 30.0
SPAWN = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")


def make_threads() -> futures.Executor:
    return futures.ThreadPoolExecutor(2)


def make_spawned() -> futures.Executor:
    return futures.ProcessPoolExecutor(2, SPAWN)


def make_forked() -> futures.Executor:
    return futures.ProcessPoolExecutor(2, FORK)


def make_loky() -> futures.Executor:
    needs("loky")
    from loky import ProcessPoolExecutor

    return ProcessPoolExecutor(2)


EXECUTORS = {
    "threads": make_threads,
    "spawned": make_spawned,
    "forked": make_forked,
    "loky": make_loky,
}


def tree(n_leaves: int) -> dict:
    graph = {(0, i): (tasks.increment, i) for i in range(n_leaves)}
    level, n = 0, n_leaves
    while n > 1:
        level, n = level + 1, n // 2
        graph.update(
            {(level, i): (tasks.add, (level - 1, 2 * i), (level - 1, 2 * i + 1)) for i in range(n)}
        )
    return graph


@pytest.fixture(scope="module", params=list(EXECUTORS))
def executor(request) -> Iterator[futures.Executor]:
    with EXECUTORS[request.param]() as executor:
        yield executor


@pytest.fixture(scope="module")
def shared(executor) -> Iterator[wukong.ExecutorCluster]:
    with wukong.ExecutorCluster(executor, timeout_s=60) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared) -> Iterator[wukong.ExecutorCluster]:
    yield shared
    assert shared.jobs() == ()
    assert shared._store.blobs is None or shared._store.blobs.used_bytes() == 0


# ---------------------------------------------------------------- results


@pytest.mark.slow
def test_results_are_those_of_dask(cluster) -> None:
    assert cluster.get(tree(64), (6, 0)) == sum(range(1, 65))
    x = da.random.default_rng(7).random((400, 40), chunks=(50, 40))
    q, r = da.linalg.qr(x)
    error = float(abs(x - q @ r).max().compute(scheduler=cluster.get))
    assert error < 1e-12


@pytest.mark.slow
def test_every_task_a_strand_runs_once(cluster) -> None:
    cluster._is_cut = False
    try:
        assert cluster.get(tree(32), (5, 0)) == sum(range(1, 33))
    finally:
        cluster._is_cut = True
    report = cluster.report()
    assert (report.tasks, report.strands, report.commits) == (63, 63, 63)


@pytest.mark.slow
def test_an_error_is_the_tasks_own(cluster) -> None:
    with pytest.raises(ZeroDivisionError):
        cluster.get({"x": (divmod, 1, 0)}, "x")


@pytest.mark.slow
def test_the_executor_is_wide_as_it_says_and_stays_open(executor, cluster) -> None:
    assert cluster.n_workers == 2
    with wukong.ExecutorCluster(executor, timeout_s=60) as other:
        assert other.get({"x": (tasks.increment, 1)}, "x") == 2
        directory = other._own_directory
        assert directory.exists()
    assert not directory.exists()
    assert executor.submit(os.getpid).result(SOON_S)


@pytest.mark.slow
def test_several_threads_share_a_cluster(cluster) -> None:
    with futures.ThreadPoolExecutor(4) as clients:
        jobs = [clients.submit(cluster.get, tree(2**k), (k, 0)) for k in range(1, 7)]
        assert [job.result(SOON_S) for job in jobs] == [
            sum(range(1, 2**k + 1)) for k in range(1, 7)
        ]


# ---------------------------------------------------------------- threads share objects


def test_threads_can_share_objects() -> None:
    token = object()
    with (
        futures.ThreadPoolExecutor(2) as executor,
        wukong.ExecutorCluster(executor, store="memory://", timeout_s=60) as cluster,
    ):
        assert cluster.get({"x": token, "y": (id, "x")}, "y") == id(token)
        assert repr(cluster) == "ExecutorCluster(2 workers, memory:)"


@pytest.mark.slow
def test_a_task_may_wait_for_a_graph_of_its_own() -> None:
    with (
        futures.ThreadPoolExecutor(1) as executor,
        wukong.ExecutorCluster(executor, store="memory://", timeout_s=60) as cluster,
    ):

        def nested(depth: int) -> int:
            if not depth:
                return 1
            return 1 + cluster.get({"x": (nested, depth - 1)}, "x")

        assert cluster.get({"x": (nested, 3)}, "x") == 4


@pytest.mark.slow
def test_processes_cannot_share_objects_and_say_so() -> None:
    with (
        dask.config.set({"wukong.job.silence-s": 2.0}),
        make_spawned() as executor,
        wukong.ExecutorCluster(executor, store="memory://", timeout_s=60) as cluster,
        pytest.raises(errors.InvokeError, match="cannot see the store memory://"),
    ):
        cluster.get({"x": (tasks.increment, 1)}, "x")


# ---------------------------------------------------------------- stores that others reach


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("r"))
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_threads, make_spawned], ids=["threads", "spawned"])
def test_jobs_may_lie_in_redis_and_large_blobs_in_s3(redis_server, moto_url, make) -> None:
    make_bucket(moto_url, "executors")
    place = f"s3://{KEY}:{SECRET}@executors/p?endpoint_url={moto_url}&region=us-east-1"
    with (
        make() as executor,
        wukong.ExecutorCluster(
            executor, store=redis_server.url, blobs=f"{place}&tier_bytes=150000", timeout_s=200
        ) as cluster,
    ):
        cluster._is_cut = False
        assert cluster.get(tree(32), (5, 0)) == sum(range(1, 33))
        assert cluster.report().executors == 2
        cluster._is_cut = True
        x = da.random.default_rng(7).random((4000, 40), chunks=(500, 40))
        q, r = da.linalg.qr(x)
        error = float(abs(x - q @ r).max().compute(scheduler=cluster.get))
        assert error < 1e-12
        assert cluster.report().blobs_written
        assert cluster.jobs() == ()
        assert cluster._store.blobs.used_bytes() == 0


# ---------------------------------------------------------------- deaths


def die_once(path: str) -> int:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return 1
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_spawned, make_loky], ids=["spawned", "loky"])
def test_a_worker_that_dies_costs_its_strand_and_an_executor(make, tmp_path: Path) -> None:
    made: list[futures.Executor] = []

    def make_one() -> futures.Executor:
        made.append(make())
        return made[-1]

    with wukong.ExecutorCluster(make_one, timeout_s=60) as cluster:
        graph = {("x", i): (tasks.increment, i) for i in range(10)}
        graph["bad"] = (die_once, str(tmp_path / "mark"))
        assert cluster.get(graph, [*graph]) == (*range(1, 11), 1)
    for executor in made:
        executor.shutdown()
    assert len(made) == 2


@pytest.mark.slow
def test_a_broken_executor_that_nobody_can_replace_is_an_error(tmp_path: Path) -> None:
    with (
        dask.config.set({"wukong.job.silence-s": 2.0}),
        make_spawned() as executor,
        wukong.ExecutorCluster(executor, timeout_s=60) as cluster,
        pytest.raises(errors.InvokeError, match="BrokenProcessPool"),
    ):
        cluster.get({"x": (die_once, str(tmp_path / "mark"))}, "x")


class Forgetful(futures.Executor):
    """Loses every other function, and never says so; the rest it runs in threads."""

    _max_workers = 2

    def __init__(self) -> None:
        self.n_lost = 0
        self._n = 0
        self._threads = futures.ThreadPoolExecutor(2)

    def submit(self, fn: Callable, /, *args: object, **kwargs: object) -> futures.Future:
        self._n += 1
        if self._n % 2:
            self.n_lost += 1
            lost: futures.Future = futures.Future()
            # A platform that times out after a while.
            threading.Timer(0.5, self._give_up, (lost,)).start()
            return lost
        return self._threads.submit(fn, *args, **kwargs)

    def _give_up(self, lost: futures.Future) -> None:
        if lost.set_running_or_notify_cancel():
            lost.set_exception(TimeoutError("no answer"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait)


@pytest.mark.slow
def test_functions_that_are_lost_lose_no_work() -> None:
    with (
        dask.config.set({"wukong.executor.strands": False, "wukong.job.silence-s": 1.0}),
        Forgetful() as executor,
        wukong.ExecutorCluster(executor, store="memory://", timeout_s=60) as cluster,
    ):
        for _ in range(3):
            assert cluster.get(tree(16), (4, 0)) == sum(range(1, 17))
        assert executor.n_lost


@pytest.mark.slow
def test_a_client_that_leaves_is_followed_by_another(tmp_path: Path) -> None:
    """The first one's functions are gone with it; the job stays in the store."""
    url = f"local://{tmp_path}/store"
    with futures.ThreadPoolExecutor(2) as executor:
        cluster = wukong.ExecutorCluster(executor, store=url, timeout_s=60)
        graph = {"a": (tasks.increment, 1), "b": (tasks.increment, "a")}
        plan = plan_graph(graph, "b")
        submission = submit_plan(
            plan, cut_plan(plan, 2, None), cluster._store, fail_fast=True, n_retries=0
        )
        assert submission.request is not None
        cluster._store.jobs.create(submission.request)
        cluster.close()
        with wukong.ExecutorCluster(executor, store=url, timeout_s=60) as other:
            assert other.jobs() == (submission.job,)
            assert other.attach(submission.job) == 3
            assert other.jobs() == ()


@pytest.mark.slow
def test_closing_a_cluster_leaves_no_function_behind() -> None:
    with futures.ThreadPoolExecutor(2) as executor:
        cluster = wukong.ExecutorCluster(executor, timeout_s=60)
        assert cluster.get(tree(16), (4, 0)) == sum(range(1, 17))
        cluster.close()
        cluster.close()
        assert cluster._pool._functions == {}
        assert executor.submit(int, "3").result(SOON_S) == 3
        with pytest.raises(errors.WukongError, match="closed"):
            cluster.get(tree(2), (1, 0))


@pytest.mark.slow
def test_functions_give_their_workers_back_when_nothing_is_queued() -> None:
    with (
        futures.ThreadPoolExecutor(2) as executor,
        wukong.ExecutorCluster(executor, timeout_s=60) as cluster,
    ):
        cluster.get(tree(16), (4, 0))
        deadline = time.monotonic() + SOON_S
        while cluster._pool._functions and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cluster._pool._functions == {}
        assert cluster._pool.n_idle() == 2


def test_the_width_is_asked_of_the_executor() -> None:
    class Silent(futures.Executor):
        pass

    with pytest.raises(ValueError, match="give n_workers"):
        width_of(Silent())
    with pytest.raises(ValueError, match="n_workers is 0"):
        wukong.ExecutorCluster(Silent(), n_workers=0)
