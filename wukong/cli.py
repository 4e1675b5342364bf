"""The command line: `wukong demo`, `wukong doctor`, `wukong bench`, `wukong sweep`.

Prints, and knows how things look; what is computed is in `wukong.workloads`, and what is measured
over many rounds is in the `bench` package of the source tree.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from wukong.report import Report
    from wukong.sweep import Sweep
    from wukong.workloads import Check, Prepared, Problem, Workload

Get: TypeAlias = Callable[..., object]

console = Console()

# What each extra brings that can be looked for, and what its packages need of the system.
EXTRAS = {
    "demo": ("dask-ml", "scikit-learn", "matplotlib", "threadpoolctl"),
    "client": ("distributed",),
    "redis": ("redis",),
    "aws": ("boto3", "aiobotocore"),
    "lambda": ("aiohttp", "awslambdaric"),
    "rdma": ("ibverbs",),
    "bench": ("distributed", "matplotlib", "psutil", "scikit-learn", "dask-ml", "pandas"),
    "test": ("pytest", "hypothesis", "mypy", "ruff", "psutil", "xarray"),
}
SYSTEM_PACKAGES = {"rdma": "also the system's rdma-core (Debian: apt install ibverbs-providers)"}
CORE = ("dask", "numpy", "cloudpickle", "lmdb", "click", "rich")

# A pool's blobs lie in shared memory: with less than this a GEMM of moderate size does not fit.
SMALL_SHARED_MEMORY_BYTES = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


# Commands whose modules are imported when they are called, or listed.
ELSEWHERE = {
    "agent": "wukong.rdma.commands:agent",
    "aws": "wukong.aws.commands:aws",
    "lambda-local": "wukong.aws.commands:lambda_local",
    "scheduler": "wukong.cli_scheduler:scheduler",
}


class _Commands(click.Group):
    """The commands of this file, and those of `ELSEWHERE`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in ELSEWHERE:
            return super().get_command(context, name)
        module, _, attribute = ELSEWHERE[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="wukong", prog_name="wukong")
def main() -> None:
    """Run Dask graphs on executors that invoke each other, without a scheduler.

    Start with `wukong demo`. In Python: `import wukong`, then `x.compute(scheduler="wukong")`.
    """


