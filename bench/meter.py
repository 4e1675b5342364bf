"""What a run takes beside time: CPU seconds and memory of this process and all below it.

Sides take turns, so while one is measured the others only idle; what is counted is the side's own,
and the little that the idle ones do.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

SAMPLE_S = 0.1


@dataclass(slots=True)
class Usage:
    """Of one run."""

    cpu_s: float = 0.0
    """User and system, of all processes that were alive at the end."""
    added_bytes: int = 0
    """Most memory above what there was at the start: unshared and shared pages alike."""


@contextmanager
def metered() -> Iterator[Usage]:
    """Count what happens inside; the result is complete at the end of the block."""
    usage, done = Usage(), threading.Event()
    cpu_s, n_bytes = _cpu(), _memory()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            usage.added_bytes = max(usage.added_bytes, _memory() - n_bytes)

    sampler = threading.Thread(target=sample, name="bench-meter", daemon=True)
    sampler.start()
    try:
        yield usage
    finally:
        done.set()
        sampler.join()
        now = _cpu()
        usage.cpu_s = sum(now[pid] - cpu_s.get(pid, 0.0) for pid in now)
        usage.added_bytes = max(usage.added_bytes, _memory() - n_bytes)


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _cpu() -> dict[int, float]:
    found = {}
    for process in _processes():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        found[process.pid] = times.user + times.system
    return found


def _memory() -> int:
    total = 0
    for process in _processes():
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        total += memory.rss - memory.shared
    return total + _shared_memory()


def _shared_memory() -> int:
    """Bytes of files in shared memory, which stores of several sides use."""
    usage = psutil.disk_usage("/dev/shm")
    return int(usage.used)
