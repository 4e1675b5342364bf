"""Work that nobody waits for: done while the next job runs, or a moment after the last one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

MOMENT_S = 0.02
"""A client that makes one small call after the other does its chores while it waits for them; one
that makes no more calls shall leave nothing behind for long."""


class Chores:
    """Chores of one cluster, each done by whoever comes first. Thread-safe."""

    def __init__(self) -> None:
        self._pending: deque[Callable[[], object]] = deque()
        self._are_there = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def add(self, chore: Callable[[], object]) -> None:
        """Have something done soon; it must not raise, and may be done twice."""
        self._pending.append(chore)
        if not self._are_there.is_set():
            self._are_there.set()
            if self._thread is None:
                self._start()

    def do_pending(self) -> None:
        """Do now what is pending."""
        while True:
            try:
                chore = self._pending[0]
            except IndexError:
                return
            chore()
            # Only now, since Ctrl-C may come at any moment; another thread may have been faster.
            with contextlib.suppress(ValueError):
                self._pending.remove(chore)

    def close(self) -> None:
        """Do what is pending, and end."""
        self.do_pending()
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        self._are_there.set()
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="wukong-chores", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._is_closed:
            self._are_there.wait()
            time.sleep(MOMENT_S)
            self._are_there.clear()
            self.do_pending()
