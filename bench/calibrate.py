"""The simulator against the real thing: what it predicts for this machine, and what is measured.

Three kinds of numbers go in, and none of them is the wall time that is predicted:

- latencies of the store, of blobs and of waking an executor, from micro graphs and single
  operations (`measure_platform`);
- for each workload the seconds of its tasks and of reading their programs, from traced runs of
  clusters of one executor. Two of them run at once, as the two executors of the predicted run do:
  tasks that want the bandwidth of the memory take longer then, and the factor is reported;
- what the client does by itself: planning, encoding, reading results.

The predicted run has the same plan, the same strands and the same policy, on a virtual clock.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from bench import N_WORKERS
from bench import linalg as linalg_suite
from bench import micro as micro_suite
from bench.baseline_cluster import sizes_of
from bench.measure import Built, Case
from bench.present import seconds_text
from bench.service import measure_service
from wukong import LocalCluster, trace
from wukong.cluster_base import executor_policy
from wukong.executor.messages import BlobId, ExportId, JobId, Located
from wukong.executor.wire import PutRequest, Traffic, open_wire
from wukong.job_driver import JobRun, OnTasks
from wukong.scheduler.graph import plan_graph
from wukong.scheduler.parts import static_parts
from wukong.scheduler.plan import Plan, flatten_slots
from wukong.scheduler.strands import Strands, pack_strands
from wukong.sim import LOCAL_POOL, Costs, Dag, Platform, Setting, run_world
from wukong.storage import Store, open_store
from wukong.submit import cut_plan, submit_plan

SEEDS = range(5)
"""Latencies are drawn; predictions are means over these."""
N_CHAIN = (50, 250)
"""Strands of the chains by which a strand's own cost is measured."""
BLOB_BYTES = (64 * 1024, 16 * 1024 * 1024)
N_REPEATS = 9
ERROR_MUST = 0.15
"""How far predictions may be off, in the geometric mean."""


