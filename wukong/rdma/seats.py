"""The executors of a lease, as their client sees them: connected, fed, read, lost.

A line is read by whoever holds its seat's `reading`: a thread that waits for a result, which so is
woken by nobody else, or the background thread, when an answer is due and nobody waits for it. The
background thread also drives the lease itself: it renews, connects, and buries.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import pickle
import select
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from wukong.errors import (
    FrameError,
    JobTimeout,
    LeaseError,
    LeaseExpired,
    LeaseLost,
    LeaseRefused,
    PayloadTooLarge,
    SecurityError,
)
from wukong.executor.serialize_failures import decode_error
from wukong.rdma.calls import Call, LeasedSeat, LeaseFuture, fail, finish
from wukong.rdma.frames import Frame, Kind
from wukong.rdma.lease import Cause, Drain, Request, Seat, Stop, Use
from wukong.rdma.line import ArenaFull, Outbox
from wukong.rdma.registry import no_agents, open_secret, read_registrations
from wukong.rdma.shm import SharedArena
from wukong.rdma.spin import Spin
from wukong.rdma.tenancy import Connector, Tenancy, plan_tenancies

logger = logging.getLogger(__name__)

PIPELINE = 4
"""Calls that an executor has at a time: the next ones arrive while it works."""
HOT_SPIN_S = 0.005
"""A client of a hot lease polls for so long, and then sleeps: its core is its own."""
LOOK_S = 0.05
"""How often the background thread looks for deadlines, while there are calls."""
WAIT_S = 2.0
"""A wait for a line is cut into pieces of this length, between which other events are seen."""
CLOSE_S = 5.0


class Seats:
    """See the module; what users call is in `wukong.rdma.client.Lease`.

    Args:
        request: what to lease.
        directory: where agents register.
        transports: that may be used, best first.
        arena_bytes: for arrays on their way.
        timeout_s: to get everything.
        ca: file with certificates for TLS, or "".
    Raises:
        LeaseRefused: there are not so many executors; the message says why.
    """

    def __init__(
        self,
        request: Request,
        directory: Path,
        transports: tuple[str, ...],
        arena_bytes: int,
        timeout_s: float,
        ca: str,
    ) -> None:
        self.pipeline = PIPELINE
        """Calls that an executor has at a time, at most."""
        self.receipts: list[dict[str, Any]] = []
        """Of what is over: what was used, signed by the agents."""
        self._request = request
        self._spin = Spin(request.is_hot, HOT_SPIN_S)
        self._lock = threading.Lock()
        """Guards what follows; never held while a line is read."""
        self._changed = threading.Condition(self._lock)
        self._seats: list[LeasedSeat] = []
        self._backlog: deque[Call] = deque()
        self._n_calls = 0
        self._functions: dict[Any, int] = {}
        self._pickled: dict[int, bytes] = {}
        self._n_deadlines = 0
        self._is_draining = False
        self._is_closed = False
        self._failure: LeaseError | None = None
        secret = open_secret(directory)
        registrations = read_registrations(directory)
        if not registrations:
            raise no_agents(directory)
        self._arena = SharedArena(arena_bytes)
        self._outbox = Outbox(arena_bytes, memoryview(self._arena.map))
        connector = Connector(secret, transports, self._arena, self._outbox, ca)
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._by_fd: dict[int, LeasedSeat | Tenancy] = {}
        self._tenancies: list[Tenancy] = []
        try:
            plan = plan_tenancies(registrations, request, connector)
            self._tenancies = plan.open(time.monotonic(), timeout_s)
            for tenancy in self._tenancies:
                self._watch_tenancy(tenancy)
        except BaseException:
            self._release_descriptors()
            raise
        self._thread = threading.Thread(target=self._run, name="wukong-lease", daemon=True)
        self._thread.start()
        try:
            self._wait_ready(timeout_s)
        except BaseException:
            self._give_back()
            raise

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        if self._is_closed or self._is_draining:
            raise LeaseError("the lease is given back: no further calls")

    # -------------------------------------------------------------- sending

    def _dispatch(self) -> None:
        """Send what waits to executors that have room for it."""
        while True:
            with self._lock:
                seats = [s for s in self._seats if len(s.calls) < self.pipeline and not s.is_cut]
                if not self._backlog or not seats:
                    return
                call = self._backlog.popleft()
                seat = min(seats, key=_n_calls)
                if call.future.is_settled():
                    continue
                seat.calls[call.number] = call
                call.future.seat = seat
            try:
                self._send(seat, call)
            except ArenaFull as full:
                with self._lock:
                    del seat.calls[call.number]
                    self._backlog.appendleft(call)
                    is_stuck = not any(s.calls for s in self._seats)
                    if is_stuck:
                        self._backlog.popleft()
                if is_stuck:  # nothing is under way that could release room
                    fail(call.future, full)
                    continue
                return
            except PayloadTooLarge as error:
                with self._lock:
                    seat.calls.pop(call.number, None)
                fail(call.future, error)
            except (LeaseLost, FrameError) as error:
                self._lost(seat, error)
            else:
                self._attend(seat)

    def _send(self, seat: LeasedSeat, call: Call) -> None:
        line = seat.line
        if call.function and call.function not in seat.known:
            seat.known.add(call.function)
            line.send(Kind.DEFINE, 0, self._pickled[call.function], (), call.function)
        deadline_s = max(1e-6, call.deadline_at - time.monotonic()) if call.deadline_at else 0.0
        line.send(
            Kind.CALL, call.number, call.stream, call.buffers, call.function, deadline_s, call.flags
        )

    # -------------------------------------------------------------- receiving

    def drive(self, future: LeaseFuture[Any], timeout: float | None) -> float | None:
        """Read the line of a future until it is done; returns what is left of the time."""
        give_up_at = None if timeout is None else time.monotonic() + timeout
        while not future.is_settled():
            seat = future.seat
            if seat is None or seat.is_cut or not seat.reading.acquire(False):
                break  # not sent yet, or somebody else reads: that one will tell
            try:
                self._unwatch(seat)
                left_s = WAIT_S if give_up_at is None else give_up_at - time.monotonic()
                if left_s <= 0:
                    return 0.0
                look_s = LOOK_S if self._n_deadlines else WAIT_S
                frame = seat.line.receive(min(left_s, look_s), self._spin.spin_s)
                while frame is not None:
                    self._handle(seat, frame)
                    if future.is_settled():
                        break
                    frame = seat.line.poll()
            except (LeaseLost, FrameError) as error:
                self._lost(seat, error)
            finally:
                seat.reading.release()
                self._attend(seat)
            if self._backlog:
                self._dispatch()
        return None if give_up_at is None else max(0.0, give_up_at - time.monotonic())

    def _attend(self, seat: LeasedSeat) -> None:
        """Have the background thread read a line that nobody else reads, if answers will come."""
        if seat.calls and not seat.is_watched and not seat.is_cut and seat.reading.acquire(False):
            try:
                self._watch(seat)
            except (LeaseLost, FrameError, OSError) as error:
                self._lost(seat, LeaseLost(str(error)))
            finally:
                seat.reading.release()

    def _watch(self, seat: LeasedSeat) -> None:
        """Be told of the next frame; what is there already is handled. `reading` is held."""
        while seat.calls:
            self._listen_for(seat, select.EPOLLIN)
            seat.is_watched = True
            if seat.line.transport.arm():
                return
            self._unwatch(seat)
            while (frame := seat.line.poll()) is not None:
                self._handle(seat, frame)

    def _unwatch(self, seat: LeasedSeat) -> None:
        if seat.is_watched:
            seat.is_watched = False
            self._listen_for(seat, select.EPOLLRDHUP)
            seat.line.transport.disarm()

    def _listen_for(self, seat: LeasedSeat, events: int) -> None:
        with self._lock:
            # A line is closed after its seat is cut: until then its descriptors are its own.
            if seat.is_cut:
                raise LeaseLost("the connection is closed")
            self._epoll.modify(seat.line.transport.filenos()[0], events | select.EPOLLET)

    def _handle(self, seat: LeasedSeat, frame: Frame) -> None:
        """Take a frame of an executor; `reading` is held."""
        if frame.kind == Kind.RELEASE:
            return
        call = seat.calls.pop(frame.call, None)
        if call is None:
            if frame.kind == Kind.RESULT and frame.extents:
                seat.line.load(frame)  # what nobody waits for is released
            return
        future = call.future
        call.buffers = []
        if frame.kind == Kind.RESULT:
            try:
                value = seat.line.load(frame)
            except Exception as error:
                fail(future, error)
            else:
                finish(future, value)
        elif frame.kind == Kind.RAISED:
            fail(future, decode_error(pickle.loads(frame.stream)))
        elif frame.kind == Kind.CANCELLED:
            fail(future, JobTimeout("the deadline passed before the call began"))
        else:
            raise FrameError(f"an executor does not send frames of kind {frame.kind}")
        if not seat.calls:
            with self._lock:
                if self._is_draining:
                    self._changed.notify_all()

    # -------------------------------------------------------------- the background thread

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            for tenancy in self._tenancies:
                self._follow(tenancy, tenancy.tick(now))
            if self._is_closed and all(tenancy.is_over for tenancy in self._tenancies):
                return
            wake_at = min(
                (at for t in self._tenancies if (at := t.wake_at()) is not None), default=now + 3600
            )
            has_calls = self._n_deadlines or any(seat.calls for seat in self._seats)
            timeout_s = max(0.0, min(wake_at - now, LOOK_S if has_calls else 3600.0))
            for fd, _ in self._epoll.poll(timeout_s):
                owner = self._by_fd.get(fd)
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                elif isinstance(owner, LeasedSeat):
                    self._read(owner)
                elif owner is not None:
                    self._follow(owner, owner.hear(time.monotonic()))
            if self._n_deadlines:
                self._look_at_deadlines()
            for seat in list(self._seats):
                if seat.line.released and not seat.is_cut:
                    try:
                        seat.line.flush_releases()
                    except LeaseLost as error:
                        self._lost(seat, error)
            if self._backlog:
                self._dispatch()

    def _read(self, seat: LeasedSeat) -> None:
        if not seat.reading.acquire(False):
            return  # whoever reads will see it
        try:
            self._unwatch(seat)
            while (frame := seat.line.poll()) is not None:
                self._handle(seat, frame)
            # An end of the connection shows now; or the answer to a call that was sent just now.
            if not seat.calls and (frame := seat.line.receive(0.0)) is not None:
                self._handle(seat, frame)
            self._watch(seat)
        except (LeaseLost, FrameError, OSError) as error:
            self._lost(seat, LeaseLost(str(error)))
        finally:
            seat.reading.release()

    def _look_at_deadlines(self) -> None:
        now = time.monotonic()
        with self._lock:
            waiting = [c for c in self._backlog if c.deadline_at]
            waiting += [c for s in self._seats for c in list(s.calls.values()) if c.deadline_at]
            self._n_deadlines = len(waiting)
        for call in waiting:
            if now >= call.deadline_at:
                fail(call.future, JobTimeout("the deadline passed"))
                call.deadline_at = 0.0

    def cancel_call(self, future: LeaseFuture[Any]) -> bool:
        if not concurrent.futures.Future.cancel(future):
            return False
        seat = future.seat
        with self._lock:
            sent = [] if seat is None else [c for c in seat.calls.values() if c.future is future]
        for call in sent:
            try:
                assert seat is not None
                seat.line.send(Kind.CANCEL, call.number)
            except LeaseError as error:
                logger.debug("a cancelled call is on a line that is lost: %s", error)
        return True

    # -------------------------------------------------------------- leases

    def _watch_tenancy(self, tenancy: Tenancy) -> None:
        self._by_fd[tenancy.fileno()] = tenancy
        self._epoll.register(tenancy.fileno(), select.EPOLLIN)

    def _follow(self, tenancy: Tenancy, wishes: list[Use | Drain | Stop]) -> None:
        for wish in wishes:
            match wish:
                case Use(seat):
                    self._connect(tenancy, seat)
                case Drain():
                    with self._lock:
                        logger.info("a lease on %s is ending", tenancy.node)
                        for taken in self._seats_of(tenancy):
                            self._seats.remove(taken)
                            tenancy.draining.append(taken)
                case Stop(cause, reason):
                    self._stopped(tenancy, cause, reason)

    def _connect(self, tenancy: Tenancy, seat: Seat) -> None:
        for old in self._seats_of(tenancy):
            if old.number == seat.number:
                self._lost(old, LeaseLost("the executor has died, and was replaced"))
        try:
            line = tenancy.connect(seat)
        except (LeaseError, SecurityError, OSError) as error:
            logger.warning("an executor on %s cannot be reached: %s", tenancy.node, error)
            return
        connected = LeasedSeat(seat.number, line, self._spin)
        bell, *others = line.transport.filenos()
        with self._lock:
            for fd in (bell, *others):
                self._by_fd[fd] = connected
            self._epoll.register(bell, select.EPOLLRDHUP | select.EPOLLET)
            for fd in others:
                self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
            tenancy.seats[seat.number] = connected
            self._seats.append(connected)
            self._changed.notify_all()
        self._dispatch()

    def _seats_of(self, tenancy: Tenancy) -> list[LeasedSeat]:
        return [seat for seat in self._seats if seat in tenancy.seats.values()]

    def _stopped(self, tenancy: Tenancy, cause: Cause, reason: str) -> None:
        logger.info("the lease on %s has ended: %s", tenancy.node, reason)
        lost = LeaseExpired if cause is Cause.EXPIRED else LeaseLost
        refused = LeaseRefused if cause is Cause.REFUSED else lost
        error = refused(f"the lease on {tenancy.node} has ended: {reason}")
        for seat in [*self._seats_of(tenancy), *tenancy.draining]:
            self._lost(seat, error)
        self._by_fd.pop(tenancy.fileno(), None)
        if tenancy.receipt is not None:
            self.receipts.append(tenancy.receipt)
        tenancy.close()
        with self._lock:
            if all(other.is_over for other in self._tenancies):
                self._failure = self._failure or error
                stranded, self._backlog = list(self._backlog), deque()
            else:
                stranded = []
            self._changed.notify_all()
        for call in stranded:
            fail(call.future, error)

    def _lost(self, seat: LeasedSeat, error: LeaseError) -> None:
        """An executor is gone: what it had is repeated elsewhere, if that is allowed, or fails."""
        with self._lock:
            if seat.is_cut:
                return
            seat.is_cut = True
            if seat in self._seats:
                self._seats.remove(seat)
            calls, seat.calls = list(seat.calls.values()), {}
            for fd in [fd for fd, owner in self._by_fd.items() if owner is seat]:
                del self._by_fd[fd]
            again = [c for c in calls if c.n_retries > 0 and not self._is_closed]
            for call in reversed(again):
                call.n_retries -= 1
                call.future.seat = None
                self._backlog.appendleft(call)
            self._changed.notify_all()
        seat.line.close()
        for call in calls:
            if call not in again:
                fail(call.future, error)
        if again:
            self._wake()

    def _wait_ready(self, timeout_s: float) -> None:
        with self._lock:
            is_ready = self._changed.wait_for(
                lambda: self._failure or len(self._seats) >= self._request.n_executors, timeout_s
            )
            if self._failure is not None:
                raise self._failure
            if not is_ready:
                raise LeaseRefused(
                    f"{len(self._seats)} of {self._request.n_executors} executors in {timeout_s} s"
                )

    def _give_back(self) -> None:
        """End the lease, the thread, and everything that is open. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = self._is_draining = True
            for seat in self._seats:
                # Nobody waits for these any more.
                for call in seat.calls.values():
                    call.n_retries = 0
        now = time.monotonic()
        for tenancy in self._tenancies:
            tenancy.release(now)
        self._wake()
        self._thread.join(CLOSE_S)
        self._release_descriptors()

    def _wake(self) -> None:
        if not self._is_closed or self._thread.is_alive():
            os.eventfd_write(self._wake_fd, 1)

    def _release_descriptors(self) -> None:
        for seat in list(self._seats):
            self._lost(seat, LeaseLost("the lease is given back"))
        for tenancy in self._tenancies:
            tenancy.close()
        self._arena.close()
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._wake_fd)


def _n_calls(seat: LeasedSeat) -> int:
    return len(seat.calls)
