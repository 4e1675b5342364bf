"""Starts a server for Dask clients in a loop and thread of its own, and ends it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import dask.config
from distributed.security import Security
from distributed.utils import LoopRunner, silence_logging_cmgr, sync

from wukong.scheduler.dask_server import DaskServer, OpenSession
from wukong.scheduler.dask_server_clients import check_own_version

MAX_WORKERS = 64
"""So many addresses are given as workers' at most; each is a listening socket."""
BY_TASKS = {"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"}
"""With a client, Dask would choose shuffles that need workers which talk to each other."""


class ServerHost:
    """A running server. Clients of this process may share its loop.

    Args:
        open_session: see `DaskServer`.
        n_executors: as many workers are shown.
        are_threads: executors are threads of this process.
        address: where to listen: `inproc://`, `tcp://host:port`, `tls://host:port`; port 0: any.
        security: for `tls://`.
    Raises:
        ImportError: the installed distributed is too old or too new.
        OSError: the address cannot be listened at.
    """

    def __init__(
        self,
        open_session: OpenSession,
        *,
        n_executors: int,
        are_threads: bool,
        address: str,
        security: Security | None = None,
    ) -> None:
        check_own_version()
        self.security = security or Security()
        self._lock = threading.Lock()
        self._is_closed = False
        self._undo = contextlib.ExitStack()
        # As Dask's own local cluster does: connections that come and go are no news.
        self._undo.enter_context(silence_logging_cmgr(logging.WARNING))
        self._runner = LoopRunner()
        self._runner.start()
        self.loop = self._runner.loop
        try:
            self.server: DaskServer = sync(
                self.loop, self._start, open_session, n_executors, are_threads, address
            )
        except BaseException:
            self._runner.stop()
            self._undo.close()
            raise
        self.address: str = self.server.address
        chosen = {
            name: method for name, method in BY_TASKS.items() if dask.config.get(name, None) is None
        }
        self._undo.enter_context(dask.config.set(chosen))

    async def _start(
        self,
        open_session: OpenSession,
        n_executors: int,
        are_threads: bool,
        address: str,
    ) -> DaskServer:
        server = DaskServer(
            open_session,
            n_executors=n_executors,
            are_threads=are_threads,
            security=self.security,
        )
        try:
            await server.listen_at(address)
            protocol, _, place = server.address.partition("://")
            host = place.rpartition(":")[0]
            # A port of its own for each worker that is shown, so that it can be connected to.
            own = "inproc://" if protocol == "inproc" else f"{protocol}://{host}:0"
            for number in range(min(n_executors, MAX_WORKERS)):
                server.workers[await server.listen_at(own)] = str(number)
            server.open_page()
            await server
        except BaseException:
            await server.close()
            raise
        return server

    @property
    def is_here(self) -> bool:
        """The caller runs in the server's loop, and must not wait for it."""
        return threading.get_ident() == self.server.thread_id

    @property
    def is_serving(self) -> bool:
        """Neither closed nor ended by a client."""
        return not self._is_closed and self.server.status.name == "running"

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Run a coroutine function, or a function, in the server's loop, and wait for it."""
        return sync(self.loop, function, *arguments, **options)

    def close(self) -> None:
        """End the server and its loop, unless a client shares that. Idempotent; not for the
        loop's own thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        sync(self.loop, self.server.close)
        self._runner.stop()
        self._undo.close()
