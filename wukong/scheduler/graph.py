"""Whatever Dask hands a scheduler becomes a Plan: dense task ids, edges as arrays, prepared calls.

The only module that knows Dask's internals (`dask._task_spec` and its legacy tuples). It knows
nothing of strands, stores or executors, and it does not choose where or when anything runs.

One walk does everything: from the requested keys down, depth first and without recursion, each
reachable node is read once and numbered when its inputs are numbered. Nodes that are flat (a
function of keys and constants) take a fast path; anything nested becomes a tree of calls.

    {"x": 1, "y": (inc, "x"), "z": (add, "y", "x")}, ["z"]
        keys      ["y", "z"]                             task ids 0, 1
        literals  [1]                                    slot -1
        calls     [(inc, (-1,), ()), (add, (0, -1), ())]
        inputs    task 1 reads task 0
"""

from __future__ import annotations

import gc
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from dask._expr import _AnnotationsTombstone
from dask._task_spec import (
    Alias,
    DataNode,
    Dict,
    GraphNode,
    List,
    Set,
    Task,
    TaskRef,
    Tuple,
    _execute_subgraph,
    _is_dask_future,
    convert_legacy_graph,
    convert_legacy_task,
)
from dask.base import get_annotations
from dask.highlevelgraph import HighLevelGraph
from dask.utils import ensure_dict

from wukong.errors import CycleError, GraphError, MissingKey
from wukong.scheduler.calls import Call, Key, OpaqueNode, make_dict, make_list, make_set, make_tuple
from wukong.scheduler.fused import Open, Read, bind, fuse
from wukong.scheduler.plan import Plan, Requested, flatten_keys


def plan_graph(
    dsk: Any,
    keys: Any,
    *,
    known: Mapping[Key, int] | None = None,
    base: int = 0,
    annotations: Mapping[str, Mapping[Any, Any]] | None = None,
) -> Plan:
    """Turn a Dask graph into a Plan for the given keys.

    The graph is only read. The garbage collector is off meanwhile: nothing here is garbage, and
    looking for it costs more than the planning once there are a million tasks.

    Args:
        dsk: a mapping of keys to legacy tuples or `dask._task_spec` nodes, a `HighLevelGraph`, or
            anything with `__dask_graph__` (an expression, a collection); it is not optimized.
        keys: one key, or lists of keys nested at will; a key may occur more than once.
        known: ids, below `base`, of values that are computed elsewhere; the graph's own nodes of
            these keys are not looked at.
        base: the first task's id.
        annotations: name -> key -> value, besides those that the graph carries.
    Raises:
        MissingKey: a key is requested or read that the graph has not; the message names both.
        CycleError: tasks wait for each other; the message lists their keys.
        GraphError: the graph reads a future that is not known.
    Cost: O(tasks + edges) of what the keys need; 2-5 us a task.
    """
    with _collector_off():
        graph = dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__()
        planner = _Planner(ensure_dict(graph), known or {}, base)
        planner.walk(flatten_keys(keys))
        return planner.plan(keys, [*_annotations(dsk, graph), *(annotations or {}).items()])


def dask_nodes(dsk: Any, known: Mapping[Key, object]) -> dict[Key, Any]:
    """The graph as Dask's own schedulers show it to callbacks: a new dict of Dask's nodes.

    Args:
        known: values that stand for the graph's nodes.
    """
    graph = dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__()
    values = {key: DataNode(key, value) for key, value in known.items()}
    return dict(convert_legacy_graph({**ensure_dict(graph), **values}))


_MAKERS: dict[type, Callable[..., Any]] = {
    List: make_list,
    Tuple: make_tuple,
    Set: make_set,
    Dict: make_dict,
}


