"""The rows of a job and their transitions: the whole of what stores agree on. Pure.

The memory store, the embedded store and the simulator call these functions on rows of their own;
the Lua script of the Redis store says the same again. Each function is one atomic operation of
design.md, section 3: it reads and writes rows of one job, and either changes all that it says or
nothing. `now` is the store's clock, in seconds.

The lines of thought that everything rests on:
- A commit is applied exactly once, since it removes its token. So counters are enough.
- A token exists from the commit that minted it to the commit that spends it. So at every moment the
  tokens and the waiting strands are the remaining work, whoever dies.
"""

from __future__ import annotations

from collections.abc import Iterable

from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    Commit,
    Create,
    Entry,
    ExportId,
    Feed,
    Grant,
    HolderId,
    Invocation,
    Located,
    Output,
    Reason,
    Receipt,
    Refused,
    Spawn,
    Status,
    StrandId,
    TokenId,
)
from wukong.storage.rows import (
    EXPORTS,
    JOB,
    MANIFEST,
    PROGRAMS,
    RECEIPTS,
    THE_JOB,
    TOKENS,
    TRACES,
    WAITING,
    ExportRow,
    JobRow,
    ProgramRow,
    R,
    ReceiptRow,
    Rows,
    Table,
    TokenRow,
    TraceRow,
    WaitingRow,
)

REINVOKE_MAX = 64
"""Tokens that one operation hands out again; the rest wait for the next (rule 4, a global cap)."""
BACKOFF_S = 2.0
"""First wait before a queued token is invoked again; doubles each time."""
BACKOFF_MAX_S = 60.0
GARBAGE_MAX = 64
"""Garbage ids in one receipt."""
# ------------------------------------------------------------------ operations


def create(rows: Rows, request: Create, silence_s: float, now: float) -> tuple[Invocation, ...]:
    """Begin a job. A job that exists already is left as it is (the repetition of a lost reply)."""
    if rows.get(JOB, THE_JOB) is not None:
        return tuple(
            Invocation(rows.job, TokenId(t), row.priority) for t, row in queued_tokens(rows)
        )
    job = JobRow(
        status=Status.RUNNING,
        n_requested=request.n_requested,
        n_tasks=request.n_tasks,
        n_strands=request.n_strands,
        fail_fast=request.fail_fast,
        priority=request.priority,
        silence_s=silence_s,
        sweep_at=now + silence_s,
    )
    rows.put(PROGRAMS, MANIFEST, ProgramRow(Entry((), None, request.manifest, 0, 0)))
    for strand, entry in request.programs:
        rows.put(PROGRAMS, strand, ProgramRow(entry))
    arrivals: list[tuple[Feed, ExportId]] = []
    for output in request.sources:
        _record(rows, job, output, arrivals)
    for feed, export in arrivals:
        _arrive(rows, feed, export)
    minted = mint_entries(rows, job, request.entries, request.entry_inputs, now)
    if job.n_requested == 0:
        job.status = Status.DONE
    rows.put(JOB, THE_JOB, job)
    return minted


def start(
    rows: Rows, token: TokenId, attempt: AttemptId, holder: HolderId, now: float
) -> Grant | Refused:
    """Take a token, unless it is spent or runs elsewhere with a fresh heartbeat."""
    job = rows.get(JOB, THE_JOB)
    if job is None:
        return Refused(Reason.UNKNOWN_JOB)
    if job.status is not Status.RUNNING:
        return Refused(Reason.OVER)
    row = rows.get(TOKENS, token)
    if row is None:
        return Refused(Reason.SPENT, _unstarted(rows, token))
    if not (row.running and row.attempt == attempt):
        if row.running:
            if now - row.stamped_at < job.silence_s:
                return Refused(Reason.HELD)
            count_death(job, row)
        _confirm(rows, row)
        row.running = True
        row.attempt = attempt
        row.holder = holder
        row.stamped_at = now
        row.n_starts += 1
        job.n_starts += 1
        job.n_retries += row.n_starts > 1
        rows.put(TOKENS, token, row)
        rows.put(JOB, THE_JOB, job)
    return _grant(rows, token, row)


