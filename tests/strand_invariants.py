"""What holds for every cut of a graph into strands, written independently of how it is made."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from wukong.scheduler.strands import Strands


def check_strands(
    strands: Strands,
    inputs_ptr: NDArray[np.integer],
    inputs: NDArray[np.integer],
    requested: Iterable[int],
    tasks: Iterable[int] | None = None,
) -> None:
    """Check every invariant of a cut, whoever has made it.

    Raises:
        AssertionError: naming the first task, strand or export that is wrong.
    """
    ptr, ins = inputs_ptr.tolist(), inputs.tolist()
    ids = list(range(len(ptr) - 1)) if tasks is None else list(tasks)
    of = dict(zip(ids, strands.strand_of.tolist(), strict=True))
    bounds, listed = strands.tasks_ptr.tolist(), strands.tasks.tolist()
    assert len(bounds) == strands.n_strands + 1, "tasks_ptr has one end a strand"
    assert sorted(listed) == ids, "each task is in exactly one strand"
    for s in range(strands.n_strands):
        run = listed[bounds[s] : bounds[s + 1]]
        assert run, f"strand {s} is empty"
        assert run == sorted(run), f"strand {s} is not ascending"
        assert all(of[t] == s for t in run), f"strand {s} lists a task of another strand"
    consumers: dict[int, set[int]] = {t: set() for t in set(requested) & of.keys()}
    client = set(consumers)
    for t in ids:
        for d in ins[ptr[t] : ptr[t + 1]]:
            if d in of and of[d] != of[t]:
                assert of[d] < of[t], f"strand {of[t]} reads task {d} of the later {of[d]}"
                consumers.setdefault(d, set()).add(of[t])
    exported = [t for export in strands.exports for t in export.tasks]
    assert sorted(exported) == sorted(consumers), "each value that is read is in exactly one export"
    reads: list[list[int]] = [[] for _ in range(strands.n_strands)]
    writes: list[list[int]] = [[] for _ in range(strands.n_strands)]
    rows = set()
    for e, export in enumerate(strands.exports):
        rows.add((export.strand, export.consumers, export.requested))
        writes[export.strand].append(e)
        assert list(export.tasks) == sorted(export.tasks), f"export {e} is not ascending"
        for t in export.tasks:
            assert of[t] == export.strand, f"export {e} has task {t} of another strand"
            assert tuple(sorted(consumers[t])) == export.consumers, f"readers of task {t} differ"
            assert export.requested == (t in client), f"requested is wrong for task {t}"
        for s in export.consumers:
            reads[s].append(e)
    assert len(rows) == len(strands.exports), "two exports have the same strand and readers"
    assert strands.strand_exports == [tuple(w) for w in writes], "strand_exports differ"
    assert strands.strand_inputs == [tuple(r) for r in reads], "strand_inputs differ"
