"""A cluster whose executors are leased on nodes that have some to spare.

with wukong.LeasedCluster(4) as cluster:  # after `wukong agent` on the nodes
    x.sum().compute(scheduler=cluster.get)
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wukong import config
from wukong.cluster_base import Cluster, executor_policy
from wukong.cluster_lambda import check_function, describe_function, function_pool
from wukong.errors import LeaseError
from wukong.executor.aws_lambda_invoker import LambdaInvoker
from wukong.executor.futures import FuturesPool
from wukong.executor.invoker import Pool
from wukong.executor.pool import ProcessPool
from wukong.executor.work import Policy
from wukong.rdma.client import Lease, lease
from wukong.rdma.pool import LeasedPool, OrElse
from wukong.storage import Store, open_store, resolve_store
from wukong.storage.local_files import POOLS, default_directory, remove_directory, remove_stale

logger = logging.getLogger(__name__)

LINGER_S = 0.5
"""A leased executor of another node that finds nothing queued waits so long for more."""
LAMBDA = "lambda:"


class LeasedCluster(Cluster):
    """Executors that are leased from agents (`wukong agent`), for as long as the cluster is open.

    On one node the store lies in its shared memory; for executors on several nodes give one that
    all of them reach. Usable by several threads at once.

    Args:
        n_workers: executors to lease; None: as many as this process has cores.
        memory_bytes: that each may use; 0: not limited.
        ttl_s: they are gone so long after this process stops renewing.
        agents: directory in which agents register; None: the usual one.
        store: URL of the store for several nodes (`redis://...`); None: this node's memory.
        fallback: what goes on with the jobs, on the same store, when the lease is refused,
            exhausted or lost: "local" starts processes of this machine, "lambda:NAME" invokes a
            function (see `LambdaCluster`; it needs a store that both reach, and is found as the
            SDK is configured). None: then jobs end in an error.
        timeout_s: each job ends in `JobTimeout` after this long.
        lease_options: further arguments of `wukong.rdma.lease`.
    Raises:
        LeaseRefused: there are not so many executors, and no fallback.
        StoreUnavailable: the store cannot be used.
    """

    _pool: OrElse

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        memory_bytes: int = 0,
        ttl_s: float = 30.0,
        agents: str | os.PathLike[str] | None = None,
        store: str | None = None,
        fallback: str | None = "local",
        timeout_s: float | None = None,
        **lease_options: Any,
    ) -> None:
        function = (fallback or "").partition(LAMBDA)[2]
        if fallback not in ("local", None) and fallback != LAMBDA + function:
            raise ValueError(f"fallback is {fallback!r}; give 'local', 'lambda:NAME' or None")
        if function and store is None:
            raise ValueError("functions run elsewhere: give the store that they and leases reach")
        n_workers = n_workers or len(os.sched_getaffinity(0))
        self._fallback = fallback
        self._own_directory: Path | None = None
        options: dict[str, Any] = {"silence_s": float(config.get("job.silence-s"))}
        folder: Path | None = None
        if store is None:
            remove_stale()
            self._own_directory = default_directory()
            url = f"local://{self._own_directory}"
            folder = self._own_directory / POOLS
        else:
            url = resolve_store(store)
        opened = open_store(url, **options)
        policy = executor_policy(opened.blobs is not None, opened.may_roll_back)
        options["secret"] = opened.secret
        make: Callable[[], Pool] = functools.partial(
            _local_pool, url, n_workers, policy, opened, options, folder
        )
        if function:
            make = functools.partial(_function_pool, function, n_workers, opened, options)
        pool = OrElse(make if fallback else None)
        try:
            leased = lease(n_workers, memory_bytes, ttl_s, directory=agents, **lease_options)
        except LeaseError as error:
            if fallback is None:
                self._close_store(opened)
                raise
            logger.warning("no lease, so %s executors run the graphs: %s", fallback, error)
            pool.start_other()
        else:
            pool.first = _leased_pool(leased, opened, url, options, policy, folder, pool)
        super().__init__(opened, pool, n_workers=n_workers, timeout_s=timeout_s)

    @property
    def has_fallen_back(self) -> bool:
        """Whether other executors run what the leased executors were to run."""
        return self._pool.has_fallen_back

    def _close_store(self, opened: Store) -> None:
        opened.jobs.close()
        if opened.blobs is not None:
            opened.blobs.close()
        self._remove()

    def _remove(self) -> None:
        if self._own_directory is not None:
            remove_directory(self._own_directory)

    def __repr__(self) -> str:
        fallen = f", fallen back to {self._fallback}" if self.has_fallen_back else ""
        return self._describe(f"{self.n_workers} leased executors{fallen}")


def _local_pool(
    url: str,
    n_workers: int,
    policy: Policy,
    store: Store,
    options: dict[str, Any],
    folder: Path | None,
) -> Pool:
    return ProcessPool(
        url,
        n_workers,
        policy,
        store=store,
        store_options=options,
        preload=tuple(config.get("local.preload")),
        folder=folder,
    )


def _function_pool(
    function: str, n_workers: int, store: Store, options: dict[str, Any]
) -> LambdaInvoker:
    check_function(describe_function(function), function)
    return function_pool(function, n_workers, float(options["silence_s"]), store.may_roll_back)


def _leased_pool(
    leased: Lease,
    store: Store,
    url: str,
    options: dict[str, Any],
    policy: Policy,
    folder: Path | None,
    pool: OrElse,
) -> Pool:
    if folder is not None:
        return LeasedPool(leased, store, url, options, policy, folder, pool.fall_back)
    # Executors of several nodes: each runs what is queued in the store, which they all reach.
    return FuturesPool(leased, None, store, url, options, leased.n_executors, policy, LINGER_S)
