"""The functions of the micro graphs, in a module that imports nothing.

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
