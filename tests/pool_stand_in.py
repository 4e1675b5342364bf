"""Stand-ins for what pools run: a store that is a folder, an executor that runs Python source.

queued/NAME           source of a token; `answer` in it becomes the token's result
running/NAME@HOLDER   taken
done/NAME             its answer, as JSON
beats/HOLDER          one byte for each call of `beat`
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from wukong.executor.messages import Invocation
from wukong.executor.pool import ProcessPool
from wukong.executor.pool_seats import ProcessSeat
from wukong.executor.pool_zygote import Settings
from wukong.executor.work import Policy

FOLDERS = ("queued", "running", "done", "beats")


class FolderJobs:
    """The part of a job store that pools know; every process may have one on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.released: list[tuple[str, str]] = []
        for name in FOLDERS:
            (folder / name).mkdir(exist_ok=True)

    def put(self, name: str, source: str) -> Invocation:
        draft = self.folder / name
        draft.write_text(source)
        draft.rename(self.folder / "queued" / name)
        return Invocation("job", name)

    def take(self, holder: str) -> Path | None:
        for name in sorted(os.listdir(self.folder / "queued")):
            taken = self.folder / "running" / f"{name}@{holder}"
            with contextlib.suppress(FileNotFoundError):
                return (self.folder / "queued" / name).rename(taken)
        return None

    def n_queued(self) -> int:
        return len(os.listdir(self.folder / "queued"))

    def release(self, holder: str, cause: str) -> tuple[Invocation, ...]:
        self.released.append((holder, cause))
        found = []
        for path in (self.folder / "running").glob(f"*@{holder}"):
            name = path.name.partition("@")[0]
            path.rename(self.folder / "queued" / name)
            found.append(Invocation("job", name))
        return tuple(found)

    def answer(self, name: str, timeout_s: float = 10.0) -> object:
        path = self.folder / "done" / name
        wait_until(path.exists, timeout_s)
        return json.loads(path.read_text())


class FolderStore:
    def __init__(self, folder: Path) -> None:
        self.jobs = self.queue = FolderJobs(folder)


class SourceExecutor:
    """Runs tokens that are Python source. A token may use `holder`, `folder` and `executor`."""

    def __init__(self, holder: str, jobs: FolderJobs) -> None:
        self.holder = holder
        self.jobs = jobs
        self.n_beats = 0
        self.is_draining = False

    def take(self) -> bool:
        taken = None if self.is_draining else self.jobs.take(self.holder)
        if taken is None:
            return False
        names = {
            "holder": self.holder,
            "folder": self.jobs.folder,
            "executor": self,
            "os": os,
            "signal": signal,
            "subprocess": subprocess,
            "sys": sys,
            "time": time,
            "answer": None,
        }
        exec(taken.read_text(), names)
        name = taken.name.partition("@")[0]
        draft = self.jobs.folder / f"answer-{name}"
        draft.write_text(json.dumps(names["answer"]))
        draft.rename(self.jobs.folder / "done" / name)
        taken.unlink()
        return True

    def beat(self) -> float:
        self.n_beats += 1
        with open(self.jobs.folder / "beats" / self.holder, "a") as beats:
            beats.write("x")
        return 0.02

    def drain(self) -> None:
        self.is_draining = True


def serve(seat: ProcessSeat, settings: Settings) -> None:
    """What executors of a pool of processes do in these tests."""
    jobs = FolderJobs(Path(settings.store_url))
    if (jobs.folder / "broken").exists():
        with open(jobs.folder / "starts", "a") as starts:
            starts.write("x")
        raise RuntimeError("the store is broken")
    seat.serve(SourceExecutor(seat.holder, jobs), jobs.n_queued)


def new_thread_executor(holder: str, store: FolderStore, *_: object) -> SourceExecutor:
    """What executors of a pool of threads do in these tests."""
    return SourceExecutor(holder, store.jobs)


def open_pool(root: Path, **options) -> tuple[ProcessPool, FolderStore]:
    store = FolderStore(root)
    options = {"preload": (), "entry": "pool_stand_in:serve", **options}
    return ProcessPool(str(root), 2, Policy(), store=store, **options), store


def all_pids(pool: ProcessPool) -> list[int]:
    assert pool._zygote is not None
    return [pool._zygote.process.pid, *pool.pids]


def wait_until(is_true, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.002)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_dead(pids: list[int], timeout_s: float = 10.0) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), timeout_s)


def own_descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def own_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}