def renew(rows: Rows, token: TokenId, attempt: AttemptId, now: float) -> Reason | None:
    """Heartbeat of a running token's holder. None: all is well."""
    row = rows.get(TOKENS, token)
    if row is None:
        job = rows.get(JOB, THE_JOB)
        return Reason.SPENT if job is not None and job.status is Status.RUNNING else Reason.OVER
    if not row.running or row.attempt != attempt:
        return Reason.HELD
    _confirm(rows, row)
    row.stamped_at = now
    rows.put(TOKENS, token, row)
    return None


def absorb(
    rows: Rows, token: TokenId, attempt: AttemptId, feed: Feed, n_held: int
) -> Absorbed | Refused:
    """Say whether a strand misses only what the asking attempt holds; changes nothing."""
    row = rows.get(TOKENS, token)
    if row is None or not row.running or row.attempt != attempt:
        return Refused(Reason.SPENT)
    job = rows.get(JOB, THE_JOB)
    waiting = rows.get(WAITING, feed.strand)
    if waiting is None:
        waiting = WaitingRow(feed.strand, None, feed.n_inputs, ())
    # A strand that was done in an earlier generation waits for nothing (seed 9008).
    if waiting.n_missing != n_held or job is None or feed.strand in job.done:
        return Refused(Reason.HELD)
    program = rows.get(PROGRAMS, waiting.base)
    assert program is not None, f"strand {waiting.base} has no program"
    recorded = [e for e in waiting.inputs if is_complete(rows, e)]
    return Absorbed(waiting.base, program.entry, waiting.part, _locate(rows, recorded))


def commit(rows: Rows, request: Commit, now: float) -> Receipt | Refused:
    """Spend one invocation and mint the next ones."""
    job = rows.get(JOB, THE_JOB)
    if job is None:
        return Refused(Reason.UNKNOWN_JOB)
    if job.status is not Status.RUNNING:
        return Refused(Reason.OVER)
    row = rows.get(TOKENS, request.token)
    if row is None:
        return _repeat_receipt(rows, request)
    _confirm(rows, row)
    rows.delete(TOKENS, request.token)
    job.n_commits += 1
    job.version += 1
    job.n_tasks_done += request.n_tasks
    if request.trace is not None:
        rows.put(TRACES, f"{job.n_commits:09d}", TraceRow(request.trace))
    if request.failed is not None:
        end_job(rows, job, Status.FAILED, request.failed)
        return Receipt(None, (), (), job_over=True)
    receipt = _apply(rows, job, request, now)
    rows.put(JOB, THE_JOB, job)
    return receipt


# ------------------------------------------------------------------ parts of the operations


def _apply(rows: Rows, job: JobRow, request: Commit, now: float) -> Receipt:
    """Record outputs, lower counters, mint; `job` is the caller's to write."""
    arrivals: list[tuple[Feed, ExportId]] = []
    for output in request.outputs:
        _record(rows, job, output, arrivals)
    # Retained first: an input that pieces go on reading must not pass through zero consumers.
    for export, n_more in request.retained:
        _count_consumers(rows, job, export, n_more)
    for export in request.consumed:
        _count_consumers(rows, job, export, -1)
    for strand in request.absorbed:
        rows.delete(WAITING, strand)
    ready: list[tuple[StrandId, WaitingRow, int]] = []
    for feed, export in arrivals:
        waiting = _arrive(rows, feed, export)
        if waiting is not None:
            ready.append((feed.strand, waiting, feed.held_bytes))
    for spawn in request.spawns:
        waiting = _spawn(rows, spawn)
        if waiting is not None:
            ready.append((spawn.strand, waiting, spawn.held_bytes))
    job.n_strands += len(request.spawns)
    receipt = _mint(rows, job, request, ready, now)
    dropped = set(request.collected)
    if dropped:
        job.garbage = tuple(b for b in job.garbage if b not in dropped)
    if job.n_requested == 0:
        job.status = Status.DONE
        # In a later generation, pieces that only feed finished strands may be left (seed 1198).
        clear_work(rows)
        receipt = Receipt(None, (), ())
    again: tuple[Invocation, ...] = ()
    if now >= job.sweep_at:
        again = sweep_tokens(rows, job, 4, now)
    return Receipt(
        receipt.become,
        receipt.invoke + again,
        job.garbage[:GARBAGE_MAX],
        job_over=job.status is not Status.RUNNING,
    )


