"""What is run again: after a loss of values, or since it takes suspiciously long. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from wukong.executor.messages import (
    ExportId,
    Extend,
    JobId,
    NewExport,
    NewStrand,
    Part,
    Relaunch,
    Restart,
    StrandId,
    TokenId,
)
from wukong.scheduler.holdings import Holdings

STRAGGLER_FACTOR = 4.0
"""Times what a strand's tasks let expect: durations of equal tasks differ by less, mostly."""
STRAGGLER_LEAST_S = 1.0
"""Below this, a second start costs more than it could save."""
STRAGGLER_RUNS = 3
"""Committed runs before anything is expected of others."""


def find_stragglers(
    finished: Sequence[tuple[int, float]],
    running: Sequence[tuple[TokenId, int, float]],
    now: float,
) -> tuple[TokenId, ...]:
    """Which running tokens take so long that a second attempt may well be first.

    Args:
        finished: (tasks, seconds) of each run that has been committed.
        running: (token, tasks, when it was seen running first) of each that runs.
    Returns: those beyond `STRAGGLER_FACTOR` times what their tasks let expect, once enough runs
        have been committed to tell; the longest first.
    """
    if len(finished) < max(STRAGGLER_RUNS, len(running)):
        return ()
    rates = sorted(seconds / max(1, n_tasks) for n_tasks, seconds in finished)
    rate_s = rates[len(rates) // 2]
    late = [
        (seen_at, token)
        for token, n_tasks, seen_at in running
        if now - seen_at > max(STRAGGLER_LEAST_S, STRAGGLER_FACTOR * n_tasks * rate_s)
    ]
    return tuple(token for _, token in sorted(late))


def find_missing(parts: Sequence[Part], surviving: set[ExportId]) -> set[int]:
    """Which strands have to run again.

    A strand does when a requested export of it, or one that a strand which runs again reads, does
    not survive.
    """
    home = {spec.export: i for i, part in enumerate(parts) for spec in part.exports}
    again: set[int] = set()
    stack = [
        i
        for i, part in enumerate(parts)
        if any(spec.requested and spec.export not in surviving for spec in part.exports)
    ]
    while stack:
        i = stack.pop()
        if i not in again:
            again.add(i)
            lost = [export for export, _ in parts[i].inputs if export not in surviving]
            stack.extend(home[export] for export in lost if export in home)  # else a constant
    return again


def plan_relaunch(
    job: JobId, generation: int, parts: Sequence[Part], surviving: set[ExportId]
) -> Relaunch:
    """Which strands have to run again, and what they can read; they record all exports anew.

    Args:
        parts: of the static strands, by number; strand i's id is str(i).
        surviving: exports that are complete and readable.
    Cost: O(strands + exports).
    """
    home = {spec.export: i for i, part in enumerate(parts) for spec in part.exports}
    again = find_missing(parts, surviving)
    kept = {export for export in surviving if home.get(export, -1) not in again}
    readers = dict.fromkeys(kept, 0)
    entries, entry_inputs, waiting = [], [], []
    for i in sorted(again):
        inputs = [export for export, _ in parts[i].inputs]
        there = tuple(export for export in inputs if export in kept)
        for export in there:
            readers[export] += 1
        if len(there) == len(inputs):
            entries.append(StrandId(str(i)))
            entry_inputs.append(there)
        elif there:
            waiting.append((StrandId(str(i)), len(inputs) - len(there), there))
    fed = {feed.strand for i in again for spec in parts[i].exports for feed in spec.feeds}
    n_requested = 0
    for i, part in enumerate(parts):
        for spec in part.exports:
            if spec.requested and i in again:
                n_requested += 1
            elif spec.requested and spec.export in readers:
                readers[spec.export] += 1
    return Relaunch(
        job=job,
        generation=generation,
        survivors=tuple(sorted((e, n) for e, n in readers.items() if n)),
        entries=tuple(entries),
        entry_inputs=tuple(entry_inputs),
        waiting=tuple(waiting),
        done=tuple(sorted(s for s in fed if int(s) not in again)),
        n_requested=n_requested,
    )


def plan_restart(
    holdings: Holdings, surviving: set[int], job: JobId, number: int, generation: int
) -> tuple[Extend, dict[int, list[int]]]:
    """What an open job goes on with after a loss; the holdings await its values anew.

    Args:
        surviving: exports that are complete and readable.
        number: of the extension.
    Returns: the extension; and for each export that nothing can make again its values that are
        held.
    Cost: O(kept work + exports).
    """
    again, gone = holdings.missing(surviving)
    made = {int(spec.export) for s in again for spec in holdings.work[s].part.exports}
    readers: dict[int, int] = {}
    strands = []
    for s in again:
        work = holdings.work[s]
        own = [e for e, _ in work.part.inputs[: work.n_own] if int(e) in made]
        for export in own:
            readers[int(export)] = readers.get(int(export), 0) + 1
        earlier = tuple(i for i in work.part.inputs if i[0] not in own)
        strands.append(NewStrand(StrandId(str(s)), tuple(own), earlier, work.priority))
    exports = []
    for s in again:
        for spec in holdings.work[s].part.exports:
            pinned = holdings.is_pinned(int(spec.export))
            n_consumers = readers.get(int(spec.export), 0) + pinned
            exports.append(NewExport(spec.export, spec.n_values, n_consumers, pinned))
    kept = sorted(surviving - made)
    request = Extend(
        job=job,
        number=number,
        programs=tuple((StrandId(str(s)), holdings.work[s].program) for s in again),
        strands=tuple(strands),
        exports=tuple(exports),
        restart=Restart(
            generation, tuple((ExportId(str(e)), int(holdings.is_pinned(e))) for e in kept)
        ),
    )
    holdings.forget_recorded(again)
    return request, {export: holdings.held_values(export) for export in gone}
