"""How two ends of a stream prove to each other that they know a key, and what they say then.

    server --- challenge (32 random bytes) ---------------------------> client
           <-- nonce (32 random bytes), HMAC("client", challenge, nonce) ---
           --- HMAC("server", challenge, nonce) ---------------------->
    both   length (u32) | MAC (32) | JSON                                      any number of times

The MAC of a message covers its direction and its number, under a key that both random numbers
have made: what is forged, repeated, reordered or from another connection is refused. `Parley` does
no I/O; `Talk` is one on a blocking socket, and also carries descriptors over a unix socket; `Door`
is where many may knock at once.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import math
import secrets
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import Any

from wukong.errors import FrameError, LeaseLost, SecurityError

logger = logging.getLogger(__name__)

NONCE_BYTES = 32
_MAC_BYTES = 32
_LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 1 << 20
MAX_FDS = 8
MAX_STRANGERS = 64
"""Who wait at a door at a time."""
GREETING_S = 5.0
"""A stranger who says nothing for so long is cut off."""

Message = dict[str, Any]


class Parley:
    """One end of a signed conversation, without its socket.

    Args:
        key: that both ends must know.
        is_server: whether this end challenges.
    """

    def __init__(self, key: bytes, is_server: bool) -> None:
        self._key = key
        self._is_server = is_server
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._buffer = bytearray()
        self._phase = 0
        """0: nothing has come; 1 (client): the server's proof is missing; 2: agreed."""
        self._session = b""
        self._n_out = self._n_in = 0
        self.outgoing = bytearray(self._nonce if is_server else b"")
        """To be sent, and removed, by the owner."""

    @property
    def is_agreed(self) -> bool:
        """Both ends have proved that they know the key."""
        return self._phase == 2

    @property
    def n_wanted(self) -> int:
        """How many further bytes the next step needs; more would belong to what follows."""
        if self._phase == 0:
            whole = NONCE_BYTES + (_MAC_BYTES if self._is_server else 0)
        elif self._phase == 1:
            whole = _MAC_BYTES
        elif len(self._buffer) < _LENGTH.size:
            whole = _LENGTH.size
        else:
            whole = _LENGTH.size + _MAC_BYTES + _LENGTH.unpack_from(self._buffer)[0]
        return int(whole) - len(self._buffer)

    def line_keys(self) -> tuple[bytes, bytes]:
        """Keys for frames that this end sends, and that it receives."""
        return self._derive(b"frames", self._is_server), self._derive(
            b"frames", not self._is_server
        )

    def feed(self, received: bytes) -> list[Message]:
        """Take bytes of the other end; returns the messages that are complete.

        Raises:
            SecurityError: it does not know the key, or somebody meddles.
            FrameError: it talks nonsense.
        """
        self._buffer += received
        messages = []
        while self.n_wanted <= 0:
            if self._phase == 2:
                if len(self._buffer) > _LENGTH.size:
                    messages.append(self._open())
                elif _LENGTH.unpack_from(self._buffer)[0] > MAX_MESSAGE_BYTES:
                    raise FrameError("a message that is too long")
            else:
                self._agree()
        return messages

    def _agree(self) -> None:
        if self._is_server:
            theirs, proof = self._take(NONCE_BYTES), self._take(_MAC_BYTES)
            self._session = self._nonce + theirs
            self._verify(proof, self._derive(b"client", False))
            self.outgoing += self._derive(b"server", True)
            self._phase = 2
        elif self._phase == 0:
            self._session = self._take(NONCE_BYTES) + self._nonce
            self.outgoing += self._nonce + self._derive(b"client", False)
            self._phase = 1
        else:
            self._verify(self._take(_MAC_BYTES), self._derive(b"server", True))
            self._phase = 2

    def _open(self) -> Message:
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        proof, body = self._take(_MAC_BYTES), self._take(length)
        self._verify(proof, self._mac(not self._is_server, self._n_in, body))
        self._n_in += 1
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"a message that is no JSON: {error!r:.100}") from error
        if not isinstance(message, dict):
            raise FrameError("a message that is no object")
        return message

    def seal(self, message: Message) -> bytes:
        """A message as signed bytes, to be sent in this order; the ends have agreed."""
        body = json.dumps(message).encode()
        mac = self._mac(self._is_server, self._n_out, body)
        self._n_out += 1
        return _LENGTH.pack(len(body)) + mac + body

    def _take(self, n: int) -> bytes:
        taken = bytes(self._buffer[:n])
        del self._buffer[:n]
        return taken

    def _derive(self, purpose: bytes, is_servers: bool) -> bytes:
        side = b"server" if is_servers else b"client"
        return hmac.digest(self._key, b"/".join((purpose, side)) + self._session, "sha256")

    def _mac(self, is_servers: bool, number: int, body: bytes) -> bytes:
        key = self._derive(b"message", is_servers)
        return hmac.digest(key, struct.pack("<Q", number) + body, "sha256")

    def _verify(self, proof: bytes, expected: bytes) -> None:
        if not hmac.compare_digest(proof, expected):
            raise SecurityError("the other end does not know the key of this lease or node")


