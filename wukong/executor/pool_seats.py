"""An executor's place in a pool: how it waits, is woken, wakes others, beats, and is told to end.

A seat is the executor's invoker, too. It knows nothing of tokens but that the store has some.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from wukong.executor.messages import HolderId, Invocation
from wukong.executor.ops import LOOK_AFTER_S

FAILED = 70
"""Exit status of an executor that ended by a defect or for lack of its store (`EX_SOFTWARE`)."""


REST_AFTER_S = 1.0
"""Who has run nothing for so long gives memory back. Within a job one mostly waits for less, and
would have each page zeroed and mapped anew."""
DEPUTY_LOOKS_S = 0.2
"""A deputy that idles looks this often whether the task whose place it has goes on."""


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

    def ring(self, n_wanted: int) -> None:
        """Wake so many executors, or all that idle when these are fewer."""
        ...

    def n_idle(self) -> int:
        """How many executors wait to be woken."""
        ...

    def is_leaving(self) -> bool:
        """Whether this executor is to take no more tokens."""
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
        while has_taken and not seat.is_leaving():
            # A wake-up may have been for several tokens, or have met an executor that died.
            if seat.n_idle() and (n := n_queued()) > 1:
                seat.ring(n - 1)
            has_taken = executor.take()
        if not seat.rest(n_queued):
            return


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

    def wait_for(self, timeout_s: float) -> bool:
        """Block until rung, or for so long. Returns: it was rung."""
        poll = select.poll()
        poll.register(self._wait_fd, select.POLLIN)
        if not poll.poll(milliseconds(timeout_s)):
            return False
        os.read(self._wait_fd, 1)
        return True

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
        tell: tells the client "ready", once, when it is about to look for its first token; or that
            it is "stuck".
        new_executor: makes one more executor of the same holder, for a thread that runs tokens
            while a task waits; None: this seat cannot be lent.
    """

    def __init__(
        self,
        holder: HolderId,
        number: int,
        doorbell: Doorbell,
        lifeline_fd: int,
        tell: Callable[[str], None],
        new_executor: Callable[[ProcessSeat], Runner] | None = None,
    ) -> None:
        self.holder = holder
        self.new_executor = new_executor
        self.hand: Callable[[Sequence[Invocation]], None] | None = None
        """Where invoked tokens go, if the store itself is not the pool's queue."""
        self.on_rest: Callable[[], None] = lambda: None
        """Called when nothing has been run for `REST_AFTER_S`."""
        self.number = number
        self._doorbell = doorbell
        self._lifeline_fd = lifeline_fd
        self._tell = tell
        self._lock = threading.Lock()
        """Guards what follows."""
        self._n_busy = 1
        """Threads that run tokens."""
        self._is_ending = False
        self._heart_rests = False
        self._executors: list[Runner] = []
        """The process's own, and those of threads that have its place meanwhile."""
        self._n_waiting = 0
        """Threads that wait to be woken."""
        self._n_lent = 0
        """Tasks of this process that wait."""
        self._n_deputies = 0
        """Threads that run tokens in their place."""
        self._kick_fd = os.eventfd(0, os.EFD_CLOEXEC)

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Wake as many idle executors; the tokens are in the store already."""
        if self.hand is not None:
            self.hand(invocations)
        self._doorbell.ring(len(invocations))

    def ring(self, n_wanted: int) -> None:
        """See `Seat.ring`."""
        self._doorbell.ring(n_wanted)

    def n_idle(self) -> int:
        """How many executors wait to be woken."""
        return self._doorbell.n_idle()

    def serve(self, executor: Runner, n_queued: Callable[[], int]) -> None:
        """Run tokens until the client is gone or closes the pool."""
        self._executors.append(executor)
        heart = threading.Thread(target=self._beat, daemon=True)
        heart.start()
        self._tell("ready")
        run_until_drained(executor, self, n_queued)

    def is_leaving(self) -> bool:
        """See `Seat.is_leaving`."""
        return False

    def rest(self, is_queued: Callable[[], int]) -> bool:
        """See `Seat.rest`."""
        flush_output()
        with self._lock:
            if self._is_ending:
                return False
            self._n_busy -= 1
        self._count_waiting(1)
        if not is_queued():
            self._doorbell.wait()
        self._count_waiting(-1)
        self._begin()
        return True

    def _begin(self) -> None:
        """One thread more runs tokens, and wants its heartbeat."""
        # Until this lock is passed the heart may end the process: nothing has been taken yet.
        with self._lock:
            self._n_busy += 1
            kick, self._heart_rests = self._heart_rests, False
        if kick:
            os.eventfd_write(self._kick_fd, 1)

    @contextlib.contextmanager
    def _at_work(self, executor: Runner) -> Iterator[None]:
        """Beat for one executor more, which runs tokens in a thread of its own."""
        self._executors.append(executor)
        self._begin()
        try:
            yield
        finally:
            with self._lock:
                self._n_busy -= 1
            self._executors.remove(executor)

    def _count_waiting(self, n: int) -> None:
        """Show this seat idle while any thread of it waits."""
        with self._lock:
            self._n_waiting += n
            self._doorbell.show(self.number, self._n_waiting > 0)

    def report_stuck(self) -> None:
        """Have the client kill this executor, and another one started."""
        self._tell("stuck")

    def beside(self, executor: Runner) -> Callable[[], bool]:
        """How a second lane takes tokens for its executor; see `SecondLane`."""

        def take() -> bool:
            with self._at_work(executor):
                return executor.take()

        return take

    def fail(self, error: BaseException) -> None:
        """End the process by a defect of one of its threads; what it held is queued again."""
        traceback.print_exception(error)
        os._exit(FAILED)

    def lend(self, holder: HolderId) -> None:
        """Let a thread of this process run tokens while a task waits; see `Lender`."""
        with self._lock:
            self._n_lent += 1
            if self.new_executor is None or self._n_deputies >= self._n_lent or self._is_ending:
                return
            self._n_deputies += 1
        threading.Thread(target=self._deputise, daemon=True).start()

    def take_back(self) -> None:
        """A task goes on; see `Lender`. Its deputy ends when its token is spent."""
        with self._lock:
            self._n_lent -= 1

    def _deputise(self) -> None:
        assert self.new_executor is not None
        executor = self.new_executor(self)
        try:
            with self._at_work(executor):
                while self._is_deputy_wanted():
                    if not executor.take():
                        self._rest_as_deputy()
        except BaseException:
            traceback.print_exc()
            os._exit(FAILED)  # what it held is queued again, as if the process had died

    def _is_deputy_wanted(self) -> bool:
        with self._lock:
            if self._n_deputies <= self._n_lent and not self._is_ending:
                return True
            self._n_deputies -= 1
            return False

    def _rest_as_deputy(self) -> None:
        """Wait to be woken in the place of a task that waits, and look now and then."""
        self._count_waiting(1)
        is_rung = self._doorbell.wait_for(DEPUTY_LOOKS_S)
        self._count_waiting(-1)
        if is_rung and self._n_deputies > self._n_lent:
            self._doorbell.ring(1)  # somebody else's turn

    def _beat(self) -> None:
        """The heartbeat thread: sleeps while the executor idles, and watches the lifeline."""
        try:
            poll = select.poll()
            poll.register(self._lifeline_fd, select.POLLIN)
            poll.register(self._kick_fd, select.POLLIN)
            timeout_s: float | None = LOOK_AFTER_S
            while True:
                fds = {fd for fd, _ in poll.poll(milliseconds(timeout_s))}
                is_long = not fds and timeout_s == REST_AFTER_S
                if self._lifeline_fd in fds:
                    poll.unregister(self._lifeline_fd)
                    self._end()
                with self._lock:
                    self._heart_rests = not self._n_busy
                    if self._heart_rests and is_long:
                        self.on_rest()
                        release_memory()
                    timeout_s = LOOK_AFTER_S
                    if self._heart_rests:
                        timeout_s = None if is_long else REST_AFTER_S
                if self._kick_fd in fds:
                    # Work has just begun: there is nothing to renew or to split yet.
                    os.eventfd_read(self._kick_fd)
                elif not self._heart_rests:
                    # A run may begin at any moment and wants to be looked at after that time.
                    timeout_s = min(LOOK_AFTER_S, *[e.beat() for e in list(self._executors)])
        except BaseException:
            # Without a heart the token would be taken for dead while it runs on.
            traceback.print_exc()
            os._exit(FAILED)

    def _end(self) -> None:
        with self._lock:
            if not self._n_busy:
                flush_output()
                os._exit(0)
            self._is_ending = True
        for executor in list(self._executors):
            executor.drain()


def flush_output() -> None:
    """Show what tasks have printed."""
    for stream in (sys.stdout, sys.stderr):
        # The reader of a pipe may be gone, and a task may have closed the stream.
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()


def release_memory() -> None:
    """Give free memory back to the system, where the allocator is glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def milliseconds(timeout_s: float | None) -> int | None:
    """A timeout for `poll`; it waits at least so long."""
    if timeout_s is None or timeout_s == math.inf:
        return None
    return max(0, math.ceil(timeout_s * 1000))
