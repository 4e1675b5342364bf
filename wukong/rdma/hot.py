"""The shortest way of a small call through shared memory: the one place where speed beats beauty.

It does what `Line.send`, `ShmTransport.post`, `ShmTransport.poll` and `parse_frame` do, in one
function for each side, since a call of a function costs as much here as what it does. It steps
aside, for those, as soon as anything is not the usual: a buffer, a release, a frame of another
kind, a queue that is full. `bench leases` measures it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

from wukong.executor.serialize import is_plain
from wukong.rdma.frames import HEAD, HEAD_BYTES, MAGIC, Kind
from wukong.rdma.line import Line
from wukong.rdma.shm import ASLEEP, IS_ORDERED, SLOT_BYTES, TAKEN, ShmTransport
from wukong.rdma.transport import QUEUE_FRAMES

_CALL, _RESULT = int(Kind.CALL), int(Kind.RESULT)
_SPINS = 2_000
"""Looks at the queue, some 100 us, before the usual way of waiting is taken."""
_MAX_STREAM = SLOT_BYTES - 8 - HEAD_BYTES
_pack_into, _unpack_from, _dumps, _loads = (
    HEAD.pack_into,
    HEAD.unpack_from,
    pickle.dumps,
    pickle.loads,
)
MISSED = object()
"""Nothing was received, or nothing that is the usual: take the usual way."""


def post(line: Line, kind: int, call: int, subject: int, value: object) -> bool:
    """Send a small plain value. False: nothing was sent, take the usual way.

    Raises:
        LeaseLost: the peer is gone.
    """
    transport = line.transport
    if not is_plain(value) or not IS_ORDERED or type(transport) is not ShmTransport:
        return False
    stream = _dumps(value, 5)
    size = len(stream)
    with line.lock:
        if size > _MAX_STREAM or line.released or not transport.n_room:
            return False
        serial = line.n_sent
        slot, word = transport.out_slots[serial % QUEUE_FRAMES]
        _pack_into(slot, 0, MAGIC, kind, 0, line.epoch, serial, call, subject, size, 0.0, 0, 0)
        size += HEAD_BYTES
        slot[HEAD_BYTES:size] = stream
        words = transport.out_words
        words[word] = transport.out_turn + size
        line.n_sent = transport.n_posted = serial = serial + 1
        if not serial % QUEUE_FRAMES:
            transport.out_turn += 1 << 32
        transport.n_room -= 1
        fence = transport.fence
        fence.release()
        fence.acquire()
        if words[ASLEEP]:
            transport.ring()
    return True


def await_result(line: Line, call: int) -> Any:
    """Poll for the result of a call and load it, if it is small; `MISSED`: take the usual way."""
    transport = line.transport
    assert type(transport) is ShmTransport
    words, word, turn = transport.in_words, transport.due_word, transport.due_turn
    for _ in range(_SPINS):
        if words[word] >= turn:
            break
    else:
        return MISSED
    size = words[word] - turn
    if size > SLOT_BYTES - 8:
        return MISSED
    data = transport.due_slot[:size].tobytes()
    head = _unpack_from(data)
    # Only the very frame that is waited for; whatever else it is, the usual way complains of it.
    if head != (
        *(MAGIC, _RESULT, 0, line.epoch, line.n_received, call, 0),
        *(size - HEAD_BYTES, 0.0, 0, 0),
    ):
        return MISSED
    _take(line, transport)
    return _loads(data[HEAD_BYTES:])


def serve(
    line: Line, functions: Mapping[int, Callable[..., Any]], n_spins: int
) -> tuple[int, Any] | None:
    """Poll for a small call of a known function; returns its number and its result.

    None: nothing has come, or nothing usual. The arguments are dropped before the result is
    returned. What the function raises is raised, as `_Raised` with the call's number.
    """
    transport = line.transport
    assert type(transport) is ShmTransport
    words, word, turn = transport.in_words, transport.due_word, transport.due_turn
    for _ in range(n_spins):
        if words[word] >= turn:
            break
    else:
        return None
    size = words[word] - turn
    if size > SLOT_BYTES - 8 or size < HEAD_BYTES:
        return None
    data = transport.due_slot[:size].tobytes()
    magic, kind, flags, epoch, serial, call, subject, stream_bytes, deadline_s, n, m = _unpack_from(
        data
    )
    function = functions.get(subject)
    if (
        function is None
        or kind != _CALL
        or (magic, flags, deadline_s, n, m) != (MAGIC, 0, 0.0, 0, 0)
        or (epoch, serial, stream_bytes) != (line.epoch, line.n_received, size - HEAD_BYTES)
    ):
        return None
    _take(line, transport)
    try:
        return call, function(*_loads(data[HEAD_BYTES:]))
    except BaseException as error:
        return call, Failed(error)


class Failed:
    """What a function raised."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _take(line: Line, transport: ShmTransport) -> None:
    line.n_received = transport.n_taken = number = transport.n_taken + 1
    at = number % QUEUE_FRAMES
    transport.due_slot, transport.due_word = transport.in_slots[at]
    if not at:
        transport.due_turn += 1 << 32
    transport.in_words[TAKEN] = number
