"""The commands of the benchmarks. Every one prints tables and writes JSON, most a plot too."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from bench import N_WORKERS, present, sides
from bench import calibrate as calibrate_suite
from bench import futures as futures_suite
from bench import linalg as linalg_suite
from bench import micro as micro_suite
from bench.drawing import draw
from bench.measure import Case, Comparison, compare
from bench.peers import PEERS
from bench.present import Target
from bench.service import Service, measure_service
from wukong.sim.schemes import SCHEMES
from wukong.storage import open_store

console = Console()

MICRO_TARGETS = [
    *(
        Target(cases, of, to, must, aim)
        for cases in ("*independent*", "tree of 8,191*", "chain*", "fan*")
        for of, to, must, aim in (
            (sides.PROCESSES, sides.DISTRIBUTED, 1 / 40, 1 / 100),
            (sides.REDIS, sides.DISTRIBUTED, 1 / 30, 1 / 60),
            (sides.THREADS, sides.DASK_THREADED, 0.35, 0.2),
        )
    ),
    Target("tree of 64 leaves*", sides.PROCESSES, sides.POOL, 0.5, 0.2),
    Target("one warm call*", sides.PROCESSES, sides.POOL, 4, 2),
]
BEST = f"{sides.PROCESSES}|{sides.THREADS}"
LINALG_TARGETS = [
    Target("*", sides.PROCESSES, sides.DISTRIBUTED, 0.8, 0.65),
    Target("*", BEST, sides.DASK_THREADED, 1.03, 0.95),
]
COMPARE_TARGETS = [
    Target("*", BEST, peer, 1.0, 0.8)
    for peer in (sides.DASK_THREADED, sides.DISTRIBUTED, *PEERS, sides.POOL)
]
TIMED_PART = 0.6
"""Of the time of a comparison, for timed rounds; the rest is for first runs and for checks."""
LEAST_S = 3.0
"""Of a side and a case, even where nothing is left of the time."""
# A process pool has no dependencies and dask.get one core: neither can run the workloads' way.
LINALG_SIDES = [name for name in sides.LOCAL if name not in (sides.POOL, sides.DASK_GET)]


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that all suites have."""
    for option in (
        click.option("--rounds", default=5, show_default=True, help="Measurements of each side."),
        click.option(
            "--only", multiple=True, metavar="TEXT", help="Cases whose names contain this."
        ),
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            default=Path("bench/results"),
            show_default=True,
            help="Folder of the JSON file and the plot.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure Wukong beside Dask's schedulers, in turns, in one tree of processes."""


@main.command()
@common_options
@click.option(
    "--side", "names", multiple=True, type=click.Choice(sides.ALL), help="Sides; all by default."
)
@click.option(
    "--form",
    type=click.Choice([*micro_suite.FORMS, "both"]),
    default="both",
    show_default=True,
    help="How the graphs' tasks are written.",
)
def micro(rounds: int, only: tuple[str, ...], out: Path, names: tuple[str, ...], form: str) -> None:
    """Graphs of no-ops: what is left is the scheduler's own work."""
    cases = [
        dataclasses.replace(case, name=f"{case.name}, {each}")
        for each in micro_suite.FORMS
        if form in (each, "both")
        for case in micro_suite.cases(each)
    ]
    _run("micro", _chosen(cases, only), names or sides.ALL, rounds, MICRO_TARGETS, out)


@main.command()
@common_options
@click.option(
    "--side",
    "names",
    multiple=True,
    type=click.Choice(LINALG_SIDES),
    help="Sides; all by default.",
)
@click.option("--small", is_flag=True, help="The sizes of `wukong demo`.")
def linalg(
    rounds: int, only: tuple[str, ...], out: Path, names: tuple[str, ...], small: bool
) -> None:
    """The paper's six workloads at full size, every result checked."""
    cases = linalg_suite.cases(only, full=not small)
    if not cases:
        raise click.UsageError(f"no workload is called {' or '.join(only)}")
    _run("linalg", cases, names or LINALG_SIDES, rounds, LINALG_TARGETS, out)


@main.command(name="compare")
@common_options
@click.option(
    "--side",
    "names",
    multiple=True,
    type=click.Choice(sides.COMPARED),
    help="Sides; all by default.",
)
@click.option("--small", is_flag=True, help="The workloads at the sizes of `wukong demo`.")
@click.option(
    "--minutes",
    default=12.0,
    show_default=True,
    help="For all of it: a side that has used its share of a case's time begins no further round.",
)
def compare_peers(
    rounds: int,
    only: tuple[str, ...],
    out: Path,
    names: tuple[str, ...],
    small: bool,
    minutes: float,
) -> None:
    """Micro graphs and workloads beside what people use instead: Ray, Parsl, Lithops, ..."""
    micro = [*micro_suite.cases("tasks"), micro_suite.tiny_tree("tasks")]
    cases = [*micro, *linalg_suite.cases((), full=not small)]
    _run(
        "compare",
        _chosen(cases, only),
        names or sides.COMPARED,
        rounds,
        COMPARE_TARGETS,
        out,
        total_s=60 * minutes,
    )


@main.command()
@common_options
def limits(rounds: int, only: tuple[str, ...], out: Path) -> None:
    """Planning, start-up, memory, bytes and commits, beside what they must not exceed."""
    from bench.limits import LIMITS

    present.show_header(console, "limits", rounds)
    quantities = []
    for name, measure in LIMITS.items():
        if only and not any(text in name for text in only):
            continue
        with console.status(name):
            quantities += measure(rounds)
    console.print(present.quantities_table(quantities))
    present.write_json(out / "limits.json", "limits", quantities=quantities)
    console.print(f"written: {out / 'limits.json'}")


@main.command()
@common_options
def leases(rounds: int, only: tuple[str, ...], out: Path) -> None:
    """Leased executors beside bare ping-pongs and process pools; copies, and what kills leave."""
    from bench.leases import LEASES

    present.show_header(console, "leases", rounds)
    quantities = []
    for name, measure in LEASES.items():
        if only and name not in only:
            continue
        with console.status(name):
            quantities += measure(rounds)
    console.print(present.quantities_table(quantities))
    present.write_json(out / "leases.json", "leases", quantities=quantities)
    console.print(f"written: {out / 'leases.json'}")


@main.command()
@common_options
@click.option(
    "--scheme",
    "names",
    multiple=True,
    type=click.Choice(list(SCHEMES)),
    help="Schemes; all by default.",
)
def baselines(rounds: int, only: tuple[str, ...], out: Path, names: tuple[str, ...]) -> None:
    """Ours, ours without each idea, and the ideas of others, on one engine; everything counted."""
    from bench import baselines as suite

    present.show_header(console, "baselines", rounds)
    outcomes: list[suite.Outcome] = []
    try:
        with (
            _progress("opening the schemes") as tell,
            suite.open_schemes(names or list(SCHEMES)) as clusters,
        ):
            for case in suite.cases(only):
                outcomes += suite.run_case(case, clusters, rounds, tell)
    finally:
        Console(width=max(console.width, 120)).print(suite.table(outcomes))
        ratios = suite.operation_ratios(outcomes)
        for name, ratio in ratios.items():
            state = "green" if ratio <= suite.OPERATIONS_MUST else "bold red"
            text = f"operations of ours / wukong2020 [{state}]1/{1 / ratio:.1f}[/]"
            console.print(f"{name}: {text}, wanted 1/{1 / suite.OPERATIONS_MUST:.0f}")
        records = {"outcomes": [o.to_dict() for o in outcomes], "operation_ratios": ratios}
        present.write_records(out / "baselines.json", "baselines", records)
        console.print(f"written: {out / 'baselines.json'}")


@main.command()
@common_options
@click.option("--full", is_flag=True, help="The workloads at full size, not that of the demo.")
def calibrate(rounds: int, only: tuple[str, ...], out: Path, full: bool) -> None:
    """The simulator's predictions for this machine beside what the workloads take on it."""
    present.show_header(console, "calibrate", rounds)
    predictions: list[calibrate_suite.Prediction] = []
    with _progress("this machine") as tell:
        machine = calibrate_suite.measure_platform(tell)
        console.print(calibrate_suite.platform_table(machine))
        try:
            with calibrate_suite.open_clusters() as clusters:
                for case in calibrate_suite.cases(only, full):
                    predictions.append(
                        calibrate_suite.predict(case, clusters, machine, rounds, tell)
                    )
        finally:
            if predictions:
                _show_predictions(machine, predictions, out)


def _show_predictions(
    machine: calibrate_suite.Machine, predictions: Sequence[calibrate_suite.Prediction], out: Path
) -> None:
    console.print(calibrate_suite.table(predictions))
    error = calibrate_suite.mean_error(predictions)
    state = "green" if error <= calibrate_suite.ERROR_MUST else "bold red"
    console.print(f"off by a factor of [{state}]{1 + error:.3f}[/] in the geometric mean")
    records = {
        "machine_model": dataclasses.asdict(machine),
        "predictions": [each.to_dict() for each in predictions],
        "mean_error": error,
    }
    present.write_records(out / "calibrate.json", "calibrate", records)
    console.print(f"written: {out / 'calibrate.json'}")


@main.command()
@click.argument("suites", nargs=-1)
@click.option(
    "--store",
    "url",
    metavar="URL",
    help="Measure a commit's service time there, e.g. redis://127.0.0.1; the embedded store else.",
)
@click.option(
    "--service-us",
    nargs=2,
    type=float,
    metavar="COMMIT ROW",
    help="Microseconds of a commit and of each row, instead of measuring them: the same numbers.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench/results"),
    show_default=True,
    help="Folder of the JSON files and the plots.",
)
def scale(
    suites: tuple[str, ...], url: str | None, service_us: tuple[float, float] | None, out: Path
) -> None:
    """Ten thousand executors and more, in simulation; SUITES: tree strong weak gemm ..."""
    from bench import scale as scale_suite
    from bench.scale_workloads import SUITES

    unknown = set(suites) - SUITES.keys()
    if unknown:
        raise click.UsageError(f"no suite {', '.join(unknown)}; there are: {', '.join(SUITES)}")
    if service_us is None:
        with tempfile.TemporaryDirectory() as folder:
            service = measure_service(open_store(url or f"local://{folder}/store"), 20)
        where = url or "embedded store"
    else:
        service = Service(service_us[0] * 1e-6, service_us[1] * 1e-6)
        where = "given"
    console.print(
        f"[bold]bench scale[/]: a commit occupies the server for {service.fixed_s * 1e6:.0f} us "
        f"and {service.row_s * 1e6:.1f} us a row ({where})"
    )
    for name in suites or SUITES:
        with console.status(name) as line:
            outcomes = scale_suite.run_suite(SUITES[name], service, line.update)
        Console(width=max(console.width, 150)).print(scale_suite.table(outcomes))
        records = [outcome.to_dict() for outcome in outcomes]
        present.write_records(out / f"scale-{name}.json", f"scale {name}", records)
        scale_suite.draw(out / f"scale-{name}.png", outcomes)


