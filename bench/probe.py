"""One measurement that needs a process of its own: `python -m bench.probe NAME [SIDE]`.

Prints one JSON number. Imports as little as it can, because imports are part of what is measured.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Reading the memory of a process tree takes about a millisecond; peaks of chunks last longer.
SAMPLE_EVERY_S = 0.01
SHARED_MEMORY = "/dev/shm"


def import_s() -> float:
    """Seconds that `import wukong` takes where dask is imported already."""
    import dask  # noqa: F401 - what is imported before the clock starts

    start = time.perf_counter()
    import wukong  # noqa: F401 - what is timed

    return time.perf_counter() - start


def ready_s() -> float:
    """Seconds until a new cluster of two processes has run its first task."""
    import wukong
    from bench import N_WORKERS
    from bench.noops import same

    start = time.perf_counter()
    with wukong.LocalCluster(n_workers=N_WORKERS, processes=True) as cluster:
        cluster.get({"x": (same, 1)}, "x")
        return time.perf_counter() - start


def idle_bytes() -> float:
    """Proportional memory of a warm, idle cluster's processes, the client not counted."""
    import wukong
    from bench import N_WORKERS
    from bench.noops import same

    with wukong.LocalCluster(n_workers=N_WORKERS, processes=True) as cluster:
        keys = [("x", number) for number in range(200)]
        cluster.get(dict.fromkeys(keys, (same, 1)), keys)
        time.sleep(0.5)
        return sum(_memory_bytes(pid)[0] for pid in _descendants(os.getpid()))


def peak_bytes(side_name: str, n_chunks: int) -> float:
    """Peak memory of a 2 GB reduction: of all processes, client included, and shared memory."""
    import dask.array as da

    from bench import N_WORKERS
    from bench.sides import open_sides
    from wukong.workloads import Problem, prepare

    def reduction(n: int) -> Problem:
        x = da.random.default_rng(0).random(n, chunks=max(1, n // n_chunks))
        return Problem((x.sum(split_every=2),), int(x.nbytes), lambda values: [])

    small, large = prepare(reduction(64 * n_chunks)), prepare(reduction(256_000_000))
    with open_sides([side_name], N_WORKERS) as (side,):
        assert side.get is not None
        side.get(small.graph, small.keys)
        side.settle()
        with _Peak() as peak:
            side.get(large.graph, large.keys)
        return peak.n_bytes


class _Peak:
    """Samples the memory of this process and its descendants while it is entered."""

    def __init__(self) -> None:
        self.n_bytes = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._shared_before = _shared_bytes()

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            own = [_memory_bytes(pid) for pid in [os.getpid(), *_descendants(os.getpid())]]
            # Files in shared memory count once, mapped or not; so mapped pages of them do not.
            private = sum(proportional - shared for proportional, shared in own)
            self.n_bytes = max(self.n_bytes, private + _shared_bytes() - self._shared_before)


def _shared_bytes() -> int:
    usage = os.statvfs(SHARED_MEMORY)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def _memory_bytes(pid: int) -> tuple[int, int]:
    """Proportional set size of a process, and the part of it that is shared memory."""
    found = {"Pss:": 0, "Pss_Shmem:": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            name, *rest = line.split()
            if name in found:
                found[name] = int(rest[0]) * 1024
    return found["Pss:"], found["Pss_Shmem:"]


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, thread.read_text(encoding="ascii").split()):
                found += [child, *_descendants(child)]
    return found


PROBES: dict[str, Callable[..., float]] = {
    "import_s": import_s,
    "ready_s": ready_s,
    "idle_bytes": idle_bytes,
    "peak_bytes": lambda side, n_chunks: peak_bytes(side, int(n_chunks)),
}

if __name__ == "__main__":
    number = PROBES[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(number))
