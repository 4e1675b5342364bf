"""The functions that a `FuturesPool` submits: they run a store's queued tokens in a worker.

Importable wherever Wukong is, and called with plain data: any platform can carry both. A process
keeps the store open for the next function.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from wukong.errors import InvokeError, StoreUnavailable
from wukong.executor.invoker import Invoker, share_of_idle
from wukong.executor.lanes import LaneExecutor, SecondLane, Turn
from wukong.executor.messages import HolderId, Invocation, JobId, Status
from wukong.executor.run import Executor
from wukong.executor.work import Policy
from wukong.storage import Store, open_store

LOOK_S = 1.0
"""How old a function's picture of who idles may be; it costs a round trip."""
KEEP_S = 30.0
"""A process keeps a store open for so long after the last function that used it."""


class Host(Invoker, Protocol):
    """The pool that has submitted a function, where that runs in the pool's own process."""

    store: Store
    is_closed: bool


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a function needs to run tokens: plain data that any platform can carry."""

    pool: str
    """Which pool has submitted it."""
    holder: HolderId
    """Under which name it holds tokens; nobody else uses it."""
    number: int
    """How many were submitted before it."""
    job: JobId
    """The job that it was submitted for; where the store is a queue, it runs tokens of all jobs."""
    url: str
    """Of the store; see `open_store`."""
    options: tuple[tuple[str, float | int | str | None], ...]
    """Further arguments of `open_store`."""
    policy: Policy
    n_workers: int
    """Functions that run at once, at most."""
    linger_s: float
    """A function that finds nothing queued waits so long for more."""


def run_tokens(ticket: Ticket) -> int:
    """Run the queued tokens of a store, until nothing is queued for a while.

    Returns: how many tokens it has taken.
    Raises:
        InvokeError: this process cannot reach the store.
    """
    # Functions of threads share the client's pool, and its store.
    pool = hosts.get((os.getpid(), ticket.pool))
    place = _visit(ticket) if pool is None else None
    store = pool.store if pool is not None else place.store  # type: ignore[union-attr]  # one of both
    invoker: Invoker = pool if pool is not None else _Watched(store, ticket)
    is_over = threading.Event()
    lanes = _open_lanes(store, invoker, ticket)
    heart = threading.Thread(target=_beat, args=(lanes.executors, is_over), daemon=True)
    heart.start()
    here.pool = pool
    try:
        return _take_all(lanes.executors[0], store, ticket, pool)
    finally:
        here.pool, here.seceded = None, False
        try:
            lanes.end()
        finally:
            is_over.set()
            heart.join()
            if place is not None:
                place.leave()


@dataclass(frozen=True, slots=True)
class _Lanes:
    """The executors of one function: one, or two where the store is far away."""

    executors: list[Executor]
    end: Callable[[], None]
    """Waits for what the second one still holds."""


def _open_lanes(store: Store, invoker: Invoker, ticket: Ticket) -> _Lanes:
    policy = ticket.policy
    if not (store.is_remote and policy.prefetch_bytes):
        return _Lanes([Executor(ticket.holder, store, invoker, policy)], lambda: None)
    turn = Turn()
    first, second = (LaneExecutor(turn, ticket.holder, store, invoker, policy) for _ in range(2))

    def n_queued() -> int:
        if store.queue is not None:
            return store.queue.n_queued()
        return len(store.jobs.queued(ticket.job))

    lane = SecondLane(
        second, turn, n_queued, ticket.n_workers, lambda: _take(second, store, ticket)
    )
    return _Lanes([first, second], lane.end)


def _take_all(executor: Executor, store: Store, ticket: Ticket, pool: Host | None) -> int:
    """Run what is queued; returns how often it has found something."""
    n_taken = 0
    while True:
        while (pool is None or not pool.is_closed) and _take(executor, store, ticket):
            n_taken += 1
        view = store.jobs.view(ticket.job)
        if view is None or view.status is not Status.RUNNING or (pool and pool.is_closed):
            return n_taken
        if not view.n_queued:
            later = store.jobs.wait(ticket.job, view.version, ticket.linger_s, progress=True)
            if later is None or not later.n_queued:
                return n_taken


def _take(executor: Executor, store: Store, ticket: Ticket) -> bool:
    """Run a queued token and what it becomes. False: there is none."""
    if store.queue is not None:
        return executor.take()
    queued = sorted(store.jobs.queued(ticket.job), key=lambda found: -found.priority)
    if not queued:
        return False
    # Functions that come at once begin at different places; the store lets one of them have it.
    first = sum(found.priority == queued[0].priority for found in queued)
    executor.run(ticket.job, queued[ticket.number % first].token)
    return True


def _beat(executors: Sequence[Executor], is_over: threading.Event) -> None:
    while not is_over.wait(min([executor.beat() for executor in executors])):
        pass


class _Watched:
    """The invoker of a function whose client watches the store: what is queued is seen there."""

    def __init__(self, store: Store, ticket: Ticket) -> None:
        self._jobs = store.jobs
        self._ticket = ticket
        self._looked_at = 0.0
        self._n_idle = 0

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Nothing: the client reads of them as soon as the commit has been made."""

    def n_idle(self) -> int:
        """This function's share of those that could still run, by the job's last known state."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            with contextlib.suppress(StoreUnavailable):
                view = self._jobs.view(self._ticket.job)
                n_busy = self._ticket.n_workers if view is None else view.n_running + view.n_queued
                n_idle = self._ticket.n_workers - n_busy
                self._n_idle = share_of_idle(n_idle, n_busy, random.random())
        return self._n_idle


class _Place:
    """A store that this process has open for the functions of one pool."""

    def __init__(self, ticket: Ticket) -> None:
        self.store = _open(ticket)
        self._n_guests = 0
        self._emptied_at = 0.0
        self._name = (os.getpid(), ticket.pool)

    def enter(self) -> _Place:
        self._n_guests += 1
        return self

    def leave(self) -> None:
        """One function less; the last one's end is remembered."""
        with _places_lock:
            self._n_guests -= 1
            self._emptied_at = time.monotonic()
            if self._n_guests:
                return
        timer = threading.Timer(KEEP_S, self._close_if_idle)
        timer.daemon = True
        timer.start()

    def _close_if_idle(self) -> None:
        with _places_lock:
            is_idle = not self._n_guests and time.monotonic() - self._emptied_at >= KEEP_S
            if not is_idle or _places.pop(self._name, None) is None:
                return
        self.store.jobs.close()
        if self.store.blobs is not None:
            self.store.blobs.close()


def _visit(ticket: Ticket) -> _Place:
    with _places_lock:
        place = _places.get((os.getpid(), ticket.pool))
        if place is None:
            place = _places[os.getpid(), ticket.pool] = _Place(ticket)
        return place.enter()


def _open(ticket: Ticket) -> Store:
    parts = urlsplit(ticket.url)
    if parts.scheme == "memory" or (parts.scheme == "local" and not Path(parts.path).is_dir()):
        raise InvokeError(
            f"process {os.getpid()} on {socket.gethostname()} cannot see the store {ticket.url}: "
            "give the cluster one that all workers reach, as store='redis://host'"
        )
    return open_store(ticket.url, **dict(ticket.options))  # type: ignore[arg-type]  # by their names


_places: dict[tuple[int, str], _Place] = {}
_places_lock = threading.Lock()


class _Here(threading.local):
    pool: Host | None = None
    """The pool whose function this thread runs, if the pool is of this process."""
    seceded: bool = False
    """The task that runs here is about to wait for a graph of its own."""


here = _Here()

hosts: dict[tuple[int, str], Host] = {}
"""The open pools of each process and its forks, by pid and name."""
