"""Leased executors as a pool for graphs: they run the store's tokens, and wake each other.

    client    LeasedPool -- one call for each leased executor: serve_tokens --> executor
                  |                                                               |
                  +-- doorbell: a FIFO and a board in the store's folder ---------+

The call lasts as long as the lease: in it the executor is what an executor of a local pool is, with
the same seat, and invokes others by the same doorbell; the client is in no path of a job. When an
executor dies what it held is queued again at once, and the one that its agent starts in its place
takes its seat. Tokens are in the store, so nothing is lost with a lease; `OrElse` has other
executors start on the same store when it is refused, exhausted or lost.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from wukong.errors import InvokeError, LeaseError, StoreError
from wukong.executor.invoker import Pool
from wukong.executor.messages import HolderId, Invocation
from wukong.executor.pool_launch import WakePipe
from wukong.executor.pool_seats import FAILED, Doorbell, ProcessSeat
from wukong.executor.run import Executor
from wukong.executor.work import Policy
from wukong.rdma.client import Lease
from wukong.storage import Store, open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """What an executor needs to take a seat of a pool."""

    holder: HolderId
    number: int
    n_seats: int
    pipe: str
    """Path of the FIFO in which idle executors wait."""
    board: str
    """Path of the file whose bytes say who idles."""
    url: str
    options: Mapping[str, float | int | str | bytes | None]
    policy: Policy


def serve_tokens(place: Place) -> None:
    """Run the store's tokens until this process is killed: what a leased executor is called for."""
    store = open_store(place.url, **place.options)  # type: ignore[arg-type]  # by their names
    queue = store.queue
    assert queue is not None, "the tokens of this store are handed to pools"
    wait_fd = os.open(place.pipe, os.O_RDWR | os.O_CLOEXEC)
    ring_fd = os.open(place.pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    board_fd = os.open(place.board, os.O_RDWR | os.O_CLOEXEC)
    doorbell = Doorbell(wait_fd, ring_fd, board_fd, place.n_seats)
    # Its end would tell the executor to finish; a lease ends by a kill instead.
    lifeline_fd, _ = os.pipe()

    def tell(message: str) -> None:
        if message == "stuck":
            os._exit(FAILED)  # the agent starts another one

    def new_executor(seat: ProcessSeat) -> Executor:
        return Executor(seat.holder, store, seat, place.policy, seat.report_stuck)

    seat = ProcessSeat(place.holder, place.number, doorbell, lifeline_fd, tell, new_executor)
    seat.serve(new_executor(seat), queue.n_queued)


class LeasedPool:
    """Leased executors of this node around a store in its shared memory. Thread-safe.

    Args:
        lease: given back with the pool.
        store, url, options: of the tokens, as the client and as executors open it.
        policy: the executors'.
        folder: where the doorbell lies.
        on_failure: called once when no executor is left, and none will come.
    """

    def __init__(
        self,
        lease: Lease,
        store: Store,
        url: str,
        options: Mapping[str, float | int | str | bytes | None],
        policy: Policy,
        folder: Path,
        on_failure: Callable[[], None],
    ) -> None:
        self.lease = lease
        lease.pipeline = 1  # the call of a seat never ends: a second one would wait behind it
        self._store = store
        self._on_failure = on_failure
        self._name = secrets.token_hex(4)
        self._n_started = 0
        self._lock = threading.Lock()
        self._is_closed = False
        self._failure: str | None = None
        self._pipe = WakePipe.make(folder, self._name)
        assert self._pipe.path is not None
        self._board = folder / f"{self._name}.board"
        n_seats = lease.n_executors
        self._board.write_bytes(bytes(n_seats))
        board_fd = os.open(self._board, os.O_RDWR | os.O_CLOEXEC)
        self._doorbell = Doorbell(self._pipe.wait_fd, self._pipe.ring_fd, board_fd, n_seats)
        os.close(board_fd)
        self._place = functools.partial(
            Place,
            n_seats=n_seats,
            pipe=str(self._pipe.path),
            board=str(self._board),
            url=url,
            options=dict(options),
            policy=policy,
        )
        for number in range(n_seats):
            self._seat(number)

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Wake executors for queued tokens; for () one of them, to look.

        Raises:
            InvokeError: the lease is over.
        """
        if self._failure is not None or self._is_closed:
            raise InvokeError(f"no leased executors: {self._failure or 'the pool is closed'}")
        self._doorbell.ring(max(1, len(invocations)))

    def n_idle(self) -> int:
        """How many executors would start at once."""
        return self._doorbell.n_idle()

    def close(self) -> None:
        """Give the lease back. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self.lease.shutdown(wait=False)
        self._doorbell.close()
        self._pipe.close()
        self._board.unlink(missing_ok=True)

    def _seat(self, number: int) -> None:
        """Have an executor on a seat, as soon as one is free."""
        with self._lock:
            self._n_started += 1
            holder = HolderId(f"{self._name}-{self._n_started}")
        try:
            future = self.lease.submit(serve_tokens, self._place(holder=holder, number=number))
        except LeaseError as error:
            self._fail(error)
        else:
            future.add_done_callback(functools.partial(self._ended, holder, number))

    def _ended(self, holder: HolderId, number: int, future: Future[None]) -> None:
        """An executor is dead: what it held is queued again, and its successor called."""
        if self._is_closed or future.cancelled():
            return
        error = future.exception()
        logger.warning("a leased executor is gone, its work is queued again: %s", error)
        self._doorbell.show(number, False)
        with contextlib.suppress(StoreError):  # then its silence tells
            self._store.jobs.release(holder, f"was lost: {error}")
        self._seat(number)
        # It may have died between waking up and taking what it was woken for.
        self._doorbell.ring(2)

    def _fail(self, error: LeaseError) -> None:
        with self._lock:
            if self._failure is not None or self._is_closed:
                return
            self._failure = str(error)
        logger.warning("the lease is over: %s", error)
        self._on_failure()


class OrElse:
    """A pool, and another one on the same store that is started when the first fails. Thread-safe.

    Args:
        make: starts the other pool; None: there is none, and failures are the caller's.
    """

    def __init__(self, make: Callable[[], Pool] | None) -> None:
        self.first: Pool | None = None
        """Set by the owner once it is there."""
        self._make = make
        self._lock = threading.Lock()
        self._other: Pool | None = None
        self._is_closed = False

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """See `Invoker.invoke`: by the first pool, or else by the other one."""
        if self._other is None and self.first is not None:
            try:
                self.first.invoke(invocations)
                return
            except InvokeError as error:
                if self._make is None or self._is_closed:
                    raise
                logger.warning("other executors take over: %s", error)
        self.start_other().invoke(invocations)

    def n_idle(self) -> int:
        """See `Invoker.n_idle`."""
        pool = self._other or self.first
        return 0 if pool is None else pool.n_idle()

    def start_other(self) -> Pool:
        """Start the other pool, and let it look at what is queued. Idempotent.

        Raises:
            InvokeError: there is none.
        """
        with self._lock:
            if self._make is None or self._is_closed:
                raise InvokeError("the lease is over, and nothing else is to take over")
            if self._other is None:
                self._other = self._make()
            other = self._other
        other.invoke(())
        return other

    def fall_back(self) -> None:
        """Start the other pool, if there is one, in a thread: for callers that must not wait."""
        if self._make is not None and not self._is_closed:
            threading.Thread(target=self._try_other, daemon=True).start()

    def _try_other(self) -> None:
        with contextlib.suppress(InvokeError):
            self.start_other()

    @property
    def has_fallen_back(self) -> bool:
        """The other pool has taken over."""
        return self._other is not None

    def close(self) -> None:
        """Close both. Idempotent."""
        with self._lock:
            self._is_closed = True
            pools = [pool for pool in (self.first, self._other) if pool is not None]
        for pool in pools:
            pool.close()
