"""The open job: pieces are added to it, and its results are kept until they are released. Pure.

An open job is what a long-lived client works with: every graph that it is given becomes a further
piece of the one job. The operations here are its own; those of executors and sweepers are the same
as for any job (`wukong.storage.state`, `wukong.storage.oversight`). The rules:

**It does not end by itself.** Nothing requested does not mean done; `cancel` and `forget` end it.
Errors are values: no commit of it says `failed`.

**Extensions are numbered**, 1, 2, ..., and each is applied once, in order. So a repetition changes
nothing, and one that builds on what a failover has taken back is refused (`GONE`).

**Its rows are there from the start.** An extension writes the row of every export and of every
strand that misses something. So whoever finds no row of a strand knows that it has been dropped or
has begun, and counters can be changed before anything is recorded. (Exports and strands that a
split makes appear with it, as in any job.) A strand's row names all of its inputs.

**A late edge** is one from an export of an earlier extension. It counts as a consumer from the
start, and names the values that the strand reads: the strand waits for those and no others, so it
may begin while the rest of the export is still being computed.

**A pin** is the consumer that a requested export has by being requested; `unpin` gives it up, also
before anything is recorded. It is given up for good: `requested` says whether it is there.

**Nothing grows with age.** A program's row goes with the commit of its last piece, an export with
its last consumer, a receipt with its last start; and what commits bring is one note each, which
goes when the client has acknowledged it by name. (By name, since after a failover a number might be
another commit's.)

**Dropped work** is that of strands which nobody needs: none of their exports is pinned, and all
readers of those are dropped too or have committed. The client finds them; it must name them all.
Their tokens go, running ones too, so that no commit of theirs is accepted; their consumption of
inputs is given back; what they were to write is discarded. A commit that has absorbed a dropped
strand is refused, and its token queued again.

**Lost blobs** stop an open job as any other (`report_lost`, `mark_lost`). It goes on with an
extension that says `restart`: all work is cleared, only the named survivors stay, and the extension
brings what is missing anew, in a new generation.
"""

from __future__ import annotations

from collections.abc import Iterable

from wukong.executor.messages import (
    BlobId,
    ExportId,
    Extend,
    Invocation,
    Located,
    News,
    NewStrand,
    Note,
    Reason,
    Refused,
    Restart,
    Status,
    StrandId,
)
from wukong.storage.rows import (
    EXPORTS,
    JOB,
    MANIFEST,
    NOTES,
    PROGRAMS,
    THE_JOB,
    TOKENS,
    WAITING,
    ExportRow,
    JobRow,
    LateEdge,
    ProgramRow,
    Rows,
    TokenRow,
    WaitingRow,
)
from wukong.storage.state import clear_work, confirm, entry_token, mint_entry
from wukong.storage.values import count_consumers, discard, is_complete, record

NOTES_MAX = 1_000
"""Notes in one answer."""
GARBAGE_MAX = 1_000
"""Garbage ids in one answer."""


def extend(rows: Rows, request: Extend, now: float) -> tuple[Invocation, ...] | Refused:
    """Add a piece to an open job, and queue the strands of it that miss nothing."""
    job = rows.get(JOB, THE_JOB)
    if job is None:
        return Refused(Reason.UNKNOWN_JOB)
    if job.status is not Status.RUNNING or not job.is_open:
        return Refused(Reason.OVER)
    if request.number <= job.n_extended:
        return _queued_again(rows, job, request.strands)
    if request.number != job.n_extended + 1 or not _is_founded(rows, request):
        return Refused(Reason.GONE)
    job.n_extended = request.number
    job.n_tasks += request.n_tasks
    job.n_strands += len(request.strands)
    if request.restart is not None:
        _restart(rows, job, request.restart)
    for strand, entry in request.programs:
        rows.put(PROGRAMS, strand, ProgramRow(entry))
    for export, n_values, n_consumers, requested in request.exports:
        rows.put(EXPORTS, export, ExportRow(n_values, n_consumers, requested, ()))
        job.n_requested += requested
    for output in request.sources:
        job.n_requested += output.requested
        record(rows, job, output, [])
    minted = [_begin(rows, job, strand, now) for strand in request.strands]
    if request.restart is not None:
        for export, _ in request.restart.survivors:
            count_consumers(rows, job, export, 0)
    rows.put(JOB, THE_JOB, job)
    return tuple(invocation for invocation in minted if invocation is not None)


def unpin(rows: Rows, exports: Iterable[ExportId]) -> None:
    """Give up the client's hold on exports; those that nobody else reads are discarded."""
    job = rows.get(JOB, THE_JOB)
    if job is None:
        return
    n_garbage = len(job.garbage)
    for export in exports:
        row = rows.get(EXPORTS, export)
        if row is None or not row.requested:
            continue
        row.requested = False
        job.n_requested -= row.n_left > 0
        rows.put(EXPORTS, export, row)
        count_consumers(rows, job, export, -1)
    _put_job(rows, job, n_garbage)


