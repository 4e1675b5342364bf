"""Real Redis servers for tests: started on sockets and ports of their own, stopped by pid."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

READY_S = 15.0


def server_binary() -> str:
    """The path of a server; the test is skipped when there is none, but never in CI."""
    found = shutil.which(os.environ.get("WUKONG_REDIS_SERVER", "redis-server"))
    if found is None:
        assert os.environ.get("CI") != "true", "redis-server is missing: make servers"
        pytest.skip("redis-server is missing: make servers")
    return found


def free_port() -> int:
    """A port that nobody listens to now; above it by 10,000 neither, for the cluster's bus."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            if port > 50000:
                continue
            try:
                bus.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            return port


class Server:
    """One redis-server, with what it keeps in a folder.

    Args:
        folder: short enough for a unix socket's path.
        options: further lines of its configuration.
        port: to listen on; 0: on a unix socket only.
    """

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port
        self.socket = folder / "s"
        self._binary = server_binary()
        lines = [
            f"port {port}",
            "bind 127.0.0.1",
            f"unixsocket {self.socket}",
            f"dir {folder}",
            'save ""',
            *options,
        ]
        (folder / "conf").write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self.socket.unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._binary, str(self.folder / "conf")], stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY_S
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.socket))
                    probe.sendall(b"PING\r\n")
                    if probe.recv(64).startswith((b"+PONG", b"-NOAUTH", b"-NOPERM")):
                        return
                except OSError:
                    pass
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Have it end."""
        self._end(signal.SIGTERM)

    def pause(self, duration_s: float) -> None:
        """Stop it for a while, as a machine that hangs."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(duration_s)
        finally:
            self.process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        if self.process is None:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
