"""PURE: the life of a lease as its holder, the client, sees it; and the words both sides use.

    ASKING --Granted--> HELD --Revoked--> LEAVING --Ended, or its time is up--> ENDED
       |                 |  \\--release()--> LEAVING
       |                 \\--its time is up, RenewRefused, Lost--> ENDED
       \\--Refused, no answer, Lost--> ENDED

A lease is a right to executors for a limited time. It has a random 128-bit id; an *epoch*, which
grows with every grant and every replaced executor of one agent and fences what belongs to earlier
ones; and a key, which proves to an executor that somebody holds the lease. Renewals go out when a
third of the time to live has passed.

Clocks of two machines are never compared. The holder counts the time to live from the moment when
it *sent* what was answered, the agent from when it received it: so the holder stops first, and
never believes in a lease that the agent has ended, unless that was taken back or its agent died.
The agent's side is `wukong.rdma.lease_grants`; `wukong.sim.leases` runs both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NewType

LeaseId = NewType("LeaseId", str)
"""32 hexadecimal digits, random."""

RENEW_AFTER = 1 / 3
"""Part of the time to live after which a lease is renewed: two more attempts fit into the rest."""
RETRY_AFTER = 1 / 12
"""Part of the time to live after which an unanswered renewal is sent again."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client wants."""

    n_executors: int
    """Each on a core of its own."""
    memory_bytes: int
    """Of each executor."""
    ttl_s: float
    """Time to live without renewal; an agent may grant less."""
    is_hot: bool = False
    """Executors poll for calls, all the time, instead of sleeping between them."""


class Cause(IntEnum):
    """Why a lease ended."""

    REFUSED = 1  # it was never granted
    RELEASED = 2  # by its holder
    EXPIRED = 3  # not renewed in time
    REVOKED = 4  # taken back: the batch system wants the node
    LOST = 5  # the connection, the client or the agent is gone
    BROKEN = 6  # its executors do not start


@dataclass(frozen=True, slots=True)
class Usage:
    """What the executors of a lease have done."""

    n_calls: int = 0
    execution_s: float = 0.0
    """Time in calls, of all executors together."""
    hot_s: float = 0.0
    """Time spent polling."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One executor of a lease."""

    number: int
    """From 0."""
    epoch: int
    """Of this executor; its successor on the same seat has a greater one."""
    address: str
    """Where it listens."""


# ------------------------------------------------------------------ client -> agent


@dataclass(frozen=True, slots=True)
class Ask:
    """Grant me a lease. The same nonce is the same wish, however often it comes."""

    nonce: str
    request: Request


@dataclass(frozen=True, slots=True)
class Renew:
    """I go on with a lease."""

    lease: LeaseId
    epoch: int
    key: bytes
    serial: int
    """Comes back with the answer."""


@dataclass(frozen=True, slots=True)
class Release:
    """I need a lease no longer."""

    lease: LeaseId
    epoch: int
    key: bytes


ToAgent = Ask | Renew | Release

# ------------------------------------------------------------------ agent -> client


