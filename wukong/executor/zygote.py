"""The process that forks executors, and an executor's place in a pool of processes.

    client ---- starts ----> zygote (imports once) ---- forks ----> executor, executor, ...
      |                        ^ |                                   |
      +-- control: fork, kill -+ +-- control: forked, ready, died    |
      +-- lifeline: its end tells zygote and executors to finish ----+
      +-- doorbell: a pipe that counts; idle executors wait in it ---+

The zygote has one thread and does nothing but fork, bury and report, so that a fork is safe and a
dead executor is reported at once. It reads nothing of any job. Executors die with it; when the
client is gone, or closes the pool, they end after what they are running, and the zygote ends those
that take too long, and then itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import math
import mmap
import os
import pickle
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from wukong.errors import StoreUnavailable
from wukong.executor.core import Policy
from wukong.executor.messages import HolderId, Invocation
from wukong.executor.run import SPLIT_AFTER_S, Executor
from wukong.storage import open_store

BOOT = (
    "import json, socket, sys; control = socket.socket(fileno=int(sys.argv[1])); "
    "sys.path[:] = json.loads(control.recv(1 << 20)); sys.argv[1:] = []; "
    "from wukong.executor.zygote import main; main(control)"
)
"""The zygote's program (`python -c`); its argument is the number of its control socket."""
GRACE_S = 4.5
"""How long executors may go on with their strand after the client is gone; then they are killed."""
MESSAGE_BYTES = 1 << 17
"""Longest message on the control socket; below the kernel's usual limit for a datagram."""
TEXT_BYTES = 8000
"""Of a traceback, its end is reported."""
FAILED = 70
"""Exit status of an executor that ended by a defect or for lack of its store (`EX_SOFTWARE`)."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the client tells its zygote, once."""

    entry: str
    """What an executor does: "module:function", called with the seat and these settings."""
    store_url: str
    store_options: Mapping[str, float | int | None]
    """Further arguments of `open_store`."""
    policy: Policy
    preload: tuple[str, ...]
    """Modules to import before the first fork."""
    n_seats: int
    wait_fd: int
    """Read end of the doorbell's pipe."""
    ring_fd: int
    """Write end of the doorbell's pipe, non-blocking."""
    board_fd: int
    """File whose bytes say which executors idle."""
    lifeline_fd: int


class Runner(Protocol):
    """What a pool needs of an executor; see `wukong.executor.run.Executor`."""

    def take(self) -> bool:
        """Run the first queued token and whatever it becomes. False: nothing was queued."""
        ...

    def beat(self) -> float:
        """Renew and split; returns the seconds until it wants to be called again."""
        ...

    def drain(self) -> None:
        """Commit the current strand, and become and take nothing more."""
        ...


