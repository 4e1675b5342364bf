"""Outputs that a simulated executor puts while its run goes on: the twin of `executor.early`."""

from __future__ import annotations

from collections.abc import Callable

from wukong.executor.events import EarlyPut, Event, Piled, PutEarly
from wukong.executor.messages import Part
from wukong.sim.memory import Memory
from wukong.sim.runs import Runner
from wukong.sim.store import SimStore
from wukong.sim.world import World

PILE_BYTES = 1 << 28
"""No simulated run makes so much: nobody looks for more than this."""
LOOKS_EVERY = 0.2
"""Of the time between looks for a split, which most simulated runs are shorter than."""


class EarlyPuts:
    """The early puts of one executor.

    Args:
        deliver: calls back unless the executor is dead, and later when it is stopped.
        hand: gives the core an event, and has its wishes performed.
        excuse: what the attempt has put may never be deleted.
    """

    def __init__(
        self,
        world: World,
        store: SimStore,
        memory: Memory,
        deliver: Callable[..., None],
        hand: Callable[[Event], None],
        excuse: Callable[[], None],
    ) -> None:
        self._world = world
        self._store = store
        self._memory = memory
        self._deliver = deliver
        self._hand = hand
        self._excuse = excuse
        self._runner: Runner | None = None
        self._n_runs = 0
        self._part: Part | None = None
        self._n_seen = 0
        self._at_end: Callable[[], None] | None = None
        self._put_tasks: set[int] = set()
        self.is_busy = False

    def begin(self, runner: Runner) -> None:
        """A run begins: look at it now and then."""
        self._runner = runner
        self._part = None
        self._n_runs += 1
        policy = self._world.setting.policy
        if policy.early_bytes or policy.pile_bytes < PILE_BYTES:
            self._look_later(self._n_runs)

    def _look_later(self, run: int) -> None:
        every_s = self._world.setting.split_after_s * LOOKS_EVERY
        self._world.after(every_s, self._deliver, self._look, run)

    def _look(self, run: int) -> None:
        assert self._runner is not None
        progress = self._runner.progress()
        if progress is None or run != self._n_runs:
            return
        self._look_later(run)
        part, n_done = progress
        if self.is_busy or n_done is None:
            return
        if part is not self._part:
            self._part, self._n_seen, self._put_tasks = part, 0, set()
        self._drop(part, n_done)
        exported = {task for spec in part.exports for task in spec.tasks}
        new = exported.intersection(part.tasks[self._n_seen : n_done])
        self._n_seen = n_done
        sizes = self._memory.sizes(part, ())
        found = {task: sizes[task] for task in sorted(new) if task in sizes}
        if found:
            self._hand(Piled(found))

    def put(self, action: PutEarly) -> None:
        """Put beside the line of actions."""
        entries, blobs = self._memory.encode(action.items)
        self.is_busy = True
        self._world.counts["early puts"] += 1
        if action.drop:
            self._put_tasks.update(task for _, tasks, _ in action.items for task in tasks)
        self._store.call(
            lambda: self._store.put(blobs),
            lambda *_: self._deliver(self._done, EarlyPut(action.attempt, entries)),
            lambda: self._deliver(self._done, EarlyPut(action.attempt, None)),
            typical_s=self._world.setting.move_s([size_bytes for _, size_bytes in blobs.values()]),
            may_be_late=False,
        )

    def _done(self, event: EarlyPut) -> None:
        self.is_busy = False
        if event.entries is None:
            self._excuse()
            self._put_tasks = set()
        self._hand(event)
        if self._at_end is not None:
            then, self._at_end = self._at_end, None
            then()

    def wait(self, then: Callable[[], None]) -> None:
        """A run has ended: go on when nothing is being put."""
        self._n_runs += 1
        if self.is_busy:
            self._at_end = then
        else:
            then()

    def _drop(self, part: Part, n_done: int) -> None:
        read = {v for t in part.tasks[n_done:] for v in self._world.setting.reads[t]}
        self._memory.drop(self._put_tasks - read)
        self._put_tasks &= read
