"""Executors as functions: jobs on the local Lambda service, with real runtime clients."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest

from tests.lambda_world import World, leave_mark, marks, wait_until, world
from tests.moto_service import make_bucket
from tests.servers import needs
from wukong.aws.platform import Scaling
from wukong.cluster_lambda import check_versions
from wukong.errors import InvokeError, TaskError, VersionMismatch
from wukong.executor.aws_lambda import versions
from wukong.executor.aws_lambda_invoker import connect
from wukong.executor.aws_lambda_pace import FANOUT

needs("aiobotocore", "aiohttp", "awslambdaric", "boto3")

__all__ = ["world"]


@dask.delayed
def nap(value: int, seconds: float, mark: str | None = None) -> int:
    time.sleep(seconds)
    if mark is not None:
        leave_mark(mark)
    return value


total = dask.delayed(sum)

# Each task is a strand, and on a machine that is busy nothing is swept that is only late.
APART = {"wukong.executor.strands": False, "wukong.job.silence-s": 120.0}


@pytest.mark.slow
def test_collections_give_what_dask_gives_and_the_report_says_what_it_cost(world: World) -> None:
    service = world.service()
    cluster = world.cluster(service.url)
    x = da.random.default_rng(1).random((400, 400), chunks=(100, 100))
    expected = (x @ x.T).sum().compute(scheduler="sync")
    result = (x @ x.T).sum().compute(scheduler=cluster.get)
    assert result == pytest.approx(expected)
    report = cluster.report()
    assert report.cost is not None
    used = report.cost.usage
    assert used.requests == report.executors >= 1
    assert used.redis_operations == report.round_trips
    assert used.gb_seconds > 0
    assert report.cost.total_usd == pytest.approx(
        used.requests * 0.2e-6
        + used.gb_seconds * 16.6667e-6
        + (used.redis_operations + used.redis_bytes / 1024) * 0.0023e-6
    )
    assert f"{report.cost.total_usd:.6f} USD" in repr(report)
    assert report.to_dict()["requests"] == used.requests
    assert service.counters.failures == 0
    assert cluster.jobs() == ()


@pytest.mark.slow
def test_a_wide_graph_goes_out_in_few_payloads_and_each_task_runs_once(
    world: World, tmp_path: Path
) -> None:
    service = world.service(concurrency=2)
    mark = tmp_path / "mark"
    with dask.config.set(APART):
        wide = world.cluster(service.url, n_workers=2)
    leaves = [nap(i, 0.0, str(mark)) for i in range(300)]
    assert total(leaves).compute(scheduler=wide.get) == sum(range(300))
    assert marks(mark) == 300
    counters = wide._pool.counters
    assert counters.tokens == 300
    assert counters.requests == 2
    assert wide.report().commits == 301


@pytest.mark.slow
def test_more_groups_than_one_sender_sends_are_forwarded(world: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    service = world.service(concurrency=2)
    with dask.config.set(APART):
        cluster = world.cluster(service.url, n_workers=48)
    leaves = [nap(i, 0.0, str(mark)) for i in range(48)]
    assert total(leaves).compute(scheduler=cluster.get) == sum(range(48))
    assert marks(mark) == 48
    assert cluster._pool.counters.requests == FANOUT
    # The description; 48 payloads, 16 of them by executors.
    assert service.counters.requests == 1 + 48


@pytest.mark.slow
def test_tokens_that_wait_behind_a_long_task_go_to_others(world: World, tmp_path: Path) -> None:
    service = world.service(concurrency=4)
    with dask.config.set({"wukong.executor.strands": False}):
        cluster = world.cluster(service.url, n_workers=1)
    # One group for one executor; then there are more executors after all.
    cluster._pool.fields["n_executors"] = 4
    leaves = [nap(i, 1.0) for i in range(4)]
    assert total(leaves).compute(scheduler=cluster.get) == 6
    assert cluster.report().executors >= 3


@pytest.mark.slow
def test_an_exception_comes_back_as_itself(world: World) -> None:
    cluster = world.cluster(world.service().url)

    @dask.delayed
    def fail() -> None:
        raise ZeroDivisionError("as told")

    with pytest.raises(ZeroDivisionError, match="as told") as caught:
        fail().compute(scheduler=cluster.get)
    assert "fail" in "".join(caught.value.__notes__) or caught.value.__cause__ is not None


@pytest.mark.slow
def test_near_its_time_limit_an_executor_hands_over_and_nothing_runs_twice(
    world: World, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    service = world.service(concurrency=1, timeout_s=6.0)
    cluster = world.cluster(service.url, n_workers=1)
    chain = nap(0, 0.3, str(mark))
    for _ in range(29):
        chain = dask.delayed(lambda before, value: before + value)(chain, nap(1, 0.3, str(mark)))
    assert chain.compute(scheduler=cluster.get, optimize_graph=False) == 29
    assert marks(mark) == 30
    assert service.counters.failures == 0  # none was killed at its limit
    assert cluster.report().executors >= 3
    assert cluster.report().deaths == 0


@pytest.mark.slow
def test_a_task_longer_than_the_limit_becomes_an_error(world: World) -> None:
    service = world.service(
        concurrency=1,
        timeout_s=4.5,
        scaling=Scaling(concurrency=1, allows_loops=True, retry_after_s=(0.1, 0.1)),
        environment={"DASK_WUKONG__JOB__SILENCE_S": "1.0"},
    )
    with dask.config.set({"wukong.job.silence-s": 1.0, "wukong.executor.heartbeat-s": 0.2}):
        cluster = world.cluster(service.url, n_workers=1)
        with pytest.raises(TaskError):
            nap(1, 60.0).compute(scheduler=cluster.get)
    assert 3 <= service.counters.failures <= 6


@pytest.mark.slow
def test_a_killed_environment_loses_nothing(world: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    service = world.service(concurrency=2)
    with dask.config.set({"wukong.job.silence-s": 1.0, "wukong.executor.heartbeat-s": 0.2}):
        cluster = world.cluster(service.url)

        def kill_one() -> None:
            wait_until(lambda: marks(mark) >= 2)
            environment = next(e for e in service.environments() if not e.is_frozen)
            environment.kill("a test")

        killer = threading.Thread(target=kill_one)
        killer.start()
        leaves = [nap(i, 0.2, str(mark)) for i in range(16)]
        assert total(leaves).compute(scheduler=cluster.get) == sum(range(16))
        killer.join()
    assert service.counters.failures == 1


@pytest.mark.slow
def test_a_service_that_throttles_slows_a_job_down_and_no_more(world: World) -> None:
    service = world.service(concurrency=2, requests_per_s=20.0)
    with dask.config.set({"wukong.executor.strands": False}):
        cluster = world.cluster(service.url, n_workers=200)
    leaves = [nap(i, 0.0) for i in range(200)]
    assert total(leaves).compute(scheduler=cluster.get) == sum(range(200))
    assert service.counters.throttled >= 1


SERVE = """
import sys, time
from pathlib import Path
from wukong.aws.lambda_function import LocalFunction
from wukong.aws.lambda_local import LocalLambda
from wukong.aws.platform import Scaling
function = LocalFunction(
    "wukong", environment={"WUKONG_STORE": sys.argv[1]},
    scaling=Scaling(concurrency=2, allows_loops=True),
)
service = LocalLambda([function], Path(sys.argv[2]), port=int(sys.argv[3]))
print(service.url, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_service_that_is_killed_and_started_again_ends_the_job_right(
    world: World, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    processes = []

    def begin(port: str) -> str:
        command = [sys.executable, "-c", SERVE, world.store, str(tmp_path / "service"), port]
        # The functions' processes find this repository's modules where their service does.
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    url = begin("0")
    try:
        with dask.config.set({"wukong.job.silence-s": 1.0, "wukong.executor.heartbeat-s": 0.2}):
            cluster = world.cluster(url)

            is_over = threading.Event()

            def replace() -> None:
                wait_until(lambda: marks(mark) >= 4 or is_over.is_set())
                if is_over.is_set():
                    return  # the job has failed: its thread shall not fail another test
                processes[0].kill()
                processes[0].wait()
                begin(url.rpartition(":")[2])

            other = threading.Thread(target=replace)
            other.start()
            try:
                leaves = [nap(i, 0.2, str(mark)) for i in range(20)]
                assert total(leaves).compute(scheduler=cluster.get) == sum(range(20))
            finally:
                is_over.set()
                other.join()
        assert len(processes) == 2
    finally:
        for process in processes:
            process.kill()
            process.communicate()


SECRET = "ab" * 32


@pytest.mark.slow
def test_jobs_live_in_redis_and_large_values_in_s3(world: World, moto_url: str) -> None:
    world.use_redis()
    make_bucket(moto_url, "values")
    blobs = f"s3://values/jobs?endpoint_url={moto_url}&region=us-east-1"
    variables = {"WUKONG_BLOBS": blobs, "DASK_WUKONG__STORE__SECRET": SECRET}
    service = world.service(environment=variables)
    with dask.config.set({"wukong.store.secret": SECRET}):
        cluster = world.cluster(service.url, blobs=blobs)
        parts = [dask.delayed(np.full)(100_000, float(i)) for i in range(8)]
        sums = [dask.delayed(np.add)(parts[i], parts[-1 - i]) for i in range(8)]
        result = dask.delayed(np.concatenate)(sums).compute(scheduler=cluster.get)
    assert result.sum() == 8 * 7.0 * 100_000
    assert service.counters.failures == 0
    cost = cluster.report().cost
    assert cost is not None
    assert cost.usage.s3_puts == cluster.report().blobs_written > 0


@pytest.mark.slow
def test_redis_that_is_killed_and_comes_back_ends_the_job_right(
    world: World, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    server = world.use_redis("appendonly yes", "appendfsync always")
    service = world.service(environment={"DASK_WUKONG__STORE__SECRET": SECRET})
    settings = {"store.secret": SECRET, "job.silence-s": 1.0, "executor.heartbeat-s": 0.2}
    with dask.config.set({f"wukong.{name}": value for name, value in settings.items()}):
        cluster = world.cluster(service.url)

        def restart() -> None:
            wait_until(lambda: marks(mark) >= 3)
            server.kill()
            time.sleep(0.5)
            server.start()

        other = threading.Thread(target=restart)
        other.start()
        leaves = [nap(i, 0.2, str(mark)) for i in range(16)]
        assert total(leaves).compute(scheduler=cluster.get) == sum(range(16))
        other.join()


@pytest.mark.slow
def test_a_dask_client_works_with_functions(world: World) -> None:
    distributed = pytest.importorskip("distributed")
    cluster = world.cluster(world.service().url)
    with distributed.Client(cluster) as client:
        futures = client.map(pow, range(10), [2] * 10)
        assert client.submit(sum, futures).result(timeout=60) == 285


@pytest.mark.slow
def test_the_schedule_goes_through_all_jobs(world: World) -> None:
    service = world.service()
    with connect(service.url, None) as client:
        assert client.invoke("wukong", {"wukong": "sweep"}) == {"jobs": 0, "invoked": 0}
        with pytest.raises(InvokeError, match="no event of Wukong's"):
            client.invoke("wukong", {"wukong": "dance"})


@pytest.mark.slow
def test_large_values_go_through_the_store(world: World) -> None:
    cluster = world.cluster(world.service().url)
    parts = [dask.delayed(np.full)(300_000, float(i)) for i in range(4)]
    joined = dask.delayed(np.concatenate)(parts)
    result = joined.compute(scheduler=cluster.get)
    assert result.shape == (1_200_000,)
    assert result.sum() == 300_000 * 6.0


def test_a_function_that_is_not_there_is_named(world: World) -> None:
    service = world.service()
    from wukong.cluster_lambda import LambdaCluster

    with pytest.raises(InvokeError, match="no-such"):
        LambdaCluster("no-such", store=world.store, endpoint_url=service.url)


@pytest.mark.slow
def test_a_function_without_its_store_is_found_out_at_once(world: World) -> None:
    from wukong.cluster_lambda import LambdaCluster

    service = world.service(environment={"WUKONG_STORE": "nowhere://at-all"})
    with pytest.raises(InvokeError, match="cannot use its store"):
        LambdaCluster("wukong", store=world.store, endpoint_url=service.url)


def test_other_versions_are_refused_with_the_fix() -> None:
    ours = versions()
    check_versions(ours, "f")
    with pytest.raises(
        VersionMismatch, match=r"dask .* here and 2024.1.0 there.*wukong aws deploy"
    ):
        check_versions({**ours, "dask": "2024.1.0"}, "f")
    with pytest.raises(VersionMismatch, match="python"):
        check_versions({**ours, "python": "3.8"}, "f")
    major = ours["numpy"].split(".")[0]
    check_versions({**ours, "numpy": f"{major}.0.0"}, "f")
