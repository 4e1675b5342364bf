"""The client's decisions about one job: launch, watch, sweep, relaunch, give up. Pure.

    CreateJob --> InvokeTokens --> WatchJob --+--> done:   Collect --> Finish
                                     ^        +--> failed: Collect --> Finish
                                     |        +--> lost:   ListRecorded --> RelaunchJob --+
                                     +---------- nothing yet, sweep, log ------------------+

The client schedules nothing: executors find out themselves what can run. It only looks after what
an executor that died could not, and waits. A client that dies leaves a job that another one can
attach to, which begins with WatchJob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from wukong.executor.messages import (
    Create,
    ExportId,
    Invocation,
    JobId,
    JobView,
    Located,
    Part,
    Relaunch,
    RunningToken,
    Status,
    TokenId,
)
from wukong.scheduler.recovery import find_missing, find_stragglers, plan_relaunch


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """What may be tuned."""

    sweep_s: float = 2.5
    """Time between looks for silent tokens; half of the store's `silence_s`."""
    deadline_s: float | None = None
    """The job ends in `JobTimeout` after this long; None: never."""
    log_after_s: float = 10.0
    """First line about what a waiting client waits for; the intervals double."""
    log_every_max_s: float = 300.0
    give_up_s: float = 60.0
    """The store has not answered for this long: report it."""
    retry_s: float = 0.2
    speculate: bool = False
    """Start strands a second time that take far longer than others have let expect."""
    n_generations_max: int = 5
    """After so many losses of blobs the job fails: something keeps deleting them."""


# ------------------------------------------------------------------ events and actions


@dataclass(frozen=True, slots=True)
class Created:
    """The job is in the store; these tokens are to be invoked."""

    invocations: tuple[Invocation, ...]


@dataclass(frozen=True, slots=True)
class Watched:
    """The job as it stands, after a change or when the time was up; None: it is gone."""

    view: JobView | None


@dataclass(frozen=True, slots=True)
class Swept:
    """Silent tokens to invoke."""

    invocations: tuple[Invocation, ...]


