"""The LMDB environment of an embedded store, as this process shares it among its threads.

LMDB wants a path opened once in a process and never used across a fork: `open_environment` keeps
count, and a child that was forked is refused. One write transaction at a time, in all processes;
LMDB's lock is robust, so that a killed writer harms nobody. A stopped one would: see `_Watchdog`.

Pages are written through the map. A page that a full file system cannot provide would then end the
process with SIGBUS, so that the file is provided with room ahead of what is used (`_make_room`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lmdb

from wukong.errors import CorruptBlob, InternalError, StoreUnavailable, WukongError
from wukong.storage import local_files
from wukong.storage.local_peers import FREE, HOLDS, WANTS, WriterMark, kill_stopped_holders, sweep

T = TypeVar("T")

MAP_BYTES = 1 << 34
"""Address space and the store's limit; memory is used only for what is written."""
MAX_READERS = 1024
"""Read transactions at a time, of all processes; 64 bytes each."""
ROOM_BYTES = 8 << 20
"""What one operation may write, besides what it brings along; one may also rewrite all there is."""
LOOK_BYTES = 128 << 10
"""This process writes so much between two looks at the room; the others do so too."""
STUCK_LOOK_S = 0.5
N_STUCK_LOOKS = 2
"""A writer that waits at so many looks in a row has waited for over a second."""
N_IDLE_LOOKS = 10
FORKED = (
    "this process was forked from one that had the store open, and LMDB cannot be used across a "
    "fork; fork before opening the store, or execute a new program"
)

_DAMAGED = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)


