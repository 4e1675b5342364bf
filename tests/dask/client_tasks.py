"""Functions that the tests of the client run on a cluster."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

WAIT_S = 20.0
"""No task waits longer than this for its test."""


def inc(x: Any) -> Any:
    return x + 1


def dec(x: Any) -> Any:
    return x - 1


def double(x: Any) -> Any:
    return 2 * x


def add(x: Any, y: Any) -> Any:
    return x + y


def mul(x: Any, y: Any) -> Any:
    return x * y


def div(x: Any, y: Any) -> Any:
    return x / y


def identity(x: Any) -> Any:
    return x


def slow_inc(x: Any, delay_s: float = 0.02) -> Any:
    time.sleep(delay_s)
    return x + 1


def slow_add(x: Any, y: Any, delay_s: float = 0.02) -> Any:
    time.sleep(delay_s)
    return x + y


def fail(message: str = "as the test wants it") -> None:
    raise ValueError(message)


def slow_fail(delay_s: float = 0.05) -> None:
    time.sleep(delay_s)
    raise ValueError("late")


def gate(path: str, value: Any = None) -> Any:
    """Return the value when the file exists; say that it runs with a second file."""
    Path(path + ".runs").touch()
    deadline = time.monotonic() + WAIT_S
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {path}")
        time.sleep(0.005)
    return value


def leave_mark(folder: str, name: str = "mark", after: Any = None) -> str:
    """Leave a new file for each run, and return the name."""
    with open(os.path.join(folder, f"{name}.{time.monotonic_ns()}.{os.getpid()}"), "x"):
        return name


def n_marks(folder: Any, name: str = "mark") -> int:
    """How often `leave_mark` has run."""
    return sum(1 for found in os.listdir(folder) if found.startswith(name + "."))


def fail_first(folder: str, n_failures: int, value: Any = 1) -> Any:
    """Fail in the first n runs."""
    leave_mark(folder, "run")
    if n_marks(folder, "run") <= n_failures:
        raise ZeroDivisionError(f"run {n_marks(folder, 'run')}")
    return value


def pid_after(delay_s: float) -> int:
    time.sleep(delay_s)
    return os.getpid()


async def async_inc(x: int) -> int:
    import asyncio

    await asyncio.sleep(0.001)
    return x + 1


class UnpicklableState(Exception):
    """An error that carries what no pickle can."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        import threading

        self.lock = threading.Lock()


class TwoArguments(Exception):
    """An error that pickle makes anew with the wrong number of arguments."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class NotPicklable:
    """A value that cannot leave its process."""

    def __getstate__(self) -> Any:
        raise TypeError("this stays here")


class NotLoadable:
    """A value that arrives nowhere."""

    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise RuntimeError("refused to load")


def make_not_picklable() -> NotPicklable:
    return NotPicklable()


def raise_unpicklable() -> None:
    raise UnpicklableState("with a lock in it")


def raise_two_arguments() -> None:
    raise TwoArguments(1, 2)