@main.command()
@common_options
@click.option(
    "--side",
    "names",
    multiple=True,
    type=click.Choice(futures_suite.SIDES),
    help="Sides; all by default.",
)
def futures(rounds: int, only: tuple[str, ...], out: Path, names: tuple[str, ...]) -> None:
    """Futures of distributed's client, on Wukong's cluster and on its own; memory and age."""
    present.show_header(console, "futures", rounds)
    comparisons: list[Comparison] = []
    quantities: list[present.Quantity] = []
    limited: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        console.status("starting the servers") as line,
        futures_suite.open_served(names or futures_suite.SIDES, folder) as served,
    ):
        for case in futures_suite.cases():
            if not only or any(text in case.name for text in only):
                compared, slow = futures_suite.compare_futures(case, served, rounds, line.update)
                comparisons.append(compared)
                limited += [
                    f"{case.name}, {name}: > {futures_suite.LIMIT_S:.0f} s" for name in slow
                ]
        for name, measure in (("memory", futures_suite.held_memory), ("age", futures_suite.age)):
            if not only or name in only:
                quantities += measure(served, line.update)
    if comparisons:
        console.print(present.times_table(comparisons))
        console.print(present.ratios_table(present.ratios(comparisons, futures_suite.TARGETS)))
    for text in limited:
        console.print(f"{text}, and counts as that; its ratio is an upper bound")
    if quantities:
        console.print(present.quantities_table(quantities))
    path = out / "futures.json"
    present.write_json(path, "futures", comparisons, futures_suite.TARGETS, quantities=quantities)
    console.print(f"written: {path}")


