"""A proxy in front of an S3 service that breaks what a test wants broken.

Each request is shown to `fault`, which names what to do to it: nothing (""), or

    "reset"      the connection is reset before the service hears of the request
    "unheard"    the service does it, and the connection is reset instead of the reply
    "slow down"  503 SlowDown, as S3 says when it is asked too much
    "truncate"   half of the reply's body, then the end of the connection
    "deny"       403 AccessDenied
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

Fault = Callable[[str, str], str]
"""Takes the method and the path with its query."""

_REFUSALS = {"slow down": (503, "SlowDown"), "deny": (403, "AccessDenied")}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Clients that went away are what these tests are about."""


class FaultyProxy:
    """See the module; counts requests by "METHOD", and what it broke by the fault's name."""

    def __init__(self, target: str) -> None:
        self.fault: Fault = lambda method, path: ""
        self.seen: list[tuple[str, str]] = []
        self.broken: list[str] = []
        self.n_at_once = 0
        """The most requests that were under way at any moment."""
        self._n_now = 0
        self._lock = threading.Lock()
        place = urlsplit(target)
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle_one(self) -> None:
                proxy._handle(self, place.hostname or "", place.port or 80)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _handle(self, handler: http.server.BaseHTTPRequestHandler, host: str, port: int) -> None:
        n_bytes = int(handler.headers.get("Content-Length") or 0)
        if handler.headers.get("Expect", "").lower() == "100-continue":
            pass  # the handler's base class has said "continue" already
        body = handler.rfile.read(n_bytes)
        with self._lock:
            self.seen.append((handler.command, handler.path))
            fault = self.fault(handler.command, handler.path)
            if fault:
                self.broken.append(fault)
            self._n_now += 1
            self.n_at_once = max(self.n_at_once, self._n_now)
        try:
            self._answer(handler, host, port, body, fault)
        finally:
            with self._lock:
                self._n_now -= 1

    def _answer(
        self,
        handler: http.server.BaseHTTPRequestHandler,
        host: str,
        port: int,
        body: bytes,
        fault: str,
    ) -> None:
        if fault == "reset":
            return _reset(handler)
        if fault in _REFUSALS:
            status, code = _REFUSALS[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
            return _reply(handler, status, {"Content-Type": "application/xml"}, text.encode())
        there = http.client.HTTPConnection(host, port, timeout=30)
        with contextlib.closing(there):
            there.request(handler.command, handler.path, body, dict(handler.headers.items()))
            reply = there.getresponse()
            content = reply.read()
            headers = {k: v for k, v in reply.getheaders() if k.lower() not in _HOP}
        if fault == "unheard":
            return _reset(handler)
        if handler.command == "HEAD":
            headers["Content-Length"] = reply.getheader("Content-Length") or "0"
        _reply(handler, reply.status, headers, content, fault == "truncate")

    def start_again(self) -> None:
        """Break nothing, and forget what was seen."""
        self.fault = lambda method, path: ""
        self.seen.clear()
        self.broken.clear()
        self.n_at_once = 0

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


_HOP = {"connection", "transfer-encoding", "content-length", "date", "server", "keep-alive"}


def _reply(
    handler: http.server.BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    content: bytes,
    is_truncated: bool = False,
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if "Content-Length" not in headers:
        handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2] if is_truncated else content)
    handler.wfile.flush()
    if is_truncated:
        handler.close_connection = True


def _reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    """End the connection so that the other side reads ECONNRESET."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    handler.connection.close()


@contextlib.contextmanager
def start_proxy(target: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


def every(n: int, fault: str, method: str = "") -> Fault:
    """Break every n-th request (of one method, if it is named)."""
    counted = iter(range(1, 1 << 62))

    def decide(found: str, path: str) -> str:
        if method and found != method:
            return ""
        return fault if next(counted) % n == 0 else ""

    return decide
