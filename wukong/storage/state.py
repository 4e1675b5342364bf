"""The rows of a job and their transitions: the whole of what stores agree on. Pure.

The memory store, the embedded store and the simulator call these functions on rows of their own;
the Lua script of the Redis store says the same again. Each function is one atomic operation of
design.md, section 3: it reads and writes rows of one job, and either changes all that it says or
nothing. `now` is the store's clock, in seconds.

The lines of thought that everything rests on:
- A commit is applied exactly once, since it removes its token. So counters are enough.
- A token exists from the commit that minted it to the commit that spends it. So at every moment the
  tokens and the waiting strands are the remaining work, whoever dies.

What is different in an open job stands at the head of `wukong.storage.extension`.
"""

from __future__ import annotations

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
    NOTES,
    PROGRAMS,
    RECEIPTS,
    THE_JOB,
    TOKENS,
    TRACES,
    WAITING,
    JobRow,
    NoteRow,
    ProgramRow,
    R,
    ReceiptRow,
    Rows,
    Table,
    TokenRow,
    TraceRow,
    WaitingRow,
)
from wukong.storage.silence import count_death, sweep_tokens
from wukong.storage.values import count_consumers, locate, record

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
        is_open=request.is_open,
    )
    rows.put(PROGRAMS, MANIFEST, ProgramRow(Entry((), None, request.manifest, 0, 0)))
    for strand, entry in request.programs:
        rows.put(PROGRAMS, strand, ProgramRow(entry))
    arrivals: list[tuple[Feed, ExportId]] = []
    for output in request.sources:
        record(rows, job, output, arrivals)
    for feed, export in arrivals:
        _arrive(rows, job, feed, export)
    minted = mint_entries(rows, job, request.entries, request.entry_inputs, now)
    if job.n_requested == 0 and not job.is_open:
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
        confirm(rows, row)
        row.running = True
        row.attempt = attempt
        row.holder = holder
        row.stamped_at = now
        row.n_starts += 1
        job.n_starts += 1
        job.n_retries += row.n_starts > 1
        rows.put(TOKENS, token, row)
        rows.put(JOB, THE_JOB, job)
    return _grant(rows, job, token, row)


def renew(rows: Rows, token: TokenId, attempt: AttemptId, now: float) -> Reason | None:
    """Heartbeat of a running token's holder. None: all is well."""
    row = rows.get(TOKENS, token)
    if row is None:
        job = rows.get(JOB, THE_JOB)
        return Reason.SPENT if job is not None and job.status is Status.RUNNING else Reason.OVER
    if not row.running or row.attempt != attempt:
        return Reason.HELD
    confirm(rows, row)
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
    waiting = None if job is None else _waiting(rows, job, feed)
    # A strand that was done in an earlier generation waits for nothing (seed 9008).
    if waiting is None or waiting.n_missing != n_held or job is None or feed.strand in job.done:
        return Refused(Reason.HELD)
    program = rows.get(PROGRAMS, waiting.base)
    assert program is not None, f"strand {waiting.base} has no program"
    recorded = [e for e in waiting.inputs if (found := rows.get(EXPORTS, e)) and found.entries]
    return Absorbed(waiting.base, program.entry, waiting.part, locate(rows, recorded))


def commit(rows: Rows, request: Commit, now: float) -> Receipt | Refused:
    """Spend one invocation and mint the next ones."""
    job = rows.get(JOB, THE_JOB)
    if job is None:
        return Refused(Reason.UNKNOWN_JOB)
    if job.status is not Status.RUNNING:
        return Refused(Reason.OVER)
    row = rows.get(TOKENS, request.token)
    if row is None:
        return _repeat_receipt(rows, job, request)
    if job.is_open and any(rows.get(WAITING, strand) is None for strand in request.absorbed):
        return _requeue(rows, request, row, now)
    confirm(rows, row)
    rows.delete(TOKENS, request.token)
    job.n_commits += 1
    job.version += 1
    job.n_tasks_done += request.n_tasks
    if request.trace is not None and not job.is_open:
        rows.put(TRACES, f"{job.n_commits:09d}", TraceRow(request.trace))
    if request.failed is not None:
        end_job(rows, job, Status.FAILED, request.failed)
        return Receipt(None, (), (), job_over=True)
    receipt = _apply(rows, job, request, row, now)
    rows.put(JOB, THE_JOB, job)
    return receipt


