"""The shortest way of a call does what the usual way does, or steps aside."""

import gc
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_rdma_transports import carry, lines, shm_pair, tcp_pair, tls_pair
from wukong.errors import FrameError, LeaseLost
from wukong.rdma.frames import Kind
from wukong.rdma.hot import MISSED, Failed, HotLine, Meter
from wukong.rdma.hot_stream import HotStream, shortest_way
from wukong.rdma.line import Line, encode
from wukong.rdma.shm import FRAME_BYTES
from wukong.rdma.spin import Spin
from wukong.rdma.tcp import TcpTransport
from wukong.rdma.transport import QUEUE_FRAMES

Ends = tuple[Line, Line, HotLine, HotLine]


def double(x: int) -> int:
    return 2 * x


def twice(payload: bytes) -> bytes:
    return payload * 2


FUNCTIONS: dict[int, Callable[..., Any]] = {1: double, 2: twice, 3: np.ones}


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    client, executor = lines(shm_pair(tmp_path))
    hot = HotLine.make(client), HotLine.make(executor)
    assert hot[0] is not None
    assert hot[1] is not None
    yield client, executor, hot[0], hot[1]
    client.close()
    executor.close()


def meter() -> Meter:
    return Meter(memoryview(bytearray(24)))


def test_calls_go_round_the_queue_and_mix_with_the_usual_way(ends: Ends) -> None:
    client, executor, calling, serving = ends
    used = meter()
    for number in range(1, 3 * QUEUE_FRAMES):
        function, argument, expected = [(1, number, 2 * number), (2, b"ab", b"abab")][number % 2]
        assert calling.post_call(number, function, (argument,))
        assert serving.serve(FUNCTIONS, used, 1) is None
        assert calling.await_result(number, 1) == expected
        if number % 10 == 0:
            assert carry(client, executor, "usual") == "usual"
    assert used.memory[0] == 3 * QUEUE_FRAMES - 1


def test_the_usual_way_reads_what_went_the_shortest(ends: Ends) -> None:
    client, executor, calling, serving = ends
    assert calling.post_call(1, 2, (b"ab",))
    frame = executor.poll()
    assert frame is not None
    assert executor.load(frame) == (b"ab",)
    assert calling.post_call(2, 2, (b"cd",))
    assert serving.serve(FUNCTIONS, meter(), 1) is None
    frame = client.poll()
    assert frame is not None
    assert client.load(frame) == b"cdcd"


def test_what_is_not_usual_is_left_for_the_usual_way(ends: Ends) -> None:
    client, executor, calling, serving = ends
    assert not calling.post_call(1, 1, (object(),))
    assert not calling.post_call(1, 2, (bytes(100_000),))
    assert serving.serve(FUNCTIONS, meter(), 1) is None
    assert calling.post_call(1, 4, (1,))  # a function that is not known
    assert serving.serve(FUNCTIONS, meter(), 1) is None
    frame = executor.poll()
    assert frame is not None
    assert frame.subject == 4
    executor.send(Kind.RAISED, 1, b"why")
    assert calling.await_result(1, 1) is MISSED
    frame = client.poll()
    assert frame is not None
    assert frame.kind == Kind.RAISED


