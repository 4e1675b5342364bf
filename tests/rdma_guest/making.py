"""Makes the guest's kernel while something else runs, which it shall not disturb."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from tests.rdma_guest.guest import REPOSITORY, NoGuest

SHOWN_BYTES = 8000
"""Of what was said, when it has failed."""


class Making:
    """A process that makes the kernel on processors that nobody else wants. A context manager.

    It says nothing unless it fails, and ends with the process that has started it, however that
    ends: the end of its standard input tells.
    """

    def __init__(self) -> None:
        # Whoever else wakes up takes the processor at once, which `nice` alone does not give.
        idle = ["chrt", "--idle", "0"] if shutil.which("chrt") else []
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [*idle, "nice", "-n", "19", sys.executable, "-m", "tests.rdma_guest", "--make"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Wait until the kernel is there.

        Raises:
            NoGuest: it cannot be made; the message ends with what was said.
        """
        if status := self._process.wait():
            self._said.seek(0)
            said = self._said.read()[-SHOWN_BYTES:].decode(errors="replace")
            raise NoGuest(f"the kernel was not made (status {status}):\n{said}")

    def close(self) -> None:
        """End it, if it still runs. Idempotent."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._said.close()

    def __enter__(self) -> Making:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def be_last() -> None:
    """Give way to every other session, as `nice` does within one (see sched(7), autogroups)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


def end_with_standard_input() -> None:
    """Have this process, and all of its group, end when whoever has started it does."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        # The script that builds takes its folder away with it.
        os.killpg(0, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
