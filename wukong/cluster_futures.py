"""Clusters on other people's executors: anything with the interface of `concurrent.futures`.

with ParslPoolExecutor(config) as executor, wukong.ExecutorCluster(executor) as cluster:
    x.sum().compute(scheduler=cluster.get)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from urllib.parse import urlsplit, urlunsplit

from wukong import config
from wukong.cluster_base import Cluster, executor_policy
from wukong.executor.futures import FuturesPool, width_of
from wukong.executor.messages import JobId
from wukong.storage import open_store, resolve_blobs
from wukong.storage.local_files import default_directory, remove_directory, remove_stale


class ExecutorCluster(Cluster):
    """Runs graphs on any `concurrent.futures.Executor`: Parsl, Dask, MPI, loky, Globus Compute.

    Executors are short functions that are submitted to it; between them and the client is the
    store alone. Close it, or use it as a context manager; the executor stays the user's to close.

    Args:
        executor: an executor; or a function that makes one, which is called again when the one
            before is broken (as a pool of processes is when one of them dies).
        store: where the jobs are: a URL as `open_store` takes it. None: in shared memory, for
            executors whose workers are on this machine; the cluster removes it. `memory://`: for
            threads of this process, which then share objects.
        blobs: where large values go; see `open_store`.
        n_workers: functions that run at once, at most. None: as the executor says.
        timeout_s: each job ends in `JobTimeout` after this long.
    Raises:
        ValueError: the executor does not say how many workers it has.
    """

    def __init__(
        self,
        executor: Executor | Callable[[], Executor],
        *,
        store: str | None = None,
        blobs: str | None = None,
        n_workers: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if n_workers is not None and n_workers < 1:
            raise ValueError(f"n_workers is {n_workers}; give 1 or more, or None")
        self._own_directory = None
        make = None if isinstance(executor, Executor) else executor
        made = executor if isinstance(executor, Executor) else executor()
        width = n_workers or width_of(made)
        if isinstance(made, ProcessPoolExecutor):
            # It may fork, all its processes at once, at the first call; no process may be forked
            # from one that has a local store open.
            made.submit(os.getpid)
        url = store
        if url is None:
            remove_stale()
            self._own_directory = default_directory()
            url = f"local://{self._own_directory}"
        options: dict[str, float | int | str | None] = {
            "silence_s": float(config.get("job.silence-s")),
            "limit_bytes": config.get("local.memory-limit"),
        }
        if blobs is not None:
            options["blobs"] = resolve_blobs(blobs)
        self.store_url = url
        opened = open_store(url, **options)  # type: ignore[arg-type]  # by their names
        policy = executor_policy(opened.blobs is not None, opened.may_roll_back, opened.is_remote)
        linger_s = float(config.get("executor.linger-s"))
        pool = FuturesPool(made, make, opened, url, options, width, policy, linger_s)
        super().__init__(opened, pool, n_workers=width, timeout_s=timeout_s)

    _pool: FuturesPool

    def _look_at(self, job: JobId) -> None:
        self._pool.look_after(job)

    def _secede(self) -> None:
        self._pool.secede()

    def _remove(self) -> None:
        if self._own_directory is not None:
            remove_directory(self._own_directory)

    def __repr__(self) -> str:
        parts = urlsplit(self.store_url)
        place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        return self._describe(f"{self.n_workers} workers, {place}")
