"""A fused task of Dask, a small graph of its own, becomes one call.

Also the trees that such calls are made of while the inputs of a node are not numbered yet. What
Dask's nodes look like is the planner's affair: it opens them, and hands the opened trees in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from wukong.errors import CycleError, MissingKey
from wukong.scheduler.calls import Call, FusedCalls, Key

# Calls nested deeper than this become FusedCalls: whoever evaluates or pickles a call recurses into
# it, and Python's default limit of 1,000 frames has to do for the user's functions as well.
MAX_NESTING = 32


@dataclass(slots=True)
class Read:
    """The value of a key, in an open tree."""

    key: Key
    """Of the graph; in a fused task, of a node in it."""


Open: TypeAlias = Any
"""A slot before the inputs are numbered: as Slot, with a Read wherever a key is read."""


def bind(tree: Open, slot_of: Callable[[Key], Any]) -> Any:
    """Replace the keys in an open tree by their slots."""
    kind = type(tree)
    if kind is tuple:
        func, slots, names = tree
        return func, tuple([bind(slot, slot_of) for slot in slots]), names
    return slot_of(tree.key) if kind is Read else tree


def fuse(
    inner: Mapping[Key, Any],
    out: Key,
    given: Mapping[Key, Open],
    open_node: Callable[[Any, list[Key]], Open],
) -> Open:
    """One open call for a graph in a task: nested where each value is read once, else FusedCalls.

    Args:
        inner: the task's own nodes by key.
        out: the key of the result.
        given: name in `inner` -> what it stands for outside.
        open_node: makes the open tree of a node, and appends the keys that it reads to the list.
    Raises:
        MissingKey, CycleError: as for a whole graph.
    """
    body = _order(inner, out, given, open_node)
    value: dict[Key, Any] = dict(given)
    depth: dict[Key, int] = dict.fromkeys(given, 0)
    for key in body.order:
        call, reads = body.opened[key]
        value[key] = bind(call, value.__getitem__)
        depth[key] = max([depth[read] for read in reads], default=0) + (type(call) is tuple)
    twice = any(type(value[key]) is tuple for key, n in body.n_reads.items() if n > 1)
    if not twice and depth[out] <= MAX_NESTING:
        return value[out]
    return _in_steps(body, given)


@dataclass(slots=True)
class _Body:
    """A fused task's graph, opened."""

    order: list[Key] = field(default_factory=list)
    """Its nodes in post-order."""
    opened: dict[Key, tuple[Open, list[Key]]] = field(default_factory=dict)
    """Key -> open tree, and the keys that it reads."""
    n_reads: dict[Key, int] = field(default_factory=dict)
    """Key -> how often it is read."""


def _order(
    inner: Mapping[Key, Any],
    out: Key,
    given: Mapping[Key, Open],
    open_node: Callable[[Any, list[Key]], Open],
) -> _Body:
    """Open what `out` needs, depth first and without recursion."""
    body = _Body()
    opened, n_reads = body.opened, body.n_reads
    done: set[Key] = set(given)
    path = [out]
    while path:
        key = path[-1]
        if key in done:
            path.pop()
        elif key in opened:
            body.order.append(key)
            done.add(path.pop())
        elif key not in inner:
            raise MissingKey(f"Missing dependency: {key!r} is not in the fused task {out!r}")
        else:
            reads: list[Key] = []
            opened[key] = open_node(inner[key], reads), reads
            for read in reads:
                n_reads[read] = n_reads.get(read, 0) + 1
                if read in opened and read not in done:
                    raise CycleError(f"Cycle detected: in the fused task {out!r}, by {read!r}")
            path.extend([read for read in reversed(reads) if read not in done])
    return body


def _in_steps(body: _Body, given: Mapping[Key, Open]) -> Open:
    """The call of FusedCalls of the nodes; its literals are arguments like the rest."""
    arguments: list[Open] = list(given.values())
    literal_at: dict[int, int] = {}
    at: dict[Key, int] = {name: i for i, name in enumerate(given)}
    steps: list[Call] = []
    last_reader: dict[int, int] = {}

    def local(slot: Open) -> Any:
        if type(slot) is tuple:
            return slot[0], tuple([local(s) for s in slot[1]]), slot[2]
        if type(slot) is Read:
            place = at[slot.key]
            if place < 0:
                last_reader[place] = len(steps)
            return place
        if slot not in literal_at:
            literal_at[slot] = len(arguments)
            arguments.append(slot)
        return literal_at[slot]

    for key in body.order:
        place = local(body.opened[key][0])
        if type(place) is tuple:
            steps.append(place)
            place = -len(steps)
        at[key] = place
    last_uses: list[list[int]] = [[] for _ in steps]
    for place, reader in last_reader.items():
        if reader < len(steps):  # beyond them: the result itself, by an alias
            last_uses[reader].append(place)
    return FusedCalls(tuple(steps), tuple(map(tuple, last_uses))), tuple(arguments), ()
