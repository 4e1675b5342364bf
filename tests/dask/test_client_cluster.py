"""What a client asks of the cluster itself: run, upload_file, plugins, events, facts, progress."""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
import warnings
import zipfile
from pathlib import Path
from typing import Any

import dask.array as da
import pytest
from distributed import (
    Client,
    WorkerPlugin,
    get_task_stream,
    get_worker,
    performance_report,
    progress,
    wait,
)
from distributed import (
    print as remote_print,
)
from distributed import (
    warn as remote_warn,
)
from distributed.diagnostics.plugin import SchedulerPlugin

from tests.dask.client_tasks import div, gate, inc, slow_inc


def fresh(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def test_run_calls_every_worker(client: Client) -> None:
    found = client.run(os.getpid)
    assert len(found) >= 1
    assert all(isinstance(pid, int) for pid in found.values())
    assert set(client.run(inc, 1).values()) == {2}
    assert set(client.run(inc, x=2).values()) == {3}


def test_run_calls_chosen_workers(client: Client) -> None:
    address = next(iter(client.run(os.getpid)))
    assert list(client.run(inc, 1, workers=[address])) == [address]


def test_run_raises(client: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        client.run(div, 1, 0)


def test_run_may_give_errors_back(client: Client) -> None:
    assert all(
        isinstance(error, ZeroDivisionError)
        for error in client.run(div, 1, 0, on_error="return").values()
    )
    assert client.run(div, 1, 0, on_error="ignore") == {}


def test_run_takes_coroutines(client: Client) -> None:
    async def f(x: int) -> int:
        return x + 1

    assert set(client.run(f, 1).values()) == {2}


def test_run_gives_the_worker(client: Client) -> None:
    def address(dask_worker: Any) -> str:
        return dask_worker.address

    assert all(isinstance(found, str) for found in client.run(address).values())


def test_run_on_the_scheduler(client: Client) -> None:
    assert client.run_on_scheduler(inc, 1) == 2
    assert isinstance(client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.address), str)


def test_an_uploaded_file_is_imported(client: Client, tmp_path: Path) -> None:
    name = fresh("uploaded")
    path = tmp_path / f"{name}.py"
    path.write_text("def f():\n    return 123\n")
    try:
        client.upload_file(str(path))

        def g() -> int:
            return __import__(name).f()

        assert client.submit(g, pure=False).result(timeout=15) == 123
    finally:
        sys.modules.pop(name, None)


def test_an_uploaded_file_can_be_replaced(client: Client, tmp_path: Path) -> None:
    name = fresh("replaced")
    path = tmp_path / f"{name}.py"

    def g() -> int:
        return __import__(name).f()

    try:
        for value in (1, 22):
            path.write_text(f"def f():\n    return {value}\n")
            client.upload_file(str(path))
            assert client.submit(g, pure=False).result(timeout=15) == value
    finally:
        sys.modules.pop(name, None)


def test_an_uploaded_archive_is_imported(client: Client, tmp_path: Path) -> None:
    name = fresh("zipped")
    path = tmp_path / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "x = 5\n")
    try:
        client.upload_file(str(path))

        def g() -> int:
            return __import__(name).x

        assert client.submit(g, pure=False).result(timeout=15) == 5
    finally:
        sys.modules.pop(name, None)


