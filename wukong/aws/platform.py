"""What a platform of functions decides: who runs where, what waits, what is refused. Pure.

    invoke --> deliver to a warm environment | start a new one | queue (events) | refuse (others)
    freed  --> deliver the next event to it  | keep it warm, frozen | recycle it
    failed --> the event again, later        | bury it

The cloud's rules, for a laptop: `wukong.aws.lambda_service` performs the actions on real processes.
It differs from the cloud in one point, to the better: an event that was throttled is delivered as
soon as there is room, where the cloud tries again after seconds.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from typing import NewType

from wukong.aws.limits import (
    BURST,
    CHAIN_MAX,
    EVENT_AGE_MAX_S,
    RAMP_PER_S,
    RETRY_AFTER_S,
)

RequestId = NewType("RequestId", str)
EnvironmentId = NewType("EnvironmentId", int)

LOOP = "RecursiveInvocation"
"""The reason of a refusal that is no throttling."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a function scales, and what becomes of its failures."""

    concurrency: int = 2
    """Invocations at a time."""
    is_reserved: bool = False
    """The concurrency is the function's own, and not the account's: for the words of a refusal."""
    burst: float = BURST
    """New environments at once."""
    ramp_per_s: float = RAMP_PER_S
    """New environments a second after the burst."""
    idle_s: float = 300.0
    """An environment that has idled for so long is ended."""
    n_invocations_max: int | None = None
    """An environment is recycled after so many invocations."""
    age_max_s: float = 3600.0
    """An environment is recycled when it is so old."""
    n_retries: int = 2
    """Of an event whose invocation failed (MaximumRetryAttempts, 0 to 2)."""
    retry_after_s: tuple[float, ...] = RETRY_AFTER_S
    """Waits before the retries."""
    event_age_max_s: float = EVENT_AGE_MAX_S
    """MaximumEventAgeInSeconds."""
    allows_loops: bool = False
    """RecursiveLoop: Allow. Otherwise a long chain of invocations is cut."""


@dataclass(frozen=True, slots=True)
class Request:
    """One invocation as the platform sees it."""

    id: RequestId
    function: str
    is_event: bool
    accepted_at: float
    depth: int = 0
    """Invocations in the chain that led to this one."""
    n_failures: int = 0


# ------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class StartEnvironment:
    """Start an environment, and deliver the request to it when it is ready."""

    environment: EnvironmentId
    request: Request


@dataclass(frozen=True, slots=True)
class Deliver:
    """Thaw an environment, and hand it the request."""

    environment: EnvironmentId
    request: Request


@dataclass(frozen=True, slots=True)
class EndEnvironment:
    """End an environment that idles."""

    environment: EnvironmentId


@dataclass(frozen=True, slots=True)
class Refuse:
    """Refuse a request, with the platform's word for the reason."""

    request: Request
    reason: str


@dataclass(frozen=True, slots=True)
class Remember:
    """An event stays in the queue, with a failure more."""

    request: Request
    ready_at: float


@dataclass(frozen=True, slots=True)
class Bury:
    """Give an event up: hand it to the function's destination for failures."""

    request: Request
    condition: str
    """RetriesExhausted or EventAgeExceeded."""


Action = StartEnvironment | Deliver | EndEnvironment | Refuse | Remember | Bury


@dataclass(slots=True)
class _Function:
    """The state of one function."""

    scaling: Scaling
    tokens: float
    """New environments that may be started now."""
    filled_at: float
    n_running: int = 0
    """Invocations that are delivered or wait for their environment."""
    warm: list[tuple[EnvironmentId, float]] = field(default_factory=list)
    """Idle environments and since when; the last one is used first."""
    queue: list[tuple[float, int, Request]] = field(default_factory=list)
    """Heap of events: (ready at, number, request)."""


@dataclass(slots=True)
class _Environment:
    """The state of one environment."""

    function: str
    started_at: float
    n_invocations: int = 0


