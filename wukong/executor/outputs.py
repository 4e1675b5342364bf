"""What an executor's work writes: which values travel inside the commit, which are put before it,
and which while the run still goes on. Pure.

Outputs that nobody here reads on its own are held back for `absorb` (delayed I/O), but not without
bound: above `pile_bytes` they are put at once, and dropped where no later task reads them. Where
blobs are far away, outputs that will be put in any case are put while the next tasks run.
"""

from __future__ import annotations

from collections.abc import Mapping

from wukong.executor.events import PutItem
from wukong.executor.messages import BlobId, Entry, ExportId, Feed, Output
from wukong.executor.work import Policy, Work, may_absorb


def items_to_put(work: Work, policy: Policy) -> tuple[PutItem, ...]:
    """All that has to be recorded and has not been put early."""
    room = policy.inline_bytes
    items: list[PutItem] = []
    for spec in work.specs:
        left = tuple(t for t in spec.tasks if (spec.export, t) not in work.early)
        small, n_small_bytes = left, 0
        if work.sizes:
            large = [t for t in left if work.sizes[t] >= policy.blob_bytes]
            items.extend(PutItem(spec.export, (t,), _blob(work)) for t in large)
            small = tuple(t for t in left if work.sizes[t] < policy.blob_bytes)
            n_small_bytes = sum(work.sizes[t] for t in small)
        if small:
            inline = n_small_bytes <= room
            room -= n_small_bytes if inline else 0
            items.append(PutItem(spec.export, small, None if inline else _blob(work)))
    return tuple(items)


def early_items(
    work: Work, policy: Policy, sizes: Mapping[int, int]
) -> tuple[tuple[PutItem, ...], bool]:
    """What to put now, of a run that goes on.

    Args:
        sizes: of outputs that have been made since the last call.
    Returns: the items, and whether memory asks for their values to be dropped.
    """
    work.sizes.update(sizes)
    large = {task: n for task, n in sizes.items() if n >= policy.blob_bytes}
    work.piled.update(large)
    work.made_bytes += sum(large.values())
    if work.is_putting or work.has_failed_early or work.n_deaths:
        return (), False
    is_held_back = not policy.early_bytes or may_absorb(work, policy)
    bound = policy.pile_bytes if is_held_back else min(policy.early_bytes, policy.pile_bytes)
    if not work.piled or sum(work.piled.values()) < bound:
        return (), False
    items = tuple(
        PutItem(spec.export, (task,), _blob(work))
        for spec in work.part.exports
        for task in spec.tasks
        if task in work.piled
    )
    work.piled.clear()
    work.is_putting = True
    return items, work.made_bytes >= policy.pile_bytes


def outputs_of(work: Work, entries: tuple[tuple[ExportId, Entry], ...]) -> tuple[Output, ...]:
    """What the commit records: what was put early, and these."""
    recorded: dict[ExportId, list[Entry]] = {}
    for (export, _), entry in sorted(work.early.items()):
        recorded.setdefault(export, []).append(entry)
    # Values that were put early may be gone from memory: they count for nobody's inputs here.
    held = dict.fromkeys(recorded, 0)
    for export, entry in entries:
        recorded.setdefault(export, []).append(entry)
        held[export] = held.get(export, 0) + entry.size_bytes
    return tuple(
        Output(
            spec.export,
            tuple(recorded[spec.export]),
            spec.n_values,
            spec.n_consumers,
            spec.requested,
            tuple(Feed(feed.strand, feed.n_inputs, held[spec.export]) for feed in spec.feeds),
        )
        for spec in work.specs
    )


def _blob(work: Work) -> BlobId:
    """The stem of the next blob's id; the answer to the put has the id."""
    work.n_blobs += 1
    return BlobId(f"{work.job}/{work.attempt}/{work.n_blobs - 1}")
