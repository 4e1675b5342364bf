"""Frames over memory that two processes of one node share.

Each end makes what it writes: a queue of frames, an arena, and an eventfd by which it is woken.
All of it is memory without a name (memfd), handed over through the unix socket on which the two
have met: the kernel frees it with the last process that has it, however that ends.

A queue (words of 8 bytes, each in a cache line of its own, written by one side only):

    0     how many frames the reader has taken          (reader)
    64    1: the reader sleeps, ring its eventfd        (reader; the writer clears it)
    4096  slots of SLOT_BYTES: number (u64), length of the frame (u64), the frame

Frames are numbered from 1. A slot is valid when it has the number that is due, which is written
last. Processors
with weak ordering, and the look at the reader's sleep, need a fence between two accesses; passing
a lock is one.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import select
import socket
import threading
import time
from collections.abc import Sequence

from wukong.errors import FrameError, LeaseLost
from wukong.rdma.transport import POST_S, QUEUE_FRAMES, Offer

SLOT_BYTES = 16384
FRAME_BYTES = SLOT_BYTES - 16
_QUEUE_BYTES = 4096 + QUEUE_FRAMES * SLOT_BYTES
SLOTS = tuple((at // 8, at + 16) for at in range(4096, _QUEUE_BYTES, SLOT_BYTES))
"""Of each slot the index of its number among words, and where its frame begins."""
TAKEN, ASLEEP = 0, 8
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# These see another processor's writes in the order in which they were made.
IS_ORDERED = platform.machine() in ("x86_64", "i686", "AMD64")
_SPINS = 256
"""Looks at the queue between two looks at the clock: some 20 us."""
_LOOK_S = 0.01
"""A spinning reader looks for the peer's death this often."""


