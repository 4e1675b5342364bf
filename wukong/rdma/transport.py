"""PURE: what every transport of frames is: shared memory, TCP, verbs.

Every connection begins with a stream socket, over which both ends prove that they belong to the
same lease. Then each end makes a `TransportEnd` of the same kind, they swap their offers over the
socket, and `connect` makes a `Transport` of the end. The socket stays open under every transport:
its end is how the death of the peer is noticed.

    client                                     executor
      | --- hello: lease, epoch, nonce, MAC ---> |       (`wukong.rdma.greeting`)
      | <-- welcome: nonce, MAC ---------------- |
      | <-- offer (and descriptors, for shm) --- |
      | --- offer -----------------------------> |
      connect()                            connect()

A transport has an *outbox* and an *inbox* arena. The sender decides the offset; the transport sees
to it that the bytes are at the same offset of the peer's inbox before the peer sees the frame:

    shm     outbox and the peer's inbox are the same memory: there is nothing to do
    tcp     there is no outbox; buffers go from where they lie to the peer's inbox
    verbs   the outbox is registered memory; RDMA_WRITE from there to the peer's inbox, then the
            frame by RDMA_WRITE_WITH_IMM (or WRITE and SEND)

A transport knows neither calls nor leases. Frames arrive in order, once each, or not at all.
Both arenas and every queue are bounded; `post` waits for room in the peer's queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

Offer = Mapping[str, "str | int | float | list[int]"]
"""What one end tells the other, as JSON: addresses, keys, sizes."""


class Transport(Protocol):
    """One end of an established connection.

    `post` may be called by several threads in turn (the caller locks), while one thread reads.
    """

    kind: str
    """"shm", "tcp" or "verbs"."""
    is_private: bool
    """Nobody but the two ends can write into it, so its frames need no MAC."""
    frame_bytes: int
    """Longest frame that `post` takes."""
    outbox_bytes: int
    """Size of the peer's inbox, in which this end allocates."""

    @property
    def outbox(self) -> memoryview | None:
        """Memory (writable) in which buffers lie that are posted; None: they may lie anywhere."""
        ...

    @property
    def inbox(self) -> memoryview:
        """Memory (writable) in which the peer's buffers arrive. Stays mapped while it is viewed."""
        ...

    def post(self, frame: bytes, extents: Sequence[tuple[int, memoryview]] = ()) -> None:
        """Send buffers to offsets of the peer's inbox, and then a frame.

        Args:
            frame: at most `frame_bytes`.
            extents: (offset, buffer) each; where there is an outbox, the buffer is
                `outbox[offset : offset + n]`. The buffers must not change until the frame's reply.
        Raises:
            LeaseLost: the peer is gone. Never waits longer than `POST_S` for room.
        """
        ...

    def poll(self) -> bytes | None:
        """The next frame, copied out of memory that the peer can write; None: none is there.

        Raises:
            LeaseLost: the peer is gone, and all that it sent has been read.
            FrameError: the peer broke the transport's own rules.
        """
        ...

    def wait(self, timeout_s: float, spin_s: float) -> bytes | None:
        """As `poll`, waiting: hot (polling) for `spin_s`, and then asleep. None: the time is
        up, or `POST_S` have passed; call again.

        Raises: as `poll`.
        """
        ...

    def filenos(self) -> tuple[int, ...]:
        """Descriptors that become readable after `arm`, when a frame comes or the peer dies."""
        ...

    def arm(self) -> bool:
        """Have the descriptors tell of the next frame. False: one is there already, so poll."""
        ...

    def disarm(self) -> None:
        """Spare the peer the cost of waking this end, which polls; clears what has been told."""
        ...

    def close(self) -> None:
        """Cut the connection: the peer's `poll` raises `LeaseLost`. Idempotent.

        Arrays that view the inbox stay valid.
        """
        ...


class TransportEnd(Protocol):
    """One end of a connection that is about to be made."""

    offer: Offer
    """What the other end has to know."""
    fds: Sequence[int]
    """Descriptors that go with the offer (shm only); owned by this end until `connect`."""

    def connect(self, offer: Offer, fds: Sequence[int]) -> Transport:
        """Finish, with what the other end has offered; owns `fds`.

        Raises:
            LeaseLost: the peer is gone.
            FrameError: its offer makes no sense.
        """
        ...

    def close(self) -> None:
        """Give up. Idempotent; nothing after `connect`."""
        ...


POST_S = 30.0
"""A peer that takes no frame for so long, while its socket lives, counts as gone. Callers keep
fewer frames under way than a queue holds (`QUEUE_FRAMES`), so that a call that runs long is no such
peer."""
QUEUE_FRAMES = 64
"""Frames that a transport holds, for each direction, without the peer reading any."""
