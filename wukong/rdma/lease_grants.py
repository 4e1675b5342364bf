"""PURE: the leases that one node's agent has granted.

    (Asked) -> STARTING --Started--> LIVE --revoke()--> REVOKED
                   |                  |                    |
                   +---- StartFailed, released, expired, its client is gone, grace is over
                                      v
                                    ENDING --Killed--> over: the cores are free, the receipt is sent

Cores are given to nobody else before their executors are known to be dead. An agent grants by
itself: no central manager is in the path of any lease.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from wukong.rdma.lease import (
    Ask,
    Cause,
    Ended,
    Granted,
    LeaseId,
    Refused,
    Release,
    Renew,
    Renewed,
    RenewRefused,
    Replaced,
    Request,
    Revoked,
    Seat,
    ToAgent,
    ToClient,
    Usage,
)

MAX_TTL_S = 3600.0
"""However much a client asks for: a lease of a lost client must not outlive the day."""
MIN_TTL_S = 0.05
KEPT_RECEIPTS = 256
"""Receipts kept for clients that ask again."""
N_STARTS = 3
"""Executors of one seat that may die one after the other, within a time to live, before it counts
as broken."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Event: a message of a client."""

    client: int
    """The connection it came from."""
    message: ToAgent


@dataclass(frozen=True, slots=True)
class Started:
    """Event: the executor of one seat is ready."""

    lease: LeaseId
    seat: Seat


@dataclass(frozen=True, slots=True)
class Died:
    """Event: an executor is dead, or could not be started."""

    lease: LeaseId
    number: int
    """Of its seat."""
    epoch: int
    usage: Usage
    """What it did while it lived."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Event: a client's connection has ended."""

    client: int


Event = Asked | Started | Died | Gone


@dataclass(frozen=True, slots=True)
class Reply:
    """Wish: tell a client something, if its connection is still there."""

    client: int
    message: ToClient


