"""Clients that hold a valid lease, or the secret, and lie: they harm nobody but themselves."""

import contextlib
import itertools
import json
import os
import random
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_rdma_leases import Client, double, n_free, wait_until
from wukong.errors import FrameError, LeaseError, LeaseLost, SecurityError
from wukong.rdma.agent_main import AgentProcess
from wukong.rdma.client import lease
from wukong.rdma.frames import HEAD, LENT, MAC_BYTES, MAGIC, Kind
from wukong.rdma.greeting import Parley, Talk
from wukong.rdma.lease import Ask, LeaseId, Request
from wukong.rdma.lease_grants import Asked, Grants
from wukong.rdma.lease_wire import from_json, line_key, to_json
from wukong.rdma.line import Line
from wukong.rdma.registry import read_registrations
from wukong.rdma.shm import SLOT_BYTES, SLOTS, SharedArena, ShmEnd, ShmTransport
from wukong.rdma.tcp import TcpEnd
from wukong.rdma.transport import QUEUE_FRAMES

ARENA_BYTES = 1 << 16
BOUNDS = (0, 1, 2, 63, 64, 4096, *(1 << n for n in (15, 16, 31, 32, 62)), (1 << 63) - 1, 1 << 63)
WORDS = (*BOUNDS, (1 << 64) - 1, ARENA_BYTES - 1, ARENA_BYTES, LENT | ARENA_BYTES, LENT)

# ------------------------------------------------------------------ messages, without any I/O

NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**400), st.booleans())
PLAIN = st.one_of(NUMBERS, st.none(), st.text(max_size=40), st.sampled_from(["00" * 16, "nonce"]))
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["n_executors", "memory_bytes", "ttl_s", "x"]), inner),
    ),
    max_leaves=6,
)
REQUESTS = st.fixed_dictionaries(
    {"n_executors": NUMBERS, "memory_bytes": NUMBERS, "ttl_s": PLAIN, "is_hot": ANYTHING}
)
MESSAGES = st.fixed_dictionaries(
    {"kind": st.one_of(st.sampled_from(["Ask", "Renew", "Release", "Ended"]), ANYTHING)},
    optional={
        "nonce": ANYTHING,
        "request": st.one_of(REQUESTS, ANYTHING),
        "lease": ANYTHING,
        "epoch": ANYTHING,
        "key": ANYTHING,
        "serial": ANYTHING,
    },
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=4))
def test_any_messages_are_answered_or_refused(messages: list[dict[str, Any]]) -> None:
    grants = Grants((0, 1), 1 << 30, 1, lambda: LeaseId("0" * 32), lambda lease, epoch: b"key")
    for number, message in enumerate(messages):
        try:
            event = Asked(number, from_json(message, of_client=True))
        except FrameError:
            continue
        for action in grants.handle(event, 1.0):
            if hasattr(action, "message"):
                json.dumps(to_json(action.message))
        grants.check()


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 100_000, b"7", b"", b"null"],
    ids=["nested lists", "nested objects", "no text", "long number", "number", "nothing", "null"],
)
def test_a_signed_message_that_is_no_object_is_refused(body: bytes) -> None:
    client, server = Parley(b"key", is_server=False), Parley(b"key", is_server=True)
    client.feed(bytes(server.outgoing))
    server.outgoing.clear()
    server.feed(bytes(client.outgoing))
    client.feed(bytes(server.outgoing))
    mac = client._mac(False, 0, body)
    with pytest.raises(FrameError):
        server.feed(struct.pack("<I", len(body)) + mac + body)


# ------------------------------------------------------------------ a real agent


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    directory = tmp_path_factory.mktemp("rdma") / "agents"
    arguments = ["--host", "127.0.0.1", "--preload", "numpy"]
    with AgentProcess(directory, 2, arguments) as running:
        yield running


@pytest.fixture
def honest(agent: AgentProcess) -> Iterator[Any]:
    """Somebody else's lease, which must be as it was."""
    with lease(1, directory=agent.directory) as executors:
        pid = executors.call(os.getpid)
        yield executors
        assert executors.call(os.getpid) == pid
    wait_until(lambda: n_free(agent) == 2)
    assert agent.process.poll() is None


