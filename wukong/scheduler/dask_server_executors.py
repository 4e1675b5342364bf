"""The server's calls to executors: `Client.run`, plugins, files; and what tasks find around them.

Executors of other processes register when the first task of a Dask client arrives there
(`dask_server_tasks.Home`), each under one of the addresses that are shown as workers'. Those that
have not yet are sent tasks that do nothing, so that they do. For threads of this process the
server itself answers, once for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from distributed.comm import Comm, CommClosedError
from distributed.core import error_message
from distributed.protocol import pickle

from wukong.scheduler.dask_server_tasks import Scratch, TaskScene, TaskWorker, greet

if TYPE_CHECKING:
    from wukong.scheduler.dask_server import DaskServer

logger = logging.getLogger(__name__)

GREETING_S = 15.0
"""Executors that start, or are busy with other tasks, are waited for so long; a call goes to those
that have come."""


ONE_EACH = ("run", "versions")
"""What is answered once for each worker that is shown, though an executor whose task waits for
others has another one beside it."""


class Executors:
    """The handlers; for the loop's thread.

    Args:
        are_threads: executors are threads of this process.
    """

    def __init__(self, server: DaskServer, are_threads: bool) -> None:
        self._server = server
        self._are_threads = are_threads
        self._comms: dict[str, Comm] = {}
        """Registered executors, by the address that is theirs."""
        self._changed = asyncio.Event()
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._calls = itertools.count()
        self._plugins: dict[str, bytes] = {}
        self._n_plugins = 0
        """Plugins that have been registered or taken away."""
        self._local_lock = threading.Lock()
        """Guards the two below."""
        self._shown: dict[str, TaskWorker] = {}
        """By address, where executors are threads."""
        self._local: dict[str, TaskWorker] = {}
        """The same by the executor's name."""
        self.scratch = Scratch()
        server.handlers.update(
            {
                "register-executor": self.add_executor,
                "broadcast": self.broadcast,
                "register_worker_plugin": self.register_plugin,
                "unregister_worker_plugin": self.unregister_plugin,
                "register_nanny_plugin": self.register_nanny_plugin,
                "unregister_nanny_plugin": self.unregister_nanny_plugin,
                "register_scheduler_plugin": self.register_scheduler_plugin,
                "unregister_scheduler_plugin": server.remove_plugin,
                "restart_workers": self.restart_workers,
            }
        )
        server.stream_handlers["executor-reply"] = self._take_reply

    def scene(self) -> TaskScene:
        """What is to surround tasks that are added now."""
        security = self._server.security if self._server.address.startswith("tls://") else None
        local = self._local_worker if self._are_threads else None
        return TaskScene(self._server.address, security, self._n_plugins, local)

    def _local_worker(self, holder: str) -> TaskWorker:
        """The worker that a thread of this process finds; by any thread."""
        with self._local_lock:
            worker = self._local.get(holder)
            if worker is None:
                shown = list(self._local_workers().values())
                worker = self._local[holder] = shown[len(self._local) % len(shown)]
            return worker

    def _local_workers(self) -> dict[str, TaskWorker]:
        """One for each address."""
        if not self._shown:
            self._shown = {
                address: self._make_worker(name, address)
                for address, name in self._server.workers.items()
            }
        return self._shown

    def _make_worker(self, name: str, address: str) -> TaskWorker:
        server = self._server
        return TaskWorker(
            name,
            server.rpc(server.address),
            server.loop,
            server.security,
            lambda topic, msg: server.loop.add_callback(server.log_event, topic, msg),
            lambda: address,
            self.scratch,
        )

    # -------------------------------------------------------------- executors come and go

    async def add_executor(self, comm: Comm, name: str, pid: int) -> None:
        """Serve an executor's stream until it ends."""
        free = [address for address in self._server.workers if address not in self._comms]
        address = free[0] if free else f"{comm.peer_address}#{pid}"
        self._comms[address] = comm
        try:
            await comm.write(
                {
                    "op": "welcome",
                    "address": address,
                    "plugins": self._plugins,
                    "n_plugins": self._n_plugins,
                }
            )
            self._changed.set()
            await self._server.handle_stream(comm, extra={})
        finally:
            del self._comms[address]

    async def _greet(self, n_wanted: int) -> None:
        """Have executors register that have not, as far as they are free."""
        if len(self._comms) >= n_wanted:
            return
        graph = {("greeting", i): (greet, i) for i in range(2 * n_wanted)}
        session = self._server.session
        values = session.extend(graph, list(graph), scene=self.scene())
        deadline = self._server.loop.time() + GREETING_S
        while len(self._comms) < n_wanted:
            self._changed.clear()
            left_s = deadline - self._server.loop.time()
            try:
                await asyncio.wait_for(self._changed.wait(), max(0.0, left_s))
            except asyncio.TimeoutError:
                break
        session.release(values)

    async def _targets(self, workers: Iterable[str] | None) -> dict[str, Any]:
        """Address -> how to call it, of the executors that can be called now."""
        server = self._server
        if self._are_threads:
            with self._local_lock:
                found: dict[str, Any] = dict(self._local_workers())
        else:
            await self._greet(len(server.workers))
            found = dict(self._comms)
        if workers is None:
            return found
        wanted = set(workers)
        names = {address for address, name in server.workers.items() if name in wanted}
        missing = wanted - set(found) - set(server.workers.values())
        if missing:
            raise ValueError(f"no executor answers at {sorted(map(str, missing))}")
        return {a: target for a, target in found.items() if a in wanted or a in names}

    async def _call(self, target: Any, msg: Mapping[str, Any]) -> Any:
        if isinstance(target, TaskWorker):
            return await target.answer(dict(msg))
        call = next(self._calls)
        reply = self._replies[call] = asyncio.get_running_loop().create_future()
        closed = asyncio.ensure_future(_closed(target))
        try:
            message = {"op": "call", "call": call, "msg": msg, "n_plugins": self._n_plugins}
            await target.write(message)
            await asyncio.wait([reply, closed], return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                raise CommClosedError("the executor has ended before it answered")
            return reply.result()
        finally:
            closed.cancel()
            del self._replies[call]

    def _take_reply(self, call: int, result: Any) -> None:
        reply = self._replies.get(call)
        if reply is not None and not reply.done():
            reply.set_result(result)

    async def broadcast(
        self,
        msg: Mapping[str, Any],
        workers: Iterable[str] | None = None,
        nanny: bool = False,
        on_error: str = "raise",
        **_hosts: object,
    ) -> dict[str, Any]:
        """Ask executors, and collect their answers by address.

        Args:
            nanny: has no meaning here: what would run in a nanny runs in the executor.
        """
        targets = await self._targets(workers)
        if msg["op"] in ONE_EACH:
            shown = self._server.workers
            ordered = sorted(targets, key=lambda address: address not in shown)
            targets = {address: targets[address] for address in ordered[: len(shown)]}
        answers = await asyncio.gather(
            *[self._call(target, msg) for target in targets.values()], return_exceptions=True
        )
        results = {}
        for address, answer in zip(targets, answers, strict=True):
            if isinstance(answer, BaseException):
                if on_error == "raise":
                    raise answer
                if on_error == "return_pickle":
                    results[address] = pickle.dumps(answer)
                elif on_error == "return":
                    results[address] = answer
            else:
                results[address] = answer
        return results

    # -------------------------------------------------------------- plugins

    async def register_plugin(
        self, comm: Comm, plugin: bytes, name: str, idempotent: bool = False
    ) -> dict[str, Any]:
        """Set a plugin up on the executors there are, and on those to come before their tasks."""
        if idempotent and name in self._plugins:
            return {}
        self._plugins[name] = plugin
        self._n_plugins += 1
        return await self.broadcast({"op": "plugin-add", "plugin": plugin, "name": name})

    async def unregister_plugin(self, comm: Comm, name: str) -> dict[str, Any]:
        """Tear a plugin down wherever it is.

        Raises:
            ValueError: there is none of that name.
        """
        if self._plugins.pop(name, None) is None:
            raise ValueError(f"The worker plugin {name} does not exist")
        self._n_plugins += 1
        return await self.broadcast({"op": "plugin-remove", "name": name})

    async def register_nanny_plugin(
        self, comm: Comm, plugin: bytes, name: str, idempotent: bool = False
    ) -> dict[str, Any]:
        """There are no nannies: says so, once for each worker."""
        error = NotImplementedError("Wukong's executors have no nannies; use a WorkerPlugin")
        return {address: error_message(error) for address in self._server.workers}

    async def unregister_nanny_plugin(self, comm: Comm, name: str) -> dict[str, Any]:
        """As no such plugin could be registered.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"The nanny plugin {name} does not exist")

    async def register_scheduler_plugin(
        self, comm: Comm, plugin: bytes, name: str, idempotent: bool = False
    ) -> None:
        """Show a client's plugin what happens in the server."""
        if idempotent and name in self._server.plugins:
            return
        loaded = pickle.loads(plugin)
        if name in self._server.plugins:
            self._server.remove_plugin(name)
        result = loaded.start(self._server)
        if asyncio.iscoroutine(result):
            await result
        self._server.add_plugin(loaded, name=name)

    def restart_workers(self, workers: Iterable[str], **_more: object) -> dict[str, str]:
        """Nothing of a worker is kept between tasks, so nothing needs to be restarted."""
        return dict.fromkeys(workers, "OK")


async def _closed(comm: Comm) -> None:
    """Wait until a comm is closed."""
    with contextlib.suppress(CommClosedError):
        while not comm.closed():
            await asyncio.sleep(0.1)
