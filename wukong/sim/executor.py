"""A simulated executor: the real core, and a driver that performs its actions in virtual time.

The twin of `wukong.executor.run`: one line of actions, one after the other; beside it a run that
takes time, and the heartbeat, which may take from the run what has not begun. Before and after every
action the executor may die, or be stopped and go on later.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from wukong.executor.core import ExecutorCore, Phase
from wukong.executor.messages import (
    AbsorbAnswered,
    Absorbed,
    Action,
    AskAbsorb,
    AttemptId,
    BlobId,
    Committed,
    Condemn,
    Delete,
    Done,
    Edges,
    Entry,
    Event,
    ExportId,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Grant,
    HolderId,
    Invocation,
    Invoke,
    Overdue,
    Part,
    Put,
    PutValues,
    Ran,
    Reason,
    Receipt,
    Refused,
    Renew,
    Renewed,
    ReportLost,
    Resume,
    Run,
    SendCommit,
    Start,
    Started,
    StoreFailed,
)
from wukong.sim.checks import Value, Violation
from wukong.sim.store import SimStore
from wukong.sim.world import JOB, World

T = TypeVar("T")

ERROR_BYTES = 500
STOPPED_S = (1.0, 30.0)
"""How long a stopped executor stays stopped."""
DRAIN_AT = 0.9
"""Of its time limit an executor uses this part before it takes nothing new."""
_NOBODY = Value(-1, AttemptId(""), (), False)
"""The value of every task where lineage does not matter."""


@dataclass(slots=True)
class _Running:
    """A run that is under way."""

    part: Part
    ends_at: list[float]
    """When each of its first `limit` tasks ends."""
    limit: int
    n_made: int
    """Values that exist."""
    serial: int
    """Changes whenever what is to happen next changes."""
    taken: int = 0
    """Limit before what has not begun was taken from it; 0: nothing is taken."""
    has_ended: bool = False
    """What was left of it has ended; it waits for `Resume`."""


class SimExecutor:
    """One executor, from its start to its death.

    Args:
        holder: its name.
        invoke: has other executors started.
        n_idle: how many would start at once.
        on_idle: called when it holds nothing any more.
        on_death: called when it dies, with the cause.
    """

    def __init__(
        self,
        world: World,
        store: SimStore,
        holder: HolderId,
        *,
        invoke: Callable[[Sequence[Invocation]], None],
        n_idle: Callable[[], int],
        on_idle: Callable[[SimExecutor], None],
        on_death: Callable[[SimExecutor, str], None],
    ) -> None:
        self.holder = holder
        self.is_alive = True
        self._world = world
        self._store = store
        self._setting = world.setting
        self._invoke = invoke
        self._n_idle = n_idle
        self._on_idle = on_idle
        self._on_death = on_death
        self._core = ExecutorCore(holder, world.setting.policy, world.new_attempt)
        self._line: deque[Action] = deque()
        self._is_busy = False
        self._is_working = False
        self._stopped_until = 0.0
        self._wakes_at: float | None = None
        self._running: _Running | None = None
        self._serial = 0
        self._values: dict[int, Value] = {}
        self._done: dict[int, Value] = {}
        """What was computed under the token that is held."""
        self._sent: dict[AttemptId, dict[int, Value]] = {}
        """The same for commits that have been sent, by attempt."""
        self._epoch = 0

    # -------------------------------------------------------------- what invokers call

    def begin(self, token: Invocation) -> None:
        """Run a token, and whatever it becomes."""
        self._is_working = True
        self._line.extend(self._core.start(token.job, token.token))
        self._go()

    def take(self) -> None:
        """Run the first queued token, and whatever it becomes."""
        self._is_working = self._is_busy = True
        attempt = self._world.new_attempt()

        def answered(epoch: int, grant: Grant | None) -> None:
            self._epoch = epoch
            self._is_busy = False
            if grant is None:
                self._go()
            elif not self._dies():
                self._done = {}
                self._line.extend(self._core.adopt(grant, self._world.now))
                self._go()

        self._store.call(
            lambda: self._store.take(self.holder, attempt),
            lambda epoch, grant: self._deliver(answered, epoch, grant),
            lambda: self._deliver(self.die, "took a token and did not learn of it"),
            may_be_late=False,
        )

    def drain(self, is_draining: bool) -> None:
        """Take nothing new, or take again."""
        self._core.is_draining = is_draining

    def die(self, cause: str) -> None:
        """End at once; nothing that it knows is left."""
        if not self.is_alive:
            return
        self._world.log(self.holder, f"dies: {cause}")
        self._world.counts["deaths"] += 1
        self.is_alive = False
        self._excuse()
        self._on_death(self, cause)

    # -------------------------------------------------------------- the loop over actions

    def _deliver(self, callback: Callable[..., None], *args: object) -> None:
        """Let something happen to this executor, unless it is dead, and later if it is stopped."""
        if not self.is_alive:
            return
        if self._world.now < self._stopped_until:
            self._world.at(self._stopped_until, self._deliver, callback, *args)
        else:
            callback(*args)

    def _later(self, delay_s: float, callback: Callable[..., None], *args: object) -> None:
        self._world.after(delay_s, self._deliver, callback, *args)

    def _dies(self) -> bool:
        """Throw the dice for a death or a stop here and now."""
        faults = self._setting.faults
        if self._world.hits(faults.death):
            self.die("killed")
            return True
        if self._world.hits(faults.stop):
            self._stopped_until = self._world.now + self._world.rng.uniform(*STOPPED_S)
            self._world.log(self.holder, f"is stopped until {self._stopped_until:.6f}")
            self._world.counts["stops"] += 1
        return False

    def _hand(self, event: Event) -> None:
        self._world.log(self.holder, event)
        self._line.extend(self._core.handle(event, self._world.now))
        self._core.check()

    def _answered(self, event: Event) -> None:
        """The action at the head of the line is done."""
        self._is_busy = False
        if not self._dies():
            self._hand(event)
            self._go()

    def _go(self) -> None:
        """Perform actions until one takes time or none is left."""
        while self._line and not self._is_busy:
            if self._dies():
                return
            if self._world.now < self._stopped_until:
                self._is_busy = True
                self._world.at(self._stopped_until, self._deliver, self._go_on)
                return
            action = self._line.popleft()
            self._world.log(self.holder, action)
            event = self._perform(action)
            if event is not None:
                self._hand(event)
        self._set_alarm()
        if not self._is_busy and self._is_working and self._core.phase is Phase.IDLE:
            self._is_working = False
            self._on_idle(self)

    def _go_on(self) -> None:
        self._is_busy = False
        self._go()

    def _set_alarm(self) -> None:
        at = self._core.wake_at()
        if at is not None and at != self._wakes_at:
            self._wakes_at = at
            self._world.at(at, self._deliver, self._beat, at)

    def _beat(self, at: float) -> None:
        if at != self._wakes_at:
            return
        self._wakes_at = None
        for action in self._core.tick(self._world.now):
            if isinstance(action, Renew):
                self._renew(action)
            else:
                self._line.append(action)
        self._go()

    # -------------------------------------------------------------- actions

    def _perform(self, action: Action) -> Event | None:
        """Do what takes no time and return its event, or begin what does."""
        store = self._store
        match action:
            case Start():
                self._ask(action, lambda: store.start(action, self.holder), self._started)
            case Fetch():
                return self._fetch(action)
            case Run(part, 0):
                return self._ran(part, 0)
            case Run(part, limit):
                self._world.counts["runs"] += 1
                self._run(part, limit)
            case Condemn():
                return self._condemn(action)
            case Resume(part, limit):
                self._resume(part, limit)
                return Done()
            case PutValues():
                return self._put(action)
            case SendCommit(commit):
                made = self._sent.setdefault(commit.attempt, self._done)
                self._ask(action, lambda: store.commit(commit, made), self._committed)
            case AskAbsorb():
                self._ask(action, lambda: store.absorb(action), self._absorb_answered)
            case Invoke(invocations):
                self._is_busy = True
                self._later(self._setting.platform.invoke_s, self._invoked, invocations)
            case Delete():
                self._delete(action)
            case Renew():
                self._renew(action)
            case ReportLost():
                self._ask(action, lambda: store.report_lost(action), lambda _: Done())
            case Forget():
                self._values = {}
                self._done = {}
                return Done()
        return None

    def _ask(
        self,
        action: Action,
        effect: Callable[[], T],
        to_event: Callable[[T], Event],
        typical_s: float | None = None,
        may_be_late: bool = True,
    ) -> None:
        """Send a request; its answer, or the lack of one, is the action's event."""
        self._is_busy = True

        def answered(epoch: int, result: T) -> None:
            self._epoch = epoch
            self._answered(to_event(result))

        self._store.call(
            effect,
            lambda epoch, result: self._deliver(answered, epoch, result),
            lambda: self._deliver(self._failed, action),
            typical_s=typical_s,
            may_be_late=may_be_late,
        )

    def _failed(self, action: Action) -> None:
        self._excuse()
        if isinstance(action, Delete):
            self._world.excused_blobs.update(action.blobs)
        self._answered(StoreFailed(action))

    def _excuse(self) -> None:
        """What the attempt has put may never be deleted by anybody."""
        if self._core.held is not None:
            self._world.excused.add(self._core.held[2])

    def _started(self, reply: Grant | Refused) -> Event:
        self._done = {}
        return Started(reply)

    def _committed(self, reply: Receipt | Refused) -> Event:
        self._done = {}
        self._sent.clear()
        return Committed(reply)

    def _absorb_answered(self, reply: Absorbed | Refused) -> Event:
        return AbsorbAnswered(reply)

    def _invoked(self, invocations: Sequence[Invocation]) -> None:
        self._invoke(invocations)
        self._answered(Done())

    def _renew(self, action: Renew) -> None:
        """The heartbeat goes on beside the line of actions."""

        def answered(reason: Reason | None) -> None:
            held = self._core.held
            if held is not None and held[2] == action.attempt:
                self._hand(Renewed(reason))
                self._go()

        self._store.call(
            lambda: self._store.renew(action),
            lambda _, reason: self._deliver(answered, reason),
            lambda: self._deliver(self._hand, StoreFailed(action)),
        )

    def _delete(self, action: Delete) -> None:
        def delete() -> None:
            self._ask(action, lambda: self._store.delete(action.blobs), lambda _: Done())

        if not action.confirm:
            delete()
            return
        self._is_busy = True
        self._store.confirm(
            self._epoch,
            lambda: self._deliver(delete),
            lambda: self._deliver(self._failed, action),
        )

    # -------------------------------------------------------------- inputs and outputs

    def _fetch(self, action: Fetch) -> Event | None:
        """Keep what the part reads of what is here, and read the rest of it."""
        part = action.part or self._setting.parts[int(action.base)]
        wanted = {value for _, values in part.inputs for value in values}
        self._values = {t: v for t, v in self._values.items() if t in wanted}
        missing = wanted.difference(self._values)
        to_read: list[tuple[ExportId, Entry, BlobId]] = []
        for export, entries in action.inputs:
            for entry in entries:
                if missing.isdisjoint(entry.tasks):
                    continue
                if entry.blob is None:
                    self._receive(entry, entry.payload)
                else:
                    to_read.append((export, entry, entry.blob))
        if not to_read:
            return self._fetched(part, wanted)
        platform, store = self._setting.platform, self._store
        n_bytes = sum(entry.size_bytes for _, entry, _ in to_read)
        self._world.counts["read bytes"] += n_bytes
        self._world.counts["blobs read"] += len(to_read)
        assert self._core.held is not None
        token = self._core.held[1]
        ids = [blob for _, _, blob in to_read]

        def read() -> tuple[set[BlobId], list[tuple[Value, ...]]]:
            missing = set(store.get(ids, lambda: store.is_live(token)))
            return missing, [store.blobs.get(blob, ()) for blob in ids]

        def arrived(result: tuple[set[BlobId], list[tuple[Value, ...]]]) -> Event:
            missing, payloads = result
            if missing:
                return FetchFailed(tuple(dict.fromkeys(e for e, _, b in to_read if b in missing)))
            for (_, entry, _), payload in zip(to_read, payloads, strict=True):
                self._receive(entry, payload)
            return self._fetched(part, wanted)

        takes_s = platform.blob_s + n_bytes / platform.blob_bytes_per_s
        self._ask(action, read, arrived, takes_s)
        return None

    def _receive(self, entry: Entry, payload: object) -> None:
        assert isinstance(payload, tuple)
        for task, value in zip(entry.tasks, payload, strict=True):
            self._values.setdefault(task, value)

    def _fetched(self, part: Part, wanted: set[int]) -> Event:
        if not wanted <= self._values.keys():
            raise Violation(f"{self.holder}: no {sorted(wanted - self._values.keys())} to read")
        return Fetched(part)

    def _put(self, action: PutValues) -> Event | None:
        entries: list[tuple[ExportId, Entry]] = []
        blobs: dict[BlobId, tuple[tuple[Value, ...], int]] = {}
        for export, tasks, blob in action.items:
            values = tuple([self._values[task] for task in tasks])
            size_bytes = sum(self._size(task) for task in tasks) if self._setting.is_measured else 0
            n_errors = sum(value.is_error for value in values)
            payload = values if blob is None else None
            entries.append((export, Entry(tasks, blob, payload, size_bytes, n_errors)))
            if blob is not None:
                blobs[blob] = values, size_bytes
        if not blobs:
            return Put(tuple(entries))
        platform = self._setting.platform
        n_bytes = sum(size_bytes for _, size_bytes in blobs.values())
        takes_s = platform.blob_s + n_bytes / platform.blob_bytes_per_s
        event = Put(tuple(entries))
        # A put that takes effect after it was given up leaves a blob behind: no harm, no test.
        self._ask(action, lambda: self._store.put(blobs), lambda _: event, takes_s, False)
        return None

    def _size(self, task: int) -> int:
        value = self._values[task]
        return ERROR_BYTES if value.is_error else self._setting.costs.sizes_bytes[task]

    # -------------------------------------------------------------- the run

    def _run(self, part: Part, limit: int) -> None:
        durations_s = self._setting.costs.durations_s
        tasks = part.tasks[:limit]
        ends_at = list(accumulate([durations_s[t] for t in tasks], initial=self._world.now))
        self._running = _Running(part, ends_at[1:], len(tasks), 0, 0)
        self._arm(self._running, 0)
        self._look_later(self._running)

    def _arm(self, running: _Running, first: int) -> None:
        """Set what happens next: the end of the run, or the executor's death on the way."""
        self._serial += 1
        running.serial = self._serial
        world, deadly = self._world, self._setting.costs.deadly
        end_at = running.ends_at[running.limit - 1]
        world.at(end_at, self._deliver, self._run_ended, running, running.serial)
        tasks = running.part.tasks
        fatal = next((i for i in range(first, running.limit) if tasks[i] in deadly), None)
        if deadly and fatal is not None:
            half_s = self._setting.costs.durations_s[tasks[fatal]] / 2
            dies_at = running.ends_at[fatal] - half_s
            world.at(dies_at, self._deliver, self._die_in_run, running, running.serial)
        elif world.hits(self._setting.faults.run_death):
            dies_at = world.rng.uniform(world.now, max(world.now, end_at))
            world.at(dies_at, self._deliver, self._die_in_run, running, running.serial)

    def _die_in_run(self, running: _Running, serial: int) -> None:
        if running is self._running and running.serial == serial:
            self._make(running, bisect_right(running.ends_at, self._world.now))
            self.die("killed by a task")

    def _run_ended(self, running: _Running, serial: int) -> None:
        if running is not self._running or running.serial != serial:
            return
        if running.taken:
            running.has_ended = True
            return
        part, n_done = running.part, running.limit
        self._make(running, n_done)
        self._running = None
        if self._dies():
            return
        raised = [t for t in part.tasks[:n_done] if t in self._setting.costs.raising]
        if raised and self._setting.fail_fast:
            self._hand(Ran(n_done, {}, error=f"task {raised[0]}"))
        else:
            self._hand(self._ran(part, n_done))
        self._go()

    def _ran(self, part: Part, n_done: int) -> Ran:
        if n_done == len(part.tasks):
            return Ran(n_done, self._sizes(part, ()))
        rest = part.tasks[n_done:]
        edges = Edges(rest, tuple(self._setting.reads[task] for task in rest))
        return Ran(n_done, self._sizes(part, edges.inputs), edges)

    def _make(self, running: _Running, n_made: int) -> None:
        """Compute the values of the first tasks."""
        tasks = running.part.tasks[running.n_made : n_made]
        running.n_made = max(n_made, running.n_made)
        self._world.counts["tasks"] += len(tasks)
        if self._world.checker is None:
            self._values.update(dict.fromkeys(tasks, _NOBODY))
            return
        for task in tasks:
            self._compute(task, task in self._setting.costs.raising)

    def _compute(self, task: int, fails: bool) -> None:
        assert self._core.held is not None
        try:
            inputs = tuple([self._values[source] for source in self._setting.reads[task]])
        except KeyError as missing:
            raise Violation(f"task {task} runs without the value of {missing}") from None
        is_error = fails or any(value.is_error for value in inputs)
        value = Value(task, self._core.held[2], inputs, is_error)
        self._values[task] = self._done[task] = value

    def _condemn(self, action: Condemn) -> Event:
        task = action.part.tasks[0]
        self._world.counts["condemned"] += 1
        if self._world.checker is not None:
            self._world.checker.condemned.add(task)
        if self._setting.fail_fast:
            return Ran(1, {}, error=f"task {task}")
        self._compute(task, True)
        return self._ran(action.part, 1)

    def _sizes(self, part: Part, reads: Sequence[Sequence[int]]) -> dict[int, int]:
        """Sizes of values that are exported, or that the rest reads, as far as they are here."""
        if not self._setting.is_measured:
            return {}
        wanted = dict.fromkeys(task for spec in part.exports for task in spec.tasks)
        wanted.update(dict.fromkeys(task for tasks in reads for task in tasks))
        return {task: self._size(task) for task in wanted if task in self._values}

    # -------------------------------------------------------------- splitting a run

    def _look_later(self, running: _Running) -> None:
        if self._setting.policy.split and running.limit > 1:
            self._later(self._setting.split_after_s, self._look, running)

    def _look(self, running: _Running) -> None:
        """Take what has not begun, and do with it what the core says."""
        n_done = bisect_right(running.ends_at, self._world.now)
        if running is not self._running or running.taken or n_done + 1 >= running.limit:
            return
        n_idle = self._n_idle()
        if n_idle < 1:
            self._look_later(running)
            return
        self._make(running, n_done)
        running.taken, running.limit = running.limit, n_done + 1
        self._arm(running, n_done)
        rest = running.part.tasks[n_done : running.taken]
        edges = Edges(rest, tuple(self._setting.reads[task] for task in rest))
        sizes = self._sizes(running.part, edges.inputs)
        self._hand(Overdue(n_done, sizes, edges, n_idle))
        self._go()

    def _resume(self, part: Part, limit: int) -> None:
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
        durations_s = self._setting.costs.durations_s
        rest = part.tasks[first + 1 : running.limit]
        begins_at = max(now, running.ends_at[first])
        ends = accumulate([durations_s[task] for task in rest], initial=begins_at)
        running.ends_at[first + 1 :] = list(ends)[1:]
        # A task that has ended already is dead or alive by now.
        self._arm(running, first + has_ended)
        self._look_later(running)
