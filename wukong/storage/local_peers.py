"""The processes that share one embedded store: who lives, who waits, who holds the writers' lock.

Each process leaves files named after itself, "pid-starttime-number", so that others can tell a dead
one, and one whose pid was given to somebody else.

    writers/NAME   one byte, mapped by its process: what it does with the writers' lock
    pipes/NAME     a FIFO; a byte in it wakes the thread that waits for a job
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

WRITERS = "writers"
PIPES = "pipes"

FREE, WANTS, HOLDS = 0, 1, 2
"""What a process does with the writers' lock."""

STOPPED_TWICE_S = 0.2
"""Between two looks at a stopped process: job control stops processes for an instant, too."""

_number = itertools.count()


def own_name() -> str:
    """A new name for a file of this process."""
    pid = os.getpid()
    return f"{pid}-{_start_of(pid)}-{next(_number)}"


def _stat_of(pid: int) -> list[str]:
    """State and later fields of /proc/pid/stat; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # The command's name before it may contain spaces and parentheses.
    return text[text.rindex(")") + 2 :].split()


def _start_of(pid: int) -> str:
    """When the process began, in ticks since boot; "" when it does not live."""
    found = _stat_of(pid)
    return found[19] if found else ""


def _state_of(name: str) -> tuple[int, str]:
    """The pid in a name, and that process's state letter; "" when it is dead."""
    pid, start, _ = name.split("-")
    found = _stat_of(int(pid))
    alive = bool(found) and found[19] == start and found[0] not in "ZX"
    return int(pid), found[0] if alive else ""


def sweep(directory: Path) -> None:
    """Remove the files of dead processes."""
    for folder in (WRITERS, PIPES):
        for name in os.listdir(directory / folder):
            if not _state_of(name)[1]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(directory / folder / name)


# ------------------------------------------------------------------ the writers' lock


class WriterMark:
    """This process's byte beside the writers' lock."""

    def __init__(self, directory: Path) -> None:
        """Make the mark's file."""
        self._path = directory / WRITERS / own_name()
        # Written, not truncated to size: in a full file system a hole would end in SIGBUS.
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, bytes([FREE]))
            self.byte = mmap.mmap(fd, 1)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Remove the mark."""
        self.byte.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def _stopped_holders(directory: Path) -> set[int]:
    """Stopped processes that keep others from writing.

    Those who say that they hold the lock; if nobody says so, those who want it, as one of them may
    have been stopped between getting the lock and saying so.
    """
    stopped: dict[int, set[int]] = {WANTS: set(), HOLDS: set()}
    held_by_running = False
    for name in os.listdir(directory / WRITERS):
        try:
            mark = (directory / WRITERS / name).read_bytes()[0]
        except (FileNotFoundError, IndexError):
            continue
        pid, letter = _state_of(name)
        if letter == "T" and mark in stopped:
            stopped[mark].add(pid)
        elif letter and mark == HOLDS:
            held_by_running = True
    if stopped[HOLDS] or held_by_running:
        return stopped[HOLDS]
    return stopped[WANTS]


def kill_stopped_holders(directory: Path) -> None:
    """End processes that were stopped while they held the writers' lock.

    Whatever such a process was doing is done again by others; nothing of it was recorded.
    """
    suspects = _stopped_holders(directory)
    if not suspects:
        return
    time.sleep(STOPPED_TWICE_S)
    for pid in suspects & _stopped_holders(directory):
        logger.warning(
            "process %d is stopped and holds the lock of the job store in %s; killing it, "
            "its work is done again by others",
            pid,
            directory,
        )
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:
            logger.warning("process %d may not be killed; continue or end it by hand", pid)


# ------------------------------------------------------------------ waiting


class Pipe:
    """What one waiting thread sleeps on."""

    def __init__(self, directory: Path) -> None:
        """Make the FIFO and hold both of its ends, so that it never is at its end."""
        self.name = own_name()
        self._path = directory / PIPES / self.name
        os.mkfifo(self._path, 0o600)
        self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Sleep until somebody wakes this pipe, or has done so before, or the time is up."""
        if self._poll.poll(max(0.0, timeout_s) * 1000):
            os.read(self._fd, 65536)

    def close(self) -> None:
        """Remove the FIFO."""
        os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def wake(directory: Path, names: list[str]) -> Iterator[str]:
    """Write a byte to each pipe. Yields the names of those that nobody holds any more."""
    for name in names:
        try:
            fd = os.open(f"{directory}/{PIPES}/{name}", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            yield name
            continue
        try:
            os.write(fd, b"!")
        except BlockingIOError:
            pass  # full of wake-ups that have not been seen yet
        except BrokenPipeError:
            yield name
        finally:
            os.close(fd)
