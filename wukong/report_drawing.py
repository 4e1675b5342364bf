"""A job's record as pictures: a PNG, and HTML with SVG inside. It decides and counts nothing.

A picture has one lane for each executor. Tasks coloured by function, fetch and put hatched; what is
too short to be seen is merged with its neighbours and coloured by what took most of the time, so
that neither the file nor the time to make it grows with the number of tasks.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from wukong.report_columns import (
    Lanes,
    Spans,
    TaskColumns,
    count_text,
    function_codes,
    lanes_of,
    merge_short,
    time_text,
)
from wukong.trace import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path: TypeAlias = "str | os.PathLike[str]"

# Paul Tol's "bright" scheme and three of his "muted" one: distinct for colour-blind readers too.
COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#ddaa77",
    "#44aa99",
    "#882255",
)
OTHER_COLOUR = "#999999"
FETCH_COLOUR = "#e8e8e8"
PUT_COLOUR = "#d0d0d0"
HATCH_COLOUR = "#777777"
RESTART_COLOUR = "#cc0000"

# The axis of a PNG has about 1,400 pixels and that of an SVG 860 units; two of them can be seen.
PNG_COLUMNS = 700
SVG_COLUMNS = 430
# An SVG rectangle takes some 180 bytes, and a notebook keeps them all.
SVG_SPANS = 3_000
# A lane of fewer pixels cannot be read; beyond these numbers the busiest executors are shown.
PNG_LANES = 128
SVG_LANES = 24
MAX_NAME = 28


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is drawn."""

    keys: Sequence[Hashable]
    """Task id -> key."""
    records: Sequence[RunRecord]
    """In the order in which they began."""
    tasks: TaskColumns
    """Of these records, in seconds after `begun_at`."""
    begun_at: float
    """The job's begin, on the wall clock."""
    wall_s: float
    summary: str
    """One line about the job."""
    totals: str
    """One line about what it moved."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """One colour of a picture."""

    name: str
    colour: str
    hatch: str
    """Hatching as matplotlib writes it; empty for tasks."""
    label: str
    """The name with its tasks and time, for the legend."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """A picture, ready to be drawn."""

    lanes: list[str]
    spans: Spans
    """`row` is the lane, `code` the kind."""
    kinds: list[_Kind]
    restarts: list[tuple[float, int]]
    """(second, lane) where an attempt began that was not its token's first."""
    span_s: tuple[float, float]
    """The time axis: first and last second."""
    title: str
    totals: str


def _lay_out(picture: Picture, n_columns: int, n_lanes: int) -> _Layout:
    """Choose lanes and colours, and merge what is shorter than a column of the picture."""
    lanes, lane_of_run, note = _busiest(picture.records, lanes_of(picture.records), n_lanes)
    kinds, code_of_task = _kinds(picture)
    spans = _all_spans(picture, lane_of_run, code_of_task, len(kinds))
    begin_s = min(0.0, float(spans.begin_s.min(initial=0.0)))
    end_s = max(picture.wall_s, float(spans.end_s.max(initial=0.0)), begin_s + 1e-6)
    merged = merge_short(spans, (end_s - begin_s) / n_columns)
    seen = sorted(set(merged.code.tolist()))
    restarts = [
        (record.begun_at - picture.begun_at, int(lane))
        for record, lane in zip(picture.records, lane_of_run)
        if record.n_starts > 1 and lane >= 0
    ]
    title = picture.summary + note
    renumbered = np.searchsorted(np.array(seen, np.int64), merged.code)
    spans = Spans(merged.row, merged.begin_s, merged.end_s, renumbered, merged.n_tasks)
    shown = [kinds[code] for code in seen]
    axis = (begin_s, end_s)
    return _Layout(lanes, spans, shown, restarts, axis, title, picture.totals)


