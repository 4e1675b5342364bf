"""A program: one graph on one platform's executor; prints what came back and who has computed it.

python executor_platforms.py distributed | parsl | globus
mpiexec -n 3 python -m mpi4py.futures executor_platforms.py mpi
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any


def increment(x: int) -> int:
    time.sleep(0.05)
    return x + 1


def add(*values: int) -> int:
    return sum(values)


def where(x: int) -> tuple[int, int]:
    time.sleep(0.2)
    return x, os.getpid()


@contextlib.contextmanager
def distributed_executor() -> Iterator[futures.Executor]:
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@contextlib.contextmanager
def parsl_executor() -> Iterator[futures.Executor]:
    from parsl import Config, HighThroughputExecutor
    from parsl.concurrent import ParslPoolExecutor
    from parsl.providers import LocalProvider

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            executors=[
                HighThroughputExecutor(
                    label="two",
                    address="127.0.0.1",
                    loopback_address="127.0.0.1",
                    cores_per_worker=0.1,
                    max_workers_per_node=2,
                    provider=LocalProvider(init_blocks=1, max_blocks=1),
                )
            ],
            run_dir=folder,
            initialize_logging=False,
        )
        with ParslPoolExecutor(config) as executor:
            yield executor


@contextlib.contextmanager
def mpi_executor() -> Iterator[futures.Executor]:
    from mpi4py.futures import MPIPoolExecutor

    with MPIPoolExecutor() as executor:
        yield executor


def run_packed(code: str, payload: str) -> str:
    """What an endpoint does: unpack the function and its arguments, call, pack the result."""
    from globus_compute_sdk.serialize import ComputeSerializer

    serializer = ComputeSerializer()
    function = serializer.deserialize(code)
    args, kwargs = [serializer.deserialize(b) for b in serializer.unpack_buffers(payload)]
    return serializer.serialize(function(*args, **kwargs))


class Endpoint:
    """In the place of Globus Compute's web service and of one endpoint with two workers.

    What the SDK's `Executor` gives to the service goes through its own serialisation.
    """

    def __init__(self) -> None:
        from globus_compute_sdk.serialize import ComputeSerializer

        self.fx_serializer = self.serializer = ComputeSerializer()
        self.code: dict[str, str] = {}
        self.results: dict[str, futures.Future] = {}
        self.pool = futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))

    def register_function(self, function: Callable, **_: object) -> str:
        name = str(uuid.uuid4())
        self.code[name] = self.serializer.serialize(function)
        return name

    def create_batch(self, task_group_id: Any = None, **_: object) -> Any:
        from globus_compute_sdk.sdk.batch import Batch

        return Batch(task_group_id, serializer=self.serializer)

    def batch_run(self, endpoint_id: Any, batch: Any) -> dict[str, Any]:
        made: dict[str, list[str]] = {}
        for function, payloads in batch.tasks.items():
            for payload in payloads:
                name = str(uuid.uuid4())
                self.results[name] = self.pool.submit(run_packed, self.code[str(function)], payload)
                made.setdefault(str(function), []).append(name)
        group = str(batch.task_group_id or uuid.uuid4())
        request = str(uuid.uuid4())
        return {
            "tasks": made,
            "task_group_id": group,
            "request_id": request,
            "endpoint_id": str(endpoint_id),
        }

    # The place of the thread that waits for results at the service's message queue.

    class ShuttingDownError(Exception):
        pass

    def watch_for_task_results(self, executor: object, watched: list[Any]) -> None:
        for future in watched:

            def arrived(result: futures.Future, future: Any = future) -> None:
                if result.exception() is not None:
                    future.set_exception(result.exception())
                else:
                    future.set_result(self.serializer.deserialize(result.result()))

            self.results[str(future.task_id)].add_done_callback(arrived)


@contextlib.contextmanager
def globus_executor() -> Iterator[futures.Executor]:
    from globus_compute_sdk import Executor

    endpoint = Endpoint()
    with endpoint.pool:
        executor = Executor(endpoint_id=str(uuid.uuid4()), client=endpoint)
        executor._get_result_watcher = lambda: endpoint
        yield executor
        executor.shutdown(wait=False, cancel_futures=True)


PLATFORMS = {
    "distributed": distributed_executor,
    "parsl": parsl_executor,
    "mpi": mpi_executor,
    "globus": globus_executor,
}


def main() -> None:
    import dask
    import dask.array as da

    import wukong

    name = sys.argv[1]
    n_workers = 2 if name in ("parsl", "globus") else None
    with (
        PLATFORMS[name]() as executor,
        dask.config.set({"wukong.executor.linger-s": 1.0}),
        wukong.ExecutorCluster(executor, n_workers=n_workers, timeout_s=100) as cluster,
    ):
        graph: dict = {("x", i): (increment, i) for i in range(16)}
        graph["sum"] = (add, *graph)
        total = cluster.get(graph, "sum")
        report = cluster.report()
        spread = cluster.get({("w", i): (where, i) for i in range(8)}, [("w", i) for i in range(8)])
        x = da.random.default_rng(1).random((4000, 20), chunks=(500, 20))
        q, r = da.linalg.qr(x)
        error = float(abs(x - q @ r).max().compute(scheduler=cluster.get))
        try:
            cluster.get({"x": (divmod, 1, 0)}, "x")
        except ZeroDivisionError as raised:
            name_of_error = type(raised).__name__
        found = {
            "total": total,
            "tasks": report.tasks,
            "commits": report.commits,
            "strands": report.strands,
            "deaths": report.deaths,
            "n_workers": cluster.n_workers,
            "in order": [i for i, _ in spread] == list(range(8)),
            "n_processes": len({pid for _, pid in spread}),
            "here": os.getpid() in {pid for _, pid in spread},
            "is exact": error < 1e-10,
            "raised": name_of_error,
            "jobs": list(cluster.jobs()),
        }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
