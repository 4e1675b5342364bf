"""A cluster whose executors are AWS Lambda functions, or those of the local service.

with wukong.LambdaCluster("my-function", store="rediss://...", blobs="s3://bucket/jobs") as cluster:
    x.sum().compute(scheduler=cluster.get)
    print(cluster.report().cost)
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from wukong import config
from wukong.aws.prices import Usage, price
from wukong.cluster_base import Cluster, executor_policy
from wukong.errors import InvokeError, VersionMismatch
from wukong.executor.aws_lambda import versions
from wukong.executor.aws_lambda_invoker import LambdaInvoker, connect
from wukong.job_driver import JobRun, OnTasks
from wukong.report import Report
from wukong.storage import open_store
from wukong.submit import Submission

N_WORKERS = 100
"""Executors that graphs are cut for: a tenth of what an account may run at a time by default."""
LEAST_STRAND_S = 0.05
"""What a strand is worth at least: an invocation costs some 20 ms, its start 30 ms (SoCC '20)."""
HAND_OVER_S = 0.25
"""From a split to another executor's first task: a commit, an invocation, a start, and a fetch."""


class LambdaCluster(Cluster):
    """Executors that are invocations of one function, deployed by `wukong aws deploy`.

    Usable by several threads at once. Nothing runs between jobs, so closing it ends nothing but
    the connections. A job goes on when its client is gone, and `attach` gathers it.

    Args:
        function: name or ARN.
        store: where jobs are, as a URL; the function's own WUKONG_STORE is the same store.
        blobs: where large values are, as `s3://bucket/prefix`; as the function's WUKONG_BLOBS.
        n_workers: executors at a time, at most.
        endpoint_url: of another service that speaks Lambda's API (`wukong lambda-local`).
        region: None: as the SDK finds it.
        timeout_s: each job ends in `JobTimeout` after this long.
    Raises:
        InvokeError: the function cannot be invoked, or cannot reach its store; the message says
            why.
        VersionMismatch: client and function are not alike; the message says how to mend it.
        StoreUnavailable: the store does not answer here.
    Cost: one invocation, so that a cold start is behind you.
    """

    _pool: LambdaInvoker

    def __init__(
        self,
        function: str = "wukong",
        *,
        store: str,
        blobs: str | None = None,
        n_workers: int = N_WORKERS,
        endpoint_url: str | None = None,
        region: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if n_workers < 1:
            raise ValueError(f"n_workers is {n_workers}; give 1 or more")
        self.function = function
        self.description = describe_function(function, endpoint_url, region)
        check_function(self.description, function)
        silence_s = float(config.get("job.silence-s"))
        opened = open_store(store, blobs=blobs, silence_s=silence_s)
        self._has_s3 = blobs is not None
        pool = function_pool(
            function, n_workers, silence_s, opened.may_roll_back, endpoint_url, region
        )
        super().__init__(opened, pool, n_workers=n_workers, timeout_s=timeout_s)
        self._least_strand_s = LEAST_STRAND_S

    def _run(
        self, submission: Submission, timeout_s: float | None, on_tasks: OnTasks | None
    ) -> JobRun:
        run = super()._run(submission, timeout_s, on_tasks)
        if run.report is not None:
            run.report.cost = price(self._usage(run.report), self._is_arm)
        return run

    @property
    def _is_arm(self) -> bool:
        return self.description["architecture"] in ("aarch64", "arm64")

    def _usage(self, report: Report) -> Usage:
        """What a job has used, from its records.

        Only committed work is in them: cold starts, lost attempts and an invocation's wait for the
        acceptance of what it invoked are not. Where S3 is used, all blobs count as there, though
        the smaller ones may be in Redis.
        """
        spans: dict[str, tuple[float, float]] = {}
        for record in report.records:
            begun_at, ended_at = spans.get(record.holder, (record.begun_at, record.sent_at))
            spans[record.holder] = min(begun_at, record.begun_at), max(ended_at, record.sent_at)
        billed_ms = sum(math.ceil((end - begin) * 1e3) for begin, end in spans.values())
        blob_bytes = report.blob_bytes_written if self._has_s3 else 0
        return Usage(
            requests=len(spans),
            gb_seconds=billed_ms / 1e3 * self.description["memory_mb"] / 1024,
            redis_operations=report.round_trips,
            redis_bytes=report.bytes_written + report.bytes_read - blob_bytes,
            s3_puts=report.blobs_written if self._has_s3 else 0,
            s3_gets=report.blobs_read if self._has_s3 else 0,
        )

    def __repr__(self) -> str:
        return self._describe(f"{self.function}, {self.n_workers} executors")


def function_pool(
    function: str,
    n_workers: int,
    silence_s: float,
    may_roll_back: bool,
    endpoint_url: str | None = None,
    region: str | None = None,
) -> LambdaInvoker:
    """Invocations of a function as executors, at most so many at a time."""
    policy = executor_policy(is_measured=True, confirm=may_roll_back, is_remote=True)
    policy = dataclasses.replace(policy, hand_over_s=HAND_OVER_S)
    fields: dict[str, object] = {
        "n_executors": n_workers,
        "silence_s": silence_s,
        "policy": dataclasses.asdict(policy),
    }
    return LambdaInvoker(
        function,
        n_executors=n_workers,
        fields=fields,
        endpoint_url=endpoint_url,
        region=region,
    )


def check_function(description: dict[str, Any], function: str) -> None:
    """Refuse a function that is not like this client, or cannot reach its store.

    Raises:
        VersionMismatch, InvokeError: which of both.
    """
    check_versions(description["versions"], function)
    if description["store_problem"]:
        raise InvokeError(
            f"the function {function} cannot use its store: {description['store_problem']}"
        )


def describe_function(
    function: str, endpoint_url: str | None = None, region: str | None = None
) -> dict[str, Any]:
    """Ask a function for its versions, limits and way to its store.

    Raises:
        InvokeError: it cannot be invoked, or fails; the message says why.
    """
    with connect(endpoint_url, region) as client:
        reply = client.invoke(function, {"wukong": "describe"})
    if "versions" not in reply:
        raise InvokeError(f"the function {function} is not one of Wukong's: {json.dumps(reply)}")
    return reply


def check_versions(theirs: dict[str, str], function: str) -> None:
    """Refuse a function that could not unpickle what this client sends.

    Raises:
        VersionMismatch: with what differs, and how to mend it.
    """
    ours = versions()
    differing = []
    for name, version in ours.items():
        other = theirs.get(name, "none")
        # numpy's pickles are read by all versions of the same major one.
        cut = 1 if name == "numpy" else None
        if version.split(".")[:cut] != other.split(".")[:cut]:
            differing.append(f"{name} {version} here and {other} there")
    if differing:
        raise VersionMismatch(
            f"the function {function} differs from this client: {'; '.join(differing)}. "
            "Deploy it from this environment (wukong aws deploy), or use a client like it"
        )
