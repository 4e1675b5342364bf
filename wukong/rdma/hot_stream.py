"""The shortest way of small calls over a plain stream, and over verbs: see `wukong.rdma.hot`.

One call of the system sends a frame, another one receives it, asleep: who polls a socket may keep
from its core the very process for which it waits, and then takes milliseconds. Verbs are polled as
`Spin` says. A clock is read twice for each call, by the executor.
"""

from __future__ import annotations

import hmac
import pickle
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from wukong.errors import FrameError, LeaseLost
from wukong.executor.serialize import is_plain
from wukong.rdma.frames import HEAD_BYTES, MAC_BYTES, MAGIC, RAW, Kind
from wukong.rdma.hot import MISSED, Failed, HotLine, Meter
from wukong.rdma.line import Line
from wukong.rdma.spin import Spin
from wukong.rdma.tcp import TcpTransport
from wukong.rdma.transport_verbs import VerbsTransport

# What the stream says of a frame, and `frames.HEAD` in fewer numbers, as in `hot`.
_PREFIX = struct.Struct("<II")
_HEAD = struct.Struct("<QQQIIQ")
_WHOLE = struct.Struct("<IIQQQIIQ")
assert _HEAD.size == HEAD_BYTES
_STREAM_AT = _WHOLE.size
_dumps, _loads, _clock = pickle.dumps, pickle.loads, time.perf_counter


class ShortestWay(Protocol):
    """What `HotLine` does for shared memory, whatever is between."""

    def post_call(self, call: int, function: int, args: tuple[Any, ...]) -> bool:
        """See `HotLine.post_call`."""
        ...

    def await_result(self, call: int) -> Any:
        """See `HotLine.await_result`."""
        ...

    def serve(
        self, functions: Mapping[int, Callable[..., Any]], meter: Meter
    ) -> tuple[int, Any] | None:
        """See `HotLine.serve`."""
        ...


def shortest_way(line: Line, spin: Spin) -> ShortestWay | None:
    """The shortest way of a line, if it has one.

    Args:
        spin: how long the reader of the line polls before it sleeps.
    """
    transport = line.transport
    if type(transport) is TcpTransport and not transport.is_tls:
        return HotStream(line, transport)
    if type(transport) is VerbsTransport:
        return HotVerbs(line, transport, spin)
    return HotLine.make(line)


