"""What a user sees of a local cluster, with processes and with threads."""

import logging
import re
import threading
import time
from typing import Any

import dask
import dask.array as da
import fault_tasks as tasks
import pytest
from dask import delayed

import wukong
from wukong import errors
from wukong.executor.serialize_failures import RemoteTraceback

MODES = {"processes": True, "threads": False}
SOON_S = 5.0
"""Far more than any of the waits below takes, and far less than a hang."""


def start_cluster(mode: str, n_workers: int = 2, **options) -> wukong.LocalCluster:
    return wukong.LocalCluster(n_workers, processes=MODES[mode], timeout_s=60, **options)


@pytest.fixture(scope="module", params=list(MODES))
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def shared(mode):
    with start_cluster(mode) as cluster:
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        yield cluster


@pytest.fixture
def cluster(shared):
    """A warm cluster; afterwards nothing of any job may be left in its store."""
    yield shared
    assert shared.jobs() == ()
    if shared._store.blobs is not None:
        assert shared._store.blobs.used_bytes() == 0
    assert shared.get({"alive": (tasks.increment, 1)}, "alive") == 2


@pytest.fixture
def processes(cluster, mode):
    if mode != "processes":
        pytest.skip("threads share objects")
    return cluster


def a_graph(task) -> dict:
    """`task` with one before it and one behind it."""
    return {"before": (tasks.increment, 1), "it": task, "behind": (tasks.increment, "it")}


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


# ---------------------------------------------------------------- results


def test_results_have_the_shape_of_the_request(cluster) -> None:
    dsk = {"a": 1, "b": (tasks.increment, "a"), "c": (tasks.add, "a", "b")}
    assert cluster.get(dsk, "c") == 3
    assert cluster.get(dsk, ["a", ["b", "c"], "c"]) == (1, (2, 3), 3)
    assert cluster.get(dsk, []) == ()


@pytest.mark.slow
@pytest.mark.slow
def test_collections_compute(cluster) -> None:
    x = da.arange(1000, chunks=100)
    assert (x * 2).sum().compute(scheduler=cluster.get) == 999_000


def test_several_threads_may_compute_at_once(cluster) -> None:
    found = {}

    def compute(number: int) -> None:
        dsk = {("x", i): (tasks.add, i, number) for i in range(50)}
        found[number] = cluster.get(dsk, list(dsk))

    threads = [threading.Thread(target=compute, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S)
    assert found == {n: tuple(range(n, n + 50)) for n in range(4)}


def test_the_report_is_of_the_last_job(cluster) -> None:
    cluster.get(a_graph((tasks.increment, "before")), "behind")
    report = cluster.report()
    assert (report.tasks, report.status, report.deaths, report.retries) == (3, "done", 0, 0)
    assert "executor" in report.story("it")


def test_a_new_cluster_has_no_report(mode) -> None:
    with start_cluster(mode, 1) as cluster, pytest.raises(errors.WukongError, match="no job has"):
        cluster.report()


def test_a_closed_cluster_says_so(mode) -> None:
    cluster = start_cluster(mode, 1)
    cluster.close()
    cluster.close()
    with pytest.raises(errors.WukongError, match="closed"):
        cluster.get({"a": (tasks.increment, 1)}, "a")
    assert "closed" in repr(cluster)


def test_a_cluster_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="n_workers is 0"):
        wukong.LocalCluster(0)


# ---------------------------------------------------------------- errors


ENDS = {
    "raise": (ZeroDivisionError, "division by zero"),
    "exit": (errors.TaskError, r"called sys.exit\(3\)"),
    "memory": (MemoryError, "no room for 3 TB"),
    "recursion": (RecursionError, "recursion"),
    "stubborn": (tasks.Stubborn, "2 and 2"),
    "interrupt": (KeyboardInterrupt, "not the user's"),
    "stop": (StopIteration, "2"),
}


