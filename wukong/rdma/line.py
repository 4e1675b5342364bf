"""A line: values over a transport, between a client and one leased executor.

    value --pickle 5--> stream, buffers --> frame in a slot, buffers in the peer's arena
          <-- arrays that view the arena <-- frame, checked ---------------------------

An array that arrives is a view of the arena, and pins its extent until the last view of it dies.
An array that lies in the outbox already (`empty`) leaves without a copy, any other is copied there
once; where there is no outbox (TCP) nothing is copied. What is here knows no calls: see `leased`
and `client`.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wukong.errors import FrameError, LeaseError, PayloadTooLarge, SerializationError
from wukong.executor.serialize import is_plain, pickle_value
from wukong.rdma.arena import Arena
from wukong.rdma.frames import (
    HEAD,
    HEAD_BYTES,
    LENT,
    MAC_BYTES,
    MAGIC,
    MAX_EXTENTS,
    RAW,
    STREAM_OUT,
    Frame,
    Kind,
    pack_frame,
    parse_frame,
)
from wukong.rdma.transport import Transport

MAX_RELEASES = 64
"""Of one frame; the others wait for the next."""
_ARENA_FROM_BYTES = 4096
"""A smaller buffer goes in the frame: copying it twice is cheaper than pinning it."""


class ArenaFull(LeaseError, BlockingIOError):
    """There is no room for the buffers now; there may be when the peer has released some."""


class Outbox:
    """What a sender knows of the arena that it fills. Thread-safe.

    Several lines of one lease may share one: then an array that lies there goes to any executor.
    """

    def __init__(self, size_bytes: int, memory: memoryview | None) -> None:
        self.arena = Arena(size_bytes)
        self.memory = memory
        self.lock = threading.Lock()
        self.dead: deque[int] = deque()
        """Extents whose array has died here; a finalizer may run anywhere, and locks nothing."""
        self._base = 0 if memory is None else _address_of(memory)
        self._refs: dict[int, weakref.ref[Any]] = {}

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array that leaves without a copy; its memory is free when it, and all of its users,
        are gone.

        Raises:
            ArenaFull: there is no room.
        """
        kind = np.dtype(dtype)
        if kind.hasobject or self.memory is None:
            return np.empty(shape, kind)
        size = kind.itemsize * math.prod((shape,) if isinstance(shape, int) else shape)
        with self.lock:
            self.sweep()
            offset = self.arena.allocate(size)
            if offset is None:
                raise ArenaFull(f"no {size} bytes are free in an arena of {self.arena.size_bytes}")
        base = np.frombuffer(self.memory, np.uint8, size, offset)
        self._refs[offset] = weakref.ref(base, lambda _: self.dead.append(offset))
        # Through a memoryview, since numpy would else make the result a view of `memory` itself.
        return np.frombuffer(base.data, kind).reshape(shape)

    def sweep(self) -> None:
        """Free what has died; the lock is held."""
        while self.dead:
            offset = self.dead.popleft()
            del self._refs[offset]
            self.arena.free(offset)

    def offset_of(self, view: memoryview) -> int | None:
        """Where a buffer lies in this memory; None: elsewhere."""
        if self.memory is None:
            return None
        offset = _address_of(view) - self._base
        return offset if 0 <= offset < self.arena.size_bytes else None


