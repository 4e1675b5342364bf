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
        """How many executors would start at once: a hint."""
        ...


class Pool(Invoker, Protocol):
    """An invoker that belongs to a cluster, and ends with it."""

    def close(self) -> None:
        """End the executors that it has started, as far as it can. Idempotent."""
        ...
