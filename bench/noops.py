"""The functions of the micro graphs, in a module that imports nothing at its head.

They do as little as a function can while the graph's result still shows that each of them ran.
"""

from collections.abc import Iterable


def same(x: int) -> int:
    """Return the argument."""
    return x


def add(x: int, y: int) -> int:
    """Return the sum of two numbers."""
    return x + y


def increment(x: int) -> int:
    """Return the next number."""
    return x + 1


def total(numbers: Iterable[int]) -> int:
    """Return the sum of many numbers."""
    return sum(numbers)


def back(payload: bytes) -> bytes:
    """Return the argument."""
    return payload


def whereabouts(pause_s: float) -> tuple[int, int, int]:
    """Say which process and thread this runs in, and how many threads its BLAS has.

    Args:
        pause_s: to be waited, so that others take part of many such calls.
    """
    import os
    import threading
    import time

    import numpy  # noqa: F401  # its BLAS is asked for
    import threadpoolctl

    time.sleep(pause_s)
    pools = threadpoolctl.threadpool_info()
    n_threads = max((p["num_threads"] for p in pools if p["user_api"] == "blas"), default=0)
    return os.getpid(), threading.get_native_id(), n_threads
