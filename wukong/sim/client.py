"""A simulated client: the real core of a job, and a driver that performs its actions.

It may die and be replaced by one that attaches to the job. At the end it removes everything that
the job has left, as the real one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from wukong.executor.messages import (
    Create,
    Entry,
    ExportId,
    Invocation,
    JobView,
    Located,
    Status,
    StrandId,
)
from wukong.scheduler.job import (
    CancelJob,
    Collect,
    Collected,
    Created,
    CreateJob,
    End,
    Finish,
    InvokeTokens,
    JobAction,
    JobCore,
    JobEvent,
    JobPolicy,
    ListRecorded,
    LogWaiting,
    MarkLost,
    Recorded,
    Relaunched,
    RelaunchJob,
    StoreDown,
    SweepJob,
    Swept,
    Unreadable,
    Watched,
    WatchJob,
)
from wukong.sim.checks import Value, Violation
from wukong.sim.invokers import SimInvoker
from wukong.sim.store import SimStore
from wukong.sim.world import JOB, Setting, World

T = TypeVar("T")

RETRY_S = 0.2
SENT_AT_ONCE = 100


def make_request(setting: Setting) -> Create:
    """The job as a client hands it to the store."""
    parts = setting.parts
    entries = tuple(StrandId(str(s)) for s, part in enumerate(parts) if not part.inputs)
    program = Entry((), None, None, 0, 0)
    return Create(
        job=JOB,
        entries=entries,
        entry_inputs=((),) * len(entries),
        programs=tuple((StrandId(str(s)), program) for s in range(len(parts))),
        sources=(),
        n_requested=sum(spec.requested for part in parts for spec in part.exports),
        n_tasks=sum(len(part.tasks) for part in parts),
        n_strands=len(parts),
        fail_fast=setting.fail_fast,
    )


class SimClient:
    """Whoever wants the job's results."""

    def __init__(self, world: World, store: SimStore, invoker: SimInvoker) -> None:
        self._world = world
        self._store = store
        self._invoker = invoker
        self._request = make_request(world.setting)
        self._policy = JobPolicy(sweep_s=world.setting.silence_s / 2, n_generations_max=1000)
        self._life = 0
        """Grows with every death; what was on its way to an earlier client reaches nobody."""
        self._core = self._new_core(self._request)
        self._values: dict[int, Value] = {}
        self.status: Status | None = None
        self.finished_at: float | None = None
        for dies_at, returns_at in world.setting.faults.client_deaths:
            world.at(dies_at, self._die)
            world.at(returns_at, self._return)
        for time in world.setting.faults.second_starts:
            world.at(time, self._duplicate)

    def start(self) -> None:
        """Submit the job."""
        self._do(self._core.start(self._world.now))

    # -------------------------------------------------------------- life and death

    def _new_core(self, request: Create | None) -> JobCore:
        return JobCore(JOB, self._world.setting.parts, self._policy, request)

    def _die(self) -> None:
        if not self._world.is_over:
            self._world.log("client", "dies")
            self._life += 1

    def _return(self) -> None:
        if not self._world.is_over:
            self._world.log("client", "attaches")
            self._life += 1
            self._core = self._new_core(None)
            self.start()

    def _duplicate(self) -> None:
        """Take all that runs for stragglers."""
        if not self._store.is_forgotten:
            self._invoker.invoke(self._store.duplicate_all())

    def _alive(self, callback: Callable[[T], None]) -> Callable[[T], None]:
        """The callback, for as long as this client lives."""
        life = self._life

        def call(argument: T) -> None:
            if life == self._life:
                callback(argument)

        return call

    # -------------------------------------------------------------- the core's actions

    def _hand(self, event: JobEvent) -> None:
        self._world.log("client", event)
        actions = self._core.handle(event, self._world.now)
        self._core.check()
        self._do(actions)
        wake_at = self._core.wake_at()
        if wake_at is not None:
            self._world.at(wake_at, self._alive(self._tick), None)

    def _tick(self, _: None) -> None:
        self._do(self._core.tick(self._world.now))

    def _do(self, actions: list[JobAction]) -> None:
        for action in actions:
            self._world.log("client", action)
            self._perform(action)

    def _perform(self, action: JobAction) -> None:
        store = self._store
        match action:
            case CreateJob(request):
                # One that takes effect after the job was forgotten would begin it again.
                self._ask(lambda: store.create(request), Created, may_be_late=False)
            case InvokeTokens(invocations):
                self._invoke(invocations)
            case WatchJob(version, timeout_s):
                self._watch(version, timeout_s)
            case SweepJob():
                self._ask(store.expired, Swept)
            case MarkLost(exports):
                self._ask(lambda: store.mark_lost(exports), Watched)
            case ListRecorded():
                self._ask(store.recorded, Recorded)
            case RelaunchJob(relaunch):
                self._ask(lambda: store.relaunch(relaunch), Relaunched)
            case Collect():
                self._ask(store.collect, self._collected)
            case CancelJob():
                raise Violation("nobody has asked to cancel the job")
            case LogWaiting():
                pass
            case Finish(end, view):
                self._finish(end, view)

    def _invoke(self, invocations: Sequence[Invocation]) -> None:
        """Send invocations as fast as one caller can."""
        setting = self._world.setting
        rate_per_s = setting.platform.invokes_per_s
        if setting.scheme.client_invokes or setting.platform.relay or rate_per_s == float("inf"):
            self._invoker.invoke(invocations)
            return
        for first in range(0, len(invocations), SENT_AT_ONCE):
            some = invocations[first : first + SENT_AT_ONCE]
            self._world.after(first / rate_per_s, self._alive(self._invoker.invoke), some)

    def _ask(
        self, effect: Callable[[], T], to_event: Callable[[T], JobEvent], may_be_late: bool = True
    ) -> None:
        def answered(result: T) -> None:
            self._hand(to_event(result))

        reply = self._alive(answered)
        failure = self._alive(lambda _: self._hand(StoreDown()))
        self._store.call(
            effect, lambda _, result: reply(result), lambda: failure(None), may_be_late=may_be_late
        )

    def _watch(self, version: int, timeout_s: float) -> None:
        """Subscribe, and ask when nobody has told anything for long."""
        is_told = False

        def tell(view: JobView | None) -> None:
            nonlocal is_told
            if not is_told:
                is_told = True
                self._hand(Watched(view))

        def look(_: None) -> None:
            nonlocal is_told
            if not is_told:
                is_told = True
                self._ask(self._store.view, Watched)

        self._store.watch(version, self._alive(tell))
        self._world.after(timeout_s, self._alive(look), None)

    def _collected(self, answer: tuple[tuple[Located, ...], JobView | None]) -> JobEvent:
        """Read the results' blobs; of a failed job only the error is wanted."""
        results, view = answer
        if view is None or view.status is Status.RUNNING:
            return Watched(view)  # the store has failed over, and the job's end is taken back
        if view.status is Status.FAILED:
            return Collected(results)
        values: dict[int, Value] = {}
        unreadable: list[ExportId] = []
        for export, entries in results:
            for entry in entries:
                payload = entry.payload
                if entry.blob is not None:
                    if self._store.get([entry.blob], lambda: not self._store.is_forgotten):
                        unreadable.append(export)
                        continue
                    payload = self._store.blobs[entry.blob]
                assert isinstance(payload, tuple)
                values.update(zip(entry.tasks, payload, strict=True))
        if unreadable:
            return Unreadable(tuple(dict.fromkeys(unreadable)))
        self._values = values
        return Collected(results)

    # -------------------------------------------------------------- the end

    def _finish(self, end: End, view: JobView | None) -> None:
        if end is End.STORE_DOWN or end is End.GONE:
            # The user tries again: with the same job, or from the start when a failover of the
            # store has taken back its creation.
            self._core = self._new_core(self._request if end is End.GONE else None)
            self._world.after(RETRY_S, self._alive(lambda _: self.start()), None)
            return
        assert view is not None
        if end not in (End.DONE, End.FAILED):
            raise Violation(f"the job ended as {end.name}")
        self.status = view.status
        self._world.is_over = True
        self.finished_at = self._world.now
        if self._world.checker is not None:
            requested = [
                task
                for part in self._world.setting.parts
                for spec in part.exports
                if spec.requested
                for task in spec.tasks
            ]
            self._world.checker.ended(view.status, self._values, requested)
        self._forget()

    def _forget(self) -> None:
        self._store.call(
            self._store.forget,
            lambda _, __: self._delete(),
            lambda: self._world.after(RETRY_S, self._forget),
            may_be_late=False,
        )

    def _delete(self) -> None:
        self._store.call(
            self._store.delete_job,
            lambda _, __: None,
            lambda: self._world.after(RETRY_S, self._delete),
            may_be_late=False,
        )

    @property
    def values(self) -> Mapping[int, Value]:
        """The results, by task."""
        return self._values
