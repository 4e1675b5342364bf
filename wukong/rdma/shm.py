"""Frames over memory that two processes of one node share.

Each end makes what it writes: a queue of frames, an arena, and an eventfd by which it is woken.
All of it is memory without a name (memfd), handed over through the unix socket on which the two
have met: the kernel frees it with the last process that has it, however that ends.

A queue (words of 8 bytes, each in a cache line of its own, written by one side only):

    0     how many frames the reader has taken          (reader)
    64    1: the reader sleeps, ring its eventfd        (reader; the writer clears it)
    4096  slots of SLOT_BYTES: word (turn << 32 | length), then the frame

A slot is valid when its word has the turn that is due, and the word is written last. Processors
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
_SLOTS_AT = 4096
_QUEUE_BYTES = _SLOTS_AT + QUEUE_FRAMES * SLOT_BYTES
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
    frame_bytes = SLOT_BYTES - 8

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
        self._out, self._in = memoryview(outgoing), memoryview(incoming)
        self.out_words = self._out.cast("Q")
        self.in_words = self._in.cast("Q")
        self._outbox, self._inbox = memoryview(outbox), memoryview(inbox)
        self.outbox_bytes = len(outbox)
        self._bell_fd, self._their_bell_fd = bell_fd, their_bell_fd
        self.fence = threading.Lock()
        self.fence.acquire()
        # Slices and indexes of all slots, made once: these are the most frequent operations.
        self.out_slots = [_slot(self._out, number) for number in range(QUEUE_FRAMES)]
        self.in_slots = [_slot(self._in, number) for number in range(QUEUE_FRAMES)]
        self.n_posted = 0
        self.out_turn = 1 << 32
        self.n_room = QUEUE_FRAMES
        """Frames that may be posted before the reader's count must be looked at."""
        self.n_taken = 0
        self.due_slot, self.due_word = self.in_slots[0]
        self.due_turn = 1 << 32
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
        if not self.n_room:
            self._await_room()
        number = self.n_posted
        slot, word = self.out_slots[number % QUEUE_FRAMES]
        size = len(frame)
        slot[:size] = frame
        words, fence = self.out_words, self.fence
        if not IS_ORDERED:
            fence.release()
            fence.acquire()
        words[word] = self.out_turn + size
        self.n_posted = number = number + 1
        if not number % QUEUE_FRAMES:
            self.out_turn += 1 << 32
        self.n_room -= 1
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

    def _await_room(self) -> None:
        give_up_at = time.monotonic() + POST_S
        while True:
            n_under_way = self.n_posted - self.out_words[TAKEN]
            if not 0 <= n_under_way <= QUEUE_FRAMES:
                raise FrameError("the peer claims to have read what was not sent")
            if n_under_way < QUEUE_FRAMES:
                self.n_room = QUEUE_FRAMES - n_under_way
                return
            if self._is_closed or self._is_peer_gone():
                raise LeaseLost("the peer is gone")
            if time.monotonic() > give_up_at:
                raise LeaseLost(f"the peer has taken no frame for {POST_S:g} s")
            time.sleep(0.0005)

    # -------------------------------------------------------------- receiving

    def poll(self) -> bytes | None:
        """See `Transport.poll`."""
        size = self.in_words[self.due_word] - self.due_turn
        if size < 0:
            if self._is_closed:
                raise LeaseLost("the connection is closed")
            return None
        if not IS_ORDERED:
            self.fence.release()
            self.fence.acquire()
        if size > SLOT_BYTES - 8:
            raise FrameError(f"a frame of {size} bytes in a slot of {SLOT_BYTES}")
        frame = self.due_slot[:size].tobytes()
        self.n_taken = n_taken = self.n_taken + 1
        number = n_taken % QUEUE_FRAMES
        self.due_slot, self.due_word = self.in_slots[number]
        if not number:
            self.due_turn += 1 << 32
        self.in_words[TAKEN] = n_taken
        return frame

    def wait(self, timeout_s: float, spin_s: float) -> bytes | None:
        """See `Transport.wait`."""
        if (frame := self.poll()) is not None:
            return frame
        begun_at = now = time.perf_counter()
        end_at = begun_at + timeout_s
        spin_until = min(end_at, begun_at + spin_s)
        look_at = begun_at + _LOOK_S
        words = self.in_words
        due_word, least = self.due_word, self.due_turn
        while now < spin_until:
            for _ in range(_SPINS):
                if words[due_word] >= least:
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
        words = self.in_words
        words[ASLEEP] = 1
        self.fence.release()
        self.fence.acquire()
        if words[self.due_word] >= self.due_turn:
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


def _slot(queue: memoryview, number: int) -> tuple[memoryview, int]:
    """The frame's place in a slot, and the index of the slot's word."""
    at = _SLOTS_AT + number * SLOT_BYTES
    return queue[at + 8 : at + SLOT_BYTES], at // 8


def _sealed(size_bytes: int) -> int:
    fd = os.memfd_create("wukong-rdma", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd
