"""What a task will take: estimates by function, learned from the jobs that have run.

An estimate that is wrong costs little: a strand that turns out long is split while it runs. So one
mean for each function is enough, whatever the sizes of its arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wukong.scheduler.calls import Call

NEW_WEIGHT = 0.5
"""Weight of the last job's mean: sizes change from job to job more than they repeat."""
N_KNOWN_MAX = 10_000
"""Functions that are remembered; the oldest are forgotten first."""

STRANDS_PER_EXECUTOR = 4
"""Of a graph without other limits: enough that executors end together (design.md, section 2)."""
STRANDS_MAX = 4_000
"""Beyond so many, a job has fewer for each executor, and at last one: its operations follow each
other on one server, and two for each strand occupy that for half a second here (`bench scale`)."""


def strands_per_executor(n_executors: int) -> float:
    """How many strands to cut a graph into, for each executor."""
    # A little more than one: tasks of equal cost then fill strands that are no larger than a share.
    return min(STRANDS_PER_EXECUTOR, max(1.1, STRANDS_MAX / n_executors))


class Costs:
    """Seconds a call of each function has taken. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    def estimate(self, calls: Sequence[Call]) -> NDArray[np.float64] | None:
        """Seconds of each task (n); None when no function of the graph is known.

        A function that is not known counts as the mean of those that are.
        Cost: 0.2 us a task.
        """
        heads = [id(call[0]) for call in calls]
        with self._lock:
            known = {
                head: self._seconds.get(_name(call[0]))
                for head, call in dict(zip(heads, calls, strict=True)).items()
            }
        found = [s for s in known.values() if s is not None]
        if not found:
            return None
        mean = sum(found) / len(found)
        seconds = {head: mean if s is None else s for head, s in known.items()}
        return np.fromiter(map(seconds.__getitem__, heads), np.float64, len(heads))

    def learn(self, calls: Sequence[Call], seconds: Sequence[float]) -> None:
        """Remember how long tasks took.

        Args:
            calls: of the tasks that ran (n).
            seconds: of each of them (n).
        """
        spent: dict[int, float] = {}
        counts: dict[int, int] = {}
        heads = [id(call[0]) for call in calls]
        for head, took_s in zip(heads, seconds, strict=True):
            spent[head] = spent.get(head, 0.0) + took_s
            counts[head] = counts.get(head, 0) + 1
        distinct = dict(zip(heads, calls, strict=True))
        with self._lock:
            for head, call in distinct.items():
                mean = spent[head] / counts[head]
                name = _name(call[0])
                before = self._seconds.pop(name, mean)
                self._seconds[name] = NEW_WEIGHT * mean + (1 - NEW_WEIGHT) * before
            while len(self._seconds) > N_KNOWN_MAX:
                del self._seconds[next(iter(self._seconds))]


def _name(func: Callable[..., Any]) -> str:
    """A name that the same function has in the next graph."""
    inner: Any = func
    while hasattr(inner, "func"):  # partials
        inner = inner.func
    kind = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"
