"""`plan_graph` beside its results: annotations, errors, and what planning costs."""

from __future__ import annotations

import gc
import operator
import sys
import time
from collections.abc import Callable
from typing import Any

import dask
import pytest
from dask._task_spec import Alias, GraphNode, List, Task, TaskRef, _execute_subgraph
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from tests.plan_interpreter import fused, get, inc, pack, run_plan
from wukong.errors import CycleError, GraphError, MissingKey
from wukong.scheduler.graph import plan_graph
from wukong.scheduler.plan import Plan


class FakeFuture:
    __dask_future__ = True

    def __init__(self, key: str) -> None:
        self.key = key


# -- annotations --------------------------------------------------------------------------------


def by_key(plan: Plan) -> dict[Any, dict[str, Any]]:
    return {plan.keys[task]: annotations for task, annotations in plan.annotations.items()}


def layered(**annotations: Any) -> HighLevelGraph:
    layers = {
        "x": MaterializedLayer({("x", 0): (inc, 1), ("x", 1): (inc, 2)}, annotations),
        "y": MaterializedLayer({"y": (operator.add, ("x", 0), ("x", 1)), "z": "y"}),
    }
    return HighLevelGraph(layers, {"x": set(), "y": {"x"}})


def test_annotations_of_layers_reach_their_tasks() -> None:
    plan = plan_graph(layered(retries=3, resources={"GPU": 1}), "y")
    assert by_key(plan) == {
        ("x", 0): {"retries": 3, "resources": {"GPU": 1}},
        ("x", 1): {"retries": 3, "resources": {"GPU": 1}},
    }


def test_an_annotation_may_be_a_function_of_the_key() -> None:
    plan = plan_graph(layered(priority=lambda key: key[1] * 10), "y")
    assert by_key(plan) == {("x", 0): {"priority": 0}, ("x", 1): {"priority": 10}}


def test_what_is_not_needed_carries_no_annotation() -> None:
    assert by_key(plan_graph(layered(retries=3), ("x", 1))) == {("x", 1): {"retries": 3}}
    assert plan_graph(layered(), "y").annotations == {}


def test_a_task_takes_the_annotation_of_its_alias_unless_it_has_its_own() -> None:
    layers = {
        "x": MaterializedLayer({"x": (inc, 1)}, {"retries": 1}),
        "y": MaterializedLayer({"y": "x"}, {"retries": 5, "priority": 2}),
    }
    plan = plan_graph(HighLevelGraph(layers, {"x": set(), "y": {"x"}}), "y")
    assert by_key(plan) == {"x": {"retries": 1, "priority": 2}}


def test_annotations_of_expressions_reach_their_tasks() -> None:
    plans: list[Plan] = []

    def scheduler(dsk: Any, keys: Any, **kwargs: Any) -> Any:
        plans.append(plan_graph(dsk, keys))
        return run_plan(plans[0])

    with dask.annotate(retries=2):
        first = dask.delayed(inc)(1, dask_key_name="first")
    with dask.annotate(priority=lambda key: len(key)):
        second = dask.delayed(inc)(first, dask_key_name="second")
    assert second.compute(scheduler=scheduler) == 3
    assert by_key(plans[0]) == {"first": {"retries": 2}, "second": {"priority": 6}}


def test_annotations_around_the_planning_hold_for_all_tasks() -> None:
    with dask.annotate(priority=7, retries=lambda key: len(key)):
        plan = plan_graph(layered(priority=1), "y")
    assert by_key(plan) == {
        ("x", 0): {"priority": 1, "retries": 2},
        ("x", 1): {"priority": 1, "retries": 2},
        "y": {"priority": 7, "retries": 1},
    }


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [Task("b", inc, TaskRef("gone")), Alias("b", "gone")])
def test_a_missing_key_is_named_with_who_needs_it(reader: GraphNode) -> None:
    with pytest.raises(MissingKey, match="'gone' is needed by 'b', but is not in the graph"):
        plan_graph({"a": 1, "b": reader, "c": (inc, "b")}, "c")


def test_a_missing_key_in_a_nested_node_is_named() -> None:
    with pytest.raises(MissingKey, match="'gone' is needed by 'b'"):
        plan_graph({"b": Task("b", pack, List(TaskRef("gone")))}, "b")
    with pytest.raises(MissingKey, match="'gone' is needed by 'f'"):
        plan_graph({"f": fused(Task("x", inc, TaskRef("gone")), Task("y", inc, TaskRef("x")))}, "f")


def test_a_missing_requested_key_is_named() -> None:
    with pytest.raises(KeyError, match="'gone' is requested"):
        plan_graph({"a": 1}, [["a"], ["gone"]])


@pytest.mark.parametrize("itself", ["x", TaskRef("x"), Alias("x")])
def test_a_key_that_is_its_own_alias_is_missing(itself: Any) -> None:
    with pytest.raises(MissingKey, match="'x'"):
        plan_graph({"x": itself, "y": (inc, "x")}, "y")


B, C = TaskRef("b"), TaskRef("c")
CYCLES: dict[str, dict[Any, Any]] = {
    "tuples": {"a": (inc, "b"), "b": (inc, "c"), "c": (inc, "b")},
    "tasks": {"a": (inc, "b"), "b": Task("b", inc, C), "c": Task("c", inc, B)},
    "nested": {"a": (inc, "b"), "b": (sum, ["c", 1]), "c": (inc, (inc, "b"))},
    "aliases": {"a": (inc, "b"), "b": "c", "c": Alias("c", "b")},
    "branches": {"a": (pack, "d", "b"), "b": (pack, "d", "c"), "c": (pack, "b", "d"), "d": 1},
}


