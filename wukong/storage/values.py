"""The values of a job: recorded, waited for, located, discarded. Pure.

An export is complete when all of its values are recorded, and is discarded when it is complete and
nobody is to read it (any more).
"""

from __future__ import annotations

from collections.abc import Iterable

from wukong.executor.messages import ExportId, Feed, Located, Output
from wukong.storage.rows import EXPORTS, ExportRow, JobRow, LateEdge, Rows


def record(rows: Rows, job: JobRow, output: Output, arrivals: list[tuple[Feed, ExportId]]) -> bool:
    """Add values to an export, and note whom they feed. Returns: the client waits for them."""
    row = rows.get(EXPORTS, output.export)
    if row is None:
        row = ExportRow(output.n_values, output.n_consumers, output.requested, ())
    row.entries += output.entries
    row.n_left -= sum(len(entry.tasks) for entry in output.entries)
    assert row.n_left >= 0, f"export {output.export}: a value was recorded twice"
    if row.late:
        row.late = _lower_late(row.late, output, arrivals)
    rows.put(EXPORTS, output.export, row)
    if row.n_left == 0:
        job.n_requested -= row.requested
        arrivals.extend((f, output.export) for f in output.feeds if f.strand not in job.done)
        if row.n_consumers <= 0:
            discard(rows, job, output.export, row)
    return row.requested


def _lower_late(
    late: tuple[LateEdge, ...], output: Output, arrivals: list[tuple[Feed, ExportId]]
) -> tuple[LateEdge, ...]:
    """Take recorded values off the late edges of an export; those that miss none arrive."""
    recorded = {task for entry in output.entries for task in entry.tasks}
    n_bytes = sum(entry.size_bytes for entry in output.entries)
    kept = []
    for strand, tasks in late:
        missing = tuple(task for task in tasks if task not in recorded)
        if missing:
            kept.append(LateEdge(strand, missing))
        else:
            arrivals.append((Feed(strand, 0, n_bytes), output.export))
    return tuple(kept)


def count_consumers(rows: Rows, job: JobRow, export: ExportId, n_more: int) -> None:
    """Change the number of consumers; a complete export without any is discarded."""
    row = rows.get(EXPORTS, export)
    assert row is not None, f"export {export} was discarded before its last consumer"
    row.n_consumers += n_more
    if row.n_consumers <= 0 and row.n_left == 0:
        discard(rows, job, export, row)
    else:
        rows.put(EXPORTS, export, row)


def discard(rows: Rows, job: JobRow, export: ExportId, row: ExportRow) -> None:
    """Forget an export; its blobs are garbage from now on."""
    rows.delete(EXPORTS, export)
    blobs = tuple(e.blob for e in row.entries if e.blob is not None)
    if blobs:
        job.garbage += blobs


def is_complete(rows: Rows, export: ExportId) -> bool:
    """Whether all values of an export are recorded."""
    row = rows.get(EXPORTS, export)
    return row is not None and row.n_left == 0


def locate(rows: Rows, exports: Iterable[ExportId]) -> tuple[Located, ...]:
    """Where the values of exports are that somebody is about to read."""
    located = []
    for export in exports:
        row = rows.get(EXPORTS, export)
        assert row is not None, f"export {export} was discarded before its last consumer"
        located.append(Located(export, row.entries))
    return tuple(located)
