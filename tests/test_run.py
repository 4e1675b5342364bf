"""The executor's driver on real stores, in this process: what it commits, splits, hands over.

Tasks call the driver themselves (`beat`, `drain`), as the heartbeat thread would while they run; so
every interruption comes at a known place.
"""

import threading

import dask
import pytest

from tests.executor_world import World, fail, interruptions, large, n_runs, run_all, task
from wukong.errors import StoreFull
from wukong.executor import ops, run
from wukong.executor.messages import HolderId, Status
from wukong.executor.wire import raise_error


@pytest.fixture(params=["memory", "local"])
def world(request, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "LOOK_AFTER_S", 0.0)
    monkeypatch.setattr(ops, "LOOK_SHARE", 0.0)
    monkeypatch.setattr(run, "HAND_OVER_AFTER_S", 0.0)
    n_runs.clear()
    interruptions.clear()
    world = World("memory://" if request.param == "memory" else f"local://{tmp_path}/store")
    yield world
    world.close()


def independent(n: int) -> dict:
    return {("x", i): (task, i) for i in range(n)}


def chain(n: int) -> dict:
    return {("x", 0): (task, 0)} | {("x", i): (task, i, ("x", i - 1)) for i in range(1, n)}


# ---------------------------------------------------------------- from tokens to results


def test_a_strand_is_one_commit_whatever_it_holds(world) -> None:
    submission = world.launch(chain(100), ("x", 99), n_executors=8)
    run_all(world.executor())
    assert world.results(submission) == 100
    view = world.view(submission.job)
    assert (view.status, view.n_tasks_done) == (Status.DONE, 100)
    assert view.n_commits == view.n_strands == view.n_starts


def test_an_executor_becomes_what_it_has_made_ready(world) -> None:
    graph = {("x", i): (task, i) for i in range(4)}
    graph |= {("y", i): (task, 4 + i, ("x", 2 * i), ("x", 2 * i + 1)) for i in range(2)}
    graph["z"] = (task, 6, ("y", 0), ("y", 1))
    submission = world.launch(graph, "z", is_cut=False)
    run_all(world.executor())
    assert world.results(submission) == 7
    records = [run.trace.read(packed) for packed in world.store.jobs.traces(submission.job)]
    assert [record.is_invoked for record in records].count(True) == 4
    assert [record.is_invoked for record in records].count(False) == 3
    assert world.invoker.n_invoked == 0


def test_an_executor_that_takes_nothing_says_so(world) -> None:
    assert not world.executor().take()


def test_a_token_that_is_spent_is_refused_in_silence(world) -> None:
    submission = world.launch(independent(1), ("x", 0))
    request = submission.request
    assert request is not None
    executor = world.executor()
    run_all(executor)
    executor.run(submission.job, f"{submission.job}.0.0")
    assert n_runs == {0: 1}
    assert executor.held is None


def test_two_executors_share_the_strands(world) -> None:
    submission = world.launch(independent(40), list(independent(40)), n_executors=2)
    run_all(world.executor("one"), world.executor("two"))
    assert world.results(submission) == (1,) * 40
    assert set(n_runs.values()) == {1}


def test_the_first_error_ends_a_fail_fast_job(world) -> None:
    graph = {"bad": (fail, 0), "behind": (task, 1, "bad")}
    submission = world.launch(graph, "behind")
    run_all(world.executor())
    view = world.view(submission.job)
    assert view.status is Status.FAILED
    assert view.n_queued == view.n_running == 0
    assert n_runs == {0: 1}
    assert submission.wire.read_error(view.error).key is not None


def test_errors_are_values_otherwise(world) -> None:
    graph = {"bad": (fail, 0), "behind": (task, 1, "bad"), "beside": (task, 2)}
    submission = world.launch(graph, ["bad", "behind", "beside"], fail_fast=False)
    run_all(world.executor())
    assert world.view(submission.job).status is Status.DONE
    bad, behind, beside = world.results(submission)
    assert bad.key == behind.key
    assert beside == 1
    assert n_runs == {0: 1, 2: 1}


