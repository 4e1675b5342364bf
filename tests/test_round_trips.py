"""What a strand asks of its store, on every kind: one commit, and where values are large one get
and one put. Counted by executors, and again by the servers.
"""

import time
from collections.abc import Iterator

import dask
import fault_tasks as tasks
import pytest
from fault_places import KINDS, Place, open_place
from s3_proxy import FaultyProxy, start_proxy

N = 16


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def proxy(request: pytest.FixtureRequest, kind: str) -> Iterator[FaultyProxy | None]:
    """Between executors and S3, where that is used."""
    if kind not in ("S3", "tiers"):
        yield None
        return
    with start_proxy(request.getfixturevalue("moto_url")) as proxy:
        yield proxy


@pytest.fixture
def place(kind: str, proxy: FaultyProxy | None) -> Iterator[Place]:
    place = open_place(kind, lambda: proxy.url if proxy else "")
    yield place
    place.remove()


@pytest.mark.slow
def test_a_strand_takes_one_commit_and_at_most_one_put_and_one_get(
    kind: str, place: Place, proxy: FaultyProxy | None
) -> None:
    settings = {
        "wukong.executor.strands": False,  # each task is one
        "wukong.executor.absorb-bytes": 0,
        "wukong.executor.heartbeat-s": 60.0,
    }
    with dask.config.set(settings), place.cluster(2) as cluster:
        cluster._pool.ready(60)  # or the first token is offered twice
        cluster.get({"warm": (tasks.increment, 1)}, "warm")
        for size_bytes in (100, 300_000):
            graph: dict[object, object] = {("x", i): (tasks.ones, size_bytes, i) for i in range(N)}
            graph |= {("y", i): (tasks.n_bytes, ("x", i), ("x", (i + 1) % N)) for i in range(N)}
            cluster.jobs()
            before = place.n_scripts()
            if proxy is not None:
                proxy.seen.clear()
            begun_at = time.monotonic()
            assert cluster.get(graph, [("y", i) for i in range(N)]) == (2 * size_bytes,) * N
            report = cluster.report()
            assert report.retries == report.deaths == 0
            assert report.commits == report.strands == 2 * N
            is_large = size_bytes > 1000
            assert (report.blobs_written > 0) == is_large
            for record in report.records:
                at_most = (
                    record.is_invoked + bool(record.n_blobs_read) + bool(record.n_blobs_written)
                )
                # The commit before it, and garbage that its receipt has named.
                at_most += 1 + is_large
                # Whoever looks into shared memory for work, and finds none, has asked, too.
                assert record.n_round_trips <= at_most or kind == "shared memory", record
            if before is not None:
                n_scripts = (place.n_scripts() or 0) - before - report.invocations - report.commits
                # The client's: create, a look at the end, collect, and forget, if that is done;
                # and looks at a job that takes long.
                assert 3 <= n_scripts <= 6 + 2 * (time.monotonic() - begun_at)
            if proxy is not None:
                lists = ("list-type", "uploads")  # of what a job that is over has left
                methods = [m for m, path in proxy.seen if not any(word in path for word in lists)]
                assert methods.count("PUT") == report.blobs_written
                assert methods.count("GET") == report.blobs_read
