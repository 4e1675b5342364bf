"""From strands to parts: what each strand runs, reads and writes, in the store's words. Pure.

The ids are the numbers of the cut: strand 17 is "17", export 42 is "42".
"""

from __future__ import annotations

from wukong.executor.messages import ExportId, ExportSpec, Feed, Part, StrandId
from wukong.scheduler.strands import Strands


def static_parts(strands: Strands) -> list[Part]:
    """Make the part of every strand of a cut.

    Each consumer of an export reads every value of it: that is what makes it one export.

    Returns: parts by strand number.
    Cost: O(tasks + exports and their consumers); consumers share one tuple of values.
    """
    reads = [(ExportId(str(e)), export.tasks) for e, export in enumerate(strands.exports)]
    feeds = [Feed(StrandId(str(s)), len(read)) for s, read in enumerate(strands.strand_inputs)]
    specs = [
        ExportSpec(
            export=ExportId(str(e)),
            tasks=export.tasks,
            n_values=len(export.tasks),
            n_consumers=len(export.consumers) + export.requested,
            requested=export.requested,
            feeds=tuple(feeds[s] for s in export.consumers),
        )
        for e, export in enumerate(strands.exports)
    ]
    tasks, ends = strands.tasks.tolist(), strands.tasks_ptr.tolist()
    return [
        Part(
            tasks=tuple(tasks[ends[s] : ends[s + 1]]),
            inputs=tuple(reads[e] for e in strands.strand_inputs[s]),
            exports=tuple(specs[e] for e in strands.strand_exports[s]),
        )
        for s in range(strands.n_strands)
    ]
