"""Plain futures: a `concurrent.futures.Executor` on a cluster, which needs nothing of Dask's.

    submit --> waiting --+                                          +--> set_result, set_exception
                         +--> Session.extend --> ... --> on_news -->+
    map    --> waiting --+    (all that waits, at once)             +--> Session.release

One thread for each executor adds what was submitted and reads what is there. While it adds one
batch the next one gathers, so a burst of submits costs a handful of round trips. Arguments and
results are the cluster's business: threads share them, processes get copies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from wukong.errors import JobCancelled, StoreUnavailable, WukongError
from wukong.executor.serialize_failures import Failure, Raised
from wukong.executor.wire import raise_error
from wukong.session import Session
from wukong.session_watch import News, OnNews

logger = logging.getLogger(__name__)

T = TypeVar("T")
Call = Callable[[], Any]


class CallFuture(Future[T]):
    """A call that runs on a cluster; made by `CallExecutor`.

    It is pending until its result is here, so that it can be cancelled until then: what has not
    begun is not run, and the result of what runs is dropped.
    """

    def __init__(self, calls: CallExecutor) -> None:
        super().__init__()
        self._calls = calls
        self._is_settled = False
        """Set once, under the executor's lock, by who decides how it ends."""
        self._value = -1
        """The session's id; -1 before it was sent."""

    def cancel(self) -> bool:
        """Cancel the call; False if its result is here already."""
        return self._calls._cancel(self)

    def result(self, timeout: float | None = None) -> T:
        """What the call returned; waits for it.

        Raises:
            TimeoutError: not within so many seconds.
            CancelledError: it was cancelled.
            Exception: what the call raised, with the remote traceback as its `__cause__`.
        """
        self._calls._before_wait(self)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raised, or None; waits as `result` does."""
        self._calls._before_wait(self)
        return super().exception(timeout)


class CallExecutor(Executor):
    """Runs calls on a cluster's executors. Thread-safe; made by `Cluster.executor`.

    Args:
        open_session: opens the session that the calls become part of.
        secede: called in a thread that is about to wait for a call.
        n_retries: of a call that raises.
    """

    def __init__(
        self,
        open_session: Callable[[OnNews], Session],
        *,
        secede: Callable[[], None],
        n_retries: int = 0,
    ) -> None:
        self._secede = secede
        self._n_retries = n_retries
        self._changed = threading.Condition()
        """Guards what follows."""
        self._waiting: list[tuple[CallFuture[Any], Call]] = []
        """Submitted, and not sent yet."""
        self._sent: dict[int, CallFuture[Any]] = {}
        """By value; those whose results are not here."""
        self._arrived: list[int] = []
        """Values that are there; perhaps before their ids are known to be ours."""
        self._dropped: list[int] = []
        """Values whose futures were cancelled."""
        self._n_pending = 0
        """Futures that are not settled."""
        self._is_shut = False
        self._is_closed = False
        self.n_extensions = 0
        """How often calls were added to the job: round trips to the store."""
        self._session = open_session(self._on_news)
        self._thread = threading.Thread(target=self._run, name="wukong-calls", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------- the executor's interface

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> CallFuture[T]:
        """Have `fn(*args, **kwargs)` called.

        Raises:
            RuntimeError: the executor, or its cluster, was shut down.
        Cost: some us; a round trip takes about as long as a small `get`.
        """
        return self._submit_all([partial(fn, *args, **kwargs)])[0]

    def submit_each(self, fn: Callable[[Any], T], items: Iterable[Any]) -> list[CallFuture[T]]:
        """Have `fn` called with each item; a future for each, in order."""
        return self._submit_all([partial(fn, item) for item in items])

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **options: Any,
    ) -> Iterator[T]:
        """Like the built-in `map`, with all calls submitted at once.

        Args:
            timeout: seconds from now in which all results must be there.
            chunksize: calls that are one task. Tasks are grouped anyhow; set it for calls of
                microseconds.
            options: what later versions of Python pass; without meaning here.
        Returns: the results, in order. Closing it early cancels the rest.
        Raises:
            TimeoutError: by the iterator.
            Exception: by the iterator, what a call raised.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        end_at = None if timeout is None else time.monotonic() + timeout
        arguments = zip(*iterables)
        if chunksize == 1:
            futures = self._submit_all([partial(fn, *items) for items in arguments])
            return _results(futures, end_at)
        chunks = iter(lambda: list(islice(arguments, chunksize)), [])
        lists = self._submit_all([partial(_call_chunk, fn, chunk) for chunk in chunks])
        return (result for chunk in _results(lists, end_at) for result in chunk)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. Idempotent.

        Args:
            wait: return when all calls have ended; else they end in the background.
            cancel_futures: cancel what has not ended.
        """
        with self._changed:
            self._is_shut = True
            pending = [*self._sent.values(), *(future for future, _ in self._waiting)]
            self._changed.notify_all()
        if cancel_futures:
            for future in pending:
                future.cancel()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """End at once: the cluster closes. Calls that have not ended raise `JobCancelled`."""
        with self._changed:
            self._is_shut = self._is_closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_ended(self) -> bool:
        """Whether everything of it is over, its session too."""
        return not self._thread.is_alive()

    # -------------------------------------------------------------- in the callers' threads

    def _submit_all(self, calls: Sequence[Call]) -> list[CallFuture[Any]]:
        futures: list[CallFuture[Any]] = [CallFuture(self) for _ in calls]
        with self._changed:
            if self._is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._waiting += zip(futures, calls)
            self._n_pending += len(futures)
            self._changed.notify_all()
        return futures

    def _settle(self, future: CallFuture[Any]) -> bool:
        """Whether the caller decides how the future ends. Under the lock."""
        if future._is_settled:
            return False
        future._is_settled = True
        self._n_pending -= 1
        self._sent.pop(future._value, None)
        return True

    def _cancel(self, future: CallFuture[Any]) -> bool:
        with self._changed:
            is_first = self._settle(future)
            if is_first and future._value >= 0:
                self._dropped.append(future._value)
            self._changed.notify_all()
        if is_first:
            Future.cancel(future)
            future.set_running_or_notify_cancel()  # wakes `wait` and `as_completed`
        return future.cancelled()

    def _before_wait(self, future: CallFuture[Any]) -> None:
        if not future.done():
            self._secede()

    # -------------------------------------------------------------- in threads of the session

    def _on_news(self, news: Sequence[News]) -> None:
        with self._changed:
            for item in news:
                self._arrived += item.values
            self._changed.notify_all()

    # -------------------------------------------------------------- in the executor's thread

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:
            logger.exception("an executor of calls ends; its futures raise this error")
            self._end(error)
        else:
            self._end(JobCancelled("the cluster was closed before the call had ended"))
        self._session.close()

    def _step(self) -> bool:
        """Send, read and give back what there is; False at the end."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._is_closed or (self._is_shut and not self._n_pending):
                return False
            waiting, self._waiting = self._waiting, []
            arrived, self._arrived = self._arrived, []
            dropped, self._dropped = self._dropped, []
        if waiting:
            self._send([pair for pair in waiting if not pair[0]._is_settled])
        if arrived:
            self._receive(arrived)
        if dropped:
            self._session.cancel(dropped)
        return True

    def _has_work(self) -> bool:
        return bool(self._waiting or self._arrived or self._dropped or self._is_closed) or (
            self._is_shut and not self._n_pending
        )

    def _send(self, pairs: list[tuple[CallFuture[Any], Call]]) -> None:
        """Make one graph of the calls. If it cannot be sent, whoever is to blame is found."""
        if not pairs:
            return
        # A tuple with nothing but a function is a task; Dask does not look into the partial.
        graph = {number: (call,) for number, (_, call) in enumerate(pairs)}
        try:
            values = self._session.extend(graph, list(graph), n_retries=self._n_retries)
        except (StoreUnavailable, JobCancelled):
            raise
        except Exception as error:
            if len(pairs) == 1:
                self._fail(pairs[0][0], error)
                return
            middle = len(pairs) // 2
            self._send(pairs[:middle])
            self._send(pairs[middle:])
            return
        self.n_extensions += 1
        with self._changed:
            for value, (future, _) in zip(values, pairs):
                future._value = value
                if future._is_settled:
                    self._dropped.append(value)  # cancelled meanwhile
                else:
                    self._sent[value] = future

    def _receive(self, arrived: list[int]) -> None:
        with self._changed:
            ours = [value for value in arrived if value in self._sent]
        if not ours:
            return
        try:
            results = self._session.read(ours)
        except (StoreUnavailable, JobCancelled):
            raise
        except WukongError:
            results = [self._read_one(value) for value in ours]
        for value, result in zip(ours, results):
            self._deliver(value, result)
        self._session.release(ours)

    def _read_one(self, value: int) -> Any:
        try:
            return self._session.read([value])[0]
        except WukongError as error:
            return Raised(error, None)

    def _deliver(self, value: int, result: Any) -> None:
        with self._changed:
            future = self._sent.get(value)
            if future is None or not self._settle(future):
                return
        future.set_running_or_notify_cancel()
        if isinstance(result, Failure | Raised):
            future.set_exception(raise_error(result, None))
        else:
            future.set_result(result)

    def _fail(self, future: CallFuture[Any], error: BaseException) -> None:
        with self._changed:
            if not self._settle(future):
                return
        future.set_running_or_notify_cancel()
        future.set_exception(error)

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._is_shut = self._is_closed = True
            left = [*self._sent.values(), *(future for future, _ in self._waiting)]
        for future in left:
            self._fail(future, error)


def _call_chunk(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*items) for items in chunk]


def _results(futures: list[CallFuture[Any]], end_at: float | None) -> Iterator[Any]:
    """The futures' results, in order; none is kept after it was handed out."""

    def results() -> Iterator[Any]:
        futures.reverse()
        try:
            while futures:
                left_s = None if end_at is None else max(0.0, end_at - time.monotonic())
                yield futures.pop().result(left_s)
        finally:
            for future in futures:
                future.cancel()

    return results()