class Seat(Protocol):
    """An executor's place in a pool."""

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Wake as many idle executors."""
        ...

    def n_idle(self) -> int:
        """How many executors wait to be woken."""
        ...

    def rest(self, is_queued: Callable[[], int]) -> bool:
        """Wait to be woken; at once when, now that all can see this executor idle, `is_queued`.

        Returns: False when this executor shall end.
        """
        ...


def run_until_drained(executor: Runner, seat: Seat, n_queued: Callable[[], int]) -> None:
    """Run what is queued, rest, and again; until the pool ends."""
    while True:
        has_taken = True
        while has_taken:
            # A wake-up may have been for several tokens, or have met an executor that died.
            if seat.n_idle() and (n := n_queued()) > 1:
                seat.invoke([_SOME] * (n - 1))
            has_taken = executor.take()
        if not seat.rest(n_queued):
            return


_SOME = Invocation("", "")  # type: ignore[arg-type]  # only counted


class Doorbell:
    """Wakes idle executors of a pool of processes. Thread-safe, and shared by all its processes.

    A pipe is the semaphore: each byte lets one idle executor look into the store. A byte of shared
    memory for each executor says whether it idles; it is written by that executor only, and by the
    client when that is dead. An executor shows itself idle before its last look into the store,
    and whoever queues a token looks for idle ones after that: so either the token or the idle
    executor is seen, and nothing needs to be written for executors that are at work.
    """

    def __init__(self, wait_fd: int, ring_fd: int, board_fd: int, n_seats: int) -> None:
        """Use (and not own) descriptors of a pipe and of a file of `n_seats` bytes."""
        self._wait_fd = wait_fd
        self._ring_fd = ring_fd
        self._n_seats = n_seats
        self._board = mmap.mmap(board_fd, n_seats)

    def ring(self, n_wanted: int) -> None:
        """Wake so many executors, or all that idle when these are fewer."""
        n = min(n_wanted, self.n_idle())
        if n > 0:
            # A full pipe wakes everybody anyway.
            with contextlib.suppress(BlockingIOError):
                os.write(self._ring_fd, bytes(n))

    def wait(self) -> None:
        """Block until rung."""
        os.read(self._wait_fd, 1)

    def n_idle(self) -> int:
        """Executors that wait, or are just waking up."""
        return self._board[: self._n_seats].count(1)

    def show(self, seat: int, is_idle: bool) -> None:
        """Say whether the executor on this seat idles."""
        self._board[seat] = is_idle

    def close(self) -> None:
        """Unmap the board."""
        self._board.close()


# ------------------------------------------------------------------ in the executor


class ProcessSeat:
    """The seat of an executor that is a process; also its invoker.

    Args:
        holder: its name in the store.
        number: its seat on the doorbell's board.
        announce: called once, when it is about to look for its first token.
    """

    def __init__(
        self,
        holder: HolderId,
        number: int,
        doorbell: Doorbell,
        lifeline_fd: int,
        announce: Callable[[], None],
    ) -> None:
        self.holder = holder
        self._number = number
        self._doorbell = doorbell
        self._lifeline_fd = lifeline_fd
        self._announce = announce
        self._lock = threading.Lock()
        """Guards the four flags below."""
        self._is_busy = True
        self._is_ending = False
        self._heart_rests = False
        self._kick_fd = os.eventfd(0, os.EFD_CLOEXEC)

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Wake as many idle executors; the tokens are in the store already."""
        self._doorbell.ring(len(invocations))

    def n_idle(self) -> int:
        """How many executors wait to be woken."""
        return self._doorbell.n_idle()

    def serve(self, executor: Runner, n_queued: Callable[[], int]) -> None:
        """Run tokens until the client is gone or closes the pool."""
        heart = threading.Thread(target=self._beat, args=(executor,), daemon=True)
        heart.start()
        self._announce()
        run_until_drained(executor, self, n_queued)

    def rest(self, is_queued: Callable[[], int]) -> bool:
        """See `Seat.rest`."""
        flush_output()
        with self._lock:
            if self._is_ending:
                return False
            self._is_busy = False
        self._doorbell.show(self._number, True)
        if not is_queued():
            self._doorbell.wait()
        self._doorbell.show(self._number, False)
        # Until this lock is passed the heart may end the process: nothing has been taken yet.
        with self._lock:
            self._is_busy = True
            kick, self._heart_rests = self._heart_rests, False
        if kick:
            os.eventfd_write(self._kick_fd, 1)
        return True

    def _beat(self, executor: Runner) -> None:
        """The heartbeat thread: sleeps while the executor idles, and watches the lifeline."""
        try:
            poll = select.poll()
            poll.register(self._lifeline_fd, select.POLLIN)
            poll.register(self._kick_fd, select.POLLIN)
            timeout_s: float | None = SPLIT_AFTER_S
            while True:
                fds = {fd for fd, _ in poll.poll(_milliseconds(timeout_s))}
                if self._lifeline_fd in fds:
                    poll.unregister(self._lifeline_fd)
                    self._end(executor)
                with self._lock:
                    self._heart_rests = not self._is_busy
                    timeout_s = None if self._heart_rests else SPLIT_AFTER_S
                if self._kick_fd in fds:
                    # Work has just begun: there is nothing to renew or to split yet.
                    os.eventfd_read(self._kick_fd)
                elif timeout_s is not None:
                    # A run may begin at any moment and wants to be looked at after that time.
                    timeout_s = min(timeout_s, executor.beat())
        except BaseException:
            # Without a heart the token would be taken for dead while it runs on.
            traceback.print_exc()
            os._exit(FAILED)

    def _end(self, executor: Runner) -> None:
        with self._lock:
            if not self._is_busy:
                flush_output()
                os._exit(0)
            self._is_ending = True
        executor.drain()


def run_executor(seat: ProcessSeat, settings: Settings) -> None:
    """What the processes of a pool do: run the store's tokens."""
    store = open_store(settings.store_url, **settings.store_options)  # type: ignore[arg-type]
    executor = Executor(seat.holder, store, seat, settings.policy)
    seat.serve(executor, store.jobs.n_queued)
    store.jobs.close()


# ------------------------------------------------------------------ the zygote


def main(control: socket.socket) -> NoReturn:
    """Run the zygote until the client is gone.

    Args:
        control: a socket of datagrams; the first is the pickled `Settings`.
    """
    status = 0
    try:
        settings: Settings = pickle.loads(control.recv(MESSAGE_BYTES))
        Zygote(control, settings).run()
    except BaseException:
        status = FAILED
        _send(control, "failed", "", _last_traceback())
    flush_output()
    # Nothing that was imported has anything to clean up here, and an end takes no time so.
    os._exit(status)