class _SignedFrames:
    """What is the same wherever small calls go as whole frames, one after the other, with MACs."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.sign, self.verify = line.sign.copy, line.verify.copy
        self.max_stream = line.transport.frame_bytes - HEAD_BYTES - MAC_BYTES
        self.call, self.result = (
            MAGIC | kind << 16 | line.epoch << 32 for kind in (Kind.CALL, Kind.RESULT)
        )
        self.raw_call, self.raw_result = self.call | RAW << 24, self.result | RAW << 24

    def post_call(self, call: int, function: int, args: tuple[Any, ...]) -> bool:
        """See `HotLine.post_call`."""
        if len(args) == 1 and type(args[0]) is bytes:
            return self._post(self.raw_call, call, function, args[0])
        return is_plain(args) and self._post(self.call, call, function, _dumps(args, 5))

    def _post(self, first: int, call: int, subject: int, stream: bytes) -> bool:
        size, line = len(stream), self.line
        with line.lock:
            if size > self.max_stream or line.released:
                return False
            frame = _HEAD.pack(first, line.n_sent, call, subject, size, 0) + stream
            mac = self.sign()
            mac.update(frame)
            self._send(frame + mac.digest())
            line.n_sent += 1
        return True

    def await_result(self, call: int) -> Any:
        """See `HotLine.await_result`."""
        found = self._receive()
        if found is None:
            return MISSED
        first, its_call, subject, stream = found
        if its_call != call or (first != self.raw_result and first != self.result) or subject:
            return MISSED
        self._take()
        return bytes(stream) if first == self.raw_result else _loads(stream)

    def serve(
        self, functions: Mapping[int, Callable[..., Any]], meter: Meter
    ) -> tuple[int, Any] | None:
        """See `HotLine.serve`."""
        ended_at = _clock()
        while True:
            found = self._receive()
            begun_at = _clock()
            polled_s = self._polled(begun_at - ended_at)
            first, call, subject, stream = found or (0, 0, 0, b"")
            function = functions.get(subject)
            if function is None or (first != self.raw_call and first != self.call):
                meter.add(0, 0.0, polled_s)
                return None
            self._take()
            try:
                if first == self.raw_call:
                    result = function(bytes(stream))
                else:
                    result = function(*_loads(stream))
            except BaseException as error:
                result = Failed(error)
            ended_at = _clock()
            meter.add(1, ended_at - begun_at, polled_s)
            if type(result) is bytes:
                is_sent = self._post(self.raw_result, call, 0, result)
            else:
                is_sent = is_plain(result) and self._post(self.result, call, 0, _dumps(result, 5))
            if not is_sent:
                return call, result

    def _check(self, frame: memoryview | bytes, mac: memoryview | bytes) -> None:
        expected = self.verify()
        expected.update(frame)
        if not hmac.compare_digest(expected.digest(), mac):
            raise FrameError("a frame that is not signed by the peer")

    def _send(self, frame: bytes) -> None:
        raise NotImplementedError

    def _receive(self) -> tuple[int, int, int, memoryview | bytes] | None:
        """The next frame if it is small and whole: its first word, call, subject and stream.

        It is not taken yet. None: the usual way finds what has come, if anything.
        """
        raise NotImplementedError

    def _take(self) -> None:
        """Take what `_receive` has returned."""
        raise NotImplementedError

    def _polled(self, wait_s: float) -> float:
        """How much of a wait was polled."""
        raise NotImplementedError


class HotStream(_SignedFrames):
    """As `HotLine`, over a socket.

    Args:
        line: through `transport`.
    """

    def __init__(self, line: Line, transport: TcpTransport) -> None:
        super().__init__(line)
        self.transport, self.buffer = transport, transport.buffer
        self.send, self.receive = transport.sock.sendall, transport.sock.recv_into

    def _send(self, frame: bytes) -> None:
        try:
            self.send(_PREFIX.pack(len(frame), 0) + frame)
        except OSError as error:
            raise LeaseLost(f"the peer is gone: {error}") from error

    def _receive(self) -> tuple[int, int, int, memoryview | bytes] | None:
        transport, line, buffer = self.transport, self.line, self.buffer
        if transport.start != transport.end or transport.is_closed:
            return None
        try:
            n = self.receive(buffer)
        except BlockingIOError:
            return None
        except OSError as error:
            raise LeaseLost(f"the peer is gone: {error}") from error
        if not n:
            raise LeaseLost("the peer is gone: it has closed the connection")
        transport.start, transport.end = 0, n
        length, n_extents, first, serial, call, subject, size, rest = _WHOLE.unpack_from(buffer)
        end = _STREAM_AT + size
        if (
            n != end + MAC_BYTES
            or length != n - _PREFIX.size
            or serial != line.n_received
            or n_extents
            or rest
        ):
            return None
        self._check(buffer[_PREFIX.size : end], buffer[end:n])
        return first, call, subject, buffer[_STREAM_AT:end]

    def _take(self) -> None:
        self.transport.start = self.transport.end = 0
        self.line.n_received += 1

    def _polled(self, wait_s: float) -> float:
        return 0.0


class HotVerbs(_SignedFrames):
    """As `HotLine`, over verbs.

    Args:
        line: through `transport`.
        spin: how long to poll.
    """

    def __init__(self, line: Line, transport: VerbsTransport, spin: Spin) -> None:
        super().__init__(line)
        self.transport, self.spin = transport, spin

    def _send(self, frame: bytes) -> None:
        self.transport.post(frame)

    def _receive(self) -> tuple[int, int, int, memoryview | bytes] | None:
        frame = self.transport.peek(self.spin.spin_s)
        end = len(frame) - MAC_BYTES
        if end < HEAD_BYTES:
            return None
        first, serial, call, subject, size, rest = _HEAD.unpack_from(frame)
        if serial != self.line.n_received or size != end - HEAD_BYTES or rest:
            return None
        self._check(frame[:end], frame[end:])
        return first, call, subject, frame[HEAD_BYTES:end]

    def _take(self) -> None:
        self.transport.peeked = None
        self.line.n_received += 1

    def _polled(self, wait_s: float) -> float:
        return self.spin.waited(wait_s)