def _record(rows: Rows, job: JobRow, output: Output, arrivals: list[tuple[Feed, ExportId]]) -> None:
    """Add values to an export; when it is complete, note whom it feeds."""
    row = rows.get(EXPORTS, output.export)
    if row is None:
        row = ExportRow(output.n_values, output.n_consumers, output.requested, ())
    row.entries += output.entries
    row.n_left -= sum(len(entry.tasks) for entry in output.entries)
    assert row.n_left >= 0, f"export {output.export}: a value was recorded twice"
    rows.put(EXPORTS, output.export, row)
    if row.n_left == 0:
        job.n_requested -= row.requested
        arrivals.extend((f, output.export) for f in output.feeds if f.strand not in job.done)
        if row.n_consumers <= 0:
            discard(rows, job, output.export, row)


def _count_consumers(rows: Rows, job: JobRow, export: ExportId, n_more: int) -> None:
    """Change the number of consumers; an export without any is discarded."""
    row = rows.get(EXPORTS, export)
    assert row is not None, f"export {export} was discarded before its last consumer"
    row.n_consumers += n_more
    if row.n_consumers <= 0:
        discard(rows, job, export, row)
    else:
        rows.put(EXPORTS, export, row)


def discard(rows: Rows, job: JobRow, export: ExportId, row: ExportRow) -> None:
    """Forget an export; its blobs are garbage from now on."""
    rows.delete(EXPORTS, export)
    blobs = tuple(e.blob for e in row.entries if e.blob is not None)
    if blobs:
        job.garbage += blobs


def _arrive(rows: Rows, feed: Feed, export: ExportId) -> WaitingRow | None:
    """Count an input of a strand as there. Returns the strand when it was the last one."""
    row = rows.get(WAITING, feed.strand)
    if row is None:
        row = WaitingRow(feed.strand, None, feed.n_inputs, ())
    row.n_missing -= 1
    if row.part is None:
        row.inputs += (export,)
    if row.n_missing > 0:
        rows.put(WAITING, feed.strand, row)
        return None
    rows.delete(WAITING, feed.strand)
    return row


def _spawn(rows: Rows, spawn: Spawn) -> WaitingRow | None:
    """Add a piece to the job. Returns it when it misses nothing."""
    row = WaitingRow(spawn.base, spawn.part, spawn.n_missing, spawn.inputs, spawn.n_deaths)
    if spawn.n_missing > 0:
        rows.put(WAITING, spawn.strand, row)
        return None
    return row


def _mint(
    rows: Rows,
    job: JobRow,
    request: Commit,
    ready: list[tuple[StrandId, WaitingRow, int]],
    now: float,
) -> Receipt:
    """Make tokens of the strands that miss nothing; the committer becomes one of them."""
    if not ready:
        return Receipt(None, (), ())
    become = -1
    if request.become is not None:
        # Most bytes first; of equals the first one, so that all stores choose alike.
        become = max(range(len(ready)), key=lambda i: (ready[i][2], -i))
    minted = tuple(TokenId(f"{request.attempt}.{i}") for i in range(len(ready)))
    grant: Grant | None = None
    for i, (strand, waiting, _) in enumerate(ready):
        row = _queue(job, strand, waiting, request.token, now)
        if i == become:
            assert request.become is not None
            row.running = True
            row.attempt = request.become
            row.holder = request.holder
            row.n_starts = 1
            job.n_starts += 1
            grant = _grant(rows, minted[i], row)
        rows.put(TOKENS, minted[i], row)
    rows.put(
        RECEIPTS,
        request.token,
        ReceiptRow(
            request.attempt, minted, minted[become] if become >= 0 else TokenId(""), len(minted)
        ),
    )
    others = (Invocation(rows.job, t, job.priority) for i, t in enumerate(minted) if i != become)
    return Receipt(grant, tuple(others), ())


def _queue(
    job: JobRow, strand: StrandId, waiting: WaitingRow, minted_by: str, now: float
) -> TokenRow:
    return TokenRow(
        strand=strand,
        base=waiting.base,
        part=waiting.part,
        inputs=waiting.inputs,
        minted_by=minted_by,
        n_deaths=waiting.n_deaths,
        priority=job.priority,
        stamped_at=now,
    )