def drop(rows: Rows, strands: Iterable[tuple[StrandId, tuple[ExportId, ...]]]) -> None:
    """Take back the work of strands that nobody needs, each named with the exports it writes.

    Strands that have committed are left as they are, but for exports that are not discarded yet.
    """
    job = rows.get(JOB, THE_JOB)
    if job is None:
        return
    n_garbage = len(job.garbage)
    unwritten = dict(strands)
    doomed = [export for exports in unwritten.values() for export in exports]
    for key, token in rows.scan(TOKENS):
        if token.base in unwritten:
            confirm(rows, token)
            rows.delete(TOKENS, key)
            doomed += _give_back(rows, job, token)
    for key, waiting in rows.scan(WAITING):
        if waiting.base in unwritten:
            rows.delete(WAITING, key)
            doomed += _give_back(rows, job, waiting)
    for export in doomed:
        row = rows.get(EXPORTS, export)
        if row is not None and not row.requested:
            discard(rows, job, export, row)
    for strand in unwritten:
        rows.delete(PROGRAMS, strand)
    _put_job(rows, job, n_garbage)


def news(rows: Rows, acknowledged: Iterable[str], collected: Iterable[BlobId]) -> News:
    """What the client has not acknowledged: the oldest notes, and some garbage.

    Args:
        acknowledged: names of notes; they go.
        collected: blobs that have been deleted.
    """
    for name in acknowledged:
        rows.delete(NOTES, name)
    job = rows.get(JOB, THE_JOB)
    if job is None:
        return News((), ())
    deleted = set(collected)
    if deleted:
        job.garbage = tuple(blob for blob in job.garbage if blob not in deleted)
        rows.put(JOB, THE_JOB, job)
    notes: list[Note] = []
    for name, row in rows.scan(NOTES):
        if len(notes) == NOTES_MAX:
            break
        notes.append(Note(name, row.recorded, row.trace))
    return News(tuple(notes), job.garbage[:GARBAGE_MAX])


def located(rows: Rows, exports: Iterable[ExportId]) -> tuple[Located, ...]:
    """Where the recorded values of exports are; exports that are not there are left out."""
    found = ((export, rows.get(EXPORTS, export)) for export in exports)
    return tuple(Located(export, row.entries) for export, row in found if row is not None)


# ------------------------------------------------------------------ parts of the operations


def _queued_again(rows: Rows, job: JobRow, strands: Iterable[NewStrand]) -> tuple[Invocation, ...]:
    """The answer to a repetition: what of the extension is still queued."""
    found = []
    for new in strands:
        token = entry_token(rows, job, new.strand)
        row = rows.get(TOKENS, token)
        if row is not None and not row.running:
            found.append(Invocation(rows.job, token, row.priority))
    return tuple(found)


def _is_founded(rows: Rows, request: Extend) -> bool:
    """Whether everything that an extension builds on is in the store."""
    survivors = () if request.restart is None else request.restart.survivors
    earlier = {export for new in request.strands for export, _ in new.earlier}
    earlier -= {new.export for new in request.exports}
    if request.restart is not None:
        kept = {export for export, _ in survivors}
        return earlier <= kept and all(is_complete(rows, export) for export in kept)
    return all(rows.get(EXPORTS, export) is not None for export in earlier)


def _restart(rows: Rows, job: JobRow, restart: Restart) -> None:
    """Clear everything but the survivors, whose readers are counted anew."""
    job.generation = restart.generation
    job.lost = ()
    job.n_requested = 0
    clear_work(rows)
    for key, _ in list(rows.scan(PROGRAMS)):
        if key != MANIFEST:
            rows.delete(PROGRAMS, key)
    survivors = dict(restart.survivors)
    for key, row in rows.scan(EXPORTS):
        export = ExportId(key)
        if export in survivors:
            row.n_consumers = survivors[export]
            row.requested = bool(survivors[export])
            rows.put(EXPORTS, export, row)
        else:
            discard(rows, job, export, row)


def _begin(rows: Rows, job: JobRow, new: NewStrand, now: float) -> Invocation | None:
    """Have a strand wait, or queue it. Returns its token if it is queued."""
    n_missing = sum(not is_complete(rows, export) for export in new.inputs)
    for export, tasks in new.earlier:
        row = rows.get(EXPORTS, export)
        assert row is not None, f"export {export} is not in the store"
        row.n_consumers += 1
        missing = _not_recorded(row, tasks)
        if missing:
            n_missing += 1
            row.late += (LateEdge(new.strand, missing),)
        rows.put(EXPORTS, export, row)
    inputs = (*new.inputs, *(export for export, _ in new.earlier))
    waiting = WaitingRow(new.strand, None, n_missing, inputs, 0, new.priority)
    if n_missing == 0:
        return mint_entry(rows, job, new.strand, waiting, now)
    rows.put(WAITING, new.strand, waiting)
    return None


def _not_recorded(row: ExportRow, tasks: tuple[int, ...]) -> tuple[int, ...]:
    if row.n_left == 0:
        return ()
    recorded = {task for entry in row.entries for task in entry.tasks}
    return tuple(task for task in tasks if task not in recorded)


def _give_back(rows: Rows, job: JobRow, dropped: TokenRow | WaitingRow) -> list[ExportId]:
    """Read a dropped strand's inputs no more. Returns: what it, if it is a piece, was to write."""
    for export in dropped.inputs:
        if rows.get(EXPORTS, export) is not None:
            count_consumers(rows, job, export, -1)
    return [] if dropped.part is None else [spec.export for spec in dropped.part.exports]


def _put_job(rows: Rows, job: JobRow, n_garbage_before: int) -> None:
    """Write the job's row; new garbage is news for its client."""
    if len(job.garbage) > n_garbage_before:
        job.version += 1
        job.news_version = job.version
    rows.put(JOB, THE_JOB, job)
