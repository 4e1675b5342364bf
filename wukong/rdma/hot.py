"""The shortest way of small calls through shared memory: the one place where speed beats beauty.

It does what `Line.send`, `ShmTransport.post`, `ShmTransport.poll` and `parse_frame` do, in one
function for each side, since a call of a function costs as much here as what it does. It steps
aside, for those, as soon as anything is not the usual: a buffer, a release, a frame of another
kind, a queue that is full. `bench leases` measures it.

A head is copied before it is looked at, and the stream before it is read. No function is called
between the last look and the change of the last count: a signal's handler that raises, as Ctrl-C
does, finds a frame either not sent or sent, not taken or taken.
"""

from __future__ import annotations

import pickle
import struct
import time
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

from wukong.executor.serialize import is_plain
from wukong.rdma.frames import HEAD_BYTES, MAGIC, RAW, Kind
from wukong.rdma.line import Line
from wukong.rdma.shm import ASLEEP, FRAME_BYTES, IS_ORDERED, SLOTS, TAKEN, ShmTransport
from wukong.rdma.transport import QUEUE_FRAMES

_SPINS = 2_000
"""Looks at the queue, some 100 us, before the usual way of waiting is taken."""
_MAX_STREAM = FRAME_BYTES - HEAD_BYTES
# The frame's length, and `frames.HEAD` in fewer numbers: magic to epoch, serial, call, subject,
# stream bytes, and what is 0 in frames that go this way.
_HEAD = struct.Struct("<QQQQIIQ")
assert _HEAD.size == 8 + HEAD_BYTES
_pack_into, _unpack_from = _HEAD.pack_into, _HEAD.unpack_from
_SLOTS = tuple((word, start - 8, start + HEAD_BYTES) for word, start in SLOTS)
"""Of each slot: the index of its number, where the frame's length is, and the stream."""
_dumps, _loads, _clock = pickle.dumps, pickle.loads, time.perf_counter
MISSED = object()
"""Nothing was received, or nothing that is the usual: take the usual way."""