class Environment:
    """Transactions on one store's directory. Thread-safe; from `open_environment` only."""

    def __init__(self, directory: Path) -> None:
        """Open the directory's environment, and make it when it is new."""
        self.directory = directory
        self.n_users = 0
        self.is_forked = False
        self._turn = threading.Lock()
        self._watchdog: _Watchdog | None = None
        self._room_bytes = 0
        self._n_unseen_bytes = 0
        self._refusal = ""
        self._default_db: lmdb._Database | None = None
        try:
            self._open()
        except WukongError:
            raise
        except OSError as error:
            raise StoreUnavailable(f"{directory}: cannot hold a job store: {error}") from error

    def read(self, operation: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        """Run an operation on a snapshot; it waits for nobody."""
        self._check_usable()
        try:
            with self._begin_read() as txn:
                return operation(txn)
        except lmdb.Error as error:
            raise self._translated(error) from error

    def write(
        self,
        operation: Callable[[lmdb.Transaction[bytes]], tuple[T, int]],
        n_expected_bytes: int = 0,
        rewrites_all: bool = False,
    ) -> T:
        """Run an operation as the only writer; it takes effect wholly, on return, or not at all.

        Args:
            operation: returns its result and how many bytes it has written at most.
            n_expected_bytes: what it brings along, when that is much.
            rewrites_all: it may touch every row of a job, so that all that is there is copied.
        Raises:
            StoreUnavailable: the store is full.
        """
        with self._turn:
            self._check_usable()
            if self._n_unseen_bytes >= LOOK_BYTES or n_expected_bytes or rewrites_all:
                self._make_room(n_expected_bytes, rewrites_all)
            if self._watchdog is None:
                self._watchdog = _Watchdog(self)
            watchdog = self._watchdog
            mark = self._mark.byte
            mark[0] = WANTS
            watchdog.n_begun += 1
            watchdog.busy = True
            try:
                with self._env.begin(db=self._default_db, write=True) as txn:
                    mark[0] = HOLDS
                    result, n_bytes = operation(txn)
                self._n_unseen_bytes += n_bytes
                return result
            except lmdb.Error as error:
                raise self._translated(error) from error
            finally:
                mark[0] = FREE
                watchdog.busy = False

    def clear_dead_readers(self) -> None:
        """Give back the snapshots of killed processes, whose pages could not be used again."""
        self._check_usable()
        self._env.reader_check()

    def retire(self, watchdog: _Watchdog, n_begun: int) -> bool:
        """Let the watchdog go when nothing was written since; the next write makes a new one."""
        with self._turn:
            if watchdog.n_begun == n_begun:
                self._watchdog = None
                return True
            return False

    def close(self) -> None:
        """Let go of everything; from `close_environment` only."""
        with self._turn:
            self._refusal = "it has been closed"
            self._mark.close()
            self._env.close()
            os.close(self._alive_fd)
        self._end_watchdog()

    def abandon(self) -> None:
        """In a forked child: never use or close what belongs to the parent."""
        self.is_forked = True
        self._refusal = FORKED
        os.close(self._alive_fd)
        # A thread of the parent may have held it when the process was forked.
        self._turn = threading.Lock()

    def _open(self) -> None:
        """Take hold of the directory, or leave nothing of this process in it."""
        directory = self.directory
        local_files.prepare_directory(directory)
        with contextlib.ExitStack() as undo:
            self._alive_fd = local_files.hold_alive(directory)
            undo.callback(os.close, self._alive_fd)
            self.secret = local_files.secret_of(directory)
            sweep(directory)
            self._mark = WriterMark(directory)
            undo.callback(self._mark.close)
            try:
                self._env = _opened(directory)
                undo.callback(self._env.close)
                self._make_room()
            except lmdb.Error as error:
                raise self._translated(error) from error
            undo.callback(self._end_watchdog)
            # By `write`, since another process may have been stopped inside a transaction.
            self.rows, self.queue = self.write(
                lambda txn: ((self._env.open_db(b"rows", txn), self._env.open_db(b"queue", txn)), 0)
            )
            self._default_db = self.rows
            undo.pop_all()

    def _end_watchdog(self) -> None:
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.end()

    def _check_usable(self) -> None:
        if self._refusal:
            raise StoreUnavailable(f"{self.directory}: {self._refusal}")

    def _begin_read(self) -> lmdb.Transaction[bytes]:
        try:
            return self._env.begin(db=self.rows)
        except lmdb.ReadersFullError:
            self._env.reader_check()
            return self._env.begin(db=self.rows)

    def _make_room(self, n_expected_bytes: int = 0, rewrites_all: bool = False) -> None:
        """Have the file system provide the pages that the next operations may write."""
        used_bytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        needed_bytes = used_bytes + rewrites_all * used_bytes + 2 * n_expected_bytes + ROOM_BYTES
        if self._room_bytes < min(needed_bytes, MAP_BYTES):
            # Snapshots of dead processes are a reason to grow that can be removed.
            self._env.reader_check()
            try:
                self._allocate(needed_bytes + max(used_bytes, ROOM_BYTES))
            except OSError:
                self._allocate_or_refuse(needed_bytes)
        self._n_unseen_bytes = 0

    def _allocate_or_refuse(self, n_bytes: int) -> None:
        try:
            self._allocate(n_bytes)
        except OSError as error:
            raise StoreUnavailable(
                f"{self.directory}: no room for {n_bytes} bytes of job rows: {error}"
            ) from error

    def _allocate(self, n_bytes: int) -> None:
        room_bytes = min(n_bytes, MAP_BYTES)
        # The file is LMDB's, but its locks are on lock.mdb: this one may be closed again.
        fd = os.open(self.directory / "data.mdb", os.O_RDWR)
        try:
            os.posix_fallocate(fd, 0, room_bytes)
        finally:
            os.close(fd)
        self._room_bytes = room_bytes

    def _translated(self, error: lmdb.Error) -> Exception:
        if isinstance(error, lmdb.MapFullError | lmdb.TxnFullError):
            return StoreUnavailable(
                f"{self.directory}: the job store is full ({MAP_BYTES >> 30} GiB at most); "
                "forget jobs, or split this one"
            )
        if isinstance(error, _DAMAGED):
            return CorruptBlob(f"{self.directory}: the job store is damaged: {error}")
        if isinstance(error, lmdb.BadValsizeError):
            return InternalError(f"{self.directory}: an id is too long: {error}")
        return StoreUnavailable(f"{self.directory}: {error}")


def _opened(directory: Path) -> lmdb.Environment:
    # Nothing is synced to disk: the store shall survive its processes, not the machine.
    environment = lmdb.open(
        str(directory),
        map_size=MAP_BYTES,
        mode=0o600,
        writemap=True,
        sync=False,
        metasync=False,
        readahead=False,
        meminit=True,
        max_dbs=2,
        max_readers=MAX_READERS,
        max_spare_txns=4,
    )
    environment.reader_check()
    return environment


class _Watchdog:
    """Ends stopped processes that keep this one from writing for over a second.

    A thread that looks at a writer's progress now and then, and goes when there are no writes: it
    costs an operation two assignments, and an idle process nothing.
    """

    def __init__(self, environment: Environment) -> None:
        self.n_begun = 0
        self.busy = False
        self._environment = environment
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wukong-watchdog", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop looking."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        seen, n_stuck, n_idle = -1, 0, 0
        while not self._over.wait(STUCK_LOOK_S):
            same = self.n_begun == seen
            seen = self.n_begun
            n_stuck = n_stuck + 1 if same and self.busy else 0
            n_idle = n_idle + 1 if same and not self.busy else 0
            if n_stuck >= N_STUCK_LOOKS:
                kill_stopped_holders(self._environment.directory)
            if n_idle >= N_IDLE_LOOKS and self._environment.retire(self, seen):
                return


# ------------------------------------------------------------------ one of each path in a process

_open: dict[str, Environment] = {}
_open_lock = threading.Lock()


def open_environment(directory: Path) -> Environment:
    """The process's one environment of a directory; give it back with `close_environment`.

    Raises:
        StoreUnavailable: as `Environment`; and in a child of a process that had it open.
    """
    path = os.path.realpath(directory)
    if path in _abandoned:
        raise StoreUnavailable(f"{path}: {FORKED}")
    with _open_lock:
        environment = _open.get(path)
        if environment is None:
            environment = _open[path] = Environment(Path(path))
        environment.n_users += 1
        return environment


def close_environment(environment: Environment) -> None:
    """One user less; the last one closes it."""
    with _open_lock:
        environment.n_users -= 1
        if environment.n_users == 0 and _open.get(str(environment.directory)) is environment:
            del _open[str(environment.directory)]
            environment.close()


def _forget_in_child() -> None:
    global _open_lock
    _open_lock = threading.Lock()
    for path, environment in _open.items():
        with contextlib.suppress(OSError):
            environment.abandon()
        # Freed, it would close what the parent has made; so it stays, unused.
        _abandoned[path] = environment
    _open.clear()


_abandoned: dict[str, Environment] = {}
os.register_at_fork(after_in_child=_forget_in_child)
