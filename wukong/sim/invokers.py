"""How simulated executors come to life: a pool of local processes, and functions in a cloud."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from wukong.executor.invoker import share_of_idle
from wukong.executor.messages import HolderId, Invocation
from wukong.sim.executor import DRAIN_AT, SimExecutor
from wukong.sim.store import SimStore
from wukong.sim.world import World

DELAYED_S = (0.5, 20.0)
"""How late a delayed invocation is."""
POLL_S = 0.1
"""A client that works in stages looks this often whether one has ended."""


class SimInvoker(Protocol):
    """Has executors started."""

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """Ask for executors for these tokens."""
        ...

    def n_idle(self) -> int:
        """How many executors would start at once."""
        ...


def open_invoker(world: World, store: SimStore) -> SimInvoker:
    """Make the invoker that the platform has."""
    if world.setting.platform.takes_queued:
        return LocalPool(world, store)
    return Functions(world, store)


class _Deliveries:
    """Invocations on their way: some are lost, repeated, delayed or refused.

    Args:
        deliver: takes one that has arrived.
        n_busy: how many executors have been asked for and have not come to rest.
    """

    def __init__(
        self, world: World, deliver: Callable[[Invocation], None], n_busy: Callable[[], int]
    ) -> None:
        self._world = world
        self._deliver = deliver
        self._n_busy = n_busy
        self._stage: list[Invocation] = []
        """What a client that works in stages holds back."""
        self._client_free_at = 0.0

    def send(self, invocations: Sequence[Invocation], typical_s: float) -> None:
        """Deliver them, each after about this time; or let the client do it, where it invokes."""
        scheme = self._world.setting.scheme
        if scheme.staged:
            if invocations and not self._stage:
                self._world.after(POLL_S, self._begin_stage, typical_s)
            self._stage.extend(invocations)
        elif scheme.client_invokes:
            self._send_by_client(invocations, typical_s)
        else:
            self._send(invocations, typical_s)

    def _begin_stage(self, typical_s: float) -> None:
        """The client looks whether the last stage has ended."""
        if self._n_busy():
            self._world.after(POLL_S, self._begin_stage, typical_s)
            return
        stage, self._stage = self._stage, []
        self._send_by_client(stage, typical_s)

    def _send_by_client(self, invocations: Sequence[Invocation], typical_s: float) -> None:
        platform = self._world.setting.platform
        for invocation in invocations:
            self._client_free_at = max(self._world.now, self._client_free_at)
            self._client_free_at += 1 / platform.invokes_per_s
            self._world.at(
                self._client_free_at + platform.invoke_s, self._send, [invocation], typical_s
            )

    def _send(self, invocations: Sequence[Invocation], typical_s: float) -> None:
        world, platform = self._world, self._world.setting.platform
        if not 0 < platform.relay < len(invocations):
            world.counts["invocations"] += len(invocations)
            self._send_each(invocations, typical_s)
            return
        size = -(-len(invocations) // platform.relay)
        for number, first in enumerate(range(0, len(invocations), size)):
            group = invocations[first : first + size]
            world.after(number / platform.invokes_per_s, self._relay, group, typical_s)

    def _relay(self, group: Sequence[Invocation], typical_s: float) -> None:
        """One invocation carries others, which its executor sends on before it begins."""
        platform = self._world.setting.platform
        self._world.counts["invocations"] += 1
        self._send_each(group[:1], typical_s)
        self._world.after(
            typical_s + platform.cold_start_s + platform.invoke_s, self._send, group[1:], typical_s
        )

    def _send_each(self, invocations: Sequence[Invocation], typical_s: float) -> None:
        world, faults = self._world, self._world.setting.faults
        for invocation in invocations:
            if world.hits(faults.throttled) or world.hits(faults.invoke_lost):
                continue
            for _ in range(1 + world.hits(faults.invoke_repeated)):
                delay_s = world.latency_s(typical_s)
                if world.hits(faults.invoke_delayed):
                    delay_s += world.rng.uniform(*DELAYED_S)
                world.after(delay_s, self._deliver, invocation)


class LocalPool:
    """A fixed number of processes that take queued tokens; an invocation wakes one.

    A death is noticed at once; what the dead one held is queued again, and it is replaced.
    """

    def __init__(self, world: World, store: SimStore) -> None:
        self._world = world
        self._store = store
        self._deliveries = _Deliveries(world, self._wake, self._n_busy)
        self._idle: deque[SimExecutor] = deque()
        self._n_born = 0
        self._is_missed = False
        """A wake-up came while nobody was idle: whoever finds nothing looks again."""
        for _ in range(world.setting.n_executors):
            self._bear()

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """See `SimInvoker`."""
        self._deliveries.send(invocations, self._world.setting.platform.warm_start_s)

    def n_idle(self) -> int:
        """See `SimInvoker`."""
        return max(0, len(self._idle) - len(self._store.rows.queue))

    def _n_busy(self) -> int:
        return self._world.setting.n_executors - len(self._idle)

    def _bear(self) -> None:
        self._n_born += 1
        executor = SimExecutor(
            self._world,
            self._store,
            HolderId(f"p{self._n_born}"),
            invoke=self.invoke,
            n_idle=self.n_idle,
            on_idle=self._rest,
            on_death=self._bury,
        )
        self._idle.append(executor)
        self._wake()

    def _wake(self, _: Invocation | None = None) -> None:
        if self._idle:
            self._idle.popleft().take()
        else:
            self._is_missed = True

    def _rest(self, executor: SimExecutor) -> None:
        """An executor holds nothing: it looks for more, and sleeps when there is nothing."""
        if self._store.rows.queue or self._is_missed:
            self._is_missed = False
            executor.take()
        else:
            self._idle.append(executor)

    def _bury(self, executor: SimExecutor, cause: str) -> None:
        platform = self._world.setting.platform
        assert platform.notice_death_s is not None
        self._world.after(platform.notice_death_s, self._release, executor.holder, cause)
        self._world.after(platform.cold_start_s, self._bear)

    def _release(self, holder: HolderId, cause: str) -> None:
        self._store.call(
            lambda: self._store.release(holder, cause),
            lambda _, invocations: self.invoke(invocations),
            lambda: self._world.after(0.1, self._release, holder, cause),
        )


class Functions:
    """One executor for each invocation, warm ones again, up to a number at a time.

    What cannot be started yet waits in the platform's queue. An invocation whose executor died is
    repeated by the platform, and dropped at last.
    """

    def __init__(self, world: World, store: SimStore) -> None:
        self._world = world
        self._store = store
        self._deliveries = _Deliveries(world, self._receive, self._n_busy)
        self._warm: list[SimExecutor] = []
        self._queue: deque[tuple[Invocation, int]] = deque()
        self._running: dict[HolderId, tuple[Invocation, int]] = {}
        self._begun_at: dict[HolderId, float] = {}
        self._n_born = 0
        self._tokens = world.setting.platform.burst
        self._filled_at = 0.0
        self._looks_again = False
        self._dice = Random(world.setting.n_executors)
        """Apart from the world's, so that asking changes nothing else."""

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """See `SimInvoker`."""
        self._deliveries.send(invocations, self._world.setting.platform.warm_start_s)

    def n_idle(self) -> int:
        """See `SimInvoker`; who asks has seen the job's tokens, as on Lambda."""
        n_busy = len(self._store.rows.tables["t"])
        n_idle = self._world.setting.n_executors - n_busy
        return share_of_idle(n_idle, n_busy, self._dice.random())

    def _n_busy(self) -> int:
        return len(self._running) + len(self._queue)

    def _receive(self, invocation: Invocation, n_tries: int = 0) -> None:
        self._queue.append((invocation, n_tries))
        self._dispatch()

    def _dispatch(self) -> None:
        world, platform = self._world, self._world.setting.platform
        while self._queue and len(self._running) < world.setting.n_executors:
            delay_s = 0.0
            if self._warm:
                executor = self._warm.pop()
            elif self._has_room():
                executor = self._bear()
                delay_s = world.latency_s(platform.cold_start_s)
            else:
                if not self._looks_again:
                    self._looks_again = True
                    world.after(1.0 / platform.rate_per_s, self._look_again)
                return
            invocation, n_tries = self._queue.popleft()
            self._running[executor.holder] = invocation, n_tries
            self._begun_at[executor.holder] = world.now + delay_s
            world.counts["peak"] = max(world.counts["peak"], len(self._running))
            world.after(delay_s, self._begin, executor, invocation)

    def _look_again(self) -> None:
        self._looks_again = False
        self._dispatch()

    def _has_room(self) -> bool:
        """Take one from the token bucket of new executors."""
        platform, now = self._world.setting.platform, self._world.now
        refill = (now - self._filled_at) * platform.rate_per_s
        self._tokens = min(platform.burst, self._tokens + refill)
        self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _bear(self) -> SimExecutor:
        self._n_born += 1
        return SimExecutor(
            self._world,
            self._store,
            HolderId(f"f{self._n_born}"),
            invoke=self.invoke,
            n_idle=self.n_idle,
            on_idle=self._rest,
            on_death=self._bury,
        )

    def _begin(self, executor: SimExecutor, invocation: Invocation) -> None:
        limit_s = self._world.setting.platform.time_limit_s
        if limit_s is not None:
            begun = self._running[executor.holder]
            executor.drain(False)
            self._world.after(limit_s * DRAIN_AT, self._drain, executor, begun)
            self._world.after(limit_s, self._time_out, executor, begun)
        executor.begin(invocation)

    def _drain(self, executor: SimExecutor, begun: tuple[Invocation, int]) -> None:
        if self._running.get(executor.holder) is begun:
            executor.drain(True)

    def _time_out(self, executor: SimExecutor, begun: tuple[Invocation, int]) -> None:
        if self._running.get(executor.holder) is begun:
            executor.die("its time was up")

    def _rest(self, executor: SimExecutor) -> None:
        del self._running[executor.holder]
        self._world.busy_s["executors"] += self._world.now - self._begun_at[executor.holder]
        self._warm.append(executor)
        self._dispatch()

    def _bury(self, executor: SimExecutor, cause: str) -> None:
        invocation, n_tries = self._running.pop(executor.holder)
        retries = self._world.setting.platform.retry_after_s
        if n_tries < len(retries):
            self._world.after(retries[n_tries], self._receive, invocation, n_tries + 1)
        self._dispatch()
