"""What AWS Lambda allows. Looked up in November 2025; change it here only. Pure.

Sources, all under docs.aws.amazon.com/lambda/latest/dg:
- gettingstarted-limits ("Lambda quotas"): payloads of 6 MB synchronous and 1 MB asynchronous, 15
  minutes, memory from 128 MB to 10,240 MB, packages of 50 MB zipped and 250 MB unzipped, 4 KB of
  environment variables.
- lambda-concurrency, scaling-behavior: 1,000 concurrent executions by default; a function gets at
  most 1,000 new environments in 10 seconds.
- invocation-async-error-handling: two retries, one and two minutes after the failures; an event is
  kept for at most six hours.
- lambda-runtime-environment: 10 seconds for the init phase.
- invocation-recursion: a chain of 16 invocations counts as a loop, unless the function allows it.
"""

from __future__ import annotations

SYNC_PAYLOAD_BYTES = 6 * 1024 * 1024
"""Of a request, and of a response."""
ASYNC_PAYLOAD_BYTES = 1024 * 1024
TIMEOUT_MAX_S = 900
MEMORY_MIN_MB = 128
MEMORY_MAX_MB = 10_240
MEMORY_PER_CORE_MB = 1_769
"""With so much memory a function has one whole core."""
ZIPPED_MAX_BYTES = 50 * 1024 * 1024
"""Of a direct upload; a package in S3 may be larger."""
UNZIPPED_MAX_BYTES = 250 * 1024 * 1024
ENVIRONMENT_MAX_BYTES = 4 * 1024
CONCURRENCY = 1_000
BURST = 1_000
RAMP_PER_S = 100.0
"""New environments a second, after the burst."""
RETRY_AFTER_S = (60.0, 120.0)
EVENT_AGE_MAX_S = 6 * 3600.0
INIT_S = 10.0
CHAIN_MAX = 16
"""Invocations in one chain before it counts as a loop."""
