"""What starts executors: threads, processes, a cloud's functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from wukong.executor.messages import Invocation


class Invoker(Protocol):
    """Has executors started."""

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Ask for executors for these tokens; what fails stays queued in the store.

        Raises:
            InvokeError: some or all were not accepted.
        """
        ...

    def n_idle(self) -> int:
        """How many executors would start at once and the caller may count on: a hint."""
        ...


class Pool(Invoker, Protocol):
    """An invoker that belongs to a cluster, and ends with it."""

    def close(self) -> None:
        """End the executors that it has started, as far as it can. Idempotent."""
        ...


def share_of_idle(n_idle: int, n_busy: int, chance: float) -> int:
    """How many of the idle executors one of the busy ones may count on, when all look at once.

    Together they give away about as much as there is room for: 5,000 executors that see one idle
    would else all split what they run.

    Args:
        chance: from 0 up to 1, drawn anew each time; it rounds the share.
    """
    whole, rest = divmod(max(0, n_idle), max(1, n_busy))
    return whole + (chance * max(1, n_busy) < rest)