class _Planner:
    """The walk's state. Inside it a node is its position in the graph, an int: tuples are dear to
    hash, and each key is hashed once for the node and once for each mention.

    What a node that waits for its inputs will become stands in `opened` meanwhile:

    - `(func, slots, names, waiting)`: flat; for i in `waiting`, `slots[i]` is a position yet;
    - `(open, reads)`: nested; `reads` are the keys that the open tree reads.
    """

    def __init__(self, dsk: Mapping[Any, Any], known: Mapping[Key, int], base: int) -> None:
        self.known = known
        self.base = base
        self.names: list[Key] = list(dsk)
        self.nodes: list[Any] = list(dsk.values())
        self.index: dict[Any, int] = dict(zip(self.names, range(len(self.names))))
        self.place: list[Any] = [None] * len(self.names)  # position -> slot, once it has one
        self.opened: list[Any] = [None] * len(self.names)
        # Positions to visit. `~i` comes after the inputs of node i, and marks the current path.
        self.stack: list[int] = []
        self.keys: list[Key] = []
        self.calls: list[Call] = []
        # The plan's inputs before literals are taken out, and where each task's part of it ends.
        self.slots: list[int] = []
        self.slots_ptr: list[int] = [0]
        self.literals: list[object] = []
        # By identity: an object that many tasks share is stored and shipped once. The objects
        # live in `literals`, so their ids cannot be given to others.
        self.literal_of: dict[int, int] = {}
        self.futures: dict[Key, object] = {}
        for i, key in enumerate(self.names) if known else ():
            self.place[i] = known.get(key)
        # Types whose instances are constants wherever they occur in a legacy tuple or a Task.
        self.plain_in_tuples: set[type] = {type(None), slice}
        self.plain_in_tasks: set[type] = {type(None), slice, str, int, float, bool, tuple}

    def plan(self, keys: Any, annotations: Iterable[tuple[str, Mapping[Any, Any]]]) -> Plan:
        """What the walk has found, with the requested keys' slots in the request's shape."""

        place, index = self.place, self.index

        def requested(keys: list[Any]) -> tuple[Requested, ...]:
            return tuple([requested(k) if isinstance(k, list) else place[index[k]] for k in keys])

        slots = np.array(self.slots, dtype=np.int32)
        is_task = slots >= 0
        n_tasks_before = np.zeros(len(slots) + 1, dtype=np.int64)
        np.cumsum(is_task, out=n_tasks_before[1:])
        return Plan(
            keys=self.keys,
            calls=self.calls,
            inputs_ptr=n_tasks_before[self.slots_ptr],
            inputs=slots[is_task],
            literals=self.literals,
            requested=requested([keys])[0],
            annotations=self.annotate(annotations),
            base=self.base,
        )

    def slot_of(self, key: Key) -> Any:
        """The slot of a key that the walk has been at."""
        return self.place[self.index[key]]

    def annotate(
        self, annotations: Iterable[tuple[str, Mapping[Any, Any]]]
    ) -> dict[int, dict[str, Any]]:
        """Annotations by task id. A task's own win over those of its aliases, those over all's."""
        annotated: dict[int, dict[str, Any]] = {}
        for name, value in get_annotations().items():
            for task, key in enumerate(self.keys, self.base):
                annotated.setdefault(task, {})[name] = value(key) if callable(value) else value
        own: set[tuple[int, str]] = set()
        for name, value_of in annotations:
            for key, value in value_of.items():
                slot = self.slot_of(key) if key in self.index else None
                if slot is None or slot < self.base or value is None:
                    continue
                if isinstance(value, _AnnotationsTombstone):
                    continue  # how Dask says "this key has none" where it keeps them by function
                if self.keys[slot - self.base] == key:
                    own.add((slot, name))
                elif (slot, name) in own:
                    continue
                annotated.setdefault(slot, {})[name] = value
        return annotated

    # -- the walk ---------------------------------------------------------------------------------

    def walk(self, roots: list[Key]) -> None:
        """Number everything that `roots` need, in post-order. This loop is the hot path."""
        names, nodes, place, opened, stack = (
            self.names,
            self.nodes,
            self.place,
            self.opened,
            self.stack,
        )
        keys, calls, all_slots, slots_ptr = self.keys, self.calls, self.slots, self.slots_ptr
        base = self.base
        stack.extend([self.position(root, None) for root in reversed(roots)])
        while stack:
            i = stack.pop()
            if i < 0:
                i = ~i
                flat = opened[i]
                opened[i] = None
                if len(flat) == 2:
                    self.close_nested(i, *flat)
                    continue
                func, slots, kwnames, waiting = flat
                for w in waiting:
                    slots[w] = place[slots[w]]
            elif place[i] is not None:
                continue
            else:
                node = nodes[i]
                kind = type(node)
                if opened[i] is not None:
                    self.fail_cycle(i)
                if kind is tuple and node and callable(node[0]):
                    flat = self.read_tuple(node)
                elif kind is Task:
                    flat = self.read_task(i, node)
                else:
                    flat = None
                if flat is None:
                    self.open_nested(i, node)
                    continue
                func, slots, kwnames, waiting = flat
                if waiting is not None:
                    opened[i] = flat
                    stack.append(~i)
                    stack.extend([slots[w] for w in reversed(waiting)])
                    continue
            place[i] = base + len(keys)
            keys.append(names[i])
            calls.append((func, tuple(slots), kwnames))
            if len(slots) > 1 and len(set(slots)) < len(slots):
                slots = dict.fromkeys(slots)
            all_slots.extend(slots)
            slots_ptr.append(len(all_slots))

    def read_tuple(self, task: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A legacy task `(func, *args)` as (func, slots, names, waiting); None if it is nested."""
        position, place, literal_of = self.index.get, self.place, self.literal_of
        slots: list[Any] = []
        waiting: list[int] | None = None
        args = iter(task)
        func = next(args)
        for a in args:
            kind = type(a)
            if kind is str or kind is tuple or kind is int or kind is float or kind is bool:
                try:
                    i = position(a)
                except TypeError:  # holds something that cannot be hashed: no key
                    return None
                if i is None and self.known:
                    i = self.adopt(a)
                if kind is tuple and (i is None or (a and callable(a[0]))):
                    return None
                if i is not None:
                    slot = place[i]
                    if slot is None:
                        slot = i
                        if waiting is None:
                            waiting = []
                        waiting.append(len(slots))
                    slots.append(slot)
                    continue
            elif kind not in self.plain_in_tuples:
                if not self.is_plain_in_tuple(a):
                    return None
                self.plain_in_tuples.add(kind)
            slot = literal_of.get(id(a))
            if slot is None:
                slot = self.literal(a)
            slots.append(slot)
        return func, slots, (), waiting

    def is_plain_in_tuple(self, a: Any) -> bool:
        """Is `a` a constant in a legacy tuple, whatever its value?"""
        kinds = (str, int, float, tuple, list, set, frozenset, dict, GraphNode)
        return not isinstance(a, kinds) and not _is_dask_future(a)

    def read_task(self, reader: int, task: Task) -> tuple[Any, ...] | None:
        """A Task as (func, slots, names, waiting); None if something is nested in it."""
        position, place, literal_of = self.index.get, self.place, self.literal_of
        slots: list[Any] = []
        waiting: list[int] | None = None
        func, args, kwargs = task.func, task.args, task.kwargs
        if func is _execute_subgraph:
            return None
        for a in (*args, *kwargs.values()) if kwargs else args:
            kind = type(a)
            if kind is TaskRef or kind is Alias:
                key = a.key if kind is TaskRef else a.target
                i = position(key)
                if i is None:
                    i = self.position(key, self.names[reader])
                slot = place[i]
                if slot is None:
                    slot = i
                    if waiting is None:
                        waiting = []
                    waiting.append(len(slots))
            else:
                if kind not in self.plain_in_tasks:
                    if isinstance(a, (GraphNode, TaskRef)):
                        return None
                    self.plain_in_tasks.add(kind)
                slot = literal_of.get(id(a))
                if slot is None:
                    slot = self.literal(a)
            slots.append(slot)
        return func, slots, tuple(kwargs) if kwargs else (), waiting

    def literal(self, value: object) -> int:
        """The slot of a constant."""
        slot = self.literal_of.get(id(value))
        if slot is None:
            slot = self.literal_of[id(value)] = ~len(self.literals)
            self.literals.append(value)
        return slot

    # -- nested nodes, constants and aliases ------------------------------------------------------

    def open_nested(self, i: int, node: Any) -> None:
        """Open a node that is not a flat call, and put what it reads on the stack."""
        reads: list[Key] = []
        if isinstance(node, GraphNode):
            tree = self.translate(node, reads)
        else:
            tree = self.legacy(node, reads)
        if type(tree) is Read and tree.key == self.names[i]:
            self.fail_missing(tree.key, None)  # Dask drops `{"x": "x"}`: x is said to be elsewhere
        self.opened[i] = tree, reads
        self.stack.append(~i)
        for key in reversed(reads):
            position = self.position(key, self.names[i])
            if self.place[position] is None:
                self.stack.append(position)

    def close_nested(self, i: int, tree: Open, reads: list[Key]) -> None:
        """Number a node whose inputs are numbered. A constant and an alias become no task."""
        slot = bind(tree, self.slot_of)
        if type(slot) is tuple:
            self.calls.append(slot)
            self.slots.extend(dict.fromkeys([self.slot_of(key) for key in reads]))
            self.slots_ptr.append(len(self.slots))
            slot = self.base + len(self.keys)
            self.keys.append(self.names[i])
        self.place[i] = slot

    def legacy_argument(self, a: Any, reads: list[Key]) -> Open:
        """An argument in a legacy tuple. Only here, and only directly, a dict is a container."""
        return self.argument(Dict(a), reads) if isinstance(a, dict) else self.legacy(a, reads)

    def legacy(self, value: Any, reads: list[Key]) -> Open:
        """A value in a legacy graph, by the rules of `convert_legacy_task`."""
        opened = self.legacy_or_none(value, reads)
        return self.legacy_constant(value) if opened is None else opened

    def legacy_or_none(self, value: Any, reads: list[Key]) -> Open:
        """As `legacy`, but None for a constant, so that a container can be one constant."""
        kind = type(value)
        if kind is tuple and value and callable(value[0]):
            return value[0], tuple([self.legacy_argument(a, reads) for a in value[1:]]), ()
        if isinstance(value, (str, int, float, tuple)):
            try:
                if value in self.index or value in self.known:
                    return self.read(value, reads)
            except TypeError:
                pass  # holds something that cannot be hashed: no key
        if kind is list or kind is tuple:
            items = [self.legacy_or_none(v, reads) for v in value]
            if not any(item is not None for item in items):
                return None
            slots = [
                self.legacy_constant(v) if item is None else item for v, item in zip(value, items)
            ]
            return (make_list if kind is list else make_tuple), tuple(slots), ()
        if isinstance(value, (str, int, float)):
            return None
        if _is_dask_future(value):
            return self.read_future(value, reads)
        converted = convert_legacy_task(None, value, self.all_keys())
        return self.translate(converted, reads) if isinstance(converted, GraphNode) else None

    def legacy_constant(self, value: Any) -> int:
        """The slot of a value without keys; as in Dask, the graph's containers are copied."""
        return self.literal(convert_legacy_task(None, value, self.all_keys()))

    def all_keys(self) -> Mapping[Any, Any]:
        """The keys that a legacy value may mention."""
        return ChainMap(self.index, self.known) if self.known else self.index  # type: ignore[arg-type]  # read only

    def argument(self, a: Any, reads: list[Key]) -> Open:
        """An argument of a Task."""
        if isinstance(a, GraphNode):
            return self.translate(a, reads)
        return self.read_future(a, reads) if isinstance(a, TaskRef) else self.literal(a)

    def read(self, key: Key, reads: list[Key]) -> Read:
        reads.append(key)
        return Read(key)

    def read_future(self, ref: Any, reads: list[Key]) -> Read:
        """A TaskRef, or a future, which is the same where the graph has its key."""
        if type(ref) is not TaskRef:
            self.futures[ref.key] = ref
        return self.read(ref.key, reads)

    def translate(self, node: GraphNode, reads: list[Key]) -> Open:
        """A Dask node as an open call, key or literal; told apart by how its class evaluates."""
        how = type(node).__call__
        if how is Task.__call__:
            assert isinstance(node, Task)
            if node.func is _execute_subgraph and type(node.args[0]) is dict:
                inner, out, names, *outer = node.args
                given = {name: self.argument(a, reads) for name, a in zip(names, outer)}
                return fuse(inner, out, given, self.translate)
            maker = _MAKERS.get(type(node))
            if maker is None:
                args, func = (*node.args, *node.kwargs.values()), node.func
                slots = tuple([self.argument(a, reads) for a in args])
                return func, slots, tuple(node.kwargs)
            if not any(isinstance(a, (GraphNode, TaskRef)) for a in node.args):
                return self.literal(maker(*node.args))
            return maker, tuple([self.argument(a, reads) for a in node.args]), ()
        if how is Alias.__call__:
            assert isinstance(node, Alias)
            return self.read(node.target, reads)
        if how is DataNode.__call__:
            assert isinstance(node, DataNode)
            return self.literal(node.value)
        keys = tuple(sorted(node.dependencies, key=repr))
        return OpaqueNode(node, keys), tuple([self.read(k, reads) for k in keys]), ()

    # -- keys of elsewhere ------------------------------------------------------------------------

    def position(self, key: Key, needed_by: Key | None) -> int:
        """The position of a key that is read, or requested if nobody needs it."""
        i = self.index.get(key)
        i = self.adopt(key) if i is None else i
        return self.fail_missing(key, needed_by) if i is None else i

    def adopt(self, key: Key) -> int | None:
        """A position for a value that is computed elsewhere; None if nothing is known of it."""
        value = self.known.get(key)
        if value is None:
            return None
        i = self.index[key] = len(self.names)
        self.names.append(key)
        self.nodes.append(None)
        self.place.append(value)
        self.opened.append(None)
        return i

    # -- errors -----------------------------------------------------------------------------------

    def fail_missing(self, key: Key, needed_by: Key | None) -> NoReturn:
        """The one place that is reached with a key that the graph has not, so with a future."""
        if key in self.futures:
            raise GraphError(f"{key!r}, which {needed_by!r} needs, is a future, not in the graph")
        reader = "requested" if needed_by is None else f"needed by {needed_by!r}"
        raise MissingKey(f"Missing dependency: {key!r} is {reader}, but is not in the graph")

    def fail_cycle(self, i: int) -> NoReturn:
        """Raise the error for node i, read while its own inputs are being numbered."""
        path = [~place for place in self.stack if place < 0]
        cycle = [repr(self.names[j]) for j in [*path[path.index(i) :], i]]
        if len(cycle) > 12:
            cycle[6:-5] = ["..."]
        raise CycleError("Cycle detected: " + " -> ".join(cycle))


def _annotations(dsk: Any, graph: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """(name, key -> value) of whatever annotations the graph carries."""
    if hasattr(dsk, "__dask_annotations__"):
        yield from dsk.__dask_annotations__().items()
    elif isinstance(graph, HighLevelGraph):
        for layer in graph.layers.values():
            for name, value in (layer.annotations or {}).items():
                yield name, {key: value(key) if callable(value) else value for key in layer}


@contextmanager
def _collector_off() -> Iterator[None]:
    """Switch Python's cyclic garbage collector off, and on again if it was on."""
    turn = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    try:
        yield
    finally:
        turn()
