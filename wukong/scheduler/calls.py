"""What a task calls: the words of a plan that executors read, too, so without any of Dask's.

A call is plain data, which can be pickled and shared. Executors flatten it before they run it
(`wukong.executor.ops`); `evaluate` says what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Key: TypeAlias = Hashable
"""Dask's name of a value: a string, a number, or a tuple of them."""
Slot: TypeAlias = "int | Call"
"""Where an argument comes from: >= 0 a task's id; < 0 the literal `~slot`; a call made in place."""
Call: TypeAlias = tuple[Callable[..., Any], tuple[Slot, ...], tuple[str, ...]]
"""Function, slots, names: the last `len(names)` slots are keyword arguments."""


def evaluate(call: Call, values: Mapping[int, Any]) -> Any:
    """Call `call` with its arguments taken from `values`, and whatever is nested in it before.

    Args:
        values: task ids and negative literal slots -> value.
    """
    func, slots, names = call
    args = [values[s] if type(s) is int else evaluate(s, values) for s in slots]  # type: ignore[arg-type]  # mypy does not narrow by type()
    if not names:
        return func(*args)
    n_positional = len(args) - len(names)
    return func(*args[:n_positional], **dict(zip(names, args[n_positional:])))


@dataclass(frozen=True, slots=True)
class FusedCalls:
    """Calls that run one after the other inside one task; the last one's value is the result.

    Stands for Dask's fused task where a value in it is read twice, or the chain is too long to be
    nested. Dask orders the fused graph anew at every call; here that has been done once.
    """

    steps: tuple[Call, ...]
    """Slot >= 0: the input at this position; slot < 0: the value of step `~slot`."""
    last_uses: tuple[tuple[int, ...], ...]
    """For each step the slots of earlier steps that nobody reads after it."""

    def __call__(self, *inputs: Any) -> Any:
        values = dict(enumerate(inputs))
        for i, step in enumerate(self.steps):
            values[~i] = evaluate(step, values)
            for slot in self.last_uses[i]:
                del values[slot]
        return values[-len(self.steps)]


@dataclass(frozen=True, slots=True)
class OpaqueNode:
    """Calls a Dask node whose class evaluates itself in its own way, with what it depends on."""

    node: Callable[[Mapping[Any, Any]], Any]
    """Takes a mapping of key -> value."""
    keys: tuple[Key, ...]
    """What the node depends on, in the order of the arguments."""

    def __call__(self, *values: Any) -> Any:
        return self.node(dict(zip(self.keys, values)))


def make_list(*items: Any) -> list[Any]:
    """The list of the arguments: what a list that holds keys becomes."""
    return list(items)


def make_tuple(*items: Any) -> tuple[Any, ...]:
    """The tuple of the arguments."""
    return items


def make_set(*items: Any) -> set[Any]:
    """The set of the arguments."""
    return set(items)


def make_dict(*items: Any) -> dict[Any, Any]:
    """The dict of the arguments: key, value, key, value, ..."""
    return dict(zip(items[::2], items[1::2]))
