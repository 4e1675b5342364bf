"""Numbers that have a limit of their own: planning, start-up, memory, bytes and commits."""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import wukong
from bench import N_WORKERS, sides
from bench.micro import FORMS, N_TREE, Form, tree
from bench.present import Quantity
from wukong.scheduler.graph import plan_graph
from wukong.scheduler.strands import cut_strands
from wukong.workloads import WORKLOADS, prepare

MEGABYTE = 1e6
# Binary trees have one task less than a power of two.
N_LARGE, N_SMALLER = 2**20 - 1, 2**18 - 1


def planning(n_rounds: int) -> list[Quantity]:
    """Plan and strands of a tree of a million tasks, by the task, and how they grow."""
    quantities = []
    for form in FORMS:
        seconds = _planning_s(form, (N_SMALLER, N_LARGE), n_rounds)
        growth = tuple(
            large / smaller for large, smaller in zip(seconds[N_LARGE], seconds[N_SMALLER])
        )
        quantities += [
            Quantity(
                f"planning a tree of {N_LARGE:,}, {form}",
                tuple(each / N_LARGE * 1e6 for each in seconds[N_LARGE]),
                "us/task",
                25,
            ),
            Quantity(f"its growth from {N_SMALLER:,}, {form}", growth, "x", 4.4),
        ]
    return quantities


def start_up(n_rounds: int) -> list[Quantity]:
    """Import and start, each in a new process."""
    return [
        Quantity("import of wukong beyond dask's", _probe(n_rounds, "import_s"), "s", 0.25),
        Quantity("cluster ready, first task run", _probe(n_rounds, "ready_s"), "s", 1.0),
    ]


def idle_memory(n_rounds: int) -> list[Quantity]:
    """Memory of a warm cluster that does nothing."""
    found = _probe(n_rounds, "idle_bytes")
    megabytes = tuple(each / MEGABYTE for each in found)
    return [Quantity("idle memory (PSS, client not counted)", megabytes, "MB", 120)]


def blob_bytes(_: int) -> list[Quantity]:
    """Bytes put into the blob store by two processes; exact, so measured once."""
    limits_mb = {"TSQR": 2.4, "GEMM": 1_700.0}
    quantities = []
    for workload in WORKLOADS:
        if workload.name not in limits_mb:
            continue
        prepared = prepare(workload.build(True))
        with wukong.LocalCluster(n_workers=N_WORKERS, processes=True) as cluster:
            cluster.get(prepared.graph, prepared.keys)
            written_mb = cluster.report().blob_bytes_written / MEGABYTE
        name = f"bytes put into the blob store by {workload.name}"
        quantities.append(Quantity(name, (written_mb,), "MB", limits_mb[workload.name]))
    return quantities


def commits(n_rounds: int) -> list[Quantity]:
    """Commits of the tree of no-ops on two processes."""
    counts = []
    with wukong.LocalCluster(n_workers=N_WORKERS, processes=True) as cluster:
        for number in range(n_rounds):
            cluster.get(*tree("tasks", N_TREE, f"commits {number}"))
            counts.append(float(cluster.report().commits))
    return [Quantity(f"commits of a tree of {N_TREE:,}", tuple(counts), "", 40)]


def peak_memory(n_rounds: int) -> list[Quantity]:
    """Peak memory of a reduction of 2 GB beside distributed's, with small and with large chunks."""
    quantities = []
    for n_chunks in (1_024, 64):
        found: dict[str, list[float]] = {sides.PROCESSES: [], sides.DISTRIBUTED: []}
        for _ in range(n_rounds):
            for name, values in found.items():
                values += _probe(1, "peak_bytes", name, str(n_chunks))
        what = f"peak memory of a 2 GB reduction, {n_chunks:,} chunks"
        quantities += [
            Quantity(f"{what}, {name}", tuple(each / MEGABYTE for each in values), "MB", None)
            for name, values in found.items()
        ]
        ratio = tuple(
            ours / theirs for ours, theirs in zip(found[sides.PROCESSES], found[sides.DISTRIBUTED])
        )
        quantities.append(Quantity(f"{what}, over distributed's", ratio, "x", 1.0))
    return quantities


LIMITS: dict[str, Callable[[int], list[Quantity]]] = {
    "planning": planning,
    "start-up": start_up,
    "idle memory": idle_memory,
    "bytes": blob_bytes,
    "commits": commits,
    "peak memory": peak_memory,
}


def _planning_s(form: Form, sizes: Sequence[int], n_rounds: int) -> dict[int, list[float]]:
    """Seconds of planning trees of the given sizes, which take turns."""
    built = {n: tree(form, n, "planning") for n in sizes}
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(n_rounds):
        for n, (graph, keys) in built.items():
            gc.collect()
            start = time.perf_counter()
            plan = plan_graph(graph, keys)
            grain = len(plan.keys) / (4 * N_WORKERS)
            strands = cut_strands(plan.inputs_ptr, plan.inputs, [len(plan.keys) - 1], grain=grain)
            seconds[n].append(time.perf_counter() - start)
            assert strands.n_strands <= 4 * 4 * N_WORKERS, "a tree is cut into few strands"
            del plan, strands
    return seconds


def _probe(n_rounds: int, *arguments: str) -> tuple[float, ...]:
    """The probe's numbers, each from a process of its own."""
    command = [sys.executable, "-m", "bench.probe", *arguments]
    return tuple(
        float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        for _ in range(n_rounds)
    )