class Liar(Client):
    """The holder of a lease of one executor, whose frames are what it likes."""

    def __init__(self, agent: AgentProcess, name: str) -> None:
        super().__init__(agent)
        self.lines: list[Line] = []
        self.granted: Any = None
        # What the one before had is free soon; what is registered may be older than that.
        numbers = itertools.count()
        wait_until(lambda: n_free(agent) == 1 and self._is_granted(f"{name} {next(numbers)}"))

    def _is_granted(self, name: str) -> bool:
        self.say(Ask(name, Request(1, 0, 30.0)))
        self.granted = self.hear()
        return hasattr(self.granted, "seats")

    def __enter__(self) -> "Liar":
        return self

    def __exit__(self, *_: object) -> None:
        for line in self.lines:
            line.close()
        self.sock.close()

    def greet(self, kind: str = "shm") -> Talk:
        (seat,) = self.granted.seats
        address = json.loads(seat.address)
        if kind == "tcp":
            sock = socket.create_connection(tuple(address["tcp"]), 5.0)
        else:
            sock = self.connector.reach(address["unix"], None, False, True)
        return Talk(sock, line_key(self.secret, self.granted.lease, seat.epoch), is_server=False)

    def connect(self, kind: str) -> Line:
        talk = self.greet(kind)
        talk.send({"lease": self.granted.lease, "transport": kind, "arena_bytes": ARENA_BYTES})
        answer, fds = talk.receive()
        arena = SharedArena(ARENA_BYTES)
        end: Any = ShmEnd(talk.sock, arena) if kind == "shm" else TcpEnd(talk.sock, ARENA_BYTES)
        talk.send({"offer": dict(end.offer)}, end.fds)
        (seat,) = self.granted.seats
        line = Line(end.connect(answer["offer"], fds), seat.epoch, talk.parley.line_keys())
        arena.close()
        self.lines.append(line)
        return line


def lying_frame(rng: random.Random, line: Line) -> bytes:
    """A frame whose numbers are chosen at random or at a bound, signed as the line wants it."""
    n_extents, n_releases = rng.choice(((0, 0), (1, 0), (0, 1), (2, 1), (1023, 0), (0xFFFF, 9)))
    numbers = [rng.choice(WORDS) for _ in range(min(600, 2 * n_extents + n_releases))]
    stream = rng.choice((b"", b"(K\1t.", b"\x80\5\x97.", os.urandom(30)))
    head = HEAD.pack(
        MAGIC,
        rng.choice([*map(int, Kind), 0, 255]),
        rng.choice((0, 0, 1, 2, 255)),
        line.epoch if rng.random() < 0.9 else rng.choice((0, 1, 2**32 - 1)),
        line.n_sent if rng.random() < 0.9 else rng.choice(WORDS),
        rng.choice(WORDS),
        rng.choice((0, 1, 2**32 - 1)),
        len(stream) if rng.random() < 0.7 else rng.choice((0, 2**31, 2**32 - 1)),
        rng.choice((0.0, -1.0, 1e-9, float("nan"), float("inf"))),
        n_extents,
        n_releases,
    )
    frame = (head + struct.pack(f"<{len(numbers)}Q", *numbers) + stream)[: SLOT_BYTES - 100]
    return frame if rng.random() < 0.9 else frame[: rng.randrange(len(frame))]


def tell_lies(rng: random.Random, line: Line) -> None:
    """Send frames that lie, until the executor has had enough of it."""
    transport = line.transport
    for _ in range(40):
        frame = lying_frame(rng, line)
        if not transport.is_private:
            mac = line.sign.copy()
            mac.update(frame)
            frame += mac.digest() if rng.random() < 0.9 else os.urandom(MAC_BYTES)
        if isinstance(transport, ShmTransport) and rng.random() < 0.2:
            word, start = SLOTS[transport.n_posted % QUEUE_FRAMES]
            transport.outgoing[start : start + len(frame)] = frame
            # Of the frame's number and its length, one or both are lies.
            transport.out_words[word + 1] = rng.choice((len(frame), *WORDS))
            transport.out_words[word] = rng.choice((transport.n_posted + 1, *WORDS))
            transport.ring()
        transport.post(frame)
        line.n_sent += 1
        if line.transport.wait(0.0, 0.0) is None:
            time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_frames_that_lie_end_their_own_line_and_nothing_else(
    agent: AgentProcess, honest: Any, kind: str
) -> None:
    rng = random.Random(kind)
    for number in range(6):
        with Liar(agent, f"lies over {kind} {number}") as liar:
            with contextlib.suppress(LeaseLost, FrameError):
                tell_lies(rng, liar.connect(kind))
            assert honest.call(double, number) == 2 * number


