"""Plots of comparisons, for a README: a panel for each case, a line for each side."""

from collections.abc import Sequence
from pathlib import Path

from bench import sides
from bench.measure import Comparison
from bench.present import seconds_text

OURS_COLOUR, OTHERS_COLOUR, TEXT_COLOUR = "#1f6f8b", "#b9bec4", "#33383d"
N_COLUMNS = 3
ROOM = 4.0
"""Beyond the slowest side, as a factor, for its number."""


def draw(path: Path, title: str, comparisons: Sequence[Comparison]) -> None:
    """Draw the medians on logarithmic scales, with a mark at the fastest round.

    Cases that no side was asked for are left out; one at least was asked of some.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    comparisons = [comparison for comparison in comparisons if comparison.timings]
    n_columns = min(N_COLUMNS, len(comparisons))
    n_rows = -(-len(comparisons) // n_columns)
    n_sides = max(len(comparison.timings) for comparison in comparisons)
    figure, panels = pyplot.subplots(
        n_rows,
        n_columns,
        figsize=(4.2 * n_columns, n_rows * (0.7 + 0.24 * n_sides)),
        squeeze=False,
        layout="constrained",
    )
    for panel, comparison in zip(panels.flat, comparisons):
        _draw_panel(panel, comparison)
    for panel in panels.flat[len(comparisons) :]:
        panel.set_visible(False)
    figure.suptitle(f"{title}: seconds, less is better", color=TEXT_COLOUR)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)


def _draw_panel(panel: "Axes", comparison: Comparison) -> None:  # type: ignore[name-defined]  # noqa: F821  # matplotlib is optional
    ordered = sorted(comparison.timings, key=lambda timing: -timing.median_s)
    medians = [timing.median_s for timing in ordered]
    colours = [
        OURS_COLOUR
        if timing.side in (sides.PROCESSES, sides.THREADS, sides.REDIS)
        else OTHERS_COLOUR
        for timing in ordered
    ]
    least = min(timing.min_s for timing in ordered) / 2
    rows = range(len(ordered))
    panel.hlines(rows, least, medians, colors=colours, linewidth=5)
    panel.plot([timing.min_s for timing in ordered], rows, "|", color=TEXT_COLOUR, markersize=7)
    for row, median_s in zip(rows, medians):
        text = seconds_text(median_s)
        panel.annotate(
            text, (median_s, row), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    panel.set_xscale("log")
    panel.set_xlim(least, max(medians) * ROOM)
    panel.set_yticks(rows, [timing.side for timing in ordered], fontsize=8)
    panel.set_ylim(-0.6, len(ordered) - 0.4)
    panel.set_title(comparison.case, fontsize=10, loc="left", color=TEXT_COLOUR)
    panel.tick_params(axis="x", labelsize=7, colors=TEXT_COLOUR)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
