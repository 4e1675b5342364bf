"""PURE: what a queue pair is: two ends that write into each other's memory.

A reliable connection (RC) carries bytes in order and once each, or breaks: the device itself
repeats what is lost, and a write that is never acknowledged ends as an error of the queue pair.
That error, like any other, is `LeaseLost`. Must not know frames, calls or leases.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Protocol

from wukong.errors import FrameError
from wukong.rdma.transport import Offer

SEND_DEPTH = 256
"""Writes under way at once; every device takes more (rxe: 16,384)."""
ACK_TIMEOUT = 14
"""A write is repeated after 4.096 us * 2**14 = 67 ms (InfiniBand specification, 11.6.2)."""
N_RETRIES = 6
"""Of a write that is not acknowledged: a dead peer is known after 0.5 s, on some devices 4 s. The
most that there are is 7, but rxe takes 7 for ever."""
N_RNR_RETRIES = 6
"""Of a peer without a posted receive, which one that counts its credits never is; 7: for ever."""
RNR_TIMER = 12
"""0.64 ms between those."""


@dataclass(frozen=True, slots=True)
class Address:
    """What a queue pair has to know of the one that it is connected with."""

    number: int
    """Of the queue pair; 24 bit."""
    packet: int
    """Number of the first packet that it sends; 24 bit."""
    gid: bytes
    lid: int
    mtu: int
    """As verbs count: 1 is 256 bytes, 5 is 4,096."""


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that the device may use."""

    address: int
    size_bytes: int
    local_key: int
    remote_key: int


class QueuePair(Protocol):
    """A queue pair with a protection domain, completion queues and regions of its own.

    One thread sends (`write`, `n_completed`), one receives. All methods raise LeaseLost when the
    connection, or the device, has failed.
    """

    address: Address
    """Before `connect`: what the peer has to know."""
    event_fd: int
    """Readable after `arm` when a write with an immediate value has come."""
    waits_freely: bool
    """`take_event` may be called before there is one: it waits, and other threads run meanwhile."""
    async_fd: int
    """Readable when something happened to the device, the port or the queue pair."""

    def register(self, memory: mmap.mmap, is_remote_writable: bool) -> Region:
        """Let the device use the memory, and the peer write into it."""
        ...

    def connect(self, peer: Address) -> None:
        """Connect; the peer does the same, and only then either may write."""
        ...

    def write(
        self,
        source: Region,
        offset: int,
        size_bytes: int,
        address: int,
        remote_key: int,
        immediate: int | None,
        count: int | None,
    ) -> None:
        """Begin to copy a piece of the region to the peer's address.

        Args:
            immediate: 32 bit which the peer's `arrivals` returns when all is there; None: nothing
                tells the peer.
            count: returned by `n_completed` once this write and those before it are done.
        """
        ...

    def n_completed(self) -> int:
        """The highest `count` whose write is done."""
        ...

    def receive(self, n: int) -> None:
        """Allow the peer n more writes with an immediate value."""
        ...

    def arrivals(self) -> list[int]:
        """Immediate values that have come, in order."""
        ...

    def arm(self) -> None:
        """Have `event_fd` tell of the next arrival, not of those that are there."""
        ...

    def take_event(self) -> None:
        """Take what `event_fd` has told of; unless `waits_freely`, it must be readable. Returns
        without when a signal has come."""
        ...

    def failure(self) -> str:
        """Why the connection has failed, as far as the device says."""
        ...

    def stop(self) -> None:
        """Put the queue pair into its error state: neither end can use the connection. A thread
        that waits for `event_fd` wakes up."""
        ...

    def close(self) -> None:
        """Free everything; no other method may be running. Regions are withdrawn first."""
        ...


def make_offer(address: Address, inbox: Region, arena_bytes: int) -> Offer:
    """What the peer has to know: the queue pair, and where it may write."""
    return {
        "number": address.number,
        "packet": address.packet,
        "gid": address.gid.hex(),
        "lid": address.lid,
        "mtu": address.mtu,
        "address": inbox.address,
        "key": inbox.remote_key,
        "arena_bytes": arena_bytes,
    }


def read_offer(offer: Offer) -> tuple[Address, int, int, int]:
    """What the peer offers: its address, the size of its inbox, and where that is, with its key.

    Raises:
        FrameError: it makes no sense.
    """
    limits = {
        "number": 1 << 24,
        "packet": 1 << 24,
        "lid": 1 << 16,
        "mtu": 6,
        "address": 1 << 64,
        "key": 1 << 32,
        "arena_bytes": 1 << 48,
    }
    numbers = {}
    for name, limit in limits.items():
        value = offer.get(name)
        if type(value) is not int or not 0 <= value < limit:
            raise FrameError(f"the peer offers {value!r} as its {name}")
        numbers[name] = value
    try:
        gid = bytes.fromhex(str(offer.get("gid")))
    except ValueError:
        gid = b""
    if len(gid) != 16 or not numbers["mtu"] or not numbers["arena_bytes"]:
        raise FrameError(f"the peer offers an address that is none: {dict(offer)}")
    address = Address(numbers["number"], numbers["packet"], gid, numbers["lid"], numbers["mtu"])
    return address, numbers["arena_bytes"], numbers["address"], numbers["key"]
