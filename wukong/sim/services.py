"""What simulated services take and allow. Looked up or measured in 2025; change it here only.

Sources:
- Lambda: docs.aws.amazon.com/lambda/latest/dg, pages "Lambda quotas" (15 minutes, 1,000 concurrent
  executions by default), "Lambda scaling behavior" (1,000 new environments every 10 s a function),
  "Error handling for asynchronous invocations" (two retries, after one and two minutes).
- Start of a Lambda: Carver et al., SoCC '20, section 2: an invocation takes some 50 ms; cold starts
  of a Python function with numpy are ten times that.
- ElastiCache: a round trip inside an availability zone is below 1 ms ("Performance at scale with
  Amazon ElastiCache", AWS white paper).
- S3: docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html: 100-200 ms for
  small objects and 85-90 MB/s for one connection.
- Local: two processes on Linux, one LMDB transaction, shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Platform:
    """Where executors and stores are."""

    name: str
    store_s: float
    """One round trip to the job store."""
    blob_s: float
    """First byte of one multi-operation on the blob store."""
    blob_bytes_per_s: float
    """Of one executor."""
    invoke_s: float
    """One call of the invoker."""
    warm_start_s: float
    cold_start_s: float
    """Also: until a dead local executor is replaced."""
    takes_queued: bool
    """Executors take queued tokens by themselves, and an invocation only wakes one."""
    notice_death_s: float | None
    """Until the platform releases what a dead executor held; None: it never does."""
    retry_after_s: tuple[float, ...] = ()
    """The platform repeats an invocation whose executor died, after these times, then drops it."""
    time_limit_s: float | None = None
    """An executor is killed this long after its start."""
    burst: float = float("inf")
    """New executors at once."""
    rate_per_s: float = float("inf")
    """New executors after the burst."""
    tier_bytes: int = 0
    """Blobs below this size are kept beside the jobs, one round trip away (a tiered store)."""
    service_s: float = 0.0
    """What an operation occupies the job store for; operations on one job follow each other."""
    service_row_s: float = 0.0
    """The same for each row that it writes."""
    invokes_per_s: float = float("inf")
    """Invocations that one caller can send."""
    relay: int = 0
    """A caller with more invocations than this has the first ones send the others on; 0: never."""


LOCAL_POOL = Platform(
    name="local",
    store_s=100e-6,
    blob_s=100e-6,
    blob_bytes_per_s=2e9,
    invoke_s=50e-6,
    warm_start_s=100e-6,
    cold_start_s=0.02,
    takes_queued=True,
    notice_death_s=0.002,
)
AWS_LAMBDA = Platform(
    name="lambda",
    store_s=0.8e-3,
    blob_s=0.15,
    blob_bytes_per_s=85e6,
    invoke_s=0.02,
    warm_start_s=0.03,
    cold_start_s=0.5,
    takes_queued=False,
    notice_death_s=None,
    retry_after_s=(60.0, 120.0),
    time_limit_s=900.0,
    burst=1000.0,
    rate_per_s=100.0,
)
PLATFORMS = {platform.name: platform for platform in (LOCAL_POOL, AWS_LAMBDA)}
