"""Where jobs and values are kept; `open_store` chooses by URL."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

from wukong.storage.contract import BlobStore, QueueStore
from wukong.storage.memory import MemoryJobStore

BLOBS_PER_MEMORY = 0.4
"""Part of the machine's memory that blobs may fill before they are spilled to disk."""


@dataclass(frozen=True, slots=True)
class Store:
    """An open store."""

    jobs: QueueStore
    blobs: BlobStore | None
    """None where values are objects and never leave the process."""
    secret: bytes
    """From which the keys of all jobs are derived."""


def open_store(
    url: str,
    *,
    silence_s: float = 10.0,
    limit_bytes: int | None = None,
    clock: Callable[[], float] = monotonic,
) -> Store:
    """Open the store that a URL names, and make it when it is new.

    Args:
        url: `memory://`, a new store for this process each time, or `local:///directory`.
        silence_s: a running token without heartbeat for this long counts as dead.
        limit_bytes: of blobs in shared memory, before the rest goes to disk; None: a part of what
            the machine has.
        clock: of the job store; only tests give another one.
    Raises:
        ValueError: no store has such a URL.
        SecurityError: others may write to the directory.
        StoreUnavailable: the directory cannot be used.
    """
    parts = urlsplit(url)
    if url == "memory://":
        return Store(MemoryJobStore(silence_s, clock), None, secrets.token_bytes(32))
    if parts.scheme == "local" and not parts.netloc and parts.path.startswith("/"):
        # Threads that share memory need neither of these.
        from wukong.storage.blobfiles import BlobFiles
        from wukong.storage.local import LocalJobStore
        from wukong.storage.local_files import spill_directory

        jobs = LocalJobStore(Path(parts.path), silence_s, clock)
        if limit_bytes is None:
            limit_bytes = default_limit_bytes(jobs.directory)
        blobs = BlobFiles(jobs.directory / "blobs", spill_directory(jobs.directory), limit_bytes)
        return Store(jobs, blobs, jobs.secret)
    raise ValueError(f"no such store: {url!r}; give memory:// or local:///directory")


def default_limit_bytes(directory: Path) -> int:
    """How many bytes of blobs a directory may hold: a part of memory, and of its file system."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = os.statvfs(directory)
    return int(BLOBS_PER_MEMORY * min(memory_bytes, 2 * found.f_frsize * found.f_blocks))