class HotLine:
    """One end of a line, with everything at hand that small calls need.

    Args:
        line: through shared memory (`make` looks).
    """

    __slots__ = (
        "call",
        "in_words",
        "incoming",
        "line",
        "lock",
        "out_words",
        "outgoing",
        "raw_call",
        "raw_result",
        "result",
        "transport",
    )

    def __init__(self, line: Line, transport: ShmTransport) -> None:
        self.line, self.transport = line, transport
        self.lock = line.lock
        self.outgoing, self.out_words = transport.outgoing, transport.out_words
        self.incoming, self.in_words = transport.incoming, transport.in_words
        self.call, self.result = (
            MAGIC | kind << 16 | line.epoch << 32 for kind in (Kind.CALL, Kind.RESULT)
        )
        self.raw_call, self.raw_result = self.call | RAW << 24, self.result | RAW << 24

    @staticmethod
    def make(line: Line) -> HotLine | None:
        """The shortest way of a line, if it has one."""
        transport = line.transport
        if IS_ORDERED and type(transport) is ShmTransport:
            return HotLine(line, transport)
        return None

    def post_call(self, call: int, function: int, args: tuple[Any, ...]) -> bool:
        """Send a small call of a function that the executor knows. False: take the usual way.

        Raises:
            LeaseLost: the peer is gone.
        """
        if len(args) == 1 and type(args[0]) is bytes:
            stream, first = args[0], self.raw_call
        elif is_plain(args):
            stream, first = _dumps(args, 5), self.call
        else:
            return False
        size, line, transport, words = len(stream), self.line, self.transport, self.out_words
        with self.lock:
            number = transport.n_posted
            if size > _MAX_STREAM or line.released:
                return False
            if number >= transport.room_until and not transport.has_room():
                return False
            word, at, start = _SLOTS[number % QUEUE_FRAMES]
            _pack_into(self.outgoing, at, size + HEAD_BYTES, first, number, call, function, size, 0)
            self.outgoing[start : start + size] = stream
            line.n_sent = transport.n_posted = words[word] = number + 1
        # The lock's release is the fence between the number and the look at the reader's sleep.
        if words[ASLEEP]:
            transport.ring()
        return True

    def await_result(self, call: int, n_spins: int = _SPINS) -> Any:
        """Poll for the result of a call and load it, if it is small, or return `MISSED`."""
        transport, words = self.transport, self.in_words
        number = transport.n_taken
        word, at, start = _SLOTS[number % QUEUE_FRAMES]
        due = number + 1
        for _ in repeat(None, n_spins):
            if words[word] == due:
                break
        else:
            return MISSED
        length, first, serial, its_call, subject, size, rest = _unpack_from(self.incoming, at)
        # Only the very frame that is waited for; of whatever else the usual way may complain.
        if (
            its_call != call
            or serial != number
            or length != size + HEAD_BYTES
            or size > _MAX_STREAM
            or (first != self.raw_result and first != self.result)
            or subject
            or rest
        ):
            return MISSED
        stream = self.incoming[start : start + size]
        self.line.n_received = transport.n_taken = words[TAKEN] = due
        return stream if first == self.raw_result else _loads(stream)

    def serve(
        self, functions: Mapping[int, Callable[..., Any]], meter: Meter, n_spins: int = _SPINS
    ) -> tuple[int, Any] | None:
        """Run small calls of known functions and answer them, while they come one after the other.

        Nobody else uses the line meanwhile, so there is no lock.

        Returns:
            A call's number and result (`Failed`: what its function has raised), when that is not to
            be sent by this way; None when nothing has come, or nothing usual.
        """
        line, transport = self.line, self.transport
        in_words, out_words, seconds = self.in_words, self.out_words, meter.memory
        ended_at = _clock()
        while True:
            number = transport.n_taken
            word, at, start = _SLOTS[number % QUEUE_FRAMES]
            due = number + 1
            for _ in repeat(None, n_spins):
                if in_words[word] == due:
                    break
            else:
                return None
            begun_at = _clock()
            length, first, serial, call, subject, size, rest = _unpack_from(self.incoming, at)
            function = functions.get(subject)
            if (
                function is None
                or serial != number
                or length != size + HEAD_BYTES
                or size > _MAX_STREAM
                or (first != self.raw_call and first != self.call)
                or rest
            ):
                return None
            stream = self.incoming[start : start + size]
            line.n_received = transport.n_taken = in_words[TAKEN] = due
            try:
                result = function(stream) if first == self.raw_call else function(*_loads(stream))
            except BaseException as error:
                result = Failed(error)
            # Counted before the answer: after the last one comes the end.
            seconds[0] = meter.n_calls = meter.n_calls + 1
            seconds[1] = meter.execution_s = meter.execution_s + _clock() - begun_at

            if type(result) is bytes:
                stream, first = result, self.raw_result
            elif is_plain(result):
                stream, first = _dumps(result, 5), self.result
            else:
                return call, result
            size, number = len(stream), transport.n_posted
            if size > _MAX_STREAM or line.released:
                return call, result
            if number >= transport.room_until and not transport.has_room():
                return call, result
            word, at, start = _SLOTS[number % QUEUE_FRAMES]
            _pack_into(self.outgoing, at, size + HEAD_BYTES, first, number, call, 0, size, 0)
            self.outgoing[start : start + size] = stream
            line.n_sent = transport.n_posted = out_words[word] = number + 1
            transport.fence.release()
            transport.fence.acquire()
            if out_words[ASLEEP]:
                transport.ring()
            seconds[2] = meter.hot_s = meter.hot_s + begun_at - ended_at
            ended_at = _clock()


class Meter:
    """What an executor has been used for, in memory that its agent reads.

    Args:
        memory: three float64: calls, seconds in calls, seconds of polling.
    """

    __slots__ = ("execution_s", "hot_s", "memory", "n_calls")

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory.cast("d")
        self.n_calls = 0
        self.execution_s = self.hot_s = 0.0

    def add(self, n_calls: int, execution_s: float, hot_s: float) -> None:
        """Count."""
        self.memory[0] = self.n_calls = self.n_calls + n_calls
        self.memory[1] = self.execution_s = self.execution_s + execution_s
        self.memory[2] = self.hot_s = self.hot_s + hot_s


class Failed:
    """What a function raised."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error
