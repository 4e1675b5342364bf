"""Pools of real processes: waking, dying, replacing, ending."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pool_stand_in import FolderStore, all_pids, open_pool, wait_dead, wait_until

from wukong.errors import InvokeError
from wukong.executor.pool import ProcessPool
from wukong.executor.pool_launch import describe_death, executor_environment, wake_pools


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ProcessPool, FolderStore]]:
    folder = tmp_path_factory.mktemp("store")
    pool, store = open_pool(folder, folder=folder / "pools", env={"COLOUR": "red"})
    with contextlib.closing(pool):
        pool.ready(20)
        yield pool, store


@pytest.fixture
def idle(shared: tuple[ProcessPool, FolderStore]) -> tuple[ProcessPool, FolderStore]:
    pool, store = shared
    pool.ready(20)
    wait_until(lambda: pool.n_idle() == 2)
    store.jobs.released.clear()
    return shared


@pytest.fixture
def run(idle: tuple[ProcessPool, FolderStore], request: pytest.FixtureRequest) -> Callable:
    """Runs source in an executor of the shared pool, and returns its answer."""
    pool, store = idle

    def run(source: str, number: int = 0) -> object:
        name = f"{request.node.name}-{number}".replace("/", "_")
        pool.invoke([store.jobs.put(name, source)])
        return store.jobs.answer(name)

    return run


# ------------------------------------------------------------------ waking


def test_a_queued_token_runs_when_it_is_invoked(idle, run) -> None:
    pool, _ = idle
    assert run("answer = holder") in pool.holders.values()
    assert run("answer = os.getpid()", 1) in pool.pids


def test_one_invocation_wakes_as_many_executors_as_there_is_work_for(idle) -> None:
    pool, store = idle
    # Each waits for the other: they end only if they run at the same time.
    meet = """
(folder / f"here-{holder}").touch()
while len(list(folder.glob("here-*"))) < 2: time.sleep(0.001)
"""
    first = store.jobs.put("meet-1", meet)
    store.jobs.put("meet-2", meet)
    pool.invoke([first])
    store.jobs.answer("meet-1")
    store.jobs.answer("meet-2")
    for path in store.jobs.folder.glob("here-*"):
        path.unlink()


def test_an_executor_is_idle_when_nothing_is_queued(idle, run) -> None:
    pool, store = idle
    assert pool.n_idle() == 2
    seen = run("answer = len(list((folder / 'running').iterdir()))")
    assert seen == 1
    wait_until(lambda: pool.n_idle() == 2)
    invocation = store.jobs.put(
        "busy", "while not (folder / 'go').exists(): time.sleep(0.001)\nanswer = 1"
    )
    pool.invoke([invocation])
    wait_until(lambda: pool.n_idle() == 1)
    (store.jobs.folder / "go").touch()
    store.jobs.answer("busy")


def test_a_hundred_invocations_of_a_busy_pool_are_all_run(idle) -> None:
    pool, store = idle
    names = [f"many-{i:03}" for i in range(100)]
    for name in names:
        pool.invoke([store.jobs.put(name, "answer = 1")])
    assert [store.jobs.answer(name) for name in names] == [1] * 100
    assert store.jobs.n_queued() == 0


def test_others_wake_a_pool_by_the_folder_of_its_store(idle) -> None:
    _, store = idle
    store.jobs.put("from-outside", "answer = 5")
    assert wake_pools(store.jobs.folder / "pools") == 1
    assert store.jobs.answer("from-outside") == 5


def test_the_fifo_of_a_dead_pool_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / "dead.wake"
    os.mkfifo(stale)
    assert wake_pools(tmp_path) == 0
    assert not stale.exists()


@pytest.mark.slow
def test_a_long_token_has_heartbeats_and_an_idle_executor_has_none(idle, run) -> None:
    _, store = idle
    beats = store.jobs.folder / "beats"
    holder = run("time.sleep(0.2)\nanswer = holder")
    n_beats = len((beats / holder).read_text())
    assert n_beats >= 2
    time.sleep(0.15)  # one more look, which finds it idle
    n_beats = sum(path.stat().st_size for path in beats.iterdir())
    time.sleep(0.3)
    assert sum(path.stat().st_size for path in beats.iterdir()) == n_beats


# ------------------------------------------------------------------ an executor's surroundings


def test_executors_have_the_client_s_path_and_directory(run) -> None:
    assert run("answer = sys.path") == sys.path
    assert run("answer = os.getcwd()", 1) == os.getcwd()


def test_executors_have_the_client_s_environment_and_what_was_added(run) -> None:
    environ = run("answer = dict(os.environ)")
    assert environ["COLOUR"] == "red"
    assert environ["PATH"] == os.environ["PATH"]


def test_blas_threads_share_the_cores_unless_the_user_says_otherwise(monkeypatch) -> None:
    monkeypatch.setattr("wukong.executor.pool_launch.CPU_COUNT", 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    found = executor_environment(3, {"MKL_NUM_THREADS": "7"})
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    assert [found[name] for name in names] == ["2", "5", "7"]


def test_all_executors_hash_strings_alike(monkeypatch) -> None:
    for given, used in (("", "0"), ("random", "0"), ("7", "7")):
        monkeypatch.setenv("PYTHONHASHSEED", given)
        assert executor_environment(2, {})["PYTHONHASHSEED"] == used


def test_executors_draw_different_random_numbers(idle, run) -> None:
    pool, store = idle
    draw = """
