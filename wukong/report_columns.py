"""What a job's run records say, as columns: tasks, their times, and pieces large enough to see.

Used by `wukong.report` and its drawings. Everything is numpy, so that a million tasks are decoded
and merged in less than a second. Also the words for numbers that all reports use.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from dask.utils import key_split

from wukong.trace import RunRecord

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def size_text(n_bytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.95:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1_000
    return f"{n_bytes:,.2f} GB"


def time_text(time_s: float) -> str:
    """Seconds for people: s, ms or us, with three digits or more."""
    if abs(time_s) < 0.9995e-3:
        return f"{time_s * 1e6:.3g} us"
    if abs(time_s) < 0.9995:
        return f"{time_s * 1e3:.3g} ms"
    return f"{time_s:,.2f} s"


def count_text(n: int, noun: str) -> str:
    """A number of things."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class TaskColumns:
    """One row for each run of a task, in the order of the records and of the tasks in them."""

    task: npt.NDArray[np.int32]
    """Task ids (n)."""
    run: npt.NDArray[np.int32]
    """Which record the row is from (n)."""
    begin_s: Floats
    """When the task began, in seconds after `origin_at` (n)."""
    end_s: Floats
    """When it ended, in seconds after `origin_at` (n)."""


def decode_tasks(records: Sequence[RunRecord], origin_at: float) -> TaskColumns:
    """Decode all records' task columns.

    A task begins when its predecessor in the run ends, the first one when the inputs are there.

    Args:
        records: runs, in any order.
        origin_at: the wall-clock time that the columns count from.
    Cost: O(tasks), about 30 ns and 24 bytes each.
    """
    task = np.frombuffer(b"".join([record.tasks for record in records]), np.int32)
    n_in_run = np.array([len(record.tasks) // 4 for record in records], np.int64)
    run = np.repeat(np.arange(len(records), dtype=np.int32), n_in_run)
    end_s = np.frombuffer(b"".join([record.ended_s for record in records]), np.float32)
    end_s = end_s.astype(np.float64)
    # float32 rounds: no task may end after its run, or slices drawn inside it would stick out.
    ran_s = np.array([record.ran_at - record.fetched_at for record in records], np.float64)
    end_s = np.minimum(end_s, np.repeat(ran_s, n_in_run))
    begin_s = np.concatenate(([0.0], end_s[:-1]))[: len(end_s)]
    begin_s[(np.cumsum(n_in_run) - n_in_run)[n_in_run > 0]] = 0.0
    fetched_s = np.array([record.fetched_at - origin_at for record in records], np.float64)
    offset_s = np.repeat(fetched_s, n_in_run)
    return TaskColumns(task, run, begin_s + offset_s, end_s + offset_s)


def function_codes(keys: Sequence[Hashable]) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The functions' names, and for each task id the number of its function among them.

    The function is the key's prefix, as in Dask's own dashboard ("sum" of `('sum-1f9c...', 0)`).
    """
    code_of_name: dict[str, int] = {}
    code_of_head: dict[Hashable, int] = {}
    codes = np.empty(len(keys), np.int32)
    for task, key in enumerate(keys):
        head = key[0] if type(key) is tuple and key else key
        code = code_of_head.get(head)
        if code is None:
            code = code_of_name.setdefault(str(key_split(head)), len(code_of_name))
            # Only tuples share heads; a cache of a million strings would never be hit.
            if head is not key:
                code_of_head[head] = code
        codes[task] = code
    return list(code_of_name), codes


@dataclass(frozen=True, slots=True)
class Lanes:
    """The executors, in a natural order of their names (w2 before w10)."""

    names: list[str]
    of_run: npt.NDArray[np.int32]
    """For each record the number of its executor (n records)."""


def lanes_of(records: Sequence[RunRecord]) -> Lanes:
    """Number the executors of these records."""
    names = sorted({record.holder for record in records}, key=_natural)
    number = {name: lane for lane, name in enumerate(names)}
    return Lanes(names, np.array([number[record.holder] for record in records], np.int32))


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def minters_of(records: Sequence[RunRecord]) -> list[int]:
    """For each run the number of the run whose commit minted its token; -1: none of these did."""
    run_of_attempt = {record.attempt: run for run, record in enumerate(records)}
    return [run_of_attempt.get(record.token.rpartition(".")[0], -1) for record in records]


@dataclass(frozen=True, slots=True)
class Spans:
    """Stretches of time, each of one executor or one run (`row`)."""

    row: Ints
    """The executor's or the run's number (n)."""
    begin_s: Floats
    end_s: Floats
    code: Ints
    """What was done; of a merged span, what took most of its time (n)."""
    n_tasks: Ints
    """Tasks in the span (n)."""


def merge_short(spans: Spans, min_s: float) -> Spans:
    """Merge neighbours of one row that are shorter than `min_s`, about `min_s` of them at a time.

    Longer spans stay as they are. At most 2 * busy time / min_s + rows spans remain, whatever the
    number of tasks.

    Args:
        spans: in any order; those of one row must not overlap.
        min_s: the shortest duration that is shown by itself; > 0.
    Returns:
        Spans ordered by row and time.
    """
    order = np.lexsort((spans.begin_s, spans.row))
    row, begin_s, end_s = spans.row[order], spans.begin_s[order], spans.end_s[order]
    code, n_tasks = spans.code[order], spans.n_tasks[order]
    if not len(order):
        return Spans(row, begin_s, end_s, code, n_tasks)
    duration_s = end_s - begin_s
    short = duration_s < min_s
    slot = np.floor(begin_s / min_s)
    opens = np.ones(len(order), bool)
    same = (row[1:] == row[:-1]) & short[1:] & short[:-1] & (slot[1:] == slot[:-1])
    opens[1:] = ~same
    first = np.flatnonzero(opens)
    if len(first) == len(order):
        return Spans(row, begin_s, end_s, code, n_tasks)
    return Spans(
        row[first],
        begin_s[first],
        np.maximum.reduceat(end_s, first),
        _longest_code(np.cumsum(opens) - 1, code, duration_s),
        np.add.reduceat(n_tasks, first),
    )


def _longest_code(piece: Ints, code: Ints, duration_s: Floats) -> Ints:
    """For each piece the code with the largest total duration; of equal ones the larger code."""
    n_codes = int(code.max()) + 1
    pairs, where = np.unique(piece * n_codes + code, return_inverse=True)
    total_s = np.bincount(where.reshape(-1), weights=duration_s)
    pair_piece = pairs // n_codes
    order = np.lexsort((total_s, pair_piece))
    last = np.flatnonzero(np.diff(pair_piece[order], append=-1))
    longest: Ints = pairs[order[last]] % n_codes
    return longest
