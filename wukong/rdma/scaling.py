"""PURE: how many batch jobs with agents there should be. Facts in, wishes out.

A job is one node with one agent. Jobs are asked for while work waits for more cores than are free,
or will be free once the jobs in the queue run; they are given up when nobody has used their node
for a while. The batch system may end any job at any time: that is no failure. Only jobs that end
before their agent has come up are, and after some of those in a row no more are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FAILURES_MAX = 3
"""Jobs in a row that end without an agent: the command, or the environment, is wrong."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job that the batch system has not ended."""

    job: str
    """The batch system's id."""
    agent: str
    """Name under which its agent registers."""


@dataclass(frozen=True, slots=True)
class Node:
    """A registered agent."""

    n_cores: int
    n_free_cores: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Ask the batch system for so many more nodes."""

    n_nodes: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give jobs back."""

    jobs: tuple[str, ...]


class Scaling:
    """Decides about the jobs of one client.

    Args:
        nodes_min: kept, used or not.
        nodes_max: never more.
        cores_per_node: what a node is expected to have; what agents tell counts more.
        idle_s: a node is given back after so long without a lease.
    """

    def __init__(
        self, nodes_min: int, nodes_max: int, cores_per_node: int = 1, idle_s: float = 60.0
    ) -> None:
        if not 0 <= nodes_min <= nodes_max or nodes_max < 1 or cores_per_node < 1:
            raise ValueError(f"from {nodes_min} to {nodes_max} nodes of {cores_per_node} cores")
        self.nodes_min = nodes_min
        self.nodes_max = nodes_max
        self.cores_per_node = cores_per_node
        self.idle_s = idle_s
        self.n_failures = 0
        self._idle_since: dict[str, float] = {}
        self._came_up: set[str] = set()
        self._known: dict[str, Job] = {}

    @property
    def has_given_up(self) -> bool:
        """Whether jobs have failed so often that no more are asked for."""
        return self.n_failures >= FAILURES_MAX

    def decide(
        self, jobs: Sequence[Job], nodes: Mapping[str, Node], n_wanted_cores: int, now: float
    ) -> list[Submit | Cancel]:
        """What to ask of the batch system.

        Args:
            jobs: all that it has not ended.
            nodes: agents by their names; others than those of the jobs do not count.
            n_wanted_cores: for which work waits, besides the cores that are leased.
        """
        self._note_ends(jobs, nodes)
        own = {job.agent: nodes[job.agent] for job in jobs if job.agent in nodes}
        if own:
            self.cores_per_node = max(node.n_cores for node in own.values())
        n_coming = len(jobs) - len(own)
        n_free = sum(node.n_free_cores for node in own.values())
        n_missing = n_wanted_cores - n_free - n_coming * self.cores_per_node
        if n_missing > 0 or len(jobs) < self.nodes_min:
            n_more = max(-(-n_missing // self.cores_per_node), self.nodes_min - len(jobs))
            n_more = min(n_more, self.nodes_max - len(jobs))
            self._idle_since.clear()
            return [Submit(n_more)] if n_more > 0 and not self.has_given_up else []
        given_back = self._idle(jobs, own, n_wanted_cores, now)
        return [Cancel(tuple(given_back))] if given_back else []

    def _note_ends(self, jobs: Sequence[Job], nodes: Mapping[str, Node]) -> None:
        living = {job.job: job for job in jobs}
        for job in living.values():
            if job.agent in nodes:
                self._came_up.add(job.job)
                self.n_failures = 0
        for name in sorted(self._known.keys() - living.keys()):
            if name not in self._came_up:
                self.n_failures += 1
            self._came_up.discard(name)
        self._known = living

    def cancelled(self, jobs: Sequence[str]) -> None:
        """These end by our own wish: no failures."""
        for job in jobs:
            self._known.pop(job, None)
            self._came_up.discard(job)
            self._idle_since.pop(job, None)

    def _idle(
        self, jobs: Sequence[Job], own: Mapping[str, Node], n_wanted_cores: int, now: float
    ) -> list[str]:
        """Jobs that nobody has needed for long enough, the newest first."""
        in_use = {name: node for name, node in own.items() if node.n_free_cores < node.n_cores}
        n_needed = n_wanted_cores - sum(node.n_free_cores for node in in_use.values())
        n_needed = max(0, -(-n_needed // self.cores_per_node))
        n_spare = min(len(jobs) - len(in_use) - n_needed, len(jobs) - self.nodes_min)
        idle_since: dict[str, float] = {}
        given_back: list[str] = []
        for job in reversed(jobs):
            if job.agent in in_use:
                continue
            since = idle_since[job.job] = self._idle_since.get(job.job, now)
            if now - since >= self.idle_s and len(given_back) < n_spare:
                given_back.append(job.job)
        self._idle_since = idle_since
        return given_back

    def check(self) -> None:
        """Every invariant."""
        assert self._came_up <= self._known.keys()
        assert self._idle_since.keys() <= self._known.keys()
        assert self.n_failures >= 0
