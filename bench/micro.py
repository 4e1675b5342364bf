"""Graphs of no-ops, where only the scheduler's own work is left to be timed.

Each graph comes in both of Dask's forms: legacy tuples, and `Task` objects.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

from dask._task_spec import List, Task, TaskRef
from dask.typing import Key

from bench.measure import Built, Case
from bench.noops import add, increment, same, total
from bench.peers import CallPool

Form: TypeAlias = Literal["tuples", "tasks"]
FORMS: tuple[Form, ...] = ("tuples", "tasks")

N_INDEPENDENT = 10_000
N_TREE = 8_191
N_CHAIN = 2_000
N_FAN = 2_000
N_SMALL_LEAVES = 64
N_TINY_LEAVES = 8
N_WARM_CALLS = 20


def cases(form: Form) -> list[Case]:
    """All micro cases with their graphs in the given form."""
    n_leaves = (N_TREE + 1) // 2
    small = partial(_tree, form, N_SMALL_LEAVES)
    return [
        Case(
            f"{N_INDEPENDENT:,} independent",
            N_INDEPENDENT,
            partial(_independent, form, N_INDEPENDENT),
            partial(_expect, list(range(N_INDEPENDENT))),
            on_pool=_independent_on_pool,
            warm=partial(_independent, form, 200, "warm"),
        ),
        Case(
            f"tree of {N_TREE:,}",
            N_TREE,
            partial(_tree, form, n_leaves),
            partial(_expect, sum(range(n_leaves))),
            on_pool=partial(_tree_on_pool, n_leaves),
            warm=partial(_tree, form, N_SMALL_LEAVES, "warm"),
        ),
        Case(
            f"chain of {N_CHAIN:,}",
            N_CHAIN,
            partial(_chain, form, N_CHAIN),
            partial(_expect, N_CHAIN),
            warm=partial(_chain, form, 50, "warm"),
        ),
        Case(
            f"fan 1-{N_FAN:,}-1",
            N_FAN + 2,
            partial(_fan, form, N_FAN),
            partial(_expect, N_FAN),
            warm=partial(_fan, form, 50, "warm"),
        ),
        Case(
            f"tree of {N_SMALL_LEAVES} leaves",
            2 * N_SMALL_LEAVES - 1,
            small,
            partial(_expect, sum(range(N_SMALL_LEAVES))),
            n_calls=5,
            on_pool=partial(_tree_on_pool, N_SMALL_LEAVES),
        ),
        Case(
            "one warm call",
            1,
            partial(_one, form),
            partial(_expect, 1),
            n_calls=N_WARM_CALLS,
            on_pool=_one_on_pool,
        ),
    ]


def tiny_tree(form: Form) -> Case:
    """A tree that also sides can do that take a tenth of a second for a call."""
    return Case(
        f"tree of {N_TINY_LEAVES} leaves",
        2 * N_TINY_LEAVES - 1,
        partial(_tree, form, N_TINY_LEAVES),
        partial(_expect, sum(range(N_TINY_LEAVES))),
        on_pool=partial(_tree_on_pool, N_TINY_LEAVES),
    )


def tree(form: Form, n_tasks: int, tag: str) -> Built:
    """A binary tree of additions.

    Args:
        form: tuples or tasks.
        n_tasks: one less than a power of two.
        tag: part of every key.
    """
    return _tree(form, (n_tasks + 1) // 2, tag)


def chain(form: Form, n_tasks: int, tag: str) -> Built:
    """Increments, each of the one before."""
    return _chain(form, n_tasks, tag)


def _call(form: Form, key: Key, function: Callable[..., int], *arguments: object) -> object:
    """One task; arguments that are tuples are keys, a list holds keys."""
    if form == "tuples":
        return (function, *arguments)
    return Task(key, function, *(_reference(argument) for argument in arguments))


def _reference(argument: object) -> object:
    if isinstance(argument, tuple):
        return TaskRef(argument)
    if isinstance(argument, list):
        return List(*(TaskRef(key) for key in argument))
    return argument


def _independent(form: Form, n: int, tag: str) -> Built:
    keys: list[Key] = [(tag, number) for number in range(n)]
    graph = {key: _call(form, key, same, number) for number, key in enumerate(keys)}
    return graph, keys


def _tree(form: Form, n_leaves: int, tag: str) -> Built:
    level: list[Key] = [(tag, 0, number) for number in range(n_leaves)]
    graph = {key: _call(form, key, same, number) for number, key in enumerate(level)}
    depth = 0
    while len(level) > 1:
        depth += 1
        above: list[Key] = [(tag, depth, number) for number in range(len(level) // 2)]
        for number, key in enumerate(above):
            graph[key] = _call(form, key, add, level[2 * number], level[2 * number + 1])
        level = above
    return graph, level[0]


def _chain(form: Form, n: int, tag: str) -> Built:
    graph: dict[Key, object] = {(tag, 0): _call(form, (tag, 0), increment, 0)}
    for number in range(1, n):
        graph[tag, number] = _call(form, (tag, number), increment, (tag, number - 1))
    return graph, (tag, n - 1)


def _fan(form: Form, n: int, tag: str) -> Built:
    source, sink = (tag, "source"), (tag, "sink")
    middle: list[Key] = [(tag, number) for number in range(n)]
    graph: dict[Key, object] = {source: _call(form, source, same, 1)}
    graph.update({key: _call(form, key, same, source) for key in middle})
    graph[sink] = _call(form, sink, total, middle)
    return graph, sink


def _one(form: Form, tag: str) -> Built:
    return {(tag, 0): _call(form, (tag, 0), same, 1)}, (tag, 0)


def _independent_on_pool(pool: CallPool) -> list[int]:
    """Each call its own future, as each is its own task for the others."""
    return list(pool.map(same, range(N_INDEPENDENT)))


def _tree_on_pool(n_leaves: int, pool: CallPool) -> int:
    """Level by level: a pool has no dependencies, so each level waits for the last."""
    level: Sequence[int] = list(pool.map(same, range(n_leaves)))
    while len(level) > 1:
        level = list(pool.map(add, level[::2], level[1::2]))
    return level[0]


def _one_on_pool(pool: CallPool) -> int:
    value: int = pool.submit(same, 1).result()
    return value


def _expect(expected: object, result: object) -> None:
    found = list(result) if isinstance(result, tuple) else result
    assert found == expected, f"expected {str(expected)[:80]}, got {str(found)[:80]}"
