"""Calls of leased executors on their way, and the futures of their results."""

from __future__ import annotations

import concurrent.futures
import pickle
import threading
from concurrent.futures._base import PENDING, RUNNING
from typing import Any, Protocol, TypeVar

from wukong.rdma.hot_stream import shortest_way
from wukong.rdma.line import Line
from wukong.rdma.spin import Spin

T = TypeVar("T")


class Driver(Protocol):
    """What futures need of the lease that they belong to."""

    def drive(self, future: LeaseFuture[Any], timeout: float | None) -> float | None:
        """Read the line of a future until it is done; returns what is left of the time."""
        ...

    def cancel_call(self, future: LeaseFuture[Any]) -> bool:
        """Cancel what has not begun, and drop the result of what has. False: it has ended."""
        ...


class LeaseFuture(concurrent.futures.Future[T]):
    """The result of a call, when it comes. Whoever waits for it reads the line himself."""

    lease: Driver
    seat: LeasedSeat | None = None
    """Where it was sent."""

    def is_settled(self) -> bool:
        """It has ended, or was cancelled; cheaper than `done`."""
        return self._state not in (PENDING, RUNNING)

    def result(self, timeout: float | None = None) -> T:
        """See `concurrent.futures.Future.result`."""
        if not self.is_settled():
            timeout = self.lease.drive(self, timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `concurrent.futures.Future.exception`."""
        if not self.is_settled():
            timeout = self.lease.drive(self, timeout)
        return super().exception(timeout)

    def cancel(self) -> bool:
        """Cancel the call if it has not begun, as far as known here; it may be too late for that,
        and then its result is dropped. False: it has ended."""
        return self.lease.cancel_call(self)


class Call:
    """A call on its way."""

    __slots__ = (
        "buffers",
        "deadline_at",
        "flags",
        "function",
        "future",
        "n_retries",
        "number",
        "stream",
    )

    def __init__(
        self,
        number: int,
        future: LeaseFuture[Any],
        function: int,
        flags: int,
        stream: bytes,
        buffers: list[pickle.PickleBuffer],
        deadline_at: float,
        n_retries: int,
    ) -> None:
        self.number = number
        self.future = future
        self.function = function
        self.flags = flags
        self.stream = stream
        self.buffers = buffers
        self.deadline_at = deadline_at
        """By `time.monotonic`; 0: none."""
        self.n_retries = n_retries


class LeasedSeat:
    """A connected executor. `reading` is held by whoever reads its line."""

    def __init__(self, number: int, line: Line, spin: Spin) -> None:
        self.number = number
        self.line = line
        self.hot = shortest_way(line, spin)
        self.calls: dict[int, Call] = {}
        """Sent, and not answered."""
        self.known: set[int] = set()
        """Functions that the executor has."""
        self.reading = threading.Lock()
        self.is_watched = False
        """The background thread is woken by the next frame."""
        self.is_cut = False


def finish(future: LeaseFuture[Any], value: object) -> None:
    """End a call; one that was cancelled, or has passed its deadline, stays what it is."""
    with _settling:
        if not future.is_settled():
            future.set_result(value)


def fail(future: LeaseFuture[Any], error: BaseException) -> None:
    """End a call with an error, unless it has ended."""
    with _settling:
        if not future.is_settled():
            future.set_exception(error)


_settling = threading.RLock()
"""Held while a future gets its outcome: the deadline and the result may come at the same time.
Reentrant, since a future's callbacks run meanwhile, and may do anything."""
