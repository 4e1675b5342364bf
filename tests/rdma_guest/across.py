"""Tests of verbs between two hosts, run in one of two guests by `python -m tests.rdma_guest`.

The other host runs `python -m tests.rdma_guest.peer listen`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.rdma_guest.peer import ARENA_BYTES, PORT, connect
from wukong.errors import LeaseLost
from wukong.rdma.transport_verbs import VerbsTransport

WAIT_S = 60.0
NOTICED_S = 15.0


def reach() -> socket.socket:
    """A connection to the other host, which may still be starting."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return socket.create_connection((os.environ["PEER_ADDRESS"], PORT), WAIT_S)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def other_host() -> Iterator[None]:
    yield
    with reach() as sock:
        sock.sendall(b"end\n")


@contextlib.contextmanager
def meeting(
    mode: str, bindings: str = "ibverbs", arena_bytes: int = ARENA_BYTES
) -> Iterator[VerbsTransport]:
    sock = reach()
    sock.sendall(f"{mode} {bindings} {arena_bytes}\n".encode())
    transport = connect(sock, bindings, arena_bytes)
    try:
        yield transport
    finally:
        transport.close()


@contextlib.contextmanager
def lossy(percent: int) -> Iterator[None]:
    """Lose so many of the packets that this host sends."""
    rule = ["dev", "vec0", "root", "netem", "loss", f"{percent}%"]
    subprocess.run(["tc", "qdisc", "add", *rule], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", *rule], check=True)


def call(transport: VerbsTransport, frame: bytes) -> bytes | None:
    transport.post(frame)
    return transport.wait(WAIT_S, 0.0)


@pytest.mark.parametrize("bindings", ["ibverbs", "pyverbs"])
def test_a_thousand_calls_to_another_host_come_back_in_order(bindings: str) -> None:
    with meeting("echo", bindings) as transport:
        for number in range(1000):
            frame = b"%d " % number + b"x" * (number % 1500)
            assert call(transport, frame) == frame


def test_a_large_array_arrives_at_another_host() -> None:
    size = 32 << 20
    with meeting("total", arena_bytes=size) as transport:
        array = np.frombuffer(transport.outbox, np.uint8)
        array[:] = np.random.default_rng(1).integers(0, 256, size, np.uint8)
        assert transport.outbox is not None
        transport.post(b"0 %d" % size, [(0, transport.outbox)])
        assert transport.wait(WAIT_S, 0.0) == b"%d" % int(array.sum(dtype=np.uint64))


def test_lost_packets_are_sent_again_by_the_device() -> None:
    with meeting("echo") as transport, lossy(3):
        for number in range(100):
            frame = b"%d " % number + b"x" * 3000
            assert call(transport, frame) == frame


def test_a_host_that_cannot_be_reached_is_noticed_and_found_again() -> None:
    with meeting("echo") as transport:
        assert call(transport, b"there") == b"there"
        with lossy(100):
            started = time.monotonic()
            transport.post(b"anybody there?")
            # Nothing arrives, no end of the socket either: the device tells, which repeats in vain.
            with pytest.raises(LeaseLost, match="retry"):
                transport.wait(WAIT_S, 0.0)
            assert time.monotonic() - started < NOTICED_S
    with meeting("echo") as transport:
        assert call(transport, b"back") == b"back"
