"""Any `concurrent.futures.Executor` as invoker: Parsl, Dask, MPI, loky, Globus Compute, threads.

    client    FuturesPool -- submit(run_tokens, ticket) --> the user's executor
                  ^                                               |
                  |  the store's watch: a commit has              v
                  +--minted tokens, and there is room     run_tokens: take, run, commit, become,
                                                          until nothing is queued for a moment

A worker cannot submit to the executor that runs it. So who has minted tokens only commits them, as
everywhere; they are queued in the store, where each function that is still running finds them, and
so does the client, which watches while there is room for more functions, and submits them. Without
the client nothing is lost: running functions go on until nothing is queued. When a worker dies its
future fails, and what its holder ran is queued again at once; where a platform says nothing, the
heartbeat grows old. Where functions run in the client's own process, they submit by themselves.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import Executor as FuturesExecutor
from dataclasses import dataclass, replace

from wukong.errors import InvokeError, StoreError, StoreUnavailable
from wukong.executor.futures_worker import Host, Ticket, here, hosts, run_tokens
from wukong.executor.messages import HolderId, Invocation, JobId, JobView, Status
from wukong.executor.work import Policy
from wukong.storage import Store

logger = logging.getLogger(__name__)

N_FAILURES = 3
"""So many functions in a row that failed are an error of the pool; it goes on trying."""
FAILED_S = 10.0
"""For so long after that, nothing is submitted."""
WATCH_S = 30.0
RETRY_S = 0.5
"""A store that does not answer is asked again after this time."""
CAUSE_CHARS = 500
GRACE_S = 2.0
"""A closed pool waits so long for its functions."""


class FuturesPool(Host):
    """Has tokens run by functions that are submitted to an executor. Thread-safe.

    Args:
        executor: the user's, which stays open.
        make: makes another one when it is broken; None: that is an error.
        store: of the tokens, as the client has it open.
        url, options: how workers open it.
        n_workers: functions that run at once, at most.
        policy: of the executors.
        linger_s: how long a function that finds nothing queued waits for more.
    """

    def __init__(
        self,
        executor: FuturesExecutor,
        make: Callable[[], FuturesExecutor] | None,
        store: Store,
        url: str,
        options: dict[str, float | int | str | None],
        n_workers: int,
        policy: Policy,
        linger_s: float,
    ) -> None:
        self.store = store
        self.is_closed = False
        self._make = make
        self._executor = executor
        self._n_workers = n_workers
        self._name = secrets.token_hex(4)
        self._ticket = Ticket(
            pool=self._name,
            holder=HolderId(""),
            number=0,
            job=JobId(""),
            url=url,
            options=tuple(options.items()),
            policy=policy,
            n_workers=n_workers,
            linger_s=linger_s,
        )
        self._changed = threading.Condition(threading.RLock())
        """Guards what follows."""
        self._functions: dict[HolderId, _Function] = {}
        """Functions that were submitted and have not ended."""
        self._watches: dict[JobId, threading.Thread] = {}
        self._n_submitted = 0
        self._n_failures = 0
        self._failure: str | None = None
        self._failed_at = 0.0
        hosts[os.getpid(), self._name] = self

    # -------------------------------------------------------------- the invoker

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Submit functions for queued tokens, as far as there is room, and watch their jobs.

        Raises:
            InvokeError: the pool is closed, or its functions fail; the message says why.
        """
        if self.is_closed:
            raise InvokeError("the pool is closed")
        with self._changed:
            if time.monotonic() - self._failed_at >= FAILED_S:
                self._failure = None
            failure = self._failure
        if failure is not None:
            raise InvokeError(f"executors do not start: {failure}")
        for job in dict.fromkeys(invocation.job for invocation in invocations):
            if here.pool is self and here.seceded:
                here.seceded = False
                ticket = self._enter(job)
                threading.Thread(target=self._run_here, args=(ticket,), daemon=True).start()
            self._submit(job, sum(invocation.job == job for invocation in invocations))
            self.look_after(job)

    def n_idle(self) -> int:
        """How many more functions could run."""
        return max(0, self._n_workers - len(self._functions))

    def secede(self) -> None:
        """If the caller is one of this pool's functions, it is about to wait for a graph.

        It holds the worker that the graph needs: the graph gets a thread of its own.
        """
        if here.pool is self:
            here.seceded = True

    def close(self) -> None:
        """Cancel what has not begun, and wait a moment for what has. Idempotent."""
        with self._changed:
            self.is_closed = True
            futures = [f.future for f in self._functions.values() if f.future is not None]
            self._changed.notify_all()
        for future in futures:
            future.cancel()
        deadline = time.monotonic() + GRACE_S
        with self._changed:
            self._changed.wait_for(lambda: not self._functions, GRACE_S)
            watches = list(self._watches.values())
        for thread in watches:
            thread.join(max(0.0, deadline - time.monotonic()))
        hosts.pop((os.getpid(), self._name), None)

    # -------------------------------------------------------------- functions

    def _enter(self, job: JobId) -> Ticket:
        """Count one function more."""
        with self._changed:
            number = self._n_submitted
            self._n_submitted += 1
            holder = HolderId(f"{self._name}-{number}")
            self._functions[holder] = _Function(job)
        return replace(self._ticket, holder=holder, number=number, job=job)

    def _submit(self, job: JobId, n_wanted: int) -> None:
        """Submit so many functions, or as many as there is room for."""
        for _ in range(n_wanted):
            with self._changed:
                if self.is_closed or len(self._functions) >= self._n_workers:
                    return
                ticket = self._enter(job)
            try:
                future = self._submitted(ticket)
            except Exception as error:  # whatever the user's executor raises
                self._has_ended(ticket.holder, error)
                return
            with self._changed:
                if ticket.holder in self._functions:
                    self._functions[ticket.holder].future = future
            future.add_done_callback(functools.partial(self._done, ticket.holder))

    def _submitted(self, ticket: Ticket) -> Future[int]:
        try:
            return self._executor.submit(run_tokens, ticket)
        except BrokenExecutor:
            if self._make is None:
                raise
        logger.warning("the executor is broken; another one is made")
        self._executor = self._make()
        return self._executor.submit(run_tokens, ticket)

    def _run_here(self, ticket: Ticket) -> None:
        try:
            run_tokens(ticket)
        except BaseException as error:
            self._has_ended(ticket.holder, error)
        else:
            self._has_ended(ticket.holder, None)

    def _done(self, holder: HolderId, future: Future[int]) -> None:
        self._has_ended(holder, None if future.cancelled() else future.exception())

    def _has_ended(self, holder: HolderId, error: BaseException | None) -> None:
        """A function has ended: there is room again, and what it held is queued again."""
        with self._changed:
            self._functions.pop(holder, None)
            if error is None:
                self._n_failures = 0
            elif not self.is_closed:
                self._n_failures += 1
                is_final = isinstance(error, InvokeError | BrokenExecutor) and self._make is None
                if is_final or self._n_failures >= N_FAILURES:
                    self._failure = f"{type(error).__name__}: {error}"
                    self._failed_at = time.monotonic()
            self._changed.notify_all()
            if error is None or self.is_closed:
                return
        logger.warning("a function of the executor failed, its work is queued again: %s", error)
        try:
            released = self.store.jobs.release(holder, f"failed with {error!r}"[:CAUSE_CHARS])
        except StoreError as unavailable:
            logger.warning("its work waits for the end of its silence: %s", unavailable)
            return
        if self._failure is None:
            for invocation in released:
                self._submit(invocation.job, 1)

    # -------------------------------------------------------------- watching

    def look_after(self, job: JobId) -> None:
        """Watch a job until it ends, and submit functions for what is queued. Idempotent."""
        with self._changed:
            if self.is_closed or job in self._watches:
                return
            thread = threading.Thread(
                target=self._watch, args=(job,), name=f"wukong-watch-{job}", daemon=True
            )
            self._watches[job] = thread
        thread.start()

    def _watch(self, job: JobId) -> None:
        """Submit functions for what the job's executors mint, while there is room for any."""
        version = -1
        try:
            while not self.is_closed:
                with self._changed:
                    if len(self._functions) >= self._n_workers:
                        version = -1  # what was queued when there was no room is news then
                        self._changed.wait_for(
                            lambda: self.is_closed or len(self._functions) < self._n_workers
                        )
                        continue
                view = self._news(job, version)
                if view is None or view.status is not Status.RUNNING:
                    return
                version = view.version
                with self._changed:
                    n_here = sum(function.job == job for function in self._functions.values())
                # Functions that linger, or have not begun, will find what is queued.
                self._submit(job, view.n_queued + view.n_running - n_here)
        finally:
            with self._changed:
                self._watches.pop(job, None)

    def _news(self, job: JobId, version: int) -> JobView | None:
        while not self.is_closed:
            try:
                return self.store.jobs.wait(job, version, WATCH_S, progress=True)
            except StoreUnavailable:
                with self._changed:  # the client that waits for the job says so
                    self._changed.wait_for(lambda: self.is_closed, RETRY_S)
        return None


@dataclass(slots=True)
class _Function:
    """One that was submitted and has not ended."""

    job: JobId
    future: Future[int] | None = None
    """None: it is just being submitted, or runs in a thread of the pool."""


def width_of(executor: object) -> int:
    """How many functions an executor runs at once.

    Raises:
        ValueError: it does not say.
    """
    for name in ("_max_workers", "num_workers", "max_workers"):
        width = getattr(executor, name, None)
        if isinstance(width, int) and width > 0:
            return width
    nthreads = getattr(getattr(executor, "_client", None), "nthreads", None)
    if nthreads is not None:  # of a cluster of Dask's
        return max(1, sum(int(n) for n in nthreads().values()))
    raise ValueError(f"{type(executor).__name__} does not say how wide it is: give n_workers")
