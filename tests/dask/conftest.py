"""The same tests of a Dask client for several clusters: Wukong's, and distributed's own.

A test takes `client` (one of its own, synchronous and the default one), `c` (an asynchronous one;
the test is then a coroutine), or `cluster` (shared by all tests of one backend). What passes with
distributed's cluster and not with Wukong's is in `accepted.py`, with the reason.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import wukong
from tests.dask.accepted import reason_of

distributed = pytest.importorskip("distributed")

N_WORKERS = 2
LEFT_BY_DISTRIBUTED = (
    "ignore:unclosed:ResourceWarning",
    "ignore:.*(socket|event loop|BaseEventLoop).*:pytest.PytestUnraisableExceptionWarning",
)
"""Warnings of what its clients leave to the collector, which may come in any later test."""
IS_SERVED = hasattr(wukong.LocalCluster, "scheduler_address")
"""Whether Wukong's clusters have a server for `distributed.Client`."""


@pytest.fixture(
    scope="session",
    params=[
        "wukong-threads",
        "wukong-processes",
        pytest.param("distributed-threads", marks=pytest.mark.full),
        pytest.param("distributed-processes", marks=pytest.mark.full),
    ],
)
def backend(request: pytest.FixtureRequest) -> str:
    """Whose cluster, and of what its workers are made."""
    return str(request.param)


def make_cluster(backend: str, n_workers: int = N_WORKERS) -> Any:
    """A new cluster; close it."""
    kind, _, unit = backend.partition("-")
    if kind == "distributed":
        return distributed.LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=unit == "processes",
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        )
    if not IS_SERVED:
        pytest.skip("Wukong's cluster has no server yet")
    return wukong.LocalCluster(n_workers=n_workers, processes=unit == "processes")


@pytest.fixture(scope="session")
def cluster(backend: str) -> Iterator[Any]:
    """The cluster that all tests of a backend share; do not close it, do not kill its workers."""
    with make_cluster(backend) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Any) -> Iterator[Any]:
    """A synchronous client, which is the default one during the test."""
    with distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def other(cluster: Any, client: Any) -> Iterator[Any]:
    """A second synchronous client of the same cluster, not the default one."""
    with distributed.Client(cluster, set_as_default=False) as other:
        yield other


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The event loop of an asynchronous test."""
    loop = asyncio.new_event_loop()
    yield loop

    async def end_tasks() -> None:
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    loop.run_until_complete(end_tasks())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture
def c(cluster: Any, loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    """An asynchronous client, in the test's event loop."""

    async def opened() -> Any:
        # The cluster itself would make the client live in the cluster's loop.
        return await distributed.Client(cluster.scheduler_address, asynchronous=True)

    async def closed(client: Any) -> None:
        await client.close()

    client = loop.run_until_complete(opened())
    yield client
    loop.run_until_complete(closed(client))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine's test in the loop of its fixtures."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    loop = pyfuncitem._request.getfixturevalue("loop")
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    loop.run_until_complete(asyncio.wait_for(pyfuncitem.obj(**arguments), 60))
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all of it slow, and what is known not to work with Wukong's clusters."""
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        item.add_marker(pytest.mark.slow)
        for ignored in LEFT_BY_DISTRIBUTED:
            item.add_marker(pytest.mark.filterwarnings(ignored))
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("backend", "") if callspec is not None else ""
        if str(backend).startswith("wukong"):
            reason = reason_of(getattr(item, "originalname", item.name), str(backend))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Wait for a condition that no call can wait for."""

    def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.005)

    return wait_until