# ---------------------------------------------------------------- delayed output


def a_fan_in(n_bytes: int) -> dict:
    graph = {("x", i): (large, i, n_bytes) for i in range(4)}
    return graph | {"all": (lambda *values: sum(map(len, values)), *graph)}


@pytest.mark.parametrize(("absorb_bytes", "n_blobs"), [(0, 4), (1000, 3)])
def test_the_last_input_of_a_strand_is_never_put(world, absorb_bytes, n_blobs) -> None:
    if world.store.blobs is None:
        pytest.skip("objects are never put")
    submission = world.launch(a_fan_in(200_000), "all", is_cut=False)
    run_all(world.executor(absorb_bytes=absorb_bytes))
    assert world.results(submission) == 800_000
    records = [run.trace.read(packed) for packed in world.store.jobs.traces(submission.job)]
    assert sum(record.n_blobs_written for record in records) == n_blobs


# ---------------------------------------------------------------- splitting


def test_a_long_run_gives_away_what_has_not_begun(world) -> None:
    submission = world.launch(independent(40), list(independent(40)))
    n_strands = world.view(submission.job).n_strands
    one, two = world.executor("one"), world.executor("two")
    world.invoker.n_idle_now = 1

    def beat() -> None:
        one.beat()
        world.invoker.n_idle_now = 0
        run_all(two)

    interruptions[0] = beat
    run_all(one)
    assert world.results(submission) == (1,) * 40
    assert n_runs == dict.fromkeys(range(40), 1)
    view = world.view(submission.job)
    assert view.n_strands > n_strands
    assert view.n_tasks_done == 40
    assert world.invoker.n_invoked == view.n_strands - n_strands - 1  # one piece is kept


def test_pieces_of_a_split_run_get_the_large_constants_that_they_read(world) -> None:
    constant = bytes(200_000)
    graph = {
        ("x", i): (lambda name, values: task(name) + len(values), i, constant) for i in range(40)
    }
    submission = world.launch(graph, list(graph), n_executors=2)
    one, two = world.executor("one"), world.executor("two")
    world.invoker.n_idle_now = 1

    def beat() -> None:
        one.beat()
        world.invoker.n_idle_now = 0
        run_all(two)

    n_strands = world.view(submission.job).n_strands
    interruptions[0] = beat
    run_all(one)
    assert world.view(submission.job).n_strands > n_strands
    assert world.results(submission) == (200_001,) * 40
    assert set(n_runs.values()) == {1}


def test_a_split_in_the_middle_of_a_chain_of_values_loses_none(world) -> None:
    graph = independent(20)
    graph |= {("y", i): (task, 100 + i, ("x", i), ("x", (i + 7) % 20)) for i in range(20)}
    submission = world.launch(graph, [("y", i) for i in range(20)])
    one, two = world.executor("one"), world.executor("two")
    world.invoker.n_idle_now = 1
    for name in (2, 9, 105):
        interruptions[name] = one.beat
    run_all(one)
    run_all(two)
    assert world.view(submission.job).n_strands > 3
    assert world.results(submission) == (3,) * 20
    assert set(n_runs.values()) == {1}
    assert len(n_runs) == 40


@pytest.mark.parametrize(("n_idle", "split"), [(0, True), (1, False)])
def test_nothing_is_given_away_without_need(world, n_idle, split) -> None:
    submission = world.launch(independent(40), list(independent(40)))
    n_strands = world.view(submission.job).n_strands
    executor = world.executor(split=split)
    world.invoker.n_idle_now = n_idle
    for name in range(40):
        interruptions[name] = executor.beat
    run_all(executor)
    assert world.view(submission.job).n_strands == n_strands
    assert n_runs == dict.fromkeys(range(40), 1)


def test_the_last_task_of_a_run_is_not_split(world) -> None:
    submission = world.launch(independent(1), ("x", 0))
    executor = world.executor()
    world.invoker.n_idle_now = 1
    interruptions[0] = executor.beat
    run_all(executor)
    assert world.view(submission.job).n_strands == 1