@pytest.mark.parametrize("how", ENDS)
def test_an_exception_arrives_as_itself_with_the_key(cluster, mode, how) -> None:
    kind, text = ENDS[how]
    with pytest.raises(kind, match=text) as caught:
        cluster.get(a_graph((tasks.go_wrong, how, "before")), "behind")
    assert notes(caught.value) == ["Raised by the task 'it'"]
    if mode == "processes":
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in go_wrong" in str(caught.value.__cause__)
        assert "wukong/executor" not in str(caught.value.__cause__)


def test_the_first_exception_ends_the_job_at_once(cluster) -> None:
    dsk = {"bad": (tasks.go_wrong, "raise", 1), "slow": (tasks.sleep, 0.4)}
    begun_at = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        cluster.get(dsk, ["bad", "slow"])
    assert time.monotonic() - begun_at < 0.3


def test_a_graph_that_cannot_run_is_named_before_anything_starts(cluster) -> None:
    with pytest.raises(errors.CycleError, match="'a'"):
        cluster.get({"a": (tasks.increment, "b"), "b": (tasks.increment, "a")}, "a")
    with pytest.raises(errors.MissingKey, match="'z'"):
        cluster.get({"a": (tasks.increment, 1)}, "z")


def test_a_task_that_cannot_be_pickled_is_named(processes) -> None:
    dsk = a_graph((threading.Lock().acquire, "before"))
    with pytest.raises(errors.SerializationError, match=r"the task 'it' .*lock"):
        processes.get(dsk, "behind")


def test_an_argument_that_cannot_be_pickled_is_named(processes) -> None:
    dsk = a_graph((tasks.add, "before", threading.Lock()))
    with pytest.raises(errors.SerializationError, match=r"the task 'it' .*_thread.lock"):
        processes.get(dsk, "behind")


def test_a_large_shared_constant_that_cannot_be_pickled_is_named(processes) -> None:
    large = [bytes(100_000), threading.Lock()]
    dsk = {"large": large, **{("x", i): (tasks.add, i, "large") for i in range(100)}}
    with pytest.raises(errors.SerializationError, match=r"the task \('x', \d+\) .*_thread.lock"):
        processes.get(dsk, list(dsk))


def test_a_result_that_cannot_be_pickled_is_named(processes) -> None:
    with pytest.raises(errors.SerializationError, match=r"_thread\.lock") as caught:
        processes.get({"a": (tasks.increment, 1), "it": (tasks.make_lock, "a")}, ["a", "it"])
    assert notes(caught.value) == ["Raised by the task 'it'"]


# ---------------------------------------------------------------- retries


@pytest.mark.parametrize(("n_raises", "n_retries"), [(0, 0), (1, 1), (2, 2), (2, 5)])
def test_a_task_is_retried_as_annotated(cluster, tmp_path, n_raises, n_retries) -> None:
    with dask.annotate(retries=n_retries):
        task = delayed(tasks.raise_at_first)(tmp_path, "runs", n_raises, dask_key_name="it")
    assert task.compute(scheduler=cluster.get) == n_raises + 1
    assert tasks.runs(tmp_path) == {"runs": n_raises + 1}
    assert cluster.report().retries == n_raises
    times = "1 time" if n_raises == 1 else f"{n_raises} times"
    assert (f"run again {times}" in cluster.report().story("it")) == (n_raises > 0)


@pytest.mark.parametrize("n_retries", [0, 2])
def test_the_last_exception_is_the_one_that_counts(cluster, tmp_path, n_retries) -> None:
    with dask.annotate(retries=n_retries):
        task = delayed(tasks.raise_at_first)(tmp_path, "runs", 9)
    with pytest.raises(OSError, match=f"run {n_retries + 1}"):
        task.compute(scheduler=cluster.get)
    assert tasks.runs(tmp_path) == {"runs": n_retries + 1}


def test_retries_without_annotation_are_configured(cluster, tmp_path) -> None:
    dsk = {"it": (tasks.raise_at_first, str(tmp_path), "runs", 2)}
    with dask.config.set({"wukong.job.retries": 2}):
        assert cluster.get(dsk, "it") == 3


