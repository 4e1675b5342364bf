"""Large values on Redis or Valkey.

Keys:

    PREFIXb:BLOB    string: the blob; list: its chunks, where it is longer than one
    PREFIX{JOB}:b   hash: ids of the job's blobs -> size in bytes; written before they are

Blob ids have no braces, so that blobs are spread over all slots of a cluster, and the chunks of one
blob lie together. Blobs vanish with the job's lease, which is renewed for all that the hash names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from wukong.errors import MissingBlob, StoreUnavailable
from wukong.executor.messages import BlobId, JobId
from wukong.storage.contract import BlobStore
from wukong.storage.redis_link import Command, Link, pack

AT_ONCE = 1000
"""Commands that are sent before replies are read."""
JOBS_KEPT = 64
BYTES_AT_ONCE = 64 << 20
"""Bytes of blobs that are sent, or asked for, before replies are read."""


class RedisBlobs(BlobStore):
    """Blobs in Redis. Thread-safe.

    Args:
        link: the server; whoever opened it closes it.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lease_ms = b"%d" % (link.url.lease_s * 1000)
        self._listed: dict[JobId, None] = {}
        """Jobs that this object has put into the list of all jobs."""

    def put_many(self, items: Sequence[tuple[BlobId, Sequence[memoryview]]]) -> None:
        joined = [(blob, b"".join(parts)) for blob, parts in items]
        sizes = [(blob, len(content)) for blob, content in joined]
        commands = list(self._listing(sizes))
        n_bytes = 0
        try:
            for blob, content in joined:
                if commands and n_bytes + len(content) > BYTES_AT_ONCE:
                    self._link.run_checked(commands)
                    commands, n_bytes = [], 0
                commands += self._putting(blob, content)
                n_bytes += len(content)
            self._link.run_checked(commands)
        except StoreUnavailable:
            self._undo([blob for blob, _ in items])
            raise

    def get_many(self, ids: Sequence[BlobId]) -> list[memoryview]:
        found: list[memoryview] = []
        for first in range(0, len(ids), AT_ONCE):
            some = ids[first : first + AT_ONCE]
            keys = [self._key(blob) for blob in some]
            replies = self._link.run([Command(key, pack(b"GET", key)) for key in keys])
            for blob, key, reply in zip(some, keys, replies, strict=True):
                if isinstance(reply, Exception):
                    if "WRONGTYPE" not in str(reply):
                        raise self._link.translate(reply, key)
                    reply = self._get_chunks(key)
                if reply is None:
                    raise MissingBlob(f"blob {blob} is gone")
                # A copy that can be written to: tasks expect to own arrays.
                found.append(memoryview(bytearray(reply)))
        return found

    def delete_many(self, ids: Sequence[BlobId]) -> None:
        commands = [Command(key, pack(b"UNLINK", key)) for key in map(self._key, ids)]
        for job, blobs in groupby(sorted(ids), job_of):
            key = index_key(self._link, job)
            fields = [blob.encode() for blob in blobs]
            commands.append(Command(key, pack(b"HDEL", key, *fields)))
        self._run(commands)

    def delete_job(self, job: JobId) -> None:
        key = index_key(self._link, job)
        blobs = self._link.run_checked([Command(key, pack(b"HKEYS", key))])[0]
        keys = [self._key(BlobId(blob.decode())) for blob in blobs]
        self._run([Command(k, pack(b"UNLINK", k)) for k in (*keys, key)])

    def used_bytes(self) -> int:
        listing = listing_key(self._link)
        jobs = self._link.run_checked([Command(listing, pack(b"ZRANGE", listing, b"0", b"-1"))])[0]
        keys = [index_key(self._link, JobId(job.decode())) for job in jobs]
        sizes = self._link.run_checked([Command(key, pack(b"HVALS", key)) for key in keys])
        return sum(int(size) for found in sizes for size in found)

    def close(self) -> None:
        """The link is closed by the job store."""

    # -------------------------------------------------------------- inside

    def _key(self, blob: BlobId) -> bytes:
        return f"{self._link.url.prefix}b:{blob}".encode()

    def _listing(self, sizes: Iterable[tuple[BlobId, int]]) -> Iterable[Command]:
        """Names blobs in the indexes of their jobs."""
        for job, found in groupby(sorted(sizes), lambda item: job_of(item[0])):
            key = index_key(self._link, job)
            fields = [text.encode() for blob, size in found for text in (blob, str(size))]
            yield Command(key, pack(b"HSET", key, *fields))
            yield Command(key, pack(b"PEXPIRE", key, self._lease_ms))
            if job not in self._listed:
                while len(self._listed) >= JOBS_KEPT:
                    self._listed.pop(next(iter(self._listed)), None)
                self._listed[job] = None
                all_jobs, now = listing_key(self._link), b"%.3f" % time.time()
                yield Command(all_jobs, pack(b"ZADD", all_jobs, b"NX", now, job.encode()))

    def _putting(self, blob: BlobId, content: bytes) -> list[Command]:
        key, chunk_bytes = self._key(blob), self._link.url.chunk_bytes
        if len(content) <= chunk_bytes:
            return [Command(key, pack(b"SET", key, content, b"PX", self._lease_ms))]
        # Nobody knows of the blob before all of it is there; a repetition begins anew.
        commands = [Command(key, pack(b"UNLINK", key))]
        commands += [
            Command(key, pack(b"RPUSH", key, content[first : first + chunk_bytes]))
            for first in range(0, len(content), chunk_bytes)
        ]
        return [*commands, Command(key, pack(b"PEXPIRE", key, self._lease_ms))]

    def _get_chunks(self, key: bytes) -> bytes:
        """A long blob, one chunk at a time: a server copies what it sends."""
        n_chunks = self._link.run_checked([Command(key, pack(b"LLEN", key))])[0]
        return b"".join(
            self._link.run_checked([Command(key, pack(b"LINDEX", key, b"%d" % i))])[0] or b""
            for i in range(n_chunks)
        )

    def _undo(self, ids: Sequence[BlobId]) -> None:
        """Leave nothing partial; what cannot be removed now goes with the job, or its lease."""
        try:
            self.delete_many(ids)
        except StoreUnavailable:
            return

    def _run(self, commands: Sequence[Command]) -> None:
        for first in range(0, len(commands), AT_ONCE):
            self._link.run_checked(commands[first : first + AT_ONCE])


def job_of(blob: BlobId) -> JobId:
    """The job whose blob it is."""
    return JobId(blob.partition("/")[0])


def listing_key(link: Link) -> bytes:
    """Where all jobs are listed, by the time of their creation."""
    return f"{link.url.prefix}jobs".encode()


def index_key(link: Link, job: JobId) -> bytes:
    """Where a job's blobs are listed."""
    return f"{link.url.prefix}{{{job}}}:b".encode()


def renew_blobs(link: Link, job: JobId) -> None:
    """Begin the lease of a job's blobs anew."""
    key = index_key(link, job)
    lease_ms = b"%d" % (link.url.lease_s * 1000)
    blobs: list[Any] = link.run_checked([Command(key, pack(b"HKEYS", key))])[0]
    keys = [key, *(link.url.prefix.encode() + b"b:" + blob for blob in blobs)]
    for first in range(0, len(keys), AT_ONCE):
        some = keys[first : first + AT_ONCE]
        link.run_checked([Command(k, pack(b"PEXPIRE", k, lease_ms)) for k in some])
