"""Tests of verbs, run in a guest by `python -m tests.rdma_guest`: real queue pairs, real faults."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.rdma_guest.peer import ARENA_BYTES, connect
from wukong.errors import FrameError, LeaseLost, LeaseRefused
from wukong.rdma import transport_verbs, verbs
from wukong.rdma.ports import find_ports
from wukong.rdma.transport import QUEUE_FRAMES
from wukong.rdma.transport_verbs import (
    CREDIT_FRAMES,
    FRAME_BYTES,
    LOOK_POLLS,
    N_SLOTS,
    VerbsEnd,
    VerbsTransport,
)

WAIT_S = 120.0
"""A guest has one processor, of which a busy machine gives it a part."""
NOTICED_S = 10.0
"""A dead peer is noticed in less; by its socket in milliseconds, without in about a second."""


class Peers:
    """Makes processes that behave as their mode says; see `tests.rdma_guest.peer`."""

    def __init__(self) -> None:
        self._orders, its = socket.socketpair()
        with its:
            command = [sys.executable, "-m", "tests.rdma_guest.peer"]
            self._server = subprocess.Popen(command, stdin=its)

    def start(self, mode: str, bindings: str, arena_bytes: int, sock: socket.socket) -> int:
        """Return the pid of a new process at the other end of the socket."""
        with sock:
            order = f"{mode} {bindings} {arena_bytes}"
            socket.send_fds(self._orders, [order.encode()], [sock.fileno()])
        return int.from_bytes(self._orders.recv(4), "little")

    def close(self) -> None:
        self._orders.close()
        self._server.wait()


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    made = Peers()
    yield made
    made.close()


Meet = Callable[..., tuple[VerbsTransport, int]]


@pytest.fixture
def meet(peers: Peers) -> Iterator[Meet]:
    """Connects with a new process, and returns the transport and the pid."""
    made: list[tuple[VerbsTransport, int]] = []

    def start(
        mode: str,
        bindings: str = "ibverbs",
        its_bindings: str = "ibverbs",
        arena_bytes: int = ARENA_BYTES,
    ) -> tuple[VerbsTransport, int]:
        own, its = socket.socketpair()
        pid = peers.start(mode, its_bindings, arena_bytes, its)
        made.append((connect(own, bindings, arena_bytes), pid))
        return made[-1]

    yield start
    for transport, pid in made:
        transport.close()
        kill(pid)
    assert resources() == {"pd": 0, "cq": 0, "qp": 0, "mr": 0}


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_gone(pid)


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + NOTICED_S
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def resources() -> dict[str, int]:
    """What processes hold of the device; the kernel has queue pairs of its own."""
    shown = subprocess.run(["rdma", "resource", "show"], capture_output=True, text=True).stdout
    assert "rxe0" in shown
    counts = {}
    for kind in ("pd", "cq", "qp", "mr"):
        lines = subprocess.run(
            ["rdma", "resource", "show", kind], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        counts[kind] = sum(" pid " in line for line in lines)
    return counts


def call(transport: VerbsTransport, frame: bytes) -> bytes:
    transport.post(frame)
    answer = transport.wait(WAIT_S, 0.0)
    assert answer is not None
    return answer


def test_the_device_of_the_guest_is_found() -> None:
    (port,) = find_ports()
    assert (port.device, port.number) == ("rxe0", 1)
    address = ".".join(map(str, port.gid[-4:]))
    assert address == os.environ["GUEST_ADDRESS"]
    assert transport_verbs.missing() == ""
    assert verbs.find_bindings() == ["ibverbs", "pyverbs"]


@pytest.mark.parametrize("bindings", ["ibverbs", "pyverbs"])
@pytest.mark.parametrize("its_bindings", ["ibverbs", "pyverbs"])
def test_thousands_of_calls_come_back_in_order(
    meet: Meet, bindings: str, its_bindings: str
) -> None:
    transport, _ = meet("echo", bindings, its_bindings)
    for number in range(2000 if bindings == its_bindings else 300):
        frame = b"%d " % number + b"x" * (number % 1500)
        assert call(transport, frame) == frame
    longest = os.urandom(FRAME_BYTES)
    assert call(transport, longest) == longest


def test_as_many_frames_as_promised_are_under_way_unread(meet: Meet) -> None:
    transport, _ = meet("echo")
    for turn in range(20):
        frames = [b"%d %d" % (turn, number) for number in range(QUEUE_FRAMES)]
        for frame in frames:
            transport.post(frame)
        assert [transport.wait(WAIT_S, 0.0) for _ in frames] == frames


def test_a_sender_waits_for_a_peer_that_reads_late(meet: Meet) -> None:
    transport, _ = meet("late")
    frames = [b"%d" % number for number in range(3 * N_SLOTS)]
    poster = threading.Thread(target=lambda: [transport.post(frame) for frame in frames])
    poster.start()
    assert [transport.wait(WAIT_S, 0.0) for _ in frames] == frames
    poster.join()


def test_a_peer_that_reads_nothing_is_given_up(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_verbs, "POST_S", 0.2)
    transport, _ = meet("sleeper")
    assert transport.wait(WAIT_S, 0.0) == b"here"
    for _ in range(N_SLOTS):
        transport.post(b"unread")
    with pytest.raises(LeaseLost, match="has taken no frame"):
        transport.post(b"one more")


@pytest.mark.parametrize("its_bindings", ["ibverbs", "pyverbs"])
def test_large_arrays_arrive_where_they_were_sent(meet: Meet, its_bindings: str) -> None:
    size = 64 << 20
    transport, _ = meet("total", "ibverbs", its_bindings, size + 4096)
    array = np.frombuffer(transport.outbox, np.uint8, size, 4096)
    array[:] = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    assert transport.outbox is not None
    transport.post(b"4096 %d" % size, [(4096, transport.outbox[4096 : 4096 + size])])
    assert transport.wait(WAIT_S, 0.0) == b"%d" % int(array.sum(dtype=np.uint64))


def test_many_small_buffers_go_with_one_frame(meet: Meet) -> None:
    transport, _ = meet("total")
    assert transport.outbox is not None
    transport.outbox[:64000] = bytes(range(250)) * 256
    extents = [(at, transport.outbox[at : at + 64]) for at in range(0, 64000, 64)]
    transport.post(b"0 64000", extents)
    assert transport.wait(WAIT_S, 0.0) == b"%d" % sum(transport.outbox[:64000])


def test_arrays_of_a_closed_connection_stay_valid(meet: Meet) -> None:
    transport, _ = meet("echo")
    view = np.frombuffer(transport.inbox, np.uint8)
    transport.close()
    assert view.sum() == 0


@pytest.mark.parametrize("bindings", ["ibverbs", "pyverbs"])
def test_a_killed_peer_is_noticed_by_whoever_waits(meet: Meet, bindings: str) -> None:
    transport, pid = meet("echo", bindings)
    threading.Timer(0.2, kill, (pid,)).start()
    started = time.monotonic()
    with pytest.raises(LeaseLost):
        transport.wait(WAIT_S, 0.0)
    with pytest.raises(LeaseLost):
        transport.poll()
    with pytest.raises(LeaseLost):
        transport.post(b"nobody reads this")
    assert time.monotonic() - started < NOTICED_S


def test_a_killed_peer_is_noticed_by_whoever_posts(meet: Meet) -> None:
    transport, pid = meet("sleeper")
    kill(pid)
    for _ in range(N_SLOTS):
        with contextlib.suppress(LeaseLost):
            transport.post(b"nobody reads this")
    started = time.monotonic()
    with pytest.raises(LeaseLost):
        transport.post(b"nobody reads this")
    assert time.monotonic() - started < NOTICED_S


def test_a_stopped_peer_that_goes_on_has_lost_nothing(meet: Meet) -> None:
    transport, pid = meet("echo")
    os.kill(pid, signal.SIGSTOP)
    for number in range(10):
        transport.post(b"%d" % number)
    assert transport.wait(0.3, 0.0) is None
    os.kill(pid, signal.SIGCONT)
    assert [transport.wait(WAIT_S, 0.0) for _ in range(10)] == [b"%d" % n for n in range(10)]


def test_what_a_peer_sent_before_it_left_is_read(meet: Meet) -> None:
    transport, _ = meet("parting")
    assert [transport.wait(WAIT_S, 0.0) for _ in range(5)] == [b"%d" % n for n in range(5)]
    transport.post(b"go")
    assert [transport.wait(WAIT_S, 0.0) for _ in range(5)] == [b"%d" % n for n in range(5, 10)]
    with pytest.raises(LeaseLost):
        transport.wait(WAIT_S, 0.0)


@pytest.mark.parametrize("mode", ["forger", "trespasser"])
@pytest.mark.parametrize("bindings", ["ibverbs", "pyverbs"])
def test_a_peer_that_writes_elsewhere_loses_the_connection(
    meet: Meet, mode: str, bindings: str
) -> None:
    transport, pid = meet(mode, bindings)
    transport.post(b"go")
    with pytest.raises(LeaseLost):
        transport.wait(WAIT_S, 0.0)
    wait_gone(pid)


def test_a_peer_that_lies_about_a_length_is_caught(meet: Meet) -> None:
    transport, _ = meet("liar")
    transport.post(b"go")
    with pytest.raises(FrameError, match="claims a frame of 2147483648 bytes"):
        transport.wait(WAIT_S, 0.0)


def test_a_peer_that_claims_to_have_read_the_future_is_caught(meet: Meet) -> None:
    transport, _ = meet("boaster")
    transport.post(b"go")
    assert transport.wait(WAIT_S, 0.0) == b"done"
    with pytest.raises(FrameError, match="has read 1099511627776 of 1 frames"):
        transport.post(b"more")


def test_a_peer_without_regard_to_credits_breaks_its_own_connection(meet: Meet) -> None:
    transport, pid = meet("flooder")
    transport.post(b"go")
    # Receiver not ready, again and again, and then an error at the sender, which ends.
    wait_gone(pid)
    for _ in range(N_SLOTS + CREDIT_FRAMES + 2 * LOOK_POLLS):
        with contextlib.suppress(LeaseLost):
            transport.poll()
    with pytest.raises(LeaseLost):
        transport.poll()


def test_whoever_waits_is_woken_by_a_close(meet: Meet) -> None:
    transport, _ = meet("echo")
    threading.Timer(0.2, transport.close).start()
    started = time.monotonic()
    with pytest.raises(LeaseLost, match="this end has closed"):
        transport.wait(WAIT_S, 0.0)
    assert time.monotonic() - started < NOTICED_S


@pytest.mark.parametrize("bindings", ["ibverbs", "pyverbs"])
def test_a_frame_that_was_looked_at_stays_the_next_one(meet: Meet, bindings: str) -> None:
    transport, _ = meet("echo", bindings)
    for number in range(3 * N_SLOTS):
        frame = b"%d" % number
        transport.post(frame)
        assert transport.peek(0.0) == frame
        assert not transport.arm()
        if number % 3:
            assert transport.peek(0.0) == transport.poll() == frame
        else:
            transport.peeked = None
    assert transport.poll() is None


@pytest.mark.parametrize("bindings", ["ibverbs", "pyverbs"])
def test_a_killed_peer_or_a_close_wakes_whoever_looks_for_a_frame(
    meet: Meet, bindings: str
) -> None:
    for end, reason in ((kill, "gone|closed|died"), (None, "this end has closed")):
        transport, pid = meet("echo", bindings)
        arguments = (0.2, transport.close) if end is None else (0.2, end, (pid,))
        threading.Timer(*arguments).start()
        with pytest.raises(LeaseLost, match=reason):
            transport.peek(0.0)


@pytest.mark.parametrize("bindings", ["ibverbs", "pyverbs"])
def test_signals_are_handled_by_whoever_looks_for_a_frame(meet: Meet, bindings: str) -> None:
    transport, _ = meet("echo", bindings)
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        came.append(number)
        if len(came) == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            transport.peek(0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert len(came) == 2
    assert call(transport, b"goes on") == b"goes on"


def test_descriptors_tell_of_a_frame(meet: Meet) -> None:
    transport, _ = meet("echo")
    for number in range(100):
        if transport.arm():
            transport.post(b"%d" % number)
            assert select.select(transport.filenos(), (), (), WAIT_S)[0]
        while (frame := transport.poll()) is None:
            transport.arm()
        assert frame == b"%d" % number
    assert transport.arm()
    assert select.select(transport.filenos(), (), (), 0.05)[0] == []


def test_memory_that_cannot_be_pinned_is_refused() -> None:
    program = (
        "import os, resource, socket\n"
        "from tests.rdma_guest.peer import connect, find_ports, verbs\n"
        "verbs.find_bindings(), find_ports()\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))\n"
        "os.setuid(65534)\n"
        "connect(socket.socketpair()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert LeaseRefused.__name__ in done.stderr
    assert "ulimit -l" in done.stderr


def test_an_end_that_never_connects_frees_what_it_has() -> None:
    own, its = socket.socketpair()
    end = VerbsEnd(own, find_ports()[0], ARENA_BYTES)
    assert resources() == {"pd": 1, "cq": 2, "qp": 1, "mr": 1}
    its.close()
    with pytest.raises(LeaseLost, match="did not connect"):
        end.connect({**end.offer, "number": 99}, ())
    assert resources() == {"pd": 0, "cq": 0, "qp": 0, "mr": 0}
    own.close()


def test_a_connection_has_a_domain_and_regions_of_its_own(meet: Meet) -> None:
    meet("echo")
    assert resources() == {"pd": 2, "cq": 4, "qp": 2, "mr": 4}
    meet("echo")
    assert resources() == {"pd": 4, "cq": 8, "qp": 4, "mr": 8}


@pytest.mark.parametrize("bindings", ["ibverbs", "pyverbs"])
def test_a_port_that_goes_down_ends_its_connections_and_is_found_no_more(
    meet: Meet, bindings: str
) -> None:
    transport, pid = meet("echo", bindings)
    assert call(transport, b"there") == b"there"
    subprocess.run(["ip", "link", "set", "rd0", "down"], check=True)
    try:
        with pytest.raises(LeaseLost, match="the device reports an error"):
            transport.wait(WAIT_S, 0.0)
        wait_gone(pid)
        assert find_ports() == []
        assert "has a port that is up" in transport_verbs.missing()
    finally:
        subprocess.run(["ip", "link", "set", "rd0", "up"], check=True)
    again, _ = meet("echo", bindings)
    assert call(again, b"back") == b"back"
