"""Leased executors, as a `concurrent.futures.Executor`.

    with wukong.rdma.lease(n_executors=4, memory_bytes=1 << 30, ttl_s=30) as executors:
        future = executors.submit(function, array)     # pipelined; the array is not copied
        executors.call(function, 1)                    # the shortest way for one call

    submit --> the seat with fewest calls --> frame --> executor
    result()  <-- whoever waits reads the line himself: nothing has to wake him
    background thread: leases, renewals, and lines that nobody reads at the moment

A call that was sent to an executor which then dies fails with `LeaseLost`, unless it may be
repeated (`retries`); calls that have not been sent go to another executor.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, TracebackType
from typing import Any, ParamSpec, TypeVar

import numpy.typing as npt

from wukong.errors import (
    FrameError,
    LeaseLost,
)
from wukong.executor.serialize_failures import decode_error
from wukong.rdma.calls import Call, LeasedSeat, LeaseFuture
from wukong.rdma.frames import Kind
from wukong.rdma.hot import MISSED
from wukong.rdma.lease import Request
from wukong.rdma.leased import KWARGS
from wukong.rdma.line import ArenaFull, encode
from wukong.rdma.registry import default_directory
from wukong.rdma.seats import LOOK_S, Seats

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

ARENA_BYTES = 1 << 28
"""Of each direction. Memory is used when it is written, not when it is reserved."""


class Lease(Seats, concurrent.futures.Executor):
    """Leased executors. Thread-safe. Make it with `lease`."""

    retries = 0
    """How often a call is repeated whose executor has died."""

    # -------------------------------------------------------------- calls

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function on a leased executor, and wait: the shortest way.

        Raises: what `submit(...).result()` raises.
        """
        number = 0 if kwargs or self._is_draining else self._function_number(function)
        if number:
            for seat in self._seats:
                is_free = not seat.calls and not seat.is_watched and number in seat.known
                if is_free and seat.reading.acquire(False):
                    try:
                        return self._exchange(seat, number, args)  # type: ignore[no-any-return]
                    except ArenaFull:
                        break
                    except (LeaseLost, FrameError) as error:
                        self._lost(seat, error)
                        raise
                    finally:
                        seat.reading.release()
        return self.submit(function, *args, **kwargs).result()

    def _exchange(self, seat: LeasedSeat, function: int, args: tuple[Any, ...]) -> Any:
        """One call, on a line that nobody else uses; `reading` is held."""
        self._n_calls = call = self._n_calls + 1
        line, hot = seat.line, seat.hot
        if hot is not None and hot.post_call(call, function, args):
            result = hot.await_result(call)
            if result is not MISSED:
                return result
        else:
            stream, buffers = encode(args)
            line.send(Kind.CALL, call, stream, buffers, function)
        frame = line.receive(3600.0, self._spin.spin_s)
        while frame is None or frame.call != call:
            if frame is not None:
                self._handle(seat, frame)
            frame = line.receive(3600.0, self._spin.spin_s)
        if frame.kind == Kind.RESULT:
            return line.load(frame)
        if frame.kind == Kind.RAISED:
            raise decode_error(pickle.loads(frame.stream))
        raise FrameError(f"an executor answers a call with a frame of kind {frame.kind}")

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> LeaseFuture[T]:
        """See `concurrent.futures.Executor.submit`; arguments are pickled now.

        Raises:
            LeaseError: the lease is over.
            SerializationError: the function or an argument cannot be pickled.
        """
        return self._submit(0.0, fn, args, kwargs)

    def submit_within(
        self, deadline_s: float, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> LeaseFuture[T]:
        """As `submit`; ends in `JobTimeout` after so long. A call that has not begun by then never
        does; the result of one that has is dropped."""
        if not deadline_s > 0:
            raise ValueError(f"a deadline of {deadline_s} s has passed already")
        return self._submit(time.monotonic() + deadline_s, fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **ignored: Any,
    ) -> Iterator[T]:
        """See `concurrent.futures.Executor.map`; calls travel one by one, but pipelined."""
        del chunksize, ignored
        return super().map(fn, *iterables, timeout=timeout)

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> npt.NDArray[Any]:
        """An array in memory that the executors of this node share: as an argument it is not copied
        at all. They see it read-only, and see what is written to it during a call.

        Raises:
            ArenaFull: there is no room.
        """
        return self._outbox.empty(shape, dtype)

    def _submit(
        self, deadline_at: float, fn: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> LeaseFuture[Any]:
        number = self._function_number(fn)
        payload = args if number else (fn, *args)
        flags = 0
        if kwargs:
            payload, flags = (*payload, kwargs), KWARGS
        stream, buffers = encode(payload)
        future: LeaseFuture[Any] = LeaseFuture()
        future.lease = self
        with self._lock:
            self._check()
            self._n_calls += 1
            call = Call(
                self._n_calls, future, number, flags, stream, buffers, deadline_at, self.retries
            )
            if deadline_at:
                self._n_deadlines += 1
            self._backlog.append(call)
            is_first = len(self._backlog) == 1
        if is_first:
            self._dispatch()
        if deadline_at:
            self._wake()
        return future

    def _function_number(self, fn: Callable[..., Any]) -> int:
        """The number under which executors keep a function; 0: it travels with each call.

        Only what is imported by its name is kept: a closure may be another one at the next call.
        """
        try:
            number = self._functions.get(fn)
        except TypeError:
            return 0
        if number is None:
            number = 0
            try:
                stream = pickle.dumps(fn, 5)
            except Exception:
                stream = b"__main__"
            if (
                isinstance(fn, FunctionType | BuiltinFunctionType | type)
                and b"__main__" not in stream
            ):
                with self._lock:
                    number = len(self._pickled) + 1
                    self._pickled[number] = stream
            self._functions[fn] = number
        return number

    @property
    def n_executors(self) -> int:
        """Executors that can be called now."""
        return len(self._seats)

    @property
    def transports(self) -> tuple[str, ...]:
        """How each executor is reached: "shm", "verbs" or "tcp"."""
        return tuple(seat.line.transport.kind for seat in self._seats)

    @property
    def copied_bytes(self) -> int:
        """Bytes of arrays that were copied here on their way to executors."""
        return sum(seat.line.copied_bytes for seat in self._seats)

    # -------------------------------------------------------------- the end

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Give the lease back, after the calls that were submitted if `wait`. Idempotent."""
        with self._lock:
            if cancel_futures or not wait:
                stranded, self._backlog = list(self._backlog), deque()
            else:
                stranded = []
        for call in stranded:
            concurrent.futures.Future.cancel(call.future)
        if wait:
            with self._lock:
                self._is_draining = True
                while (self._backlog or any(s.calls for s in self._seats)) and not self._failure:
                    self._changed.wait(LOOK_S)
        self._give_back()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown(wait=kind is None, cancel_futures=kind is not None)


def lease(
    n_executors: int = 1,
    memory_bytes: int = 0,
    ttl_s: float = 30.0,
    *,
    hot: bool = False,
    directory: str | os.PathLike[str] | None = None,
    transports: tuple[str, ...] = ("shm", "verbs", "tcp"),
    arena_bytes: int = ARENA_BYTES,
    timeout_s: float = 30.0,
    retries: int = 0,
    ca: str = "",
) -> Lease:
    """Lease executors, as a context manager that is a `concurrent.futures.Executor`.

    Args:
        n_executors: each with a core of its own.
        memory_bytes: that each may use; 0: not limited.
        ttl_s: they are gone so long after this process stops renewing. Renewed by itself.
        hot: executors poll for calls all the time: microseconds faster, and a core is always busy.
        directory: where agents register; by default $WUKONG_AGENTS, or one of this user's.
        transports: that may be used, best first.
        arena_bytes: for arrays on their way, for each executor and direction.
        timeout_s: to get them.
        retries: so often a call is repeated whose executor has died.
        ca: file with the certificates that agents' TLS certificates must be signed by.
    Raises:
        LeaseRefused: there are not so many; the message says why.
    """
    path = Path(directory) if directory is not None else default_directory()
    request = Request(n_executors, memory_bytes, ttl_s, hot)
    leased = Lease(request, path, transports, arena_bytes, timeout_s, ca)
    leased.retries = retries
    return leased
