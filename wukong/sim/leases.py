"""Leases on a virtual clock: holders and agents, with messages that are lost, late and repeated.

`run_leases(seed)` lets some clients lease, use and give back executors of one node, whose agent and
executors die now and then, and raises `Violation` when something that must not happen does:

- a holder believes in a lease that the agent let expire
- two executors live on one core
- two leases answer one wish
- a receipt says something else than what the executors did, or there are two
- after the faults have ended, a lease, a core or an executor is left
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from wukong.rdma.lease import Action as HolderAction
from wukong.rdma.lease import (
    Cause,
    Drain,
    Ended,
    Granted,
    Holder,
    LeaseId,
    Lost,
    Request,
    Seat,
    Send,
    Stop,
    ToAgent,
    ToClient,
    Usage,
    Use,
)
from wukong.rdma.lease_grants import Action as AgentAction
from wukong.rdma.lease_grants import Asked, Died, Gone, Grants, Kill, Reply, Start, Started
from wukong.sim.checks import Violation

N_CORES = 4
MEMORY_BYTES = 1 << 30
FAULTS_UNTIL_S = 60.0
END_S = 300.0
NOTICE_S = 0.5
"""How long a broken connection may go unnoticed, where it is noticed at all."""
REVOKE_GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class LeaseReport:
    """What one seed did."""

    n_events: int
    counts: Counter[str]


@dataclass(slots=True)
class _Executor:
    lease: LeaseId
    number: int
    epoch: int
    core: int
    n_calls: int = 0


class LeaseWorld:
    """Clients, one node, and chance.

    Args:
        seed: of every choice.
        trace: takes a line for each event.
    """

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self._trace = trace
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._n_scheduled = 0
        # Some runs are calm and some are storms.
        self.loss, self.repeat = (self.rng.choice((0.0, 0.02, 0.3)) for _ in range(2))
        self.slow = self.rng.choice((0.0, 0.05, 0.3))
        self.death = self.rng.choice((0.0, 0.05, 0.3))
        self.node = _Node(self)
        self.clients = [_Client(self, number) for number in range(self.rng.randint(1, 4))]

    def at(self, time: float, callback: Callable[..., None], *args: object) -> None:
        """Call back at a time."""
        self._n_scheduled += 1
        heapq.heappush(self._heap, (max(time, self.now), self._n_scheduled, callback, args))

    def hits(self, probability: float) -> bool:
        """Throw the dice for a fault."""
        return self.now < FAULTS_UNTIL_S and self.rng.random() < probability

    def carry(self, callback: Callable[..., None], *args: object) -> None:
        """Deliver a message: once, never or twice, soon or late."""
        if self.hits(self.loss):
            self.counts["lost"] += 1
            return
        for _ in range(2 if self.hits(self.repeat) else 1):
            late = self.rng.uniform(0.2, 3.0) if self.hits(self.slow) else 0.0
            self.at(self.now + self.rng.uniform(0.0005, 0.002) + late, callback, *args)

    def log(self, who: str, what: object) -> None:
        """Note something in the trace."""
        if self._trace is not None:
            self._trace(f"{self.now:9.4f} {who} {what}")

    def run(self) -> LeaseReport:
        """Live until nothing is left to happen.

        Raises:
            Violation: something happened that must not.
        """
        n_events = 0
        try:
            while self._heap and self._heap[0][0] <= END_S:
                self.now, _, callback, args = heapq.heappop(self._heap)
                callback(*args)
                n_events += 1
                assert n_events < 200_000, "no end of events"
                self.node.grants.check()
                for client in self.clients:
                    client.holder.check()
            assert not self.node.grants.n_leases, "a lease is left"
            assert not self.node.living, "an executor is left"
            assert len(self.node.grants.free_cores) == N_CORES, "a core is left"
        except AssertionError as error:
            raise Violation(f"at {self.now:.4f} s: {error}") from error
        return LeaseReport(n_events, self.counts)


class _Node:
    """One node: its agent, its executors, its cores."""

    def __init__(self, world: LeaseWorld) -> None:
        self._world = world
        self._n_ids = 0
        self.life = 0
        self._tick_at = math.inf
        self.grants = self._agent()
        self.living: dict[tuple[LeaseId, int], _Executor] = {}
        """By lease and epoch."""
        self.done: dict[LeaseId, int] = {}
        """Calls of each lease's dead executors."""
        self.receipts: dict[LeaseId, Ended] = {}
        self.nonces: dict[str, LeaseId] = {}
        for _ in range(3):
            if world.rng.random() < world.death:
                world.at(world.rng.uniform(1, FAULTS_UNTIL_S), self._crash)
            if world.rng.random() < world.death:
                world.at(world.rng.uniform(1, FAULTS_UNTIL_S), self._revoke)

    def _agent(self) -> Grants:
        return Grants(tuple(range(N_CORES)), MEMORY_BYTES, self.life << 20, self._new_id, _sign)

    def _new_id(self) -> LeaseId:
        self._n_ids += 1
        return LeaseId(f"lease{self._n_ids}")

    def hear(self, client: int, message: ToAgent) -> None:
        """A message has arrived."""
        self._world.log("agent", message)
        self._perform(self.grants.handle(Asked(client, message), self._world.now))

    def notice_end(self, life: int, client: int) -> None:
        """A connection has ended."""
        if life == self.life:
            self._perform(self.grants.handle(Gone(client), self._world.now))

    def _perform(self, actions: list[AgentAction]) -> None:
        world = self._world
        for action in actions:
            match action:
                case Reply(client, message):
                    self._check_reply(message)
                    world.log(f"client{client}", f"is sent {message}")
                    world.carry(world.clients[client].hear, message)
                case Start():
                    begins_at = world.now + world.rng.uniform(0.001, 0.01)
                    world.at(begins_at, self._begin, self.life, action)
                case Kill(lease, _, epoch):
                    # As a real one, a kill takes its time, and nobody can prevent it.
                    dies_at = world.now + world.rng.uniform(0.01, 0.05)
                    world.at(dies_at, self._die, self.life, lease, epoch)
        wake_at = self.grants.wake_at()
        if wake_at is not None and wake_at < self._tick_at:
            self._tick_at = wake_at
            world.at(wake_at, self._tick, self.life)

    def _check_reply(self, message: ToClient) -> None:
        match message:
            case Granted(nonce, lease):
                assert self.nonces.setdefault(nonce, lease) == lease, "two leases for one wish"
            case Ended(lease, _, cause, _, usage):
                first = self.receipts.setdefault(lease, message)
                assert first == message, "two receipts for one lease"
                assert usage.n_calls == self.done.get(lease, 0), "a receipt that is wrong"
                self._world.counts[cause.name] += 1
                if cause is Cause.EXPIRED:
                    self._check_expired(lease)

    def _check_expired(self, lease: LeaseId) -> None:
        # The receipt comes after the executors' death, the holder must have stopped long before.
        for client in self._world.clients:
            believes = client.holder.ends_at > self._world.now and client.is_using
            assert not (believes and client.holder.lease == lease), "believed in, but expired"

    def _tick(self, life: int) -> None:
        if life == self.life:
            self._tick_at = math.inf
            self._perform(self.grants.tick(self._world.now))

    def _begin(self, life: int, start: Start) -> None:
        if life != self.life:
            return
        world = self._world
        if world.hits(world.death / 4):
            died = Died(start.lease, start.number, start.epoch, Usage())
            self._perform(self.grants.handle(died, world.now))
            return
        on_core = [e for e in self.living.values() if e.core == start.core]
        assert not on_core, f"two executors on core {start.core}"
        executor = _Executor(start.lease, start.number, start.epoch, start.core)
        self.living[start.lease, start.epoch] = executor
        seat = Seat(start.number, start.epoch, f"executor{start.epoch}")
        self._perform(self.grants.handle(Started(start.lease, seat), world.now))

    def _die(self, life: int, lease: LeaseId, epoch: int) -> None:
        if life != self.life:
            return
        executor = self.living.pop((lease, epoch), None)
        if executor is None:  # it had never begun, or died before
            return
        self.done[lease] = self.done.get(lease, 0) + executor.n_calls
        died = Died(lease, executor.number, epoch, Usage(executor.n_calls))
        for _ in range(1 + self._world.hits(self._world.repeat)):
            self._perform(self.grants.handle(died, self._world.now))

    def call(self, lease: LeaseId, seat: Seat, holder_ends_at: float) -> bool:
        """A holder calls an executor. False: there is none of that lease and epoch."""
        executor = self.living.get((lease, seat.epoch))
        if executor is None:
            return False
        executor.n_calls += 1
        if self._world.hits(self._world.death / 10):
            self._die(self.life, lease, seat.epoch)
        return True

    def _crash(self) -> None:
        """The agent is killed: its executors die with it, and another agent starts."""
        self._world.log("agent", "is killed")
        self._world.counts["crash"] += 1
        self.life += 1
        self._tick_at = math.inf
        self.nonces.clear()
        self.living.clear()
        self.grants = self._agent()
        for client in self._world.clients:
            client.break_connection()

    def _revoke(self) -> None:
        self._perform(self.grants.revoke(REVOKE_GRACE_S, self._world.now))


