"""How pools of real processes end: closed, with their client, or killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from pool_stand_in import all_pids, open_pool, own_descriptors, own_threads, wait_dead, wait_until

from wukong.errors import InvokeError

# ------------------------------------------------------------------ the end


@pytest.mark.slow
def test_closing_leaves_no_process_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    threads, descriptors = own_threads(), own_descriptors()
    for _ in range(2):
        pool, _ = open_pool(tmp_path, folder=tmp_path / "pools")
        pool.ready(20)
        pids = all_pids(pool)
        pool.close()
        assert not any(map(psutil.pid_exists, pids))
        pool.close()
    assert own_threads() == threads
    assert own_descriptors() == descriptors
    assert list((tmp_path / "pools").iterdir()) == []
    with pytest.raises(InvokeError, match="closed"):
        pool.invoke(())


@pytest.mark.slow
def test_closing_lets_executors_finish_what_they_run(tmp_path: Path) -> None:
    pool, store = open_pool(tmp_path)
    pool.ready(20)
    pool.invoke([store.jobs.put("a", "time.sleep(0.3)\nanswer = 1")])
    wait_until(lambda: store.jobs.n_queued() == 0)
    store.jobs.put("b", "answer = 2")
    pool.close()
    assert (tmp_path / "done" / "a").exists()
    assert store.jobs.released == []


@pytest.mark.slow
def test_closing_kills_executors_after_the_grace(tmp_path: Path) -> None:
    pool, store = open_pool(tmp_path)
    pool.ready(20)
    pool.invoke([store.jobs.put("a", "time.sleep(60)")])
    wait_until(lambda: store.jobs.n_queued() == 0)
    pids = all_pids(pool)
    pool.close(grace_s=0.2)
    assert not any(map(psutil.pid_exists, pids))
    assert len(store.jobs.released) == 1
    assert store.jobs.n_queued() == 1


def test_closing_before_anything_has_started_is_quick(tmp_path: Path) -> None:
    pool, _ = open_pool(tmp_path)
    pids = all_pids(pool)
    pool.close()
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.slow
def test_idle_executors_take_little_memory(tmp_path: Path) -> None:
    pool, _ = open_pool(tmp_path, preload=("numpy", "dask.base"))
    with contextlib.closing(pool):
        pool.ready(20)
        pss = [psutil.Process(pid).memory_full_info().pss for pid in all_pids(pool)]
        assert sum(pss) <= 120 << 20


# ------------------------------------------------------------------ the end of the client

CLIENT = """
    import json, os, sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from pool_stand_in import FolderStore, wait_until
    from wukong.executor.work import Policy
    from wukong.executor.pool import ProcessPool

    folder = Path(sys.argv[1])
    store = FolderStore(folder)
    pool = ProcessPool(str(folder), 2, Policy(), store=store, entry="pool_stand_in:serve")
    pool.ready(20)
    pids = [pool._zygote.process.pid, *pool.pids]
"""
TAKE_ONE = """
pool.invoke([store.jobs.put('one', {source!r})])
wait_until(lambda: not store.jobs.n_queued())
"""
SAY_AND_WAIT = "print(json.dumps(pids), flush=True); time.sleep(60)"


def start_client(folder: Path, *deeds: str) -> subprocess.Popen[str]:
    source = textwrap.dedent(CLIENT).format(tests=os.path.dirname(__file__))
    source += "\n".join(deeds)
    return subprocess.Popen(
        [sys.executable, "-c", source, str(folder)], stdout=subprocess.PIPE, text=True
    )


def kill_when_running(client: subprocess.Popen[str]) -> list[int]:
    """Kill a client that has said its pool's pids; returns them."""
    with client:
        assert client.stdout is not None
        pids = json.loads(client.stdout.readline())
        client.kill()
        client.stdout.close()
    return pids


@pytest.mark.slow
def test_executors_of_a_killed_client_finish_their_strand_and_end(tmp_path: Path) -> None:
    source = "time.sleep(0.5)\nanswer = 1"
    client = start_client(tmp_path, TAKE_ONE.format(source=source), SAY_AND_WAIT)
    pids = kill_when_running(client)
    wait_dead(pids, 5.0)
    assert (tmp_path / "done" / "one").exists()


@pytest.mark.slow
def test_executors_of_a_killed_client_that_do_not_finish_are_killed(tmp_path: Path) -> None:
    client = start_client(tmp_path, TAKE_ONE.format(source="time.sleep(60)"), SAY_AND_WAIT)
    pids = kill_when_running(client)
    wait_dead(pids, 6.0)


@pytest.mark.slow
def test_a_fork_of_the_client_does_not_keep_executors_alive(tmp_path: Path) -> None:
    fork = "child = os.fork()\nif child == 0: time.sleep(8); os._exit(0)\npids.append(child)"
    pids = kill_when_running(start_client(tmp_path, fork, SAY_AND_WAIT))
    child = pids.pop()
    wait_dead(pids, 5.0)
    os.kill(child, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("last", ["", "sys.exit(0)", "raise SystemExit(0)"])
def test_a_client_that_ends_without_closing_leaves_nothing(tmp_path: Path, last: str) -> None:
    say = "print(json.dumps(pids), flush=True)"
    with start_client(tmp_path, TAKE_ONE.format(source="answer = 1"), say, last) as client:
        assert client.stdout is not None
        pids = json.loads(client.stdout.read())
    assert client.returncode == 0
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.slow
def test_what_tasks_print_appears_in_the_client_s_output(tmp_path: Path) -> None:
    source = "print('hello from', 'a task')\nprint('to be continued', end='')"
    with start_client(
        tmp_path, TAKE_ONE.format(source=source), "store.jobs.answer('one')"
    ) as client:
        assert client.stdout is not None
        assert client.stdout.read() == "hello from a task\nto be continued"
