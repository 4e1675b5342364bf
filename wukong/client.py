"""The front door: `get` on a cluster of its own, for people who just want a scheduler."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from wukong.cluster import LocalCluster
from wukong.futures import CallExecutor, CallFuture

T = TypeVar("T")

_lock = threading.Lock()
_default: LocalCluster | None = None
_calls: CallExecutor | None = None
"""Of the default cluster; made at the first call."""
_owner_pid = 0


def default_cluster() -> LocalCluster:
    """The cluster behind `wukong.get`: one process for each core, started at first use."""
    global _default, _calls, _owner_pid
    with _lock:
        if _default is None or _owner_pid != os.getpid():
            _default, _calls = LocalCluster(), None
            _owner_pid = os.getpid()
            atexit.register(close_default_cluster)
        return _default


def close_default_cluster() -> None:
    """End the default cluster; the next use starts another one."""
    global _default, _calls
    with _lock:
        cluster, _default, _calls = _default, None, None
    if cluster is not None and _owner_pid == os.getpid():
        cluster.close()


def get(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Run a Dask graph on the default cluster: `x.compute(scheduler="wukong")`.

    Arguments, results and errors are those of `LocalCluster.get`.
    """
    return default_cluster().get(dsk, keys, **kwargs)


def call_async(func: Callable[..., T], *args: Any, **kwargs: Any) -> CallFuture[T]:
    """Have `func(*args, **kwargs)` called on the default cluster, as PyWren does.

    Returns: a future of the standard library's kind.
    """
    return _default_calls().submit(func, *args, **kwargs)


def map(func: Callable[[Any], T], iterdata: Iterable[Any]) -> list[CallFuture[T]]:
    """Have `func` called with each item on the default cluster, as PyWren does.

    Returns: a future for each item, in order; for the results themselves see
    `cluster.executor().map`.
    """
    return _default_calls().submit_each(func, iterdata)


def _default_calls() -> CallExecutor:
    global _calls
    cluster = default_cluster()
    with _lock:
        if _calls is None:
            _calls = cluster.executor()
        return _calls


def attach(
    job: str,
    place: str | os.PathLike[str],
    timeout_s: float | None = None,
    *,
    blobs: str | None = None,
) -> Any:
    """Gather a job that a client which is gone has left in a store.

    Args:
        job: its id.
        place: the `directory` or the `store` (`redis://...`) of the cluster that launched it.
        blobs: where that cluster kept large values, if elsewhere.
    Returns: what that client would have got. What is finished is not run again.
    Raises:
        JobNotFound: there is no such job.
    """
    where = os.fspath(place)
    is_url = "://" in where
    store, directory = (where, None) if is_url else (None, where)
    with LocalCluster(store=store, directory=directory, blobs=blobs) as cluster:
        return cluster.attach(job, timeout_s)