@dataclass(frozen=True, slots=True)
class Start:
    """Wish: have an executor on a seat; answered by `Started` or `Died`."""

    lease: LeaseId
    number: int
    epoch: int
    core: int
    memory_bytes: int
    is_hot: bool
    key: bytes
    client: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Wish: cut the connection of an executor and kill it; answered by `Died`."""

    lease: LeaseId
    number: int
    epoch: int


Action = Reply | Start | Kill


class Phase(IntEnum):
    """Where a lease is."""

    STARTING = 1
    LIVE = 2
    REVOKED = 3
    ENDING = 4


@dataclass(slots=True)
class _Grant:
    """A lease that is not over."""

    lease: LeaseId
    nonce: str
    client: int
    epoch: int
    request: Request
    key: bytes
    cores: tuple[int, ...]
    began_at: float
    ends_at: float
    phase: Phase = Phase.STARTING
    cause: Cause = Cause.EXPIRED
    seats: dict[int, Seat] = field(default_factory=dict)
    """Executors that are ready."""
    living: dict[int, int] = field(default_factory=dict)
    """Seat -> epoch of each executor that was asked for and is not known to be dead."""
    n_deaths: dict[int, int] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)


class Grants:
    """The leases of one agent.

    Args:
        cores: numbers of the cores that may be leased.
        memory_bytes: that may be leased.
        epoch: greater than any epoch of an earlier agent of this node.
        new_id: returns a random id.
        sign: returns the key of a lease from its id and epoch.
    """

    def __init__(
        self,
        cores: tuple[int, ...],
        memory_bytes: int,
        epoch: int,
        new_id: Callable[[], LeaseId],
        sign: Callable[[LeaseId, int], bytes],
    ) -> None:
        self.cores = cores
        self.memory_bytes = memory_bytes
        self.free_cores = set(cores)
        self.free_memory_bytes = memory_bytes
        self.is_closing = False
        self._epoch = epoch
        self._new_id = new_id
        self._sign = sign
        self._grants: dict[LeaseId, _Grant] = {}
        self._receipts: dict[LeaseId, Ended] = {}
        self._nonces: dict[str, LeaseId] = {}
        """Of the leases that are over: a wish that comes late is not granted again."""

    @property
    def n_leases(self) -> int:
        """Leases that are not over."""
        return len(self._grants)

    def is_live(self, lease: LeaseId, epoch: int) -> bool:
        """Whether executors of a lease may work."""
        grant = self._grants.get(lease)
        return grant is not None and grant.epoch == epoch and grant.phase is not Phase.ENDING

    # -------------------------------------------------------------- events

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take a fact; late and repeated ones too."""
        match event:
            case Asked(client, message):
                return self._hear(client, message, now)
            case Started(lease, seat):
                return self._started(lease, seat)
            case Died():
                return self._died(event, now)
            case Gone(client):
                return [
                    action
                    for grant in list(self._grants.values())
                    if grant.client == client
                    for action in self._end(grant, Cause.LOST, now)
                ]

    def _hear(self, client: int, message: ToAgent, now: float) -> list[Action]:
        match message:
            case Ask():
                return self._ask(client, message, now)
            case Renew():
                return self._renew(client, message, now)
            case Release():
                return self._release(client, message, now)

    def _ask(self, client: int, ask: Ask, now: float) -> list[Action]:
        for grant in self._grants.values():
            if grant.nonce == ask.nonce:  # it asks again: nothing is granted twice
                if grant.client != client:
                    return [Reply(client, Refused(ask.nonce, "somebody else asked that"))]
                return self._granted(grant) if grant.phase is Phase.LIVE else []
        if (over := self._nonces.get(ask.nonce)) is not None:
            return [Reply(client, Refused(ask.nonce, f"lease {over} was that, and is over"))]
        reason = self._why_not(ask.request)
        if reason:
            return [Reply(client, Refused(ask.nonce, reason))]
        request = ask.request
        self._epoch += 1
        lease = self._new_id()
        cores = tuple(sorted(self.free_cores)[: request.n_executors])
        ttl_s = min(max(request.ttl_s, MIN_TTL_S), MAX_TTL_S)
        grant = _Grant(
            lease=lease,
            nonce=ask.nonce,
            client=client,
            epoch=self._epoch,
            request=Request(request.n_executors, request.memory_bytes, ttl_s, request.is_hot),
            key=self._sign(lease, self._epoch),
            cores=cores,
            began_at=now,
            ends_at=now + ttl_s,
        )
        self._grants[lease] = grant
        self.free_cores.difference_update(cores)
        self.free_memory_bytes -= request.n_executors * request.memory_bytes
        return [self._start(grant, number) for number in range(request.n_executors)]

    def _why_not(self, request: Request) -> str:
        """Why a wish is refused; "": it is not."""
        if self.is_closing:
            return "the node is given back"
        if request.n_executors < 1 or request.memory_bytes < 0 or not request.ttl_s > 0:
            return f"it makes no sense: {request}"
        if request.n_executors > len(self.free_cores):
            return f"{len(self.free_cores)} of {len(self.cores)} cores are free"
        if request.n_executors * request.memory_bytes > self.free_memory_bytes:
            return f"{self.free_memory_bytes} of {self.memory_bytes} bytes are free"
        return ""

    def _start(self, grant: _Grant, number: int) -> Start:
        self._epoch += 1
        grant.living[number] = self._epoch
        grant.seats.pop(number, None)
        return Start(
            grant.lease,
            number,
            self._epoch,
            grant.cores[number],
            grant.request.memory_bytes,
            grant.request.is_hot,
            grant.key,
            grant.client,
        )

    def _started(self, lease: LeaseId, seat: Seat) -> list[Action]:
        grant = self._grants.get(lease)
        if grant is None or grant.living.get(seat.number) != seat.epoch:
            return []
        if grant.phase is Phase.ENDING or seat.number in grant.seats:
            return []
        grant.seats[seat.number] = seat
        if grant.phase is not Phase.STARTING:
            return [Reply(grant.client, Replaced(lease, grant.epoch, seat))]
        if len(grant.seats) < grant.request.n_executors:
            return []
        grant.phase = Phase.LIVE
        return self._granted(grant)

    def _granted(self, grant: _Grant) -> list[Action]:
        return [
            Reply(
                grant.client,
                Granted(
                    grant.nonce,
                    grant.lease,
                    grant.epoch,
                    grant.key,
                    grant.request.ttl_s,
                    tuple(seat for _, seat in sorted(grant.seats.items())),
                ),
            )
        ]

    def _renew(self, client: int, renew: Renew, now: float) -> list[Action]:
        grant = self._held(client, renew.lease, renew.epoch, renew.key)
        if grant is None or grant.phase is Phase.ENDING or now >= grant.ends_at:
            return [Reply(client, RenewRefused(renew.lease, renew.epoch))]
        if grant.phase is not Phase.LIVE:
            return []  # revoked: it has been told, and nothing makes it longer
        # What happened before this receipt counts, whatever overtook it on the way.
        grant.ends_at = max(grant.ends_at, now + grant.request.ttl_s)
        grant.n_deaths.clear()
        seats = tuple(seat for _, seat in sorted(grant.seats.items()))
        return [Reply(client, Renewed(grant.lease, grant.epoch, renew.serial, seats))]

    def _release(self, client: int, release: Release, now: float) -> list[Action]:
        lease, key = release.lease, release.key
        grant = self._held(client, lease, release.epoch, key)
        if grant is not None:
            return self._end(grant, Cause.RELEASED, now)
        receipt = self._receipts.get(lease)
        # Who asks again gets its receipt again, if it proves that it was its lease.
        if receipt is None or not hmac.compare_digest(key, self._sign(lease, receipt.epoch)):
            return []
        return [Reply(client, receipt)]

    def _held(self, client: int, lease: LeaseId, epoch: int, key: bytes) -> _Grant | None:
        grant = self._grants.get(lease)
        if grant is None or grant.epoch != epoch or grant.client != client:
            return None
        return grant if hmac.compare_digest(key, grant.key) else None

    def _died(self, died: Died, now: float) -> list[Action]:
        grant = self._grants.get(died.lease)
        if grant is None or grant.living.get(died.number) != died.epoch:
            return []
        del grant.living[died.number]
        grant.seats.pop(died.number, None)
        grant.usage = Usage(
            grant.usage.n_calls + died.usage.n_calls,
            grant.usage.execution_s + died.usage.execution_s,
            grant.usage.hot_s + died.usage.hot_s,
        )
        if grant.phase is Phase.ENDING:
            return [] if grant.living else self._over(grant, now)
        if grant.phase is Phase.REVOKED:
            return self._end(grant, Cause.REVOKED, now) if not grant.living else []
        grant.n_deaths[died.number] = grant.n_deaths.get(died.number, 0) + 1
        if grant.n_deaths[died.number] >= N_STARTS:
            return self._end(grant, Cause.BROKEN, now)
        return [self._start(grant, died.number)]

    # -------------------------------------------------------------- the end

    def revoke(self, grace_s: float, now: float, lease: LeaseId | None = None) -> list[Action]:
        """Take a lease back, or all of them; after the grace period at the latest."""
        actions: list[Action] = []
        for grant in list(self._grants.values()):
            if lease not in (None, grant.lease):
                continue
            if grant.phase is Phase.STARTING or grace_s <= 0:
                actions += self._end(grant, Cause.REVOKED, now)
            elif grant.phase is Phase.LIVE:
                grant.phase = Phase.REVOKED
                grant.ends_at = min(grant.ends_at, now + grace_s)
                notice = Revoked(grant.lease, grant.epoch, grant.ends_at - now)
                actions.append(Reply(grant.client, notice))
        return actions

    def close(self, grace_s: float, now: float) -> list[Action]:
        """Grant nothing more, and revoke everything."""
        self.is_closing = True
        return self.revoke(grace_s, now)

    def wake_at(self) -> float | None:
        """When the next lease ends by itself."""
        return min(
            (g.ends_at for g in self._grants.values() if g.phase is not Phase.ENDING), default=None
        )

    def tick(self, now: float) -> list[Action]:
        """End what has not been renewed, and what was revoked long enough ago."""
        actions: list[Action] = []
        for grant in list(self._grants.values()):
            if grant.phase is not Phase.ENDING and now >= grant.ends_at:
                revoked = grant.phase is Phase.REVOKED
                actions += self._end(grant, Cause.REVOKED if revoked else Cause.EXPIRED, now)
        return actions

    def _end(self, grant: _Grant, cause: Cause, now: float) -> list[Action]:
        if grant.phase is Phase.ENDING:
            return []
        was_starting = grant.phase is Phase.STARTING
        grant.phase, grant.cause, grant.ends_at = Phase.ENDING, cause, now
        if not grant.living:
            return self._over(grant, now)
        actions: list[Action] = [
            Kill(grant.lease, number, epoch) for number, epoch in sorted(grant.living.items())
        ]
        if was_starting:
            reason = f"its executors did not start ({cause.name.lower()})"
            actions.append(Reply(grant.client, Refused(grant.nonce, reason)))
        return actions

    def _over(self, grant: _Grant, now: float) -> list[Action]:
        del self._grants[grant.lease]
        self.free_cores.update(grant.cores)
        self.free_memory_bytes += grant.request.n_executors * grant.request.memory_bytes
        core_s = len(grant.cores) * (now - grant.began_at)
        receipt = Ended(grant.lease, grant.epoch, grant.cause, core_s, grant.usage)
        self._receipts[grant.lease] = receipt
        self._nonces[grant.nonce] = grant.lease
        for kept in (self._receipts, self._nonces):
            if len(kept) > KEPT_RECEIPTS:
                del kept[next(iter(kept))]  # type: ignore[arg-type]  # a key of the same dict
        return [Reply(grant.client, receipt)]

    def check(self) -> None:
        """What is always true."""
        leased = [core for grant in self._grants.values() for core in grant.cores]
        assert sorted([*leased, *self.free_cores]) == sorted(self.cores), (
            "a core is lost or doubled"
        )
        used = sum(g.request.n_executors * g.request.memory_bytes for g in self._grants.values())
        assert used + self.free_memory_bytes == self.memory_bytes, "memory is lost or doubled"
        for grant in self._grants.values():
            assert grant.living, "a lease without executors is over"
            assert set(grant.seats) <= set(grant.living), "a dead executor has a seat"
            if grant.phase is Phase.LIVE:
                assert grant.ends_at > grant.began_at
