"""The Redis store passes the suite of all stores, on a real server."""

# The suite's modules are imported after pytest has been told to explain their asserts.
# ruff: noqa: E402

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import needs

pytest.register_assert_rewrite(
    "storage_contract",
    "storage_contract_blobs",
    "storage_contract_jobs",
    "storage_contract_open",
    "storage_walk",
)
needs("redis", "msgpack")

from redis_backend import RedisBackend
from redis_servers import Server, ServerCluster, TlsServer, ValkeyServer
from storage_contract import TokenContract
from storage_contract_blobs import JOB, BlobContract
from storage_contract_jobs import JobContract
from storage_contract_open import OpenContract
from storage_walk import Walk
from test_stores import MemoryBackend

from wukong.storage.redis_blobs import RedisBlobs
from wukong.storage.redis_link import Link
from wukong.storage.redis_url import parse_url, with_options

KINDS = {
    "standalone": Server,
    "cluster": ServerCluster,
    "TLS and ACL": TlsServer,
    "Valkey": ValkeyServer,
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=() if k == "standalone" else pytest.mark.slow) for k in KINDS],
)
def server(request: pytest.FixtureRequest) -> Iterator[Server | ServerCluster]:
    with tempfile.TemporaryDirectory() as folder:
        server = KINDS[request.param](Path(folder))
        yield server
        server.stop()


@pytest.fixture(scope="module")
def connected(server: Server | ServerCluster) -> Iterator[RedisBackend]:
    backend = RedisBackend(server.url, server.onlooker_url)
    yield backend
    backend.close()


@pytest.fixture
def redis_backend(connected: RedisBackend) -> Iterator[RedisBackend]:
    connected.clock.now = 1000.0
    yield connected
    connected.forget_jobs()


class TestRedisTokens(TokenContract):
    @pytest.fixture
    def backend(self, redis_backend: RedisBackend) -> RedisBackend:
        return redis_backend


class TestRedisJobs(JobContract):
    @pytest.fixture
    def backend(self, redis_backend: RedisBackend) -> RedisBackend:
        return redis_backend


class TestRedisOpenJobs(OpenContract):
    @pytest.fixture
    def backend(self, redis_backend: RedisBackend) -> RedisBackend:
        return redis_backend


class TestRedisBlobs(BlobContract):
    """With chunks that are smaller than some blobs."""

    @pytest.fixture
    def blobs(self, server: Server | ServerCluster) -> Iterator[RedisBlobs]:
        link = Link(parse_url(with_options(server.url, chunk_bytes=65_000)))
        blobs = RedisBlobs(link)
        yield blobs
        for job in (JOB, f"{JOB}0"):
            blobs.delete_job(job)
        link.close()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["standalone"], indirect=True)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.randoms(use_true_random=False))
def test_redis_does_what_the_memory_store_does(redis_backend: RedisBackend, random: Random) -> None:
    redis_backend.clock.now = 1000.0
    walk = Walk(random, MemoryBackend(), redis_backend)
    try:
        walk.run(n_steps=50, has_queue=False)
    finally:
        walk.forget()
