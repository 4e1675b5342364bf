"""The sides of a comparison: schedulers that are opened once, warmed, and asked in turn.

Every side has the same number of processes or threads and the same number of BLAS threads. None is
handicapped: pools and clients stay open, and what a side still has to tidy up after a run is waited
for outside the clock.
"""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import dask
import dask.local
import dask.multiprocessing
import dask.threaded

import wukong
from bench import redis_server
from bench.peers import LITHOPS, PEERS, RAY, CallPool, open_pool, open_ray

Get: TypeAlias = Callable[..., object]

PROCESSES = "wukong processes"
THREADS = "wukong threads"
REDIS = "wukong on Redis"
DASK_GET = "dask.get"
DASK_THREADED = "dask.threaded"
DASK_MULTIPROCESSING = "dask.multiprocessing"
DISTRIBUTED = "distributed"
POOL = "ProcessPoolExecutor"

LOCAL = (PROCESSES, THREADS, DASK_GET, DASK_THREADED, DASK_MULTIPROCESSING, DISTRIBUTED, POOL)
ALL = (*LOCAL, REDIS) if redis_server.is_there() else LOCAL
COMPARED = (PROCESSES, THREADS, DASK_THREADED, DISTRIBUTED, *PEERS, POOL)
LITHOPS_TASKS_MAX = 200
"""Lithops looks for results once in a while: a map of ten calls takes seconds."""


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Side:
    """One scheduler, open and ready."""

    name: str
    """One of the names above."""
    get: Get | None
    """Runs a Dask graph; None: the side runs no graphs, only calls."""
    settle: Callable[[], None] = _nothing
    """Waits until nothing of the last run is left; called outside the clock."""
    cluster: "wukong.LocalCluster | None" = None
    """The cluster behind the side, for its reports."""
    pool: CallPool | None = None
    """What runs calls, where the side runs no graphs."""
    n_tasks_max: int | None = None
    """Larger cases are not asked of this side."""


@contextmanager
def open_sides(
    names: Iterable[str], n_workers: int, tell_absent: Callable[[str], None] | None = None
) -> Iterator[list[Side]]:
    """Open the named sides; all are closed at the end.

    Args:
        tell_absent: is told of each side that is not installed, which is left out then; None: that
            is an error.
    """
    with ExitStack() as stack:
        opened = []
        for name in names:
            try:
                opened.append(_open(name, n_workers, stack))
            except ImportError as error:
                if tell_absent is None:
                    raise
                tell_absent(f"{name}: {error}")
        yield opened


def _open(name: str, n_workers: int, stack: ExitStack) -> Side:
    if name in (PROCESSES, THREADS):
        cluster = stack.enter_context(
            wukong.LocalCluster(n_workers=n_workers, processes=name == PROCESSES)
        )
        return Side(name, cluster.get, cluster=cluster)
    if name == REDIS:
        url = stack.enter_context(redis_server.redis_server())
        cluster = stack.enter_context(wukong.LocalCluster(n_workers=n_workers, store=url))
        return Side(name, cluster.get, cluster=cluster)
    if name == DASK_GET:
        return Side(name, dask.local.get_sync)
    if name == DASK_THREADED:
        return Side(name, partial(dask.threaded.get, num_workers=n_workers))
    if name == DASK_MULTIPROCESSING:
        pool = stack.enter_context(_process_pool(n_workers))
        return Side(name, partial(dask.multiprocessing.get, pool=pool))
    if name == DISTRIBUTED:
        return _open_distributed(n_workers, stack)
    if name == POOL:
        return Side(name, None, pool=stack.enter_context(_process_pool(n_workers)))
    if name == RAY:
        return Side(name, open_ray(n_workers, stack))
    if name in PEERS:
        n_tasks_max = LITHOPS_TASKS_MAX if name == LITHOPS else None
        return Side(name, None, pool=open_pool(name, n_workers, stack), n_tasks_max=n_tasks_max)
    raise ValueError(f"{name!r} is none of {', '.join((*ALL, *PEERS))}")


def _process_pool(n_workers: int) -> ProcessPoolExecutor:
    """A pool whose processes are spawned, as dask.multiprocessing's own would be."""
    return ProcessPoolExecutor(n_workers, mp_context=multiprocessing.get_context("spawn"))


def _open_distributed(n_workers: int, stack: ExitStack) -> Side:
    from distributed import Client, LocalCluster

    blas = {name: os.environ[name] for name in os.environ if name.endswith("_NUM_THREADS")}
    stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": blas}))
    cluster = stack.enter_context(
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=logging.ERROR,
        )
    )
    client = stack.enter_context(Client(cluster))
    # A client makes itself Dask's default scheduler; here every side is called by name.
    stack.enter_context(dask.config.set(scheduler=None))

    def settle() -> None:
        deadline = time.monotonic() + 60
        while cluster.scheduler.tasks:  # otherwise the next run would find results of this one
            assert time.monotonic() < deadline, "distributed does not forget its tasks"
            time.sleep(0.005)

    return Side(DISTRIBUTED, client.get, settle)
