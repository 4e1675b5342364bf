"""Frames over RDMA: each end writes into the memory of the other.

Memory of an end, registered for its connection only, in a protection domain of its own:

    inbox    | arena: the peer's buffers | slots: the peer's frames | the peer's count of credits |
               remotely writable
    outbox   | arena: buffers to send    | slots: frames to send    | own count of credits        |
               seen by the own device only; both arenas' offsets are the peer's inbox's

A buffer is written in chunks, and then the frame into the next slot, with its length as immediate
value: the connection keeps the order, so whoever sees the frame has its buffers. The peer counts
the frames that it has copied out, and writes that count back every `CREDIT_FRAMES`; a sender that
finds no free slot looks there. So the peer always has a receive posted, and "receiver not ready"
is an error, not a way of waiting.

The stream socket, over which the ends have met, stays open: its end says that the peer has died,
which an idle queue pair would never notice.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence

from wukong.errors import FrameError, LeaseLost
from wukong.rdma.ports import DEVICES, Port, find_iwarp, find_ports
from wukong.rdma.queue_pairs import SEND_DEPTH, QueuePair, Region, make_offer, read_offer
from wukong.rdma.transport import POST_S, QUEUE_FRAMES, Offer
from wukong.rdma.verbs import NO_BINDINGS, find_bindings, open_pair

FRAME_BYTES = 16_384
"""Of a slot. The time of a write hardly depends on its size up to here."""
CREDIT_FRAMES = 16
"""Frames between two reports of what has been read."""
N_SLOTS = QUEUE_FRAMES + CREDIT_FRAMES
"""As many frames as are promised, whatever the peer has read and not yet reported."""
CREDIT_BYTES = 64
CHUNK_BYTES = 1 << 20
"""Of one write. A device may take 1 GB, or 8 MB (rxe); smaller ones share the way more fairly."""
SIGNAL_WRITES = 32
"""Writes between two of which the device reports the end: the fewer, the cheaper."""
SPIN_POLLS = 64
"""Polls between two looks at the clock and at whether the peer lives, some 0.1 ms."""
N_PROCESSORS = os.cpu_count() or 1
LOOK_POLLS = 16
"""Empty polls between two looks at whether the peer lives."""
HANDSHAKE_S = 15.0
READY = b"V"
FIRST_NAP_S = 20e-6
LONGEST_NAP_S = 1e-3
LONGEST_SLEEP_S = 3600.0


def missing() -> str:
    """What keeps this machine from using verbs, and how to get it; empty: nothing."""
    if not DEVICES.is_dir() or not any(DEVICES.iterdir()):
        return "no RDMA device (on Ethernet: rdma link add rxe0 type rxe netdev DEVICE)"
    if not find_ports():
        if iwarp := find_iwarp():
            return (
                f"{', '.join(iwarp)}: iWARP, which is not spoken here, for it connects by the RDMA"
                " connection manager only; no port of InfiniBand or RoCE is up (see: rdma link)"
            )
        return "no RDMA device has a port that is up and speaks InfiniBand or RoCE (see: rdma link)"
    return "" if find_bindings() else NO_BINDINGS


class VerbsEnd:
    """One end of a connection over verbs that is about to be made.

    Args:
        sock: the stream socket of the connection; the transport keeps it.
        port: one of `find_ports()`.
        arena_bytes: of the arena into which the peer writes buffers; a multiple of the page size.
        bindings: see `open_pair`.
    Raises:
        LeaseRefused: the device gives no queue pair, or no region of this size.
    Cost: pins the inbox in memory: 0.1 ms a megabyte.
    """

    fds: Sequence[int] = ()

    def __init__(
        self, sock: socket.socket, port: Port, arena_bytes: int, bindings: str | None = None
    ) -> None:
        self._sock = sock
        self._pair: QueuePair | None = open_pair(port, N_SLOTS + CREDIT_FRAMES, bindings)
        try:
            self._inbox = _memory(arena_bytes)
            self._region = self._pair.register(self._inbox, is_remote_writable=True)
        except BaseException:
            self.close()
            raise
        self._arena_bytes = arena_bytes
        self.offer: Offer = make_offer(self._pair.address, self._region, arena_bytes)

    def connect(self, offer: Offer, fds: Sequence[int]) -> VerbsTransport:
        """Connect; returns when the peer has connected too.

        Raises:
            LeaseLost: the peer is gone, or there is no way to it.
            FrameError: its offer makes no sense.
        """
        assert self._pair is not None
        for fd in fds:
            os.close(fd)
        try:
            peer, arena_bytes, inbox_at, key = read_offer(offer)
            # A peer that claims a huge inbox shall not make this end pin as much for its outbox.
            outbox_bytes = min(arena_bytes, self._arena_bytes)
            outbox = _memory(outbox_bytes)
            source = self._pair.register(outbox, is_remote_writable=False)
            self._pair.receive(N_SLOTS + CREDIT_FRAMES)
            self._pair.connect(peer)
            _meet(self._sock)
        except BaseException:
            self.close()
            raise
        pair, self._pair = self._pair, None
        return VerbsTransport(
            pair, self._sock, self._inbox, outbox, source, inbox_at, key, arena_bytes
        )

    def close(self) -> None:
        """Free the queue pair, if no transport has it. The socket stays open."""
        if self._pair is not None:
            self._pair.close()
            self._pair = None


class VerbsTransport:
    """An established connection; made by `VerbsEnd.connect`."""

    kind = "verbs"
    is_private = False
    """Whoever can forge packets of the network can write too: frames carry MACs."""
    frame_bytes = FRAME_BYTES

    def __init__(
        self,
        pair: QueuePair,
        sock: socket.socket,
        inbox: mmap.mmap,
        outbox: mmap.mmap,
        source: Region,
        inbox_at: int,
        key: int,
        peer_arena_bytes: int,
    ) -> None:
        self._pair = pair
        sock.setblocking(False)
        self._sock = sock
        self._source = source
        self._key = key
        self._lost = ""
        self._is_closed = False
        own_bytes = len(inbox) - N_SLOTS * FRAME_BYTES - CREDIT_BYTES
        self.inbox = memoryview(inbox)[:own_bytes]
        self._in_slots = memoryview(inbox)[own_bytes:-CREDIT_BYTES]
        self._credit = memoryview(inbox)[-CREDIT_BYTES:].cast("Q")
        self.outbox_bytes = len(outbox) - N_SLOTS * FRAME_BYTES - CREDIT_BYTES
        self.outbox = memoryview(outbox)[: self.outbox_bytes]
        self._out_slots = memoryview(outbox)[self.outbox_bytes : -CREDIT_BYTES]
        self._own_credit = memoryview(outbox)[-CREDIT_BYTES:].cast("Q")
        self._peer_arena_at = inbox_at
        self._peer_slots_at = inbox_at + peer_arena_bytes
        self._peer_credit_at = self._peer_slots_at + N_SLOTS * FRAME_BYTES
        # One thread posts while another reads, and both write.
        self._writing = threading.Lock()
        self._n_written = self._n_done = 0
        self._n_posted = 0
        # Held while completions are read, so that nothing is freed under a reader.
        self._reading = threading.Lock()
        self._arrived: deque[int] = deque()
        self._n_read = 0
        self._n_empty = 0
        self._is_armed = False
        self.peeked: bytes | None = None
        """A frame that was looked at, and is still the next one."""
        self._watcher: threading.Thread | None = None
        self._gone = ""
        """Why the peer is gone, as the watcher has found."""
        # Of the peer's end, and of the device's errors; and those together with arrivals.
        self._ends = select.epoll()
        self._events = select.epoll()
        for fd in (pair.async_fd, sock.fileno()):
            self._ends.register(fd, select.EPOLLIN)
            self._events.register(fd, select.EPOLLIN)
        self._events.register(pair.event_fd, select.EPOLLIN)

    # -------------------------------------------------------------- sending

    def post(self, frame: bytes, extents: Sequence[tuple[int, memoryview]] = ()) -> None:
        """Write the buffers into the peer's inbox, and then the frame."""
        size = len(frame)
        if not 0 < size <= FRAME_BYTES:
            raise FrameError(f"a frame of {size} bytes does not fit into {FRAME_BYTES}")
        if not 0 <= self._n_posted - self._credit[0] < N_SLOTS:
            self._wait_slot()
        for offset, buffer in extents:
            for start in range(offset, offset + buffer.nbytes, CHUNK_BYTES):
                chunk = min(CHUNK_BYTES, offset + buffer.nbytes - start)
                self._write(start, chunk, self._peer_arena_at + start, None)
        start = self._n_posted % N_SLOTS * FRAME_BYTES
        self._out_slots[start : start + size] = frame
        self._write(self.outbox_bytes + start, size, self._peer_slots_at + start, size)
        self._n_posted += 1

    def _write(self, offset: int, size_bytes: int, address: int, immediate: int | None) -> None:
        deadline = 0.0
        while True:
            with self._writing:
                self._check()
                if self._n_written - self._n_done >= SEND_DEPTH - 1:
                    self._n_done = self._pair.n_completed()
                if self._n_written - self._n_done < SEND_DEPTH - 1:
                    self._n_written += 1
                    count = None if self._n_written % SIGNAL_WRITES else self._n_written
                    self._pair.write(
                        self._source, offset, size_bytes, address, self._key, immediate, count
                    )
                    return
            deadline = self._nap(deadline, FIRST_NAP_S)

    def _wait_slot(self) -> None:
        """Wait until the peer has read a frame, and said so."""
        deadline, nap_s = 0.0, FIRST_NAP_S
        while True:
            n_credited = self._credit[0]
            if n_credited > self._n_posted:
                raise FrameError(f"the peer has read {n_credited} of {self._n_posted} frames")
            if self._n_posted - n_credited < N_SLOTS:
                return
            deadline = self._nap(deadline, nap_s)
            nap_s = min(2 * nap_s, LONGEST_NAP_S)

    def _nap(self, deadline: float, nap_s: float) -> float:
        """Sleep while the peer lives; returns the deadline, which the first call sets."""
        now = time.monotonic()
        if deadline and now > deadline:
            raise self._lose(f"the peer has taken no frame for {POST_S} s")
        self._check()
        if reason := self._peer_gone():
            raise self._lose(reason)
        time.sleep(nap_s)
        return deadline or now + POST_S

    # -------------------------------------------------------------- receiving

    def poll(self) -> bytes | None:
        """The next frame, copied out of the inbox; None: there is none."""
        with self._reading:
            frame = self._take()
            if frame is None:
                # Whoever polls all the time shall not ask the kernel each time.
                self._n_empty = (self._n_empty + 1) % LOOK_POLLS
                if not self._n_empty and self._is_over():
                    frame = self._take()
            return frame

    def _is_over(self) -> bool:
        """False: the peer lives. True: it does not, but what it sent has arrived.

        Raises:
            LeaseLost: it does not, and all that it sent has been read.
        """
        reason = self._peer_gone()
        if reason and not self._arrived:
            with contextlib.suppress(LeaseLost):
                self._arrived.extend(self._pair.arrivals())
            if not self._arrived:
                raise self._lose(reason)
        return bool(reason)

    def _take(self) -> bytes | None:
        if self.peeked is not None:
            frame, self.peeked = self.peeked, None
            return frame
        if not self._arrived:
            self._check()
            try:
                self._arrived.extend(self._pair.arrivals())
            except LeaseLost as error:
                raise self._lose(self._gone or str(error)) from error
            if not self._arrived:
                return None
        size = self._arrived.popleft()
        if not 0 < size <= FRAME_BYTES:
            raise FrameError(f"the peer claims a frame of {size} bytes in {FRAME_BYTES}")
        start = self._n_read % N_SLOTS * FRAME_BYTES
        frame = bytes(self._in_slots[start : start + size])
        self._n_read += 1
        if not self._n_read % CREDIT_FRAMES:
            self._give_credit()
        return frame

    def _give_credit(self) -> None:
        # What has come is read even when the peer takes nothing any more.
        with contextlib.suppress(LeaseLost):
            self._pair.receive(CREDIT_FRAMES)
            self._own_credit[0] = self._n_read
            at = self.outbox_bytes + N_SLOTS * FRAME_BYTES
            self._write(at, 8, self._peer_credit_at, None)

    def wait(self, timeout_s: float, spin_s: float) -> bytes | None:
        """The next frame: polling for `spin_s`, and then asleep until `timeout_s` is over."""
        with self._reading:
            if (frame := self._take()) is not None:
                return frame
            deadline = time.monotonic() + timeout_s
            frame = self._spin(min(spin_s, timeout_s))
            while frame is None:
                self._arm()
                if (frame := self._take()) is None:
                    left_s = min(deadline - time.monotonic(), LONGEST_SLEEP_S)
                    if left_s <= 0:
                        return None
                    self._hear(self._events.poll(left_s))
                    frame = self._take()
            return frame

    def peek(self, spin_s: float) -> bytes:
        """As `wait`, for as long as the peer lives; the frame stays the next one (`peeked`).

        Raises: as `wait`.
        Cost: no look at a clock, and asleep one call of the system where the bindings allow it. A
            guest kernel takes 25 us and more for each, a sixth of a bare round trip.
        """
        with self._reading:
            frame = self._take() or self._spin(spin_s)
            while frame is None:
                if not self._is_armed:
                    self._arm()
                elif self._pair.waits_freely:
                    self._watch()
                    self._take_event()
                else:
                    self._hear(self._events.poll())
                frame = self._take()
            self.peeked = frame
            return frame

    def _spin(self, spin_s: float) -> bytes | None:
        """Poll for so long. On one processor that would keep the peer, or the device's software,
        from running."""
        if N_PROCESSORS == 1 or not spin_s:
            return None
        until = time.monotonic() + spin_s
        while True:
            for _ in range(SPIN_POLLS):
                if (frame := self._take()) is not None:
                    return frame
            if self._is_over():
                return self._take()
            if time.monotonic() > until:
                return None

    def _watch(self) -> None:
        """Have a thread look whether the peer lives, while the reader waits for its frames only."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._await_end, daemon=True)
            self._watcher.start()

    def _await_end(self) -> None:
        while not (self._lost or self._gone):
            if self._ends.poll():
                self._gone = self._peer_gone()
        self._pair.stop()  # by which the reader wakes up

    def _hear(self, told: list[tuple[int, int]]) -> None:
        """Take what the descriptors tell of."""
        for fd, _ in told:
            if fd == self._pair.event_fd:
                self._take_event()
            else:
                self._is_over()

    def _take_event(self) -> None:
        self._is_armed = False
        self._pair.take_event()

    def filenos(self) -> tuple[int, ...]:
        """One that stands for the completion channel, the device's events and the socket."""
        return (self._events.fileno(),)

    def arm(self) -> bool:
        """Have `filenos` tell of the next frame."""
        with self._reading:
            self._check()
            if told := self._events.poll(0):
                self._hear(told)
            self._arm()
            if not self._arrived:
                self._arrived.extend(self._pair.arrivals())
            return not self._arrived and self.peeked is None

    def _arm(self) -> None:
        if not self._is_armed:
            self._pair.arm()
            self._is_armed = True

    def disarm(self) -> None:
        """Nothing: an event costs the peer nothing, and the next `arm` takes it."""

    # -------------------------------------------------------------- the end

    def _check(self) -> None:
        if self._lost:
            raise LeaseLost(self._lost)

    def _lose(self, reason: str) -> LeaseLost:
        self._lost = self._lost or reason
        return LeaseLost(self._lost)

    def _peer_gone(self) -> str:
        """Why the peer cannot be reached any more; empty: it can."""
        for fd, _ in self._ends.poll(0):
            if fd == self._pair.async_fd:
                # A port that goes down, a device that is taken away, a refused access.
                return f"the device reports an error; {self._pair.failure()}"
            if fd == self._sock.fileno():
                try:
                    if self._sock.recv(1):
                        return "the peer talks on the socket of an RDMA connection"
                except (BlockingIOError, ssl.SSLWantReadError):
                    continue
                except OSError as error:
                    return f"the peer is gone: {error}"
                return "the peer has closed the connection, or died"
        return ""

    def close(self) -> None:
        """Stop the queue pair, withdraw its regions, and free it. Views of the inbox stay valid."""
        self._lost = self._lost or "this end has closed the connection"
        if self._is_closed:
            return
        self._is_closed = True
        # Whoever waits wakes up by this, and gives the locks back.
        self._pair.stop()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._watcher is not None:
            self._watcher.join()
        with self._reading, self._writing:
            self._events.close()
            self._ends.close()
            self._pair.close()
            self._sock.close()


def _memory(arena_bytes: int) -> mmap.mmap:
    """An arena, the slots behind it, and a count. Shared, so that a fork copies none of it."""
    return mmap.mmap(-1, arena_bytes + N_SLOTS * FRAME_BYTES + CREDIT_BYTES)


def _meet(sock: socket.socket) -> None:
    """Wait until the peer's queue pair is connected too: what came before it would be lost, and
    repeated only after a time.

    Raises:
        LeaseLost: the peer is gone.
    """
    try:
        sock.settimeout(HANDSHAKE_S)
        sock.sendall(READY)
        answer = sock.recv(1)
    except OSError as error:
        raise LeaseLost(f"the peer did not connect: {error}") from error
    if answer != READY:
        raise LeaseLost("the peer did not connect: it is gone")
