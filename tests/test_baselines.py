"""Schemes on the real engine: what each asks of the store, counted and worked out by hand."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from dask._task_spec import Task, TaskRef

from bench.baseline_cluster import BaselineCluster, sizes_of
from bench.baselines import compulsory_bytes
from wukong.scheduler.costs import Costs as LearnedCosts
from wukong.sim import AWS_LAMBDA, LOCAL_POOL, SCHEMES, Costs, simulate
from wukong.sim.dags import Dag, gemm, tree_reduction, tsqr

SMALL, LARGE = 10, 20_000
"""Numbers in a value: one travels in commits, of the other each is a blob."""


def make(*inputs: Any, n: int) -> Any:
    return np.full(n, 1.0 + sum(value[0] for value in inputs))


def graph_of(dag: Dag, tag: str, n: int) -> tuple[dict[Any, Task], list[Any]]:
    """A Dask graph whose plan is this one; every value is an array of n numbers."""
    graph = {
        (tag, task): Task((tag, task), make, *(TaskRef((tag, i)) for i in inputs), n=n)
        for task, inputs in enumerate(dag.reads())
    }
    return graph, [(tag, task) for task in dag.requested]


def expected(dag: Dag) -> list[float]:
    values: list[float] = []
    for inputs in dag.reads():
        values.append(1.0 + sum(values[i] for i in inputs))
    return [values[task] for task in dag.requested]


@pytest.fixture(scope="module")
def clusters() -> Iterator[dict[str, BaselineCluster]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(BaselineCluster(s, 1)) for name, s in SCHEMES.items()}


def counted(cluster: BaselineCluster, dag: Dag, n: int) -> dict[str, int]:
    """What one run of a graph asks of the store; its result is checked."""
    graph, keys = graph_of(dag, "g", n)
    cluster.sizes = sizes_of(graph, keys)
    cluster.counts.clear()
    assert [float(value[0]) for value in cluster.get(graph, keys)] == expected(dag)
    cluster.settle()
    return cluster.counts.total()


# Of a tree of 8 leaves, 15 tasks, by hand. Two operations are the client's: create, collect. Every
# invoked strand is taken and every strand committed. Of two inputs, who becomes a strand holds one.
TREE = {
    # A set for each value, an increment for each edge, a get for the other input of each sum; of
    # the root's commit, which has no edge, one operation besides the set. 8 leaves are taken:
    # 2 + 15 + 15 + 7 + 8.
    "wukong2020": {"commits": 15, "sets": 15, "increments": 14, "gets": 7, "operations": 47},
    "without strands": {"commits": 15, "operations": 2 + 8 + 15},
    # Take, put, commit for each task, a get of each input; the client gets the result.
    "numpywren": {"commits": 15, "blobs_put": 15, "blobs_read": 15, "operations": 2 + 45 + 14 + 1},
    "pywren": {"commits": 15, "blobs_put": 15, "blobs_read": 15, "operations": 2 + 45 + 14 + 1},
    "strawman": {"commits": 15, "blobs_put": 0, "operations": 2 + 2 * 15},
}
INVOCATIONS = {"wukong2020": 8, "without strands": 8, "numpywren": 15, "pywren": 15, "strawman": 15}


@pytest.mark.slow
@pytest.mark.parametrize("name", TREE)
def test_a_tree_asks_of_the_store_what_is_worked_out_by_hand(
    name: str, clusters: dict[str, BaselineCluster]
) -> None:
    found = counted(clusters[name], tree_reduction(8), SMALL)
    wanted = {**TREE[name], "invocations": INVOCATIONS[name]}
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.slow
def test_a_chain_behind_a_large_value_moves_nothing_in_2020_and_each_value_in_numpywren(
    clusters: dict[str, BaselineCluster],
) -> None:
    dag = Dag(np.array([0, 0, 1, 2, 3]), np.array([0, 0, 1]), (2, 3))  # a fan-out of two
    n = 200_000  # above the threshold of clustering
    clustered = counted(clusters["wukong2020"], dag, n)
    assert (clustered["commits"], clustered["blobs_put"], clustered["blobs_read"]) == (1, 2, 2)
    assert counted(clusters["numpywren"], dag, n)["blobs_put"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_the_simulator_counts_what_the_real_engine_does(
    name: str, n: int, clusters: dict[str, BaselineCluster]
) -> None:
    for dag in (tree_reduction(8), gemm(2), tsqr(4)):
        clusters[name]._costs = LearnedCosts()  # nothing is known: cut by numbers of tasks
        real = counted(clusters[name], dag, n)
        n_values = real["blobs_put"]
        size_bytes = real["written_bytes"] // n_values if n == LARGE else 100
        costs = Costs([0.01] * dag.n_tasks, [size_bytes] * dag.n_tasks)
        # A local pool takes what is queued by itself; where the client invokes, it must not.
        platform = AWS_LAMBDA if SCHEMES[name].client_invokes else LOCAL_POOL
        report = simulate(dag, costs, platform, 1, scheme=SCHEMES[name])
        simulated = {
            "invocations": report.n_invocations,
            "commits": report.n_commits,
            "sets": report.counts.get("sets", 0),
            "increments": report.counts.get("increments", 0),
            "gets": report.counts.get("gets", 0),
            "blobs_put": report.counts.get("blobs put", 0),
            # The client of a simulation reads its results at no cost.
            "blobs_read": report.counts.get("blobs read", 0)
            + (len(dag.requested) if n_values else 0),
        }
        assert {key: real[key] for key in simulated} == simulated
        if n == LARGE:
            assert real["written_bytes"] == report.put_bytes


def test_compulsory_bytes_are_those_of_the_stated_sizes() -> None:
    assert compulsory_bytes("tree of 8,191", 2) == 2 * 8 * 2
    assert compulsory_bytes("GEMM", 2) == 4 * 2_048**2 * 8
    assert compulsory_bytes("TSQR", 2) == 2 * 8 * (16 * 64 * 64 + 64 * 64)
