"""What jobs do on the local Lambda service, compared with what the simulator says they do."""

from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

from tests.lambda_world import World, world
from tests.servers import needs
from wukong import sim
from wukong.cluster_base import executor_policy
from wukong.cluster_lambda import LEAST_STRAND_S
from wukong.executor.serialize import size_of
from wukong.report import Report
from wukong.scheduler.calls import evaluate
from wukong.scheduler.costs import Costs
from wukong.scheduler.graph import plan_graph
from wukong.scheduler.parts import static_parts
from wukong.sim.services import AWS_LAMBDA
from wukong.submit import cut_plan

needs("aiobotocore", "aiohttp", "awslambdaric", "boto3")

__all__ = ["world"]

N_EXECUTORS = 16
TASK_S = 1e-4

make = dask.delayed(np.full)
add = dask.delayed(np.add)


def tree() -> tuple[Any, list[Any]]:
    """The sum of 1,024 vectors of 32 KB, two by two."""
    level = [make(4_000, float(i)) for i in range(1024)]
    while len(level) > 1:
        level = [add(a, b) for a, b in zip(level[::2], level[1::2])]
    return dict(level[0].dask), [level[0].key]


def tsqr() -> tuple[Any, list[Any]]:
    """Q and R of a tall matrix of 128 blocks, 128 KB each."""
    x = da.random.default_rng(1).random((128 * 1000, 16), chunks=(1000, 16))
    q, r = dask.optimize(*da.linalg.qr(x))
    return {**q.dask, **r.dask}, [*q.__dask_keys__(), *r.__dask_keys__()]


def predict(graph: Any, keys: Any) -> tuple[sim.SimReport, int]:
    """The simulator's report, and how many bytes of values executors record."""
    plan = plan_graph(graph, keys)
    values: dict[int, Any] = {~i: value for i, value in enumerate(plan.literals)}
    for task, call in enumerate(plan.calls):
        values[task] = evaluate(call, values)
    sizes = [size_of(values[task]) for task in range(len(plan.keys))]
    parts = static_parts(cut_plan(plan, N_EXECUTORS, Costs(), LEAST_STRAND_S))
    dag = sim.Dag(plan.inputs_ptr, plan.inputs, ())
    setting = sim.Setting(
        parts=parts,
        reads=dag.reads(),
        costs=sim.Costs([TASK_S] * dag.n_tasks, sizes),
        platform=AWS_LAMBDA,
        n_executors=N_EXECUTORS,
        policy=executor_policy(is_measured=True),
        fail_fast=True,
    )
    exported = sum(sizes[task] for part in parts for spec in part.exports for task in spec.tasks)
    return sim.run_world(setting, 0, is_checked=False), exported


@pytest.mark.slow
@pytest.mark.parametrize("build", [tree, tsqr])
def test_invocations_commits_and_bytes_are_those_of_the_simulator(
    world: World, build: Callable[[], tuple[Any, list[Any]]]
) -> None:
    graph, keys = build()
    # Whether a run is long enough to be split is a matter of the machine's load.
    with dask.config.set({"wukong.executor.split": False}):
        predicted, exported_bytes = predict(graph, keys)
        service = world.service(concurrency=2)
        cluster = world.cluster(service.url, n_workers=N_EXECUTORS)
        cluster.get(graph, keys)
    report = cluster.report()
    assert service.counters.failures == report.deaths == report.retries == 0
    found = observed(report)
    expected = {
        "invocations": predicted.n_invocations,
        "commits": predicted.n_commits,
        "strands": predicted.n_strands,
        "blob bytes": predicted.put_bytes,
        "bytes": exported_bytes,
    }
    assert found == {name: pytest.approx(n, rel=0.05) for name, n in expected.items()}


def observed(report: Report) -> dict[str, int]:
    return {
        "invocations": report.invocations,
        "commits": report.commits,
        "strands": report.strands,
        "blob bytes": sum(r.blob_bytes_written for r in report.records),
        "bytes": sum(r.bytes_written for r in report.records),
    }