class _Client:
    """Leases, calls, gives back or forgets, again and again."""

    def __init__(self, world: LeaseWorld, number: int) -> None:
        self._world = world
        self._number = number
        self._n_asked = 0
        self._life = 0
        self._tick_at = math.inf
        self._n_left = world.rng.randint(1, 6)
        self.is_using = False
        self._ask()

    def _ask(self) -> None:
        world = self._world
        self._n_left -= 1
        self._n_asked += 1
        self._life += 1
        self._tick_at = math.inf
        ttl_s = world.rng.choice((0.5, 2.0, 10.0))
        request = Request(world.rng.randint(1, 3), MEMORY_BYTES // N_CORES, ttl_s)
        self.holder = Holder(f"{self._number}.{self._n_asked}", request, 5.0, 0.3)
        world.at(world.now + world.rng.uniform(0, 20), self._life_ends, self._life)
        self._perform(self.holder.start(world.now))

    def hear(self, message: ToClient) -> None:
        """A message has arrived."""
        self._world.log(f"client{self._number}", message)
        self._perform(self.holder.handle(message, self._world.now))

    def break_connection(self) -> None:
        """The agent is dead, which this client may notice at once, or never."""
        if not self._world.hits(self._world.loss):
            notice_at = self._world.now + self._world.rng.uniform(0, NOTICE_S)
            self._world.at(notice_at, self._lose, self._life)

    def _lose(self, life: int) -> None:
        if life == self._life:
            self._perform(self.holder.handle(Lost(), self._world.now))

    def _perform(self, actions: list[HolderAction]) -> None:
        world = self._world
        for action in actions:
            match action:
                case Send(message):
                    world.carry(world.node.hear, self._number, message)
                case Use(seat):
                    self.is_using = True
                    world.at(world.now, self._call, self._life, seat)
                case Drain():
                    pass
                case Stop():
                    self.is_using = False
                    if self._n_left:
                        world.at(world.now + world.rng.uniform(0, 5), self._again, self._life)
        wake_at = self.holder.wake_at()
        if wake_at is not None and wake_at < self._tick_at:
            self._tick_at = wake_at
            world.at(wake_at, self._tick, self._life)

    def _tick(self, life: int) -> None:
        if life == self._life:
            self._tick_at = math.inf
            self._perform(self.holder.tick(self._world.now))

    def _again(self, life: int) -> None:
        if life == self._life:
            self._ask()

    def _call(self, life: int, seat: Seat) -> None:
        if life != self._life or self.holder.seats.get(seat.number) != seat or not self.is_using:
            return
        world = self._world
        if world.node.call(self.holder.lease, seat, self.holder.ends_at):
            world.counts["calls"] += 1
            world.at(world.now + world.rng.uniform(0.01, 1.0), self._call, life, seat)

    def _life_ends(self, life: int) -> None:
        """The client gives its lease back, or is killed."""
        if life != self._life:
            return
        world = self._world
        if not world.hits(world.death):
            self._perform(self.holder.release(world.now))
            return
        world.log(f"client{self._number}", "is killed")
        self.is_using = False
        self._life += 1
        if not world.hits(world.loss):
            noticed_at = world.now + world.rng.uniform(0, NOTICE_S)
            world.at(noticed_at, world.node.notice_end, world.node.life, self._number)
        if self._n_left:
            world.at(world.now + world.rng.uniform(1, 5), self._again, self._life)


def _sign(lease: LeaseId, epoch: int) -> bytes:
    return f"{lease}/{epoch}".encode()


def run_leases(seed: int, trace: Callable[[str], None] | None = None) -> LeaseReport:
    """Simulate one seed.

    Raises:
        Violation: a promise was broken.
    """
    return LeaseWorld(seed, trace).run()
