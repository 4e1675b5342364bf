"""A store and a local Lambda service around it, for tests of executors that are functions."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.redis_servers import Server as RedisServer
from tests.redis_servers import free_port
from wukong.aws.lambda_function import LocalFunction
from wukong.aws.lambda_local import LocalLambda
from wukong.aws.platform import Scaling
from wukong.cluster_lambda import LambdaCluster
from wukong.storage.local_files import default_directory, remove_directory

KEYS = {
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class World:
    """What a test starts, and what is ended after it."""

    def __init__(self, tmp_path: Path, stack: contextlib.ExitStack) -> None:
        self.tmp_path = tmp_path
        self.stack = stack
        self.directory = default_directory()
        self.store = f"local://{self.directory}"

    def use_redis(self, *options: str) -> RedisServer:
        """Keep jobs in a Redis of this world's."""
        server = RedisServer(self.tmp_path / "redis", *options, port=free_port())
        self.stack.callback(server.stop)
        self.store = server.tcp_url
        return server

    def function(self, concurrency: int = 2, **fields: Any) -> LocalFunction:
        """Wukong's function, on this world's store."""
        scaling = fields.pop("scaling", Scaling(concurrency=concurrency, allows_loops=True))
        variables = {"WUKONG_STORE": self.store, **fields.pop("environment", {})}
        return LocalFunction("wukong", environment=variables, scaling=scaling, **fields)

    def service(self, concurrency: int = 2, **fields: Any) -> LocalLambda:
        """A service with the function."""
        rate = fields.pop("requests_per_s", float("inf"))
        function = self.function(concurrency, **fields)
        service = LocalLambda([function], self.tmp_path / "service", requests_per_s=rate)
        # An executor that is about to invoke another one would wait for a service that ends.
        self.stack.callback(service.close, 1.0)
        return service

    def cluster(self, url: str, **options: Any) -> LambdaCluster:
        """A cluster on a service."""
        options.setdefault("n_workers", 2)
        cluster = LambdaCluster("wukong", store=self.store, endpoint_url=url, **options)
        return self.stack.enter_context(cluster)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world of one's own."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        made = World(tmp_path, stack)
        stack.callback(remove_directory, made.directory)
        yield made


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for something that will be."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def marks(path: Path) -> int:
    """How often a task has left its mark."""
    return len(path.read_bytes()) if path.exists() else 0


def leave_mark(path: str) -> None:
    """Count a run, outside of the process."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, b"x")
    os.close(fd)
