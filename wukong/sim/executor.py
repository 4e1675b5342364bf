"""A simulated executor: the real core, and a driver that performs its actions in virtual time.

The twin of `wukong.executor.run`: one line of actions, one after the other; beside it a run that
takes time, and the heartbeat, which may take from the run what has not begun. Before and after each
action the executor may die, or be stopped and go on later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from wukong.executor.core import ExecutorCore
from wukong.executor.events import (
    AbsorbAnswered,
    Action,
    AskAbsorb,
    Committed,
    Condemn,
    Delete,
    Done,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Invoke,
    Overdue,
    Put,
    PutEarly,
    PutValues,
    Ran,
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
from wukong.executor.messages import (
    AttemptId,
    BlobId,
    Commit,
    Entry,
    ExportId,
    Grant,
    HolderId,
    Invocation,
    Part,
    Reason,
    Receipt,
    Refused,
)
from wukong.executor.work import Phase
from wukong.sim.checks import Value
from wukong.sim.early import EarlyPuts
from wukong.sim.memory import Memory
from wukong.sim.runs import Runner
from wukong.sim.store import SimStore
from wukong.sim.world import World

T = TypeVar("T")

STOPPED_S = (1.0, 30.0)
"""How long a stopped executor stays stopped."""
DRAIN_AT = 0.9
"""Of its time limit an executor uses this part before it takes nothing new."""


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
        self._on_idle = on_idle
        self._on_death = on_death
        self._core = ExecutorCore(holder, world.setting.policy, world.new_attempt)
        self._line: deque[Action] = deque()
        self._current: Action | None = None
        self._is_busy = False
        self._is_working = False
        self._stopped_until = 0.0
        self._wakes_at: float | None = None
        self._memory = Memory(world)
        self._early = EarlyPuts(
            world, store, self._memory, self._deliver, self._hand_and_go, self._excuse
        )
        self._runner = Runner(
            world,
            deliver=self._deliver,
            n_idle=lambda: 0 if self._early.is_busy else n_idle(),
            compute=lambda tasks: self._memory.compute(tasks, self._attempt()),
            on_end=lambda part, n: self._early.wait(lambda: self._ended(part, n)),
            on_overdue=self._overdue,
            die=self.die,
        )
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
                self._memory.made = {}
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
        self._world.counts["drains"] += is_draining
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

    def _hand_and_go(self, event: Event) -> None:
        self._hand(event)
        self._go()

    def _answered(self, event: Event) -> None:
        """The action at the head of the line is done."""
        self._is_busy = False
        if not self._dies():
            self._hand_and_go(event)

    def _go(self) -> None:
        """Perform actions until one takes time or none is left."""
        while self._line and not self._is_busy:
            if self._dies():
                return
            if self._world.now < self._stopped_until:
                self._is_busy = True
                self._world.at(self._stopped_until, self._deliver, self._go_on)
                return
            self._current = action = self._line.popleft()
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
                self._runner.begin(part, limit)
                self._early.begin(self._runner)
            case Condemn():
                return self._condemn(action)
            case Resume(part, limit):
                self._runner.resume(part, limit)
                return Done()
            case PutValues():
                return self._put(action)
            case PutEarly():
                self._early.put(action)
                return Done()
            case SendCommit(commit):
                self._commit(action, commit)
            case AskAbsorb():
                self._ask(action, lambda: store.absorb(action), AbsorbAnswered)
            case Invoke(invocations):
                self._is_busy = True
                self._later(self._setting.invoke_s(len(invocations)), self._invoked, invocations)
            case Delete():
                self._delete(action)
            case Renew():
                self._renew(action)
            case ReportLost():
                self._ask(action, lambda: store.report_lost(action), lambda _: Done())
            case Forget():
                self._memory.clear()
                return Done()
        return None

    def _ask(
        self,
        action: Action,
        effect: Callable[[], T],
        to_event: Callable[[T], Event],
        typical_s: float | None = None,
        may_be_late: bool = True,
        n_operations: int = 1,
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
            n_operations=n_operations,
        )

    def _failed(self, action: Action) -> None:
        self._excuse()
        self._answered(StoreFailed(action))

    def _excuse(self) -> None:
        """What the attempt has put, or was to delete, may never be deleted by anybody."""
        if self._core.held is not None:
            self._world.excused.add(self._core.held[2])
        for action in (self._current, *self._line):
            if isinstance(action, Delete):
                self._world.excused_blobs.update(action.blobs)

    def _started(self, reply: Grant | Refused) -> Event:
        self._memory.made = {}
        return Started(reply)

    def _committed(self, reply: Receipt | Refused) -> Event:
        self._memory.made = {}
        self._sent.clear()
        return Committed(reply)

    def _commit(self, action: SendCommit, commit: Commit) -> None:
        made = self._sent.setdefault(commit.attempt, dict(self._memory.made))

        def send(n_operations: int) -> None:
            self._ask(
                action,
                lambda: self._store.commit(commit, made),
                self._committed,
                n_operations=n_operations,
            )

        n_sets, n_edges = self._setting.scheme.sets_and_increments(commit)
        self._world.counts.update({"sets": n_sets, "increments": n_edges})
        if not n_sets:
            send(max(1, n_edges))
            return
        self._is_busy = True
        self._store.call(
            lambda: None,
            lambda *_: self._deliver(send, max(1, n_edges)),
            lambda: self._deliver(self._failed, action),
            n_operations=n_sets,
        )

    def _invoked(self, invocations: Sequence[Invocation]) -> None:
        self._invoke(invocations)
        self._answered(Done())

    def _renew(self, action: Renew) -> None:
        """The heartbeat goes on beside the line of actions."""

        def answered(reason: Reason | None) -> None:
            self._hand(Renewed(action.attempt, reason))
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
        missing = self._memory.keep(wanted)
        to_read: list[tuple[ExportId, Entry, BlobId]] = []
        n_gets = 0
        for export, entries in action.inputs:
            for entry in entries:
                if missing.isdisjoint(entry.tasks):
                    continue
                if entry.blob is None:
                    n_gets += self._setting.scheme.edge_operations
                    self._memory.receive(entry, entry.payload)
                else:
                    to_read.append((export, entry, entry.blob))
        self._world.counts["gets"] += n_gets
        if not to_read:
            if not n_gets:
                return self._fetched(part, wanted)
            here = self._fetched(part, wanted)
            self._ask(action, lambda: None, lambda _: here, n_operations=n_gets)
            return None
        store = self._store
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
                self._memory.receive(entry, payload)
            return self._fetched(part, wanted)

        takes_s = self._setting.move_s([entry.size_bytes for _, entry, _ in to_read])
        self._ask(action, read, arrived, takes_s, n_operations=n_gets)
        return None

    def _fetched(self, part: Part, wanted: set[int]) -> Event:
        self._memory.check_has(wanted, self.holder)
        return Fetched(part)

    def _put(self, action: PutValues) -> Event | None:
        entries, blobs = self._memory.encode(action.items)
        event = Put(entries)
        if not blobs:
            return event
        takes_s = self._setting.move_s([size_bytes for _, size_bytes in blobs.values()])
        # A put that takes effect after it was given up leaves a blob behind: no harm, no test.
        self._ask(action, lambda: self._store.put(blobs), lambda _: event, takes_s, False, 0)
        return None

    # -------------------------------------------------------------- the run

    def _ended(self, part: Part, n_done: int) -> None:
        """The run has gone through its first tasks."""
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
            return Ran(n_done, self._memory.sizes(part, ()))
        edges = self._memory.edges(part.tasks[n_done:])
        return Ran(n_done, self._memory.sizes(part, edges.inputs), edges)

    def _overdue(self, part: Part, done: int, rest: tuple[int, ...], n: int, ran_s: float) -> None:
        """What has not begun was taken from the run, while n executors idle."""
        edges = self._memory.edges(rest)
        self._hand(Overdue(done, self._memory.sizes(part, edges.inputs), edges, n, ran_s))
        self._go()

    def _attempt(self) -> AttemptId:
        assert self._core.held is not None, "no token is held"
        return self._core.held[2]

    def _condemn(self, action: Condemn) -> Event:
        (task,) = action.part.tasks
        self._world.counts["condemned"] += 1
        if self._world.checker is not None:
            self._world.checker.condemned.add(task)
        if self._setting.fail_fast:
            return Ran(1, {}, error=f"task {task}")
        self._memory.compute((task,), self._attempt(), is_given_up=True)
        return self._ran(action.part, 1)