# ---------------------------------------------------------------- ending


def test_an_executor_that_is_to_end_commits_what_is_done(world) -> None:
    submission = world.launch(independent(8), list(independent(8)))
    one = world.executor("one")
    interruptions[2] = one.drain
    run_all(one)
    assert n_runs == {0: 1, 1: 1, 2: 1}
    view = world.view(submission.job)
    assert (view.n_tasks_done, view.n_running) == (3, 0)
    assert view.n_queued > 0
    run_all(world.executor("two"))
    assert world.results(submission) == (1,) * 8
    assert n_runs == dict.fromkeys(range(8), 1)


def test_a_task_that_goes_on_after_that_is_left_to_others(world) -> None:
    submission = world.launch(independent(8), list(independent(8)))
    one = world.executor("one")

    def drain_and_go_on() -> None:
        one.drain()
        one.beat()
        assert world.view(submission.job).n_running == 0

    interruptions[2] = drain_and_go_on
    run_all(one)
    assert world.view(submission.job).n_tasks_done == 2
    run_all(world.executor("two"))
    assert world.results(submission) == (1,) * 8
    assert n_runs == {**dict.fromkeys(range(8), 1), 2: 2}


def test_an_only_task_that_goes_on_is_left_to_others_too(world) -> None:
    submission = world.launch(independent(1), ("x", 0))
    one = world.executor("one")
    interruptions[0] = lambda: (one.drain(), one.beat())
    run_all(one)
    assert world.view(submission.job).n_queued == 1
    run_all(world.executor("two"))
    assert world.results(submission) == 1
    assert n_runs == {0: 2}


# ---------------------------------------------------------------- work in vain


def test_a_run_stops_when_its_job_is_over(world) -> None:
    submission = world.launch(independent(8), list(independent(8)))
    executor = world.executor(heartbeat_s=0.0)

    def cancel() -> None:
        world.store.jobs.cancel(submission.job)
        executor.beat()

    interruptions[1] = cancel
    run_all(executor)
    assert n_runs == {0: 1, 1: 1}
    assert executor.held is None
    assert world.n_stuck == 0


def test_a_task_that_goes_on_after_its_job_is_stuck_once(world, monkeypatch) -> None:
    monkeypatch.setattr(run, "STUCK_AFTER_S", 0.0)
    submission = world.launch(independent(2), list(independent(2)))
    executor = world.executor(heartbeat_s=0.0)

    def cancel() -> None:
        world.store.jobs.cancel(submission.job)
        for _ in range(4):
            executor.beat()

    interruptions[0] = cancel
    run_all(executor)
    assert world.n_stuck == 1


def test_a_commit_of_a_job_that_is_over_leaves_no_blob(world) -> None:
    graph = {"a": (large, 0, 200_000), "b": (task, 1, (len, "a"))}
    submission = world.launch(graph, ["a", "b"])
    assert world.view(submission.job).n_strands == 1
    interruptions[1] = lambda: world.store.jobs.cancel(submission.job)
    run_all(world.executor())
    if world.store.blobs is not None:
        assert world.store.blobs.used_bytes() == 0


def test_a_program_that_is_gone_is_an_error_of_the_job(world) -> None:
    if world.store.blobs is None:
        pytest.skip("no blobs")
    graph = {"a": (large, 0, 10), "b": (len, bytes(range(256)) * 1000)}
    submission = world.launch(graph, ["a", "b"])
    world.store.blobs.delete_job(submission.job)
    run_all(world.executor())
    view = world.view(submission.job)
    assert view.status is Status.FAILED
    assert "MissingBlob" in submission.wire.read_error(view.error).type_name


