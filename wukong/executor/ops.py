"""A strand's program made ready for the loop over tasks: flat operations, and what each drops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias, cast

from wukong.executor.messages import Edges, Part
from wukong.executor.serialize_programs import Program

Op: TypeAlias = "tuple[int, Callable[..., Any], Sequence[int], tuple[int, ...]]"
"""Task, function, slots of its arguments, and the slots to drop *before* it runs.

A value is dropped before the operation that follows its last reader, so that while a task runs
nothing disappears that the task itself, or anything behind it, reads: whoever interrupts a run
(`Executor.beat`) finds all of it.
"""

_Nested: TypeAlias = "Callable[[Sequence[Any]], Any]"


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
    last_reader: dict[int, int] = {}
    for i, (func, slots, names) in enumerate(calls):
        if names or any(type(s) is tuple for s in slots):
            func, slots = _flatten(func, slots, names)
        flat = cast("Sequence[int]", slots)
        prepared.append((func, flat))
        for slot in flat:
            last_reader[slot] = i
    kept = {task for spec in part.exports for task in spec.tasks}
    drops: list[tuple[int, ...]] = [()] * (len(calls) + 1)
    for slot, i in last_reader.items():
        if slot >= 0 and slot not in kept:
            drops[i + 1] += (slot,)
    return [
        (task, func, slots, dropped)
        for task, (func, slots), dropped in zip(part.tasks, prepared, drops)
    ]


def reads_of(ops: Iterable[Op]) -> Edges:
    """Which tasks the operations read."""
    listed = list(ops)
    return Edges(
        tuple(op[0] for op in listed),
        tuple(tuple(sorted({s for s in op[2] if s >= 0})) for op in listed),
    )


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
    """A function of all leaves' values; recursion is bounded by `graph.MAX_NESTING`."""
    arguments: list[_Nested] = []
    for slot in slots:
        if type(slot) is tuple:
            arguments.append(_nest(*slot, leaves))
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