def _busiest(
    records: Sequence[RunRecord], lanes: Lanes, n_lanes: int
) -> tuple[list[str], npt.NDArray[np.int32], str]:
    """Keep the executors that ran longest; the runs of the others get lane -1."""
    if len(lanes.names) <= n_lanes:
        return lanes.names, lanes.of_run, ""
    busy_s = np.bincount(lanes.of_run, weights=[r.sent_at - r.begun_at for r in records])
    kept = np.sort(np.argsort(-busy_s, kind="stable")[:n_lanes])
    lane = np.full(len(lanes.names), -1, np.int32)
    lane[kept] = np.arange(n_lanes)
    note = f"; the {n_lanes} busiest of {len(lanes.names):,} executors"
    return [lanes.names[old] for old in kept], lane[lanes.of_run], note


def _kinds(picture: Picture) -> tuple[list[_Kind], npt.NDArray[np.int32]]:
    """The picture's colours - functions by time, others, fetch, put - and that of each task id."""
    names, code_of_task = function_codes(picture.keys)
    codes = code_of_task[picture.tasks.task]
    n_names = max(1, len(names))
    durations_s = picture.tasks.end_s - picture.tasks.begin_s
    total_s = np.bincount(codes, weights=durations_s, minlength=n_names)
    n_runs = np.bincount(codes, minlength=n_names)
    order = np.argsort(-total_s, kind="stable")[: len(names)]
    shown = order if len(order) <= len(COLOURS) + 1 else order[: len(COLOURS)]
    rest = order[len(shown) :]
    kinds = []
    for colour, code in zip((*COLOURS, OTHER_COLOUR), shown.tolist()):
        text = f"{count_text(int(n_runs[code]), 'task')}, {time_text(float(total_s[code]))}"
        kinds.append(_Kind(names[code], colour, "", f"{_short(names[code])}: {text}"))
    if len(rest):
        name = f"{len(rest)} other functions"
        text = f"{int(n_runs[rest].sum()):,} tasks, {time_text(float(total_s[rest].sum()))}"
        kinds.append(_Kind(name, OTHER_COLOUR, "", f"{name}: {text}"))
    kind_of_code = np.full(n_names, len(shown), np.int32)
    kind_of_code[shown] = np.arange(len(shown))
    for name, colour, hatch, total in (
        ("fetch", FETCH_COLOUR, "////", sum(r.fetched_at - r.begun_at for r in picture.records)),
        ("put and commit", PUT_COLOUR, "xxxx", sum(r.sent_at - r.ran_at for r in picture.records)),
    ):
        kinds.append(_Kind(name, colour, hatch, f"{name}: {time_text(total)}"))
    return kinds, kind_of_code[code_of_task]


def _all_spans(
    picture: Picture,
    lane_of_run: npt.NDArray[np.int32],
    code_of_task: npt.NDArray[np.int32],
    n_kinds: int,
) -> Spans:
    """Tasks, fetches and puts of the shown lanes; the last two kinds are fetch and put."""
    tasks, origin = picture.tasks, picture.begun_at
    times = np.array(
        [(r.begun_at, r.fetched_at, r.ran_at, r.sent_at) for r in picture.records], np.float64
    ).reshape(-1, 4)
    times -= origin
    n_runs = len(times)
    row = np.concatenate((lane_of_run[tasks.run], lane_of_run, lane_of_run)).astype(np.int64)
    spans = Spans(
        row,
        np.concatenate((tasks.begin_s, times[:, 0], times[:, 2])),
        np.concatenate((tasks.end_s, times[:, 1], times[:, 3])),
        np.concatenate(
            (code_of_task[tasks.task], np.repeat([n_kinds - 2, n_kinds - 1], n_runs))
        ).astype(np.int64),
        np.concatenate((np.ones(len(tasks.task), np.int64), np.zeros(2 * n_runs, np.int64))),
    )
    # A strand without inputs fetches nothing, for no time.
    shown = (row >= 0) & ((spans.end_s > spans.begin_s) | (spans.n_tasks > 0))
    return Spans(
        row[shown],
        spans.begin_s[shown],
        spans.end_s[shown],
        spans.code[shown],
        spans.n_tasks[shown],
    )


def _short(name: str) -> str:
    """A name that fits into a legend: its beginning and its end."""
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME // 2]}...{name[-(MAX_NAME // 2 - 3) :]}"


# ------------------------------------------------------------------ PNG


