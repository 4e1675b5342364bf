"""Every transport of frames keeps the same contract; and lines above them."""

import contextlib
import gc
import os
import select
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wukong.errors import FrameError, LeaseLost, PayloadTooLarge
from wukong.rdma.frames import HEAD, HEAD_BYTES, Kind
from wukong.rdma.line import ArenaFull, Line, encode
from wukong.rdma.shm import SLOTS, SharedArena, ShmEnd
from wukong.rdma.spin import SPIN_S, Spin
from wukong.rdma.tcp import TcpEnd
from wukong.rdma.transport import QUEUE_FRAMES, Transport

ARENA_BYTES = 1 << 20
Pair = tuple[Any, Any]


def shm_pair(directory: Path) -> Pair:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    arenas = SharedArena(ARENA_BYTES), SharedArena(ARENA_BYTES)
    a, b = ShmEnd(ours, arenas[0]), ShmEnd(theirs, arenas[1])
    fds = [[os.dup(fd) for fd in end.fds] for end in (a, b)]
    pair = a.connect(b.offer, fds[1]), b.connect(a.offer, fds[0])
    for arena in arenas:
        arena.close()
    return pair


def tcp_sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


def tcp_pair(directory: Path) -> Pair:
    a, b = (TcpEnd(sock, ARENA_BYTES) for sock in tcp_sockets())
    return a.connect(b.offer, ()), b.connect(a.offer, ())


def certificate(directory: Path) -> Path:
    """A certificate of its own, with its key, in one file."""
    path = directory / "node.pem"
    try:
        subprocess.run(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
            f" -days 2 -subj /CN=node -keyout - -out - > {path}",
            shell=True,
            check=True,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError:
        pytest.skip("there is no openssl to make a certificate")
    return path


def tls_pair(directory: Path) -> Pair:
    cert = certificate(directory)
    ours, theirs = tcp_sockets()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert)
    client = ssl.create_default_context(cafile=str(cert))
    client.check_hostname = False
    made: list[ssl.SSLSocket] = []
    thread = threading.Thread(
        target=lambda: made.append(server.wrap_socket(theirs, server_side=True))
    )
    thread.start()
    wrapped = client.wrap_socket(ours)
    thread.join()
    a, b = TcpEnd(wrapped, ARENA_BYTES), TcpEnd(made[0], ARENA_BYTES)
    return a.connect(b.offer, ()), b.connect(a.offer, ())