def test_results_that_are_not_small_and_plain_are_left_for_the_usual_way(ends: Ends) -> None:
    _, _, calling, serving = ends
    used = meter()
    assert calling.post_call(1, 2, (bytes(FRAME_BYTES // 2),))
    number, result = serving.serve(FUNCTIONS, used, 1) or (0, b"")
    assert (number, len(result)) == (1, FRAME_BYTES // 2 * 2)
    assert calling.post_call(2, 3, (4,))
    number, result = serving.serve(FUNCTIONS, used, 1) or (0, b"")
    assert (number, list(result)) == (2, [1.0] * 4)
    assert used.memory[0] == 2


def test_the_usual_way_carries_releases_first(ends: Ends) -> None:
    client, executor, calling, serving = ends
    array = carry(executor, client, np.ones(1000))
    assert array.sum() == 1000
    del array
    gc.collect()
    assert client.released
    assert not calling.post_call(1, 1, (1,))
    client.send(Kind.CALL, 1, *encode((1,)), 1)
    assert serving.serve(FUNCTIONS, meter(), 1) is None  # a frame with a table
    assert executor.poll() is not None
    assert not executor.outbox.arena.n_used


def test_a_full_queue_is_left_for_the_usual_way_until_some_are_taken(ends: Ends) -> None:
    _, executor, calling, serving = ends
    for number in range(QUEUE_FRAMES):
        assert calling.post_call(number, 1, (number,))
    assert not calling.post_call(QUEUE_FRAMES, 1, (1,))
    assert executor.poll() is not None
    assert calling.post_call(QUEUE_FRAMES, 1, (1,))
    assert serving.serve(FUNCTIONS, meter(), 1) is None


@pytest.mark.parametrize("word", [0, 1, 2, 4, 5])
def test_a_head_that_lies_is_left_for_the_usual_way(ends: Ends, word: int) -> None:
    _, executor, calling, serving = ends
    assert calling.post_call(1, 1, (1,))
    # The frame's length, and its head but for the call's number, which may be any.
    calling.out_words[4096 // 8 + 1 + word] ^= 1 << 40
    assert serving.serve(FUNCTIONS, meter(), 1) is None
    assert executor.n_received == 0


def test_what_a_function_raises_is_an_answer(ends: Ends) -> None:
    _, _, calling, serving = ends
    assert calling.post_call(1, 1, (None,))
    served = serving.serve(FUNCTIONS, meter(), 1)
    assert served is not None
    number, failed = served
    assert number == 1
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, TypeError)


def test_a_round_trip_calls_few_functions(ends: Ends) -> None:
    """Of Python's own, on both sides together: the fewer the faster."""
    _, _, calling, serving = ends
    used, called = meter(), []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        assert calling.post_call(1, 2, (bytes(1024),))
        assert serving.serve(FUNCTIONS, used, 1) is None
        assert len(calling.await_result(1, 1)) == 2048
    finally:
        sys.setprofile(None)
    assert called == ["post_call", "serve", "twice", "await_result"]


@pytest.fixture
def streams(tmp_path: Path) -> Iterator[tuple[Line, Line, HotStream, HotStream]]:
    client, executor = lines(tcp_pair(tmp_path))
    for line in (client, executor):
        transport = line.transport
        assert isinstance(transport, TcpTransport)
        transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SOON)
    yield client, executor, stream_way(client), stream_way(executor)
    client.close()
    executor.close()


def load_next(line: Line) -> Any:
    frame = line.receive(0.5)
    assert frame is not None
    return line.load(frame)


def stream_way(line: Line) -> HotStream:
    way = shortest_way(line, Spin(False))
    assert isinstance(way, HotStream)
    return way


SOON = struct.pack("ll", 0, 10_000)
Streams = tuple[Line, Line, HotStream, HotStream]


def test_calls_over_a_stream_mix_with_the_usual_way(streams: Streams) -> None:
    client, executor, calling, serving = streams
    used = meter()
    for number in range(1, 10):
        function, argument, expected = [(1, number, 2 * number), (2, b"ab", b"abab")][number % 2]
        assert calling.post_call(number, function, (argument,))
        assert serving.serve(FUNCTIONS, used) is None
        assert calling.await_result(number) == expected
        client.send(Kind.CALL, number, *encode("usual"))
        assert load_next(executor) == "usual"
    assert used.memory[0] == 9


def test_what_is_not_usual_on_a_stream_is_left_for_the_usual_way(streams: Streams) -> None:
    client, executor, calling, serving = streams
    assert not calling.post_call(1, 1, (object(),))
    assert not calling.post_call(1, 2, (bytes(100_000),))
    for kind in (Kind.DEFINE, Kind.CALL):  # two at once, and a function that is not known
        client.send(kind, 1, b"stream", (), 4)
    assert serving.serve(FUNCTIONS, meter()) is None
    kinds = [frame.kind for _ in range(2) if (frame := executor.receive(0.5)) is not None]
    assert kinds == [Kind.DEFINE, Kind.CALL]
    assert calling.post_call(2, 3, (4000,))
    number, result = serving.serve(FUNCTIONS, meter()) or (0, b"")
    assert (number, len(result)) == (2, 4000)
    executor.send(Kind.RESULT, 2, *encode(result))
    assert calling.await_result(2) is MISSED
    assert load_next(client).sum() == 4000


def test_a_forged_call_on_a_stream_is_refused(streams: Streams) -> None:
    client, executor, _, serving = streams
    forger = stream_way(Line(client.transport, 1, (b"guess" * 4, b"guess" * 4)))
    assert forger.post_call(1, 1, (1,))
    with pytest.raises(FrameError, match="not signed"):
        serving.serve(FUNCTIONS, meter())
    assert executor.n_received == 0


def test_the_end_of_a_stream_is_told(streams: Streams) -> None:
    client, _, calling, serving = streams
    client.close()
    with pytest.raises(LeaseLost):
        serving.serve(FUNCTIONS, meter())
    with pytest.raises(LeaseLost):
        calling.post_call(1, 1, (1,))


def test_tls_has_no_shorter_way(tmp_path: Path) -> None:
    client, executor = lines(tls_pair(tmp_path))
    assert shortest_way(client, Spin(False)) is None
    client.close()
    executor.close()
