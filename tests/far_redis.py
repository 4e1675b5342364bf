"""A Redis that is far away: a socket before a real server, which holds up what it passes on."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

TOGETHER_S = 0.002
"""Bytes that follow each other so closely travel together."""


@contextlib.contextmanager
def far_away(port: int, latency_s: float) -> Iterator[int]:
    """The port of a server on this machine that answers later by a latency."""
    door = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_open, args=(door, port, latency_s), daemon=True).start()
    try:
        yield door.getsockname()[1]
    finally:
        door.shutdown(socket.SHUT_RDWR)
        door.close()


def _open(door: socket.socket, port: int, latency_s: float) -> None:
    while True:
        try:
            near, _ = door.accept()
            far = socket.create_connection(("127.0.0.1", port))
        except OSError:
            return
        for line in (near, far):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for pair in ((near, far, latency_s), (far, near, 0.0)):
            threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket, latency_s: float) -> None:
    passed_at = 0.0
    with source, sink, contextlib.suppress(OSError):
        while found := source.recv(1 << 20):
            if time.monotonic() - passed_at > TOGETHER_S:
                time.sleep(latency_s)
            sink.sendall(found)
            passed_at = time.monotonic()