class Talk:
    """A parley on a connected socket; blocking, for one thread. Owns nothing."""

    def __init__(
        self, sock: socket.socket, key: bytes, is_server: bool, timeout_s: float = GREETING_S
    ) -> None:
        """Greet.

        Raises:
            SecurityError: the other end does not know the key.
            LeaseLost: it is gone, or silent.
        """
        self._take_up(sock, Parley(key, is_server), timeout_s)
        self._flush()
        while not self.parley.is_agreed:
            self._step()

    def _take_up(self, sock: socket.socket, parley: Parley, timeout_s: float) -> None:
        self.sock = sock
        self.parley = parley
        self._is_unix = sock.family == socket.AF_UNIX
        self._fds: list[int] = []
        sock.settimeout(timeout_s)

    @classmethod
    def go_on(cls, sock: socket.socket, parley: Parley) -> Talk:
        """A talk whose ends have greeted already."""
        talk = cls.__new__(cls)
        talk._take_up(sock, parley, GREETING_S)
        return talk

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message, with descriptors over a unix socket.

        Raises:
            LeaseLost: the other end is gone.
        """
        data = self.parley.seal(message)
        try:
            if fds:
                sent = socket.send_fds(self.sock, [data], list(fds))
                data = data[sent:]
            self.sock.sendall(data)
        except OSError as error:
            raise LeaseLost(f"the other end is gone: {error}") from error

    def receive(self) -> tuple[Message, list[int]]:
        """The next message, with the descriptors that came up to it.

        Raises:
            LeaseLost: the other end is gone, or silent for longer than the socket's time-out.
        """
        while True:
            messages = self._step()
            if messages:
                fds, self._fds = self._fds, []
                return messages[0], fds

    def _step(self) -> list[Message]:
        n = self.parley.n_wanted
        try:
            if self._is_unix:
                data, fds, _, _ = socket.recv_fds(self.sock, n, MAX_FDS)
                self._fds += fds
            else:
                data = self.sock.recv(n)
        except OSError as error:
            raise LeaseLost(f"the other end is gone: {error}") from error
        if not data:
            raise LeaseLost("the other end has closed the connection")
        messages = self.parley.feed(data)
        self._flush()
        return messages

    def _flush(self) -> None:
        if self.parley.outgoing:
            try:
                self.sock.sendall(self.parley.outgoing)
            except OSError as error:
                raise LeaseLost(f"the other end is gone: {error}") from error
            self.parley.outgoing.clear()


class Door:
    """Takes those who prove that they know the key; a stranger who is silent keeps nobody out.

    Args:
        listeners: owned by the caller.
        key: to be known.
        tls: for those who do not come over a unix socket; None: no TLS.
    """

    def __init__(
        self, listeners: Sequence[socket.socket], key: bytes, tls: ssl.SSLContext | None
    ) -> None:
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._key = key
        self._tls = tls
        self._strangers: dict[int, tuple[socket.socket, Parley, float]] = {}
        """By descriptor: the socket, what was said, and when it is cut off; the oldest first."""
        self._poll = select.poll()
        for listener in listeners:
            listener.setblocking(False)
            self._poll.register(listener, select.POLLIN)

    def admit(self, timeout_s: float) -> Talk | None:
        """The next who has proved it, and whose talk is the caller's; None: the time is up."""
        give_up_at = time.monotonic() + timeout_s
        while (now := time.monotonic()) < give_up_at:
            self._cut_off(now)
            ends = [give_up_at, *(end for _, _, end in self._strangers.values())]
            for fd, _ in self._poll.poll(math.ceil((min(ends) - now) * 1000)):
                if fd in self._listeners:
                    self._accept(self._listeners[fd])
                elif fd in self._strangers and self._hear(fd):
                    sock, parley = self._forget(fd)
                    return Talk.go_on(sock, parley)
        return None

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            if len(self._strangers) >= MAX_STRANGERS:
                self._forget(next(iter(self._strangers)))[0].close()
            sock.setblocking(False)
            if self._tls is not None and sock.family != socket.AF_UNIX:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            end = time.monotonic() + GREETING_S
            self._strangers[sock.fileno()] = (sock, Parley(self._key, is_server=True), end)
            self._poll.register(sock, select.POLLIN)
            self._hear(sock.fileno())

    def _hear(self, fd: int) -> bool:
        """Whether it has proved it now; cuts it off when it cannot."""
        sock, parley, _ = self._strangers[fd]
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            while not parley.is_agreed:
                self._say(sock, parley)
                data = sock.recv(parley.n_wanted)
                if not data:
                    raise LeaseLost("it has gone")
                parley.feed(data)
            self._say(sock, parley)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except (OSError, LeaseLost, SecurityError) as error:
            logger.warning("a stranger is cut off: %s", error)
            self._forget(fd)[0].close()
            return False
        return True

    def _say(self, sock: socket.socket, parley: Parley) -> None:
        if parley.outgoing:
            # Some bytes into an empty buffer: they go at once, or the other end is at fault.
            sock.sendall(parley.outgoing)
            parley.outgoing.clear()

    def _cut_off(self, now: float) -> None:
        for fd in [fd for fd, (_, _, end) in self._strangers.items() if now >= end]:
            self._forget(fd)[0].close()

    def _forget(self, fd: int) -> tuple[socket.socket, Parley]:
        self._poll.unregister(fd)
        sock, parley, _ = self._strangers.pop(fd)
        return sock, parley

    def close(self) -> None:
        """Cut off everybody who waits. Idempotent."""
        for fd in list(self._strangers):
            self._forget(fd)[0].close()