@pytest.mark.parametrize("n_times", [2, 1000])
def test_a_value_without_room_is_an_error_when_that_goes_on(world, monkeypatch, n_times) -> None:
    if world.store.blobs is None:
        pytest.skip("no blobs")
    submission = world.launch({"a": (large, 0, 200_000)}, "a")
    put_many, n_tried = world.store.blobs.put_many, []

    def refuse(items) -> None:
        n_tried.append(1)
        if len(n_tried) <= n_times:
            raise StoreFull("no room for blob a of 200068 bytes")
        put_many(items)

    monkeypatch.setattr(world.store.blobs, "put_many", refuse)
    run_all(world.executor(full_s=0.1, retry_s=0.01))
    view = world.view(submission.job)
    if n_times == 2:
        assert view.status is Status.DONE
        return
    assert view.status is Status.FAILED
    error = submission.wire.read_error(view.error)
    assert (error.key, error.message) == (0, "no room for blob a of 200068 bytes")
    assert n_runs == {0: 1}


# ---------------------------------------------------------------- second starts


def test_of_two_attempts_the_first_commit_wins(world) -> None:
    submission = world.launch(chain(3), ("x", 2))
    one, two = world.executor("one", heartbeat_s=0.0), world.executor("two")
    jobs = world.store.jobs

    def start_again() -> None:
        (token,) = jobs.running(submission.job)
        assert token.n_starts == 1
        assert [i.token for i in jobs.duplicate(submission.job, [token.token])] == [token.token]
        assert jobs.duplicate(submission.job, [token.token]) == ()
        one.beat()
        assert two.take()
        assert jobs.running(submission.job) == ()

    interruptions[1] = start_again
    run_all(one)
    assert world.results(submission) == 3
    view = world.view(submission.job)
    assert (view.n_commits, view.n_tasks_done, view.n_deaths) == (1, 3, 0)
    assert n_runs == {0: 2, 1: 2, 2: 2}


# ---------------------------------------------------------------- tasks that may run once


@pytest.mark.parametrize("fail_fast", [True, False])
def test_a_task_that_may_run_once_is_not_run_after_a_death(world, fail_fast) -> None:
    with dask.annotate(repeatable=False):
        submission = world.launch(independent(3), list(independent(3)), fail_fast=fail_fast)
    dead = HolderId("dead")
    assert world.store.jobs.take(dead, run.new_attempt()) is not None
    world.store.jobs.release(dead, "was killed")
    run_all(world.executor())
    assert n_runs.get(0, 0) == 0
    view = world.view(submission.job)
    if fail_fast:
        assert view.status is Status.FAILED
        text = str(raise_error(submission.wire.read_error(view.error), "it"))
    else:
        assert view.status is Status.DONE
        text = str(raise_error(world.results(submission)[0], "it"))
    assert text == "the task may not be run again, and an executor that held it was killed"


def test_a_task_that_may_run_once_is_not_handed_over(world) -> None:
    with dask.annotate(repeatable=False):
        submission = world.launch(independent(3), list(independent(3)))
    one = world.executor("one")
    interruptions[0] = lambda: (one.drain(), one.beat())
    run_all(one)
    run_all(world.executor("two"))
    assert world.results(submission) == (1,) * 3
    assert n_runs == {0: 1, 1: 1, 2: 1}


# ---------------------------------------------------------------- several threads


@pytest.mark.slow
def test_a_heartbeat_thread_may_split_at_any_moment(world) -> None:
    n_tasks = 3000
    submission = world.launch(independent(n_tasks), list(independent(n_tasks)))
    executors = [world.executor(str(i)) for i in range(2)]
    world.invoker.n_idle_now = 1
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.is_set():
            for executor in executors:
                executor.beat()

    threads = [threading.Thread(target=run_all, args=(e,)) for e in executors]
    heart = threading.Thread(target=beat)
    for thread in (*threads, heart):
        thread.start()
    for thread in threads:
        thread.join(20)
    is_over.set()
    heart.join(20)
    run_all(*executors)  # what one left when the other had ended
    assert world.results(submission) == (1,) * n_tasks
    assert n_runs == dict.fromkeys(range(n_tasks), 1)