# ------------------------------------------------------------------ parts of the operations


def _apply(rows: Rows, job: JobRow, request: Commit, token: TokenRow, now: float) -> Receipt:
    """Record outputs, lower counters, mint; `job` is the caller's to write."""
    arrivals: list[tuple[Feed, ExportId]] = []
    wanted = [output for output in request.outputs if record(rows, job, output, arrivals)]
    if job.is_open:
        _note(rows, job, request, wanted)
        _count_programs(rows, request, token)
    # Retained first: an input that pieces go on reading must not pass through zero consumers.
    for export, n_more in request.retained:
        count_consumers(rows, job, export, n_more)
    for export in request.consumed:
        count_consumers(rows, job, export, -1)
    for strand in request.absorbed:
        if job.is_open:
            _forget_unwritten(rows, strand)
        rows.delete(WAITING, strand)
    ready: list[tuple[StrandId, WaitingRow, int]] = []
    for feed, export in arrivals:
        waiting = _arrive(rows, job, feed, export)
        if waiting is not None:
            ready.append((feed.strand, waiting, feed.held_bytes))
    for spawn in request.spawns:
        waiting = _spawn(rows, spawn, token.priority)
        if waiting is not None:
            ready.append((spawn.strand, waiting, spawn.held_bytes))
    job.n_strands += len(request.spawns)
    receipt = _mint(rows, job, request, ready, now)
    dropped = set(request.collected)
    if dropped:
        job.garbage = tuple(b for b in job.garbage if b not in dropped)
    if job.n_requested == 0 and not job.is_open:
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


def _waiting(rows: Rows, job: JobRow, feed: Feed) -> WaitingRow | None:
    """The row of a strand that is fed. None: in an open job, it waits no longer."""
    row = rows.get(WAITING, feed.strand)
    if row is None and not job.is_open:
        return WaitingRow(feed.strand, None, feed.n_inputs, (), priority=job.priority)
    return row


def _arrive(rows: Rows, job: JobRow, feed: Feed, export: ExportId) -> WaitingRow | None:
    """Count an input of a strand as there. Returns the strand when it was the last one."""
    row = _waiting(rows, job, feed)
    if row is None:
        return None
    row.n_missing -= 1
    if row.part is None and not job.is_open:
        row.inputs += (export,)
    if row.n_missing > 0:
        rows.put(WAITING, feed.strand, row)
        return None
    rows.delete(WAITING, feed.strand)
    return row


def _spawn(rows: Rows, spawn: Spawn, priority: int) -> WaitingRow | None:
    """Add a piece to the job. Returns it when it misses nothing."""
    row = WaitingRow(
        spawn.base, spawn.part, spawn.n_missing, spawn.inputs, spawn.n_deaths, priority
    )
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
        row = _queue(strand, waiting, request.token, now)
        if i == become:
            assert request.become is not None
            row.running = True
            row.attempt = request.become
            row.holder = request.holder
            row.n_starts = 1
            job.n_starts += 1
            grant = _grant(rows, job, minted[i], row)
        rows.put(TOKENS, minted[i], row)
    rows.put(
        RECEIPTS,
        request.token,
        ReceiptRow(
            request.attempt, minted, minted[become] if become >= 0 else TokenId(""), len(minted)
        ),
    )
    others = tuple(
        Invocation(rows.job, minted[i], waiting.priority)
        for i, (_, waiting, _) in enumerate(ready)
        if i != become
    )
    return Receipt(grant, others, ())


def _queue(strand: StrandId, waiting: WaitingRow, minted_by: str, now: float) -> TokenRow:
    return TokenRow(
        strand=strand,
        base=waiting.base,
        part=waiting.part,
        inputs=waiting.inputs,
        minted_by=minted_by,
        n_deaths=waiting.n_deaths,
        priority=waiting.priority,
        stamped_at=now,
    )


