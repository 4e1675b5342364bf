"""Looking after jobs: sweeping, releasing, relaunching, watching, ending. Pure.

The operations that clients, pools and sweepers need beside those of executors, which are in
`wukong.storage.state`; each is atomic in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable

from wukong.executor.messages import (
    AttemptId,
    ExportId,
    HolderId,
    Invocation,
    JobView,
    Located,
    Relaunch,
    RunningToken,
    Status,
    TokenId,
)
from wukong.storage.rows import (
    EXPORTS,
    JOB,
    MANIFEST,
    PROGRAMS,
    THE_JOB,
    TOKENS,
    TRACES,
    WAITING,
    JobRow,
    Rows,
    WaitingRow,
)
from wukong.storage.silence import REINVOKE_MAX, sweep_tokens
from wukong.storage.state import clear_work, end_job, mint_entries
from wukong.storage.values import discard, is_complete


def release(rows: Rows, holder: HolderId, cause: str, now: float) -> tuple[Invocation, ...]:
    """Queue again what a dead holder ran."""
    job = rows.get(JOB, THE_JOB)
    if job is None or job.status is not Status.RUNNING:
        return ()
    released = []
    for key, row in rows.scan(TOKENS):
        if row.running and row.holder == holder:
            row.running = False
            row.n_deaths += 1
            row.cause = cause
            row.stamped_at = now
            row.n_invokes += 1
            job.n_deaths += 1
            rows.put(TOKENS, key, row)
            released.append(Invocation(rows.job, TokenId(key), row.priority))
    if released:
        rows.put(JOB, THE_JOB, job)
    return tuple(released)


def expired(rows: Rows, now: float) -> tuple[Invocation, ...]:
    """Tokens to invoke again: at most `REINVOKE_MAX`, the longest silent first."""
    job = rows.get(JOB, THE_JOB)
    if job is None or job.status is not Status.RUNNING:
        return ()
    found = sweep_tokens(rows, job, REINVOKE_MAX, now)
    rows.put(JOB, THE_JOB, job)
    return found


def queued(rows: Rows) -> tuple[Invocation, ...]:
    """The tokens that nobody runs, those that wait longest first."""
    job = rows.get(JOB, THE_JOB)
    if job is None or job.status is not Status.RUNNING:
        return ()
    found = [(row.stamped_at, key, row) for key, row in rows.scan(TOKENS) if not row.running]
    return tuple(
        Invocation(rows.job, TokenId(key), row.priority)
        for _, key, row in sorted(found, key=lambda waiting: waiting[:2])
    )


def running(rows: Rows) -> tuple[RunningToken, ...]:
    """The tokens that are run."""
    return tuple(
        RunningToken(
            TokenId(key), row.strand, None if row.part is None else row.part.tasks, row.n_starts
        )
        for key, row in rows.scan(TOKENS)
        if row.running
    )


def duplicate(rows: Rows, tokens: Iterable[TokenId], now: float) -> tuple[Invocation, ...]:
    """Queue tokens besides, that run for the first time; of two attempts the first commit wins.

    It counts as no death. The first attempt may still commit, as its token is live; its heartbeat
    is refused as HELD, which does not stop it.
    """
    found = []
    for token in tokens:
        row = rows.get(TOKENS, token)
        if row is None or not row.running or row.n_starts != 1:
            continue
        row.running = False
        row.stamped_at = now
        rows.put(TOKENS, token, row)
        found.append(Invocation(rows.job, token, row.priority))
    return tuple(found)


def report_lost(
    rows: Rows, token: TokenId, attempt: AttemptId, exports: Iterable[ExportId]
) -> bool:
    """Note exports that cannot be read, and stop: the client opens a new generation.

    No token is left, so nothing is recorded or discarded until then.
    """
    job = rows.get(JOB, THE_JOB)
    row = rows.get(TOKENS, token)
    if job is None or row is None or not row.running or row.attempt != attempt:
        return False
    _lose(rows, job, exports)
    return True


def mark_lost(rows: Rows, exports: Iterable[ExportId]) -> None:
    """As `report_lost`, by the client, which cannot read results."""
    job = rows.get(JOB, THE_JOB)
    if job is not None and job.status in (Status.RUNNING, Status.DONE):
        job.status = Status.RUNNING
        _lose(rows, job, exports)


def recorded(rows: Rows) -> tuple[ExportId, ...]:
    """The exports that are complete."""
    return tuple(ExportId(key) for key, row in rows.scan(EXPORTS) if row.n_left == 0)


def relaunch(rows: Rows, request: Relaunch, now: float) -> tuple[Invocation, ...]:
    """Open a new generation; nothing when the job is there already, or has ended."""
    job = rows.get(JOB, THE_JOB)
    if job is None or job.status is not Status.RUNNING or job.generation >= request.generation:
        return ()
    if not all(is_complete(rows, export) for export, _ in request.survivors):
        return ()  # a failover has taken back what the client had seen (seed 27066)
    job.generation = request.generation
    job.lost = ()
    job.done = request.done
    job.version += 1
    job.n_requested = request.n_requested
    clear_work(rows)
    survivors = dict(request.survivors)
    for key, row in rows.scan(EXPORTS):
        n_consumers = survivors.get(ExportId(key), 0)
        if n_consumers and row.n_left == 0:
            row.n_consumers = n_consumers
            rows.put(EXPORTS, key, row)
        else:
            discard(rows, job, ExportId(key), row)
    for strand, n_missing, inputs in request.waiting:
        waiting = WaitingRow(strand, None, n_missing, inputs, priority=job.priority)
        rows.put(WAITING, strand, waiting)
    minted = mint_entries(rows, job, request.entries, request.entry_inputs, now)
    if job.n_requested == 0:
        job.status = Status.DONE
    rows.put(JOB, THE_JOB, job)
    return minted


def view(rows: Rows) -> JobView | None:
    """The job as it stands."""
    job = rows.get(JOB, THE_JOB)
    if job is None:
        return None
    tokens = [row.running for _, row in rows.scan(TOKENS)]
    return JobView(
        job=rows.job,
        version=job.version,
        status=job.status,
        error=job.error,
        n_tasks=job.n_tasks,
        n_strands=job.n_strands,
        n_tasks_done=job.n_tasks_done,
        n_commits=job.n_commits,
        n_starts=job.n_starts,
        n_queued=tokens.count(False),
        n_running=tokens.count(True),
        n_retries=job.n_retries,
        n_deaths=job.n_deaths,
        lost=job.lost,
        generation=job.generation,
    )


def results(rows: Rows) -> tuple[Located, ...]:
    """The requested exports that are complete."""
    return tuple(
        Located(ExportId(key), row.entries)
        for key, row in rows.scan(EXPORTS)
        if row.requested and row.n_left == 0
    )


def traces(rows: Rows) -> tuple[object, ...]:
    """The packed traces of all commits, in their order."""
    return tuple(row.packed for _, row in rows.scan(TRACES))


def manifest(rows: Rows) -> object | None:
    """What `Create.manifest` said."""
    row = rows.get(PROGRAMS, MANIFEST)
    return None if row is None else row.entry.payload


def is_news(job: JobRow, version: int, progress: bool) -> bool:
    """Say whether a watcher who knows the job at `version` has to be woken."""
    if job.status is not Status.RUNNING or job.news_version > version:
        return True
    return job.version > version and (progress or bool(job.lost))


def cancel(rows: Rows) -> bool:
    """End a running job."""
    job = rows.get(JOB, THE_JOB)
    if job is None or job.status is not Status.RUNNING:
        return False
    end_job(rows, job, Status.CANCELLED, None)
    return True


def _lose(rows: Rows, job: JobRow, exports: Iterable[ExportId]) -> None:
    job.lost = tuple(sorted({*job.lost, *exports}))
    job.version += 1
    clear_work(rows)
    rows.put(JOB, THE_JOB, job)
