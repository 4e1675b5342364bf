"""Pools of threads: waking, abandoning, ending."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool_stand_in import FolderStore, new_thread_executor, own_threads, wait_until

from wukong.errors import InvokeError
from wukong.executor.pool_threads import ThreadPool
from wukong.executor.work import Policy

WAIT_FOR_GO = "while not (folder / 'go').exists(): time.sleep(0.001)\nanswer = holder"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[ThreadPool, FolderStore]]:
    store = FolderStore(tmp_path)
    pool = ThreadPool(store, 2, Policy(), new_executor=new_thread_executor)
    with contextlib.closing(pool):
        wait_until(lambda: pool.n_idle() == 2)
        yield pool, store
        (tmp_path / "go").touch()


def test_queued_tokens_run_when_they_are_invoked(opened) -> None:
    pool, store = opened
    names = [f"token-{i:02}" for i in range(50)]
    for name in names:
        pool.invoke([store.jobs.put(name, "answer = holder")])
    assert {store.jobs.answer(name) for name in names} <= set(pool.holders.values())


def test_one_invocation_wakes_as_many_threads_as_there_is_work_for(opened) -> None:
    pool, store = opened
    first = store.jobs.put("a", WAIT_FOR_GO)
    store.jobs.put("b", WAIT_FOR_GO)
    pool.invoke([first])
    wait_until(lambda: pool.n_idle() == 0 and store.jobs.n_queued() == 0)
    (store.jobs.folder / "go").touch()
    assert {store.jobs.answer("a"), store.jobs.answer("b")} == set(pool.holders.values())


def test_a_thread_that_is_stuck_is_replaced(opened) -> None:
    pool, store = opened
    pool.invoke([store.jobs.put("stuck", WAIT_FOR_GO)])
    wait_until(lambda: store.jobs.n_queued() == 0)
    (path,) = (store.jobs.folder / "running").iterdir()
    stuck = path.name.partition("@")[2]
    pool.abandon(stuck)
    pool.abandon(stuck)
    wait_until(lambda: pool.n_idle() == 2)
    assert stuck not in pool.holders.values()
    assert len(pool.holders) == 2
    # The old one ends when it comes back, and takes nothing more.
    (store.jobs.folder / "go").touch()
    assert store.jobs.answer("stuck") == stuck
    wait_until(lambda: not any(t.name == f"wukong-{stuck}" for t in threading.enumerate()))


def test_an_idle_thread_may_be_abandoned_too(opened) -> None:
    pool, store = opened
    for holder in list(pool.holders.values()):
        pool.abandon(holder)
    wait_until(lambda: pool.n_idle() == 2)
    pool.invoke([store.jobs.put("a", "answer = holder")])
    assert store.jobs.answer("a") in pool.holders.values()


def test_closing_ends_all_threads_after_what_they_run(tmp_path: Path) -> None:
    threads = own_threads()
    store = FolderStore(tmp_path)
    pool = ThreadPool(store, 2, Policy(), new_executor=new_thread_executor)
    pool.invoke([store.jobs.put("a", "time.sleep(0.05)\nanswer = 1")])
    wait_until(lambda: store.jobs.n_queued() == 0)
    pool.close()
    pool.close()
    assert store.jobs.answer("a") == 1
    assert own_threads() == threads
    with pytest.raises(InvokeError, match="closed"):
        pool.invoke(())


def test_closing_does_not_wait_for_ever(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    pool = ThreadPool(store, 1, Policy(), new_executor=new_thread_executor)
    pool.invoke([store.jobs.put("a", WAIT_FOR_GO)])
    wait_until(lambda: store.jobs.n_queued() == 0)
    pool.close(grace_s=0.01)
    (tmp_path / "go").touch()
    store.jobs.answer("a")


def test_an_executor_that_fails_by_a_defect_is_an_error(opened, caplog) -> None:
    pool, store = opened
    pool.invoke([store.jobs.put("bad", "if not folder.joinpath('go').exists(): raise OSError(7)")])
    wait_until(lambda: len(store.jobs.released) >= 1)
    wait_until(lambda: pool.failure is not None)
    assert store.jobs.released[0][1] == "failed with OSError(7)"
    with pytest.raises(InvokeError, match="OSError: 7"):
        pool.invoke(())


@pytest.mark.slow
def test_a_long_token_has_heartbeats_and_an_idle_pool_has_none(opened) -> None:
    pool, store = opened
    pool.invoke([store.jobs.put("long", "time.sleep(0.35)\nanswer = executor.n_beats")])
    assert store.jobs.answer("long") >= 2
    time.sleep(0.15)  # one more look, which finds it idle
    beats = store.jobs.folder / "beats"
    n_beats = sum(path.stat().st_size for path in beats.iterdir())
    time.sleep(0.3)
    assert sum(path.stat().st_size for path in beats.iterdir()) == n_beats
