"""A strand's program made ready for the loop over tasks: flat operations, and what each drops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter, length_hint
from typing import Any, TypeAlias, cast

from wukong.executor.events import Edges
from wukong.executor.messages import Part
from wukong.executor.serialize import size_of
from wukong.executor.serialize_programs import Program

Op: TypeAlias = "tuple[int, Callable[..., Any], Sequence[int], tuple[int, ...]]"
"""Task, function, slots of its arguments, and the slots to drop *before* it runs.

A value is dropped before the operation that follows its last reader, so that while a task runs
nothing disappears that the task itself, or anything behind it, reads: whoever interrupts a run
(`Executor.beat`) finds all of it.
"""

LOOK_AFTER_S = 0.1
"""A run is looked at this often, by the heartbeat thread, while other executors idle, or somebody
waits for its values: long against what a split costs (a few ms), short for people."""
LOOK_SHARE = 20.0
"""Of a run's time, at most one part in so many is spent on looking at it."""

_Nested: TypeAlias = "Callable[[Sequence[Any]], Any]"


@dataclass(slots=True)
class Running:
    """A run that is under way, which the heartbeat thread may interrupt, holding the gate."""

    part: Part
    ops: list[Op]
    """The operations that this run goes through; what has begun is never given away."""
    iterator: Iterator[Op]
    """What has not begun. `list()` of it takes everything at once: the interpreter runs no other
    thread meanwhile, so each operation is either begun or taken."""
    look_at: float
    """When to interrupt it next."""
    n_begun: int = 0
    """Operations that had begun when it was last interrupted."""
    seen: tuple[int, float] = (0, 0.0)
    """Operations that had begun at the last interruption, and since when there were no more."""
    is_withheld: bool = False
    """Nothing more is to begin, since the executor is to end."""
    gate: threading.Lock = field(default_factory=threading.Lock)
    """Held while a split is decided; the run takes it when its iterator ends."""

    def interrupt(self) -> bool:
        """Take what has not begun, until `resume`. Returns: there was something to take."""
        rest = list(self.iterator)
        if not self.is_withheld:
            self.n_begun = len(self.ops) - len(rest)
        return bool(rest)

    def watch(self, now: float) -> float:
        """Seconds for which the running operation has been seen to run."""
        if self.seen[0] != self.n_begun:
            self.seen = (self.n_begun, now)
        return now - self.seen[1]

    def look_later(self, begun_at: float, now: float) -> None:
        """Set when to interrupt it next; not often, where that takes long."""
        self.seen = (self.n_begun, self.seen[1])
        self.look_at = now + max(LOOK_AFTER_S, LOOK_SHARE * (now - begun_at))

    def withhold(self) -> None:
        """Let nothing more begin; what has begun ends the run."""
        self.n_begun = len(self.ops) - len(list(self.iterator))
        self.is_withheld = True
        self.iterator = iter(())

    def resume(self, part: Part, limit: int) -> None:
        """Go on with `part`, as far as it has not begun; with none of it if `limit` is 0."""
        if limit == 0 or self.is_withheld:
            list(self.iterator)
            self.iterator = iter(())
            return
        if part is not self.part:
            kept = set(part.tasks)
            # What a task that was given away reads is an output now, or another's to drop.
            self.ops = _with_drops((op[:3] for op in self.ops if op[0] in kept), part)
            self.part = part
            self.n_begun = 1  # the task that was running meanwhile
        self.iterator = iter(self.ops[self.n_begun :])


def task_now(running: Running | None) -> int:
    """The task that a run has begun last, -1 for none. By the run's own thread only."""
    if running is None:
        return -1
    return running.ops[len(running.ops) - length_hint(running.iterator) - 1][0]


def prepare_ops(program: Program, part: Part) -> list[Op]:
    """Make the operations of a part, in its order.

    Args:
        program: of the static strand that the part's tasks belong to.
        part: what to run; exported values are never dropped.
    Cost: under 1 us a task.
    """
    calls = program.calls
    if part.tasks != program.part.tasks:
        call_of = dict(zip(program.part.tasks, program.calls, strict=True))
        calls = [call_of[task] for task in part.tasks]
    prepared = []
    for task, (func, slots, names) in zip(part.tasks, calls):
        if names or any(type(s) is tuple for s in slots):
            func, slots = _flatten(func, slots, names)
        prepared.append((task, func, cast("Sequence[int]", slots)))
    return _with_drops(prepared, part)


def _with_drops(
    prepared: Iterable[tuple[int, Callable[..., Any], Sequence[int]]], part: Part
) -> list[Op]:
    """Add to operations what each drops: what no later one reads and `part` does not export."""
    listed = list(prepared)
    last_reader: dict[int, int] = {}
    for i, (_, _, slots) in enumerate(listed):
        for slot in slots:
            last_reader[slot] = i
    kept = {task for spec in part.exports for task in spec.tasks}
    drops: list[tuple[int, ...]] = [()] * (len(listed) + 1)
    for slot, i in last_reader.items():
        if slot >= 0 and slot not in kept:
            drops[i + 1] += (slot,)
    return [(task, func, slots, dropped) for (task, func, slots), dropped in zip(listed, drops)]


def reads_of(ops: Iterable[Op], program: Program) -> Edges:
    """Which values the operations read that do not come with their program.

    Large constants of several strands are such values too, under negative slots.
    """
    listed = list(ops)
    return Edges(
        tuple(op[0] for op in listed),
        tuple(tuple(sorted(set(op[2]).difference(program.literals))) for op in listed),
    )


def sizes_of(
    values: Mapping[int, object], part: Part, reads: Iterable[Sequence[int]]
) -> dict[int, int]:
    """Sizes of values that are exported, or that the rest reads, as far as they are there."""
    wanted = dict.fromkeys(task for spec in part.exports for task in spec.tasks)
    wanted.update(dict.fromkeys(task for tasks in reads for task in tasks))
    return {task: size_of(values[task]) for task in wanted if task in values}


def _flatten(
    func: Callable[..., Any], slots: Sequence[Any], names: tuple[str, ...]
) -> tuple[Callable[..., Any], tuple[int, ...]]:
    """Turn keyword arguments and nested calls into one function of plain arguments."""
    leaves: list[int] = []
    nested = _nest(func, slots, names, leaves)
    return lambda *values: nested(values), tuple(leaves)


def _nest(
    func: Callable[..., Any], slots: Sequence[Any], names: tuple[str, ...], leaves: list[int]
) -> _Nested:
    """A function of all leaves' values; recursion is bounded by `fused.MAX_NESTING`."""
    arguments: list[_Nested] = []
    for slot in slots:
        if type(slot) is tuple:
            inner, inner_slots, inner_names = slot
            arguments.append(_nest(inner, inner_slots, inner_names, leaves))
        else:
            arguments.append(itemgetter(len(leaves)))
            leaves.append(slot)
    if not names:
        return lambda values: func(*[a(values) for a in arguments])
    n_positional = len(arguments) - len(names)
    positional, named = arguments[:n_positional], arguments[n_positional:]

    def call(values: Sequence[Any]) -> Any:
        keywords = {name: a(values) for name, a in zip(names, named, strict=True)}
        return func(*[a(values) for a in positional], **keywords)

    return call