def mint_entries(
    rows: Rows,
    job: JobRow,
    entries: tuple[StrandId, ...],
    entry_inputs: tuple[tuple[ExportId, ...], ...],
    now: float,
) -> tuple[Invocation, ...]:
    """Queue the strands that can begin. Their ids carry the job and its generation."""
    invocations = []
    for strand, inputs in zip(entries, entry_inputs, strict=True):
        token = TokenId(f"{rows.job}.{job.generation}.{strand}")
        row = _queue(job, strand, WaitingRow(strand, None, 0, inputs), "", now)
        rows.put(TOKENS, token, row)
        invocations.append(Invocation(rows.job, token, job.priority))
    return tuple(invocations)


def _confirm(rows: Rows, row: TokenRow) -> None:
    """A minted token has been seen by its executor: its receipt has one less to wait for."""
    if not row.minted_by:
        return
    receipt = rows.get(RECEIPTS, row.minted_by)
    if receipt is not None:
        receipt.n_unstarted -= 1
        if receipt.n_unstarted:
            rows.put(RECEIPTS, row.minted_by, receipt)
        else:
            rows.delete(RECEIPTS, row.minted_by)
    row.minted_by = ""


def _unstarted(rows: Rows, spent: TokenId) -> tuple[Invocation, ...]:
    """What the commit that spent a token minted, and nobody has started."""
    receipt = rows.get(RECEIPTS, spent)
    if receipt is None:
        return ()
    found = []
    for token in receipt.minted:
        row = rows.get(TOKENS, token)
        if row is not None and not row.running:
            found.append(Invocation(rows.job, token, row.priority))
    return tuple(found)


def _repeat_receipt(rows: Rows, request: Commit) -> Receipt | Refused:
    """Answer a commit whose token is spent: its own attempt gets the receipt again."""
    invoke = _unstarted(rows, request.token)
    receipt = rows.get(RECEIPTS, request.token)
    if receipt is None or receipt.attempt != request.attempt:
        return Refused(Reason.SPENT, invoke)
    row = rows.get(TOKENS, receipt.become)
    grant = None
    if row is not None and row.running and row.attempt == request.become:
        grant = _grant(rows, receipt.become, row)
    return Receipt(grant, invoke, ())


def _grant(rows: Rows, token: TokenId, row: TokenRow) -> Grant:
    program = rows.get(PROGRAMS, row.base)
    assert program is not None, f"strand {row.base} has no program"
    return Grant(
        job=rows.job,
        token=token,
        attempt=row.attempt,
        strand=row.strand,
        base=row.base,
        program=program.entry,
        part=row.part,
        inputs=_locate(rows, row.inputs),
        n_starts=row.n_starts,
        n_deaths=row.n_deaths,
        cause=row.cause,
        priority=row.priority,
    )


def _locate(rows: Rows, exports: Iterable[ExportId]) -> tuple[Located, ...]:
    located = []
    for export in exports:
        row = rows.get(EXPORTS, export)
        assert row is not None, f"export {export} was discarded before its last consumer"
        located.append(Located(export, row.entries))
    return tuple(located)


def is_complete(rows: Rows, export: ExportId) -> bool:
    """Whether all values of an export are recorded."""
    row = rows.get(EXPORTS, export)
    return row is not None and row.n_left == 0


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


def queued_tokens(rows: Rows) -> list[tuple[str, TokenRow]]:
    """The tokens that nobody runs."""
    return [(key, row) for key, row in rows.scan(TOKENS) if not row.running]


def end_job(rows: Rows, job: JobRow, status: Status, error: bytes | object | None) -> None:
    """No token outlives the job, so nothing of it can be committed any more."""
    job.status = status
    job.error = error
    job.version += 1
    clear_work(rows)
    rows.put(JOB, THE_JOB, job)


def clear_work(rows: Rows) -> None:
    """Remove all that could still be run or waited for."""
    _clear(rows, TOKENS)
    _clear(rows, WAITING)
    _clear(rows, RECEIPTS)


def _clear(rows: Rows, table: Table[R]) -> None:
    for key, _ in list(rows.scan(table)):
        rows.delete(table, key)
