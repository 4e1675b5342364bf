"""Executors on this machine, as processes, with the cloud's semantics.

The live tokens in the store are the pool's queue, and invoking is a wake-up: an idle executor that
is woken takes tokens from the store until nothing is queued there. Executors wake each other; the
client's thread is in no path of a job. A dead executor is noticed at once, its tokens are queued
again, and another one is started in its place.

A pool knows nothing of jobs. What lies where:

    pool           the client's side: starts, buries, replaces
    pool_launch    how the client starts a zygote, and talks to it
    pool_zygote    the process that imports once and forks executors
    pool_handed    the pool's own queue, where the store is far away
    pool_seats     how an executor waits and is woken
    pool_threads   the same with threads
    run            what executors do
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import select
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wukong.errors import InvokeError, StoreError
from wukong.executor.messages import HolderId, Invocation
from wukong.executor.pool_handed import HandedTokens
from wukong.executor.pool_launch import (
    Message,
    WakePipe,
    ZygoteLink,
    describe_death,
    executor_environment,
)
from wukong.executor.pool_seats import Doorbell
from wukong.executor.pool_zygote import GRACE_S, Settings
from wukong.executor.work import Policy
from wukong.storage import Store

logger = logging.getLogger(__name__)

PRELOAD = ("numpy", "dask.base")
BACK_OFF_S = 0.05
"""Wait after a start that failed; doubles with each further one, up to `MAX_BACK_OFF_S`."""
MAX_BACK_OFF_S = 5.0
N_FAILURES = 3
"""So many failed starts in a row are an error of the pool; it goes on trying."""
FAILURES_APART_S = 30.0
"""Failures farther apart than this are not in a row."""
STOPPED = "was stopped by its client"
STUCK = "is stuck in a task of a job that has ended"


class ProcessPool:
    """A fixed number of executor processes, forked by a zygote of our own. Thread-safe.

    There is no need of `if __name__ == "__main__"` in the user's script: the zygote is a new
    interpreter that imports `preload` and nothing else. Path, directory and environment are the
    client's; all executors hash strings alike. Executors are in sessions of their own, so that
    Ctrl-C reaches the client only. They end when the client does, however it does.

    Args:
        store_url: the store of the tokens, which each executor opens.
        n_workers: how many executors.
        policy: theirs.
        store: the same store, as the client has it open: for releasing what dead executors held.
        store_options: further arguments of `open_store` in the executors.
        preload: modules that are imported once, before executors are forked, and shared.
        env: variables besides the client's environment.
        folder: where to put a FIFO with which others can wake this pool (`wake_pools`); None: no
            such thing.
        entry: "module:function" that executors run; tests have others.
    Raises:
        OSError: no process could be started.
    Cost: returns at once; `ready` waits. Two files and a thread in the client.
    """

    def __init__(
        self,
        store_url: str,
        n_workers: int,
        policy: Policy,
        *,
        store: Store,
        store_options: Mapping[str, float | int | str | bytes | None] | None = None,
        preload: Sequence[str] = PRELOAD,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        entry: str = "wukong.executor.pool_zygote:run_executor",
    ) -> None:
        self._jobs, self._env = store.jobs, executor_environment(n_workers, env or {})
        self._name, self._n_started = secrets.token_hex(4), 0
        self._seats = [_Place(number) for number in range(n_workers)]
        self._changed = threading.Condition()
        """Guards everything below."""
        self._zygote: ZygoteLink | None = None
        self._is_closing = False
        self._failure: str | None = None
        self._n_failures, self._failed_at = 0, 0.0
        self._fails_late = False
        """Executors start well, and fail then."""
        self._start_at = 0.0
        """No start before this moment."""
        with contextlib.ExitStack() as undo:
            self._pipe = WakePipe.make(folder, self._name)
            undo.callback(self._pipe.close)
            self._board_fd = os.memfd_create("wukong-idle", os.MFD_CLOEXEC)
            undo.callback(os.close, self._board_fd)
            os.truncate(self._board_fd, n_workers)
            self._doorbell = Doorbell(
                self._pipe.wait_fd, self._pipe.ring_fd, self._board_fd, n_workers
            )
            undo.callback(self._doorbell.close)
            self._tokens = HandedTokens.make(store, n_workers, undo)
            self._poke_fd = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._poke_fd)
            self._settings = Settings(
                entry=entry,
                store_url=store_url,
                store_options=dict(store_options or {}),
                policy=policy,
                preload=tuple(preload),
                n_seats=n_workers,
                wait_fd=self._pipe.wait_fd,
                ring_fd=self._pipe.ring_fd,
                board_fd=self._board_fd,
                handed_fd=self._tokens.fd if self._tokens else -1,
                lifeline_fd=-1,
            )
            self._zygote = ZygoteLink(self._settings, self._env)
            self._start_missing()
            self._undo = undo.pop_all()
        self._watcher = threading.Thread(
            target=self._watch, name=f"wukong-pool-{self._name}", daemon=True
        )
        self._watcher.start()
        _open_pools.add(self)

    # -------------------------------------------------------------- what clients call

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Wake executors for tokens that are queued in the store; for () one of them, to look.

        Raises:
            InvokeError: executors cannot start; the tokens stay queued.
        """
        self._check()
        if self._tokens is not None:
            self._tokens.push(invocations)
        self._doorbell.ring(max(1, len(invocations)))

    def offer(self, invocations: Sequence[Invocation]) -> None:
        """Take tokens that somebody else has found; those that wait here already are left out."""
        if self._tokens is not None and not self._is_closing:
            self._tokens.push(invocations, is_repeated=True)
            self._doorbell.ring(max(1, len(invocations)))

    def n_idle(self) -> int:
        """How many executors would start at once. Cost: under a microsecond."""
        return self._doorbell.n_idle()

    @property
    def holders(self) -> dict[int, HolderId]:
        """The living executors: pid -> name in the store."""
        with self._changed:
            return {place.pid: place.holder for place in self._seats if place.pid}

    @property
    def pids(self) -> list[int]:
        """The living executors' processes."""
        return list(self.holders)

    @property
    def failure(self) -> str | None:
        """Why executors do not start; None while they do."""
        return self._failure

    def kill(self, holder: HolderId) -> None:
        """Kill an executor, with what its tasks started; another one follows. Idempotent."""
        self._kill(holder, STOPPED)

    def _kill(self, holder: HolderId, cause: str) -> None:
        with self._changed:
            for place in self._seats:
                if place.holder == holder and self._zygote is not None:
                    place.cause = cause
                    self._zygote.send("kill", holder)

    def ready(self, timeout_s: float) -> None:
        """Wait until all executors have started.

        Raises:
            InvokeError: they cannot, or not in time; the message says why.
        """
        with self._changed:
            self._changed.wait_for(self._is_settled, timeout_s)
            self._check()
            n_ready = sum(place.is_ready for place in self._seats)
            if n_ready < len(self._seats):
                raise InvokeError(
                    f"{n_ready} of {len(self._seats)} executors have started in {timeout_s} s"
                )

    def _is_settled(self) -> bool:
        failed = self._is_closing or self._failure is not None
        return failed or all(place.is_ready for place in self._seats)

    def close(self, grace_s: float = GRACE_S) -> None:
        """End all executors after their current strand, and kill those that take longer.

        Idempotent; also called when the interpreter ends. No process, thread or descriptor is
        left.
        """
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
            if self._zygote is not None:
                self._zygote.release(grace_s)
                if not any(place.pid for place in self._seats):
                    self._zygote.process.kill()  # it is importing still, and nobody waits for that
        _open_pools.discard(self)
        os.eventfd_write(self._poke_fd, 1)
        self._watcher.join(grace_s + 1.0)
        if self._watcher.is_alive() and self._zygote is not None:
            self._zygote.process.kill()  # its children die with it
        self._watcher.join()
        self._undo.close()

    def _check(self) -> None:
        if self._is_closing:
            raise InvokeError("the pool is closed")
        if self._failure is not None:
            raise InvokeError(f"executors do not start: {self._failure}")

    # -------------------------------------------------------------- the watcher thread

    def _watch(self) -> None:
        """Start what is missing and bury what has died, until the pool is closed."""
        while True:
            with self._changed:
                if self._is_closing and self._zygote is None:
                    return
                timeout_s = self._start_missing()
                zygote = self._zygote
            poll = select.poll()
            poll.register(self._poke_fd, select.POLLIN)
            if zygote is not None:
                poll.register(zygote.control, select.POLLIN)
            fds = {
                fd for fd, _ in poll.poll(None if timeout_s is None else int(timeout_s * 1000) + 1)
            }
            if self._poke_fd in fds:
                os.eventfd_read(self._poke_fd)
            if zygote is not None and zygote.control.fileno() in fds:
                message = zygote.receive()
                if message is None:
                    self._bury_zygote(zygote)
                else:
                    self._handle(message, zygote)

    def _start_missing(self) -> float | None:
        """Start what is missing; returns the seconds until that may be done, None: nothing is."""
        missing = [place for place in self._seats if not place.holder]
        if self._is_closing or not missing:
            return None
        now = time.monotonic()
        if now < self._start_at:
            return self._start_at - now
        if self._zygote is None:
            try:
                self._zygote = ZygoteLink(self._settings, self._env)
            except OSError as error:
                self._failed(f"no process can be started: {error}")
                return self._start_at - now
        for place in missing:
            self._n_started += 1
            place.holder = HolderId(f"{self._name}-{self._n_started}")
        self._zygote.send("fork", [(place.holder, place.number) for place in missing])
        return None

    def _handle(self, message: Message, zygote: ZygoteLink) -> None:
        match message:
            case ["forked", str(holder), int(pid)]:
                self._place_of(holder).pid = pid
            case ["ready", str(holder)]:
                with self._changed:
                    self._place_of(holder).is_ready = True
                    self._failure = None
                    if not self._fails_late:
                        self._n_failures = 0
                    self._changed.notify_all()
            case ["stuck", str(holder)]:
                logger.warning("executor %s: %s; another one starts", holder, STUCK)
                self._kill(HolderId(holder), STUCK)
            case ["failed", "", str(text)]:
                zygote.failure = text
            case ["failed", str(holder), str(text)]:
                self._place_of(holder).failure = text
            case ["died", str(holder), int(status)]:
                place = self._place_of(holder)
                cause = place.cause or describe_death(status)
                if place.failure is not None:
                    cause = f"failed with {place.failure.strip().splitlines()[-1]}"
                if place.failure is not None or not place.is_ready:
                    self._failed(place.failure or cause, place.is_ready)
                self._bury(place, None if self._is_closing and status == 0 else cause)

    def _place_of(self, holder: str) -> _Place:
        return next(place for place in self._seats if place.holder == holder)

    def _failed(self, text: str, is_late: bool = False) -> None:
        """Wait with the next start, and let clients know when none succeeds.

        Args:
            text: why.
            is_late: it failed by a defect after it had started.
        """
        now = time.monotonic()
        with self._changed:
            if now - self._failed_at > FAILURES_APART_S:
                self._n_failures, self._fails_late = 0, False
            self._failed_at = now
            self._fails_late |= is_late
            back_off_s = min(BACK_OFF_S * 2**self._n_failures, MAX_BACK_OFF_S)
            self._start_at = now + back_off_s
            self._n_failures += 1
            others_work = any(p.is_ready and p.failure is None for p in self._seats)
            if self._n_failures >= N_FAILURES and not others_work:
                self._failure = text
            self._changed.notify_all()
        logger.warning("an executor failed, the next one starts in %.2f s: %s", back_off_s, text)

    def _bury(self, place: _Place, cause: str | None) -> None:
        """Start the next executor, and queue again what this one held.

        Args:
            cause: None for one that has ended as it was asked to: it held nothing.
        """
        holder = place.holder
        with self._changed:
            if not self._is_closing and place.cause is None:
                logger.warning("executor %d %s; another one starts", place.pid, cause)
            place.holder, place.pid = HolderId(""), 0
            place.is_ready, place.cause, place.failure = False, None, None
            self._doorbell.show(place.number, False)
            # It is started before the dead one's work is released, which may take longer.
            self._start_missing()
        if cause is None:
            return
        try:
            n_queued = self._queue_again(place.number, holder, cause)
        except StoreError as error:
            n_queued = 0
            logger.warning("%s; its work waits for the end of its silence: %s", cause, error)
        # One more: it may have died between waking up and taking what it was woken for.
        self._doorbell.ring(n_queued + 1)

    def _queue_again(self, seat: int, holder: HolderId, cause: str) -> int:
        """Queue what a dead executor held. Returns: for how many tokens to wake somebody."""
        released = self._jobs.release(holder, cause)
        if self._tokens is None:
            return len(released)
        # Also what it was handed and has not started, or has minted and not handed on.
        jobs = self._tokens.last_jobs(seat)
        queued = [invocation for job in jobs for invocation in self._jobs.queued(job)]
        self._tokens.push(tuple(dict.fromkeys((*released, *queued))), is_repeated=True)
        return self._tokens.n_queued()

    def _bury_zygote(self, zygote: ZygoteLink) -> None:
        status = zygote.close()
        with self._changed:
            self._zygote = None
            places = [place for place in self._seats if place.holder]
            if not self._is_closing:
                cause = describe_death(status)
                logger.warning("the process that forks executors %s; another one starts", cause)
        if not self._is_closing and not any(place.is_ready for place in places):
            self._failed(zygote.failure or describe_death(status))
        for place in places:
            self._bury(place, f"killed, as the process that forked it {describe_death(status)}")

    def _forget(self) -> None:
        """In a fork of the client: let go of what keeps the executors alive."""
        self._changed = threading.Condition()  # a thread that is not here may hold the old one
        self._is_closing = True
        if self._zygote is not None:
            self._zygote.forget()


@dataclass(slots=True)
class _Place:
    """A seat, and the executor on it."""

    number: int
    holder: HolderId = HolderId("")
    """"": nobody has been asked for."""
    pid: int = 0
    is_ready: bool = False
    cause: str | None = None
    """Why it is being killed."""
    failure: str | None = None
    """Traceback of its own failure."""


_open_pools: weakref.WeakSet[ProcessPool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_open_pools):
        pool.close()


def _forget_all() -> None:
    for pool in list(_open_pools):
        pool._forget()


os.register_at_fork(after_in_child=_forget_all)
