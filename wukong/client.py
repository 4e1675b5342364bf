"""The front door: `get` on a cluster of its own, for people who just want a scheduler."""

from __future__ import annotations

import atexit
import os
import threading
from typing import Any

from wukong.cluster import LocalCluster

_lock = threading.Lock()
_default: LocalCluster | None = None
_owner_pid = 0


def default_cluster() -> LocalCluster:
    """The cluster behind `wukong.get`: one process for each core, started at first use."""
    global _default, _owner_pid
    with _lock:
        if _default is None or _owner_pid != os.getpid():
            _default = LocalCluster()
            _owner_pid = os.getpid()
            atexit.register(close_default_cluster)
        return _default


def close_default_cluster() -> None:
    """End the default cluster; the next use starts another one."""
    global _default
    with _lock:
        cluster, _default = _default, None
    if cluster is not None and _owner_pid == os.getpid():
        cluster.close()


def get(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Run a Dask graph on the default cluster: `x.compute(scheduler="wukong")`.

    Arguments, results and errors are those of `LocalCluster.get`.
    """
    return default_cluster().get(dsk, keys, **kwargs)


def attach(job: str, directory: str | os.PathLike[str], timeout_s: float | None = None) -> Any:
    """Gather a job that a client which is gone has left in a store's directory.

    Args:
        job: its id.
        directory: the `directory` of the `LocalCluster` that launched it.
    Returns: what that client would have got. What is finished is not run again.
    Raises:
        JobNotFound: there is no such job in the directory.
    """
    with LocalCluster(directory=directory) as cluster:
        return cluster.attach(job, timeout_s)
