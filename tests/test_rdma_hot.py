"""The shortest way of a call does what the usual way does, or steps aside."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_rdma_transports import carry, lines, shm_pair, tcp_pair
from wukong.rdma import hot
from wukong.rdma.frames import Kind
from wukong.rdma.line import Line, encode
from wukong.rdma.transport import QUEUE_FRAMES

Lines = tuple[Line, Line]


def double(x: int) -> int:
    return 2 * x


FUNCTIONS = {1: double}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Lines]:
    made = lines(shm_pair(tmp_path))
    yield made
    for line in made:
        line.close()


def test_calls_go_round_the_queue_and_mix_with_the_usual_way(pair: Lines) -> None:
    client, executor = pair
    for number in range(1, 3 * QUEUE_FRAMES):
        if not hot.post(client, Kind.CALL, number, 1, (number,)):
            client.send(Kind.CALL, number, *encode((number,)), 1)
        assert hot.serve(executor, FUNCTIONS, 5) == (number, 2 * number)
        if not hot.post(executor, Kind.RESULT, number, 0, 2 * number):
            executor.send(Kind.RESULT, number, *encode(2 * number))
        assert hot.await_result(client, number) == 2 * number
        if number % 10 == 0:
            assert carry(client, executor, "usual") == "usual"


def test_what_is_not_usual_is_left_for_the_usual_way(pair: Lines) -> None:
    client, executor = pair
    assert not hot.post(client, Kind.CALL, 1, 1, (object(),))
    assert not hot.post(client, Kind.CALL, 1, 1, (bytes(100_000),))
    assert hot.serve(executor, FUNCTIONS, 5) is None
    assert hot.post(client, Kind.CALL, 1, 2, (1,))  # a function that is not known
    assert hot.serve(executor, FUNCTIONS, 5) is None
    frame = executor.poll()
    assert frame is not None
    assert frame.subject == 2
    executor.send(Kind.RAISED, 1, b"why")
    assert hot.await_result(client, 1) is hot.MISSED
    frame = client.poll()
    assert frame is not None
    assert frame.kind == Kind.RAISED


def test_what_a_function_raises_is_an_answer(pair: Lines) -> None:
    client, executor = pair
    assert hot.post(client, Kind.CALL, 1, 1, (None,))
    served = hot.serve(executor, FUNCTIONS, 5)
    assert served is not None
    number, failed = served
    assert number == 1
    assert isinstance(failed.error, TypeError)


def test_other_transports_have_no_shorter_way(tmp_path: Path) -> None:
    client, executor = lines(tcp_pair(tmp_path))
    assert not hot.post(client, Kind.CALL, 1, 1, (1,))
    client.close()
    executor.close()