@pytest.fixture(params=[shm_pair, tcp_pair, tls_pair], ids=["shm", "tcp", "tls"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    make: Callable[[Path], Pair] = request.param
    ends = make(tmp_path)
    yield ends
    for end in ends:
        end.close()


def test_frames_arrive_once_and_in_order(pair: Pair) -> None:
    a, b = pair
    frames = [bytes([n]) * (n * 50 + 1) for n in range(QUEUE_FRAMES)]
    for frame in frames:
        a.post(frame)
    assert [b.wait(5.0, 0.0) for _ in frames] == frames
    assert b.poll() is None
    longest = bytes(a.frame_bytes)
    for _ in range(3 * QUEUE_FRAMES):
        a.post(longest)
        assert b.wait(5.0, 0.001) == longest


def test_both_directions_are_apart(pair: Pair) -> None:
    a, b = pair
    a.post(b"there")
    b.post(b"back")
    assert (a.wait(5.0, 0.0), b.wait(5.0, 0.0)) == (b"back", b"there")


def test_a_wait_ends_when_its_time_is_up(pair: Pair) -> None:
    assert pair[0].wait(0.01, 0.0) is None
    assert pair[0].wait(0.01, 0.005) is None


def test_an_armed_end_is_woken_by_the_next_frame(pair: Pair) -> None:
    a, b = pair
    assert b.arm()
    a.post(b"ring")
    poll = select.poll()
    for fd in b.filenos():
        poll.register(fd, select.POLLIN)
    assert poll.poll(5000)
    b.disarm()
    assert b.wait(5.0, 0.0) == b"ring"


def test_buffers_are_in_the_inbox_before_the_frame(pair: Pair) -> None:
    a, b = pair
    for offset, size in ((0, 1), (64, 100_000), (ARENA_BYTES - 10, 10)):
        source = os.urandom(size)
        if a.outbox is None:
            view = memoryview(source)
        else:
            view = a.outbox[offset : offset + size]
            view[:] = source
        a.post(b"frame", [(offset, view)])
        assert b.wait(5.0, 0.0) == b"frame"
        assert b.inbox[offset : offset + size] == source


@pytest.mark.parametrize("spin_s", [0.0, 10.0], ids=["asleep", "polling"])
def test_the_end_of_the_peer_is_noticed_after_its_last_frame(pair: Pair, spin_s: float) -> None:
    a, b = pair
    a.post(b"last")
    a.close()
    assert b.wait(5.0, spin_s) == b"last"
    with pytest.raises(LeaseLost):
        b.wait(5.0, spin_s)
    with pytest.raises(LeaseLost):
        post_for_ever(b)


def post_for_ever(end: Any) -> None:
    while True:
        end.post(bytes(10_000))


def test_a_closed_end_says_so_and_can_be_closed_again(pair: Pair) -> None:
    a, _ = pair
    a.close()
    a.close()
    with pytest.raises(LeaseLost):
        a.poll()
    with pytest.raises(LeaseLost):
        a.filenos()


# ------------------------------------------------------------------ lies


def test_memory_that_its_owner_can_shrink_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    arena = SharedArena(4096)
    end = ShmEnd(ours, arena)
    open_fds = [os.memfd_create("unsealed", os.MFD_CLOEXEC) for _ in range(2)]
    for fd in open_fds:
        os.truncate(fd, 1 << 22)
    with pytest.raises(FrameError, match="sealed"):
        end.connect({"arena_bytes": 1 << 22}, [*open_fds, os.eventfd(0)])
    end.close()
    arena.close()
    ours.close()
    theirs.close()


def test_a_slot_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    a, b = shm_pair(tmp_path)
    word, _ = SLOTS[0]
    a.out_words[word : word + 2] = memoryview(struct.pack("QQ", 1, 1_000_000)).cast("Q")
    with pytest.raises(FrameError, match="in a slot"):
        b.poll()
    a.close()
    b.close()


@pytest.mark.parametrize(
    "head",
    [b"\xff\xff\xff\xff\0\0\0\0", b"\1\0\0\0\xff\xff\0\0", b"\1\0\0\0\1\0\0\0" + b"\xff" * 16],
    ids=["long frame", "many extents", "outside of the arena"],
)
def test_a_stream_that_lies_about_sizes_is_refused(head: bytes, tmp_path: Path) -> None:
    a, b = tcp_pair(tmp_path)
    a.sock.sendall(head)
    with pytest.raises(FrameError):
        b.wait(5.0, 0.0)
    a.close()
    b.close()


# ------------------------------------------------------------------ lines

KEYS = (b"one", b"other")


def lines(pair: tuple[Transport, Transport]) -> tuple[Line, Line]:
    return Line(pair[0], 1, KEYS), Line(pair[1], 1, KEYS[::-1])


def carry(a: Line, b: Line, value: object) -> Any:
    a.send(Kind.CALL, 1, *encode(value))
    frame = b.receive(5.0)
    assert frame is not None
    return b.load(frame)


def give_back(a: Line, b: Line) -> None:
    gc.collect()
    b.flush_releases()
    while a.receive(0.05) is not None:
        pass


@pytest.mark.slow
def test_values_travel_and_an_array_pins_its_extent_until_its_last_view_dies(pair: Pair) -> None:
    a, b = lines(pair)
    array = np.arange(20_000)
    value = carry(a, b, {"array": array, "small": np.arange(3), "text": "x"})
    np.testing.assert_array_equal(value["array"], array)
    assert b.n_pinned == 1
    view = value["array"][5:10]
    del value
    give_back(a, b)
    assert a.outbox.arena.n_used == 1
    np.testing.assert_array_equal(view, array[5:10])
    del view
    give_back(a, b)
    assert (b.n_pinned, a.outbox.arena.n_used) == (0, 0)
    with contextlib.suppress(TypeError):
        a.outbox.arena.check()


def test_an_array_is_copied_once_at_most_and_never_by_its_receiver(pair: Pair) -> None:
    a, b = lines(pair)
    array = np.ones(50_000)
    received = carry(a, b, array)
    assert a.copied_bytes == (0 if a.outbox.memory is None else array.nbytes)
    inbox = np.frombuffer(b.transport.inbox, np.uint8)
    assert np.shares_memory(received, inbox)
    received[0] = 7  # its own: nobody else uses this memory
    assert array[0] == 1


def test_an_array_in_the_outbox_leaves_without_a_copy(tmp_path: Path) -> None:
    a, b = lines(shm_pair(tmp_path))
    array = a.outbox.empty((100, 100), "f8")
    array[:] = 3
    received = carry(a, b, array)
    assert a.copied_bytes == 0
    assert received.sum() == 30_000
    assert not received.flags.writeable
    part = carry(a, b, array[50:])
    assert part.shape == (50, 100)
    assert a.outbox.arena.n_used == 1
    del array
    a.outbox.sweep()
    assert a.outbox.arena.n_used == 1  # the receiver has it yet
    del received, part
    give_back(a, b)
    assert a.outbox.arena.n_used == 0
    a.close()
    b.close()


@pytest.mark.slow
def test_a_long_stream_goes_through_the_arena(pair: Pair) -> None:
    a, b = lines(pair)
    value = list(range(50_000))
    assert carry(a, b, value) == value
    give_back(a, b)
    assert a.outbox.arena.n_used == 0


@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_leaves_nothing(pair: Pair) -> None:
    a, b = lines(pair)
    with pytest.raises(PayloadTooLarge):
        a.send(Kind.CALL, 1, *encode(np.zeros(ARENA_BYTES)))
    first = carry(a, b, np.zeros(80_000))
    with pytest.raises(ArenaFull):
        a.send(Kind.CALL, 2, *encode([np.zeros(20_000), np.zeros(80_000)]))
    assert a.outbox.arena.n_used == 1
    del first
    give_back(a, b)
    assert carry(a, b, np.zeros(80_000)).size == 80_000


def test_a_frame_that_was_meddled_with_is_refused(tmp_path: Path) -> None:
    for tamper in (
        lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]),
        lambda frame: bytes([frame[0], frame[1], Kind.DEFINE]) + frame[3:],
        lambda frame: frame[:HEAD_BYTES],
        lambda frame: b"",
    ):
        a, b = tcp_pair(tmp_path)
        sender, receiver = lines((a, b))
        post = a.post
        a.post = lambda frame, extents=(), tamper=tamper, post=post: post(tamper(frame), extents)  # type: ignore[method-assign]
        sender.send(Kind.CALL, 1, b"stream")
        with pytest.raises(FrameError, match="not signed"):
            receiver.receive(5.0)
        sender.close()
        receiver.close()


