"""Where the store is far away, executors fetch and put while they compute: in pools, in functions.

The store is a real Redis behind `far_away`; each side of a comparison does the same work with the
same number of round trips.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import dask
import fault_tasks as tasks
import pytest
from servers import needs

needs("redis", "msgpack")

from far_redis import far_away  # noqa: E402
from redis_servers import Server, free_port  # noqa: E402

import wukong  # noqa: E402
from tests.lambda_world import World, world  # noqa: E402
from wukong.cluster_base import Cluster  # noqa: E402

__all__ = ["world"]

LATENCY_S = 0.03
TASK_S = 0.1
N_STRANDS = 10
LARGE = 100_000
SECRET = "ab" * 32


@pytest.fixture
def far_url(tmp_path: Path) -> Iterator[str]:
    with (
        Server(tmp_path / "redis", port=free_port()) as server,
        far_away(server.port, LATENCY_S) as port,
    ):
        yield f"redis://127.0.0.1:{port}"


def graph_of(n: int) -> dict[object, object]:
    """n strands, each of which reads a large value, computes, and makes another one."""
    graph: dict[object, object] = {("c", i): bytes([i]) * LARGE for i in range(n)}
    # A constant that two tasks read is a value of the store.
    graph |= {
        ("x", i): (tasks.sleep_and_join, TASK_S, ("c", i), ("c", (i + 1) % n)) for i in range(n)
    }
    return graph


def seconds_of(cluster: Cluster) -> tuple[float, int]:
    """How long the graph takes, and how many round trips."""
    keys = [("x", i) for i in range(N_STRANDS)]
    begun_at = time.perf_counter()
    found = cluster.get(graph_of(N_STRANDS), keys)
    took_s = time.perf_counter() - begun_at
    assert [len(value) for value in found] == [2 * LARGE] * N_STRANDS
    return took_s, cluster.report().round_trips


def settings(prefetch_bytes: int) -> dict[str, object]:
    return {
        "wukong.executor.prefetch-bytes": prefetch_bytes,
        "wukong.executor.strands": False,
        "wukong.executor.split": False,
    }


@pytest.mark.full  # it compares times, which other load on the machine changes
def test_a_pool_fetches_and_puts_while_it_computes(far_url: str) -> None:
    found = []
    for prefetch_bytes in (0, 1 << 28):
        with (
            dask.config.set(settings(prefetch_bytes)),
            wukong.LocalCluster(1, store=far_url) as cluster,
        ):
            cluster.get({"warm": (tasks.increment, 1)}, "warm")
            found.append(seconds_of(cluster))
    (alone_s, n_alone), (together_s, n_together) = found
    # Four waits a strand: to start it, to fetch, to put, to commit.
    assert alone_s - together_s > 0.6 * N_STRANDS * 4 * LATENCY_S
    assert n_together == pytest.approx(n_alone, abs=2)


@pytest.mark.full  # it compares times, which other load on the machine changes
def test_a_function_fetches_and_puts_while_it_computes(world: World, far_url: str) -> None:
    world.store = far_url
    service = world.service(concurrency=1, environment={"DASK_WUKONG__STORE__SECRET": SECRET})
    found = []
    for prefetch_bytes in (0, 1 << 28):
        with dask.config.set({**settings(prefetch_bytes), "wukong.store.secret": SECRET}):
            cluster = world.cluster(service.url, n_workers=1)
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        found.append(seconds_of(cluster))
    assert service.counters.cold_starts == 1
    (alone_s, n_alone), (together_s, n_together) = found
    assert alone_s - together_s > 0.6 * N_STRANDS * 4 * LATENCY_S
    assert n_together == pytest.approx(n_alone, abs=2)