def test_a_file_that_is_not_there_is_not_uploaded(client: Client, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such-file"):
        client.upload_file(str(tmp_path / "no-such-file.py"))


class Marking(WorkerPlugin):
    """Leaves a value with each worker."""

    name = "marking-plugin"

    def __init__(self, value: int) -> None:
        self.value = value

    def setup(self, worker: Any) -> None:
        worker.a_marking_value = self.value

    def teardown(self, worker: Any) -> None:
        worker.a_marking_value = None


def marking_value() -> Any:
    return getattr(get_worker(), "a_marking_value", None)


def test_a_worker_plugin_is_set_up(client: Client) -> None:
    client.register_plugin(Marking(5))
    futures = [client.submit(marking_value, pure=False) for _ in range(4)]
    assert client.gather(futures) == [5] * 4
    client.unregister_worker_plugin("marking-plugin")


def test_a_plugin_takes_the_place_of_its_namesake(client: Client) -> None:
    client.register_plugin(Marking(1))
    client.register_plugin(Marking(2))
    assert client.submit(marking_value, pure=False).result() == 2
    client.unregister_worker_plugin("marking-plugin")


def test_an_unknown_plugin_cannot_be_removed(client: Client) -> None:
    with pytest.raises((KeyError, ValueError)):
        client.unregister_worker_plugin("no-such-plugin")


def test_setup_functions_are_called(client: Client) -> None:
    def setup(dask_worker: Any) -> None:
        dask_worker.a_setup_value = 7

    client.register_worker_callbacks(setup)
    got = client.submit(lambda: getattr(get_worker(), "a_setup_value", None), pure=False).result()
    assert got == 7


def test_a_plugin_must_be_one(client: Client) -> None:
    with pytest.raises(TypeError):
        client.register_plugin(object())


class Counting(SchedulerPlugin):
    """Counts clients."""

    name = "counting-plugin"


def test_a_scheduler_plugin_is_taken(client: Client) -> None:
    client.register_plugin(Counting())
    client.unregister_scheduler_plugin("counting-plugin")


def test_events_are_logged_and_read(client: Client) -> None:
    topic = fresh("topic")
    client.log_event(topic, {"a": 1})
    client.log_event(topic, "two")
    assert [message for _, message in client.get_events(topic)] == [{"a": 1}, "two"]
    assert topic in client.get_events()


def test_an_event_may_have_several_topics(client: Client) -> None:
    first, second = fresh("topic"), fresh("topic")
    client.log_event([first, second], 5)
    assert client.get_events(first)[0][1] == client.get_events(second)[0][1] == 5


def test_only_plain_data_are_events(client: Client) -> None:
    with pytest.raises(TypeError):
        client.log_event("topic", lambda: None)


def test_tasks_log_events(client: Client) -> None:
    topic = fresh("topic")
    client.submit(lambda: get_worker().log_event(topic, {"from": "task"})).result()
    deadline = time.monotonic() + 10
    while not client.get_events(topic) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.get_events(topic)[0][1]["from"] == "task"


def test_events_are_handed_to_subscribers(client: Client, wait_until: Any) -> None:
    topic = fresh("topic")
    seen: list[Any] = []
    client.subscribe_topic(topic, lambda event: seen.append(event[1]))
    client.log_event(topic, "first")
    wait_until(lambda: seen or client.log_event(topic, "again"))
    assert seen[0] in ("first", "again")
    client.unsubscribe_topic(topic)


def test_an_unknown_topic_cannot_be_left(client: Client) -> None:
    with pytest.raises(ValueError, match="no-such-topic"):
        client.unsubscribe_topic("no-such-topic")


def test_print_of_a_task_is_seen(
    client: Client, capsys: pytest.CaptureFixture[str], wait_until: Any
) -> None:
    printed = ""

    def is_printed() -> bool:
        nonlocal printed
        printed += capsys.readouterr().out
        return "hello from a task" in printed

    client.submit(lambda: remote_print("hello from a task"), pure=False).result()
    wait_until(is_printed)


def test_warnings_of_a_task_are_seen(client: Client, wait_until: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client.submit(lambda: remote_warn("careful, says a task"), pure=False).result()
        wait_until(lambda: any("careful" in str(warning.message) for warning in caught))


def test_logging_is_forwarded(
    client: Client, backend: str, caplog: pytest.LogCaptureFixture, wait_until: Any
) -> None:
    name = fresh("logger")

    def log() -> None:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.warning("logged by a task")

    with caplog.at_level(logging.INFO):
        client.forward_logging(name, level=logging.INFO)
        client.submit(log, pure=False).result()
        wait_until(lambda: "logged by a task" in caplog.text)
        client.unforward_logging(name)


def test_metadata_are_kept(client: Client) -> None:
    key = fresh("key")
    client.set_metadata(key, 123)
    assert client.get_metadata(key) == 123
    client.set_metadata([key + "-nested", "x"], 5)
    assert client.get_metadata([key + "-nested", "x"]) == 5
    assert client.get_metadata(key + "-nested") == {"x": 5}
    assert client.get_metadata("no-such-key", default=7) == 7
    with pytest.raises(KeyError):
        client.get_metadata("no-such-key")


def test_the_cluster_is_described(client: Client) -> None:
    description = client.scheduler_info()
    assert len(description["workers"]) == 2
    assert description["address"] == client.scheduler.address
    assert description["type"] == "Scheduler"
    for worker in description["workers"].values():
        assert worker["nthreads"] >= 1
        assert worker["memory_limit"] >= 0


def test_threads_are_counted(client: Client) -> None:
    assert sum(client.nthreads().values()) >= 2
    assert client.ncores() == client.nthreads()


def test_a_finished_key_has_a_place(client: Client) -> None:
    x = client.submit(inc, 1)
    wait(x)
    assert x.key in client.who_has()
    assert len(client.who_has([x])[x.key]) >= 1
    assert any(x.key in keys for keys in client.has_what().values())


def test_sizes_of_results_are_known(client: Client) -> None:
    x = client.submit(bytes, 100_000)
    wait(x)
    assert client.nbytes(summary=False)[x.key] >= 100_000
    assert sum(client.nbytes(summary=True).values()) >= 100_000


def test_running_keys_are_listed(client: Client, tmp_path: Path, wait_until: Any) -> None:
    x = client.submit(gate, str(tmp_path / "go"))
    wait_until(lambda: (tmp_path / "go.runs").exists())
    wait_until(lambda: any(x.key in keys for keys in client.processing().values()))
    (tmp_path / "go").touch()
    wait(x)


def test_versions_agree(client: Client) -> None:
    versions = client.get_versions(check=True)
    assert set(versions) >= {"scheduler", "workers", "client"}
    assert versions["client"]["packages"]["dask"]


def test_call_stacks_are_an_answer(client: Client, tmp_path: Path, wait_until: Any) -> None:
    x = client.submit(gate, str(tmp_path / "go"))
    wait_until(lambda: (tmp_path / "go.runs").exists())
    assert isinstance(dict(client.call_stack([x])), dict)
    (tmp_path / "go").touch()
    wait(x)


def test_a_profile_is_an_answer(client: Client) -> None:
    wait(client.map(slow_inc, range(4)))
    assert "children" in client.profile()


def test_logs_are_an_answer(client: Client) -> None:
    assert client.get_scheduler_logs(n=5) is not None
    assert client.get_worker_logs(n=5) is not None


def test_a_scheduler_file_is_written(client: Client, tmp_path: Path, backend: str) -> None:
    if backend.startswith("distributed"):
        pytest.skip("what it says of itself may hold tuples, which are no JSON")
    path = tmp_path / "scheduler.json"
    client.write_scheduler_file(str(path))
    assert client.scheduler.address in path.read_text()
    if client.scheduler.address.startswith("tcp"):
        with Client(scheduler_file=str(path), set_as_default=False) as second:
            assert second.submit(inc, 1).result() == 2


def test_rebalance_and_replicate_change_no_result(client: Client) -> None:
    futures = client.map(inc, range(4))
    wait(futures)
    client.rebalance(futures)
    client.replicate(futures, n=2)
    assert client.gather(futures) == [1, 2, 3, 4]


def test_benchmarks_of_hardware_are_left_to_the_user(client: Client) -> None:
    assert callable(client.benchmark_hardware)


def test_the_dashboard_link_is_text(client: Client) -> None:
    assert isinstance(client.dashboard_link, str) or client.dashboard_link is None


def test_progress_of_futures_is_shown(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    futures = client.map(slow_inc, range(5), delay_s=0.005)
    progress(futures, notebook=False)
    wait(futures)
    text = capsys.readouterr().out
    assert "Completed" in text or "#" in text or text == ""


def test_progress_runs_to_the_end(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    x = client.persist(da.ones((40, 40), chunks=(10, 10)) + 1)
    progress(x, notebook=False)
    wait(x)
    assert float(x.sum().compute()) == 3200
    assert "Traceback" not in capsys.readouterr().err


def test_the_task_stream_shows_tasks(client: Client) -> None:
    with get_task_stream(client=client) as stream:
        wait(client.map(inc, range(5)))
    client.get_task_stream(start=0, stop=None)
    assert isinstance(stream.data, (list, tuple))


def test_the_task_stream_names_keys(client: Client, wait_until: Any) -> None:
    client.get_task_stream()
    futures = client.map(slow_inc, range(3), delay_s=0.001)
    wait(futures)
    keys = {future.key for future in futures}
    wait_until(lambda: keys <= {record["key"] for record in client.get_task_stream()})


def test_a_performance_report_is_a_page(client: Client, tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    path = tmp_path / "report.html"
    with performance_report(filename=str(path)):
        client.gather(client.map(slow_inc, range(5), delay_s=0.002))
    text = path.read_text()
    assert "<html" in text.lower()
    assert len(text) > 1000


def test_stories_are_an_answer(client: Client) -> None:
    x = client.submit(inc, 1)
    wait(x)
    assert client.story(x) is not None


def test_actors_work_or_are_refused_clearly(client: Client, backend: str) -> None:
    class Counter:
        n = 0

        def increment(self) -> int:
            self.n += 1
            return self.n

    future = client.submit(Counter, actor=True)
    if backend.startswith("distributed"):
        counter = future.result()
        assert counter.increment().result() == 1
    else:
        with pytest.raises(Exception, match=r"[Aa]ctor"):
            future.result(timeout=10)


def test_the_shuffle_of_a_frame(client: Client) -> None:
    pd = pytest.importorskip("pandas")
    import dask.dataframe as dd

    pdf = pd.DataFrame({"a": [n % 7 for n in range(70)], "b": range(70)})
    frame = dd.from_pandas(pdf, npartitions=4)
    got = frame.shuffle("a").map_partitions(lambda part: part.groupby("a").b.sum()).compute()
    assert got.groupby(level=0).sum().tolist() == pdf.groupby("a").b.sum().tolist()
    assert len(got) == 7


def test_a_merge_of_frames(client: Client) -> None:
    pd = pytest.importorskip("pandas")
    import dask.dataframe as dd

    left = pd.DataFrame({"k": range(40), "x": range(40)})
    right = pd.DataFrame({"k": range(0, 40, 2), "y": range(20)})
    got = dd.merge(
        dd.from_pandas(left, npartitions=3), dd.from_pandas(right, npartitions=2), on="k"
    ).compute()
    want = left.merge(right, on="k")
    assert got.sort_values("k").y.tolist() == want.y.tolist()


async def test_run_is_awaitable(c: Any) -> None:
    assert set((await c.run(inc, 1)).values()) == {2}
    assert await c.run_on_scheduler(inc, 1) == 2


async def test_facts_are_awaitable(c: Any) -> None:
    x = c.submit(inc, 1)
    await x
    assert x.key in await c.who_has()
    assert sum((await c.nthreads()).values()) >= 2
    assert x.key in await c.nbytes(summary=False)
