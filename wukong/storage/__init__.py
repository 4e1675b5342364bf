"""Where jobs and values are kept; `open_store` chooses by URL."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

from wukong import config
from wukong.storage.contract import BlobStore, JobStore, QueueStore
from wukong.storage.memory import MemoryJobStore

REDIS_SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "unix")
BLOBS_PER_MEMORY = 0.4
"""Part of the machine's memory that blobs may fill before they are spilled to disk."""

BLOBS_PRELOAD = ("boto3", "aiobotocore.session")
"""What executors import when large blobs are in S3: worth doing once for all of them."""


@dataclass(frozen=True, slots=True)
class Store:
    """An open store."""

    jobs: JobStore
    blobs: BlobStore | None
    """None where values are objects and never leave the process."""
    secret: bytes
    """From which the keys of all jobs are derived."""
    may_roll_back: bool = False
    """The last changes may be lost with a server; `confirm` waits until they cannot (rule 3)."""

    is_remote: bool = False
    """Jobs or blobs may be on another machine: whoever works on them should not wait for each."""

    @property
    def queue(self) -> QueueStore | None:
        """The job store, where its queued tokens are the queue of a pool."""
        return self.jobs if isinstance(self.jobs, QueueStore) else None


def open_store(
    url: str,
    *,
    blobs: str | None = None,
    silence_s: float = 10.0,
    limit_bytes: int | None = None,
    clock: Callable[[], float] | None = None,
    secret: bytes | None = None,
) -> Store:
    """Open the store that a URL names, and make it when it is new.

    Args:
        url: `memory://`, a new store for this process each time, `local:///directory`, or one of
            `wukong.storage.redis_url.RedisUrl`.
        blobs: where large blobs go instead: `s3://bucket/prefix`, with options as
            `?region=eu-west-1&endpoint_url=...&tier_bytes=65536` (the names and defaults stand in
            the configuration, under `wukong.s3`). Blobs below `tier_bytes` stay with the jobs; 0
            sends all of them there.
        silence_s: a running token without heartbeat for this long counts as dead.
        limit_bytes: of blobs in shared memory, before the rest goes to disk; None: a part of what
            the machine has.
        clock: of the job store; only tests give another one.
        secret: from which the keys of jobs are derived, for stores on other machines; None: the
            deployment's (`wukong.storage.secret`). Other stores have their own.
    Raises:
        ValueError: no store has such a URL.
        SecurityError: others may write to the directory.
        StoreUnavailable: the directory cannot be used.
    """
    if blobs is None:
        return _open(url, silence_s, limit_bytes, clock, secret)
    from wukong.storage.s3 import S3Blobs
    from wukong.storage.s3_session import parse_url
    from wukong.storage.tiered import TieredBlobs

    options = parse_url(blobs)
    store = _open(url, silence_s, limit_bytes, clock, secret)
    if store.blobs is None:
        raise ValueError(f"{url} holds objects, which never become blobs; leave `blobs` out")
    tiers = TieredBlobs(store.blobs, S3Blobs(options), options.tier_bytes)
    return replace(store, blobs=tiers, is_remote=True)


def modules_of(url: str) -> tuple[str, ...]:
    """What `open_store` imports for such a store; worth doing once for all executors."""
    scheme = urlsplit(url).scheme
    if scheme == "local":
        return "wukong.storage.blobfiles", "wukong.storage.local"
    if scheme in REDIS_SCHEMES:
        return "msgpack", "redis.connection", "wukong.storage.redis", "wukong.storage.redis_blobs"
    return ()


def resolve_blobs(blobs: str) -> str:
    """The URL that means to executors what this one means here: the configuration is in it.

    Raises:
        ValueError: it names no place for blobs.
    """
    from wukong.storage.s3_session import parse_url

    return parse_url(blobs).url()


def resolve_store(url: str) -> str:
    """The URL that means to executors what this one means here: the configuration is in it."""
    if urlsplit(url).scheme not in REDIS_SCHEMES:
        return url
    from wukong.storage.redis_url import with_options

    return with_options(
        url,
        prefix=config.get("redis.prefix"),
        lease_s=config.get("redis.lease-s"),
        chunk_bytes=config.get("redis.chunk-bytes"),
        timeout_s=config.get("redis.timeout-s"),
        replicas=config.get("redis.replicas"),
        on_disk="yes" if config.get("redis.on-disk") else "no",
    )


def _open(
    url: str,
    silence_s: float,
    limit_bytes: int | None,
    clock: Callable[[], float] | None,
    secret: bytes | None,
) -> Store:
    """Open a store with the blob store that is its own."""
    parts = urlsplit(url)
    if url == "memory://":
        return Store(MemoryJobStore(silence_s, clock or monotonic), None, secrets.token_bytes(32))
    if parts.scheme == "local" and not parts.netloc and parts.path.startswith("/"):
        # Threads that share memory need neither of these.
        from wukong.storage.blobfiles import BlobFiles
        from wukong.storage.local import LocalJobStore
        from wukong.storage.local_files import spill_directory

        jobs = LocalJobStore(Path(parts.path), silence_s, clock or monotonic)
        if limit_bytes is None:
            limit_bytes = default_limit_bytes(jobs.directory)
        blobs = BlobFiles(jobs.directory / "blobs", spill_directory(jobs.directory), limit_bytes)
        return Store(jobs, blobs, jobs.secret)
    if parts.scheme in REDIS_SCHEMES and (parts.netloc or parts.scheme == "unix"):
        return _open_redis(url, silence_s, clock, secret)
    raise ValueError(
        f"no such store: {url!r}; give memory://, local:///directory or redis://host:port"
    )


def _open_redis(
    url: str, silence_s: float, clock: Callable[[], float] | None, secret: bytes | None
) -> Store:
    from wukong.storage.redis import RedisJobStore
    from wukong.storage.redis_blobs import RedisBlobs
    from wukong.storage.redis_link import Link
    from wukong.storage.redis_url import parse_url
    from wukong.storage.secret import deployment_secret

    link = Link(parse_url(resolve_store(url)))
    found = secret if secret is not None else deployment_secret()
    jobs = RedisJobStore(link, silence_s, clock)
    return Store(jobs, RedisBlobs(link), found, link.url.is_durable, is_remote=True)


def default_limit_bytes(directory: Path) -> int:
    """How many bytes of blobs a directory may hold: a part of memory, and of its file system."""
    found = os.statvfs(directory)
    return int(BLOBS_PER_MEMORY * min(memory_bytes(), 2 * found.f_frsize * found.f_blocks))


def memory_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