@contextmanager
def _progress(text: str) -> Iterator[Callable[[str], None]]:
    """What is done now: one line that changes on a terminal, else a line each with its time."""
    begun_at = time.perf_counter()
    if console.is_terminal:
        with console.status(text) as line:
            yield line.update
        return

    def tell(text: str) -> None:
        print(f"{time.perf_counter() - begun_at:6.1f} s  {text}", flush=True)

    tell(text)
    yield tell


def _chosen(cases: Sequence[Case], only: tuple[str, ...]) -> list[Case]:
    chosen = [case for case in cases if not only or any(text in case.name for text in only)]
    if not chosen:
        raise click.UsageError(f"choose from {', '.join(case.name for case in cases)}")
    return chosen


def _run(
    suite: str,
    cases: Sequence[Case],
    names: Sequence[str],
    n_rounds: int,
    targets: Sequence[Target],
    out: Path,
    total_s: float | None = None,
) -> None:
    """Compare, show and write; what is done is written even if a later case fails.

    Args:
        total_s: to be kept to; then CPU seconds, memory and starts are measured too.
    """
    present.show_header(console, suite, n_rounds)
    begun_at = time.perf_counter()
    comparisons: list[Comparison] = []
    absent: list[str] = []
    starts: list[sides.Start] = []
    is_metered, limit_s = total_s is not None, math.inf
    try:
        with (
            _progress("opening the sides") as tell,
            sides.open_sides(
                names, N_WORKERS, absent.append, starts.append if is_metered else None, tell
            ) as opened,
        ):
            for number, case in enumerate(cases):
                if total_s is not None:
                    left_s = max(0.0, total_s - (time.perf_counter() - begun_at))
                    share_s = TIMED_PART * left_s / ((len(cases) - number) * len(opened))
                    limit_s = max(LEAST_S, share_s)
                comparisons.append(compare(case, opened, n_rounds, tell, is_metered, limit_s))
    finally:
        if comparisons:
            wide = Console(width=max(console.width, 130)) if is_metered else console
            wide.print(present.times_table(comparisons))
            if is_metered:
                wide.print(present.starts_table(starts))
                wide.print(present.usage_table(comparisons))
            for why in [*absent, *(f"{c.case}: {each}" for c in comparisons for each in c.absent)]:
                console.print(f"absent: {why}")
            console.print(present.ratios_table(present.ratios(comparisons, targets)))
            present.write_json(out / f"{suite}.json", suite, comparisons, targets, starts=starts)
            draw(out / f"{suite}.png", f"bench {suite}", comparisons)
            console.print(f"written: {out / suite}.json and .png")