class FixedCluster(LocalCluster):
    """A cluster that cuts graphs as it is told, and notes what its client does by itself."""

    strands: Strands | None = None
    """How the next graphs are cut; None: as the cluster has learned to."""
    client_s = 0.0
    """Of the last graph: planning, cutting and encoding, before anything is in the store."""
    durations: dict[int, float]
    """Of the last graph's tasks, in seconds."""
    decode_s = 0.0
    """Of each of these tasks besides: its share of its strand's program."""
    _begun_at = 0.0

    def get(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        """See `Cluster`."""
        self._begun_at = time.perf_counter()
        return super().get(dsk, keys, **kwargs)

    def cut(self, plan: Plan) -> Strands:
        """As the cluster would cut it now."""
        return cut_plan(plan, self.n_workers, self._costs, self._least_strand_s)

    def learn_now(self) -> None:
        """Take in what the last graph has taught."""
        self._chores.do_pending()

    def _compute(self, plan: Plan, timeout_s: float | None, on_tasks: OnTasks | None) -> Any:
        strands = self.cut(plan) if self.strands is None else self.strands
        submission = submit_plan(plan, strands, self._store, fail_fast=True, n_retries=0)
        self.client_s = time.perf_counter() - self._begun_at
        run: JobRun = self._run(submission, timeout_s, on_tasks)
        self._chores.add(lambda: self._learn(plan, run))
        self.durations = dict(zip(*run.durations(), strict=True))
        records = [record for record in self.report().records if not record.n_blobs_read]
        n_tasks = sum(len(trace.ints(record.tasks)) for record in records)
        self.decode_s = sum(r.fetched_at - r.begun_at for r in records) / max(1, n_tasks)
        return plan.resolve(run.values)


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured of this machine."""

    platform: Platform
    read_bytes_per_s: float
    """By which the client reads results."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One workload."""

    workload: str
    n_tasks: int
    n_strands: int
    predicted_s: float
    measured_s: tuple[float, ...]
    contention: float
    """Seconds of tasks while another executor works, over those of one alone."""

    @property
    def ratio(self) -> float:
        """Predicted over measured (the median)."""
        return self.predicted_s / statistics.median(self.measured_s)

    def to_dict(self) -> dict[str, object]:
        """All numbers, ready for JSON."""
        return {
            "workload": self.workload,
            "n_tasks": self.n_tasks,
            "n_strands": self.n_strands,
            "predicted_s": self.predicted_s,
            "measured_s": self.measured_s,
            "ratio": self.ratio,
            "contention": self.contention,
        }


def mean_error(predictions: Sequence[Prediction]) -> float:
    """The geometric mean of how far predictions are off, as a factor less one."""
    return math.exp(statistics.fmean(abs(math.log(p.ratio)) for p in predictions)) - 1


# ------------------------------------------------------------------ this machine


def measure_platform(tell: Callable[[str], None]) -> Machine:
    """Latencies of the local pool here."""
    tell("service time of a commit, and blobs")
    with FixedCluster(1) as cluster:
        store: Store = open_store(f"local://{cluster.directory}")
        service = measure_service(store, 20)
        put, read = _time_blobs(store)
        store.jobs.close()
        # One number of the simulator stands for both ways: a value is put once and read once.
        blob_bytes_per_s = 2 / (1 / put[1] + 1 / read[1])
        platform = replace(
            LOCAL_POOL,
            service_s=service.fixed_s,
            service_row_s=service.row_s,
            blob_s=(put[0] + read[0]) / 2,
            blob_bytes_per_s=blob_bytes_per_s,
            store_s=1e-9,
            invoke_s=1e-9,
            warm_start_s=1e-9,
        )
        tell("a strand's own cost")
        lengths = [_chain_strand_s(cluster, platform, n) for n in N_CHAIN]
        store_s = max(1e-9, (lengths[1] - lengths[0]) / (N_CHAIN[1] - N_CHAIN[0]))
        platform = replace(platform, store_s=store_s)
        tell("one warm call")
        platform = replace(platform, warm_start_s=max(1e-9, _wake_s(cluster, platform)))
    return Machine(platform, read[1])


def _time_blobs(store: Store) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of putting and of reading: seconds of an operation, and bytes in a second besides."""
    job = JobId(os.urandom(8).hex())
    wire = open_wire(store, job, Traffic())
    put: dict[int, list[float]] = {n: [] for n in BLOB_BYTES}
    read: dict[int, list[float]] = {n: [] for n in BLOB_BYTES}
    for number in range(N_REPEATS):
        for n_bytes in BLOB_BYTES:
            value = np.random.default_rng(number).random(n_bytes // 8)
            request = PutRequest(ExportId("0"), (0,), [value], BlobId(f"{job}/a/{number}"))
            begun_at = time.perf_counter()
            ((export, entry),) = wire.put([request])
            put[n_bytes].append(time.perf_counter() - begun_at)
            value.sum()
            warm_at = time.perf_counter()
            value.sum()
            warm_s = time.perf_counter() - warm_at
            begun_at = time.perf_counter()
            found: Any = wire.read([Located(export, (entry,))], lambda _: True)[0]
            found.sum()  # the pages of a mapping are paid for when they are touched
            read[n_bytes].append(time.perf_counter() - begun_at - warm_s)
            assert store.blobs is not None
            assert entry.blob is not None
            store.blobs.delete_many([entry.blob])
    return _line(put), _line(read)


def _line(seconds: dict[int, list[float]]) -> tuple[float, float]:
    """Through the fastest ones: what else the machine does only adds to them."""
    few, many = BLOB_BYTES
    slope = max(1e-12, (min(seconds[many]) - min(seconds[few])) / (many - few))
    return max(1e-6, min(seconds[few]) - few * slope), 1 / slope


def _chain_strand_s(cluster: FixedCluster, platform: Platform, n: int) -> float:
    """What a chain of one-task strands takes beyond what the simulator knows yet."""
    graph, keys = micro_suite.chain("tasks", n, "chain")
    plan = plan_graph(graph, keys)
    cluster.strands = _each_alone(plan)
    found = []
    for _ in range(N_REPEATS):
        wall_s = _wall_s(cluster, (graph, keys))
        found.append(wall_s - cluster.client_s - sum(cluster.durations.values()))
    dag = _dag_of(plan)
    costs = Costs([1e-9] * n, [100] * n)
    cluster.strands = None
    return statistics.median(found) - _makespan_s(
        dag, costs, static_parts(_each_alone(plan)), platform, 1
    )


def _wake_s(cluster: FixedCluster, platform: Platform) -> float:
    """From the client's invocation until an executor begins, and from its end to the client."""
    graph, keys = micro_suite.chain("tasks", 1, "one")
    plan = plan_graph(graph, keys)
    found = []
    for _ in range(5 * N_REPEATS):
        wall_s = _wall_s(cluster, (graph, keys))
        found.append(wall_s - cluster.client_s)
    parts = static_parts(_each_alone(plan))
    costs = Costs([1e-9], [100])
    return statistics.median(found) - _makespan_s(_dag_of(plan), costs, parts, platform, 1)


def _each_alone(plan: Plan) -> Strands:
    wanted = [slot for slot in flatten_slots(plan.requested) if slot >= 0]
    return pack_strands(plan.inputs_ptr, plan.inputs, wanted, np.arange(len(plan.keys)))


# ------------------------------------------------------------------ predictions


@dataclass(frozen=True, slots=True)
class Clusters:
    """All that is open while workloads are measured."""

    both: FixedCluster
    """As many executors as the prediction is about."""
    one: FixedCluster
    other: FixedCluster
    """One executor each."""


@contextmanager
def open_clusters() -> Iterator[Clusters]:
    """Open them; all are closed at the end."""
    with FixedCluster(N_WORKERS) as both, FixedCluster(1) as one, FixedCluster(1) as other:
        yield Clusters(both, one, other)


def predict(
    case: Case, clusters: Clusters, machine: Machine, n_rounds: int, tell: Callable[[str], None]
) -> Prediction:
    """Measure a workload, and predict it from runs of single executors, in turns."""
    both, one, other = clusters.both, clusters.one, clusters.other
    graph, keys = case.build("calibrate")
    tell(f"{case.name}: sizes of its values")
    sizes = sizes_of(graph, keys)
    plan = plan_graph(graph, keys)
    tell(f"{case.name}: warming")
    both.strands = None
    case.check(both.get(graph, keys))
    for cluster in (both, one, other):
        for _ in range(2):  # the second time it is cut by what was learned
            cluster.get(graph, keys)
            cluster.learn_now()
    strands = both.strands = both.cut(plan)
    alone: list[dict[int, float]] = []
    beside: list[dict[int, float]] = []
    walls, clients, decodes = [], [], []
    with ThreadPoolExecutor(2) as threads:
        for number in range(n_rounds):
            tell(f"{case.name}: round {number + 1} of {n_rounds}")
            walls.append(_wall_s(both, (graph, keys)))
            clients.append(both.client_s)
            one.get(graph, keys)
            alone.append(one.durations)
            list(threads.map(lambda cluster: cluster.get(graph, keys), (one, other)))
            beside += [one.durations, other.durations]
            decodes += [one.decode_s, other.decode_s]
    durations_s = _means(beside, len(plan.keys))
    own_s = [taken_s + statistics.fmean(decodes) for taken_s in durations_s]
    costs = Costs(own_s, [sizes.get(key, 0) for key in plan.keys])
    dag, parts = _dag_of(plan), static_parts(strands)
    makespan_s = _makespan_s(dag, costs, parts, machine.platform, N_WORKERS)
    read_s = sum(costs.sizes_bytes[t] for t in dag.requested) / machine.read_bytes_per_s
    return Prediction(
        case.name,
        len(plan.keys),
        strands.n_strands,
        statistics.median(clients) + makespan_s + read_s,
        tuple(walls),
        sum(durations_s) / sum(_means(alone, len(plan.keys))),
    )


def _wall_s(cluster: FixedCluster, built: Built) -> float:
    begun_at = time.perf_counter()
    cluster.get(*built)
    return time.perf_counter() - begun_at


def _means(runs: Sequence[dict[int, float]], n_tasks: int) -> list[float]:
    return [statistics.fmean(run[task] for run in runs) for task in range(n_tasks)]


def _dag_of(plan: Plan) -> Dag:
    wanted = sorted({slot for slot in flatten_slots(plan.requested) if slot >= 0})
    return Dag(np.asarray(plan.inputs_ptr), np.asarray(plan.inputs, np.int64), tuple(wanted))


def _makespan_s(
    dag: Dag, costs: Costs, parts: Sequence[Any], platform: Platform, n_executors: int
) -> float:
    setting = Setting(
        parts=parts,
        reads=dag.reads(),
        costs=costs,
        platform=platform,
        n_executors=n_executors,
        policy=executor_policy(is_measured=True),
    )
    found = [run_world(setting, seed, is_checked=False).makespan_s for seed in SEEDS]
    return statistics.fmean(found)


def cases(only: Sequence[str], full: bool) -> list[Case]:
    """The six workloads."""
    return linalg_suite.cases(only, full=full)


def platform_table(machine: Machine) -> Table:
    """What was measured of this machine."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="This machine")
    for name in ("latency", "value"):
        found.add_column(name)
    platform = machine.platform
    for name, value in (
        ("a commit occupies the store for", seconds_text(platform.service_s)),
        ("  and for each row", seconds_text(platform.service_row_s)),
        ("a strand besides", seconds_text(platform.store_s)),
        ("waking an executor, and the client", seconds_text(platform.warm_start_s)),
        ("blobs: an operation", seconds_text(platform.blob_s)),
        ("blobs: put and read", f"{platform.blob_bytes_per_s / 1e9:.2f} GB/s"),
        ("blobs: read", f"{machine.read_bytes_per_s / 1e9:.2f} GB/s"),
    ):
        found.add_row(name, value)
    return found


def table(predictions: Sequence[Prediction]) -> Table:
    """Predicted beside measured."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Predicted and measured")
    found.add_column("workload")
    for name in ("tasks", "strands", "predicted", "measured", "ratio", "contention"):
        found.add_column(name, justify="right", no_wrap=True)
    for each in predictions:
        found.add_row(
            each.workload,
            f"{each.n_tasks:,}",
            f"{each.n_strands}",
            seconds_text(each.predicted_s),
            seconds_text(statistics.median(each.measured_s)),
            f"{each.ratio:.2f}",
            f"{each.contention:.2f}",
        )
    return found
