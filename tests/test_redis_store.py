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

pytest.register_assert_rewrite(
    "storage_contract", "storage_contract_jobs", "storage_contract_open", "storage_walk"
)
pytest.importorskip("redis")
pytest.importorskip("msgpack")

from redis_backend import RedisBackend
from redis_servers import Server
from storage_contract import TokenContract
from storage_contract_jobs import JobContract
from storage_contract_open import OpenContract
from storage_walk import Walk
from test_stores import MemoryBackend


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        yield server
        server.stop()


@pytest.fixture
def redis_backend(server: Server) -> Iterator[RedisBackend]:
    backend = RedisBackend(server.url)
    yield backend
    backend.close()


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


@pytest.mark.slow
@settings(
    max_examples=150,
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
