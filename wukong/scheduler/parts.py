"""From strands to parts: what each strand runs, reads and writes, in the store's words. Pure.

The ids are the numbers of the cut: strand 17 is "17", export 42 is "42"; in a piece of an open job
they go on from those of earlier pieces.
"""

from __future__ import annotations

from wukong.executor.messages import ExportId, ExportSpec, Feed, Part, StrandId
from wukong.scheduler.strands import Strands


def static_parts(
    strands: Strands, base: int = 0, first_strand: int = 0, first_export: int = 0
) -> list[Part]:
    """Make the part of every strand of a cut.

    Each consumer of an export reads every value of it: that is what makes it one export.

    Args:
        base, first_strand, first_export: added to the cut's numbers of tasks, strands, exports.
    Returns: parts by strand number of the cut.
    Cost: O(tasks + exports and their consumers); consumers share one tuple of values.
    """
    exported = [export.tasks for export in strands.exports]
    if base:
        exported = [tuple([task + base for task in tasks]) for tasks in exported]
    reads = [(ExportId(str(e)), tasks) for e, tasks in enumerate(exported, first_export)]
    feeds = [
        Feed(StrandId(str(s)), len(read))
        for s, read in enumerate(strands.strand_inputs, first_strand)
    ]
    specs = [
        ExportSpec(
            export=ExportId(str(e + first_export)),
            tasks=exported[e],
            n_values=len(export.tasks),
            n_consumers=len(export.consumers) + export.requested,
            requested=export.requested,
            feeds=tuple(feeds[s] for s in export.consumers),
        )
        for e, export in enumerate(strands.exports)
    ]
    tasks, ends = (strands.tasks + base).tolist(), strands.tasks_ptr.tolist()
    return [
        Part(
            tasks=tuple(tasks[ends[s] : ends[s + 1]]),
            inputs=tuple(reads[e] for e in strands.strand_inputs[s]),
            exports=tuple(specs[e] for e in strands.strand_exports[s]),
        )
        for s in range(strands.n_strands)
    ]