import random
(folder / f"drawn-{holder}").write_text(str(random.random()))
while len(list(folder.glob("drawn-*"))) < 2: time.sleep(0.001)
"""
    pool.invoke([store.jobs.put(name, draw) for name in ("draw-1", "draw-2")])
    store.jobs.answer("draw-1")
    store.jobs.answer("draw-2")
    assert len({path.read_text() for path in store.jobs.folder.glob("drawn-*")}) == 2


def test_an_interrupt_does_not_reach_executors(idle, run) -> None:
    pool, _ = idle
    pids = all_pids(pool)
    assert all(os.getsid(pid) != os.getsid(0) for pid in pids)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert run("answer = 1") == 1
    assert all_pids(pool) == pids


# ------------------------------------------------------------------ death of an executor


@pytest.mark.parametrize(
    ("deed", "cause"),
    [
        ("os._exit(3)", "exited with status 3"),
        ("os._exit(0)", "exited with status 0"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "was killed by signal 15 (SIGTERM)"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "was killed by signal 9 (SIGKILL, as the system does when memory runs out)",
        ),
    ],
    ids=["exit-3", "exit-0", "term", "kill"],
)
def test_a_dead_executor_is_replaced_and_its_work_is_queued_again(idle, run, deed, cause) -> None:
    pool, store = idle
    holders = set(pool.holders.values())
    source = f"""
died = folder / "died-{hash(deed)}"
if not died.exists():
    died.write_text(holder)
    {deed}
answer = holder
"""
    survivor = run(source)
    (dead,) = [name for name, _ in store.jobs.released]
    assert dead in holders
    assert survivor != dead
    assert store.jobs.released == [(dead, cause)]
    pool.ready(10)
    assert len(set(pool.holders.values()) - {dead}) == 2


def test_a_crash_is_named() -> None:
    assert describe_death(-signal.SIGSEGV) == "was killed by signal 11 (SIGSEGV)"
    assert describe_death(-63) == "was killed by signal 63"


def test_an_idle_executor_that_dies_is_replaced(idle) -> None:
    pool, store = idle
    pid, holder = next(iter(pool.holders.items()))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: [name for name, _ in store.jobs.released] == [holder])
    pool.ready(10)
    wait_until(lambda: len(pool.pids) == 2 and pool.n_idle() == 2)
    assert pid not in pool.pids


def test_a_killed_executor_takes_along_what_its_task_started(idle) -> None:
    pool, store = idle
    source = """
if not (folder / "sleeper").exists():
    sleeper = subprocess.Popen(["sleep", "60"])
    (folder / "sleeper").write_text(f"{sleeper.pid} {holder}")
    time.sleep(60)
