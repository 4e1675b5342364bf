"""`wukong.Client`: distributed's client, on Wukong's default cluster unless told otherwise.

What is computed at once (`x.compute()`, `client.get`) goes to the cluster directly, without the
server: no event loop, no second pickling. Everything else is distributed's own.
"""

from __future__ import annotations

from typing import Any

import dask.config
import distributed

from wukong.client import default_cluster
from wukong.cluster_base import Cluster
from wukong.errors import GraphError

__all__ = ["Client"]

_SCHEDULING = ("workers", "allow_other_workers", "resources", "retries", "priority", "actors")
"""Arguments of `get` that the server knows, and a cluster's own `get` does not."""


class Client(distributed.Client):
    """A `distributed.Client` whose cluster is Wukong's.

    Args:
        address: a cluster, or the address of a server or scheduler; by default, and where
            `scheduler-address` is not configured, the cluster behind `wukong.get`.
        kwargs: `distributed.Client`'s.
    """

    def __init__(self, address: Any = None, **kwargs: Any) -> None:
        is_told = address is not None or kwargs.get("scheduler_file") is not None
        if not is_told and not dask.config.get("scheduler-address", None):
            address = default_cluster()
        base: Any = super()  # not annotated
        base.__init__(address, **kwargs)

    def get(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # the same
        """Compute keys of a graph, as `distributed.Client.get` does; directly where that can be."""
        is_plain = kwargs.get("sync", True) and not self.asynchronous
        is_plain = is_plain and not kwargs.get("asynchronous")
        is_plain = is_plain and not any(kwargs.get(name) for name in _SCHEDULING)
        if is_plain and isinstance(self.cluster, Cluster):
            try:
                found = self.cluster.get(dsk, keys)
            except GraphError:
                pass  # it reads futures, which the server knows; or its error is told from there
            else:
                return _shaped(found, keys)
        base: Any = super()  # not annotated
        return base.get(dsk, keys, **kwargs)


def _shaped(found: Any, keys: Any) -> Any:
    """Results in the shape that clients give them: lists of keys give lists."""
    if not isinstance(keys, list):
        return found
    return [_shaped(one, key) for one, key in zip(found, keys, strict=True)]
