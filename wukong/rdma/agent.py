"""The agent of a node: grants leases by itself, and has executors ready.

    client ==== signed messages (unix or TCP) ====> agent --- fork ---> spare, spare, ...
                                                      |                   |
                                                      +--- assignment --->+  becomes an executor
                                                      <--- its address ---+
                                                      +--- SIGKILL at the lease's end

The agent imports once what executors need, has one thread, and forks; so a spare is ready in
milliseconds, and shares memory with all others. Spares and executors die with their agent. Nothing
that a lease uses has a name in a file system, so nothing is left of it, whoever is killed.

What to grant, renew and end is `wukong.rdma.lease_grants`'s to say; the agent performs it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import math
import mmap
import os
import resource
import secrets
import selectors
import signal
import socket
import ssl
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from wukong.errors import FrameError, SecurityError
from wukong.executor.pool_launch import describe_death
from wukong.rdma.greeting import GREETING_S, Parley
from wukong.rdma.lease import Ended, LeaseId, Seat, Usage
from wukong.rdma.lease_grants import (
    Action,
    Asked,
    Died,
    Gone,
    Grants,
    Kill,
    Reply,
    Start,
    Started,
)
from wukong.rdma.lease_wire import (
    agent_key,
    from_json,
    line_key,
    proof_of,
    signed_receipt,
    to_json,
)
from wukong.rdma.leased import USAGE_BYTES, Assignment, be_spare
from wukong.rdma.registry import (
    HEARTBEAT_S,
    Registration,
    boot_id,
    open_secret,
    remove_registration,
    write_registration,
)
from wukong.rdma.transport_verbs import missing

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 65536
MAX_CLIENTS = 1024


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """How an agent is started."""

    directory: Path
    """Where it registers."""
    cores: tuple[int, ...]
    """Numbers of the cores that may be leased."""
    memory_bytes: int
    """That may be leased."""
    n_spares: int = 2
    """Executors that are ready before anybody asks."""
    host: str = ""
    """Address for TCP; "": clients of this node only."""
    cert: str = ""
    """File with a certificate and its key: TLS on TCP."""
    preload: tuple[str, ...] = ("numpy",)
    """Modules that executors need not import."""
    grace_s: float = 5.0
    """What leases get when the agent is told to end."""
    name: str = ""
    """Under which it registers; "": one that nobody else has."""
    lifeline_fd: int = -1
    """A pipe whose end tells the agent to end at once; -1: none."""


@dataclass(slots=True)
class _Client:
    """A connection of a client."""

    number: int
    sock: socket.socket
    parley: Parley
    since: float
    is_shaking: bool = False
    """TLS is being agreed."""
    outgoing: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class _Child:
    """A spare, or an executor."""

    pid: int
    sock: socket.socket
    usage: mmap.mmap
    start: Start | None = None
    """None: a spare."""
    is_killed: bool = False
    """By this agent: its lease has ended."""


class Agent:
    """One node's agent; `run` it in the main thread of a process of its own."""

    def __init__(self, settings: AgentSettings) -> None:
        """Register.

        Raises:
            SecurityError: the directory is not the user's alone.
            OSError: an address cannot be used.
        """
        self._settings = settings
        self._secret = open_secret(settings.directory)
        self._key = agent_key(self._secret)
        self._name = settings.name or f"{socket.gethostname()}-{secrets.token_hex(6)}"
        self._grants = Grants(
            settings.cores,
            settings.memory_bytes,
            # Greater than that of any agent before, as long as clocks go forward.
            int(time.time()) & 0x7FFFFFFF,
            lambda: LeaseId(secrets.token_hex(16)),
            lambda lease, epoch: proof_of(self._secret, lease, epoch),
        )
        self._clients: dict[int, _Client] = {}
        # Executors need descriptors too, whoever connects.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_clients = min(MAX_CLIENTS, descriptors // 2)
        self._n_clients = 0
        self._children: dict[int, _Child] = {}
        self._spares: deque[int] = deque()
        """Pids."""
        self._starting: deque[Start] = deque()
        """Wishes that wait for a process."""
        self._is_ending = False
        self._heartbeat_at = 0.0
        self._shown: tuple[int, int] | None = None
        self._selector = selectors.DefaultSelector()
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(f"\0wukong-agent-{secrets.token_hex(8)}")
        unix.listen(64)
        self._listeners = [unix]
        if settings.host:
            self._listeners.append(socket.create_server((settings.host, 0), backlog=64))
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, listener)
        self._tls: ssl.SSLContext | None = None
        if settings.cert:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(settings.cert)

    # -------------------------------------------------------------- the loop

    def run(self) -> None:
        """Serve until told to end (SIGTERM): then leases are revoked, with grace."""
        self._begin()
        try:
            while not (self._is_ending and not self._grants.n_leases):
                self._fork_spares()
                self._show()
                for key, _ in self._selector.select(self._sleep_s()):
                    self._attend(key.data)
                self._reap()
                now = time.monotonic()
                self._perform(self._grants.tick(now))
                self._cut_silent(now)
        finally:
            remove_registration(self._settings.directory, self._name)
            for pid in list(self._children):
                _kill(pid)
            for listener in self._listeners:
                listener.close()

    def _begin(self) -> None:
        woken_fd, wake_fd = os.pipe()
        for fd in (woken_fd, wake_fd):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end(self._settings.grace_s))
        signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
        self._wake_fds = (woken_fd, wake_fd)
        self._selector.register(woken_fd, selectors.EVENT_READ, woken_fd)
        if (fd := self._settings.lifeline_fd) >= 0:
            self._selector.register(fd, selectors.EVENT_READ, fd)
        for module in self._settings.preload:
            importlib.import_module(module)
        missing()  # imports the bindings of verbs, where there is a device
        # Garbage that is never collected leaves no holes, which children would fill by copying.
        gc.collect()
        gc.freeze()

    def _end(self, grace_s: float) -> None:
        self._is_ending = True
        logger.info("the agent ends, in %.1f s at the latest", grace_s)
        self._perform(self._grants.close(grace_s, time.monotonic()))

    def _sleep_s(self) -> float:
        now = time.monotonic()
        wake_at = min(self._heartbeat_at + HEARTBEAT_S, self._grants.wake_at() or now + HEARTBEAT_S)
        return max(0.0, wake_at - now)

    def _attend(self, ready: socket.socket | _Client | _Child | int) -> None:
        match ready:
            case int():
                with contextlib.suppress(BlockingIOError):
                    if not os.read(ready, 4096):
                        self._selector.unregister(ready)
                        self._end(0.0)
            case _Client():
                self._hear(ready)
            case _Child():
                self._hear_child(ready)
            case _:
                self._accept(ready)

    def _show(self) -> None:
        """The heartbeat; also at once when something is free that was not, or the other way."""
        now = time.monotonic()
        state = (len(self._grants.free_cores), self._grants.free_memory_bytes)
        if state == self._shown and now - self._heartbeat_at < HEARTBEAT_S:
            return
        self._heartbeat_at, self._shown = now, state
        try:
            write_registration(self._settings.directory, self._described(state))
        except OSError as error:
            logger.warning("cannot register, clients may not find this agent: %s", error)

    def _described(self, state: tuple[int, int]) -> Registration:
        unix, *tcp = self._listeners
        return Registration(
            name=self._name,
            node=socket.gethostname(),
            boot=boot_id(),
            pid=os.getpid(),
            unix=unix.getsockname()[1:].decode(),
            tcp=tcp[0].getsockname()[:2] if tcp else None,
            is_tls=self._tls is not None,
            transports=("shm", *(["verbs"] if not missing() else []), "tcp"),
            n_cores=len(self._settings.cores),
            n_free_cores=0 if self._is_ending else state[0],
            free_memory_bytes=state[1],
            heartbeat_at=time.time(),
        )

    # -------------------------------------------------------------- clients

    def _accept(self, listener: socket.socket) -> None:
        # Also suppressed: no descriptor is left. Those of silent clients are free again soon.
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            if len(self._clients) >= self._max_clients:
                sock.close()
                return
            sock.setblocking(False)
            is_tls = self._tls is not None and sock.family != socket.AF_UNIX
            if is_tls and self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._n_clients += 1
            client = _Client(
                self._n_clients, sock, Parley(self._key, True), time.monotonic(), is_tls
            )
            self._clients[client.number] = client
            self._selector.register(sock, selectors.EVENT_READ, client)
            if not is_tls:
                self._send(client)

    def _hear(self, client: _Client) -> None:
        try:
            if client.is_shaking and isinstance(client.sock, ssl.SSLSocket):
                client.sock.do_handshake()
                client.is_shaking = False
                self._send(client)
                return
            while data := client.sock.recv(MESSAGE_BYTES):
                for message in client.parley.feed(data):
                    event = Asked(client.number, from_json(message, of_client=True))
                    self._perform(self._grants.handle(event, time.monotonic()))
                self._send(client)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except (SecurityError, FrameError, ValueError) as error:
            logger.warning("a client is cut off: %s", error)
        except OSError:
            pass
        self._drop(client)

    def _send(self, client: _Client) -> None:
        client.outgoing += client.parley.outgoing
        client.parley.outgoing.clear()
        while client.outgoing:
            # A client that reads nothing of a few short messages is as good as gone.
            n = client.sock.send(client.outgoing)
            del client.outgoing[:n]

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.number, None) is None:
            return
        self._selector.unregister(client.sock)
        client.sock.close()
        self._perform(self._grants.handle(Gone(client.number), time.monotonic()))

    def _cut_silent(self, now: float) -> None:
        for client in list(self._clients.values()):
            if not client.parley.is_agreed and now - client.since > GREETING_S:
                self._drop(client)

    # -------------------------------------------------------------- what the grants wish

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Reply(number, message):
                    client = self._clients.get(number)
                    if client is None or not client.parley.is_agreed:
                        continue
                    plain = to_json(message)
                    if isinstance(message, Ended):
                        logger.info("lease %s is over: %s", message.lease, message)
                        plain["signature"] = signed_receipt(self._secret, message)
                    client.outgoing += client.parley.seal(plain)
                    try:
                        self._send(client)
                    except OSError:
                        self._drop(client)
                case Start():
                    self._starting.append(action)
                    self._fork_spares()
                case Kill(lease, number, epoch):
                    self._kill(lease, number, epoch)

    def _kill(self, lease: LeaseId, number: int, epoch: int) -> None:
        for start in self._starting:
            if (start.lease, start.epoch) == (lease, epoch):
                self._starting.remove(start)
                died = Died(lease, number, epoch, Usage())
                self._perform(self._grants.handle(died, time.monotonic()))
                return
        for child in self._children.values():
            if child.start and (child.start.lease, child.start.epoch) == (lease, epoch):
                child.is_killed = True
                _kill(child.pid)

    # -------------------------------------------------------------- processes

    def _fork_spares(self) -> None:
        """Give waiting seats a process, and have some ready for the next."""
        while self._starting and (self._spares or self._fork()):
            start = self._starting.popleft()
            child = self._children[self._spares.popleft()]
            child.start = start
            assignment = Assignment(
                start.lease,
                start.number,
                start.epoch,
                start.core,
                start.memory_bytes,
                start.is_hot,
                line_key(self._secret, start.lease, start.epoch).hex(),
                self._settings.host,
                self._settings.cert,
            )
            with contextlib.suppress(OSError):  # it has died: that is found out below
                child.sock.send(json.dumps(asdict(assignment)).encode())
        n_wanted = 0 if self._is_ending else self._settings.n_spares
        if len(self._spares) < n_wanted:
            self._fork()

    def _fork(self) -> bool:
        parent = os.getpid()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            logger.warning("cannot have another process, tried again soon: %s", error)
            return False
        usage = mmap.mmap(-1, mmap.PAGESIZE)
        try:
            with warnings.catch_warnings():
                # A BLAS may have threads of its own; it stops them before a fork.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError as error:
            logger.warning("cannot fork, tried again soon: %s", error)
            ours.close()
            theirs.close()
            return False
        if pid == 0:
            ours.close()
            be_spare(theirs, usage, parent, self._let_go)
        theirs.close()
        ours.setblocking(False)
        child = self._children[pid] = _Child(pid, ours, usage)
        self._selector.register(ours, selectors.EVENT_READ, child)
        self._spares.append(pid)
        return True

    def _let_go(self) -> None:
        """In a child: close what is the agent's, and must end with it."""
        self._selector.close()
        for fd in self._wake_fds:
            os.close(fd)
        for sock in [
            *self._listeners,
            *(client.sock for client in self._clients.values()),
            *(child.sock for child in self._children.values()),
        ]:
            # Not close(): that would say goodbye in the agent's name, where there is TLS.
            os.close(sock.detach())
        self._clients.clear()
        self._children.clear()

    def _hear_child(self, child: _Child) -> None:
        try:
            address = child.sock.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            address = b""
        if not address:  # it is dying: that is seen when it is waited for
            self._selector.unregister(child.sock)
        elif (start := child.start) is not None:
            seat = Seat(start.number, start.epoch, address.decode(errors="replace"))
            event = Started(start.lease, seat)
            self._perform(self._grants.handle(event, time.monotonic()))

    def _reap(self) -> None:
        while self._children:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None:
                return
            # While it is not waited for, its pid is nobody else's, and neither is its group.
            _kill(dead.si_pid)
            _, status = os.waitpid(dead.si_pid, 0)
            child = self._children.pop(dead.si_pid)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(child.sock)
            child.sock.close()
            if child.pid in self._spares:
                self._spares.remove(child.pid)
            if child.start is not None:
                self._bury(child, child.start, os.waitstatus_to_exitcode(status))

    def _bury(self, child: _Child, start: Start, status: int) -> None:
        with memoryview(child.usage)[:USAGE_BYTES] as page, page.cast("d") as numbers:
            # What calls have overwritten is not believed.
            n_calls, execution_s, hot_s = (x if math.isfinite(x) else 0.0 for x in numbers)
        usage = Usage(int(n_calls), execution_s, hot_s)
        if status and not child.is_killed:
            logger.info(
                "executor %d of lease %s %s", start.number, start.lease, describe_death(status)
            )
        died = Died(start.lease, start.number, start.epoch, usage)
        self._perform(self._grants.handle(died, time.monotonic()))


def _kill(pid: int) -> None:
    """Kill a child that has not been waited for, and what its calls have started and left."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
