"""What makes a cluster one that `distributed.Client(cluster)` takes; imports nothing of Dask's.

The server is started when its address is first asked for, which a client does; a cluster that only
runs `get` never pays for it, and needs no distributed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from wukong.errors import WukongError

if TYPE_CHECKING:
    from wukong.scheduler.dask_server_host import ServerHost


class Closing:
    """A close that is under way, or done. May be awaited, and need not be."""

    def __init__(self, thread: threading.Thread | None) -> None:
        self._thread = thread

    def __await__(self) -> Generator[Any, None, None]:
        thread = self._thread
        while thread is not None and thread.is_alive():
            yield from asyncio.sleep(0.01).__await__()


class DaskCluster:
    """The part of a cluster that Dask's clients see. Its server's methods may be called by any
    thread."""

    n_workers: int
    asynchronous = False
    _is_closed = False

    def __init__(self, are_threads: bool = False) -> None:
        self._are_threads = are_threads
        self._host: ServerHost | None = None
        self._host_lock = threading.Lock()

    # -------------------------------------------------------------- the server

    def open_session(
        self,
        on_news: Callable[[Sequence[Any]], None],
        on_runs: Callable[[Sequence[Any]], None] | None = None,
    ) -> Any:
        """Open the session that the server works with."""
        raise NotImplementedError

    def _close_now(self) -> None:
        """Close the cluster, and wait for that."""
        raise NotImplementedError

    def serve(self, address: str | None = None, security: Any = None) -> str:
        """Start the server for `distributed.Client`s, and return its address. Idempotent.

        It is started by itself when a client is made; call this to choose the address.

        Args:
            address: `tcp://127.0.0.1:8786`, `tls://0.0.0.0:8786`, `inproc://`. By default a free
                port of this machine for executors that are processes; for threads `inproc://`.
            security: a `distributed.Security` with certificates, for `tls://`.
        Raises:
            ImportError: distributed is missing, or too old, or too new.
            WukongError: the cluster is closed.
        """
        with self._host_lock:
            if self._is_closed:
                raise WukongError("this cluster is closed; make a new one")
            if self._host is None:
                self._host = self._start(address, security)
            return self._host.address

    def _start(self, address: str | None, security: Any) -> ServerHost:
        try:
            from wukong.scheduler.dask_server_host import ServerHost
        except ModuleNotFoundError as error:
            raise ImportError(
                f"a server for Dask clients needs {error.name}: pip install wukong[client]"
            ) from error
        if address is None:
            protocol = "tcp" if security is None else "tls"
            address = "inproc://" if self._are_threads else f"{protocol}://127.0.0.1:0"
        return ServerHost(
            self.open_session,
            n_executors=self.n_workers,
            are_threads=self._are_threads,
            address=address,
            security=security,
        )

    def _close_server(self) -> None:
        """End the server, if there is one. Not for its own thread."""
        with self._host_lock:
            host = self._host
        if host is not None:
            host.close()

    # -------------------------------------------------------------- what Client asks for

    @property
    def scheduler_address(self) -> str:
        """Where clients connect; starts the server."""
        if self._host is not None:
            return self._host.address
        return self.serve()

    @property
    def is_serving(self) -> bool:
        """Whether there is a server that no client has shut down."""
        return self._host is not None and self._host.is_serving

    @property
    def loop(self) -> Any:
        """The loop for a client: the caller's, where it is in one, else the server's."""
        from tornado.ioloop import IOLoop

        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            return IOLoop.current()
        self.serve()
        assert self._host is not None
        return self._host.loop

    @property
    def security(self) -> Any:
        """The TLS credentials that clients need; None: none."""
        return None if self._host is None else self._host.security

    @property
    def status(self) -> Any:
        """In distributed's words: running or closed."""
        from distributed.core import Status

        return Status.closed if self._is_closed else Status.running

    @property
    def name(self) -> str:
        """What it is called in reprs."""
        return type(self).__name__

    @property
    def scheduler_info(self) -> Any:
        """What the server says of itself."""
        from distributed.objects import SchedulerInfo

        self.serve()
        assert self._host is not None
        identity = self._host.server.handlers["identity"]
        return SchedulerInfo(identity() if self._host.is_here else self._host.call(identity))

    @property
    def dashboard_link(self) -> str:
        """A page with the live counters; "" while there is no server."""
        if self._host is None:
            return ""
        protocol, _, place = self._host.address.partition("://")
        host = "127.0.0.1" if protocol == "inproc" else place.rpartition(":")[0]
        return f"http://{host}:{self._host.server.services['dashboard']}/status"

    def _repr_html_(self) -> str:
        state = "closed" if self._is_closed else "running"
        address = "not started yet" if self._host is None else self._host.address
        rows = {"Executors": self.n_workers, "Status": state, "Server for clients": address}
        if self.dashboard_link:
            rows["Counters"] = f'<a href="{self.dashboard_link}">{self.dashboard_link}</a>'
        cells = "".join(
            f"<tr><th style='text-align: left'>{name}</th><td>{value}</td></tr>"
            for name, value in rows.items()
        )
        return f"<div><h3>{self.name}</h3><table>{cells}</table></div>"

    def get_client(self) -> Any:
        """A `distributed.Client` of this cluster."""
        from distributed import Client

        return Client(self)

    def close(self, timeout: float | None = None) -> Closing:
        """End the executors, and remove what is the cluster's own. Idempotent.

        In a coroutine it returns at once, and the result may be awaited. Jobs that others wait for
        are cancelled.

        Args:
            timeout: has no meaning here; Dask's clusters have it.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._close_now()
            return Closing(None)
        thread = threading.Thread(target=self._close_now, name="wukong-closing")
        thread.start()
        return Closing(thread)

    def __await__(self) -> Generator[Any, None, Any]:
        async def started() -> Any:
            return self

        return started().__await__()

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
