"""Clusters of this machine; `wukong.cluster_base` has what all clusters share.

with wukong.LocalCluster(n_workers=2) as cluster:
    x.sum().compute(scheduler=cluster.get)
    print(cluster.report())
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wukong import config
from wukong.cluster_base import Cluster, executor_policy
from wukong.executor.pool import ProcessPool
from wukong.executor.pool_threads import ThreadPool
from wukong.storage import BLOBS_PRELOAD, open_store, resolve_blobs, resolve_store
from wukong.storage.contract import CallingStore
from wukong.storage.local_files import (
    POOLS,
    default_directory,
    remove_directory,
    remove_stale,
)


class LocalCluster(Cluster):
    """Executors on this machine: processes around a store in shared memory, or threads.

    Usable by several threads at once. Close it, or use it as a context manager: that ends its
    executors and removes what it has in shared memory.

    Args:
        n_workers: executors; as many as cores by default.
        processes: False runs threads of this process, which share objects without copying them.
        directory: where the store lives (processes only). By default a new directory in shared
            memory that goes with the cluster; a given one stays, with its unfinished jobs, and
            `wukong.attach` finds them there.
        store: another place for jobs and values than this machine's memory, which other machines
            can use too: `redis://...` (see `open_store`). Processes or threads. Jobs outlive the
            cluster there, for some time, and `attach` finds them.
        blobs: where large values go instead: `s3://bucket/prefix`, with options as `open_store`
            takes them (not for threads that share objects).
        memory_limit: bytes of stored values before they go to disk.
        timeout_s: each job ends in `JobTimeout` after this long.
        host, proxy_address, num_fargate_nodes: of Wukong's first version (2020); they have no
            effect, and a warning says what replaces them.
    Raises:
        StoreUnavailable: the directory cannot be used.
    Cost: processes are ready within a second; they start while this returns.
    """

    _pool: ProcessPool | ThreadPool

    def __init__(
        self,
        n_workers: int | None = None,
        processes: bool = True,
        *,
        directory: str | os.PathLike[str] | None = None,
        store: str | None = None,
        blobs: str | None = None,
        memory_limit: int | None = None,
        timeout_s: float | None = None,
        host: object = None,
        proxy_address: object = None,
        num_fargate_nodes: object = None,
    ) -> None:
        former = {
            "host": host,
            "proxy_address": proxy_address,
            "num_fargate_nodes": num_fargate_nodes,
        }
        answer_former(former)
        if n_workers is not None and n_workers < 1:
            raise ValueError(f"n_workers is {n_workers}; give 1 or more, or None for one a core")
        n_workers = n_workers or len(os.sched_getaffinity(0))
        self.processes = processes
        self.directory = ""
        self._memory_limit = memory_limit or config.get("local.memory-limit")
        self._blobs = blobs
        self._others: dict[int, LocalCluster] = {}
        """By number of executors; see `get`."""
        self._own_directory: Path | None = None
        self._store_url = store
        options: dict[str, Any] = {"silence_s": float(config.get("job.silence-s"))}
        preload = tuple(config.get("local.preload"))
        if blobs is not None:
            options["blobs"] = resolve_blobs(blobs)
            preload += BLOBS_PRELOAD
        url, folder = self._choose_store(store, directory, options)
        opened = open_store(url, **options)
        policy = executor_policy(opened.blobs is not None, opened.may_roll_back, opened.is_remote)
        if processes:
            options["secret"] = opened.secret
            pool: ProcessPool | ThreadPool = ProcessPool(
                url,
                n_workers,
                policy,
                store=opened,
                store_options=options,
                preload=preload,
                folder=folder,
            )
        else:
            pool = ThreadPool(opened, n_workers, policy)
        if isinstance(opened.jobs, CallingStore):
            opened.jobs.listen(pool.offer)
        super().__init__(opened, pool, n_workers=n_workers, timeout_s=timeout_s)

    def _choose_store(
        self,
        store: str | None,
        directory: str | os.PathLike[str] | None,
        options: dict[str, Any],
    ) -> tuple[str, Path | None]:
        """The store's URL, and the folder in which others find the pool; completes `options`."""
        if store is not None:
            if directory is not None:
                raise ValueError("give a store or a directory, not both")
            return resolve_store(store), None
        if not self.processes:
            return "memory://", None
        remove_stale()
        if directory is None:
            self._own_directory = default_directory()
        self.directory = os.fspath(directory or self._own_directory or "")
        options["limit_bytes"] = self._memory_limit
        return f"local://{os.path.abspath(self.directory)}", Path(self.directory) / POOLS

    def _resized(self, n_workers: int) -> LocalCluster:
        """A cluster like this one with so many executors; closed with this one."""
        with self._changed:
            self._check_open()
            cluster = self._others.get(n_workers)
            if cluster is None:
                cluster = self._others[n_workers] = LocalCluster(
                    n_workers,
                    self.processes,
                    store=self._store_url,
                    blobs=self._blobs,
                    memory_limit=self._memory_limit,
                    timeout_s=self._timeout_s,
                )
            return cluster

    def _secede(self) -> None:
        """If this is called from a task, let another thread take its place: a task that waits for
        a graph of its own must not hold the executor that the graph needs."""
        if isinstance(self._pool, ThreadPool):
            holder = self._pool.holders.get(threading.get_native_id())
            if holder is not None:
                self._pool.abandon(holder)

    def _close_others(self) -> None:
        for cluster in list(self._others.values()):
            cluster.close()

    def _remove(self) -> None:
        if self._own_directory is not None:
            remove_directory(self._own_directory)

    def __repr__(self) -> str:
        kind = "processes" if self.processes else "threads"
        where = f" on {urlsplit(self._store_url).scheme}" if self._store_url else ""
        return self._describe(f"{self.n_workers} {kind}{where}")


FORMER = {
    "host": "a cluster listens nowhere by itself: distributed.Client(cluster) connects to it, and "
    "cluster.serve(address) chooses where",
    "proxy_address": "there is no proxy any more: executors invoke each other, and a large fan-out "
    "is split among them; for functions of AWS Lambda give "
    "wukong.LambdaCluster(function, store=..., blobs=...)",
    "num_fargate_nodes": "values are not kept on Fargate nodes any more: give "
    'wukong.LambdaCluster a store="rediss://..." and blobs="s3://..."',
}
"""Arguments of the first version, and what replaces each."""


def answer_former(arguments: dict[str, object]) -> None:
    """Warn of arguments that had a meaning once, and say what replaces them."""
    for name, value in arguments.items():
        if value is not None:
            warnings.warn(f"{name}={value!r} has no effect: {FORMER[name]}", FutureWarning, 3)


def preloaded() -> tuple[str, ...]:
    """What executors import before they are forked."""
    # A client of Dask's is likely to be made, and its tasks then look for their worker.
    dasks = ("wukong.scheduler.dask_server_tasks",) if "distributed" in sys.modules else ()
    return (*config.get("local.preload"), *dasks)
