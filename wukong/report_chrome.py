"""A job's record as trace-event JSON, which chrome://tracing and ui.perfetto.dev read.

One row for each executor. A run is a slice with its phases inside, and the tasks inside its "run".
Tasks too short to be seen are merged into one slice that says how many they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from wukong.report_columns import Lanes, Spans, count_text, lanes_of, merge_short, minters_of
from wukong.report_drawing import Picture
from wukong.trace import RunRecord

Path: TypeAlias = "str | os.PathLike[str]"
Event: TypeAlias = "dict[str, object]"

# Tasks shorter than this part of all tasks' time are merged; the viewers bear 100,000 slices.
TASK_SLICES = 20_000


def write_chrome(picture: Picture, path: Path) -> None:
    """Write the trace-event JSON that chrome://tracing and ui.perfetto.dev read."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for number, event in enumerate(_events(picture)):
            file.write(("" if number == 0 else ",\n") + encode(event))
        file.write("\n]}\n")


def _events(picture: Picture) -> Iterator[Event]:
    """Names of the rows, then for each run its slices, outer ones first."""
    lanes = lanes_of(picture.records)
    yield {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": picture.summary}}
    for lane, name in enumerate(lanes.names):
        yield {"ph": "M", "pid": 1, "tid": lane, "name": "thread_name", "args": {"name": name}}
        sort = {"sort_index": lane}
        yield {"ph": "M", "pid": 1, "tid": lane, "name": "thread_sort_index", "args": sort}
    # The viewers want times >= 0, and another machine's clock may be before ours.
    origin = min([picture.begun_at, *(record.begun_at for record in picture.records)])
    pieces = _task_pieces(picture)
    bounds = np.searchsorted(pieces.row, np.arange(len(picture.records) + 1)).tolist()
    shift_s = picture.begun_at - origin
    for run, (record, lane) in enumerate(zip(picture.records, lanes.of_run.tolist())):
        yield from _run_slices(record, lane, origin)
        for piece in range(bounds[run], bounds[run + 1]):
            yield _task_slice(picture, pieces, piece, lane, shift_s)
    yield from _arrows(picture, lanes, origin)


def _arrows(picture: Picture, lanes: Lanes, origin: float) -> Iterator[Event]:
    """From the end of each commit to the runs that it minted."""
    for run, minter in enumerate(minters_of(picture.records)):
        if minter < 0:
            continue
        ends = (
            ("s", minter, picture.records[minter].ran_at),
            ("f", run, picture.records[run].begun_at),
        )
        for phase, at_run, at in ends:
            event: Event = {"ph": phase, "id": run, "cat": "mint", "name": "mint", "pid": 1}
            event |= {"tid": int(lanes.of_run[at_run]), "ts": round((at - origin) * 1e6, 3)}
            # A flow binds to the slice around its end, here the run that begins there.
            yield event | ({"bp": "e"} if phase == "f" else {})


def _task_pieces(picture: Picture) -> Spans:
    """The tasks of each run (`row`), short ones merged; `code` is the (longest) task's row."""
    tasks = picture.tasks
    busy_s = float((tasks.end_s - tasks.begin_s).sum())
    count = len(tasks.task)
    spans = Spans(
        tasks.run.astype(np.int64),
        tasks.begin_s,
        tasks.end_s,
        np.arange(count),
        np.ones(count, np.int64),
    )
    return merge_short(spans, max(busy_s / TASK_SLICES, 1e-9))


def _run_slices(record: RunRecord, lane: int, origin: float) -> Iterator[Event]:
    """The strand and its phases."""
    n_tasks = len(record.tasks) // 4
    phases: tuple[tuple[str, float, float, dict[str, object]], ...] = (
        (
            f"strand {record.strand}",
            record.begun_at,
            record.sent_at,
            {
                "token": record.token,
                "attempt": record.attempt,
                "start": record.n_starts,
                "invoked": record.is_invoked,
                "deaths": record.n_deaths,
                "cause of death": record.cause,
                "tasks": n_tasks,
                "round trips": record.n_round_trips,
                "copied bytes": record.copied_bytes,
                "peak memory bytes": record.peak_memory_bytes,
            },
        ),
        (
            "fetch",
            record.begun_at,
            record.fetched_at,
            {"bytes": record.bytes_read, "blobs": record.n_blobs_read},
        ),
        ("run", record.fetched_at, record.ran_at, {"tasks": n_tasks}),
        (
            "put and commit",
            record.ran_at,
            record.sent_at,
            {"bytes": record.bytes_written, "blobs": record.n_blobs_written},
        ),
    )
    for name, begin_at, end_at, arguments in phases:
        yield _slice(name, lane, begin_at - origin, end_at - origin, arguments)


def _task_slice(picture: Picture, pieces: Spans, piece: int, lane: int, shift_s: float) -> Event:
    task = int(picture.tasks.task[pieces.code[piece]])
    n_tasks = int(pieces.n_tasks[piece])
    key = str(picture.keys[task])
    begin_s, end_s = float(pieces.begin_s[piece]), float(pieces.end_s[piece])
    name = key if n_tasks == 1 else count_text(n_tasks, "task")
    arguments: dict[str, object] = {"task": task}
    if n_tasks > 1:
        arguments = {"tasks": n_tasks, "longest": key}
    return _slice(name, lane, begin_s + shift_s, end_s + shift_s, arguments)


def _slice(
    name: str, lane: int, begin_s: float, end_s: float, arguments: dict[str, object]
) -> Event:
    """A complete event; its times are microseconds, rounded so that what nests goes on nesting."""
    begin_us, end_us = round(begin_s * 1e6, 3), round(end_s * 1e6, 3)
    return {
        "ph": "X",
        "pid": 1,
        "tid": lane,
        "name": name,
        "ts": begin_us,
        "dur": round(max(0.0, end_us - begin_us), 3),
        "args": arguments,
    }
