"""Wukong runs Dask graphs without a central scheduler.

    Dask collection
       -> scheduler.graph     graph -> Plan: task ids, edges, calls
       -> scheduler.strands   Plan -> strands: pieces that one executor runs without coordination
       -> store               one job: programs, tokens, exports, blobs
       -> executors           run a token's strand, COMMIT, become one successor, invoke others
       -> client              watches the job, gathers the requested keys

After `import wukong`, `x.compute(scheduler="wukong")` runs on processes of this machine; a
`LocalCluster` gives their number, threads instead, and a report of each job. A
`LambdaCluster` has functions of AWS Lambda as executors, a `LeasedCluster` those that agents of
nodes lease.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import dask.base

from wukong import config, errors
from wukong.client import attach, call_async, get, map
from wukong.cluster import LocalCluster
from wukong.report import Report

__version__ = "0.1.0"

__all__ = [
    "Client",
    "ExecutorCluster",
    "LambdaCluster",
    "LeasedCluster",
    "LocalCluster",
    "Report",
    "attach",
    "call_async",
    "errors",
    "get",
    "map",
]

if TYPE_CHECKING:
    from wukong.client_dask import Client
    from wukong.cluster_futures import ExecutorCluster
    from wukong.cluster_lambda import LambdaCluster
    from wukong.cluster_leased import LeasedCluster

# Imported at first use: who runs graphs on this machine shall not wait for them.
_LATER = {
    "Client": "wukong.client_dask",
    "ExecutorCluster": "wukong.cluster_futures",
    "LambdaCluster": "wukong.cluster_lambda",
    "LeasedCluster": "wukong.cluster_leased",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


config.register()
dask.base.named_schedulers["wukong"] = get
