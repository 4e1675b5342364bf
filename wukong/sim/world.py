"""The virtual clock, the dice, and what everybody in a simulation knows."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from wukong.executor.messages import AttemptId, BlobId, JobId, Part
from wukong.executor.work import Policy
from wukong.sim.checks import Checker
from wukong.sim.dags import Costs
from wukong.sim.faults import NO_FAULTS, Faults
from wukong.sim.schemes import OURS, Scheme
from wukong.sim.services import Platform

JOB = JobId("job")
MAX_EVENTS_PER_TASK = 2_000
"""More than any job needs: beyond it two parts of the system wait for each other busily."""


@dataclass(frozen=True, slots=True)
class Setting:
    """All that is fixed before a simulation begins."""

    parts: Sequence[Part]
    reads: Sequence[tuple[int, ...]]
    """For each task the tasks that it reads."""
    costs: Costs
    platform: Platform
    n_executors: int
    policy: Policy
    faults: Faults = NO_FAULTS
    silence_s: float = 10.0
    """A running token without heartbeat for this long counts as dead."""
    split_after_s: float = 0.1
    """A run is looked at this often while executors idle."""
    fail_fast: bool = False
    is_open: bool = False
    """The job is open: `parts` is a list, to which its client adds."""
    is_measured: bool = True
    """Values are encoded and have sizes; not in `memory://`."""
    scheme: Scheme = OURS
    """Who invokes, and what a commit costs."""

    def move_s(self, sizes_bytes: Sequence[int]) -> float:
        """Seconds of one operation on blobs of these sizes."""
        platform = self.platform
        is_near = self.scheme.inline and max(sizes_bytes) < platform.tier_bytes
        first_s = platform.store_s if is_near else platform.blob_s
        return first_s + sum(sizes_bytes) / platform.blob_bytes_per_s

    def invoke_s(self, n_invocations: int) -> float:
        """What invoking takes an executor: where the client does it, a message to the client."""
        if self.scheme.client_invokes:
            return self.platform.store_s / 2
        n_sent = min(n_invocations, self.platform.relay or n_invocations)
        return self.platform.invoke_s + n_sent / self.platform.invokes_per_s


class World:
    """Time, chance, and counters.

    Args:
        setting: what is simulated.
        seed: of every random choice.
        checker: None for fast runs without lineage of values.
        trace: takes a line of text for each action and event.
    """

    def __init__(
        self,
        setting: Setting,
        seed: int,
        checker: Checker | None,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.setting = setting
        self.checker = checker
        self.now = 0.0
        self.rng = Random(seed)
        self.counts: Counter[str] = Counter()
        self.busy_s = {"store": 0.0, "executors": 0.0}
        """How long the store and the executors have been occupied."""
        self.is_over = False
        self._trace = trace
        self.excused: set[AttemptId] = set()
        """Attempts that died or lost a reply: what they put may be left behind."""
        self.excused_blobs: set[BlobId] = set()
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._n_scheduled = 0
        self._n_attempts = 0

    def at(self, time: float, callback: Callable[..., None], *args: object) -> None:
        """Call back at an absolute time; what has the same time happens in order of asking."""
        self._n_scheduled += 1
        heapq.heappush(self._heap, (max(time, self.now), self._n_scheduled, callback, args))

    def after(self, delay_s: float, callback: Callable[..., None], *args: object) -> None:
        """Call back later."""
        self.at(self.now + delay_s, callback, *args)

    def run(self, until: float, is_done: Callable[[], bool]) -> None:
        """Let time pass until something is done, nothing is left to happen, or the time is up."""
        heap, limit = self._heap, MAX_EVENTS_PER_TASK * (10 + len(self.setting.reads))
        while heap and not is_done() and heap[0][0] <= until:
            self.now, _, callback, args = heapq.heappop(heap)
            callback(*args)
            limit -= 1
            assert limit, "no end of events: two parts of the system wait for each other busily"

    def hits(self, probability: float) -> bool:
        """Throw the dice for a fault; faults end at a given time."""
        return (
            probability > 0.0
            and self.now < self.setting.faults.until_s
            and self.rng.random() < probability
        )

    def latency_s(self, typical_s: float) -> float:
        """A random latency, now and then from the slow tail."""
        latency = typical_s * (0.7 + 0.6 * self.rng.random())
        return latency * 200 if self.hits(self.setting.faults.slow) else latency

    def new_attempt(self) -> AttemptId:
        """A nonce."""
        self._n_attempts += 1
        return AttemptId(f"a{self._n_attempts}")

    def log(self, who: str, what: object) -> None:
        """Note an action or an event in the trace."""
        if self._trace is not None:
            self._trace(f"{self.now:.6f} {who} {what}")