@main.command()
@click.option("--workers", "n_workers", default=2, show_default=True, help="Number of executors.")
@click.option("--threads", is_flag=True, help="Threads as executors instead of processes.")
@click.option("--only", multiple=True, metavar="NAME", help="Run this workload only; repeatable.")
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("wukong-demo.png"),
    show_default=True,
    help="Where the timeline of one job is drawn.",
)
def demo(n_workers: int, threads: bool, only: tuple[str, ...], timeline: Path) -> None:
    """Run and check the paper's six workloads.

    Every workload is an ordinary Dask collection. It runs once on Wukong and once on
    dask.threaded, both warmed up, and its result is compared with numpy's or scikit-learn's.
    Ends with status 1 if a result is wrong.
    """
    import dask.threaded

    import wukong
    from wukong.workloads import WORKLOADS

    names = {name.lower() for name in only}
    chosen = [workload for workload in WORKLOADS if not names or workload.name.lower() in names]
    if not chosen:
        known = ", ".join(workload.name for workload in WORKLOADS)
        raise click.BadParameter(f"choose from {known}", param_hint="--only")
    console.print(
        f"[bold]Wukong {importlib.metadata.version('wukong')}[/]: {n_workers} "
        f"{'threads' if threads else 'processes'} on {_cores()} cores, Python "
        f"{platform.python_version()}, dask {dask.__version__}\n"
    )
    counters, verdicts = _demo_tables()
    n_wrong, drawn = 0, False
    with (
        _blas_threads(max(1, _cores() // n_workers)),
        wukong.LocalCluster(n_workers=n_workers, processes=not threads) as cluster,
    ):
        for workload in chosen:
            made = _made(workload)
            if made is None:
                continue
            problem, prepared = made
            for get in (cluster.get, dask.threaded.get):
                get(prepared.graph, prepared.keys)  # the first run imports; it is not compared
            result, wukong_s = _run(f"{workload.name:<5} wukong", cluster.get, prepared)
            report = cluster.report()
            if workload.name == "GEMM" or len(chosen) == 1:
                drawn = _draw(report, timeline)
            _, threaded_s = _run(f"{workload.name:<5} dask.threaded", dask.threaded.get, prepared)
            checks = problem.check(prepared.finish(result))
            n_wrong += not all(check.passed for check in checks)
            counters.add_row(*_demo_row(workload.name, wukong_s, threaded_s, report))
            for check in checks:
                verdicts.add_row(*_check_row(workload, check))
    console.print()
    console.print(counters)
    console.print(verdicts)
    if drawn:
        console.print(f"Timeline of one job: {timeline}")
    if n_wrong:
        console.print(f"[bold red]{n_wrong} of the results are wrong.[/]")
        raise SystemExit(1)


@main.command()
@click.option("--function", help="Look at this function of AWS Lambda too.")
@click.option("--store", help="And at the way to this store, as redis://...")
@click.option("--blobs", help="And to these blobs, s3://bucket/prefix.")
@click.option("--region", help="Of the function; by default the SDK's.")
@click.option("--endpoint-url", help="Of another service that speaks Lambda's API.")
def doctor(
    function: str | None,
    store: str | None,
    blobs: str | None,
    region: str | None,
    endpoint_url: str | None,
) -> None:
    """Show what is installed and what is missing.

    Lists versions, extras and how to get them, cores, memory, shared memory and BLAS; of a function
    its credentials, versions, limits, and how far it is from its store.
    Ends with status 1 if something that every job needs is missing, or wrong with the function.
    """
    problems = []
    console.print(_package_table())
    console.print(_machine_table())
    for package in CORE:
        if _version(package) is None:
            problems.append(f"{package} is missing: pip install {package}")
    if not SHARED_MEMORY.is_dir():
        problems.append(f"{SHARED_MEMORY} is missing: blobs of local executors would go to disk")
    elif (free := shutil.disk_usage(SHARED_MEMORY).free) < SMALL_SHARED_MEMORY_BYTES:
        problems.append(
            f"only {_bytes(free)} of shared memory are free: larger values are spilled to disk "
            "(in a container: run it with a larger --shm-size)"
        )
    for problem in problems:
        console.print(f"[yellow]![/] {problem}")
    if not problems:
        console.print("[green]Everything that local jobs need is here.[/]")
    n_wrong = 0
    if function or store:
        from wukong.aws.commands import examine

        n_wrong = examine(function, store, blobs, region=region, endpoint_url=endpoint_url)
    if n_wrong or any(_version(package) is None for package in CORE):
        raise SystemExit(1)


@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Compare with Dask's schedulers, measured.

    Everything behind `bench` is handed to the benchmarks of the source tree;
    `wukong bench --help` lists them.
    """
    import wukong

    root = Path(wukong.__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        raise click.ClickException(
            "the benchmarks are part of the source tree, not of the installed package: "
            "clone the repository and run `make bench` there"
        )
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(root), inherited] if inherited else [str(root)])
    command = [sys.executable, "-m", "bench", *arguments]
    raise SystemExit(subprocess.call(command, env={**os.environ, "PYTHONPATH": path}))


@main.command()
@click.argument("place", metavar="DIRECTORY|URL")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.05),
    default=5.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Look once.")
def sweep(place: str, every_s: float, once: bool) -> None:
    """Look after the jobs of a store whose client is gone.

    DIRECTORY is that of a LocalCluster, URL a store as redis://host. What a dead or silent executor
    held is queued again, and the pools that wait there are woken. A job goes on as long as any pool
    works there; wukong.attach starts one, and returns the results.
    """
    from wukong.errors import StoreError
    from wukong.sweep import sweep_directory, sweep_store

    while True:
        try:
            found = sweep_store(place) if "://" in place else sweep_directory(Path(place))
        except (StoreError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        for line in _sweep_lines(found):
            console.print(line, highlight=False, soft_wrap=True)
        if once:
            return
        time.sleep(every_s)


def _sweep_lines(found: "Sweep") -> Iterator[str]:
    """What a look at a store has found, a line for each job."""
    if not found.jobs:
        yield "no jobs"
    for job in found.jobs:
        view = job.view
        line = f"job {view.job}: {view.status.name.lower()}, "
        line += f"{view.n_tasks_done} of {view.n_tasks} tasks done, "
        line += f"{view.n_running} strands running, {view.n_queued} queued"
        if job.n_invoked:
            line += f"; {job.n_invoked} were silent and start again"
        if view.lost:
            line += "; stored values were lost: its client, or wukong.attach, has to run them again"
        yield line
    if found.n_pools == 0:
        yield "no executors wait there; wukong.attach(job, directory) starts some"
    elif found.n_pools:
        yield f"pools woken: {found.n_pools}"


def _made(workload: "Workload") -> "tuple[Problem, Prepared] | None":
    """The workload at the demo's size, or None with a line that says what is missing."""
    from wukong.workloads import MissingExtra, prepare

    try:
        problem = workload.build(False)
    except MissingExtra as missing:
        console.print(f"[yellow]{workload.name} is left out:[/] {missing}")
        return None
    return problem, prepare(problem)


def _run(label: str, get: Get, prepared: "Prepared") -> "tuple[Sequence[object], float]":
    """Run `get` under a progress bar; its result and its seconds."""
    with _progress(label):
        start = time.perf_counter()
        result = get(prepared.graph, prepared.keys)
        elapsed_s = time.perf_counter() - start
    assert isinstance(result, list | tuple)
    return result, elapsed_s


@contextmanager
def _progress(label: str) -> Iterator[None]:
    """Show how many of the tasks are done, as Dask's callbacks tell it."""
    from dask.callbacks import Callback

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        row = bar.add_task(label, total=None)

        def start_state(graph: object, state: dict[str, dict[object, object]]) -> None:
            bar.update(row, total=sum(len(state[name]) for name in ("ready", "waiting")))

        def posttask(*_: object) -> None:
            bar.advance(row)

        def finish(*_: object) -> None:
            # Whatever was merged into other tasks is done too.
            bar.update(row, completed=bar.tasks[row].total or bar.tasks[row].completed)

        with Callback(start_state=start_state, posttask=posttask, finish=finish):
            yield


def _blas_threads(n_threads: int) -> AbstractContextManager[object]:
    """Limit this process' BLAS as the executors limit theirs, so that no side has more cores."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return nullcontext()
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(n_threads, user_api="blas")
    return limits


def _draw(report: "Report", path: Path) -> bool:
    """Draw the job's timeline; False, with a line, where matplotlib is missing."""
    try:
        report.timeline(path)
    except ImportError as missing:
        console.print(f"[yellow]No timeline:[/] {missing}")
        return False
    return True


def _demo_tables() -> tuple[Table, Table]:
    """Empty tables of the times and counters, and of the checks."""
    counters = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Time and work")
    counters.add_column("", no_wrap=True, min_width=5)
    for name in ("wukong", "threaded", "tasks", "strands", "invoked", "commits", "read", "written"):
        counters.add_column(name, justify="right", no_wrap=True)
    checks = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Results")
    for name in ("", "computes", "checked"):
        checks.add_column(name, no_wrap=True, min_width=5)
    for name in ("error", "tolerance"):
        checks.add_column(name, justify="right", no_wrap=True)
    return counters, checks


def _demo_row(name: str, wukong_s: float, threaded_s: float, report: "Report") -> list[str]:
    return [
        f"[bold]{name}[/]",
        f"{wukong_s:.2f} s",
        f"{threaded_s:.2f} s",
        f"{report.tasks:,}",
        f"{report.strands:,}",
        f"{report.invocations:,}",
        f"{report.commits:,}",
        _bytes(report.bytes_read),
        _bytes(report.bytes_written),
    ]


def _check_row(workload: "Workload", check: "Check") -> list[str]:
    colour = "green" if check.passed else "bold red"
    return [
        f"[bold]{workload.name}[/]",
        workload.title,
        check.what,
        f"[{colour}]{check.error:.1e}[/]",
        f"{check.tolerance:.0e}",
    ]


def _package_table() -> Table:
    table = Table(title="Packages", title_justify="left")
    table.add_column("for")
    table.add_column("found")
    table.add_column("missing, and how to get it")
    rows = {"wukong": ("wukong", *CORE), **EXTRAS}
    for name, packages in rows.items():
        found = [f"{package} {version}" for package in packages if (version := _version(package))]
        missing = [package for package in packages if _version(package) is None]
        hint = ""
        if missing:
            hint = f"{', '.join(missing)}: pip install {_requirement(name)}"
            hint += f"; {SYSTEM_PACKAGES[name]}" if name in SYSTEM_PACKAGES else ""
        table.add_row(name, ", ".join(found), hint)
    return table


def _requirement(extra: str) -> str:
    """What pip has to be given for the extra, escaped for rich."""
    root = Path(__file__).resolve().parents[1]
    package = f"--editable '{root}" if (root / "pyproject.toml").is_file() else "'wukong"
    return package + (f"\\[{extra}]'" if extra in EXTRAS else "'")


def _machine_table() -> Table:
    table = Table(title="Machine", title_justify="left", show_header=False)
    table.add_row("Python", f"{platform.python_version()} ({sys.executable})")
    table.add_row("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    table.add_row("cores", f"{_cores()} usable of {os.cpu_count()}")
    table.add_row("memory", f"{_bytes(_memory_bytes())}, limit of the container: {_cgroup_limit()}")
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        table.add_row("shared memory", f"{_bytes(usage.total)}, {_bytes(usage.free)} free")
    table.add_row("executors", "processes forked by a small process of their own, or threads")
    table.add_row("BLAS", _blas())
    table.add_row("RDMA", _rdma())
    return table


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use, which containers and taskset lower."""
    return len(os.sched_getaffinity(0))


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limit() -> str:
    for path in CGROUP_LIMITS:
        if Path(path).is_file():
            text = Path(path).read_text(encoding="ascii").strip()
            # Version 1 writes a number beyond any memory where version 2 writes "max".
            if text != "max" and int(text) < _memory_bytes():
                return _bytes(int(text))
    return "none"


def _blas() -> str:
    """The libraries that numpy multiplies with, with their threads."""
    import numpy as np

    if importlib.util.find_spec("threadpoolctl") is None:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    from threadpoolctl import threadpool_info

    np.linalg.inv(np.eye(1))  # loads the library
    return ", ".join(
        f"{library['internal_api']} {library['version']}, {library['num_threads']} threads"
        for library in threadpool_info()
    )


def _rdma() -> str:
    """The ports that leased executors are reached by, or what is missing for that."""
    from wukong.rdma.ports import find_ports
    from wukong.rdma.transport_verbs import missing
    from wukong.rdma.verbs import find_bindings

    ports = ", ".join(f"{port.device} port {port.number}" for port in find_ports())
    # Square brackets are rich's: those of an extra's name are shown as they are.
    return missing().replace("[", "\\[") or f"{ports}, by {find_bindings()[0]}"


def _bytes(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1_000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1_000
    return f"{n_bytes:.2f} GB"
