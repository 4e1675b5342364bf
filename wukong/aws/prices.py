"""What AWS charges, and what a job costs by that. Looked up in November 2025; US East, on demand.

One table for reports and for the simulator; change it here only. Taxes, free tiers and savings
plans are left out, and so is what runs whether or not there are jobs: a Redis node, stored bytes.

Sources:
- aws.amazon.com/lambda/pricing: requests, and duration (the first 6 or 7.5 billion GB-seconds
  a month), rounded up to a millisecond for each invocation.
- aws.amazon.com/s3/pricing, S3 Standard: PUT, COPY, POST, LIST; GET and others; deletes are free.
- aws.amazon.com/elasticache/pricing, Serverless for Valkey: one ECPU for each kilobyte that a
  request moves, at least one for each request.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

LOOKED_UP = "2025-11"


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars."""

    lambda_request: float = 0.20e-6
    lambda_gb_second_x86: float = 16.6667e-6
    lambda_gb_second_arm: float = 13.3334e-6
    redis_ecpu: float = 0.0023e-6
    s3_put: float = 5.0e-6
    s3_get: float = 0.4e-6


PRICES = Prices()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job has used."""

    requests: int = 0
    """Invocations of the function."""
    gb_seconds: float = 0.0
    redis_operations: int = 0
    redis_bytes: int = 0
    s3_puts: int = 0
    s3_gets: int = 0


@dataclass(frozen=True, slots=True)
class JobCost:
    """What a job has used, and what each of it costs in US dollars."""

    usage: Usage
    requests_usd: float
    gb_seconds_usd: float
    redis_usd: float
    s3_usd: float

    @property
    def total_usd(self) -> float:
        """All of it."""
        return self.requests_usd + self.gb_seconds_usd + self.redis_usd + self.s3_usd

    def to_dict(self) -> dict[str, float]:
        """All numbers under their names, ready for JSON."""
        used = {field.name: getattr(self.usage, field.name) for field in fields(self.usage)}
        names = ("requests_usd", "gb_seconds_usd", "redis_usd", "s3_usd", "total_usd")
        return {**used, **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        used = self.usage
        return (
            f"{self.total_usd:.6f} USD ({LOOKED_UP}): {used.requests:,} requests "
            f"{self.requests_usd:.6f}, {used.gb_seconds:.3f} GB-s {self.gb_seconds_usd:.6f}, "
            f"{used.redis_operations:,} Redis operations {self.redis_usd:.6f}, "
            f"{used.s3_puts + used.s3_gets:,} S3 requests {self.s3_usd:.6f}"
        )


def price(usage: Usage, is_arm: bool, prices: Prices = PRICES) -> JobCost:
    """What a usage costs."""
    per_gb_second = prices.lambda_gb_second_arm if is_arm else prices.lambda_gb_second_x86
    n_ecpus = usage.redis_operations + usage.redis_bytes / 1024
    return JobCost(
        usage,
        requests_usd=usage.requests * prices.lambda_request,
        gb_seconds_usd=usage.gb_seconds * per_gb_second,
        redis_usd=n_ecpus * prices.redis_ecpu,
        s3_usd=usage.s3_puts * prices.s3_put + usage.s3_gets * prices.s3_get,
    )
