"""What a benchmark leaves: tables on the terminal, a JSON file, and a plot."""

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench import sides
from bench.measure import Comparison, Ratio, Timing
from bench.peers import PEERS

PACKAGES = ("wukong", "dask", "distributed", "numpy", "scikit-learn", "lmdb", "cloudpickle", *PEERS)

# Headings that leave room for the numbers on a terminal of 80 columns.
HEADINGS = {
    sides.PROCESSES: "wukong\nprocs",
    sides.THREADS: "wukong\nthreads",
    sides.DASK_GET: "dask\nget",
    sides.DASK_THREADED: "dask\nthreaded",
    sides.DASK_MULTIPROCESSING: "dask\nmultip.",
    sides.DISTRIBUTED: "distrib-\nuted",
    sides.POOL: "process\npool",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that is to be reached."""

    cases: str
    """Pattern of the names of the cases."""
    of: str
    """Side whose time is divided; several, joined by "|", stand for the best of them."""
    to: str
    """Side whose time divides."""
    must: float
    """The ratio of medians that is required."""
    aim: float
    """The ratio of medians that is hoped for."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """One measured number that is no ratio of two sides."""

    name: str
    """What was measured."""
    values: tuple[float, ...]
    """One per measurement."""
    unit: str
    """Unit of the values."""
    must: float | None
    """The largest median that is required; None: for information."""

    @property
    def median(self) -> float:
        """The median of the measurements."""
        ordered = sorted(self.values)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2


def times_table(comparisons: Sequence[Comparison]) -> Table:
    """Medians of every side; the fastest rounds are in the JSON file.

    A number in brackets says how many rounds a side has done that had used up its time.
    """
    names = list(dict.fromkeys(t.side for comparison in comparisons for t in comparison.timings))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Medians")
    table.add_column("case")
    for side in names:
        table.add_column(HEADINGS.get(side, side), justify="right", no_wrap=True)
    for comparison in comparisons:
        most = max((len(timing.seconds) for timing in comparison.timings), default=0)
        cells = {timing.side: _cell(timing, most) for timing in comparison.timings}
        table.add_row(comparison.case, *(cells.get(side, "") for side in names))
    return table


def usage_table(comparisons: Sequence[Comparison]) -> Table:
    """CPU seconds, memory and the first run of every side."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Cold runs, CPU, memory")
    for name in ("case", "side"):
        table.add_column(name)
    for name in ("first run", "median", "CPU", "memory added, MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for comparison in comparisons:
        for timing in comparison.timings:
            table.add_row(
                comparison.case,
                timing.side,
                seconds_text(timing.cold_s),
                seconds_text(timing.median_s),
                seconds_text(statistics.median(timing.cpu_s)),
                f"{max(timing.added_bytes) / 1e6:.0f}",
            )
    return table


def starts_table(starts: Iterable[sides.Start]) -> Table:
    """What every side was seen to be."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Sides")
    table.add_column("side")
    for name in ("open after", "workers seen", "BLAS threads"):
        table.add_column(name, justify="right", no_wrap=True)
    for start in starts:
        threads = ", ".join(map(str, start.blas_threads))
        table.add_row(start.side, seconds_text(start.open_s), str(start.n_workers), threads)
    return table


def ratios(
    comparisons: Iterable[Comparison], targets: Sequence[Target]
) -> list[tuple[Comparison, Target, Ratio]]:
    """Every ratio that the targets ask for and the sides allow."""
    return [
        (comparison, target, ratio)
        for comparison in comparisons
        for target in targets
        if fnmatchcase(comparison.case, target.cases)
        if (ratio := comparison.ratio(target.of, target.to)) is not None
    ]


def ratios_table(found: Iterable[tuple[Comparison, Target, Ratio]]) -> Table:
    """Ratios beside what is to be reached."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Ratios")
    for name in ("case", "of", "to"):
        table.add_column(name)
    for name in ("medians", "minima", "must", "aim"):
        table.add_column(name, justify="right", no_wrap=True)
    for comparison, target, ratio in found:
        reached = ratio.medians <= target.must
        table.add_row(
            comparison.case,
            "best wukong" if "|" in target.of else target.of,
            target.to,
            f"[{'green' if reached else 'bold red'}]{ratio.medians:.3g}[/]",
            f"{ratio.minima:.3g}",
            f"{target.must:.3g}",
            f"{target.aim:.3g}",
        )
    return table


def quantities_table(quantities: Iterable[Quantity]) -> Table:
    """Numbers beside their limits."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Limits")
    table.add_column("quantity")
    for name in ("median", "least", "must", "unit"):
        table.add_column(name, justify="right", no_wrap=True)
    for quantity in quantities:
        reached = quantity.must is None or quantity.median <= quantity.must
        table.add_row(
            quantity.name,
            f"[{'green' if reached else 'bold red'}]{quantity.median:.4g}[/]",
            f"{min(quantity.values):.4g}",
            "" if quantity.must is None else f"{quantity.must:.4g}",
            quantity.unit,
        )
    return table


def write_json(
    path: Path,
    suite: str,
    comparisons: Sequence[Comparison] = (),
    targets: Sequence[Target] = (),
    quantities: Sequence[Quantity] = (),
    starts: Sequence[sides.Start] = (),
) -> None:
    """Write all seconds, ratios and quantities, with the machine and the versions."""
    records = {
        "comparisons": [
            {
                "case": comparison.case,
                "n_tasks": comparison.n_tasks,
                "absent": comparison.absent,
                "sides": {
                    timing.side: {
                        "seconds": timing.seconds,
                        "median_s": timing.median_s,
                        "min_s": timing.min_s,
                        "cold_s": timing.cold_s,
                        "cpu_s": timing.cpu_s,
                        "added_bytes": timing.added_bytes,
                    }
                    for timing in comparison.timings
                },
            }
            for comparison in comparisons
        ],
        "ratios": [
            {"case": comparison.case, **asdict(ratio), "must": target.must, "aim": target.aim}
            for comparison, target, ratio in ratios(comparisons, targets)
        ],
        "quantities": [{**asdict(quantity), "median": quantity.median} for quantity in quantities],
        "starts": [asdict(start) for start in starts],
    }
    write_records(path, suite, records)


def write_records(path: Path, suite: str, records: object) -> None:
    """Write whatever a suite has found, with the machine and the versions."""
    record: dict[str, object] = {
        "suite": suite,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
    record.update(records if isinstance(records, dict) else {"records": records})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _cell(timing: Timing, n_rounds: int) -> str:
    n_done = len(timing.seconds)
    return seconds_text(timing.median_s) + (f" ({n_done})" if n_done < n_rounds else "")


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", ""),
    }


def versions() -> Mapping[str, str]:
    """Versions of the packages that take part, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show_header(console: Console, suite: str, n_rounds: int) -> None:
    """Say what runs where."""
    facts = machine()
    console.print(
        f"[bold]bench {suite}[/]: {n_rounds} rounds, {facts['cores']} cores "
        f"({facts['processor']}), Python {facts['python']}, "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def seconds_text(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"
