"""Frames over a stream socket: TCP, also with TLS, and whatever else is a stream.

On the stream, for each frame: its length (u32), the number of its extents (u32), for each extent
offset and size (u64 each), the extents' bytes, and the frame. The bytes go from where they lie into
the peer's arena; what comes together with a head in one read, 64 KB at most, is moved once.
"""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence

from wukong.errors import FrameError, LeaseLost
from wukong.rdma.frames import MAX_EXTENTS
from wukong.rdma.transport import POST_S, Offer

_HEAD = struct.Struct("<II")
_READ_BYTES = 65536
FRAME_BYTES = 16384
_SEND_PARTS = 512
"""Buffers for one call of the system, whose limit is 1024 (IOV_MAX)."""
_POST_TIMEVAL = struct.pack("ll", int(POST_S), 0)


class TcpEnd:
    """One end of a connection through a stream that is about to be made.

    Args:
        sock: connected, and greeted; owned by the transport from `connect` on.
        arena_bytes: size of the inbox.
    """

    def __init__(self, sock: socket.socket, arena_bytes: int) -> None:
        self._sock = sock
        self._arena_bytes = arena_bytes
        self.offer: Offer = {"arena_bytes": arena_bytes}
        self.fds: Sequence[int] = ()

    def connect(self, offer: Offer, fds: Sequence[int]) -> TcpTransport:
        """See `TransportEnd.connect`."""
        arena_bytes = offer.get("arena_bytes")
        if fds or not isinstance(arena_bytes, int) or arena_bytes < 0:
            raise FrameError(f"an offer of no stream: {offer}")
        return TcpTransport(self._sock, arena_bytes, self._arena_bytes)

    def close(self) -> None:
        """See `TransportEnd.close`."""


