"""Connections to Redis or Valkey: commands in, replies out, errors translated.

One connection for each thread and node, since a thread waits for its reply anyway, and since what
`WAIT` says holds for one connection. Commands for several nodes are all sent before any reply is
read. There is no retry here but one: of a connection that the server has closed while it idled.
Everything may be sent twice (`wukong.storage.contract`).

redis-py connects, encrypts and logs in; its clients, which take 70 us a call, are not used.
"""

from __future__ import annotations

import binascii
import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from wukong.errors import InternalError, StoreError, StoreFull, StoreUnavailable
from wukong.storage.redis_url import Address, RedisUrl, import_redis

N_SLOTS = 16384
N_ROUNDS = 5
"""How often one command follows redirections: a resharding moves a slot once."""
CONNECT_S = 2.0
"""A server that does not accept a connection for so long is away."""
NAMES, FORMER_NAMES = ("driver_info",), ("lib_name", "lib_version")
"""Options by which redis-py tells the server its name: of its newer versions, and before."""
AWAY = ("LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "READONLY", "MISCONF")
"""Errors that pass by themselves: restarts, failovers, resharding."""
AWAY_ERRORS = ("ClusterDownError", "MasterDownError", "ReadOnlyError", "TryAgainError")
"""The same as redis-py has them, which then takes the word away."""


class Command(NamedTuple):
    """One command, packed for the wire."""

    key: bytes
    """A key that it uses, by whose slot a cluster's node is found."""
    packed: bytes


def pack(*arguments: bytes) -> bytes:
    """A command as it crosses the wire."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        parts += (b"$%d\r\n" % len(argument), argument, b"\r\n")
    return b"".join(parts)


def _asking(is_asked: bool, packed: bytes) -> list[bytes]:
    """A command for a node that is just getting the slot."""
    return [pack(b"ASKING"), packed] if is_asked else [packed]


# ------------------------------------------------------------------ connections


class _TooSlow(StoreUnavailable):
    """No reply in time: the server is there, so that nothing is gained by asking again at once."""


class Line:
    """One connection. Not thread-safe."""

    def __init__(self, url: RedisUrl, address: Address) -> None:
        """Connect, encrypt, log in.

        Raises:
            StoreUnavailable: nobody answers.
            StoreError: the login is refused.
        """
        redis = import_redis()
        self._errors = redis.exceptions
        connection = redis.connection
        options = {
            "socket_timeout": url.timeout_s,
            "socket_connect_timeout": CONNECT_S,
            "protocol": 2,
            # Nobody needs to hear which library calls: that would be two commands more.
            **dict.fromkeys(NAMES if hasattr(connection, "DriverInfo") else FORMER_NAMES),
            **url.options,
            "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        }
        if not address.port:
            kind = connection.UnixDomainSocketConnection
            options["path"] = address.host
        else:
            kind = connection.SSLConnection if url.is_encrypted else connection.Connection
            options |= {"host": address.host, "port": address.port}
        self.address = address
        self.n_exchanges = 0
        self._connection = kind(**options)
        try:
            self._connection.connect()
        except (self._errors.RedisError, OSError) as error:
            raise self.translate(error) from error

    def send(self, packed: Sequence[bytes]) -> None:
        """Send commands."""
        try:
            self._connection.send_packed_command(packed, check_health=False)
        except (self._errors.RedisError, OSError) as error:
            raise self.translate(error) from error

    def receive(self) -> Any:
        """The next reply; an error reply is returned, not raised, but when it ends all."""
        try:
            return self._connection.read_response(disable_decoding=True)
        except self._errors.ResponseError as error:
            return error
        except (self._errors.RedisError, OSError) as error:
            raise self.translate(error) from error

    def is_readable(self, timeout_s: float) -> bool:
        """Wait for something to read."""
        try:
            return bool(self._connection.can_read(timeout=timeout_s))
        except (self._errors.RedisError, OSError) as error:
            raise self.translate(error) from error

    def close(self) -> None:
        """Close the connection; a thread that reads from it is woken."""
        with contextlib.suppress(self._errors.RedisError, OSError):
            self._connection.disconnect()

    def translate(self, error: BaseException) -> Exception:
        """One of Wukong's errors for one of redis-py's."""
        host, port = self.address
        text = f"{host}:{port}: {error}" if port else f"{host}: {error}"
        if isinstance(error, self._errors.AuthenticationError | self._errors.NoPermissionError):
            return StoreError(f"{text} (docs/redis.md has the ACL line)")
        if "command not allowed when used memory" in text:
            return StoreFull(
                f"{text.partition(' script:')[0].rstrip('.')} (OOM): Redis has no memory left for "
                "this; raise maxmemory, or put large values elsewhere (LocalCluster's `blobs`)"
            )
        if isinstance(error, self._errors.TimeoutError):
            return _TooSlow(text)
        if not isinstance(error, self._errors.ResponseError):
            return StoreUnavailable(text)  # away, reset, loading
        if type(error).__name__ in AWAY_ERRORS or any(word in text for word in AWAY):
            return StoreUnavailable(text)
        return InternalError(text)


class Link:
    """A Redis server, or a cluster of them. Thread-safe; open it after forking."""

    def __init__(self, url: RedisUrl) -> None:
        """Nothing is connected before it is used."""
        self.url = url
        self._errors = import_redis().exceptions
        self._local = threading.local()
        self._lines: weakref.WeakSet[Line] = weakref.WeakSet()
        self._slots: list[Address] = []
        """The node of each slot; empty: not known."""
        self._is_checked = False
        """The server can do what `confirm` asks for."""
        self._is_closed = False

    def load(self, script: bytes, refusal: Any) -> None:
        """Send a script to the server, or the node, that has refused to run it."""
        address = getattr(refusal, "node", self.url.addresses[0])
        reply = self._exchange(address, [pack(b"SCRIPT", b"LOAD", script)])[0]
        if isinstance(reply, Exception):
            raise self._line(address).translate(reply)

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands, in order for each node; returns their replies, error replies as objects.

        Raises:
            StoreUnavailable: some may have been run, and some not.
        """
        if not self.url.is_cluster:
            return self._exchange(self.url.addresses[0], [c.packed for c in commands])
        replies: list[Any] = [None] * len(commands)
        left = list(range(len(commands)))
        asked: dict[int, Address] = {}
        for _ in range(N_ROUNDS):
            self._run_round(commands, left, asked, replies)
            left = [i for i in left if isinstance(replies[i], self._errors.AskError)]
            if not left:
                return replies
            asked = {}
            for i in left:
                if isinstance(replies[i], self._errors.MovedError):
                    self._slots = []
                else:
                    asked[i] = Address(replies[i].host, replies[i].port)
        raise StoreUnavailable(f"{self.url}: the cluster sends its clients in circles")

    def run_checked(self, commands: Sequence[Command]) -> list[Any]:
        """As `run`; an error reply is raised."""
        replies = self.run(commands)
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Exception):
                raise self.translate(reply, command.key)
        return replies

    def translate(self, error: Exception, key: bytes) -> Exception:
        """One of Wukong's errors for an error reply."""
        if type(error).__name__ == "ReadOnlyError" or "READONLY" in str(error):
            # The server has become a replica: whoever is asked next may be the new master.
            self._drop(self.address_of(key))
            return StoreUnavailable(f"{self.url}: {error}")
        return self._line(self.address_of(key)).translate(error)

    def address_of(self, key: bytes) -> Address:
        """The node that has a key."""
        if not self.url.is_cluster:
            return self.url.addresses[0]
        slots = self._slots  # another thread may forget them meanwhile
        if not slots:
            slots = self._slots = self._find_slots()
        return slots[slot_of(key)]

    def confirm(self, key: bytes) -> None:
        """Wait until what this thread has changed near this key is as durable as is asked for.

        Raises:
            StoreUnavailable: it is not, or it cannot be known, since the connection is a new one.
        """
        if not self.url.is_durable:
            return
        line = self._line(self.address_of(key))
        if not line.n_exchanges:
            raise StoreUnavailable(f"{self.url}: reconnected, so that nothing is known to be kept")
        role = self._exchange(line.address, [pack(b"ROLE")], may_reconnect=False)[0]
        if isinstance(role, Exception) or role[0] != b"master":
            raise StoreUnavailable(f"{self.url}: no master any more: {role}")
        # After a failover there are fewer replicas; all that there are will do.
        wanted = min(self.url.n_replicas, len(role[2]))
        fields = (b"%d" % wanted, b"%d" % (self.url.timeout_s * 500))
        command = pack(b"WAITAOF", b"1", *fields) if self.url.is_on_disk else pack(b"WAIT", *fields)
        reply = self._exchange(line.address, [command], may_reconnect=False)[0]
        if isinstance(reply, Exception):
            raise self._durability_error(line, reply)
        n_on_disk, n_replicas = reply if isinstance(reply, list) else (1, reply)
        if n_on_disk < 1 or n_replicas < wanted:
            raise StoreUnavailable(f"{self.url}: not yet on {wanted} replicas, or not on disk")

    def check_durability(self, key: bytes) -> None:
        """Find out whether the server can do what `confirm` will ask of it; asks once.

        Raises:
            StoreError: it cannot; the message says what it lacks.
        """
        if self._is_checked or not self.url.is_on_disk:
            return
        line = self._line(self.address_of(key))
        reply = self._exchange(line.address, [pack(b"WAITAOF", b"1", b"0", b"1")])[0]
        if isinstance(reply, Exception):
            raise self._durability_error(line, reply)
        self._is_checked = True

    def _durability_error(self, line: Line, error: Exception) -> Exception:
        text = str(error)
        if "appendonly" in text or "unknown command" in text:
            return StoreError(
                f"{self.url}: on_disk=yes needs Valkey or Redis 7.2 with 'appendonly yes': {text}"
            )
        return line.translate(error)

    def open_line(self, address: Address) -> Line:
        """A connection for the caller alone, who closes it."""
        if self._is_closed:
            raise StoreUnavailable(f"{self.url}: this store object has been closed")
        try:
            return Line(self.url, address)
        except StoreUnavailable:
            self.forget_nodes()
            raise

    def forget_nodes(self) -> None:
        """A node fails, so that another one may have its slots soon: ask again."""
        self._slots = []

    def close(self) -> None:
        """Close all connections, of all threads."""
        self._is_closed = True
        for line in list(self._lines):
            line.close()

    # -------------------------------------------------------------- inside

    def _run_round(
        self,
        commands: Sequence[Command],
        indexes: Iterable[int],
        asked: dict[int, Address],
        replies: list[Any],
    ) -> None:
        by_node: dict[Address, list[int]] = {}
        for i in indexes:
            address = asked[i] if i in asked else self.address_of(commands[i].key)
            by_node.setdefault(address, []).append(i)
        batches = [
            (address, [p for i in own for p in _asking(i in asked, commands[i].packed)])
            for address, own in by_node.items()
        ]
        answers = self._exchange_all(batches)
        for (address, own), batch in zip(by_node.items(), answers, strict=True):
            found = iter(batch)
            for i in own:
                if i in asked:
                    next(found)
                replies[i] = next(found)
                if isinstance(replies[i], Exception):
                    replies[i].node = address

    def _exchange_all(self, batches: list[tuple[Address, list[bytes]]]) -> list[list[Any]]:
        """Send to several nodes, and then read from all of them."""
        if len(batches) == 1:
            return [self._exchange(*batches[0])]
        sent: dict[Address, Line] = {}
        found = []
        try:
            for address, packed in batches:
                sent[address] = self._line(address)
                with contextlib.suppress(StoreUnavailable):  # then reading fails, too
                    sent[address].send(packed)
            for address, packed in batches:
                line = sent[address]
                try:
                    replies = [line.receive() for _ in packed]
                    line.n_exchanges += 1
                except _TooSlow:
                    raise
                except StoreUnavailable:
                    self._drop(address)
                    if not line.n_exchanges:
                        raise
                    replies = self._exchange(address, packed)
                del sent[address]
                found.append(replies)
        except BaseException:
            for address in sent:  # replies that are under way are for nobody
                self._drop(address)
            raise
        return found

    def _exchange(
        self, address: Address, packed: list[bytes], may_reconnect: bool = True
    ) -> list[Any]:
        line = self._line(address)
        try:
            line.send(packed)
            replies = [line.receive() for _ in packed]
        except StoreUnavailable as error:
            self._drop(address)
            if not line.n_exchanges or not may_reconnect or self._is_closed:
                raise
            if isinstance(error, _TooSlow):
                raise
            # Closed while it idled, perhaps by a restart: everything may be sent twice.
            line = self._line(address)
            try:
                line.send(packed)
                replies = [line.receive() for _ in packed]
            except BaseException:
                self._drop(address)
                raise
        except BaseException:  # Ctrl-C: the replies that are under way are for nobody
            self._drop(address)
            raise
        line.n_exchanges += 1
        return replies

    def _line(self, address: Address) -> Line:
        lines: dict[Address, Line] = self._local.__dict__.setdefault("lines", {})
        line = lines.get(address)
        if line is None:
            line = lines[address] = self.open_line(address)
            self._lines.add(line)
        return line

    def _drop(self, address: Address) -> None:
        line = self._local.__dict__.setdefault("lines", {}).pop(address, None)
        if line is not None:
            line.close()
        self.forget_nodes()

    def _find_slots(self) -> list[Address]:
        """Ask any node which node has which slot."""
        cause: Exception | None = None
        for address in dict.fromkeys((*self._known_nodes(), *self.url.addresses)):
            try:
                reply = self._exchange(address, [pack(b"CLUSTER", b"SLOTS")])[0]
            except StoreUnavailable as error:
                cause = error
                continue
            if isinstance(reply, Exception):
                raise self._line(address).translate(reply)
            slots: list[Address | None] = [None] * N_SLOTS
            for first, last, (host, port, *_), *_ in reply:
                node = Address(host.decode() if host else address.host, port)
                slots[first : last + 1] = [node] * (last + 1 - first)
            found = [slot for slot in slots if slot is not None]
            if len(found) == N_SLOTS:
                return found
            cause = StoreUnavailable(f"{address.host}:{address.port}: slots without a node")
        raise StoreUnavailable(f"{self.url}: no node knows the cluster: {cause}") from cause

    def _known_nodes(self) -> Iterator[Address]:
        yield from list(self._local.__dict__.setdefault("lines", {}))


def slot_of(key: bytes) -> int:
    """The hash slot of a key: of what stands between the first braces, if anything does."""
    _, brace, rest = key.partition(b"{")
    tag, end, _ = rest.partition(b"}")
    return binascii.crc_hqx(tag if brace and end and tag else key, 0) % N_SLOTS
