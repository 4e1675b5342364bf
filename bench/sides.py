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
from dask.typing import Key

import wukong
from bench import redis_server
from bench.noops import whereabouts
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
START_S = 120.0
"""No side needs longer until all its workers answer."""
PAUSE_S = 0.05
"""Of a call that asks where it runs."""
LITHOPS_TASKS_MAX = 20
"""Lithops starts a process for each call and looks for results once in a while: a map of ten calls
takes seconds, and one of a hundred most of a minute."""


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


@dataclass(frozen=True, slots=True)
class Start:
    """What a side was seen to be once it was open."""

    side: str
    open_s: float
    """From nothing until all its workers had answered."""
    n_workers: int
    """Threads of processes that have answered; a side may start one for each call."""
    blas_threads: tuple[int, ...]
    """Of their BLAS: every number that was seen."""


@contextmanager
def open_sides(
    names: Iterable[str],
    n_workers: int,
    tell_absent: Callable[[str], None] | None = None,
    tell_start: Callable[[Start], None] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Side]]:
    """Open the named sides; all are closed at the end.

    Args:
        tell: is told what happens now, for a progress line.
        tell_start: is told what each side was seen to be; only then are its workers waited for.
        tell_absent: is told of each side that is not installed, which is left out then; None: that
            is an error.
    """
    with ExitStack() as stack:
        opened = []
        for name in names:
            tell(f"opening {name}")
            begun_at = time.perf_counter()
            try:
                side = _open(name, n_workers, stack)
            except ImportError as error:
                if tell_absent is None:
                    raise
                tell_absent(f"{name}: {error}")
                continue
            opened.append(side)
            if tell_start is not None:
                tell_start(_wait_started(side, n_workers, begun_at))
        yield opened


def _wait_started(side: Side, n_workers: int, begun_at: float) -> Start:
    """Ask until as many workers have answered: some sides start them one after the other."""
    seen: list[tuple[int, int, int]] = []
    while len({found[:2] for found in seen}) < n_workers:
        assert time.perf_counter() - begun_at < START_S, f"{side.name} does not start its workers"
        if side.pool is not None:
            seen += side.pool.map(whereabouts, [PAUSE_S] * 2 * n_workers)
            continue
        assert side.get is not None
        keys: list[Key] = [f"where {len(seen)} {number}" for number in range(2 * n_workers)]
        found = side.get(dict.fromkeys(keys, (whereabouts, PAUSE_S)), keys)
        assert isinstance(found, list | tuple)
        seen += found
        side.settle()
    return Start(
        side.name,
        time.perf_counter() - begun_at,
        len({found[:2] for found in seen}),
        tuple(sorted({n_threads for *_, n_threads in seen})),
    )


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
            dashboard_address=":0",
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
