"""Executors on this machine, as threads of this process; see `wukong.executor.pool`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from dask.system import CPU_COUNT

from wukong.errors import InvokeError
from wukong.executor.invoker import Invoker
from wukong.executor.messages import HolderId, Invocation
from wukong.executor.ops import LOOK_AFTER_S
from wukong.executor.pool_handed import HandedExecutor, HandedTokens
from wukong.executor.pool_launch import BLAS_VARIABLES
from wukong.executor.pool_seats import Runner, run_until_drained
from wukong.executor.pool_zygote import GRACE_S
from wukong.executor.run import Executor
from wukong.executor.work import Policy
from wukong.storage import Store

logger = logging.getLogger(__name__)


NewExecutor = Callable[[HolderId, Store, Invoker, Policy, Callable[[], None]], Runner]


class ThreadPool:
    """A fixed number of executors that are threads of this process. Thread-safe.

    For stores that hold objects (`memory://`). They are daemons: they never keep the interpreter
    from ending. While the pool is open, BLAS threads of the whole process are divided among the
    executors, if threadpoolctl is installed and the user has not set their number.

    Args:
        store: of the tokens.
        n_workers: how many executors.
        policy: theirs.
        new_executor: makes one; tests have others.
    """

    def __init__(
        self,
        store: Store,
        n_workers: int,
        policy: Policy,
        *,
        new_executor: NewExecutor = Executor,
    ) -> None:
        self._store = store
        self._undo = contextlib.ExitStack()
        self._tokens = HandedTokens.make(store, 1, self._undo)
        if self._tokens is not None:
            new_executor = functools.partial(HandedExecutor, self._tokens)
        self._policy = policy
        self._new_executor = new_executor
        self._name = secrets.token_hex(4)
        self._n_started = 0
        self._idle: deque[_ThreadSeat] = deque()
        """The last one to become idle is woken first: its caches are warm."""
        self._lock = threading.Lock()
        """Guards everything below, and the seats' flags."""
        self._seats: list[_ThreadSeat] = []
        self._heart_rests = False
        self._is_closing = False
        self._failure: str | None = None
        self._kicks: SimpleQueue[None] = SimpleQueue()
        """Wakes the heartbeat thread."""
        self._restore_blas = _limit_blas(n_workers)
        with self._lock:
            for _ in range(n_workers):
                self._start()
        self._heart = threading.Thread(
            target=self._beat, name=f"wukong-heart-{self._name}", daemon=True
        )
        self._heart.start()
        _open_pools.add(self)

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Wake executors for tokens that are queued in the store; for () one of them, to look.

        Raises:
            InvokeError: the pool is closed, or an executor has failed by a defect.
        """
        if self._is_closing:
            raise InvokeError("the pool is closed")
        if self._failure is not None:
            raise InvokeError(f"an executor has failed: {self._failure}")
        if self._tokens is not None:
            self._tokens.push(invocations)
        self.ring(max(1, len(invocations)))

    def offer(self, invocations: Sequence[Invocation]) -> None:
        """Take tokens that somebody else has found; those that wait here already are left out."""
        if self._tokens is not None and not self._is_closing:
            self._tokens.push(invocations, is_repeated=True)
            self.ring(max(1, len(invocations)))

    def ring(self, n_wanted: int) -> None:
        """Wake so many executors, or all that idle when these are fewer."""
        with contextlib.suppress(IndexError):
            for _ in range(n_wanted):
                self._idle.pop().woken.release()

    def n_idle(self) -> int:
        """How many executors would start at once."""
        return len(self._idle)

    @property
    def holders(self) -> dict[int, HolderId]:
        """The executors: thread's native id -> name in the store."""
        with self._lock:
            return {
                seat.thread.native_id: seat.holder
                for seat in self._seats
                if seat.thread.native_id is not None and not seat.is_ending
            }

    @property
    def failure(self) -> str | None:
        """The traceback of an executor that has failed by a defect."""
        return self._failure

    def ready(self, timeout_s: float) -> None:
        """Threads are ready at once."""

    def lend(self, holder: HolderId) -> None:
        """Let one more thread run tokens while a task waits; see `Lender`."""
        with self._lock:
            if not self._is_closing:
                self._start()

    def take_back(self) -> None:
        """A task goes on; see `Lender`. One thread ends when its token is spent."""
        with self._lock:
            leaving = next((seat for seat in self._seats if not seat.is_ending), None)
            if leaving is None or self._is_closing:
                return
            # One that idles, if there is one.
            for seat in self._seats:
                if not seat.is_busy and not seat.is_ending:
                    leaving = seat
            leaving.is_ending = True
        self.ring(len(self._idle))

    def abandon(self, holder: HolderId) -> None:
        """Let a fresh thread take the place of one that is stuck in a task. Idempotent.

        The old one ends by itself, after its current strand.
        """
        with self._lock:
            for seat in self._seats:
                if seat.holder == holder and not seat.is_ending and not self._is_closing:
                    seat.is_ending = True
                    seat.executor.drain()
                    self._start()
                    break
            else:
                return
        # It may idle, or just become idle: then it is woken to end.
        self.ring(len(self._idle))

    def close(self, grace_s: float = GRACE_S) -> None:
        """End all threads after their current strand, and wait so long for that. Idempotent."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
            seats = list(self._seats)
            for seat in seats:
                seat.is_ending = True
                seat.executor.drain()
        _open_pools.discard(self)
        self.ring(len(seats))
        deadline = time.monotonic() + grace_s
        for thread in [seat.thread for seat in seats]:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._kicks.put(None)
        self._heart.join(max(0.0, deadline - time.monotonic()))
        if not any(seat.thread.is_alive() for seat in seats):
            self._undo.close()
        self._restore_blas()

    def _start(self) -> None:
        self._n_started += 1
        seat = _ThreadSeat(self, HolderId(f"{self._name}-{self._n_started}"))
        replace = functools.partial(self.abandon, seat.holder)
        seat.executor = self._new_executor(seat.holder, self._store, self, self._policy, replace)
        self._seats.append(seat)
        seat.thread = threading.Thread(
            target=self._run, args=(seat,), name=f"wukong-{seat.holder}", daemon=True
        )
        seat.thread.start()

    def _run(self, seat: _ThreadSeat) -> None:
        try:
            queue = self._tokens or self._store.queue
            assert queue is not None, "the tokens of this store are handed to pools"
            run_until_drained(seat.executor, seat, queue.n_queued)
        except BaseException as error:
            logger.exception("an executor has failed; its work is queued again")
            self._failure = traceback.format_exc()
            released = self._store.jobs.release(seat.holder, f"failed with {error!r}")
            if self._tokens is not None:
                self._tokens.push(released)
        finally:
            with self._lock:
                self._seats.remove(seat)
            # It may have been woken for a token just when it was told to end.
            self.ring(1)

    def _beat(self) -> None:
        """The heartbeat thread of all executors; sleeps while all of them idle."""
        while not self._is_closing:
            with self._lock:
                busy = [seat for seat in self._seats if seat.is_busy]
                self._heart_rests = not busy
            with contextlib.suppress(Empty):
                self._kicks.get(timeout=LOOK_AFTER_S if busy else None)
                continue  # work has just begun, or the pool is closed
            for seat in busy:
                seat.executor.beat()

    def _forget(self) -> None:
        """In a fork of this process there are no threads."""
        self._is_closing = True


class _ThreadSeat:
    """The seat of an executor that is a thread."""

    executor: Runner
    thread: threading.Thread

    def __init__(self, pool: ThreadPool, holder: HolderId) -> None:
        self.holder = holder
        self.woken = threading.Lock()
        """Released by whoever has taken this seat out of the idle ones."""
        self.woken.acquire()
        self.is_busy = True
        self.is_ending = False
        self._pool = pool
        self.ring = pool.ring
        self.n_idle = pool.n_idle

    def is_leaving(self) -> bool:
        """See `wukong.executor.pool_seats.Seat`."""
        return self.is_ending

    def rest(self, is_queued: Callable[[], int]) -> bool:
        """See `wukong.executor.pool_seats.Seat`."""
        pool = self._pool
        self.is_busy = False
        pool._idle.append(self)
        try:
            if is_queued() or self.is_ending:
                pool._idle.remove(self)
            else:
                self.woken.acquire()
        except ValueError:
            self.woken.acquire()  # somebody was faster, and is about to release it
        with pool._lock:
            self.is_busy = True
            if pool._heart_rests:
                pool._heart_rests = False
                pool._kicks.put(None)
        return not self.is_ending


def _limit_blas(n_workers: int) -> Callable[[], None]:
    """Divide the cores among the executors' BLAS threads; returns what undoes it."""
    if any(name in os.environ for name in BLAS_VARIABLES):
        return lambda: None
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return lambda: None
    limits = threadpool_limits(max(1, CPU_COUNT // n_workers), user_api="blas")
    undo: Callable[[], None] = limits.restore_original_limits
    return undo


_open_pools: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in list(_open_pools):
        pool._forget()


os.register_at_fork(after_in_child=_forget_all)
