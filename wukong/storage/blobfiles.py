"""Blobs as files: the blob half of the embedded store, one file a blob, mapped by its readers.

    <root>/<job>/<attempt>.<n>      in shared memory, while the limit allows
    <spill>/<job>/<attempt>.<n>     on disk, for the rest
    <root>/.usage                   two counters for each process that has put or deleted

A blob is written once, by `write`, before anybody is told its id, and never changed: readers map
it copy-on-write, so a process may alter what it has mapped and no other one sees it. (Writing
through a mapping would end the process with SIGBUS when shared memory is full; `write` reports it.)

Bytes in use, in memory and on disk, are counted without a lock: each process adds what it puts and
subtracts what it deletes in counters that only it writes, and their sums are the totals. Counters
outlive their process, as its files do. What a process that was killed inside a put had announced
but not written stays counted until the root is made anew.

This module knows nothing of what the bytes mean, and does not check them: the codec does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import resource
import struct
import sys
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

from wukong.errors import MissingBlob, SecurityError, StoreFull, StoreUnavailable

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_USAGE = ".usage"
# Of one process: bytes in memory and bytes on disk, as two int64 of the machine's byte order.
_COUNTERS = struct.Struct("=qq")
# Ids name files, and come from the network: nothing else than plain names may pass.
_PLAIN_ID = re.compile(r"[A-Za-z0-9_=-]+(/[A-Za-z0-9_=-]+)*")


class BlobFiles:
    """Puts, maps and deletes blobs in shared memory, or on disk past a limit.

    Many processes and threads use the same folders at once. An instance may be used on both sides
    of the fork of a process without other threads. Ids are `job/...`: names of letters, digits,
    `_`, `-` and `=`, joined by slashes.
    """

    def __init__(self, root: Path, spill: Path, limit_bytes: int) -> None:
        """Use (and make, for this user only) two folders.

        Args:
            root: in shared memory.
            spill: on disk.
            limit_bytes: what `root` may hold, of all processes together; the rest goes to `spill`.
        """
        for folder in (root, spill):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root, self._spill = str(root), str(spill)
        self._limit_bytes = limit_bytes
        self._usage = _Usage(f"{root}/{_USAGE}")
        # Before Python 3.13 a mapping holds a descriptor. Descriptors are dense: past half of what
        # the process may open, blobs are read instead (one copy), so that others still find some.
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_mapped_fd = soft_limit // 2

    def put_many(self, items: Sequence[tuple[str, Sequence[memoryview]]]) -> None:
        """Write blobs, each given as its parts in order.

        Ids that exist are replaced; who has mapped the old bytes keeps them.

        Raises:
            StoreUnavailable: no room, in memory and on disk; nothing of this call remains.
        Cost: one copy of the bytes, by the kernel; about 30 us a blob besides.
        """
        written: list[str] = []
        try:
            for blob_id, parts in items:
                self._put(blob_id, parts)
                written.append(blob_id)
        except BaseException:
            self.delete_many(written)
            raise

    def get_many(self, blob_ids: Sequence[str]) -> list[memoryview]:
        """Map blobs, in the order asked for; they may be written to, without effect on the blob.

        A mapping lasts as long as something views it, also after the blob is deleted.

        Raises:
            MissingBlob: names the first that does not exist.
            StoreUnavailable: the system refuses to open or map a file.
        Cost: no copy; some 15 us a blob, and the page faults of whoever reads it.
        """
        return [self._map(blob_id) for blob_id in blob_ids]

    def delete_many(self, blob_ids: Sequence[str]) -> None:
        """Delete blobs; one that does not exist is no error."""
        in_memory = sum(_unlink(_path(self._root, blob_id)) for blob_id in blob_ids)
        on_disk = sum(_unlink(_path(self._spill, blob_id)) for blob_id in blob_ids)
        if in_memory or on_disk:
            self._usage.add(-in_memory, -on_disk)

    def delete_job(self, job: str) -> None:
        """Delete all blobs of a job, and its folders; none there is no error."""
        in_memory = _remove_folder(_path(self._root, job))
        on_disk = _remove_folder(_path(self._spill, job))
        if in_memory or on_disk:
            self._usage.add(-in_memory, -on_disk)

    def list(self, job: str) -> list[str]:
        """Return the ids of a job's blobs, sorted."""
        names = {*_names(_path(self._root, job)), *_names(_path(self._spill, job))}
        return sorted(f"{job}/{name.replace('.', '/')}" for name in names)

    def used_bytes(self) -> int:
        """Return the bytes of all blobs of all processes, in memory and on disk."""
        return sum(self._usage.add(0, 0))

    def spilled_bytes(self) -> int:
        """Return the part of `used_bytes` that is on disk."""
        return self._usage.add(0, 0)[1]

    def close(self) -> None:
        """Give back the descriptor; blobs and mappings stay. May be called twice."""
        self._usage.close()

    def _put(self, blob_id: str, parts: Sequence[memoryview]) -> None:
        """Write one blob; on disk where shared memory is full, or would be over the limit."""
        in_memory, on_disk = _path(self._root, blob_id), _path(self._spill, blob_id)
        size_bytes = sum(part.nbytes for part in parts)
        full = ""
        # Announced before it is written, so that processes that put at once see each other.
        if self._usage.add(size_bytes, 0)[0] <= self._limit_bytes:
            try:
                return self._write(in_memory, blob_id, parts)
            except OSError as error:
                # Others fill the same file system, or the file is too large for it.
                full = f"{self._root}: {error.strerror}; "
        self._usage.add(-size_bytes, size_bytes)
        try:
            self._write(on_disk, blob_id, parts)
        except OSError as error:
            self._usage.add(0, -size_bytes)
            raise StoreFull(
                f"no room for blob {blob_id} of {size_bytes} bytes: "
                f"{full}{self._spill}: {error.strerror}"
            ) from error

    def _write(self, path: str, blob_id: str, parts: Sequence[memoryview]) -> None:
        """Write a new file, or leave none."""
        try:
            fd = os.open(path, _CREATE, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            fd = os.open(path, _CREATE, 0o600)
        except FileExistsError:
            # Put again, by the same attempt. Never truncated: readers may have mapped it.
            self.delete_many([blob_id])
            fd = os.open(path, _CREATE, 0o600)
        try:
            _write_all(fd, parts)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)

    def _map(self, blob_id: str) -> memoryview:
        in_memory, on_disk = _path(self._root, blob_id), _path(self._spill, blob_id)
        try:
            try:
                fd = os.open(in_memory, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                fd = os.open(on_disk, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._map_file(fd)
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise MissingBlob(f"blob {blob_id} does not exist") from None
        except OSError as error:
            raise StoreUnavailable(f"cannot map blob {blob_id}: {error.strerror}") from error

    def _map_file(self, fd: int) -> memoryview:
        size_bytes = os.fstat(fd).st_size
        if size_bytes == 0:
            return memoryview(b"")
        if sys.version_info >= (3, 13):
            return memoryview(mmap.mmap(fd, size_bytes, access=mmap.ACCESS_COPY, trackfd=False))
        else:  # what came after it, without else, mypy would call unreachable on 3.13
            return self._map_with_descriptor(fd, size_bytes)

    def _map_with_descriptor(self, fd: int, size_bytes: int) -> memoryview:
        """Map a file where each mapping costs a descriptor: copied, when there are many."""
        # The number that the mapping's own descriptor would get.
        next_fd = os.dup(fd)
        os.close(next_fd)
        if next_fd < self._max_mapped_fd:
            return memoryview(mmap.mmap(fd, size_bytes, access=mmap.ACCESS_COPY))
        view = memoryview(mmap.mmap(-1, size_bytes))
        n_read = 0
        while n_read < size_bytes and (n := os.readv(fd, [view[n_read:]])):
            n_read += n
        return view[:n_read]


class _Usage:
    """The sums of two counters for each process, in one file; each has one writer."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._fd = -1
        self._pid = -1

    def add(self, in_memory_bytes: int, on_disk_bytes: int) -> tuple[int, int]:
        """Add to this process's counters; return the sums of all, not below 0."""
        with self._lock:
            if self._fd < 0 or self._pid != os.getpid():
                try:
                    self._claim()
                except OSError as error:
                    raise StoreUnavailable(f"cannot write {self._path}: {error}") from error
            if in_memory_bytes or on_disk_bytes:
                self._in_memory_bytes += in_memory_bytes
                self._on_disk_bytes += on_disk_bytes
                own = _COUNTERS.pack(self._in_memory_bytes, self._on_disk_bytes)
                os.pwrite(self._fd, own, self._at)
            # Others append counters meanwhile; those that are not seen now are seen next time.
            counters = array("q", os.pread(self._fd, os.fstat(self._fd).st_size, 0))
        return max(0, sum(counters[::2])), max(0, sum(counters[1::2]))

    def _claim(self) -> None:
        """Append counters for this process, which may be a fork of the one that had the last."""
        if self._fd >= 0:
            os.close(self._fd)
        append_fd = os.open(
            self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        os.write(append_fd, bytes(_COUNTERS.size))
        # Where the kernel has put them, though other processes append too.
        self._at = os.lseek(append_fd, 0, os.SEEK_CUR) - _COUNTERS.size
        os.close(append_fd)
        # A second descriptor, since one opened for appending ignores the offset of a write.
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._pid = os.getpid()
        self._in_memory_bytes = self._on_disk_bytes = 0

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _path(base: str, blob_id: str) -> str:
    """Return the path of a blob's file, or of a job's folder."""
    if not _PLAIN_ID.fullmatch(blob_id):
        raise SecurityError(f"not the name of a blob or a job: {blob_id!r:.100}")
    job, slash, rest = blob_id.partition("/")
    return f"{base}/{job}{slash}{rest.replace('/', '.')}"


def _unlink(path: str) -> int:
    """Delete a file; return its size, or 0 if it was not there or somebody else was first."""
    try:
        size_bytes = os.stat(path).st_size
        os.unlink(path)
    except FileNotFoundError:
        return 0
    return size_bytes


def _remove_folder(folder: str) -> int:
    """Delete a folder of files; return their size. Most jobs have none: that takes one call."""
    if not os.path.isdir(folder):
        return 0
    size_bytes = sum(_unlink(f"{folder}/{name}") for name in _names(folder))
    # A put that comes late may have added a blob meanwhile; then the folder stays.
    with contextlib.suppress(OSError):
        os.rmdir(folder)
    return size_bytes


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _write_all(fd: int, parts: Sequence[memoryview]) -> None:
    """Write all parts, though the system takes some 2 GB and 1,024 parts at a time."""
    views = [part.cast("B") for part in parts]
    first = 0
    while first < len(views):
        n_written = os.writev(fd, views[first : first + _IOV_MAX])
        while first < len(views) and n_written >= views[first].nbytes:
            n_written -= views[first].nbytes
            first += 1
        if n_written:
            views[first] = views[first][n_written:]