def test_a_replayed_frame_is_refused(pair: Pair) -> None:
    a, _ = pair
    sender, receiver = lines(pair)
    sent: list[bytes] = []
    post = a.post
    a.post = lambda frame, extents=(): (sent.append(frame), post(frame, extents))  # type: ignore[method-assign]
    sender.send(Kind.CALL, 1, b"stream")
    post(sent[0])
    assert receiver.receive(5.0) is not None
    with pytest.raises(FrameError, match="repeated"):
        receiver.receive(5.0)


def test_a_peer_that_releases_what_it_was_not_sent_is_refused(pair: Pair) -> None:
    a, b = lines(pair)
    b.released.append(4096)
    b.flush_releases()
    with pytest.raises(FrameError, match="was not sent"):
        a.receive(5.0)


def test_polling_pays_while_waits_are_short() -> None:
    spin = Spin(is_hot=False)
    assert spin.spin_s == SPIN_S
    for _ in range(4):
        assert spin.waited(1.0) <= SPIN_S
    assert spin.spin_s == 0
    assert spin.waited(SPIN_S / 2) == 0
    assert spin.spin_s == SPIN_S
    hot = Spin(is_hot=True)
    assert hot.waited(5.0) == 5.0
    assert hot.spin_s > 60


def test_heads_are_what_they_are_documented_to_be() -> None:
    assert HEAD.size == 40