def mint_entries(
    rows: Rows,
    job: JobRow,
    entries: tuple[StrandId, ...],
    entry_inputs: tuple[tuple[ExportId, ...], ...],
    now: float,
) -> tuple[Invocation, ...]:
    """Queue the strands that can begin."""
    return tuple(
        mint_entry(rows, job, strand, WaitingRow(strand, None, 0, inputs, 0, job.priority), now)
        for strand, inputs in zip(entries, entry_inputs, strict=True)
    )


def mint_entry(
    rows: Rows, job: JobRow, strand: StrandId, waiting: WaitingRow, now: float
) -> Invocation:
    """Queue a strand that no commit has minted."""
    token = entry_token(rows, job, strand)
    rows.put(TOKENS, token, _queue(strand, waiting, "", now))
    return Invocation(rows.job, token, waiting.priority)


def entry_token(rows: Rows, job: JobRow, strand: StrandId) -> TokenId:
    """The token of a strand that no commit has minted: it carries the job and its generation."""
    return TokenId(f"{rows.job}.{job.generation}.{strand}")


def confirm(rows: Rows, row: TokenRow) -> None:
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


def _repeat_receipt(rows: Rows, job: JobRow, request: Commit) -> Receipt | Refused:
    """Answer a commit whose token is spent: its own attempt gets the receipt again."""
    invoke = _unstarted(rows, request.token)
    receipt = rows.get(RECEIPTS, request.token)
    if receipt is None or receipt.attempt != request.attempt:
        return Refused(Reason.SPENT, invoke)
    row = rows.get(TOKENS, receipt.become)
    grant = None
    if row is not None and row.running and row.attempt == request.become:
        grant = _grant(rows, job, receipt.become, row)
    return Receipt(grant, invoke, ())


def _requeue(rows: Rows, request: Commit, row: TokenRow, now: float) -> Refused:
    """A strand that this work has absorbed was dropped meanwhile: do the rest of it again."""
    row.running = False
    row.stamped_at = now
    rows.put(TOKENS, request.token, row)
    return Refused(Reason.HELD, (Invocation(rows.job, request.token, row.priority),))


def _note(rows: Rows, job: JobRow, request: Commit, wanted: list[Output]) -> None:
    """Leave word for the client of an open job; payloads stay where they are."""
    if not wanted and request.trace is None:
        return
    recorded = tuple(
        Located(output.export, tuple(e._replace(payload=None) for e in output.entries))
        for output in wanted
    )
    rows.put(NOTES, f"{job.n_commits:09d}.{request.attempt}", NoteRow(recorded, request.trace))
    if wanted:
        job.news_version = job.version


def _forget_unwritten(rows: Rows, strand: StrandId) -> None:
    """What an absorbed strand has read in its executor's memory will never be recorded."""
    waiting = rows.get(WAITING, strand)
    for export in () if waiting is None else waiting.inputs:
        row = rows.get(EXPORTS, export)
        if row is not None and not row.entries:
            rows.delete(EXPORTS, export)


def _count_programs(rows: Rows, request: Commit, token: TokenRow) -> None:
    """In an open job, a program goes with the last strand or piece that is run by it."""
    more = dict.fromkeys((spawn.base for spawn in request.spawns), 0)
    for spawn in request.spawns:
        more[spawn.base] += 1
    more[token.base] = more.get(token.base, 0) - 1
    for strand in request.absorbed:
        waiting = rows.get(WAITING, strand)
        assert waiting is not None, f"strand {strand} was dropped"
        more[waiting.base] = more.get(waiting.base, 0) - 1
    for base, n_more in more.items():
        row = rows.get(PROGRAMS, base)
        if n_more == 0 or row is None:
            continue
        row.n_live += n_more
        if row.n_live:
            rows.put(PROGRAMS, base, row)
        else:
            rows.delete(PROGRAMS, base)


def _grant(rows: Rows, job: JobRow, token: TokenId, row: TokenRow) -> Grant:
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
        inputs=locate(rows, row.inputs),
        n_starts=row.n_starts,
        n_deaths=row.n_deaths,
        cause=row.cause,
        priority=row.priority,
        is_open=job.is_open,
    )


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