@pytest.mark.slow
def test_an_annotation_around_compute_holds_for_all_tasks(cluster, tmp_path) -> None:
    x = da.ones(4, chunks=2).map_blocks(
        lambda block: block * tasks.raise_at_first(tmp_path, "runs", 1), dtype=float
    )
    with dask.annotate(retries=1):
        assert x.sum().compute(scheduler=cluster.get) > 0


# ---------------------------------------------------------------- deadlines


def test_a_job_past_its_deadline_says_how_it_stood(cluster) -> None:
    dsk = dict.fromkeys(range(4), (tasks.sleep, 0.3))
    with pytest.raises(errors.JobTimeout) as caught:
        cluster.get(dsk, list(dsk), timeout_s=0.1)
    text = str(caught.value)
    stood = r"0 of 4 tasks done, [12] strands running, [23] queued, 0 retried, 0 attempts lost"
    assert re.search(stood, text)


@pytest.mark.slow
@pytest.mark.slow
def test_a_waiting_client_says_what_it_waits_for_less_and_less_often(mode, caplog) -> None:
    with dask.config.set({"wukong.job.log-after-s": 0.05}), start_cluster(mode, 1) as cluster:
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        caplog.clear()
        with caplog.at_level(logging.INFO, "wukong"):
            cluster.get({"a": (tasks.sleep, 0.5)}, "a")
    waited = [r.getMessage() for r in caplog.records if "waited" in r.getMessage()]
    assert len(waited) == 3  # after 0.05, 0.15 and 0.35 s
    assert all("0 of 1 tasks done, 1 strands running" in line for line in waited)


@pytest.mark.slow
def test_closing_a_cluster_cancels_what_other_threads_wait_for(mode) -> None:
    cluster = start_cluster(mode, 1)
    found: list[BaseException] = []

    def compute() -> None:
        try:
            cluster.get({"a": (tasks.sleep, 0.5)}, "a")
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    while not cluster.jobs():
        time.sleep(0.01)
    cluster.close()
    thread.join(SOON_S)
    assert [type(error) for error in found] == [errors.JobCancelled]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["error", "deadline"])
def test_an_executor_that_is_stuck_in_an_ended_job_is_replaced(mode, end) -> None:
    with start_cluster(mode) as cluster:
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        before = set(cluster._pool.holders.values())
        dsk = {"slow": (tasks.sleep, 5), "end": (tasks.raise_later, 0.3)}
        if end == "error":
            with pytest.raises(ZeroDivisionError):
                cluster.get(dsk, ["slow", "end"])
        else:
            with pytest.raises(errors.JobTimeout):
                cluster.get(dsk, ["slow", "end"], timeout_s=0.1)
        begun_at = time.monotonic()
        # Two strands that take long enough to need both executors.
        dsk = dict.fromkeys(range(16), (tasks.sleep, 0.5))
        cluster.get(dsk, list(dsk))
        assert time.monotonic() - begun_at < 7.5
        assert len(set(cluster._pool.holders.values()) - before) == 1


def test_attaching_to_an_unknown_job_names_those_that_exist(cluster) -> None:
    with pytest.raises(errors.JobNotFound, match="no job 'x' here; there are: none"):
        cluster.attach("x")


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ({"host": "0.0.0.0:8786"}, "distributed.Client"),
        ({"proxy_address": "10.0.0.1"}, "LambdaCluster"),
        ({"num_fargate_nodes": 25}, "rediss"),
    ],
)
def test_arguments_of_the_first_version_are_answered(argument: dict[str, Any], answer: str) -> None:
    with (
        pytest.warns(FutureWarning, match=answer) as caught,
        wukong.LocalCluster(1, processes=False, **argument) as cluster,
    ):
        assert cluster.get({"x": 1}, "x") == 1
    assert len(caught) == 1
    assert caught[0].filename == __file__
