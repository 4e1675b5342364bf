"""Executors leased on nodes, and reached over shared memory, RDMA or TCP (rFaaS, IPDPS '23).

    agent (one for each node) --- grants leases, forks executors
    client  --- lease ---> agent          `lease`: a concurrent.futures.Executor
            === frames ==> executor       arrays are not copied on their way

Start with `wukong.rdma.client`, `wukong.rdma.agent`, `wukong.rdma.transport`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# The first import of a module names it in its package, and `lease` shall be the function below.
import wukong.rdma.lease  # noqa: F401 - for its effect

if TYPE_CHECKING:
    from wukong.rdma.agent_main import AgentProcess
    from wukong.rdma.batch import BatchAgents, SlurmAgents
    from wukong.rdma.client import Lease, lease
else:

    def lease(*args: Any, **kwargs: Any) -> Any:
        """Lease executors: see `wukong.rdma.client.lease`."""
        from wukong.rdma import client

        return client.lease(*args, **kwargs)


__all__ = ["AgentProcess", "BatchAgents", "Lease", "SlurmAgents", "lease"]


def __getattr__(name: str) -> Any:
    """Import what users call when they ask for it: an agent's executors need none of it."""
    if name == "Lease":
        from wukong.rdma.client import Lease

        return Lease
    if name in ("BatchAgents", "SlurmAgents"):
        from wukong.rdma import batch

        return getattr(batch, name)
    if name == "AgentProcess":
        from wukong.rdma.agent_main import AgentProcess

        return AgentProcess
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