@pytest.mark.parametrize("name", CYCLES)
def test_a_cycle_is_named(name: str) -> None:
    with pytest.raises(CycleError, match=r"'b' -> 'c' -> 'b'$"):
        plan_graph(CYCLES[name], "a")


def test_a_task_that_waits_for_itself_is_a_cycle() -> None:
    with pytest.raises(RuntimeError, match="'a' -> 'a'"):
        plan_graph({"a": (inc, "a")}, "a")


def test_a_cycle_in_a_fused_task_is_named() -> None:
    inner = {"x": Task("x", inc, TaskRef("y")), "y": Task("y", inc, TaskRef("x"))}
    with pytest.raises(CycleError, match="'y'"):
        plan_graph({"f": Task("f", _execute_subgraph, inner, "y", ())}, "f")


def test_a_long_cycle_is_shortened() -> None:
    dsk = {i: (inc, (i + 1) % 1000) for i in range(1000)}
    with pytest.raises(CycleError) as error:
        plan_graph(dsk, 0)
    assert "0 -> 1 -> 2 -> 3 -> 4 -> 5 -> ... -> 996 -> 997 -> 998 -> 999 -> 0" in str(error.value)


def test_a_cycle_that_nobody_needs_is_no_error() -> None:
    assert get({"a": 1, "b": (inc, "c"), "c": (inc, "b")}, "a") == 1


@pytest.mark.parametrize("use", [lambda f: (inc, f), lambda f: [1, [f]], lambda f: f])
def test_a_future_that_is_not_in_the_graph_is_named(use: Any) -> None:
    with pytest.raises(GraphError, match="'far', which 'b' needs, is a future"):
        plan_graph({"b": use(FakeFuture("far"))}, "b")


def test_a_future_whose_key_is_in_the_graph_is_that_key() -> None:
    assert get({"far": (inc, 1), "b": (inc, FakeFuture("far"))}, "b") == 3


# -- size ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tuples", "tasks", "nested", "aliases"])
def test_a_chain_of_100_000_needs_no_recursion(how: str) -> None:
    n = 100_000
    link: dict[str, Callable[[int], Any]] = {
        "tuples": lambda i: (inc, i - 1),
        "tasks": lambda i: Task(i, inc, TaskRef(i - 1)),
        "nested": lambda i: (sum, [i - 1, 1.5]),
        "aliases": lambda i: Alias(i, i - 1),
    }
    dsk: dict[Any, Any] = {0: (int, 0.5)}
    dsk.update((i, link[how](i)) for i in range(1, n))
    limit = sys.getrecursionlimit()
    plan = plan_graph(dsk, n - 1)
    assert sys.getrecursionlimit() == limit
    step = {"tuples": 1, "tasks": 1, "nested": 1.5, "aliases": 0}[how]
    assert run_plan(plan) == step * (n - 1)


def tree(n_leaves: int) -> tuple[dict[Any, Any], Any]:
    dsk: dict[Any, Any] = {(0, i): (inc, i) for i in range(n_leaves)}
    level = 0
    while n_leaves > 1:
        n_leaves //= 2
        level += 1
        for i in range(n_leaves):
            dsk[level, i] = (operator.add, (level - 1, 2 * i), (level - 1, 2 * i + 1))
    return dsk, (level, 0)


def test_planning_reads_each_key_a_fixed_number_of_times() -> None:
    class Counted:
        hashed = 0

        def __init__(self, name: Any) -> None:
            self.name = name

        def __hash__(self) -> int:
            Counted.hashed += 1
            return hash(self.name)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Counted) and self.name == other.name

    def hashes(n_leaves: int) -> int:
        dsk, top = tree(n_leaves)
        keys = {name: Counted(name) for name in dsk}
        tasks = {
            keys[name]: Task(None, f, *[TaskRef(keys[a]) if a in keys else a for a in args])
            for name, (f, *args) in dsk.items()
        }
        Counted.hashed = 0
        plan = plan_graph(tasks, keys[top])
        assert len(plan.calls) == 2 * n_leaves - 1
        return Counted.hashed

    # Once for each key and each mention, and three times for the one that is requested.
    assert hashes(64) == 127 + 126 + 2
    assert hashes(512) == 1023 + 1022 + 2


@pytest.mark.slow
def test_planning_time_is_not_quadratic() -> None:
    def seconds(n_leaves: int) -> float:
        dsk, top = tree(n_leaves)
        times = []
        for _ in range(3):
            start = time.thread_time()
            plan_graph(dsk, top)
            times.append(time.thread_time() - start)
        return min(times)

    # 16 when linear, 256 when quadratic.
    assert seconds(64 * 1024) < 64 * seconds(4 * 1024)


@pytest.mark.parametrize("was_on", [True, False])
def test_the_garbage_collector_is_left_as_it_was(was_on: bool) -> None:
    try:
        (gc.enable if was_on else gc.disable)()
        plan_graph({"a": 1}, "a")
        with pytest.raises(MissingKey):
            plan_graph({"a": 1}, "b")
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
