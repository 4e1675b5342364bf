"""One lease of one agent, as its client drives it; and which agents to ask.

A `Tenancy` performs what `wukong.rdma.lease.Holder` wishes on a real connection. It is driven by
its owner's thread: `hear` when its descriptor is readable, `tick` when `wake_at` has come.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from wukong.errors import FrameError, LeaseLost, LeaseRefused, SecurityError, WukongError
from wukong.rdma.greeting import Talk
from wukong.rdma.lease import (
    Action,
    Drain,
    Holder,
    Lost,
    Phase,
    Request,
    Seat,
    Send,
    Stop,
    ToAgent,
    Use,
)
from wukong.rdma.lease_wire import agent_key, from_json, line_key, to_json
from wukong.rdma.line import Line, Outbox
from wukong.rdma.ports import find_ports
from wukong.rdma.registry import Registration, boot_id
from wukong.rdma.shm import SharedArena, ShmEnd
from wukong.rdma.tcp import TcpEnd
from wukong.rdma.transport import TransportEnd
from wukong.rdma.transport_verbs import VerbsEnd, missing

logger = logging.getLogger(__name__)

CONNECT_S = 15.0
VERBS_ARENA_BYTES = 1 << 27
"""At most: memory of verbs is pinned, whether it is used or not."""


@dataclass(frozen=True, slots=True)
class Connector:
    """What all connections of one client share."""

    secret: bytes
    transports: tuple[str, ...]
    """That may be used, best first."""
    arena: SharedArena
    """What executors of this node read arguments from."""
    outbox: Outbox
    ca: str
    """File with certificates; "": no TLS is accepted."""

    def reach(self, unix: str, tcp: Sequence[Any] | None, is_tls: bool, is_here: bool) -> Any:
        """Connect to an agent or an executor.

        Raises:
            OSError: nobody is there.
            SecurityError: there is TLS, and no certificate to check it by.
        """
        if is_here:
            sock = socket.socket(socket.AF_UNIX)
            # Python's own time-out would not wait for room in the listener's queue.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(CONNECT_S))
            try:
                sock.connect(f"\0{unix}")
            except OSError:
                sock.close()
                raise
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0.0))
            sock.settimeout(CONNECT_S)
            return sock
        if tcp is None:
            raise OSError("it is reachable from its own node only")
        sock = socket.create_connection((tcp[0], tcp[1]), CONNECT_S)
        if not is_tls:
            return sock
        if not self.ca:
            sock.close()
            raise SecurityError("the agent uses TLS: give the certificates to check it by (ca=)")
        context = ssl.create_default_context(cafile=self.ca)
        context.check_hostname = False  # nodes have many names; who they are, the keys show
        return context.wrap_socket(sock)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), 0)


class Tenancy:
    """A lease from the wish to the receipt. Not thread-safe but for `release`.

    Args:
        agent: whom to ask.
        request: for what.
        connector: how.
    Raises:
        OSError, LeaseLost: the agent is not there.
        SecurityError: it does not know the secret.
    """

    def __init__(self, agent: Registration, request: Request, connector: Connector) -> None:
        self.node = agent.node
        self.seats: dict[int, Any] = {}
        """The owner's: executors that are connected, by the number of their seat."""
        self.draining: list[Any] = []
        """The owner's: executors that get no further calls."""
        self.receipt: dict[str, Any] | None = None
        self._connector = connector
        self._offered = agent.transports
        self._is_here = agent.boot == boot_id()
        self._lock = threading.Lock()
        """The owner's thread and `release` both step the holder."""
        sock = connector.reach(agent.unix, agent.tcp, agent.is_tls, self._is_here)
        try:
            self._talk = Talk(sock, agent_key(connector.secret), is_server=False)
        except BaseException:
            sock.close()
            raise
        sock.setblocking(False)
        self._holder = Holder(secrets.token_hex(16), request)

    def start(self, now: float) -> None:
        """Ask."""
        self._perform(self._holder.start(now), now)

    def fileno(self) -> int:
        """Readable when the agent has said something."""
        return self._talk.sock.fileno()

    @property
    def is_over(self) -> bool:
        """Nothing of it is left here."""
        return self._holder.phase is Phase.ENDED

    @property
    def phase(self) -> Phase:
        """Where the lease is."""
        return self._holder.phase

    def wake_at(self) -> float | None:
        """When `tick` has something to do."""
        return self._holder.wake_at()

    def tick(self, now: float) -> list[Use | Drain | Stop]:
        """Renew, or give up; returns what the owner has to do."""
        with self._lock:
            return self._perform(self._holder.tick(now), now)

    def hear(self, now: float) -> list[Use | Drain | Stop]:
        """Read what the agent says; returns what the owner has to do."""
        wishes: list[Use | Drain | Stop] = []
        talk = self._talk
        try:
            while data := talk.sock.recv(65536):
                for message in talk.parley.feed(data):
                    signature = message.pop("signature", None)
                    event = from_json(message, of_client=False)
                    if signature is not None:
                        self.receipt = {**message, "signature": signature}
                    with self._lock:
                        wishes += self._perform(self._holder.handle(event, now), now)
        except (BlockingIOError, ssl.SSLWantReadError):
            return wishes
        except (OSError, WukongError, ValueError) as error:
            logger.debug("the agent of %s is lost: %s", self.node, error)
        with self._lock:
            return wishes + self._perform(self._holder.handle(Lost(), now), now)

    def release(self, now: float) -> None:
        """Give the lease back; it is over when the agent has sent the receipt, or is gone."""
        with self._lock:
            self._perform(self._holder.release(now), now)

    def _perform(self, actions: list[Action], now: float) -> list[Use | Drain | Stop]:
        wishes: list[Use | Drain | Stop] = []
        for action in actions:
            if not isinstance(action, Send):
                wishes.append(action)
                continue
            try:
                self._say(action.message)
            except OSError:
                wishes += self._perform(self._holder.handle(Lost(), now), now)
        return wishes

    def _say(self, message: ToAgent) -> None:
        self._talk.sock.sendall(self._talk.parley.seal(to_json(message)))

    def connect(self, seat: Seat) -> Line:
        """Connect to an executor of this lease, by the best transport that both have.

        Raises:
            OSError, LeaseLost, SecurityError, FrameError: it cannot be reached by any.
        """
        address = json.loads(seat.address)
        failure: Exception = LeaseRefused("no transport is allowed")
        for kind in self._connector.transports:
            if (kind == "shm" and not self._is_here) or kind not in self._offered:
                continue
            # Also imports the bindings, for which an executor would not wait.
            if kind == "verbs" and missing():
                continue
            try:
                return self._connect_by(kind, seat, address)
            except (OSError, WukongError) as error:
                failure = error
                logger.info("no %s to an executor on %s: %s", kind, self.node, error)
        raise failure

    def _connect_by(self, kind: str, seat: Seat, address: dict[str, Any]) -> Line:
        connector = self._connector
        # Over TCP even on one node, where that is all that is allowed: then it is what is meant.
        is_here = self._is_here and (kind == "shm" or not address["tcp"])
        sock = connector.reach(address["unix"], address["tcp"], address["tls"], is_here)
        end: TransportEnd | None = None
        try:
            lease = self._holder.lease
            talk = Talk(sock, line_key(connector.secret, lease, seat.epoch), is_server=False)
            arena_bytes = connector.arena.size_bytes
            if kind == "verbs":
                arena_bytes = min(arena_bytes, VERBS_ARENA_BYTES)
            talk.send(
                {
                    "lease": lease,
                    "transport": kind,
                    "arena_bytes": arena_bytes,
                    "path": [os.path.abspath(entry) for entry in sys.path],
                }
            )
            answer, fds = talk.receive()
            end = _end(kind, sock, connector.arena, arena_bytes)
            talk.send({"offer": dict(end.offer)}, end.fds)
            transport = end.connect(answer.get("offer", {}), fds)
        except BaseException:
            if end is not None:
                end.close()
            sock.close()
            raise
        outbox = connector.outbox if kind == "shm" else None
        return Line(transport, seat.epoch, talk.parley.line_keys(), outbox)

    def close(self) -> None:
        """Cut the connection to the agent, which ends the lease. Idempotent."""
        self._talk.sock.close()


