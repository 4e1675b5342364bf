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
import os
import pickle
import random
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import current_process
from typing import NoReturn

from wukong.executor.kept import Kept
from wukong.executor.lanes import LaneExecutor, SecondLane, Turn
from wukong.executor.messages import HolderId
from wukong.executor.pool_handed import HandedExecutor, HandedLane, HandedTokens
from wukong.executor.pool_seats import FAILED, Doorbell, ProcessSeat, flush_output, milliseconds
from wukong.executor.run import Executor
from wukong.executor.work import Policy
from wukong.storage import modules_of, open_store

BOOT = (
    "import sys; sys.path[:] = filter(None, sys.path); "  # a user's random.py is not ours
    "import json, socket; control = socket.socket(fileno=int(sys.argv[1])); "
    "sys.path[:] = json.loads(control.recv(1 << 20)); sys.argv[1:] = []; "
    "from wukong.executor.pool_zygote import main; main(control)"
)
"""The zygote's program (`python -c`); its argument is the number of its control socket."""
GRACE_S = 4.5
"""How long executors may go on with their strand after the client is gone; then they are killed."""
MESSAGE_BYTES = 1 << 17
"""Longest message on the control socket; below the kernel's usual limit for a datagram."""
TEXT_BYTES = 8000
"""Of a traceback, its end is reported."""
_PR_SET_PDEATHSIG = 1
# Loaded before the first fork: that takes milliseconds.
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the client tells its zygote, once."""

    entry: str
    """What an executor does: "module:function", called with the seat and these settings."""
    store_url: str
    store_options: Mapping[str, float | int | str | bytes | None]
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
    handed_fd: int
    """The pool's own queue of tokens; negative: the store is the queue."""
    lifeline_fd: int
    authkey: bytes = b""
    """The client's key of `multiprocessing`, which proxies of its managers in tasks need."""


def run_executor(seat: ProcessSeat, settings: Settings) -> None:
    """What the processes of a pool do: run the store's tokens."""
    store = open_store(settings.store_url, **settings.store_options)  # type: ignore[arg-type]
    tokens = None
    if settings.handed_fd >= 0:
        tokens = HandedTokens(settings.handed_fd, settings.n_seats, seat.number)
        seat.hand = tokens.push
    queue = tokens or store.queue
    assert queue is not None, "the tokens of this store are handed to pools"
    turn = Turn() if store.is_remote and settings.policy.prefetch_bytes else None

    kept = Kept(settings.policy.keep_bytes // settings.n_seats)
    seat.on_rest = kept.clear

    def new_executor(seat: ProcessSeat, tokens: HandedTokens | None = tokens) -> Executor:
        rest = (seat.holder, store, seat, settings.policy, seat.report_stuck, kept)
        if turn is None:
            return Executor(*rest) if tokens is None else HandedExecutor(tokens, *rest)
        return LaneExecutor(turn, *rest) if tokens is None else HandedLane(tokens, turn, *rest)

    executor = new_executor(seat)
    seat.new_executor = new_executor
    if turn is None:
        seat.serve(executor, queue.n_queued)
    else:
        second = new_executor(seat, tokens and tokens.beside())
        take = seat.beside(second)
        lane = SecondLane(second, turn, queue.n_queued, settings.n_seats, take, seat.fail)
        seat.serve(executor, queue.n_queued)
        lane.end()
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
        current_process().authkey = settings.authkey
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
        for module in (*modules_of(settings.store_url), *settings.preload):
            importlib.import_module(module)
        self._entry = _find(settings.entry)
        gc.freeze()

    def run(self) -> None:
        """Serve until the client is gone and all children are dead."""
        self._woken_fd, self._wake_fd = os.pipe()
        os.set_blocking(self._woken_fd, False)
        os.set_blocking(self._wake_fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_fd, warn_on_full_buffer=False)
        poll = select.poll()
        for fd in (self._woken_fd, self._control.fileno(), self._settings.lifeline_fd):
            poll.register(fd, select.POLLIN)
        kill_at = math.inf
        while not self._is_ending or self._holders:
            timeout_s = None if kill_at == math.inf else kill_at - time.monotonic()
            fds = {fd for fd, _ in poll.poll(milliseconds(timeout_s))}
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
                message = self._control.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not message:
                return False
            match json.loads(message):
                case ["fork", list(seats)]:
                    for holder, number in seats:
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
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None:
                return
            # While it is not waited for, its pid is nobody else's, and neither is its group.
            _kill(dead.si_pid)
            _, status = os.waitpid(dead.si_pid, 0)
            holder = self._holders.pop(dead.si_pid)
            _send(self._control, "died", holder, os.waitstatus_to_exitcode(status))

    def _live(self, holder: HolderId, number: int, parent: int) -> NoReturn:
        """The life of an executor, after the fork."""
        status = FAILED
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._woken_fd)
            os.close(self._wake_fd)
            # The client takes the end of this socket for the zygote's death.
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
                lambda message: _send(self._control, message, holder),
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
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(FAILED)  # it died before


def _seed() -> None:
    """Forks share the state of random generators; tasks that draw numbers must not."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _kill(pid: int) -> None:
    """Kill a child that has not been waited for, and what its tasks have started and left."""
    for kill in (os.killpg, os.kill):
        # It may not have got its group yet; it is a zombie at worst, never somebody else.
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _send(control: socket.socket, *message: str | int) -> None:
    # The client may be gone: then nobody needs to know.
    with contextlib.suppress(OSError):
        control.send(json.dumps(message).encode())


def _last_traceback() -> str:
    return traceback.format_exc()[-TEXT_BYTES:]
