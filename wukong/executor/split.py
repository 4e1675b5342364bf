"""How the rest of a running strand becomes strands of its own. Pure.

A split is a commit (design.md, section 3, rule 9): what is done is recorded, what is not becomes
pieces, each a strand with inputs and exports of its own. Everything a piece reads is recorded by
this commit, was recorded before, or is an export of another piece; so a piece can be run again by
anybody, like any other strand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wukong.executor.events import Edges
from wukong.executor.messages import AttemptId, ExportId, ExportSpec, Feed, Part, Spawn, StrandId
from wukong.scheduler.strands import cut_strands

PIECES_PER_EXECUTOR = 4
"""As for the first cut of a graph: enough pieces that executors end at about the same time."""
FIRST_BYTES = 1 << 62
"""`Spawn.held_bytes` of the piece that the splitting executor keeps: more than any real size."""


@dataclass(frozen=True, slots=True)
class Split:
    """What a splitting commit records and spawns."""

    done_exports: tuple[ExportSpec, ...]
    """Values of done tasks to record: of the strand's exports, and what pieces read."""
    spawns: tuple[Spawn, ...]
    consumed: tuple[ExportId, ...]
    retained: tuple[tuple[ExportId, int], ...]


def cut_rest(rest: Edges, n_executors: int, all_away: bool = False) -> list[int]:
    """Divide what is left of a running part among executors.

    The first task is running and stays; so do the tasks of its piece, number 0.

    Args:
        all_away: nothing stays with the running task, which may go on for ever.
    Returns: the piece of each task; all 0 when nothing can be given away.
    Cost: O(tasks + edges).
    """
    running, *tasks = rest.tasks
    if not tasks:
        return [0]
    place = {task: i for i, task in enumerate(tasks)}
    inputs = [[place[v] for v in values if v in place] for values in rest.inputs[1:]]
    ptr = np.zeros(len(tasks) + 1, np.int64)
    np.cumsum([len(values) for values in inputs], out=ptr[1:])
    flat = np.array([v for values in inputs for v in values], np.int64)
    grain = max(1.0, len(tasks) / (PIECES_PER_EXECUTOR * n_executors))
    pieces = cut_strands(ptr, flat, (), grain=grain).strand_of.tolist()
    if all_away:
        is_apart = True
    elif max(pieces) == 0:
        # The last piece goes too, for the running task may wait for what its tasks do; but not
        # where they wait for it.
        is_apart = not any(running in values for values in rest.inputs[1:])
    else:
        # Others that read the running task's value shall not wait for more than that task.
        is_apart = any(piece and running in v for piece, v in zip(pieces, rest.inputs[1:]))
    return [0, *(piece + is_apart for piece in pieces)]


def split_rest(
    *,
    rest: Edges,
    piece_of: Sequence[int],
    base: StrandId,
    exports: Iterable[ExportSpec],
    recorded: Mapping[int, ExportId],
    inputs: Iterable[ExportId],
    attempt: AttemptId,
    n_deaths: int,
) -> Split:
    """Turn unfinished tasks into pieces.

    Args:
        rest: the unfinished tasks (ascending) and what each of them reads.
        piece_of: for each of them its piece, 0 to n - 1; piece 0 is the one that goes on here.
        base: the static strand whose program holds the tasks.
        exports: everything that the work still has to record.
        recorded: values that the work reads, with the export of each.
        inputs: all exports that the work was to consume.
        attempt: the splitting attempt, for the names of what is new.
        n_deaths: inherited by the pieces.
    Cost: O(rest + their edges + exports).
    """
    n_pieces = max(piece_of) + 1
    strands = [StrandId(f"{attempt}.s{i}") for i in range(n_pieces)]
    home = dict(zip(rest.tasks, piece_of, strict=True))
    reads: list[dict[ExportId, set[int]]] = [{} for _ in range(n_pieces)]
    readers: dict[int, set[int]] = {}
    for piece, values_read in zip(piece_of, rest.inputs, strict=True):
        for value in values_read:
            if home.get(value, -1) == piece:
                continue
            if value in recorded:
                reads[piece].setdefault(recorded[value], set()).add(value)
            else:
                readers.setdefault(value, set()).add(piece)
    done_exports: list[ExportSpec] = []
    writes: list[list[ExportSpec]] = [[] for _ in range(n_pieces)]
    n_missing = [0] * n_pieces
    for number, (source, consumers, values) in enumerate(_group(readers, home)):
        export = ExportId(f"{attempt}.e{number}")
        feeds: tuple[Feed, ...] = ()
        if source >= 0:
            feeds = tuple(Feed(strands[piece], 0) for piece in consumers)
        spec = ExportSpec(export, values, len(values), len(consumers), False, feeds)
        (writes[source] if source >= 0 else done_exports).append(spec)
        for piece in consumers:
            reads[piece][export] = set(values)
            n_missing[piece] += source >= 0
    for spec in exports:
        _share(spec, home, done_exports, writes)
    spawns = tuple(
        Spawn(
            strand=strands[piece],
            base=base,
            part=Part(
                tuple(t for t, p in home.items() if p == piece),
                tuple((e, tuple(sorted(reads[piece][e]))) for e in sorted(reads[piece])),
                tuple(writes[piece]),
            ),
            inputs=tuple(sorted(reads[piece])),
            n_missing=n_missing[piece],
            n_deaths=n_deaths,
            held_bytes=FIRST_BYTES if piece == 0 else 0,
        )
        for piece in range(n_pieces)
    )
    consumed, retained = _recount(inputs, reads)
    return Split(tuple(done_exports), spawns, consumed, retained)


def _group(
    readers: Mapping[int, set[int]], home: Mapping[int, int]
) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Values by (the piece that makes them or -1 for done, their readers), in a fixed order."""
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for value in sorted(readers):
        group = (home.get(value, -1), tuple(sorted(readers[value])))
        groups.setdefault(group, []).append(value)
    return [(source, pieces, tuple(groups[source, pieces])) for source, pieces in sorted(groups)]


def _share(
    spec: ExportSpec,
    home: Mapping[int, int],
    done_exports: list[ExportSpec],
    writes: list[list[ExportSpec]],
) -> None:
    """Divide an export of the strand among those that make its values."""
    shares: dict[int, list[int]] = {}
    for value in spec.tasks:
        shares.setdefault(home.get(value, -1), []).append(value)
    for piece, values in shares.items():
        share = spec._replace(tasks=tuple(values))
        (writes[piece] if piece >= 0 else done_exports).append(share)


def _recount(
    inputs: Iterable[ExportId], reads: Sequence[Mapping[ExportId, set[int]]]
) -> tuple[tuple[ExportId, ...], tuple[tuple[ExportId, int], ...]]:
    """The strand's consumptions of an input become one for each piece that reads it.

    An input is there more than once when the strand and one that it absorbed read it.
    """
    consumed: list[ExportId] = []
    retained: list[tuple[ExportId, int]] = []
    for export, n_before in Counter(inputs).items():
        n_more = sum(export in piece for piece in reads) - n_before
        consumed.extend([export] * -n_more)
        if n_more > 0:
            retained.append((export, n_more))
    return tuple(consumed), tuple(retained)
