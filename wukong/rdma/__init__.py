"""Executors leased on nodes, and reached over shared memory, RDMA or TCP (rFaaS, IPDPS '23).

    agent (one for each node) --- grants leases, forks executors
    client  --- lease ---> agent          `lease`: a concurrent.futures.Executor
            === frames ==> executor       arrays are not copied on their way

Start with `wukong.rdma.client`, `wukong.rdma.agent`, `wukong.rdma.transport`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wukong.rdma.agent_main import AgentProcess
    from wukong.rdma.client import Lease, lease

__all__ = ["AgentProcess", "Lease", "lease"]


def __getattr__(name: str) -> Any:
    """Import what users call when they ask for it: an agent's executors need none of it."""
    if name in ("Lease", "lease"):
        from wukong.rdma import client

        return getattr(client, name)
    if name == "AgentProcess":
        from wukong.rdma.agent_main import AgentProcess

        return AgentProcess
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
