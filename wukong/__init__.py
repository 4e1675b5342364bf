"""Wukong runs Dask graphs without a central scheduler.

    Dask collection
       -> scheduler.graph     graph -> Plan: task ids, edges, calls
       -> scheduler.strands   Plan -> strands: pieces that one executor runs without coordination
       -> store               one job: programs, tokens, exports, blobs
       -> executors           run a token's strand, COMMIT, become one successor, invoke others
       -> client              watches the job, gathers the requested keys

After `import wukong`, `x.compute(scheduler="wukong")` runs on processes of this machine; a
`LocalCluster` gives their number, threads instead, and a report of each job.
"""

from __future__ import annotations

import dask.base

from wukong import config, errors
from wukong.client import attach, get
from wukong.cluster import LocalCluster
from wukong.report import Report

__version__ = "0.1.0"

__all__ = ["LocalCluster", "Report", "attach", "errors", "get"]

config.register()
dask.base.named_schedulers["wukong"] = get
