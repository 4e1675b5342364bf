"""PURE: what a client and a leased executor say to each other, as bytes.

A frame (little-endian):

    0    magic (u16) | kind (u8) | flags (u8) | epoch (u32)
    8    serial (u64): frames of one direction are counted from 0
    16   call (u64) | subject (u32) | stream bytes (u32) | deadline (f32, seconds from now, 0: none)
    36   n extents (u16) | n releases (u16)                                             40 bytes
    40   n extents times: offset (u64), size (u64; highest bit: lent, so read only)
    ..   n releases times: offset (u64)
    ..   the stream
    ..   MAC (16), over everything before it: only where others can write into the connection

Buffers of a call (arrays) are not in the frame: they lie in an *arena*, memory of the receiver into
which the sender's transport has written them before the frame is seen. The sender alone decides
which *extent* of the arena holds what; the receiver names the extents that it needs no longer in
the `releases` of a later frame of the other direction. Arenas of both directions are apart.

A frame is copied out of shared memory before it is read, so that nobody can change it between
check and use, and every number in it is compared with its limits here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from wukong.errors import FrameError

HEAD = struct.Struct("<HBBIQQIIfHH")
HEAD_BYTES = HEAD.size
_new_tuple = tuple.__new__
MAGIC = 0x574B
MAC_BYTES = 16
MAX_EXTENTS = 1024
"""Of one frame: 16 KB of table. Values with more large buffers are pickled in band."""
STREAM_OUT = 1
"""Flag: the stream did not fit into the frame and is the first extent."""
RAW = 4
"""Flag: the stream is not pickled, it is the value: of a CALL its only argument."""


class Kind(IntEnum):
    """What a frame is for."""

    CALL = 1  # subject: number of a function, 0: the function is in the stream
    DEFINE = 2  # subject: number; stream: the pickled function
    CANCEL = 3  # call: which; a call that has begun goes on
    RESULT = 4
    RAISED = 5
    CANCELLED = 6  # the call was cancelled, or its deadline passed, before it began
    RELEASE = 7  # nothing but releases
    SERVE = 8  # stream: the store whose tokens to run from now on
    INVOKE = 9  # look for tokens; subject: how many were queued


LENT = 1 << 63
"""Bit of an extent's size: the sender goes on using this memory, so the receiver must not write."""


class Frame(NamedTuple):
    """One frame, checked."""

    kind: int
    flags: int
    call: int
    subject: int
    deadline_s: float
    """Seconds from the receipt; 0: none."""
    extents: tuple[tuple[int, int], ...]
    """Offset and size of each buffer in the receiver's arena; `LENT` may be added to the size."""
    releases: tuple[int, ...]
    """Offsets of extents in the other arena that are free again."""
    stream: bytes


def pack_frame(
    kind: int,
    epoch: int,
    serial: int,
    call: int,
    stream: bytes,
    subject: int = 0,
    deadline_s: float = 0.0,
    extents: Sequence[tuple[int, int]] = (),
    releases: Sequence[int] = (),
    flags: int = 0,
) -> bytes:
    """Return a frame without its MAC."""
    head = HEAD.pack(
        MAGIC,
        kind,
        flags,
        epoch,
        serial,
        call,
        subject,
        len(stream),
        deadline_s,
        len(extents),
        len(releases),
    )
    if not extents and not releases:
        return head + stream
    numbers = [number for extent in extents for number in extent]
    numbers += releases
    return b"".join((head, struct.pack(f"<{len(numbers)}Q", *numbers), stream))


def parse_frame(data: bytes, epoch: int, serial: int, arena_bytes: int) -> Frame:
    """Read a frame that was copied out of the transport, and whose MAC has been checked and cut.

    Args:
        data: the whole frame.
        epoch: of the lease.
        serial: what the next frame must have.
        arena_bytes: size of the arena in which its extents must lie.
    Raises:
        FrameError: it lies about a size, an address, its lease or its place.
    """
    if len(data) < HEAD_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes has no head")
    magic, kind, flags, its_epoch, its_serial, call, subject, stream_bytes, deadline_s, n, m = (
        HEAD.unpack_from(data)
    )
    if magic != MAGIC or its_epoch != epoch or its_serial != serial:
        raise FrameError(
            f"frame {its_serial} of epoch {its_epoch} came (magic {magic:#x}); expected was frame"
            f" {serial} of epoch {epoch}: it is forged, stale or repeated"
        )
    if not n and not m:
        if len(data) != HEAD_BYTES + stream_bytes:
            raise FrameError(f"a frame of {len(data)} bytes claims {stream_bytes} bytes of stream")
        # As Frame(...), in half the time.
        return _new_tuple(
            Frame, (kind, flags, call, subject, deadline_s, (), (), data[HEAD_BYTES:])
        )
    table_bytes = 16 * n + 8 * m
    if n > MAX_EXTENTS or len(data) != HEAD_BYTES + table_bytes + stream_bytes:
        raise FrameError(
            f"a frame of {len(data)} bytes claims {n} extents, {m} releases and {stream_bytes}"
            " bytes of stream"
        )
    numbers = struct.unpack_from(f"<{2 * n + m}Q", data, HEAD_BYTES)
    extents = tuple(zip(numbers[: 2 * n : 2], numbers[1 : 2 * n : 2]))
    for offset, size in extents:
        if offset + (size & ~LENT) > arena_bytes:
            raise FrameError(
                f"an extent of {size & ~LENT} bytes at {offset} is outside of the arena's"
                f" {arena_bytes}"
            )
    return Frame(
        kind,
        flags,
        call,
        subject,
        deadline_s,
        extents,
        numbers[2 * n :],
        data[HEAD_BYTES + table_bytes :],
    )