@dataclass(frozen=True, slots=True)
class Granted:
    """Here it is."""

    nonce: str
    lease: LeaseId
    epoch: int
    key: bytes
    ttl_s: float
    seats: tuple[Seat, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """There is none; the reason is for people."""

    nonce: str
    reason: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """It lives on, for its whole time to live from the receipt of the renewal."""

    lease: LeaseId
    epoch: int
    serial: int
    seats: tuple[Seat, ...]
    """As they are now; an earlier message about a replaced executor may have been lost."""


@dataclass(frozen=True, slots=True)
class RenewRefused:
    """Nobody has this lease (any more)."""

    lease: LeaseId
    epoch: int


@dataclass(frozen=True, slots=True)
class Replaced:
    """An executor has died; another one has its seat."""

    lease: LeaseId
    epoch: int
    seat: Seat


@dataclass(frozen=True, slots=True)
class Revoked:
    """It ends after the grace period, whatever the holder does."""

    lease: LeaseId
    epoch: int
    grace_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """It has ended: the receipt."""

    lease: LeaseId
    epoch: int
    cause: Cause
    core_s: float
    """Cores times the time they were leased."""
    usage: Usage


ToClient = Granted | Refused | Renewed | RenewRefused | Replaced | Revoked | Ended

# ------------------------------------------------------------------ the holder's wishes


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the agent."""

    message: ToAgent


@dataclass(frozen=True, slots=True)
class Use:
    """Connect to an executor; what was connected to this seat before is dead."""

    seat: Seat


@dataclass(frozen=True, slots=True)
class Drain:
    """Begin no further calls; those under way have this long to end."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Cut all connections: the lease is over."""

    cause: Cause
    reason: str


Action = Send | Use | Drain | Stop


@dataclass(frozen=True, slots=True)
class Lost:
    """Event: the connection to the agent is gone."""


class Phase(IntEnum):
    """Where a holder is."""

    ASKING = 1
    HELD = 2
    LEAVING = 3
    ENDED = 4


class Holder:
    """One lease, from the wish to the receipt.

    Args:
        nonce: of the wish, random.
        request: the wish.
        answer_s: no answer to the wish for so long is a loss.
        retry_s: an unanswered wish, or release, is sent again after this long.
    """

    def __init__(
        self, nonce: str, request: Request, answer_s: float = 30.0, retry_s: float = 1.0
    ) -> None:
        self.phase = Phase.ASKING
        self.lease = LeaseId("")
        self.epoch = 0
        self.seats: dict[int, Seat] = {}
        self.receipt: Ended | None = None
        self.ends_at = 0.0
        """When the holder stops believing in the lease."""
        self._nonce = nonce
        self._request = request
        self._answer_s = answer_s
        self._retry_s = retry_s
        self._ttl_s = request.ttl_s
        self._key = b""
        self._asked_at = 0.0
        self._send_at: float | None = None
        """When to ask, renew or release (again)."""
        self._sent: dict[int, float] = {}
        """Unanswered renewals: serial -> when they were sent."""
        self._n_renewals = 0

    @property
    def key(self) -> bytes:
        """Proves to executors that this is the holder; empty before the grant."""
        return self._key

    def start(self, now: float) -> list[Action]:
        """Ask."""
        self._asked_at = now
        self.ends_at = now + self._answer_s
        self._send_at = now + self._retry_s
        return [Send(Ask(self._nonce, self._request))]

    def release(self, now: float) -> list[Action]:
        """Give the lease back; also when it is only asked for. Idempotent."""
        match self.phase:
            case Phase.ASKING:
                # Should it be granted yet, it is released then, or expires.
                return self._end(Cause.RELEASED, "released before it was granted")
            case Phase.HELD:
                self.phase = Phase.LEAVING
                self._send_at = now + self._retry_s
                return [Drain(0.0), Send(Release(self.lease, self.epoch, self._key))]
            case Phase.LEAVING:
                self._send_at = now + self._retry_s
                return [Send(Release(self.lease, self.epoch, self._key))]
            case Phase.ENDED:
                return []

    def handle(self, event: ToClient | Lost, now: float) -> list[Action]:
        """Take a message of the agent, or the loss of the connection; late ones too."""
        match event:
            case Lost():
                return self._end(Cause.LOST, "the connection to its agent was lost")
            case Granted():
                return self._granted(event, now)
            case Refused(nonce, reason):
                if nonce == self._nonce and self.phase is Phase.ASKING:
                    return self._end(Cause.REFUSED, reason)
                return []
        if (event.lease, event.epoch) != (self.lease, self.epoch):
            return []  # of an earlier life
        match event:
            case Ended(_, _, cause):
                if self.receipt is None:
                    self.receipt = event
                return self._end(cause, f"its agent has ended it ({cause.name.lower()})")
            case RenewRefused():
                return self._end(Cause.EXPIRED, "its agent does not know it any more")
            case Revoked(_, _, grace_s):
                if self.phase is not Phase.HELD:
                    return []
                self.phase, self._send_at = Phase.LEAVING, None
                self.ends_at = min(self.ends_at, now + grace_s)
                return [Drain(grace_s)]
            case Replaced(_, _, seat):
                return self._seated((seat,))
            case Renewed(_, _, serial, seats):
                return self._renewed(serial, seats, now)

    def _granted(self, grant: Granted, now: float) -> list[Action]:
        if grant.nonce != self._nonce or self.phase is Phase.HELD or self.phase is Phase.LEAVING:
            return []  # repeated
        if self.phase is Phase.ENDED:
            if self.lease:
                return []
            # Nobody waits for it any more.
            self.lease, self.epoch, self._key = grant.lease, grant.epoch, grant.key
            return [Send(Release(grant.lease, grant.epoch, grant.key))]
        self.lease, self.epoch, self._key = grant.lease, grant.epoch, grant.key
        self._ttl_s = grant.ttl_s
        # Which of the repeated wishes was answered is not known: the first, for safety.
        self.ends_at = self._asked_at + grant.ttl_s
        if now >= self.ends_at:
            return [
                Send(Release(self.lease, self.epoch, self._key)),
                *self._end(Cause.EXPIRED, "it was granted too late"),
            ]
        self.phase = Phase.HELD
        self._send_at = self._asked_at + RENEW_AFTER * grant.ttl_s
        return self._seated(grant.seats)

    def _renewed(self, serial: int, seats: tuple[Seat, ...], now: float) -> list[Action]:
        sent_at = self._sent.pop(serial, None)
        if sent_at is None or self.phase is not Phase.HELD or now >= self.ends_at:
            return []
        self._sent = {s: at for s, at in self._sent.items() if s > serial}
        self.ends_at = max(self.ends_at, sent_at + self._ttl_s)
        if not self._sent:
            self._send_at = sent_at + RENEW_AFTER * self._ttl_s
        return self._seated(seats)

    def _seated(self, seats: tuple[Seat, ...]) -> list[Action]:
        if self.phase is not Phase.HELD:
            return []
        actions: list[Action] = []
        for seat in seats:
            known = self.seats.get(seat.number)
            if known is None or known.epoch < seat.epoch:
                self.seats[seat.number] = seat
                actions.append(Use(seat))
        return actions

    def wake_at(self) -> float | None:
        """When `tick` has something to do."""
        if self.phase is Phase.ENDED:
            return None
        return self.ends_at if self._send_at is None else min(self.ends_at, self._send_at)

    def tick(self, now: float) -> list[Action]:
        """Renew, repeat, give up; whatever is due."""
        if self.phase is Phase.ENDED:
            return []
        if now >= self.ends_at:
            if self.phase is Phase.ASKING:
                return self._end(Cause.LOST, f"no answer in {self._answer_s:g} s")
            was_leaving = self.phase is Phase.LEAVING
            cause = Cause.REVOKED if was_leaving else Cause.EXPIRED
            return self._end(cause, "its time is up" if was_leaving else "it was not renewed")
        if self._send_at is None or now < self._send_at:
            return []
        match self.phase:
            case Phase.ASKING:
                self._send_at = now + self._retry_s
                return [Send(Ask(self._nonce, self._request))]
            case Phase.HELD:
                self._send_at = now + RETRY_AFTER * self._ttl_s
                self._n_renewals += 1
                self._sent[self._n_renewals] = now
                return [Send(Renew(self.lease, self.epoch, self._key, self._n_renewals))]
            case Phase.LEAVING:
                self._send_at = now + self._retry_s
                return [Send(Release(self.lease, self.epoch, self._key))]

    def _end(self, cause: Cause, reason: str) -> list[Action]:
        if self.phase is Phase.ENDED:
            return []
        self.phase, self._send_at = Phase.ENDED, None
        self._sent.clear()
        return [Stop(cause, reason)]

    def check(self) -> None:
        """What is always true."""
        assert (self.phase is Phase.HELD) <= bool(self.lease), "held without an id"
        assert all(s.epoch >= self.epoch for s in self.seats.values()), "an executor of another"
        assert len(self._sent) <= 1 / RETRY_AFTER + 1, "more renewals under way than fit"
