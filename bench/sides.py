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

Get: TypeAlias = Callable[..., object]

PROCESSES = "wukong processes"
THREADS = "wukong threads"
DASK_GET = "dask.get"
DASK_THREADED = "dask.threaded"
DASK_MULTIPROCESSING = "dask.multiprocessing"
DISTRIBUTED = "distributed"
POOL = "ProcessPoolExecutor"

ALL = (PROCESSES, THREADS, DASK_GET, DASK_THREADED, DASK_MULTIPROCESSING, DISTRIBUTED, POOL)


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
    pool: ProcessPoolExecutor | None = None
    """The pool behind the side."""


@contextmanager
def open_sides(names: Iterable[str], n_workers: int) -> Iterator[list[Side]]:
    """Open the named sides; all are closed at the end."""
    with ExitStack() as stack:
        yield [_open(name, n_workers, stack) for name in names]


def _open(name: str, n_workers: int, stack: ExitStack) -> Side:
    if name in (PROCESSES, THREADS):
        cluster = stack.enter_context(
            wukong.LocalCluster(n_workers=n_workers, processes=name == PROCESSES)
        )
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
    raise ValueError(f"{name!r} is none of {', '.join(ALL)}")


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
