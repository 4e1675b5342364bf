"""Runs of simulated executors: when each task ends, and what interrupts it.

A run is one number for each task, the time at which it ends, and one event at its end: a run of a
million tasks costs no more events than one of two. What interrupts it looks up how far it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from wukong.executor.messages import Part
from wukong.sim.world import World


@dataclass(slots=True)
class _Running:
    """A run that is under way."""

    part: Part
    ends_at: list[float]
    """When each of its first `limit` tasks ends."""
    limit: int
    n_made: int = 0
    """Values that exist."""
    serial: int = 0
    """Changes whenever what is to happen next changes."""
    taken: int = 0
    """Limit before what has not begun was taken from it; 0: nothing is taken."""
    has_ended: bool = False
    """What was left of it has ended; it waits to be resumed."""


class Runner:
    """The run of one executor, and the heartbeat thread that may take from it what has not begun.

    Args:
        deliver: calls back unless the executor is dead, and later when it is stopped.
        n_idle: how many executors would start at once.
        compute: makes the values of tasks.
        on_end: takes the part and how many of its tasks are done.
        on_overdue: takes the part, how many of its tasks are done, the others that were not beyond
            the limit, and how many executors are idle; `resume` must follow.
        die: kills the executor.
    """

    def __init__(
        self,
        world: World,
        *,
        deliver: Callable[..., None],
        n_idle: Callable[[], int],
        compute: Callable[[tuple[int, ...]], None],
        on_end: Callable[[Part, int], None],
        on_overdue: Callable[[Part, int, tuple[int, ...], int, float], None],
        die: Callable[[str], None],
    ) -> None:
        self._world = world
        self._costs = world.setting.costs
        self._deliver = deliver
        self._n_idle = n_idle
        self._compute = compute
        self._on_end = on_end
        self._on_overdue = on_overdue
        self._die = die
        self._running: _Running | None = None
        self._n_armed = 0

    def begin(self, part: Part, limit: int) -> None:
        """Run the first tasks of a part."""
        tasks = part.tasks[:limit]
        self._running = _Running(part, self._ends_at(tasks, self._world.now), len(tasks))
        self._arm(self._running, 0)
        self._look_later(self._running)

    def progress(self) -> tuple[Part, int | None] | None:
        """The part that runs, and how many of its tasks are done; None while it is interrupted.

        Returns: None when nothing runs. The values of what is done exist then.
        """
        running = self._running
        if running is None:
            return None
        if running.taken:
            return running.part, None
        n_done = min(bisect_right(running.ends_at, self._world.now), running.limit)
        self._make(running, n_done)
        return running.part, n_done

    def resume(self, part: Part, limit: int) -> None:
        """Let the run go on with `part`, or end after the task that is running."""
        running, now = self._running, self._world.now
        if running is None:
            return
        i = running.limit - 1 if running.taken else bisect_right(running.ends_at, now)
        taken, running.taken = running.taken, 0
        has_ended, running.has_ended = running.has_ended, False
        if limit == 0:
            running.limit = min(i + 1, running.limit)
            self._arm(running, running.limit - 1)
            return
        assert taken, "only an interrupted run is resumed"
        if part is running.part:
            first, running.limit = i, taken
        else:
            assert part.tasks[0] == running.part.tasks[i], "the running task stays here"
            running.ends_at = running.ends_at[i : i + 1]
            running.part, running.n_made = part, 0
            first, running.limit = 0, limit
        begins_at = max(now, running.ends_at[first])
        rest = part.tasks[first + 1 : running.limit]
        running.ends_at[first + 1 :] = self._ends_at(rest, begins_at)
        # A task that has ended already has killed its executor by now, or never will.
        self._arm(running, first + has_ended)
        self._look_later(running)

    def _ends_at(self, tasks: tuple[int, ...], begins_at: float) -> list[float]:
        durations_s = self._costs.durations_s
        return list(accumulate([durations_s[task] for task in tasks], initial=begins_at))[1:]

    def _arm(self, running: _Running, first: int) -> None:
        """Set what happens next: the end of the run, or the executor's death on the way."""
        self._n_armed += 1
        running.serial = self._n_armed
        world, tasks, deadly = self._world, running.part.tasks, self._costs.deadly
        end_at = running.ends_at[running.limit - 1]
        world.at(end_at, self._deliver, self._end, running, running.serial)
        fatal = None
        if deadly:
            fatal = next((i for i in range(first, running.limit) if tasks[i] in deadly), None)
        if fatal is not None:
            dies_at = running.ends_at[fatal] - self._costs.durations_s[tasks[fatal]] / 2
            world.at(dies_at, self._deliver, self._die_in_run, running, running.serial)
        elif world.hits(world.setting.faults.run_death):
            dies_at = world.rng.uniform(world.now, max(world.now, end_at))
            world.at(dies_at, self._deliver, self._die_in_run, running, running.serial)

    def _die_in_run(self, running: _Running, serial: int) -> None:
        if running is self._running and running.serial == serial:
            self._make(running, bisect_right(running.ends_at, self._world.now))
            self._die("killed by a task")

    def _end(self, running: _Running, serial: int) -> None:
        if running is not self._running or running.serial != serial:
            return
        if running.taken:
            running.has_ended = True
            return
        self._make(running, running.limit)
        self._running = None
        self._on_end(running.part, running.limit)

    def _make(self, running: _Running, n_made: int) -> None:
        """Compute the values of the first tasks."""
        self._compute(running.part.tasks[running.n_made : n_made])
        running.n_made = max(n_made, running.n_made)

    def _look_later(self, running: _Running) -> None:
        setting = self._world.setting
        if (setting.policy.split or setting.is_open) and running.limit > 1:
            self._world.after(setting.split_after_s, self._deliver, self._look, running)

    def _look(self, running: _Running) -> None:
        """Take what has not begun, if executors are idle."""
        n_done = bisect_right(running.ends_at, self._world.now)
        if running is not self._running or running.taken or n_done >= running.limit:
            return
        is_open = self._world.setting.is_open
        if n_done + 1 == running.limit and not (is_open and n_done):
            return
        n_idle = self._n_idle()
        if n_idle < 1 and not is_open:
            self._look_later(running)
            return
        self._make(running, n_done)
        running.taken, running.limit = running.limit, n_done + 1
        self._arm(running, n_done)
        rest = running.part.tasks[n_done : running.taken]
        begun_at = running.ends_at[n_done] - self._costs.durations_s[rest[0]]
        self._on_overdue(running.part, n_done, rest, n_idle, self._world.now - begun_at)
