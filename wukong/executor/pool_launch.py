"""The client's side of a zygote: its start, its environment, what they say to each other.

Also the pipe with which executors of a pool are woken, and, in words, how a process died.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.process import current_process
from pathlib import Path

from dask.system import CPU_COUNT

from wukong.executor.pool_zygote import BOOT, MESSAGE_BYTES, Settings

BLAS_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS",
)
HASH_SEED = "0"
"""For strings in executors, where the client has no seed of its own."""
_WAKE = ".wake"

Message = list[str | int]


class ZygoteLink:
    """A running zygote, as its client sees it. Not thread-safe, except for `send`.

    Args:
        settings: for the zygote; its lifeline is made here.
        env: the zygote's whole environment.
    Raises:
        OSError: it could not be started; nothing is left.
    """

    def __init__(self, settings: Settings, env: Mapping[str, str]) -> None:
        self.failure: str | None = None
        """Traceback of the zygote's own failure."""
        with contextlib.ExitStack() as undo:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self.control.close)
            lifeline_read, self._lifeline = os.pipe()
            undo.callback(self._cut)
            try:
                fds: tuple[int, ...] = (
                    settings.wait_fd,
                    settings.ring_fd,
                    settings.board_fd,
                    lifeline_read,
                )
                if settings.handed_fd >= 0:
                    fds += (settings.handed_fd,)
                self.process = subprocess.Popen(
                    [sys.executable, *_flags(), "-c", BOOT, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    env=env,
                    pass_fds=(theirs.fileno(), *fds),
                    start_new_session=True,
                )
            finally:
                theirs.close()
                os.close(lifeline_read)
            undo.pop_all()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        self._send_bytes(json.dumps(path).encode())
        # A private pair of sockets carries it; never arguments or the environment.
        settings = replace(
            settings, lifeline_fd=lifeline_read, authkey=bytes(current_process().authkey)
        )
        self._send_bytes(pickle.dumps(settings))

    def send(self, *message: object) -> None:
        """Command the zygote; nothing happens when it is dead."""
        self._send_bytes(json.dumps(message).encode())

    def _send_bytes(self, message: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.control.send(message)

    def receive(self) -> Message | None:
        """The next report; blocks. None: the zygote is dead, or about to be."""
        try:
            message = self.control.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            return None
        return json.loads(message) if message else None

    def release(self, grace_s: float) -> None:
        """Have the executors end, kill them after `grace_s`, and end the zygote. Idempotent."""
        self.send("grace", float(grace_s))
        self._cut()

    def close(self) -> int:
        """Bury a zygote that is ending. Returns its exit status, negative for a signal."""
        self._cut()
        self.control.close()
        return self.process.wait()

    def forget(self) -> None:
        """In a fork of the client: close what would keep the zygote alive after it."""
        self._cut()
        self.control.close()
        self.process.returncode = 0  # it is not this process's child, to be waited for

    def _cut(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def _flags() -> list[str]:
    """The options of this interpreter (-W, -X, -O, ...), for another one."""
    # What multiprocessing uses; there is no public way to ask.
    return subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined,no-any-return]


ALLOCATOR_VARIABLES = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}
"""Read by glibc only; executors give memory back when they idle."""


def executor_environment(n_workers: int, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a pool's processes.

    The cores are divided among the executors' BLAS threads, unless the user has decided otherwise,
    and strings hash alike in all executors of all pools. The allocator keeps what arrays have used:
    a QR of 31,250 x 64 takes a sixth less time when its memory need not be mapped anew.
    """
    n_threads = str(max(1, CPU_COUNT // n_workers))
    seed = os.environ.get("PYTHONHASHSEED", "")
    return {
        **dict.fromkeys(BLAS_VARIABLES, n_threads),
        **ALLOCATOR_VARIABLES,
        **os.environ,
        "PYTHONHASHSEED": seed if seed.isdecimal() else HASH_SEED,
        **env,
    }


def describe_death(status: int) -> str:
    """How a process ended, from its exit status (negative: the number of a signal)."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"was killed by signal {-status} ({name}{hint})"
    return f"was killed by signal {-status}"


# ------------------------------------------------------------------ waking


@dataclass(frozen=True, slots=True)
class WakePipe:
    """The pipe in which idle executors of one pool wait; a FIFO when others shall find it."""

    wait_fd: int
    """Blocks its readers."""
    ring_fd: int
    """Never blocks its writers."""
    path: Path | None

    @staticmethod
    def make(folder: Path | None, name: str) -> WakePipe:
        """Make one, in a folder (made if missing, for this user only) or without a name."""
        if folder is None:
            wait_fd, ring_fd = os.pipe()
            os.set_blocking(ring_fd, False)
            return WakePipe(wait_fd, ring_fd, None)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft, path = folder / name, folder / f"{name}{_WAKE}"
        os.mkfifo(draft, 0o600)
        # Open for writing too, so that readers do not see an end when no writer is left.
        wait_fd = os.open(draft, os.O_RDWR | os.O_CLOEXEC)
        ring_fd = os.open(draft, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # From here on it is taken for stale when nobody has it open.
        draft.rename(path)
        return WakePipe(wait_fd, ring_fd, path)

    def close(self) -> None:
        """Close it, and remove its name."""
        os.close(self.wait_fd)
        os.close(self.ring_fd)
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def wake_pools(folder: Path) -> int:
    """Have the pools that wait in a folder look for queued tokens. For sweepers and other clients.

    FIFOs of dead pools are removed. Returns: how many pools were woken.
    """
    n_woken = 0
    for path, fd in _open_all(folder):
        if fd is None:
            path.unlink(missing_ok=True)
            continue
        # One executor is enough: it wakes others when more is queued. A full pipe wakes all.
        with contextlib.suppress(BlockingIOError):
            os.write(fd, b"\0")
        n_woken += 1
    return n_woken


def _open_all(folder: Path) -> Iterator[tuple[Path, int | None]]:
    """Every pool's FIFO with a descriptor for writing, None when nobody reads it."""
    for path in sorted(folder.glob(f"*{_WAKE}")):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            yield path, None
            continue
        try:
            yield path, fd
        finally:
            os.close(fd)