class TcpTransport:
    """See `wukong.rdma.transport.Transport`."""

    kind = "tcp"
    is_private = False
    frame_bytes = FRAME_BYTES
    outbox = None

    def __init__(self, sock: socket.socket, outbox_bytes: int, inbox_bytes: int) -> None:
        self.sock = sock
        self.is_tls = isinstance(sock, ssl.SSLSocket)
        self.outbox_bytes = outbox_bytes
        self._map = mmap.mmap(-1, max(1, inbox_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._inbox = memoryview(self._map)[:inbox_bytes]
        self.buffer = memoryview(bytearray(_READ_BYTES))
        self.start = self.end = 0
        """The bytes of the buffer that were received and not yet used."""
        self.is_closed = False
        self._timeout_s = 0.0
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.is_tls:  # it looks at no time-out but Python's own
            sock.settimeout(POST_S)
        else:
            sock.setblocking(True)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _POST_TIMEVAL)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _POST_TIMEVAL)

    @property
    def inbox(self) -> memoryview:
        """See `Transport.inbox`."""
        return self._inbox

    # -------------------------------------------------------------- sending

    def post(self, frame: bytes, extents: Sequence[tuple[int, memoryview]] = ()) -> None:
        """See `Transport.post`."""
        head = _HEAD.pack(len(frame), len(extents))
        try:
            if not extents:
                self.sock.sendall(head + frame)
                return
            numbers = [n for offset, buffer in extents for n in (offset, buffer.nbytes)]
            table = struct.pack(f"<{len(numbers)}Q", *numbers)
            views = [buffer.cast("B") for _, buffer in extents if buffer.nbytes]
            self._send_all([memoryview(head + table), *views, memoryview(frame)])
        except OSError as error:
            raise LeaseLost(f"the peer is gone: {error}") from error

    def _send_all(self, parts: list[memoryview]) -> None:
        if self.is_tls:  # it has no call for many buffers
            for part in parts:
                self.sock.sendall(part)
            return
        first = 0
        while first < len(parts):
            n_sent = self.sock.sendmsg(parts[first : first + _SEND_PARTS])
            while first < len(parts) and n_sent >= parts[first].nbytes:
                n_sent -= parts[first].nbytes
                first += 1
            if n_sent:
                parts[first] = parts[first][n_sent:]

    # -------------------------------------------------------------- receiving

    def poll(self) -> bytes | None:
        """See `Transport.poll`."""
        if self.start == self.end and not self._is_ready(0):
            return None
        return self._receive()

    def wait(self, timeout_s: float, spin_s: float) -> bytes | None:
        """See `Transport.wait`."""
        if self.start != self.end or (spin_s and self._has_come(min(spin_s, timeout_s))):
            return self._receive()
        if self.is_tls or timeout_s < 1.0:
            return self._receive() if self._is_ready(timeout_s) else None
        # One call of the system instead of two: the socket's own time-out limits the read.
        if timeout_s != self._timeout_s:
            timeval = struct.pack("ll", int(min(timeout_s, POST_S)), 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self._timeout_s = timeout_s
        return self._receive()

    def _has_come(self, spin_s: float) -> bool:
        """Poll the socket: waking a process on another core takes longer than a call does."""
        if self.is_tls or self.is_closed:
            return False
        self.start = self.end = 0
        until = time.perf_counter() + spin_s
        while True:
            try:
                self.end = self.sock.recv_into(self.buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.perf_counter() > until:
                    return False
            except OSError as error:
                raise LeaseLost(f"the peer is gone: {error}") from error
            else:
                if not self.end:
                    raise LeaseLost("the peer is gone: it has closed the connection")
                return True

    def _is_ready(self, timeout_s: float) -> bool:
        if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            return True
        if self.is_closed:
            raise LeaseLost("the connection is closed")
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _receive(self) -> bytes | None:
        if self.end - self.start < _HEAD.size:
            if self.start == self.end:
                self.start = self.end = 0
                if not self._read_some(is_first=True):
                    return None
            self._need(_HEAD.size)
        length, n_extents = _HEAD.unpack_from(self.buffer, self.start)
        if length > FRAME_BYTES or n_extents > MAX_EXTENTS:
            raise FrameError(f"a frame of {length} bytes with {n_extents} extents")
        self.start += _HEAD.size
        if n_extents:
            self._receive_extents(n_extents)
        self._need(length)
        frame = bytes(self.buffer[self.start : self.start + length])
        self.start += length
        return frame

    def _receive_extents(self, n_extents: int) -> None:
        self._need(16 * n_extents)
        numbers = struct.unpack_from(f"<{2 * n_extents}Q", self.buffer, self.start)
        self.start += 16 * n_extents
        for offset, size in zip(numbers[::2], numbers[1::2]):
            if offset + size > self._inbox.nbytes:
                raise FrameError(f"{size} bytes at {offset} of an arena of {self._inbox.nbytes}")
            target = self._inbox[offset : offset + size]
            n_here = min(size, self.end - self.start)
            target[:n_here] = self.buffer[self.start : self.start + n_here]
            self.start += n_here
            while n_here < size:
                n_here += self._read_into(target[n_here:])

    def _need(self, n_bytes: int) -> None:
        """Have so many bytes in the buffer, at `_start`."""
        if self.start + n_bytes > _READ_BYTES:
            kept = bytes(self.buffer[self.start : self.end])
            self.buffer[: len(kept)] = kept
            self.start, self.end = 0, len(kept)
        while self.end - self.start < n_bytes:
            self._read_some(is_first=False)

    def _read_some(self, is_first: bool) -> bool:
        is_trial = is_first and self.is_tls
        if is_trial:  # what made the socket readable may be TLS's own, and no data
            self.sock.settimeout(0)
        n = self._read_into(self.buffer[self.end :], is_first)
        if is_trial:
            self.sock.settimeout(POST_S)
        self.end += n
        return n > 0

    def _read_into(self, target: memoryview, is_first: bool = False) -> int:
        """Read at least one byte; 0: the time is up, between two frames."""
        give_up_at = time.monotonic() + POST_S
        while True:
            try:
                n = self.sock.recv_into(target)
            except (BlockingIOError, ssl.SSLWantReadError, TimeoutError):
                if is_first:
                    return 0
                if time.monotonic() > give_up_at:
                    raise LeaseLost(f"no more of a frame for {POST_S:g} s") from None
                continue
            except (OSError, ValueError) as error:
                raise LeaseLost(f"the peer is gone: {error}") from error
            if not n:
                raise LeaseLost("the peer is gone: it has closed the connection")
            return n

    def filenos(self) -> tuple[int, ...]:
        """See `Transport.filenos`."""
        if self.is_closed:
            raise LeaseLost("the connection is closed")
        return (self.sock.fileno(),)

    def arm(self) -> bool:
        """See `Transport.arm`."""
        if self.start != self.end:
            return False
        return not (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending())

    def disarm(self) -> None:
        """See `Transport.disarm`; nobody is woken but by the kernel."""

    def close(self) -> None:
        """See `Transport.close`."""
        if self.is_closed:
            return
        self.is_closed = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads
        self.sock.close()