@pytest.mark.slow
def test_a_stream_of_random_bytes_ends_its_own_line_and_nothing_else(
    agent: AgentProcess, honest: Any
) -> None:
    rng = random.Random(0)
    for number in range(6):
        with Liar(agent, f"bytes {number}") as liar:
            sock = liar.connect("tcp").transport.sock
            with contextlib.suppress(OSError):
                for _ in range(20):
                    size, n_extents = rng.choice((0, 40, 2**14, 2**32 - 1)), rng.choice((0, 1))
                    sock.sendall(struct.pack("<2I", size, n_extents))
                    sock.sendall(struct.pack("<2Q", rng.choice(WORDS), rng.choice(WORDS)))
            assert honest.call(double, number) == 2 * number


@pytest.mark.slow
@pytest.mark.parametrize(
    "hello",
    [
        {"transport": "shm", "arena_bytes": 1 << 60},
        {"transport": "shm", "arena_bytes": -1},
        {"transport": ["shm"], "arena_bytes": 4096},
        {"transport": "tcp", "arena_bytes": 4096, "path": 7},
        {"transport": "tcp", "arena_bytes": 4096, "path": [[]]},
    ],
    ids=repr,
)
def test_a_greeting_that_lies_is_refused_and_the_next_one_heard(
    agent: AgentProcess, honest: Any, hello: dict[str, Any]
) -> None:
    with Liar(agent, f"greeting {hello}") as liar:
        talk = liar.greet()
        with contextlib.suppress(LeaseError):
            talk.send({"lease": liar.granted.lease, **hello})
            talk.receive()
        talk.sock.close()
        # The executor that has refused listens on.
        line = liar.connect("shm")
        line.send(Kind.CALL, 1, b"\x80\x05]\x94.")
        assert line.receive(10.0) is not None


@pytest.mark.slow
@pytest.mark.parametrize("offer", [{}, {"offer": 7}, {"offer": {"arena_bytes": 1 << 60}}], ids=repr)
def test_an_offer_that_lies_is_refused_and_the_next_one_heard(
    agent: AgentProcess, honest: Any, offer: dict[str, Any]
) -> None:
    with Liar(agent, f"offer {offer}") as liar:
        talk = liar.greet()
        hello = {"lease": liar.granted.lease, "transport": "shm", "arena_bytes": ARENA_BYTES}
        talk.send(hello)
        _, fds = talk.receive()
        fds += [os.memfd_create("small", os.MFD_ALLOW_SEALING) for _ in range(2)]
        talk.send(offer, fds)
        with pytest.raises(LeaseError):
            talk.receive()
        for fd in fds:
            os.close(fd)
        talk.sock.close()
        liar.connect("tcp")


@pytest.mark.slow
def test_messages_that_make_no_sense_leave_the_agent_alive(
    agent: AgentProcess, honest: Any
) -> None:
    bodies: list[bytes] = [
        b"[" * 100_000,
        b'{"kind": []}',
        b'{"kind": {"Ask": 1}}',
        json.dumps({"kind": "Ask", "nonce": "x", "request": {"n_executors": 1}}).encode(),
        b'{"kind": "Ask", "nonce": "x", "request": {"n_executors": 1, "memory_bytes": 0,'
        b' "ttl_s": 1' + b"0" * 400 + b', "is_hot": 0}}',
    ]
    for body in bodies:
        liar = Client(agent)
        parley = liar.talk.parley
        mac = parley._mac(False, 0, body)
        liar.sock.sendall(struct.pack("<I", len(body)) + mac + body)
        with pytest.raises((LeaseLost, SecurityError)):
            liar.hear()
        liar.sock.close()
    assert honest.call(double, 4) == 8


@pytest.mark.slow
def test_strangers_that_take_all_connections_do_not_end_the_agent(
    tmp_path: Path,
) -> None:
    with AgentProcess(tmp_path / "agents", 1, ["--preload", "numpy"]) as crowded:
        resource.prlimit(crowded.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        (found,) = read_registrations(crowded.directory)
        strangers = []
        with contextlib.suppress(OSError):
            for _ in range(200):
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(0.2)
                strangers.append(sock)
                sock.connect(f"\0{found.unix}")
        for sock in strangers:
            sock.close()
        with lease(1, directory=crowded.directory) as executors:
            assert executors.call(double, 4) == 8


@pytest.mark.slow
def test_a_silent_stranger_does_not_keep_the_holder_from_its_executor(
    agent: AgentProcess, honest: Any
) -> None:
    with Liar(agent, "silent") as liar:
        (seat,) = liar.granted.seats
        unix = json.loads(seat.address)["unix"]
        strangers = [liar.connector.reach(unix, None, False, True) for _ in range(4)]
        strangers[0].sendall(b"half a nonce")
        line = liar.connect("shm")
        line.send(Kind.CALL, 1, b"\x80\x05]\x94.")
        assert line.receive(10.0) is not None
        for stranger in strangers:
            stranger.close()
