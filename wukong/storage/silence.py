"""Tokens that nobody has been heard of for long: found, and handed out again. Pure."""

from __future__ import annotations

from wukong.executor.messages import Invocation, TokenId
from wukong.storage.rows import TOKENS, JobRow, Rows, TokenRow

REINVOKE_MAX = 64
"""Tokens that one operation hands out again; the rest wait for the next (rule 4, a global cap)."""
BACKOFF_S = 2.0
"""First wait before a queued token is invoked again; doubles each time."""
BACKOFF_MAX_S = 60.0


def sweep_tokens(rows: Rows, job: JobRow, limit: int, now: float) -> tuple[Invocation, ...]:
    """Find silent tokens, and set when to look again.

    Running tokens count as silent by their heartbeat, queued ones only after a back-off that
    doubles: most of them are in a platform's queue and not lost (rule 4).
    """
    job.sweep_at = now + job.silence_s / 2
    found: list[tuple[float, str, TokenRow]] = []
    for key, row in rows.scan(TOKENS):
        silence = now - row.stamped_at
        wait = job.silence_s if row.running else _backoff_s(row.n_invokes)
        if silence >= wait:
            found.append((row.stamped_at, key, row))
    found.sort(key=lambda item: item[:2])
    for _, key, row in found[:limit]:
        if row.running:
            # Queued again, for executors that take tokens from the queue (seed 18).
            count_death(job, row)
        else:
            row.n_invokes += 1
            row.stamped_at = now
        rows.put(TOKENS, key, row)
    return tuple(Invocation(rows.job, TokenId(key), row.priority) for _, key, row in found[:limit])


def count_death(job: JobRow, row: TokenRow) -> None:
    """Take a token from a holder that has been silent for long."""
    row.running = False
    row.n_deaths += 1
    row.cause = row.cause or f"no heartbeat for {job.silence_s:g} s"
    job.n_deaths += 1


def _backoff_s(n_invokes: int) -> float:
    # The exponent is bounded too: a token may stay queued for days, and a float ends at 2**1024.
    return min(BACKOFF_S * 2.0 ** min(n_invokes, 16), BACKOFF_MAX_S)
