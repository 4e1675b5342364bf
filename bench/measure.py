"""Interleaved timing of one case on several sides, and what follows from the seconds.

Sides take turns within each round and another one begins each round, so that whatever else the
machine does in the meantime hits all of them alike.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeAlias

from dask.typing import Key

from bench.meter import Usage, metered
from bench.peers import CallPool
from bench.sides import Side

Graph: TypeAlias = Mapping[Key, object]
Keys: TypeAlias = Sequence[Key] | Key
Built: TypeAlias = tuple[Graph, Keys]


@dataclass(frozen=True, slots=True)
class Case:
    """Something that every side can be asked to do."""

    name: str
    """For tables."""
    n_tasks: int
    """Tasks of the graph."""
    build: Callable[[str], Built]
    """Makes the graph; the argument is part of its keys, so that no side has met them before."""
    check: Callable[[object], None]
    """Raises AssertionError if what a side returned is wrong."""
    n_calls: int = 1
    """Runs within one measurement, whose mean counts; above 1 where one is too short to time."""
    on_pool: Callable[[CallPool], object] | None = None
    """The same work by the means of a pool of calls; None where there is no such way."""
    warm: Callable[[], Built] | None = None
    """A smaller graph of the same functions for the warm-up; None: the graph itself."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one side took for one case."""

    side: str
    """Name of the side."""
    seconds: tuple[float, ...]
    """One per round, in order."""
    cpu_s: tuple[float, ...] = ()
    """CPU seconds of all processes, one per round, where they are measured."""
    added_bytes: tuple[int, ...] = ()
    """Most memory above that of the idle side, one per round."""
    cold_s: float = 0.0
    """The first run, with all that the side imports and starts for it."""

    @property
    def median_s(self) -> float:
        """The median over the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def min_s(self) -> float:
        """The fastest round, in seconds."""
        return min(self.seconds)


@dataclass(frozen=True, slots=True)
class Ratio:
    """One side's time over another's."""

    of: str
    """The side whose time is divided."""
    to: str
    """The side whose time divides."""
    medians: float
    """Ratio of the medians."""
    minima: float
    """Ratio of the fastest rounds."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case, timed on all sides that can do it."""

    case: str
    """Name of the case."""
    n_tasks: int
    """Tasks of the graph."""
    timings: tuple[Timing, ...]
    """In the order of the sides."""
    absent: tuple[str, ...] = ()
    """Sides that were not asked, each with the reason."""

    def ratio(self, of: str, to: str) -> Ratio | None:
        """The ratio of two sides, or None if one of them did not take part.

        Args:
            of: name of a side; several, joined by "|", stand for the best of them.
            to: name of a side.
        """
        times = {timing.side: timing for timing in self.timings}
        best = [times[name] for name in of.split("|") if name in times]
        if not best or to not in times:
            return None
        return Ratio(
            of,
            to,
            min(timing.median_s for timing in best) / times[to].median_s,
            min(timing.min_s for timing in best) / times[to].min_s,
        )


def compare(
    case: Case,
    sides: Sequence[Side],
    n_rounds: int,
    tell: Callable[[str], None],
    is_metered: bool = False,
    limit_s: float = math.inf,
) -> Comparison:
    """Time the case on every side, in turns.

    Args:
        case: what to do.
        sides: open sides; those that cannot do the case are left out.
        n_rounds: measurements of each side.
        tell: is told what happens now, for a progress line.
        is_metered: count CPU seconds and memory too.
        limit_s: of the rounds of one side together; one that has used it up begins no further
            round, so that what it has is what was measured, and the others go on.
    """
    able, absent = [], []
    for side in sides:
        reason = _why_not(case, side)
        if reason is None:
            able.append(side)
        else:
            absent.append(f"{side.name}: {reason}")
    cold_s = {}
    for side in able:
        tell(f"{case.name}: warming {side.name}")
        begun_at = time.perf_counter()
        _warm(case, side)
        cold_s[side.name] = time.perf_counter() - begun_at
    able = [side for side in able if cold_s[side.name] <= limit_s or case.warm is not None]
    for name in cold_s.keys() - {side.name for side in able}:
        absent.append(f"{name}: no round, since the first run took {cold_s[name]:.1f} s")
    seconds: dict[str, list[float]] = {side.name: [] for side in able}
    usages: dict[str, list[Usage]] = {side.name: [] for side in able}
    for number in range(n_rounds):
        first = number % max(1, len(able))
        for side in able[first:] + able[:first]:
            if number and sum(seconds[side.name]) * case.n_calls > limit_s:
                continue
            tell(f"{case.name}: round {number + 1} of {n_rounds}, {side.name}")
            with metered() if is_metered else nullcontext(Usage()) as usage:
                seconds[side.name].append(_time(case, side, number, limit_s))
            usages[side.name].append(usage)
    timings = tuple(
        Timing(
            name,
            tuple(seconds[name]),
            tuple(usage.cpu_s / case.n_calls for usage in usages[name]),
            tuple(usage.added_bytes for usage in usages[name]),
            cold_s[name],
        )
        for name in seconds
    )
    return Comparison(case.name, case.n_tasks, timings, tuple(absent))


def _why_not(case: Case, side: Side) -> str | None:
    """Why a side is not asked for a case; None: it is."""
    if side.get is None and case.on_pool is None:
        return "the graph cannot be said as maps"
    if side.n_tasks_max is not None and case.n_tasks > side.n_tasks_max:
        return f"not asked for more than {side.n_tasks_max:,} calls, which take minutes"
    return None


def _warm(case: Case, side: Side) -> None:
    """Let the side import what the case needs and start what it starts lazily."""
    if side.get is not None:
        graph, keys = case.build(f"warm {side.name}") if case.warm is None else case.warm()
        side.get(graph, keys)
        side.settle()
    elif side.pool is not None and case.on_pool is not None:
        case.on_pool(side.pool)


def _time(case: Case, side: Side, number: int, limit_s: float) -> float:
    """One measurement: seconds of one run, its result checked. It is a mean over fewer runs than
    the case asks for where these take longer than the limit."""
    tags = [f"{case.name} {side.name} {number} {call}" for call in range(case.n_calls)]
    graphs = [case.build(tag) for tag in tags] if side.get is not None else [None] * case.n_calls
    results: list[object] = []
    gc.collect()
    start = time.perf_counter()
    for graph in graphs:
        results.append(_run(case, side, graph))
        elapsed_s = time.perf_counter() - start
        if elapsed_s > limit_s:
            break
    for result in results:
        case.check(result)
    side.settle()
    return elapsed_s / len(results)


def _run(case: Case, side: Side, built: Built | None) -> object:
    if built is not None:
        assert side.get is not None
        return side.get(*built)
    assert side.pool is not None
    assert case.on_pool is not None
    return case.on_pool(side.pool)
