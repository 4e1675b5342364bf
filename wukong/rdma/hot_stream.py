"""The shortest way of small calls over a plain stream: see `wukong.rdma.hot`.

One call of the system sends a frame, another one receives it, asleep: who polls a socket may keep
from its core the very process for which it waits, and then takes milliseconds.
"""

from __future__ import annotations

import hmac
import pickle
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from wukong.errors import FrameError, LeaseLost
from wukong.executor.serialize import is_plain
from wukong.rdma.frames import HEAD_BYTES, MAC_BYTES, MAGIC, RAW, Kind
from wukong.rdma.hot import MISSED, Failed, HotLine, Meter
from wukong.rdma.line import Line
from wukong.rdma.tcp import FRAME_BYTES, TcpTransport

_MAX_STREAM = FRAME_BYTES - HEAD_BYTES - MAC_BYTES
# What the stream says of a frame, and `frames.HEAD` in fewer numbers, as in `hot`.
_PREFIX = struct.Struct("<II")
_HEAD = struct.Struct("<QQQIIQ")
_WHOLE = struct.Struct("<IIQQQIIQ")
assert _HEAD.size == HEAD_BYTES
_STREAM_AT = _WHOLE.size
_dumps, _loads, _clock = pickle.dumps, pickle.loads, time.perf_counter


def shortest_way(line: Line) -> HotLine | HotStream | None:
    """The shortest way of a line, if it has one."""
    transport = line.transport
    if type(transport) is TcpTransport and not transport.is_tls:
        return HotStream(line, transport)
    return HotLine.make(line)


class HotStream:
    """As `HotLine`, over a socket.

    Args:
        line: through `transport`.
    """

    __slots__ = (
        "buffer",
        "call",
        "line",
        "raw_call",
        "raw_result",
        "receive",
        "result",
        "send",
        "sign",
        "transport",
        "verify",
    )

    def __init__(self, line: Line, transport: TcpTransport) -> None:
        self.line, self.transport = line, transport
        self.buffer = transport.buffer
        self.send, self.receive = transport.sock.sendall, transport.sock.recv_into
        self.sign, self.verify = line.sign.copy, line.verify.copy
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
            if size > _MAX_STREAM or line.released:
                return False
            frame = _HEAD.pack(first, line.n_sent, call, subject, size, 0) + stream
            mac = self.sign()
            mac.update(frame)
            try:
                self.send(_PREFIX.pack(len(frame) + MAC_BYTES, 0) + frame + mac.digest())
            except OSError as error:
                raise LeaseLost(f"the peer is gone: {error}") from error
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
        self._take(len(stream))
        return stream.tobytes() if first == self.raw_result else _loads(stream)

    def serve(
        self, functions: Mapping[int, Callable[..., Any]], meter: Meter
    ) -> tuple[int, Any] | None:
        """See `HotLine.serve`."""
        while True:
            found = self._receive()
            if found is None:
                return None
            begun_at = _clock()
            first, call, subject, stream = found
            function = functions.get(subject)
            if function is None or (first != self.raw_call and first != self.call):
                return None
            self._take(len(stream))
            try:
                if first == self.raw_call:
                    result = function(stream.tobytes())
                else:
                    result = function(*_loads(stream))
            except BaseException as error:
                result = Failed(error)
            meter.add(1, _clock() - begun_at, 0.0)
            if type(result) is bytes:
                is_sent = self._post(self.raw_result, call, 0, result)
            else:
                is_sent = is_plain(result) and self._post(self.result, call, 0, _dumps(result, 5))
            if not is_sent:
                return call, result

    def _receive(self) -> tuple[int, int, int, memoryview] | None:
        """The next frame if it is small and whole: its first word, call, subject and stream.

        It is not taken yet. None: the usual way finds in its buffer what has come, if anything.
        """
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
        mac = self.verify()
        mac.update(buffer[_PREFIX.size : end])
        if not hmac.compare_digest(mac.digest(), buffer[end:n]):
            raise FrameError("a frame that is not signed by the peer")
        return first, call, subject, buffer[_STREAM_AT:end]

    def _take(self, size: int) -> None:
        self.transport.start = self.transport.end = 0
        self.line.n_received += 1
