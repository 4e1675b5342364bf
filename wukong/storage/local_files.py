"""The directory of an embedded store, and everything in it that is neither rows nor blobs.

    DIRECTORY/        mode 0700, of the user
      data.mdb        rows (LMDB)
      lock.mdb        LMDB's lock and readers
      secret          32 random bytes, mode 0600; the keys of all jobs are derived from it
      alive           locked (shared) by every process that has the store open
      keep            present when the store outlives its processes, for a later `attach`
      writers/        see `local_peers`
      pipes/          see `local_peers`
      blobs/          see `blobfiles`
      pools/          FIFOs of the pools that run the store's jobs: see `executor.pool_launch`
      spill           symbolic link to the directory on disk of the blobs that do not fit

A default directory is called wukong-UID-PID-RANDOM and lies in shared memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

from wukong.errors import CorruptBlob, SecurityError, StoreUnavailable
from wukong.storage.local_peers import PIPES, WRITERS

logger = logging.getLogger(__name__)

DEFAULT_ROOT = Path("/dev/shm")
SECRET_BYTES = 32
DATA = "data.mdb"
ALIVE = "alive"
KEEP = "keep"
SPILL = "spill"
POOLS = "pools"
_DEFAULT_NAME = re.compile(r"wukong-(\d+)-(\d+)-[0-9A-Za-z_]+")


def default_directory(root: Path = DEFAULT_ROOT) -> Path:
    """Make a new, empty directory for a store of this process."""
    name = f"wukong-{os.getuid()}-{os.getpid()}-{secrets.token_hex(8)}"
    path = root / name
    path.mkdir(mode=0o700)
    return path


def prepare_directory(directory: Path) -> None:
    """Make the directory and its folders where they are missing.

    Raises:
        SecurityError: somebody else owns the directory, or may write to it.
        OSError: it cannot be made.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SecurityError(
            f"{directory}: a job store's directory must belong to its user, and nobody else "
            f"may write to it (uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o})"
        )
    for folder in (WRITERS, PIPES):
        (directory / folder).mkdir(mode=0o700, exist_ok=True)


def spill_directory(directory: Path) -> Path:
    """The store's directory on disk; the first one to ask makes it."""
    link = directory / SPILL
    if not link.is_symlink():
        made = tempfile.mkdtemp(prefix="wukong-spill-")
        try:
            link.symlink_to(made)
        except FileExistsError:
            os.rmdir(made)
    return link.readlink()


def remove_directory(directory: Path) -> None:
    """Remove a store that nobody uses any more, with its blobs on disk."""
    link = directory / SPILL
    if link.is_symlink():
        shutil.rmtree(link.readlink(), ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)


def hold_alive(directory: Path) -> int:
    """Say that this process uses the directory. Returns the file descriptor that says so.

    Raises:
        StoreUnavailable: the directory is just being removed.
    """
    fd = os.open(directory / ALIVE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    except OSError:
        pass
    os.close(fd)
    raise StoreUnavailable(f"{directory}: the job store is being removed")


def secret_of(directory: Path) -> bytes:
    """Read the store's secret; the first one to ask makes it.

    Raises:
        SecurityError: others could read it.
        CorruptBlob: it has not the right length.
    """
    path = directory / "secret"
    if not path.exists():
        _make_secret(directory, path)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise SecurityError(f"{path}: must belong to its user and have mode 0600")
        secret = os.read(fd, SECRET_BYTES + 1)
    finally:
        os.close(fd)
    if len(secret) != SECRET_BYTES:
        raise CorruptBlob(f"{path}: {len(secret)} bytes instead of {SECRET_BYTES}")
    return secret


def _make_secret(directory: Path, path: Path) -> None:
    draft = directory / f"secret-{secrets.token_hex(8)}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, secrets.token_bytes(SECRET_BYTES))
        # A link is made whole or not at all, and only by the first of several processes.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.close(fd)
        os.unlink(draft)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def remove_stale(root: Path = DEFAULT_ROOT) -> list[Path]:
    """Remove this user's default directories that no living process uses and nobody keeps.

    Returns: the directories that were removed.
    """
    removed = []
    for path in sorted(root.glob(f"wukong-{os.getuid()}-*")):
        name = _DEFAULT_NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not path.is_dir() or (path / KEEP).exists():
            continue
        try:
            fd = os.open(path / ALIVE, os.O_RDWR)
        except OSError:
            # Between making the directory and saying that it is used; or never come to that.
            if _lives(int(name[2])):
                continue
            remove_directory(path)
            removed.append(path)
            continue
        try:
            # While this lock is held nobody can open the store; afterwards the file is gone.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info("removing %s, which a dead process has left behind", path)
            remove_directory(path)
            removed.append(path)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
    return removed