class Zygote:
    """Forks executors on the client's command, and reports what becomes of them."""

    def __init__(self, control: socket.socket, settings: Settings) -> None:
        """Import what all executors need."""
        self._control = control
        self._settings = settings
        self._holders: dict[int, HolderId] = {}
        """Of the living children, by pid."""
        self._is_ending = False
        self._grace_s = GRACE_S
        # Ctrl-C is the client's; a signal to stop (SIGTERM) ends this process and with it all.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if sys.stderr is not None:
            faulthandler.enable()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        # Garbage that is never collected leaves no holes, which children would fill by copying.
        gc.disable()
        for module in settings.preload:
            importlib.import_module(module)
        self._entry = _find(settings.entry)
        gc.freeze()

    def run(self) -> None:
        """Serve until the client is gone and all children are dead."""
        self._woken_fd, self._wake_fd = os.pipe()
        for fd in (self._woken_fd, self._wake_fd, self._control.fileno()):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_fd, warn_on_full_buffer=False)
        poll = select.poll()
        for fd in (self._woken_fd, self._control.fileno(), self._settings.lifeline_fd):
            poll.register(fd, select.POLLIN)
        kill_at = math.inf
        while not self._is_ending or self._holders:
            timeout_s = None if kill_at == math.inf else kill_at - time.monotonic()
            fds = {fd for fd, _ in poll.poll(_milliseconds(timeout_s))}
            if self._control.fileno() in fds and not self._obey():
                poll.unregister(self._control.fileno())
                self._is_ending = True
            if self._settings.lifeline_fd in fds:
                poll.unregister(self._settings.lifeline_fd)
                self._is_ending = True
            if self._woken_fd in fds:
                os.read(self._woken_fd, 4096)
            self._bury()
            if self._is_ending and kill_at == math.inf:
                kill_at = time.monotonic() + self._grace_s
            elif time.monotonic() >= kill_at:
                for pid in self._holders:
                    _kill(pid)
                kill_at = math.inf

    def _obey(self) -> bool:
        """Do what the client says. False: it is gone."""
        while True:
            try:
                message = self._control.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not message:
                return False
            match json.loads(message):
                case ["fork", str(holder), int(number)]:
                    if not self._is_ending:
                        self._fork(HolderId(holder), number)
                case ["kill", str(holder)]:
                    for pid in [p for p, name in self._holders.items() if name == holder]:
                        _kill(pid)
                case ["grace", float(grace_s)]:
                    self._grace_s = grace_s

    def _fork(self, holder: HolderId, number: int) -> None:
        own_pid = os.getpid()
        try:
            with warnings.catch_warnings():
                # A BLAS may have threads of its own; it stops them before a fork.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError as error:
            _send(self._control, "failed", holder, f"cannot fork: {error}")
            _send(self._control, "died", holder, FAILED)
            return
        if pid == 0:
            self._live(holder, number, own_pid)
        self._holders[pid] = holder
        _send(self._control, "forked", holder, pid)

    def _bury(self) -> None:
        while self._holders:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            holder = self._holders.pop(pid, None)
            if holder is not None:
                _send(self._control, "died", holder, os.waitstatus_to_exitcode(status))

    def _live(self, holder: HolderId, number: int, parent: int) -> NoReturn:
        """The life of an executor, after the fork."""
        status = FAILED
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._woken_fd)
            os.close(self._wake_fd)
            # Blocking is a property of the socket, not of this process: it stays as it is.
            os.register_at_fork(after_in_child=self._control.close)
            # Its own group, so that what its tasks started can be killed together with it.
            os.setpgid(0, 0)
            _die_with(parent)
            gc.enable()
            _seed()
            settings = self._settings
            doorbell = Doorbell(
                settings.wait_fd, settings.ring_fd, settings.board_fd, settings.n_seats
            )
            seat = ProcessSeat(
                holder,
                number,
                doorbell,
                settings.lifeline_fd,
                lambda: _send(self._control, "ready", holder),
            )
            self._entry(seat, settings)
            status = 0
        except BaseException:
            _send(self._control, "failed", holder, _last_traceback())
        finally:
            flush_output()
            os._exit(status)


def _find(entry: str) -> Callable[[ProcessSeat, Settings], None]:
    module, _, name = entry.partition(":")
    function: Callable[[ProcessSeat, Settings], None] = getattr(
        importlib.import_module(module), name
    )
    return function


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the zygote dies, however that happens."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(FAILED)  # it died before


def _seed() -> None:
    """Forks share the state of random generators; tasks that draw numbers must not."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _kill(pid: int) -> None:
    """Kill a child that has not been waited for, and what its tasks have started."""
    for kill in (os.killpg, os.kill):
        # It may not have got its group yet; it is a zombie at worst, never somebody else.
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def flush_output() -> None:
    """Show what tasks have printed."""
    for stream in (sys.stdout, sys.stderr):
        # The reader of a pipe may be gone, and a task may have closed the stream.
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()


def _send(control: socket.socket, *message: str | int) -> None:
    # The client may be gone: then nobody needs to know.
    with contextlib.suppress(OSError):
        control.send(json.dumps(message).encode())


def _last_traceback() -> str:
    return traceback.format_exc()[-TEXT_BYTES:]


def _milliseconds(timeout_s: float | None) -> int | None:
    if timeout_s is None or timeout_s == math.inf:
        return None
    return max(0, math.ceil(timeout_s * 1000))
