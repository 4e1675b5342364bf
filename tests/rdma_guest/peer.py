"""The other ends of connections over verbs, as processes, each with a way to behave.

Offers are swapped as lines of JSON, which is enough here: greetings are tested where they are used.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time

import numpy as np

from wukong.errors import LeaseLost
from wukong.rdma import verbs
from wukong.rdma.ports import find_ports
from wukong.rdma.transport_verbs import VerbsEnd, VerbsTransport

ARENA_BYTES = 1 << 20
PORT = 7471
WAIT_S = 60.0


def connect(
    sock: socket.socket, bindings: str | None = None, arena_bytes: int = ARENA_BYTES
) -> VerbsTransport:
    """Meet the other end on the socket, and return the transport."""
    end = VerbsEnd(sock, find_ports()[0], arena_bytes, bindings)
    sock.sendall(json.dumps(dict(end.offer)).encode() + b"\n")
    return end.connect(json.loads(read_line(sock)), ())


def read_line(sock: socket.socket) -> str:
    """A line, byte by byte: what follows it is the transport's."""
    line = b""
    while not line.endswith(b"\n"):
        new = sock.recv(1)
        if not new:
            raise LeaseLost("the peer is gone before it has said anything")
        line += new
    return line.decode().strip()


def echo(transport: VerbsTransport) -> None:
    """Send every frame back, until the other end is gone."""
    while True:
        try:
            frame = transport.wait(WAIT_S, 0.0)
            assert frame is not None
            transport.post(frame)
        except LeaseLost:
            return


def total(transport: VerbsTransport) -> None:
    """Answer "offset size" with the sum of these bytes of the inbox, as they lie there."""
    while True:
        try:
            frame = transport.wait(WAIT_S, 0.0)
        except LeaseLost:
            return
        assert frame is not None
        offset, size = map(int, frame.split())
        array = np.frombuffer(transport.inbox, np.uint8, size, offset)
        transport.post(str(int(array.sum(dtype=np.uint64))).encode())


def sleeper(transport: VerbsTransport) -> None:
    """Say that it is there, and read nothing."""
    transport.post(b"here")
    time.sleep(WAIT_S)


def late(transport: VerbsTransport) -> None:
    """Read only after a second, and then everything."""
    time.sleep(1.0)
    echo(transport)


def parting(transport: VerbsTransport) -> None:
    """Send ten frames and go."""
    for number in range(10):
        transport.post(str(number).encode())
    transport.wait(WAIT_S, 0.0)
    transport.close()


def forger(transport: VerbsTransport) -> None:
    """Write with a key that the other end never gave."""
    transport.wait(WAIT_S, 0.0)
    transport._key ^= 0x5A5A
    transport.post(b"forged")
    transport.wait(WAIT_S, 0.0)


def trespasser(transport: VerbsTransport) -> None:
    """Write behind the other end's region."""
    transport.wait(WAIT_S, 0.0)
    transport._peer_slots_at += 1 << 30
    transport.post(b"outside")
    transport.wait(WAIT_S, 0.0)


def liar(transport: VerbsTransport) -> None:
    """Claim a frame that is longer than a slot."""
    transport.wait(WAIT_S, 0.0)
    transport._write(transport.outbox_bytes, 8, transport._peer_slots_at, 1 << 31)
    transport.wait(WAIT_S, 0.0)


def flooder(transport: VerbsTransport) -> None:
    """Post without regard to credits."""
    transport.wait(WAIT_S, 0.0)
    for _ in range(1000):
        transport._credit[0] = transport._n_posted
        transport.post(b"flood")
    transport.wait(WAIT_S, 0.0)


def boaster(transport: VerbsTransport) -> None:
    """Report that it has read more than was ever posted."""
    transport.wait(WAIT_S, 0.0)
    transport._own_credit[0] = 1 << 40
    transport._write(transport._source.size_bytes - 64, 8, transport._peer_credit_at, None)
    transport.post(b"done")
    transport.wait(WAIT_S, 0.0)


def serve() -> None:
    """Start a process for each mode that comes with a socket over descriptor 0; send back its pid.

    A process by fork has nothing to import, which takes seconds on the guest's one processor.
    """
    orders = socket.socket(fileno=0)
    while True:
        order, fds, _, _ = socket.recv_fds(orders, 1024, 1)
        if not order:
            return
        pid = start(order.decode(), socket.socket(fileno=fds[0]))
        orders.sendall(pid.to_bytes(4, "little"))


def listen() -> None:
    """The same for connections from the other host, each of which begins with its order."""
    with socket.create_server((os.environ["GUEST_ADDRESS"], PORT)) as listener:
        while True:
            sock, _ = listener.accept()
            order = read_line(sock)
            if order == "end":
                return
            start(order, sock)


def start(order: str, sock: socket.socket) -> int:
    """Fork a process that behaves as the order says; returns its pid."""
    pid = os.fork()
    if pid:
        sock.close()
        return pid
    mode, bindings, arena_bytes = order.split()
    with contextlib.suppress(LeaseLost):
        transport = connect(sock, bindings, int(arena_bytes))
        globals()[mode](transport)
        transport.close()
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for their exit status
    verbs.find_bindings()
    listen() if sys.argv[1:] == ["listen"] else serve()
