"""Futures of a `distributed.Client`: the same client, on Wukong's cluster and on distributed's own.

Each side is a server in a process of its own with two workers, reached by TCP; the clients live in
this process and take turns. So what is compared is what a user's program sees, and the memory of a
server can be told from its clients'.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from bench import N_WORKERS, sides
from bench.measure import Comparison, Timing
from bench.noops import same
from bench.present import Quantity, Target

SIDES = (sides.PROCESSES, sides.DISTRIBUTED)
N_MAP = 10_000
N_TRIPS = 50
N_MEGABYTES = 10
N_HELD = {sides.PROCESSES: 100_000, sides.DISTRIBUTED: 5_000}
"""Futures whose memory is measured: distributed takes milliseconds for each."""
SETTLE_S = 2.0
"""A server has so long to give memory back, before it is measured."""
N_BATCHES, BATCH = 1_000, 1_000
WINDOW = 40
"""Batches whose time together is compared, early and late."""
LIMIT_S = 60.0
"""A map that takes longer counts as so long, and its side takes no further part in the case."""
MEGABYTE = 1_000_000

TARGETS = [
    Target("map*", *SIDES, 1 / 5, 1 / 10),
    Target("round trip*", *SIDES, 1.0, 0.7),
    Target("1 MB*", *SIDES, 1.0, 0.7),
    Target("100 MB*", *SIDES, 1.0, 0.7),
]

Tell = Callable[[str], None]

SERVER = """
import sys, time
if __name__ == "__main__":
    if sys.argv[1] == "distributed":
        import logging
        from distributed import LocalCluster
        cluster = LocalCluster(n_workers=int(sys.argv[2]), threads_per_worker=1, processes=True,
                               dashboard_address=":0", silence_logs=logging.ERROR)
    else:
        from wukong import LocalCluster
        cluster = LocalCluster(n_workers=int(sys.argv[2]))
    with cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Served:
    """A server, and a client of it."""

    name: str
    """Of the side."""
    client: Any
    """A `distributed.Client`."""
    pid: int
    """The server's process."""


@dataclass(frozen=True, slots=True)
class FutureCase:
    """Something that a client is asked to do."""

    name: str
    """For tables."""
    n_tasks: int
    """Tasks of one call."""
    run: Callable[[Any, int], None]
    """Does it with a client; the number is one that it has not been given before."""
    n_calls: int = 1
    """Runs within one measurement, whose mean counts."""