def _end(kind: str, sock: socket.socket, arena: SharedArena, arena_bytes: int) -> TransportEnd:
    if kind == "shm":
        return ShmEnd(sock, arena)
    if kind == "verbs":
        return VerbsEnd(sock, find_ports()[0], arena_bytes)
    if kind == "tcp":
        return TcpEnd(sock, arena_bytes)
    raise FrameError(f"no such transport: {kind!r}")


@dataclass(frozen=True, slots=True)
class LeasePlan:
    """Which agents to ask for how many executors."""

    parts: tuple[tuple[Registration, int], ...]
    request: Request
    connector: Connector

    def open(self, now: float, timeout_s: float) -> list[Tenancy]:
        """Connect to the agents, and ask all of them.

        Raises:
            LeaseRefused: an agent is not there, or does not know the secret.
        """
        del timeout_s
        opened: list[Tenancy] = []
        for agent, n_executors in self.parts:
            try:
                request = replace(self.request, n_executors=n_executors)
                tenancy = Tenancy(agent, request, self.connector)
                opened.append(tenancy)
                tenancy.start(now)
            except (OSError, LeaseLost, SecurityError) as error:
                for other in opened:
                    other.close()
                raise LeaseRefused(f"the agent of {agent.node}: {error}") from error
        return opened


def plan_tenancies(
    agents: Sequence[Registration], request: Request, connector: Connector
) -> LeasePlan:
    """Divide a wish among agents: nodes that are near first, as few as possible.

    Raises:
        LeaseRefused: all of them together have not so many cores free.
    """
    if request.n_executors < 1 or request.memory_bytes < 0 or not request.ttl_s > 0:
        raise ValueError(f"a lease that makes no sense: {request}")
    parts, left = [], request.n_executors
    for agent in agents:
        n = min(left, agent.n_free_cores)
        if request.memory_bytes:
            n = min(n, agent.free_memory_bytes // request.memory_bytes)
        if n > 0:
            parts.append((agent, n))
            left -= n
    if left:
        told = "; ".join(
            f"{a.node} has {a.n_free_cores} of {a.n_cores} cores and"
            f" {a.free_memory_bytes >> 20} MiB free"
            for a in agents
        )
        raise LeaseRefused(
            f"{request.n_executors} executors with {request.memory_bytes >> 20} MiB each: {told}"
        )
    return LeasePlan(tuple(parts), request, connector)