class SharedArena:
    """Memory of this process that others may map: of one end, or of several of one lease."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = _sealed(size_bytes)
        self.map = mmap.mmap(self.fd, size_bytes)

    def close(self) -> None:
        """Close the descriptor; arrays that view the memory stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ShmEnd:
    """One end of a connection through shared memory that is about to be made.

    Args:
        sock: a unix socket whose other side is the peer; owned by the transport from `connect` on.
        arena: what this end writes its buffers to.
    """

    def __init__(self, sock: socket.socket, arena: SharedArena) -> None:
        self._sock = sock
        self._arena = arena
        self._queue_fd = _sealed(_QUEUE_BYTES)
        self._bell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.offer: Offer = {"arena_bytes": arena.size_bytes}
        self.fds: Sequence[int] = (self._queue_fd, arena.fd, self._bell_fd)

    def connect(self, offer: Offer, fds: Sequence[int]) -> ShmTransport:
        """See `TransportEnd.connect`."""
        try:
            arena_bytes = offer.get("arena_bytes")
            if len(fds) != 3 or not isinstance(arena_bytes, int):
                raise FrameError(f"an offer without its descriptors or sizes: {offer}")
            queue_fd, arena_fd, bell_fd = fds
            for fd, size_bytes in ((queue_fd, _QUEUE_BYTES), (arena_fd, arena_bytes)):
                # Memory that its owner can shrink would end this process by a signal.
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
                if seals & _SEALS != _SEALS or os.fstat(fd).st_size != size_bytes:
                    raise FrameError(f"offered memory is not of {size_bytes} bytes, sealed")
            incoming = mmap.mmap(queue_fd, _QUEUE_BYTES)
            inbox = mmap.mmap(arena_fd, arena_bytes)
            their_bell = os.dup(bell_fd)
        except OSError as error:
            raise FrameError(f"an offer that is no shared memory: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)
        outgoing = mmap.mmap(self._queue_fd, _QUEUE_BYTES)
        os.close(self._queue_fd)
        self._queue_fd = -1
        bell_fd, self._bell_fd = self._bell_fd, -1
        return ShmTransport(
            self._sock, outgoing, incoming, self._arena.map, inbox, bell_fd, their_bell
        )

    def close(self) -> None:
        """See `TransportEnd.close`."""
        for fd in (self._queue_fd, self._bell_fd):
            if fd >= 0:
                os.close(fd)
        self._queue_fd = self._bell_fd = -1


class ShmTransport:
    """See `wukong.rdma.transport.Transport`. Its state is public for `wukong.rdma.hot` alone."""

    kind = "shm"
    is_private = True
    frame_bytes = FRAME_BYTES

    def __init__(
        self,
        sock: socket.socket,
        outgoing: mmap.mmap,
        incoming: mmap.mmap,
        outbox: mmap.mmap,
        inbox: mmap.mmap,
        bell_fd: int,
        their_bell_fd: int,
    ) -> None:
        self._sock = sock
        self.outgoing, self.incoming = outgoing, incoming
        self.out_words = memoryview(outgoing).cast("Q")
        self.in_words = memoryview(incoming).cast("Q")
        self._outbox, self._inbox = memoryview(outbox), memoryview(inbox)
        self.outbox_bytes = len(outbox)
        self._bell_fd, self._their_bell_fd = bell_fd, their_bell_fd
        self.fence = threading.Lock()
        self.fence.acquire()
        self.n_posted = self.n_taken = 0
        self.room_until = QUEUE_FRAMES
        """Up to this count frames may be posted without a look at the reader's count."""
        self._is_closed = False
        self._closing = threading.Lock()
        """Held while a descriptor is used that another thread may close; never while waiting."""
        sock.setblocking(False)

    @property
    def outbox(self) -> memoryview:
        """See `Transport.outbox`."""
        return self._outbox

    @property
    def inbox(self) -> memoryview:
        """See `Transport.inbox`."""
        return self._inbox

    # -------------------------------------------------------------- sending

    def post(self, frame: bytes, extents: Sequence[tuple[int, memoryview]] = ()) -> None:
        """See `Transport.post`; the extents are where the peer sees them already."""
        number = self.n_posted
        if number >= self.room_until and not self.has_room():
            self._await_room()
        word, start = SLOTS[number % QUEUE_FRAMES]
        words, fence = self.out_words, self.fence
        words[word + 1] = size = len(frame)
        self.outgoing[start : start + size] = frame
        if not IS_ORDERED:
            fence.release()
            fence.acquire()
        self.n_posted = words[word] = number + 1
        fence.release()
        fence.acquire()
        if words[ASLEEP]:
            self.ring()

    def ring(self) -> None:
        """Wake the reader, who sleeps."""
        self.out_words[ASLEEP] = 0
        with self._closing:
            if self._is_closed:
                raise LeaseLost("the connection is closed")
            try:
                os.eventfd_write(self._their_bell_fd, 1)
            except BlockingIOError:
                pass  # rung more often than it can count
            except OSError as error:
                raise LeaseLost("the connection is closed") from error

    def has_room(self) -> bool:
        """Look at the reader's count: whether another frame may be posted."""
        n_taken = self.out_words[TAKEN]
        if not 0 <= self.n_posted - n_taken <= QUEUE_FRAMES:
            raise FrameError("the peer claims to have read what was not sent")
        self.room_until = n_taken + QUEUE_FRAMES
        return self.n_posted < self.room_until

    def _await_room(self) -> None:
        give_up_at = time.monotonic() + POST_S
        while not self.has_room():
            if self._is_closed or self._is_peer_gone():
                raise LeaseLost("the peer is gone")
            if time.monotonic() > give_up_at:
                raise LeaseLost(f"the peer has taken no frame for {POST_S:g} s")
            time.sleep(0.0005)

    # -------------------------------------------------------------- receiving

    def poll(self) -> bytes | None:
        """See `Transport.poll`."""
        n_taken = self.n_taken
        word, start = SLOTS[n_taken % QUEUE_FRAMES]
        if self.in_words[word] != n_taken + 1:
            if self._is_closed:
                raise LeaseLost("the connection is closed")
            return None
        if not IS_ORDERED:
            self.fence.release()
            self.fence.acquire()
        size = self.in_words[word + 1]
        if size > FRAME_BYTES:
            raise FrameError(f"a frame of {size} bytes in a slot of {SLOT_BYTES}")
        frame = self.incoming[start : start + size]
        self.n_taken = self.in_words[TAKEN] = n_taken + 1
        return frame

    def wait(self, timeout_s: float, spin_s: float) -> bytes | None:
        """See `Transport.wait`."""
        if (frame := self.poll()) is not None:
            return frame
        begun_at = now = time.perf_counter()
        end_at = begun_at + timeout_s
        spin_until = min(end_at, begun_at + spin_s)
        look_at = begun_at + _LOOK_S
        words, word, due = self.in_words, *self._due()
        while now < spin_until:
            for _ in range(_SPINS):
                if words[word] == due:
                    return self.poll()
            os.sched_yield()  # the peer may need this core
            now = time.perf_counter()
            if now >= look_at:
                if self._is_peer_gone():
                    return self._last()
                look_at = now + _LOOK_S
        while now < end_at:
            if not self.arm():
                return self.poll()
            poll = select.poll()
            for fd in self.filenos():
                poll.register(fd, select.POLLIN)
            poll.poll(min(end_at - now, 3600.0) * 1000)
            self.disarm()
            if (frame := self.poll()) is not None:
                return frame
            if self._is_peer_gone():
                return self._last()
            now = time.perf_counter()
        return None

    def _due(self) -> tuple[int, int]:
        """The index of the next frame's number among words, and the number."""
        n_taken = self.n_taken
        return SLOTS[n_taken % QUEUE_FRAMES][0], n_taken + 1

    def _last(self) -> bytes:
        """What the peer wrote before it went."""
        frame = self.poll()
        if frame is None:
            raise LeaseLost("the peer is gone")
        return frame

    def _is_peer_gone(self) -> bool:
        try:
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def filenos(self) -> tuple[int, ...]:
        """See `Transport.filenos`."""
        with self._closing:
            if self._is_closed:
                raise LeaseLost("the connection is closed")
            return self._bell_fd, self._sock.fileno()

    def arm(self) -> bool:
        """See `Transport.arm`."""
        words, word, due = self.in_words, *self._due()
        words[ASLEEP] = 1
        self.fence.release()
        self.fence.acquire()
        if words[word] == due:
            words[ASLEEP] = 0
            return False
        return True

    def disarm(self) -> None:
        """See `Transport.disarm`."""
        self.in_words[ASLEEP] = 0
        with self._closing, contextlib.suppress(OSError):
            if not self._is_closed:
                os.eventfd_read(self._bell_fd)

    def close(self) -> None:
        """See `Transport.close`."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that sleeps on it
            self._sock.close()
            os.close(self._bell_fd)
            os.close(self._their_bell_fd)


def _sealed(size_bytes: int) -> int:
    fd = os.memfd_create("wukong-rdma", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd
