"""`plan_graph` against `dask.get`: the interpreter of plans has to give the same answers."""

from __future__ import annotations

import operator
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, Dict, List, Set, Task, TaskRef, Tuple
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan_interpreter import fused, get, inc, pack, run_plan
from wukong.errors import MissingKey
from wukong.scheduler.calls import FusedCalls, evaluate
from wukong.scheduler.graph import OpaqueNode, plan_graph

Point = namedtuple("Point", "x y")


class Name(str):
    """A key that is a str, but not of type str."""


class OwnCall(Task):
    """A Task that evaluates itself in its own way."""

    __slots__ = ()

    def __call__(self, values: Any = ()) -> Any:
        return "own", super().__call__(values)


REF = TaskRef("a")
GRAPHS: dict[str, tuple[dict[Any, Any], Any]] = {
    "literal": ({"a": 1}, "a"),
    "legacy task": ({"a": 1, "b": (inc, "a")}, "b"),
    "task without arguments": ({"a": (list,)}, "a"),
    "nested legacy tasks": ({"a": 1, "b": (inc, (inc, (inc, "a")))}, "b"),
    "nested request": ({"a": 1, "b": (inc, "a")}, [["a", "b"], [["b"]], [], "a"]),
    "empty request": ({"a": 1}, []),
    "keys that are no sinks, twice": ({"a": 1, "b": (inc, "a"), "c": (inc, "b")}, ["b", "c", "b"]),
    "tuples as keys": ({("a", 0): 1, ("a", 1): (inc, ("a", 0))}, [("a", 1)]),
    "numbers as keys": ({1: 10, 2.5: (inc, 1), 0: (pack, 2.5, 3)}, [1, 2.5, 0]),
    "bool that is a key": ({1: 10, "b": (pack, True, False, 1.0)}, "b"),
    "numpy numbers": ({1: 10, "b": (pack, np.int64(1), np.float64(1.0), complex(1))}, "b"),
    "bytes and frozensets are no keys": (
        {b"a": 1, frozenset("a"): 2, "b": (pack, b"a", frozenset("a"))},
        ["b", b"a"],
    ),
    "subclass of str": ({"a": 1, "b": (pack, Name("a"), Name("no"))}, "b"),
    "the empty tuple as key": ({(): 1, "b": (pack, ()), "c": (pack, [()])}, ["b", "c"]),
    "key whose head is callable": ({(inc, 1): 5, "b": (pack, (inc, 1))}, ["b", (inc, 1)]),
    "same input twice": ({"a": 1, "b": (inc, "a"), "c": (operator.add, "b", "b")}, "c"),
    "list of keys": ({"a": 1, "b": (sum, ["a", "a", 5])}, "b"),
    "deep lists": ({"a": 1, "b": (pack, [["a", [(inc, "a")]], 3, [4]])}, "b"),
    "tuple that holds keys": ({"a": 1, "b": (pack, ("no", "a", [1, "a"]))}, "b"),
    "tuple of constants": ({"a": 1, "b": (pack, ("x", "y"), (), (1, [2]))}, "b"),
    "list of constants": ({"a": 1, "b": (pack, [1, [2, {"a": "a"}]])}, "b"),
    "top-level list": ({"a": 1, "b": ["a", 2, (inc, "a")], "c": [1, [2]]}, ["b", "c"]),
    "top-level dict is a constant": ({"a": 1, "b": {"a": "a"}, "c": (pack, "b")}, ["b", "c"]),
    "dict argument": ({"a": 1, "b": (pack, {"k": "a", "l": REF, "a": (inc, "a")})}, "b"),
    "dict of constants": ({"b": (pack, OrderedDict(x=1), {}, {"k": [1]})}, "b"),
    "dict in a list": ({"a": 1, "b": (pack, [{"k": "a"}, "a"])}, "b"),
    "sets": ({"a": 1, "b": (pack, {"a", "z"}, frozenset(["a"]), {5})}, "b"),
    "namedtuples": ({"a": 1, "b": (pack, Point("a", 2), [Point(1, ["a"])]), "c": Point(1, 2)}, "b"),
    "top-level namedtuple": ({"a": 1, "c": Point("a", 2)}, "c"),
    "cannot be hashed": ({"a": 1, "b": (pack, ("a", ["a"]), ([1],), np.arange(3).tolist())}, "b"),
    "objects": ({"a": (pack, None, slice(1), int, inc, b"x", "text")}, "a"),
    "legacy alias": ({"a": 1, "b": "a", "c": "b", "d": (inc, "c")}, ["d", "c", "b"]),
    "alias of a task": ({"a": (inc, 1), "b": "a", ("c", 0): "b", "d": ("c", 0)}, ["d", "a"]),
    "text that is no key": ({"a": "b", "c": ("x", 1)}, ["a", "c"]),
    "TaskRef in a legacy tuple": ({"a": 1, "b": (inc, REF), "c": REF, "d": [REF]}, ["b", "c", "d"]),
    "node in a legacy tuple": ({"a": 1, "b": (pack, Task(None, inc, REF), List(REF))}, "b"),
    "Task": ({"a": DataNode("a", 1), "b": Task("b", pack, REF, 1, k=REF, l="a")}, "b"),
    "Task with keywords only": ({"a": 1, "b": Task("b", pack, k=REF, l=(1, 2))}, "b"),
    "Task keeps strings and tuples": ({"a": 1, "b": Task("b", pack, "a", ("a",), REF, ["a"])}, "b"),
    "nested Task": ({"a": 1, "b": Task("b", pack, Task(0, inc, REF), k=Task(0, inc, 1))}, "b"),
    "Alias": ({"a": 1, "b": Alias("b", "a"), "c": Task("c", inc, Alias("b"))}, ["c", "b"]),
    "aliases to aliases": (
        {"a": Task("a", inc, 1), "b": Alias("b", "a"), "c": Alias("c", "b"), "d": Alias("d", "c")},
        ["d", "a", ["b", "c"]],
    ),
    "List": ({"a": 1, "b": Task("b", pack, List(REF, 2, List(REF)), List(1, 2))}, "b"),
    "Tuple and Set": ({"a": 1, "b": Task("b", pack, Tuple(REF, 1), Set(REF, 1), Tuple(1))}, "b"),
    "Dict": ({"a": 1, "b": Task("b", pack, Dict({"k": REF, "l": 1}), Dict({1: 2}))}, "b"),
    "Dict with a node as key": ({"a": 1, "b": Task("b", pack, Dict([[REF, 1], ["k", REF]]))}, "b"),
    "containers as nodes": ({"a": 1, "b": List(REF, 1), "c": Dict({"k": REF})}, ["b", "c"]),
    "DataNode as argument": ({"a": 1, "b": Task("b", pack, DataNode(None, "a"), REF)}, "b"),
    "subclass of Task": ({"a": 1, "b": OwnCall("b", inc, REF)}, "b"),
    "nested subclass of Task": ({"a": 1, "b": Task("b", pack, OwnCall(None, inc, REF), REF)}, "b"),
    "fused chain": (
        {"a": 1, "f": fused(Task("x", inc, REF), Task("y", inc, TaskRef("x")))},
        "f",
    ),
    "fused tree": (
        {
            "a": 1,
            "f": fused(
                Task("x", inc, REF),
                Task("y", inc, REF),
                Task("z", pack, List(TaskRef("x"), 5), k=TaskRef("y")),
            ),
        },
        "f",
    ),
    "fused diamond": (
        {
            "a": 1,
            "f": fused(
                Task("x", inc, REF),
                Alias("also", "x"),
                Task("y", inc, TaskRef("x")),
                DataNode("d", 7),
                Task("z", pack, TaskRef("y"), TaskRef("also"), TaskRef("d"), 7, TaskRef("d"), REF),
            ),
        },
        "f",
    ),
    "fused diamond behind an alias": (
        {
            "a": 1,
            "f": fused(
                Task("x", inc, REF), Task("y", pack, TaskRef("x"), TaskRef("x")), Alias("z", "y")
            ),
        },
        "f",
    ),
    "fused twice": (
        {
            "a": 1,
            "f": fused(
                fused(Task("x", inc, REF), Task("y", inc, TaskRef("x")), key="y"),
                Task("z", pack, TaskRef("y"), TaskRef("y"), TaskRef("b")),
            ),
            "b": (inc, "a"),
        },
        ["f", "b"],
    ),
    "fused with text that looks like keys": (
        {"a": 1, "f": fused(Task("x", pack, "a", REF), Task("y", pack, TaskRef("x"), "x"))},
        "f",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_plan_gives_what_dask_gives(name: str) -> None:
    dsk, keys = GRAPHS[name]
    before = repr(dsk)
    result, expected = get(dsk, keys), dask.get(dsk, keys)
    assert result == expected
    assert repr(result) == repr(expected)  # tells 1 from True and 1.0
    assert repr(dsk) == before


@pytest.mark.parametrize("name", GRAPHS)
def test_calls_can_be_pickled(name: str) -> None:
    dsk, keys = GRAPHS[name]
    plan = plan_graph(dsk, keys)
    plan.calls = pickle.loads(pickle.dumps(plan.calls))
    assert repr(run_plan(plan)) == repr(dask.get(dsk, keys))


def test_a_plan_holds_only_tasks_that_the_keys_need() -> None:
    dsk = {"a": 1, "b": (inc, "a"), "c": "b", "d": (inc, "c"), "e": (inc, "d"), "f": (inc, "b")}
    plan = plan_graph(dsk, ["d"])
    assert plan.keys == ["b", "d"]
    assert plan.calls == [(inc, (-1,), ()), (inc, (0,), ())]
    assert plan.inputs_ptr.tolist() == [0, 0, 1]
    assert plan.inputs.tolist() == [0]
    assert plan.literals == [1]
    assert plan.requested == (1,)


def test_tasks_are_numbered_depth_first_in_the_order_of_arguments() -> None:
    dsk = {("x", i): (inc, i) for i in range(4)}
    tree = {"l": (operator.add, ("x", 0), ("x", 1)), "r": (operator.add, ("x", 2), ("x", 3))}
    plan = plan_graph({**dsk, **tree, "top": (operator.add, "l", "r")}, "top")
    assert plan.keys == [("x", 0), ("x", 1), "l", ("x", 2), ("x", 3), "r", "top"]


def test_a_shared_constant_is_stored_once() -> None:
    big = np.arange(3)
    tuples = dict.fromkeys(range(10, 20), (pack, "data", big))
    tasks = {i: Task(i, pack, TaskRef("data"), big, k=big) for i in range(20, 30)}
    plan = plan_graph({"data": DataNode("data", big), **tuples, **tasks}, [*tuples, *tasks])
    assert len(plan.literals) == 1
    assert plan.literals[0] is big
    assert len(plan.calls) == 20


def test_a_constant_container_is_one_literal() -> None:
    plan = plan_graph({"a": (sum, [0] * 1000), "b": Task("b", sum, List(*[0] * 1000))}, ["a", "b"])
    assert plan.literals == [[0] * 1000] * 2


def test_a_fused_tree_is_nested_and_a_fused_diamond_goes_in_steps() -> None:
    def call_of(name: str) -> Any:
        return plan_graph(*GRAPHS[name]).calls[-1]

    assert call_of("fused chain") == (inc, ((inc, (-1,), ()),), ())
    assert call_of("fused tree")[0] is pack
    fused_calls = call_of("fused diamond")[0]
    assert isinstance(fused_calls, FusedCalls)
    assert len(fused_calls.steps) == 3
    assert fused_calls.last_uses == ((), (), (-1, -2))


def test_fused_calls_drop_a_value_after_its_last_use() -> None:
    alive: list[int] = []

    class Value:
        def __init__(self, *_: Any) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    tasks = [
        Task("x", Value),
        Task("y", Value, TaskRef("x"), TaskRef("x")),
        Task("z", Value, TaskRef("y")),
        Task("n", lambda _: len(alive), TaskRef("z")),
    ]
    call = plan_graph({"f": fused(*tasks)}, "f").calls[0]
    assert isinstance(call[0], FusedCalls)
    assert evaluate(call, {}) == 1  # z alone; x and y are gone


def test_a_long_fused_chain_goes_in_steps_and_not_in_a_deep_nest() -> None:
    chain = [Task(i, inc, TaskRef(i - 1)) for i in range(1, 3000)]
    plan = plan_graph({0: DataNode(0, 0), "f": fused(*chain)}, "f")
    assert len(plan.calls) == 1
    assert isinstance(plan.calls[0][0], FusedCalls)
    assert run_plan(plan) == 2999


def test_an_opaque_node_reads_its_dependencies() -> None:
    plan = plan_graph({"a": (inc, 1), "b": OwnCall("b", inc, TaskRef("a"))}, "b")
    assert isinstance(plan.calls[1][0], OpaqueNode)
    assert plan.inputs.tolist() == [0]


# -- random graphs ------------------------------------------------------------------------------


@st.composite
def graphs(draw: Any) -> tuple[dict[Any, Any], Any]:
    """Random acyclic graphs of all node kinds, and random nested requests."""
    n = draw(st.integers(1, 14))
    names = [draw(st.sampled_from([f"k{i}", ("t", i), i * 100])) for i in range(n)]
    dsk: dict[Any, Any] = {}
    for i, name in enumerate(names):
        earlier = st.sampled_from(names[:i]) if i else st.just("no key")
        dsk[name] = draw(_node(name, earlier, has_inputs=i > 0))
    requests = st.recursive(st.sampled_from(names), lambda s: st.lists(s, max_size=3))
    return dict(draw(st.permutations(list(dsk.items())))), draw(requests)


def _node(name: Any, earlier: Any, has_inputs: bool) -> Any:
    constants = st.sampled_from([1, 2.5, "text", None, ("t", "x"), True])
    legacy = st.recursive(
        st.one_of(earlier, earlier, constants),
        lambda s: st.one_of(
            st.lists(s, max_size=3),
            st.lists(s, max_size=3).map(tuple),
            st.lists(s, max_size=2).map(lambda a: (pack, *a)),
            st.dictionaries(st.sampled_from("xyz"), s, max_size=2),
        ),
        max_leaves=5,
    )
    tuples = st.lists(legacy, max_size=3).map(lambda a: (pack, *a))
    if not has_inputs:
        return st.one_of(legacy, tuples)
    refs = earlier.map(TaskRef)
    nodes = st.recursive(
        st.one_of(refs, refs, constants, earlier.map(Alias)),
        lambda s: st.one_of(
            st.lists(s, max_size=3).map(lambda a: List(*a)),
            st.lists(s, max_size=2).map(lambda a: Task(None, pack, *a, k=1)),
            st.lists(s, min_size=2, max_size=3).map(lambda a: Tuple(*a)),
            s.map(lambda a: Dict({"k": a})),
        ),
        max_leaves=5,
    )
    tasks = st.lists(nodes, max_size=3).map(lambda a: Task(name, pack, *a))
    fusions = st.tuples(earlier, earlier, st.booleans()).map(
        lambda e: fused(
            Task("inner 1", pack, TaskRef(e[0])),
            Task("inner 2", pack, TaskRef("inner 1"), TaskRef(e[1])),
            Task("inner 3", pack, TaskRef("inner 2"), *[TaskRef("inner 1")] * e[2]),
            key=name,
        )
    )
    return st.one_of(legacy, tuples, tasks, earlier.map(lambda e: Alias(name, e)), fusions)


@settings(max_examples=80, deadline=None)
@given(graphs())
@pytest.mark.slow
def test_random_graphs_give_what_dask_gives(case: tuple[dict[Any, Any], Any]) -> None:
    dsk, keys = case
    assert repr(get(dsk, keys)) == repr(dask.get(dsk, keys))


# -- collections --------------------------------------------------------------------------------


def assert_same(collection: Any) -> None:
    assert_equal(collection.compute(scheduler=get), collection.compute(scheduler="sync"))


def assert_equal(result: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(result, expected)
    elif hasattr(expected, "equals"):
        assert expected.equals(result)
    else:
        assert result == expected


x = da.arange(48, chunks=12).reshape(6, 8)
ARRAYS: dict[str, Callable[[], Any]] = {
    "sum": lambda: (x + 1).sum(),
    "mean by axis": lambda: x.mean(axis=0),
    "matmul": lambda: x @ x.T,
    "slices": lambda: x[1:5][::2, ::3],
    "fancy": lambda: x[[3, 1], :] + 1,
    "svd": lambda: da.linalg.svd(da.ones((8, 2), chunks=(4, 2)))[1],
    "overlap": lambda: x.map_overlap(lambda b: b + b.sum(), depth=1, boundary=0),
    "rechunk": lambda: (x * 2).rechunk((2, 4)).cumsum(axis=1),
    "from an array": lambda: da.from_array(np.arange(6), chunks=2)[::-1],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_give_what_dask_gives(name: str) -> None:
    assert_same(ARRAYS[name]())


def test_bags_give_what_dask_gives() -> None:
    bag = db.from_sequence(range(20), npartitions=4)
    assert_same(bag.map(inc).filter(lambda i: i % 2).sum())
    assert_same(bag.map(lambda i: [i, i]).flatten().frequencies())
    assert_same(bag.groupby(lambda i: i % 3, shuffle="tasks").map(lambda kv: (kv[0], sum(kv[1]))))
    assert_same(bag.fold(operator.add))


def test_delayed_objects_give_what_dask_gives() -> None:
    one = dask.delayed(inc)(0)
    assert_same(dask.delayed(pack)([one, {"k": one}], Point(one, 2), k=(one, {one})))
    assert dask.compute(one, {"x": [one]}, 3, scheduler=get) == (1, {"x": [1]}, 3)


@pytest.mark.slow
def test_dataframes_give_what_dask_gives() -> None:
    dd = pytest.importorskip("dask.dataframe")
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"g": [1, 2, 1, 3] * 5, "v": range(20)})
    df = dd.from_pandas(frame, npartitions=4)
    assert_same((df.v + df.g * 2).sum())
    assert_same(df[df.v > 3].assign(w=df.v + 1).groupby("g").w.mean())
    assert_same(df.merge(df, on="g").v_x.max())
    assert_same(df.set_index("v").g.cumsum())


def test_a_collection_is_a_graph_too() -> None:
    assert get(x, x.__dask_keys__()[0][0])[0, 0] == 0


def test_nested_request_shapes_are_dasks() -> None:
    keys = [["a"], [["b", "a"]], [], "b"]
    dsk = {"a": 1, "b": (inc, "a")}
    assert get(dsk, keys) == ((1,), ((2, 1),), (), 2)
    assert plan_graph(dsk, keys).requested == ((-1,), ((0, -1),), (), 0)


# ------------------------------------------------------------------ pieces of something larger


def test_known_keys_are_neither_tasks_nor_constants() -> None:
    dsk = {"a": (inc, "f"), "b": Task("b", operator.add, TaskRef("a"), TaskRef("g")), "f": (inc, 1)}
    plan = plan_graph(dsk, ["b", "g"], known={"f": 3, "g": 5, "unused": 7}, base=10)
    assert plan.keys == ["a", "b"]
    assert plan.calls == [(inc, (3,), ()), (operator.add, (10, 5), ())]
    assert (plan.inputs.tolist(), plan.inputs_ptr.tolist()) == ([3, 10, 5], [0, 1, 3])
    assert (plan.requested, plan.literals) == ((11, 5), [])


def test_known_keys_are_found_in_nested_arguments() -> None:
    dsk = {"a": (sum, ["f", ["g"], {"x": "f"}]), "b": Task("b", sum, List(TaskRef("f"), 1))}
    plan = plan_graph(dsk, ["a", "b"], known={"f": 3, "g": 5}, base=10)
    assert plan.inputs.tolist() == [3, 5, 3]


def test_annotations_may_be_given_beside_a_piece() -> None:
    plan = plan_graph({"a": (inc, 1)}, ["a"], base=7, annotations={"retries": {"a": 2}})
    assert (plan.requested, plan.annotations) == ((7,), {7: {"retries": 2}})


def test_an_unknown_future_is_missing() -> None:
    with pytest.raises(MissingKey, match="'g'"):
        plan_graph({"a": Task("a", inc, TaskRef("g"))}, ["a"], known={"f": 3}, base=10)
