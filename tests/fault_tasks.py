"""Tasks that count their runs in a folder, outside the process, and go wrong when they are told to.

`count(folder, name)` is one byte more in the file; so runs of dead executors count too.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path


def count(folder, name) -> int:
    """Note one more run. Returns: its number, from 1 on."""
    path = os.path.join(folder, str(name))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, b"x")
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def runs(folder) -> dict[str, int]:
    """How often each task has begun."""
    return {path.name: path.stat().st_size for path in Path(folder).iterdir()}


def increment(x):
    return x + 1


def add(*values):
    return sum(values)


def counted_sum(folder, name, duration_s, *values):
    count(folder, name)
    time.sleep(duration_s)
    return sum(values) + 1


def sleep(duration_s):
    time.sleep(duration_s)
    return duration_s


def raise_at_first(folder, name, n_raises):
    """Raises in the first `n_raises` runs, and then returns the number of the run."""
    n = count(folder, name)
    if n <= n_raises:
        raise OSError(f"run {n}")
    return n


def raise_later(duration_s):
    time.sleep(duration_s)
    raise ZeroDivisionError("too late")


def die_at_first(folder, name, n_deaths, value):
    """Kills its executor in the first `n_deaths` runs."""
    if count(folder, name) <= n_deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


class Stubborn(Exception):
    """Cannot be unpickled by calling it, and has state that cannot be pickled."""

    def __init__(self, first, second) -> None:
        super().__init__(f"{first} and {second}")
        self.lock = threading.Lock()


def go_wrong(how, x):
    """Ends in one of the ways in which tasks end badly."""
    match how:
        case "raise":
            return x / 0
        case "exit":
            sys.exit(3)
        case "exit at once":
            os._exit(7)
        case "segfault":
            return ctypes.string_at(0)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            raise MemoryError("no room for 3 TB")
        case "recursion":
            return go_wrong(how, x)
        case "stubborn":
            raise Stubborn(x, 2)
        case "interrupt":
            raise KeyboardInterrupt("not the user's")
        case "stop":
            raise StopIteration(x)


def make_lock(x):
    return threading.Lock()


def ones(n_bytes, x):
    return bytes([x % 256]) * n_bytes


def n_bytes(*values):
    return sum(map(len, values))


def sleep_and_add(duration_s, *values):
    time.sleep(duration_s)
    return sum(values)


def sleep_and_pass(duration_s, value):
    time.sleep(duration_s)
    return value


def ones_after(folder, name, n_bytes):
    count(folder, name)
    return bytes([1]) * n_bytes


def wait_for(path):
    deadline = time.monotonic() + 20
    while not os.path.exists(path):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def n_bytes_after(_, *values):
    return sum(map(len, values))


def sleep_at_first(folder, name, duration_s):
    """Sleeps in its first run only. Returns: the number of the run."""
    n = count(folder, name)
    if n == 1:
        time.sleep(duration_s)
    return n


def sleep_and_join(duration_s, *values):
    time.sleep(duration_s)
    return b"".join(values)
