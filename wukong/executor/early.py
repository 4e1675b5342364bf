"""Outputs that are put while a run goes on: the driver's side of `PutEarly`.

The heartbeat thread looks at a run now and then and tells the core what large outputs there are; a
thread of its own puts what the core wants put, while the run's thread computes. One put at a time,
so that the next one takes along all that was made meanwhile. Nobody splits a run meanwhile, and a
run does not end before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from wukong.errors import SerializationError, StoreError
from wukong.executor.events import Action, EarlyPut, Event, Piled, PutEarly, PutItem
from wukong.executor.messages import Part
from wukong.executor.ops import Running
from wukong.executor.serialize import size_of
from wukong.executor.wire import PutRequest, Wire


def requests_of(items: Iterable[PutItem], values: dict[int, Any]) -> list[PutRequest]:
    """What the wire is asked for to make these entries."""
    return [
        PutRequest(e, tasks, [values[task] for task in tasks], blob) for e, tasks, blob in items
    ]


class EarlyPuts:
    """The early puts of one executor.

    Args:
        hand: gives the core an event, and returns what it wishes.
    """

    def __init__(self, hand: Callable[[Event], list[Action]]) -> None:
        self._hand = hand
        self._thread: threading.Thread | None = None
        self._part: Part | None = None
        self._exported: frozenset[int] = frozenset()
        self._n_seen = 0
        """Tasks of the part whose outputs the core knows."""
        self._put: list[int] = []
        """Tasks whose values were put, and are to be dropped."""

    @property
    def is_busy(self) -> bool:
        """A put is under way."""
        return self._thread is not None and self._thread.is_alive()

    def look(self, running: Running, n_done: int, values: dict[int, Any], wire: Wire) -> None:
        """Tell the core what a run has made, and begin what it wants. Whoever calls holds the gate.

        Args:
            n_done: tasks of the running part that have ended.
            values: by task; what is dropped is taken out of it.
        """
        if self.is_busy or not wire.is_measured:
            return
        if running.part is not self._part:
            exports = running.part.exports
            self._part, self._n_seen = running.part, 0
            self._exported = frozenset(task for spec in exports for task in spec.tasks)
            self._put = []
        self._drop(running, n_done, values)
        new = [t for t in running.part.tasks[self._n_seen : n_done] if t in self._exported]
        self._n_seen = n_done
        if not new:
            return
        for action in self._hand(Piled({task: size_of(values[task]) for task in new})):
            assert isinstance(action, PutEarly)
            self._thread = threading.Thread(
                target=self._write, args=(action, values, wire), daemon=True
            )
            self._thread.start()

    def finish(self) -> None:
        """Wait for the put that is under way; the core has its event then."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._part = None

    def _write(self, action: PutEarly, values: dict[int, Any], wire: Wire) -> None:
        try:
            entries = tuple(wire.put(requests_of(action.items, values)))
        except (SerializationError, StoreError, MemoryError):
            self._hand(EarlyPut(action.attempt, None))  # it is tried again at the end
            return
        if action.drop:
            self._put += [task for _, tasks, _ in action.items for task in tasks]
        self._hand(EarlyPut(action.attempt, entries))

    def _drop(self, running: Running, n_done: int, values: dict[int, Any]) -> None:
        """Take out what was put, and no task that has not ended reads."""
        if not self._put:
            return
        read = {slot for _, _, slots, _ in running.ops[n_done:] for slot in slots}
        for task in self._put:
            if task not in read:
                values.pop(task, None)
        self._put = [task for task in self._put if task in read]