class Platform:
    """Decides for all functions of a service; times are seconds of one monotonic clock.

    Args:
        functions: how each of them scales, by name.
        now: the time.
        requests_per_s: how many requests a second are accepted, of all kinds together.
    """

    def __init__(
        self, functions: dict[str, Scaling], now: float, requests_per_s: float = float("inf")
    ) -> None:
        self._functions = {
            name: _Function(scaling, scaling.burst, now) for name, scaling in functions.items()
        }
        self._environments: dict[EnvironmentId, _Environment] = {}
        self._requests_per_s = requests_per_s
        self._room = max(1.0, requests_per_s)
        self._room_at = now
        self._n_queued = 0
        self._n_born = 0

    # -------------------------------------------------------------- facts

    def invoke(self, request: Request, now: float) -> list[Action]:
        """Take a request in: events are queued, others begin at once or are throttled."""
        function = self._functions[request.function]
        if not self._has_room(now):
            return [Refuse(request, "CallerRateLimitExceeded")]
        if request.depth >= CHAIN_MAX and not function.scaling.allows_loops:
            return [Refuse(request, LOOP)]
        if request.is_event:
            self._push(request, now)
            return self._dispatch(request.function, now)
        if function.n_running >= function.scaling.concurrency:
            return [Refuse(request, _limit_name(function.scaling))]
        return self._begin(request, now) or [Refuse(request, "FunctionInvocationRateLimitExceeded")]

    def requeue(self, request: Request, ready_at: float, now: float) -> list[Action]:
        """An event of a former life of the service."""
        self._push(request, ready_at)
        return self._dispatch(request.function, now)

    def freed(self, environment: EnvironmentId, now: float) -> list[Action]:
        """An environment has ended an invocation, and waits for the next one."""
        state = self._environments[environment]
        function = self._functions[state.function]
        function.n_running -= 1
        state.n_invocations += 1
        actions: list[Action] = []
        if self._is_spent(state, now):
            del self._environments[environment]
            actions.append(EndEnvironment(environment))
        else:
            function.warm.append((environment, now))
        return [*actions, *self._dispatch(state.function, now)]

    def lost(self, environment: EnvironmentId, now: float) -> list[Action]:
        """An environment has died, or was killed: at work, while it started, or frozen."""
        state = self._environments.pop(environment, None)
        if state is None:
            return []
        function = self._functions[state.function]
        warm = [item for item in function.warm if item[0] != environment]
        if len(warm) == len(function.warm):
            function.n_running -= 1
        function.warm = warm
        return self._dispatch(state.function, now)

    def failed(self, request: Request, now: float) -> list[Action]:
        """The invocation of an event has failed; tell what became of its environment too."""
        scaling = self._functions[request.function].scaling
        if request.n_failures >= scaling.n_retries:
            return [Bury(request, "RetriesExhausted")]
        wait_s = scaling.retry_after_s[min(request.n_failures, len(scaling.retry_after_s) - 1)]
        request = replace(request, n_failures=request.n_failures + 1)
        self._push(request, now + wait_s)
        return [Remember(request, now + wait_s), *self._dispatch(request.function, now)]

    def tick(self, now: float) -> list[Action]:
        """Deliver what is due, and end what has idled for long."""
        actions: list[Action] = []
        for name, function in self._functions.items():
            while function.warm and now - function.warm[0][1] >= function.scaling.idle_s:
                environment, _ = function.warm.pop(0)
                del self._environments[environment]
                actions.append(EndEnvironment(environment))
            actions += self._dispatch(name, now)
        return actions

    def wake_at(self) -> float | None:
        """When `tick` wants to be called next; None: not at all."""
        times = []
        for function in self._functions.values():
            if function.warm:
                times.append(function.warm[0][1] + function.scaling.idle_s)
            if function.queue and function.n_running < function.scaling.concurrency:
                missing = max(0.0, 1.0 - function.tokens)
                room_at = function.filled_at + missing / function.scaling.ramp_per_s
                times.append(max(function.queue[0][0], room_at))
        return min(times, default=None)

    def n_waiting(self, function: str) -> int:
        """Events in a function's queue."""
        return len(self._functions[function].queue)

    def n_running(self, function: str) -> int:
        """Invocations that run, or wait for their environment."""
        return self._functions[function].n_running

    def check(self) -> None:
        """Assert every invariant."""
        for name, function in self._functions.items():
            own = {e for e, state in self._environments.items() if state.function == name}
            assert 0 <= function.n_running <= function.scaling.concurrency
            assert {environment for environment, _ in function.warm} <= own
            assert len(own) == function.n_running + len(function.warm)
            assert function.tokens <= function.scaling.burst

    # -------------------------------------------------------------- decisions

    def _push(self, request: Request, ready_at: float) -> None:
        self._n_queued += 1
        queue = self._functions[request.function].queue
        heapq.heappush(queue, (ready_at, self._n_queued, request))

    def _dispatch(self, name: str, now: float) -> list[Action]:
        """Begin events that are due while there is room."""
        function = self._functions[name]
        actions: list[Action] = []
        while function.queue and function.queue[0][0] <= now:
            request = function.queue[0][2]
            if now - request.accepted_at > function.scaling.event_age_max_s:
                heapq.heappop(function.queue)
                actions.append(Bury(request, "EventAgeExceeded"))
                continue
            if function.n_running >= function.scaling.concurrency:
                break
            begun = self._begin(request, now)
            if not begun:
                break
            heapq.heappop(function.queue)
            actions += begun
        return actions

    def _begin(self, request: Request, now: float) -> list[Action]:
        """Give a request an environment; [] when none may be started now."""
        function = self._functions[request.function]
        if function.warm:
            environment, _ = function.warm.pop()
            function.n_running += 1
            return [Deliver(environment, request)]
        if not self._may_start(function, now):
            return []
        self._n_born += 1
        environment = EnvironmentId(self._n_born)
        self._environments[environment] = _Environment(request.function, now)
        function.n_running += 1
        return [StartEnvironment(environment, request)]

    def _may_start(self, function: _Function, now: float) -> bool:
        scaling = function.scaling
        refill = (now - function.filled_at) * scaling.ramp_per_s
        function.tokens = min(scaling.burst, function.tokens + refill)
        function.filled_at = now
        if function.tokens < 1.0:
            return False
        function.tokens -= 1.0
        return True

    def _has_room(self, now: float) -> bool:
        """One request more fits into this second."""
        if self._requests_per_s == float("inf"):
            return True
        refill = (now - self._room_at) * self._requests_per_s
        self._room = min(max(1.0, self._requests_per_s), self._room + refill)
        self._room_at = now
        if self._room < 1.0:
            return False
        self._room -= 1.0
        return True

    def _is_spent(self, state: _Environment, now: float) -> bool:
        scaling = self._functions[state.function].scaling
        n_max = scaling.n_invocations_max
        is_old = now - state.started_at >= scaling.age_max_s
        return is_old or (n_max is not None and state.n_invocations >= n_max)


def _limit_name(scaling: Scaling) -> str:
    reserved = "Reserved" if scaling.is_reserved else ""
    kind = "FunctionConcurrent" if scaling.is_reserved else "Concurrent"
    return f"{reserved}{kind}InvocationLimitExceeded"
