"""What a client sends to be computed, made ready for the session.

A graph arrives as a pickled expression. Keys that are in the futures' table already are not
computed again: they are inputs, whatever the graph says of them. What each requested key is
computed from is noted as far as it is in the table, or requested too: cancelling and retrying
follow these edges.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed.protocol.serialize import Serialize, Serialized, deserialize

from wukong.errors import MissingKey
from wukong.scheduler.calls import Key
from wukong.scheduler.dask_server_futures import Entry
from wukong.scheduler.dask_server_shuffles import as_tasks
from wukong.scheduler.dask_server_tasks import CoroutineCall
from wukong.scheduler.graph import dask_nodes

KEPT_BYTES = 1 << 20
"""A graph of fewer pickled bytes is kept while its keys are, for clients that run a task again."""
INLINE_BYTES = 32 * 1024
"""A graph of fewer pickled bytes is read in the loop's thread: handing it over takes longer."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A graph as it was sent."""

    dsk: dict[Key, Any]
    annotations: dict[str, dict[Key, Any]]
    """Of the expression: name -> key -> value."""
    reads: dict[Key, frozenset[Key]]
    """Nodes that read others, with what they read, in the graph or not."""
    is_peer_to_peer: bool
    """It had shuffles that need workers which talk to each other; they have been replaced."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What the session is asked to add."""

    dsk: dict[Key, Any]
    annotations: dict[str, Mapping[Key, Any]]
    """Name -> key -> value."""
    priority: int
    """Of all its tasks; higher ones are taken first."""
    keys: list[Key]
    """Requested, and not in the table."""
    known: dict[Key, Entry]
    """Entries that the graph reads or requests."""
    inputs: dict[Key, tuple[Key, ...]]
    """Requested key -> nearest keys that are entries, or will be; others are left out."""


def size_of_message(expr_ser: Any) -> int:
    """Bytes of a pickled expression."""
    if isinstance(expr_ser, Serialized):
        return sum(len(memoryview(frame)) for frame in expr_ser.frames)
    return 0


def keep_graph(expr_ser: Any) -> bytes | None:
    """What `read_graph` takes too, without the messages that a small expression came among.

    None: it is too large to be kept, or was not pickled.
    """
    if not isinstance(expr_ser, Serialized) or size_of_message(expr_ser) >= KEPT_BYTES:
        return None
    return pickle.dumps((expr_ser.header, [bytes(frame) for frame in expr_ser.frames]))


def read_graph(expr_ser: Any) -> Sent:
    """Unpickle an expression and make a graph of it.

    Raises:
        RuntimeError: it cannot be unpickled here.
    """
    try:
        if isinstance(expr_ser, bytes):
            expr = deserialize(*pickle.loads(expr_ser))
        elif isinstance(expr_ser, Serialized):
            expr = deserialize(expr_ser.header, expr_ser.frames)
        else:
            expr = expr_ser.data if isinstance(expr_ser, Serialize) else expr_ser
    except Exception as error:
        raise RuntimeError(
            "the graph cannot be read on the server: "
            f"{type(error).__name__}: {error}; are the same packages installed there?"
        ) from error
    if isinstance(expr, Mapping):  # clients send one when they run a task again themselves
        dsk, annotations = dict(expr), {}
    else:
        dsk = dict(expr.__dask_graph__())
        annotations = {name: dict(of) for name, of in expr.__dask_annotations__().items()}
    if not all(hasattr(node, "dependencies") for node in dsk.values()):
        dsk = dask_nodes(dsk, {})
    plain = as_tasks(dsk)
    is_peer_to_peer, dsk = plain is not dsk, plain
    for node in dsk.values():
        if node.is_coro:  # executors call functions; this one does in the loop of their worker
            node.func = CoroutineCall(node.func)
    reads = {key: node.dependencies for key, node in dsk.items() if node.dependencies}
    return Sent(dsk, annotations, reads, is_peer_to_peer)


def cut_known(
    sent: Sent,
    keys: Sequence[Key],
    entries: Mapping[Key, Entry],
    common: Mapping[str, Any],
) -> Piece:
    """Take what is known out of a graph.

    Args:
        keys: requested.
        entries: the table.
        common: annotations of all tasks; the graph's own win.
    Raises:
        MissingKey: the graph reads a key that is nowhere.
    """
    known: dict[Key, Entry] = {}
    if entries:
        mentioned = dict.fromkeys(sent.dsk)
        for read in sent.reads.values():
            mentioned.update(dict.fromkeys(read))
        mentioned.update(dict.fromkeys(keys))
        for key in mentioned:
            entry = entries.get(key)
            if entry is not None:
                known[key] = entry
    annotations: dict[str, Mapping[Key, Any]] = dict(sent.annotations)
    numbers = [common.get("priority"), *sent.annotations.get("priority", {}).values()]
    priority = max([int(n) for n in numbers if isinstance(n, int | float)], default=0)
    for name, value in common.items():
        per_key = {key: value(key) if callable(value) else value for key in sent.dsk}
        annotations[name] = {**per_key, **annotations.get(name, {})}
    new_keys = [key for key in dict.fromkeys(keys) if key not in known]
    for reader, read in sent.reads.items():
        lost = [key for key in read if key not in sent.dsk and key not in known]
        if lost:
            raise MissingKey(f"{reader!r} needs {lost[0]!r}, which was cancelled or released")
    inputs = _nearest(sent.reads, new_keys, known)
    return Piece(sent.dsk, annotations, priority, new_keys, known, inputs)


def _nearest(
    reads: Mapping[Key, frozenset[Key]], keys: Sequence[Key], known: Mapping[Key, Entry]
) -> dict[Key, tuple[Key, ...]]:
    """For each key the nearest keys upstream that are known, or in `keys`."""
    if not reads or (len(keys) == 1 and not known):
        return {}
    nothing: frozenset[Key] = frozenset()
    stops = known.keys() | set(keys)
    nearest: dict[Key, frozenset[Key]] = {}
    opened: set[Key] = set()  # so that a cycle, which planning refuses, ends here too
    stack: list[Key] = list(keys)
    while stack:
        key = stack[-1]
        if key in nearest:
            stack.pop()
            continue
        upstream = reads.get(key, nothing)
        if key not in opened:
            opened.add(key)
            waiting = [k for k in upstream if k in reads and k not in stops and k not in opened]
            if waiting:
                stack.extend(waiting)
                continue
        nearest[key] = nothing.union(
            *[(k,) if k in stops else nearest.get(k, nothing) for k in upstream]
        )
        stack.pop()
    return {key: tuple(nearest[key] - {key}) for key in keys if nearest[key]}