class Line:
    """One end of a line. One thread sends at a time, by a lock; one thread receives.

    Args:
        transport: established; closed with the line.
        epoch: of the executor.
        keys: for the MACs of frames that are sent and received; of no use in private transports.
        outbox: shared with other lines, or None for one of its own.
    """

    def __init__(
        self,
        transport: Transport,
        epoch: int,
        keys: tuple[bytes, bytes],
        outbox: Outbox | None = None,
    ) -> None:
        self.transport = transport
        self.outbox = outbox or Outbox(transport.outbox_bytes, transport.outbox)
        self.copied_bytes = 0
        """Bytes of buffers that were copied on their way out."""
        self.epoch = epoch
        self.lock = threading.Lock()
        self.n_sent = self.n_received = 0
        self._has_macs = not transport.is_private
        self.sign, self.verify = (hashlib.blake2b(key=key, digest_size=MAC_BYTES) for key in keys)
        mac_bytes = MAC_BYTES if self._has_macs else 0
        self._stream_bytes = transport.frame_bytes - HEAD_BYTES - mac_bytes
        """Longest stream of a frame without tables."""
        self._inbox = transport.inbox
        self._lent: dict[int, tuple[int, int]] = {}
        """Offset of each buffer that the peer has -> the extent in which it lies, how often."""
        self._pins: dict[int, weakref.ref[Any]] = {}
        self._n_pins = 0
        self.released: deque[int] = deque()
        """Extents of the inbox whose last view has died."""

    # -------------------------------------------------------------- sending

    def send(
        self,
        kind: Kind,
        call: int,
        stream: bytes = b"",
        buffers: Sequence[pickle.PickleBuffer] = (),
        subject: int = 0,
        deadline_s: float = 0.0,
        flags: int = 0,
    ) -> None:
        """Send a frame, and the buffers that belong to it.

        Raises:
            ArenaFull: nothing was sent.
            PayloadTooLarge: it can never be sent: the arena is smaller.
            LeaseLost: the peer is gone.
        """
        with self.lock:
            if buffers or self.released or len(stream) > self._stream_bytes:
                self._send_with_tables(kind, call, stream, buffers, subject, deadline_s, flags)
                return
            serial = self.n_sent
            frame = (
                HEAD.pack(
                    MAGIC,
                    kind,
                    flags,
                    self.epoch,
                    serial,
                    call,
                    subject,
                    len(stream),
                    deadline_s,
                    0,
                    0,
                )
                + stream
            )
            if self._has_macs:
                frame += _mac(self.sign, frame)
            self.transport.post(frame)
            self.n_sent = serial + 1

    def _send_with_tables(
        self,
        kind: Kind,
        call: int,
        stream: bytes,
        buffers: Sequence[pickle.PickleBuffer],
        subject: int,
        deadline_s: float,
        flags: int,
    ) -> None:
        views = [buffer.raw() for buffer in buffers]
        releases = [self.released.popleft() for _ in range(min(len(self.released), MAX_RELEASES))]
        room_bytes = self._stream_bytes - 16 * len(views) - 8 * len(releases)
        if len(stream) > room_bytes:
            views.insert(0, memoryview(stream))
            stream, flags = b"", flags | STREAM_OUT
        try:
            extents, parts = self._place(views)
        except LeaseError:
            self.released.extendleft(reversed(releases))
            raise
        frame = pack_frame(
            kind,
            self.epoch,
            self.n_sent,
            call,
            stream,
            subject,
            deadline_s,
            extents,
            releases,
            flags,
        )
        if self._has_macs:
            frame += _mac(self.sign, frame)
        self.transport.post(frame, parts)
        self.n_sent += 1

    def _place(
        self, views: list[memoryview]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, memoryview]]]:
        """Find room for buffers in the peer's arena, and bring them where they can be sent from."""
        outbox = self.outbox
        placed: list[tuple[int, int, int, memoryview]] = []  # start, offset, bit, buffer
        with outbox.lock:
            outbox.sweep()
            for view in views:
                where = self._find_room(view)
                if where is None:
                    for start, _, _, _ in placed:
                        outbox.arena.free(start)
                    self._complain(sum(view.nbytes for view in views))
                else:
                    placed.append((*where, view))
            for start, offset, _, _ in placed:
                self._lent[offset] = (start, self._lent.get(offset, (start, 0))[1] + 1)
        memory = outbox.memory
        if memory is not None:
            for _, offset, bit, view in placed:
                if not bit:
                    memory[offset : offset + view.nbytes] = view
                    self.copied_bytes += view.nbytes
            placed = [(s, o, bit, memory[o : o + v.nbytes]) for s, o, bit, v in placed]
        extents = [(offset, view.nbytes | bit) for _, offset, bit, view in placed]
        return extents, [(offset, view) for _, offset, _, view in placed]

    def _find_room(self, view: memoryview) -> tuple[int, int, int] | None:
        """The extent for a buffer, the buffer's offset, and `LENT` if it lies there already."""
        arena = self.outbox.arena
        offset = self.outbox.offset_of(view)
        if offset is None:
            offset = arena.allocate(view.nbytes)
            return None if offset is None else (offset, offset, 0)
        start = arena.start_of(offset, view.nbytes)
        if start is None:
            raise FrameError("a buffer in the outbox that nobody has allocated")
        arena.share(start)
        return start, offset, LENT

    def _complain(self, size_bytes: int) -> None:
        whole = self.outbox.arena.size_bytes
        if size_bytes > whole or not self.outbox.arena.n_used:
            raise PayloadTooLarge(f"{size_bytes} bytes do not fit into an arena of {whole}")
        raise ArenaFull(f"no {size_bytes} bytes are free in an arena of {whole}")

    def flush_releases(self) -> None:
        """Tell the peer what it may use again, if no other frame has."""
        while self.released:
            self.send(Kind.RELEASE, 0)

    # -------------------------------------------------------------- receiving

    def receive(self, timeout_s: float, spin_s: float = 0.0) -> Frame | None:
        """The next frame, checked; waits for it as `Transport.wait` does. None: the time is up.

        Raises:
            LeaseLost: the peer is gone.
            FrameError: it lies; close the line.
        """
        data = self.transport.wait(timeout_s, spin_s)
        return None if data is None else self._opened(data)

    def poll(self) -> Frame | None:
        """The next frame if one is there."""
        data = self.transport.poll()
        return None if data is None else self._opened(data)

    def _opened(self, data: bytes) -> Frame:
        if self._has_macs:
            data, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
            if not hmac.compare_digest(mac, _mac(self.verify, data)):
                raise FrameError("a frame that is not signed by the peer")
        frame = parse_frame(data, self.epoch, self.n_received, self._inbox.nbytes)
        self.n_received += 1
        if frame.releases:
            with self.outbox.lock:
                for offset in frame.releases:
                    self._take_back(offset)
        return frame

    def _take_back(self, offset: int) -> None:
        if offset not in self._lent:
            raise FrameError(f"released was what was not sent, at {offset}")
        start, n = self._lent.pop(offset)
        if n > 1:
            self._lent[offset] = (start, n - 1)
        self.outbox.arena.free(start)

    def load(self, frame: Frame) -> Any:
        """The value of a frame; its arrays view the inbox, and pin it.

        Raises:
            SerializationError: what was pickled cannot be rebuilt here.
        """
        stream = frame.stream
        if frame.flags & RAW:
            return (stream,) if frame.kind == Kind.CALL else stream
        if not frame.extents:
            try:
                return pickle.loads(stream)
            except MemoryError:
                raise
            except Exception as error:
                raise _unreadable(error) from error
        extents = list(frame.extents)
        if frame.flags & STREAM_OUT:
            offset, size = extents.pop(0)
            # Copied before it is read: nobody changes it meanwhile.
            stream = bytes(self._inbox[offset : offset + size])
            self.released.append(offset)
        buffers = [self._pinned(offset, size) for offset, size in extents]
        try:
            return pickle.loads(stream, buffers=buffers)
        except MemoryError:
            raise
        except Exception as error:
            raise _unreadable(error) from error

    def _pinned(self, offset: int, size: int) -> memoryview:
        """A view of the inbox; when the last view of it dies, the extent is released."""
        pin = np.frombuffer(self._inbox, np.uint8, size & ~LENT, offset)
        if size & LENT:
            pin.flags.writeable = False
        number = self._n_pins
        self._n_pins += 1
        # The finalizer may run anywhere in any thread: it does nothing that could wait.
        pins, released = self._pins, self.released

        def unpin(_: object) -> None:
            released.append(offset)
            pins.pop(number, None)

        pins[number] = weakref.ref(pin, unpin)
        return pin.data

    @property
    def n_pinned(self) -> int:
        """Extents of the inbox that are viewed."""
        return len(self._pins)

    def close(self) -> None:
        """Cut the line, and take back what was lent. Idempotent; arrays that came stay valid."""
        self.transport.close()
        with self.outbox.lock:
            while self._lent:
                self._take_back(next(iter(self._lent)))


def encode(value: object) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """Pickle a value; large buffers stay out of band.

    Raises:
        SerializationError: a part of it cannot be pickled.
    """
    if is_plain(value):
        return pickle.dumps(value, 5), []
    stream, buffers, _ = pickle_value(value, _ARENA_FROM_BYTES)
    if len(buffers) > MAX_EXTENTS - 1:
        stream, buffers, _ = pickle_value(value, 1 << 62)
    return stream, buffers


def _mac(keyed: hashlib.blake2b, data: bytes) -> bytes:
    mac = keyed.copy()
    mac.update(data)
    return mac.digest()


def _address_of(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def _unreadable(error: Exception) -> SerializationError:
    return SerializationError(f"a value cannot be unpickled here: {type(error).__name__}: {error}")
