"""The embedded store among several processes: waking, killed ones, stopped ones."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("storage_contract")

from storage_contract import T0, commit, create  # noqa: E402 - to be rewritten
from test_local_store import run_program  # noqa: E402

from wukong.executor.messages import Status  # noqa: E402
from wukong.storage import local_peers  # noqa: E402
from wukong.storage.local import LocalJobStore  # noqa: E402

pytestmark = pytest.mark.slow

COMMIT_FOR_EVER = """
store = LocalJobStore(Path(sys.argv[1]))
print("ready", flush=True)
n = 0
while True:
    n += 1
    name = f"{os.getpid()}.{n}"
    grant = store.take(str(os.getpid()), name)
    if grant is not None:
        feed = Feed(str(n % 6), 1)
        made = output(name, n, feeds=(feed,))
        consumed = tuple(i.export for i in grant.inputs)
        store.commit(commit(grant.token, name, outputs=(made,), consumed=consumed, n_tasks=1))
"""
# For each line that it reads, a process that does this; forked before the store is opened.
NURSERY = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        exec(PROGRAM)
    print(pid, flush=True)
"""
STOP_IN_A_TRANSACTION = """
store = LocalJobStore(Path(sys.argv[1]))
print("ready", flush=True)
def stop(txn):
    os.kill(os.getpid(), signal.SIGSTOP)
    return None, 0
store._environment.write(stop)
store.create(create("of the stopped one"))
"""
STOP_BETWEEN_TRANSACTIONS = """
store = LocalJobStore(Path(sys.argv[1]))
store.create(create("first"))
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
store.create(create("second"))
"""
WAIT = """
store = LocalJobStore(Path(sys.argv[1]))
print("ready", flush=True)
print(store.wait("job", 1, 60.0).status.name, flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalJobStore]:
    store = LocalJobStore(tmp_path / "store")
    yield store
    store.close()


def started(program: str, store: LocalJobStore) -> subprocess.Popen[str]:
    process = run_program(program, store.directory)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    while local_peers._stat_of(process.pid)[0] != "T":
        time.sleep(0.005)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdin.close()
    process.stdout.close()


def test_writers_killed_at_any_moment_harm_nobody(store: LocalJobStore) -> None:
    store.create(create(entries=("0", "1", "2", "3", "4", "5")))
    quiet = COMMIT_FOR_EVER.replace('print("ready", flush=True)', "")
    nursery = started(f"PROGRAM = {quiet!r}\n{NURSERY}", store)
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    moments = random.Random(1)
    for _ in range(60):
        writers = []
        for _ in range(2):
            nursery.stdin.write("\n")
            nursery.stdin.flush()
            writers.append(int(nursery.stdout.readline()))
        time.sleep(0.03)
        for writer in writers:
            time.sleep(moments.uniform(0.0, 0.01))
            os.kill(writer, signal.SIGKILL)
        for writer in writers:
            while local_peers._stat_of(writer):
                time.sleep(0.001)
        begun = time.monotonic()
        for writer in writers:
            store.release(str(writer), "killed")
        assert time.monotonic() - begun < 1.0
        view = store.view("job")
        assert view is not None
        # Every commit passes one token on, so that six are always there.
        assert (view.status, view.n_queued, view.n_running) == (Status.RUNNING, 6, 0)
        assert (view.n_tasks_done, store.n_queued()) == (view.n_commits, 6)
    assert view.n_commits > 1000
    end(nursery)
    store.forget("job")
    assert store.jobs() == ()
    assert store._environment.read(lambda txn: txn.stat()["entries"]) == 0


def test_a_process_stopped_inside_a_transaction_is_killed(store: LocalJobStore) -> None:
    process = started(STOP_IN_A_TRANSACTION, store)
    wait_until_stopped(process)
    begun = time.monotonic()
    store.create(create())
    assert 1.0 < time.monotonic() - begun < 3.0
    assert process.wait(5) == -signal.SIGKILL
    end(process)
    assert store.jobs() == ("job",)


def test_two_processes_stopped_inside_one_are_killed_in_turn(store: LocalJobStore) -> None:
    first = started(STOP_IN_A_TRANSACTION, store)
    wait_until_stopped(first)
    second = started(COMMIT_FOR_EVER, store)
    second.send_signal(signal.SIGSTOP)
    wait_until_stopped(second)
    store.create(create())
    assert first.wait(5) == -signal.SIGKILL
    end(first)
    second.send_signal(signal.SIGCONT)
    end(second)
    assert store.jobs() == ("job",)


def test_a_process_stopped_elsewhere_is_left_alone(store: LocalJobStore) -> None:
    process = started(STOP_BETWEEN_TRANSACTIONS, store)
    wait_until_stopped(process)
    local_peers.kill_stopped_holders(store.directory)
    store.create(create())
    process.send_signal(signal.SIGCONT)
    assert process.wait(10) == 0
    end(process)
    assert store.jobs() == ("first", "job", "second")


def test_the_watchdog_goes_when_nothing_is_written(
    store: LocalJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = store._environment
    store.create(create())
    watchdog = environment._watchdog
    assert watchdog is not None
    assert environment.retire(watchdog, watchdog.n_begun - 1) is False
    assert environment.retire(watchdog, watchdog.n_begun) is True
    assert environment._watchdog is None
    watchdog.end()
    store.create(create("job2"))
    assert environment._watchdog is not None


def test_another_process_is_woken(store: LocalJobStore) -> None:
    store.create(create())
    process = started(WAIT, store)
    while len(os.listdir(store.directory / local_peers.PIPES)) < 2:
        time.sleep(0.005)
    time.sleep(0.05)
    store.commit(commit(T0, failed=b"error"))
    assert process.stdout is not None
    assert process.stdout.readline() == "FAILED\n"
    assert process.wait(5) == 0
    end(process)


def test_a_dead_watcher_is_no_longer_written_to(store: LocalJobStore) -> None:
    store.create(create())
    process = started(WAIT.replace("1, 60.0", "1, 60.0, True"), store)
    own = {store._pipes.default()}

    def watchers() -> set[str]:
        return store._look("job", lambda rows: {name for name, _ in rows._packed("v")})

    while len(watchers()) < 2:
        time.sleep(0.005)
    end(process)
    store.commit(commit(T0))
    assert watchers() == own
    store.release("nobody", "")
    assert set(os.listdir(store.directory / local_peers.PIPES)) == own
    assert len(os.listdir(store.directory / local_peers.WRITERS)) == 1