@contextmanager
def serve(name: str, folder: str) -> Iterator[Served]:
    """Start a side's server, and connect to it."""
    from distributed import Client

    path = f"{folder}/bench_server.py"  # spawned workers import it
    with open(path, "w", encoding="utf-8") as file:
        file.write(SERVER)
    kind = "distributed" if name == sides.DISTRIBUTED else "wukong"
    program = subprocess.Popen(
        [sys.executable, path, kind, str(N_WORKERS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        address = program.stdout.readline().strip()
        with Client(address, set_as_default=False) as client:
            yield Served(name, client, program.pid)
    finally:
        program.stdin.close()
        program.wait(60)
        program.stdout.close()


def cases() -> list[FutureCase]:
    """What is timed."""
    return [
        FutureCase(f"map of {N_MAP:,} and gather", N_MAP, _map_and_gather),
        FutureCase("round trip", 1, _round_trip, N_TRIPS),
        FutureCase("1 MB result", 1, partial(_array, MEGABYTE), N_MEGABYTES),
        FutureCase("100 MB result", 1, partial(_array, 100 * MEGABYTE)),
    ]


def compare_futures(
    case: FutureCase, served: Sequence[Served], n_rounds: int, tell: Tell
) -> tuple[Comparison, list[str]]:
    """Time a case with every side's client, in turns.

    Returns: the times, and the names of sides that have taken longer than the limit, which stands
        for their time.
    """
    seconds: dict[str, list[float]] = {side.name: [] for side in served}
    slow: list[str] = []
    for number in range(-1, n_rounds):  # the first one warms up
        first = number % len(served)
        for side in [*served[first:], *served[:first]]:
            if side.name in slow:
                continue
            tell(f"{case.name}: round {number + 1} of {n_rounds}, {side.name}")
            gc.collect()
            base = (number + 1) * case.n_calls
            begun_at = time.perf_counter()
            try:
                for call in range(case.n_calls):
                    case.run(side.client, base + call)
            except TimeoutError:
                slow.append(side.name)
                seconds[side.name] = [LIMIT_S]
            else:
                took_s = (time.perf_counter() - begun_at) / case.n_calls
                if number >= 0:
                    seconds[side.name].append(took_s)
            _settle(side.client)
    timings = tuple(Timing(side.name, tuple(seconds[side.name])) for side in served)
    return Comparison(case.name, case.n_tasks, timings), slow


def _map_and_gather(client: Any, number: int) -> None:
    from distributed import TimeoutError as Late  # not the built-in one in Python 3.10

    numbers = range(number * N_MAP, (number + 1) * N_MAP)
    futures = client.map(same, numbers)
    try:
        results = client.sync(client._gather, futures, callback_timeout=LIMIT_S)
    except Late as error:
        client.cancel(futures, force=True)
        raise TimeoutError from error
    assert results == list(numbers)


def _round_trip(client: Any, number: int) -> None:
    assert client.submit(same, number, pure=False).result() == number


def _array(n_bytes: int, client: Any, number: int) -> None:
    result = client.submit(np.full, n_bytes, number % 100, dtype="u1", pure=False).result()
    assert result.nbytes == n_bytes
    assert result[-1] == number % 100


def _settle(client: Any) -> None:
    """Wait until the server has forgotten what nobody holds any more."""
    deadline = time.monotonic() + 60
    while client.run_on_scheduler(_n_tasks):
        assert time.monotonic() < deadline, "the server does not forget its tasks"
        time.sleep(0.005)


def _n_tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


def held_memory(served: Sequence[Served], tell: Tell) -> list[Quantity]:
    """How much larger a server's process is for each of many futures that a client holds."""
    from distributed import wait

    quantities = []
    grown: dict[str, float] = {}
    for side in served:
        n_held = N_HELD[side.name]
        tell(f"{n_held:,} futures, {side.name}")
        before = _memory_bytes(side.pid)
        with side.client.as_current():
            futures = side.client.map(same, range(n_held))
            wait(futures)
        time.sleep(SETTLE_S)
        grown[side.name] = (_memory_bytes(side.pid) - before) / n_held
        del futures
        _settle(side.client)
        name = f"a future of {n_held:,} held, server of {side.name}"
        quantities.append(Quantity(name, (grown[side.name],), "B", None))
    if len(grown) == len(SIDES):
        ratio = grown[sides.PROCESSES] / grown[sides.DISTRIBUTED]
        quantities.append(Quantity("ratio of the two", (ratio,), "x", 1 / 4))
    return quantities


def _memory_bytes(pid: int) -> int:
    """What belongs to a process: its own pages, and its share of what it shares."""
    import psutil

    return int(psutil.Process(pid).memory_full_info().pss)


def age(served: Sequence[Served], tell: Tell) -> list[Quantity]:
    """What a batch of 1,000 calls takes after a thousand such batches, over one after ten.

    Wukong's side alone: distributed's would take most of an hour.
    """
    quantities = []
    for side in (one for one in served if one.name == sides.PROCESSES):
        seconds, cpu = [], [_cpu_s(side.pid)]
        for number in range(N_BATCHES):
            if number % 50 == 0:
                tell(f"batch {number} of {N_BATCHES}, {side.name}")
            numbers = range(number * BATCH, (number + 1) * BATCH)
            begun_at = time.perf_counter()
            assert side.client.gather(side.client.map(same, numbers)) == list(numbers)
            seconds.append(time.perf_counter() - begun_at)
            cpu.append(_cpu_s(side.pid))
        early, late = slice(10, 10 + WINDOW), slice(-WINDOW, None)
        growth = median(seconds[late]) / median(seconds[early])
        cpu_growth = (cpu[-1] - cpu[-1 - WINDOW]) / (cpu[10 + WINDOW] - cpu[10])
        of = f"batches {N_BATCHES - WINDOW}-{N_BATCHES} over 10-{10 + WINDOW}"
        quantities += [
            Quantity(f"{of}: CPU of server and client", (cpu_growth,), "x", 1.2),
            Quantity(f"{of}: time", (growth,), "x", 1.2),
            Quantity(f"batch of {BATCH:,}, {side.name}", (median(seconds) * 1000,), "ms", None),
        ]
    return quantities


def _cpu_s(pid: int) -> float:
    """CPU time of a server's process and of this one."""
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system) + time.process_time()


@contextmanager
def open_served(names: Sequence[str], folder: str) -> Iterator[list[Served]]:
    """Start the servers of the named sides."""
    with ExitStack() as stack:
        yield [stack.enter_context(serve(name, folder)) for name in names]