def write_png(picture: Picture, path: Path) -> None:
    """Draw the timeline with matplotlib, without its global state.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a timeline picture needs matplotlib: pip install 'wukong[demo]'"
        ) from error

    layout = _lay_out(picture, PNG_COLUMNS, PNG_LANES)
    n_lanes = max(1, len(layout.lanes))
    height_in = min(12.0, max(2.6, 1.3 + 0.45 * n_lanes, 1.3 + 0.19 * (len(layout.kinds) + 2)))
    figure = Figure(figsize=(13, height_in), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw_spans(axes, layout)
    _draw_axes(figure, axes, layout)
    figure.savefig(path, format="png")


def _draw_spans(axes: Axes, layout: _Layout) -> None:
    from matplotlib.collections import PolyCollection

    spans = layout.spans
    columns_per_s = PNG_COLUMNS / (layout.span_s[1] - layout.span_s[0])
    wide = (spans.end_s - spans.begin_s) * columns_per_s > 3
    for code, kind in enumerate(layout.kinds):
        for outlined in (False, True):
            chosen = (spans.code == code) & (wide == outlined)
            left, right = spans.begin_s[chosen], spans.end_s[chosen]
            lower = spans.row[chosen] - 0.4
            corners = np.array(
                [(left, lower), (left, lower + 0.8), (right, lower + 0.8), (right, lower)]
            ).transpose(2, 0, 1)
            edge = HATCH_COLOUR if kind.hatch else "white"
            # Spans of one column have no outline: it would hide them.
            axes.add_collection(
                PolyCollection(
                    list(corners),
                    facecolors=kind.colour,
                    edgecolors=edge,
                    hatch=kind.hatch if outlined and kind.hatch else None,
                    linewidths=0.4 if outlined else 0.0,
                    antialiaseds=outlined,
                )
            )


def _draw_axes(figure: Figure, axes: Axes, layout: _Layout) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [
        Patch(
            facecolor=kind.colour,
            edgecolor=HATCH_COLOUR if kind.hatch else kind.colour,
            hatch=kind.hatch or None,
            linewidth=0.4,
            label=kind.label,
        )
        for kind in layout.kinds
    ]
    if layout.restarts:
        at_s, lanes = zip(*layout.restarts)
        axes.scatter(at_s, lanes, marker="x", s=36, color=RESTART_COLOUR, zorder=3)
        label = f"begun again: {len(layout.restarts):,}"
        handles.append(Line2D([], [], color=RESTART_COLOUR, marker="x", linestyle="", label=label))
    n_lanes = len(layout.lanes)
    # Of many lanes only some can be named.
    step = max(1, n_lanes // 24)
    axes.set_yticks(
        range(0, n_lanes, step), [_short(name) for name in layout.lanes[::step]], fontsize=8
    )
    axes.set_ylim(max(n_lanes, 1) - 0.5, -0.5)
    axes.set_xlim(*layout.span_s)
    axes.set_xlabel("seconds since the job's begin")
    axes.set_title(f"{layout.title}\n{layout.totals}", loc="left", fontsize=10)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if handles:
        # A dollar sign in a function's name is no formula.
        legend = figure.legend(
            handles=handles, loc="outside right upper", frameon=False, fontsize=8
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


# ------------------------------------------------------------------ HTML and SVG

_SVG_WIDTH = 1_000
_SVG_LEFT = 130
_SVG_LANE = 22


def to_html(picture: Picture, cells: Sequence[tuple[str, str]]) -> str:
    """A table of counters and the timeline as SVG, in one piece of HTML without references.

    Text takes the notebook's own colour, so that dark themes work.

    Args:
        cells: the counters as (name, text).
    """
    head = "".join(f"<th style='text-align:right'>{escape(name)}</th>" for name, _ in cells)
    body = "".join(f"<td style='text-align:right'>{escape(text)}</td>" for _, text in cells)
    n_lanes = min(SVG_LANES, len({record.holder for record in picture.records}) or 1)
    layout = _lay_out(picture, min(SVG_COLUMNS, SVG_SPANS // n_lanes), SVG_LANES)
    legend = "".join(_legend_item(kind) for kind in layout.kinds)
    return (
        "<div style='font-size:small'>"
        f"<p><b>{escape(layout.title)}</b></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"
        f"{_svg(layout)}<p>{legend}</p></div>"
    )


def _legend_item(kind: _Kind) -> str:
    return (
        "<span style='white-space:nowrap;margin-right:1.5em'>"
        f"<svg width='12' height='12'><rect width='12' height='12' fill='{_fill(kind)}'/></svg> "
        f"{escape(kind.label)}</span>"
    )


def _fill(kind: _Kind) -> str:
    if not kind.hatch:
        return kind.colour
    return "url(#wukong-fetch)" if kind.colour == FETCH_COLOUR else "url(#wukong-put)"


def _svg(layout: _Layout) -> str:
    """The lanes, the spans and the axis."""
    begin_s, end_s = layout.span_s
    per_s = (_SVG_WIDTH - _SVG_LEFT - 10) / (end_s - begin_s)
    bottom = max(1, len(layout.lanes)) * _SVG_LANE
    parts = [
        f"<svg viewBox='0 0 {_SVG_WIDTH} {bottom + 22}' width='100%'"
        " xmlns='http://www.w3.org/2000/svg' font-size='11' fill='currentColor'>"
        f"<defs>{_pattern('fetch', FETCH_COLOUR, 'M0 6L6 0')}"
        f"{_pattern('put', PUT_COLOUR, 'M0 6L6 0M0 0L6 6')}</defs>"
    ]
    for second in _ticks(begin_s, end_s):
        x = _SVG_LEFT + (second - begin_s) * per_s
        parts.append(
            f"<path d='M{x:.1f} 0V{bottom}' stroke='currentColor' stroke-opacity='.15'/>"
            f"<text x='{x:.1f}' y='{bottom + 15}' text-anchor='middle'>{second:g} s</text>"
        )
    for lane, name in enumerate(layout.lanes):
        y = lane * _SVG_LANE + 15
        parts.append(
            f"<text x='{_SVG_LEFT - 6}' y='{y}' text-anchor='end'>{escape(_short(name))}</text>"
        )
    spans = layout.spans
    for lane, begin, end, code, n_tasks in zip(
        spans.row.tolist(),
        spans.begin_s.tolist(),
        spans.end_s.tolist(),
        spans.code.tolist(),
        spans.n_tasks.tolist(),
    ):
        kind = layout.kinds[code]
        many = f", {n_tasks:,} tasks" if n_tasks > 1 else ""
        parts.append(
            f"<rect x='{_SVG_LEFT + (begin - begin_s) * per_s:.2f}' y='{lane * _SVG_LANE + 2}'"
            f" width='{max(0.4, (end - begin) * per_s):.2f}' height='{_SVG_LANE - 4}'"
            f" fill='{_fill(kind)}'><title>{escape(kind.name)}{many}:"
            f" {time_text(end - begin)} from {begin:.6f} s</title></rect>"
        )
    for at_s, lane in layout.restarts:
        x, top = _SVG_LEFT + (at_s - begin_s) * per_s, lane * _SVG_LANE + _SVG_LANE // 2 - 4
        parts.append(
            f"<path d='M{x - 4:.1f} {top}l8 8m0 -8l-8 8' stroke='{RESTART_COLOUR}'"
            " stroke-width='2'><title>begun again</title></path>"
        )
    return "".join([*parts, "</svg>"])


def _pattern(name: str, colour: str, lines: str) -> str:
    return (
        f"<pattern id='wukong-{name}' width='6' height='6' patternUnits='userSpaceOnUse'>"
        f"<rect width='6' height='6' fill='{colour}'/>"
        f"<path d='{lines}' stroke='{HATCH_COLOUR}' stroke-width='.7'/></pattern>"
    )


def _ticks(begin_s: float, end_s: float) -> list[float]:
    """Five to ten round numbers between two seconds."""
    power = 10.0 ** np.floor(np.log10((end_s - begin_s) / 5))
    step = next(s for s in (5 * power, 2 * power, power) if (end_s - begin_s) / s >= 5)
    first, last = int(np.ceil(begin_s / step)), int(np.floor(end_s / step))
    return [round(float(number * step), 9) for number in range(first, last + 1)]
