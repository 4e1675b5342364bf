"""A tiny interpreter of plans, which says what a plan means, and tasks for its tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from dask._task_spec import GraphNode, Task

from wukong.scheduler.calls import evaluate
from wukong.scheduler.graph import plan_graph
from wukong.scheduler.plan import Plan


def inc(x: Any) -> Any:
    return x + 1


def pack(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def check(plan: Plan) -> None:
    """The invariants that strands and executors rely on."""
    n = len(plan.keys)
    assert len(plan.calls) == n
    assert len(plan.inputs_ptr) == n + 1
    assert plan.inputs_ptr[0] == 0
    assert plan.inputs_ptr[-1] == len(plan.inputs)
    assert plan.inputs.dtype == np.int32
    for task, call in enumerate(plan.calls):
        inputs = plan.inputs[plan.inputs_ptr[task] : plan.inputs_ptr[task + 1]].tolist()
        assert len(set(inputs)) == len(inputs)
        assert set(inputs) == {s for s in slots_of(call) if s >= 0}
        assert all(i < task for i in inputs)
    used = {s for call in plan.calls for s in slots_of(call)}
    assert all(~s < len(plan.literals) for s in used if s < 0)


def slots_of(call: Any) -> Iterator[int]:
    for slot in call[1]:
        if isinstance(slot, tuple):
            yield from slots_of(slot)
        else:
            yield slot


def run_plan(plan: Plan) -> Any:
    check(plan)
    values: dict[int, Any] = {~i: value for i, value in enumerate(plan.literals)}
    for task, call in enumerate(plan.calls):
        values[task] = evaluate(call, values)
    return plan.resolve(values)


def get(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """A Dask scheduler made of a plan and the interpreter."""
    return run_plan(plan_graph(dsk, keys))


def fused(*tasks: GraphNode, key: str = "fused") -> Any:
    return Task.fuse(*tasks, key=key)
