"""Programs and exceptions survive the wire: what a task is made of, and how it fails."""

import math
import operator
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wukong.errors import SerializationError, TaskError
from wukong.executor.messages import Part
from wukong.executor.serialize import Codec
from wukong.executor.serialize_failures import decode_error, encode_error
from wukong.executor.serialize_programs import Program, decode_program, encode_program

CODEC = Codec(b"key")
CONTEXT = b"job/strand/3"


def program_of(tasks: list[int], calls: list[Any], literals: list[object]) -> Program:
    used: set[int] = set()
    stack = list(calls)
    while stack:
        for slot in stack.pop()[1]:
            if isinstance(slot, tuple):
                stack.append(slot)
            elif slot < 0:
                used.add(slot)
    return Program(
        Part(tuple(tasks), (), ()), calls, {s: literals[~s] for s in used}, {tasks[0]: 2}, True
    )


# ------------------------------------------------------------------------------------ programs


LEAF_SLOTS = st.integers(-6, 5)
CALLS: st.SearchStrategy[Any] = st.deferred(
    lambda: st.tuples(
        st.sampled_from([operator.add, math.sqrt, dict]),
        st.lists(LEAF_SLOTS | CALLS, max_size=4).map(tuple),
        st.sampled_from([(), ("a",), ("b",)]),
    )
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(CALLS, min_size=1, max_size=12))
def test_any_program_survives(calls: list[Any]) -> None:
    literals = [f"literal {n}" for n in range(6)]
    tasks = list(range(100, 100 + len(calls)))
    sent = program_of(tasks, calls, literals)
    program = decode_program(CODEC, CONTEXT, encode_program(CODEC, CONTEXT, sent).join())
    assert program == sent


def test_only_the_literals_that_are_read_are_sent_and_each_once() -> None:
    literals = [object, "unread", np.ones(1000)]
    calls: list[Any] = [(len, (~2,), ()), (sum, ((abs, (~2,), ()), ~0), ())]
    encoded = encode_program(CODEC, CONTEXT, program_of([4, 5], calls, literals))
    assert encoded.size_bytes < 8000 + 1000
    assert sorted(decode_program(CODEC, CONTEXT, encoded.join()).literals) == [~2, ~0]


def test_a_shared_function_is_sent_once() -> None:
    calls: list[Any] = [((lambda: 1), (), ())] * 500
    size_bytes = encode_program(CODEC, CONTEXT, program_of(list(range(500)), calls, [])).size_bytes
    assert size_bytes < 500 * 16 + 2000


@pytest.mark.parametrize("nested", [False, True])
def test_the_first_task_that_cannot_be_sent_is_named(nested: bool) -> None:
    literals = [1, threading.Lock()]
    bad: Any = (abs, ((len, (~1,), ()),), ()) if nested else (abs, (~1,), ())
    calls: list[Any] = [(abs, (~0,), ()), bad, bad]
    with pytest.raises(SerializationError, match="lock") as caught:
        encode_program(CODEC, CONTEXT, program_of([30, 31, 32], calls, literals))
    assert caught.value.task == 31


def test_a_function_that_cannot_be_sent_is_named() -> None:
    calls: list[Any] = [(abs, (0,), ()), (threading.Lock().acquire, (), ())]
    with pytest.raises(SerializationError) as caught:
        encode_program(CODEC, CONTEXT, program_of([30, 31], calls, []))
    assert caught.value.task == 31


# ---------------------------------------------------------------------------------- exceptions


class TwoArguments(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Prefixed(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(f"prefixed {text}")


class Untransportable(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")

    def __new__(cls, *args: object) -> "Untransportable":
        if args == ("allowed",):
            return super().__new__(cls, *args)
        raise RuntimeError("nor rebuilt")


class WithLock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text, threading.Lock())
        self.lock = threading.Lock()
        self.note = "kept"

    def __str__(self) -> str:
        return str(self.args[0])


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def over_the_wire(error: BaseException, key: object) -> BaseException:
    return decode_error(
        CODEC.decode(CODEC.encode(encode_error(raised(error), key), CONTEXT).join(), CONTEXT)
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        KeyError("k"),
        SystemExit(3),
        FileNotFoundError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        TwoArguments(3, "three"),
        Prefixed("once"),
        SerializationError("typed", 4),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_comes_back_as_itself(error: BaseException) -> None:
    back = over_the_wire(error, ("x", 0))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    state = {name: item for name, item in vars(back).items() if name != "__notes__"}
    assert state == vars(error)


def test_an_exception_brings_its_traceback_its_causes_and_the_key() -> None:
    try:
        try:
            operator.truediv(1, 0)
        except ZeroDivisionError as cause:
            raise ValueError("outer") from cause
    except ValueError as error:
        back = decode_error(encode_error(error, ("x", 0)))
    text = str(back.__cause__)
    assert "ZeroDivisionError" in text
    assert "operator.truediv(1, 0)" in text
    assert "test_serialize_tasks.py" in text
    assert any("('x', 0)" in note for note in vars(back)["__notes__"])


def test_a_key_that_the_client_knows_replaces_the_task_number() -> None:
    back = decode_error(encode_error(ValueError(), 17), key="real")
    assert "'real'" in vars(back)["__notes__"][-1]


def test_state_that_cannot_be_pickled_is_left_out() -> None:
    back = over_the_wire(WithLock("text"), "k")
    assert type(back) is WithLock
    assert str(back) == "text"
    assert back.note == "kept"
    assert not hasattr(back, "lock")


def test_an_exception_of_a_type_that_is_only_known_there_comes_back() -> None:
    local = type("Local", (Exception,), {"__module__": "__main__"})
    back = over_the_wire(local("text"), "k")
    assert type(back).__name__ == "Local"
    assert str(back) == "text"


def test_an_exception_that_cannot_travel_is_told_by_a_task_error() -> None:
    back = over_the_wire(Untransportable("allowed"), "k")
    assert type(back) is Untransportable
    error = Untransportable("allowed")
    error.args = ("lost",)
    back = over_the_wire(error, "k")
    assert type(back) is TaskError
    assert str(back) == "test_serialize_tasks.Untransportable: lost"
    assert "Untransportable" in str(back.__cause__)


def test_a_failure_can_be_handed_on_without_importing_its_type() -> None:
    failure = encode_error(Prefixed("x"), "k")
    assert failure.type_name == "test_serialize_tasks.Prefixed"
    assert failure.message == "prefixed x"
    assert b"Prefixed" not in pickle.dumps(type(failure))
    broken = type(failure)("k", "mod.Gone", "text", "trace", b"cgone\nGone\n.")
    assert str(decode_error(broken)) == "mod.Gone: text"