@dataclass(frozen=True, slots=True)
class RunningListed:
    """What runs, and how long what has been committed took: (tasks, seconds) of each run."""

    running: tuple[RunningToken, ...]
    finished: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Duplicated:
    """Tokens that may be run a second time."""

    invocations: tuple[Invocation, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """Exports that are complete, after a loss."""

    exports: tuple[ExportId, ...]


@dataclass(frozen=True, slots=True)
class Relaunched:
    """A new generation runs; these tokens are to be invoked."""

    invocations: tuple[Invocation, ...]


@dataclass(frozen=True, slots=True)
class Collected:
    """Results and traces are here."""

    results: tuple[Located, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Results that the client has collected cannot be read: their blobs are gone."""

    exports: tuple[ExportId, ...]


@dataclass(frozen=True, slots=True)
class StoreDown:
    """The store did not answer the last action."""


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The user wants the job to end."""


JobEvent = (
    Created
    | Watched
    | Swept
    | RunningListed
    | Duplicated
    | Recorded
    | Relaunched
    | Collected
    | Unreadable
    | StoreDown
    | CancelAsked
)


@dataclass(frozen=True, slots=True)
class CreateJob:
    """Answer: `Created`."""

    request: Create


@dataclass(frozen=True, slots=True)
class InvokeTokens:
    """No answer; what fails is found by the sweeper."""

    invocations: tuple[Invocation, ...]


@dataclass(frozen=True, slots=True)
class WatchJob:
    """Wait for a change. Answer: `Watched`."""

    version: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class SweepJob:
    """Look for silent tokens. Answer: `Swept`."""


@dataclass(frozen=True, slots=True)
class ListRunning:
    """Answer: `RunningListed`."""


@dataclass(frozen=True, slots=True)
class DuplicateTokens:
    """Answer: `Duplicated`."""

    tokens: tuple[TokenId, ...]


@dataclass(frozen=True, slots=True)
class MarkLost:
    """Tell the store that these exports cannot be read. Answer: `Watched`."""

    exports: tuple[ExportId, ...]


@dataclass(frozen=True, slots=True)
class ListRecorded:
    """Answer: `Recorded`."""


@dataclass(frozen=True, slots=True)
class RelaunchJob:
    """Answer: `Relaunched`."""

    request: Relaunch


@dataclass(frozen=True, slots=True)
class Collect:
    """Read the requested exports and the traces. Answer: `Collected`, `Unreadable`."""


@dataclass(frozen=True, slots=True)
class CancelJob:
    """No answer."""


@dataclass(frozen=True, slots=True)
class LogWaiting:
    """Say what the job waits for. No answer."""

    view: JobView
    waited_s: float


class End(IntEnum):
    """How the job ended for this client."""

    DONE = 1
    FAILED = 2
    CANCELLED = 3
    TIMED_OUT = 4
    GONE = 5
    STORE_DOWN = 6
    LOST_TOO_OFTEN = 7
    NOT_REPEATABLE = 8
    CONSTANT_LOST = 9


@dataclass(frozen=True, slots=True)
class Finish:
    """The last action: raise, or return the results."""

    end: End
    view: JobView | None
    results: tuple[Located, ...] = ()


JobAction = (
    CreateJob
    | InvokeTokens
    | WatchJob
    | SweepJob
    | ListRunning
    | DuplicateTokens
    | MarkLost
    | ListRecorded
    | RelaunchJob
    | Collect
    | CancelJob
    | LogWaiting
    | Finish
)


# ------------------------------------------------------------------ the core


class JobCore:
    """The state machine of one job's client.

    Args:
        job: its id.
        parts: the static strands' parts, for a new generation after a loss.
        policy: see `JobPolicy`.
        request: how to create the job; None to attach to one that exists.
        once: tasks that may not be run again.
    """

    def __init__(
        self,
        job: JobId,
        parts: Sequence[Part],
        policy: JobPolicy,
        request: Create | None,
        once: frozenset[int] = frozenset(),
    ) -> None:
        self._job = job
        self._parts = parts
        self._n_requested = sum(spec.requested for part in parts for spec in part.exports)
        self._policy = policy
        self._request = request
        self._once = once
        self._view: JobView | None = None
        self._seen_at: dict[TokenId, float] = {}
        """When tokens that run were seen running first."""
        self._begun_at = 0.0
        self._sweep_at = 0.0
        self._log_at = 0.0
        self._log_s = policy.log_after_s
        self._failing_since: float | None = None
        self._last: JobAction | None = None
        self._retry_at: float | None = None
        self.is_finished = False

    def start(self, now: float) -> list[JobAction]:
        """Begin."""
        self._begun_at = now
        self._sweep_at = now + self._policy.sweep_s
        self._log_at = now + self._log_s
        if self._request is not None:
            return self._do(CreateJob(self._request))
        self._sweep_at = now  # whoever looked after the job before is gone
        return self._do(WatchJob(-1, 0.0))

    def handle(self, event: JobEvent, now: float) -> list[JobAction]:
        """Decide what to do about a fact."""
        if self.is_finished:
            return []
        if isinstance(event, StoreDown):
            return self._store_down(now)
        self._failing_since = None
        match event:
            case Swept(invocations):
                # Also when there are none: executors that cannot start are an error then.
                invoke_any = InvokeTokens(invocations)
                if self._policy.speculate:
                    return [invoke_any, *self._do(ListRunning())]
                return [invoke_any, *self._watch(now)]
            case RunningListed(running, finished):
                tokens = self._stragglers(running, finished, now)
                return self._do(DuplicateTokens(tokens)) if tokens else self._watch(now)
            case Created(invocations) | Relaunched(invocations) | Duplicated(invocations):
                invoke: list[JobAction] = [InvokeTokens(invocations)] if invocations else []
                return [*invoke, *self._watch(now)]
            case Watched(view):
                return self._watched(view, now)
            case Recorded(exports):
                assert self._view is not None
                return self._relaunch(self._view, set(exports) - set(self._view.lost))
            case Collected(results):
                assert self._view is not None
                if self._view.status is not Status.DONE:
                    return self._finish(End.FAILED, results)
                if len(results) < self._n_requested:
                    return self._watch(now)  # a failover has taken back what was seen (seed 3710)
                return self._finish(End.DONE, results)
            case Unreadable(exports):
                if self._view is not None and self._view.status is Status.FAILED:
                    return self._finish(End.FAILED)  # what it would have returned is of no use
                return self._do(MarkLost(exports))
            case CancelAsked():
                return [CancelJob(), *self._finish(End.CANCELLED)]

    def wake_at(self) -> float | None:
        """When `tick` is due after a failure of the store; waiting is otherwise in `WatchJob`."""
        return self._retry_at

    def tick(self, now: float) -> list[JobAction]:
        """Repeat what the store did not answer."""
        if self._retry_at is None or now < self._retry_at:
            return []
        self._retry_at = None
        assert self._last is not None
        return [self._last]

    def check(self) -> None:
        """Assert every invariant."""
        assert (self._retry_at is None) or (self._failing_since is not None)
        assert self._log_s <= max(self._policy.log_every_max_s, self._policy.log_after_s)

    # -------------------------------------------------------------- deciding

    def _watched(self, view: JobView | None, now: float) -> list[JobAction]:
        if view is None:
            return self._finish(End.GONE)
        self._view = view
        if view.status in (Status.DONE, Status.FAILED):
            return self._do(Collect())
        if view.status is Status.CANCELLED:
            return self._finish(End.CANCELLED)
        if view.lost:
            if view.generation >= self._policy.n_generations_max:
                return [CancelJob(), *self._finish(End.LOST_TOO_OFTEN)]
            return self._do(ListRecorded())
        return self._watch(now)

    def _watch(self, now: float) -> list[JobAction]:
        """Wait on, after whatever is due."""
        policy = self._policy
        actions: list[JobAction] = []
        deadline = float("inf")
        if policy.deadline_s is not None:
            deadline = self._begun_at + policy.deadline_s
            if now >= deadline:
                return [CancelJob(), *self._finish(End.TIMED_OUT)]
        if now >= self._log_at and self._view is not None:
            actions.append(LogWaiting(self._view, now - self._begun_at))
            self._log_s = min(2 * self._log_s, policy.log_every_max_s)
            self._log_at = now + self._log_s
        if now >= self._sweep_at:
            self._sweep_at = now + policy.sweep_s
            return [*actions, *self._do(SweepJob())]
        until = min(self._sweep_at, self._log_at, deadline)
        version = -1 if self._view is None else self._view.version
        return [*actions, *self._do(WatchJob(version, max(0.0, until - now)))]

    def _stragglers(
        self, running: Sequence[RunningToken], finished: Sequence[tuple[int, float]], now: float
    ) -> tuple[TokenId, ...]:
        self._seen_at = {token: self._seen_at.get(token, now) for token, *_ in running}
        candidates = []
        for token, strand, tasks, n_starts in running:
            tasks = self._parts[int(strand)].tasks if tasks is None else tasks
            if n_starts == 1 and self._once.isdisjoint(tasks):
                candidates.append((token, len(tasks), self._seen_at[token]))
        return find_stragglers(finished, candidates, now)

    def _store_down(self, now: float) -> list[JobAction]:
        if self._failing_since is None:
            self._failing_since = now
        deadline_s = self._policy.deadline_s
        is_late = deadline_s is not None and now - self._begun_at >= deadline_s
        if is_late or now - self._failing_since >= self._policy.give_up_s:
            self._retry_at = None
            return self._finish(End.STORE_DOWN)
        self._retry_at = now + self._policy.retry_s
        return []

    def _do(self, action: JobAction) -> list[JobAction]:
        """Remember the action, to repeat it if the store does not answer."""
        self._last = action
        return [action]

    def _finish(self, end: End, results: tuple[Located, ...] = ()) -> list[JobAction]:
        self.is_finished = True
        return [Finish(end, self._view, results)]

    def _relaunch(self, view: JobView, surviving: set[ExportId]) -> list[JobAction]:
        again = find_missing(self._parts, surviving)
        made = {spec.export for part in self._parts for spec in part.exports}
        if any(e not in made | surviving for i in again for e, _ in self._parts[i].inputs):
            return [CancelJob(), *self._finish(End.CONSTANT_LOST)]
        if any(not self._once.isdisjoint(self._parts[i].tasks) for i in again):
            return [CancelJob(), *self._finish(End.NOT_REPEATABLE)]
        generation = view.generation + 1
        return self._do(RelaunchJob(plan_relaunch(self._job, generation, self._parts, surviving)))