"""
    pool.invoke([store.jobs.put("sleeps", source)])
    note = store.jobs.folder / "sleeper"
    wait_until(lambda: note.exists() and len(note.read_text().split()) == 2)
    pid, holder = note.read_text().split()
    pool.kill(holder)
    store.jobs.answer("sleeps")
    wait_dead([int(pid)])
    assert store.jobs.released == [(holder, "was stopped by its client")]


def test_killing_an_executor_that_is_gone_changes_nothing(idle) -> None:
    pool, _ = idle
    pids = pool.pids
    pool.kill("nobody")
    assert pool.pids == pids


def test_a_dead_executor_takes_along_what_its_task_started(idle, run) -> None:
    source = """
note = folder / "left"
if not note.exists():
    note.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    os._exit(1)
answer = int(note.read_text())
"""
    wait_dead([run(source)])


def test_an_executor_that_fails_by_a_defect_is_replaced(idle, run) -> None:
    pool, store = idle
    source = """
if not (folder / "defect").exists():
    (folder / "defect").touch()
    raise OSError(7)
answer = 1
"""
    assert run(source) == 1
    assert [cause for _, cause in store.jobs.released] == ["failed with OSError: 7"]
    assert pool.failure is None


@pytest.mark.slow
def test_work_goes_on_while_executors_are_killed_again_and_again(idle) -> None:
    pool, store = idle
    names = [f"storm-{i:03}" for i in range(60)]
    for name in names:
        store.jobs.put(name, "time.sleep(0.01)\nanswer = 1")
    pool.invoke(())
    for _ in range(12):
        time.sleep(0.03)
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(pool.pids[0], signal.SIGKILL)
    assert [store.jobs.answer(name) for name in names] == [1] * 60
    assert pool.failure is None


# ------------------------------------------------------------------ death of the zygote


@pytest.mark.slow
def test_a_killed_zygote_is_replaced_with_all_executors(tmp_path: Path) -> None:
    pool, store = open_pool(tmp_path)
    with contextlib.closing(pool):
        pool.ready(20)
        source = "time.sleep(60 if not (folder / 'seen').exists() else 0)\nanswer = holder"
        pool.invoke([store.jobs.put("long", source)])
        wait_until(lambda: store.jobs.n_queued() == 0)
        before = all_pids(pool)
        (tmp_path / "seen").touch()
        os.kill(before[0], signal.SIGKILL)
        assert store.jobs.answer("long") not in {name for name, _ in store.jobs.released}
        pool.ready(20)
        wait_dead(before)
        assert not set(before) & set(all_pids(pool))
        causes = {cause for _, cause in store.jobs.released}
        assert len(store.jobs.released) == 2
        assert causes == {f"killed, as the process that forked it {describe_death(-9)}"}


# ------------------------------------------------------------------ starts that fail


@pytest.mark.slow
def test_executors_that_cannot_start_are_an_error_and_no_storm(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    pool, store = open_pool(tmp_path)
    with contextlib.closing(pool):
        with pytest.raises(InvokeError, match="RuntimeError: the store is broken"):
            pool.ready(20)
        with pytest.raises(InvokeError, match="the store is broken"):
            pool.invoke(())
        time.sleep(0.5)
        assert 3 <= (tmp_path / "starts").stat().st_size <= 12
        # When the reason is gone, so is the error.
        (tmp_path / "broken").unlink()
        wait_until(lambda: pool.failure is None)
        pool.ready(20)
        pool.invoke([store.jobs.put("works", "answer = 1")])
        assert store.jobs.answer("works") == 1


@pytest.mark.slow
def test_a_module_that_cannot_be_preloaded_is_an_error_that_names_it(tmp_path: Path) -> None:
    pool, _ = open_pool(tmp_path, preload=("no_such_module",))
    with (
        contextlib.closing(pool),
        pytest.raises(InvokeError, match="No module named 'no_such_module'"),
    ):
        pool.ready(20)


def test_executors_that_are_not_ready_in_time_are_an_error(tmp_path: Path) -> None:
    pool, _ = open_pool(tmp_path)
    with (
        contextlib.closing(pool),
        pytest.raises(InvokeError, match=r"0 of 2 executors have started in 0\.0 s"),
    ):
        pool.ready(0.0)
