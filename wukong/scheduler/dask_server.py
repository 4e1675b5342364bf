"""What a `distributed.Client` connects to: Dask's protocol, by a server that schedules nothing.

    client -- stream: update-graph, client-releases-keys, ... --> DaskServer --> session: extend,
           <- reports: key-in-memory, task-erred, ... ---------      |           release, cancel
           -- calls: gather, scatter, who_has, ... ------------>     |
                                                                     +<-- news, in batches

A graph extends the session's job, a future is a pin on a value, completions come from the
session's watcher. There is no state machine of tasks and no worker: the addresses that the server
gives as workers' are its own. Built on distributed's own server, comms and serialisation.

    dask_server_futures    the table of keys
    dask_server_keys       who holds them, who is told of them
    dask_server_graphs     a client's graph, made ready for the session
    dask_server_shuffles   peer-to-peer shuffles in it, made plain tasks
    dask_server_clients    one client's end: its reports, its versions
    dask_server_values     gather, scatter
    dask_server_facts      calls that only ask
    dask_server_looks      the task stream, reports, a page
    dask_server_executors  calls to executors
    dask_server_tasks      what tasks find around them, in executors
    dask_server_host       starts and ends the server for a cluster
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import dask.config
from distributed.broker import Broker
from distributed.comm import Comm
from distributed.core import Status
from distributed.diagnostics.memory_sampler import MemorySamplerExtension
from distributed.event import EventExtension
from distributed.multi_lock import MultiLockExtension
from distributed.protocol.serialize import Serialized
from distributed.publish import PublishExtension
from distributed.queues import QueueExtension
from distributed.security import Security
from distributed.semaphore import SemaphoreExtension
from distributed.utils import offload
from distributed.variable import VariableExtension
from tornado.ioloop import PeriodicCallback

from wukong import config
from wukong.errors import MissingKey
from wukong.executor.pool_seats import release_memory
from wukong.scheduler.calls import Key
from wukong.scheduler.dask_server_clients import Outbox, check_versions
from wukong.scheduler.dask_server_executors import Executors
from wukong.scheduler.dask_server_facts import Facts
from wukong.scheduler.dask_server_futures import Entry, Holder, News, Work, as_failure
from wukong.scheduler.dask_server_graphs import (
    INLINE_BYTES,
    Piece,
    cut_known,
    keep_graph,
    read_graph,
    size_of_message,
)
from wukong.scheduler.dask_server_keys import KeyServer
from wukong.scheduler.dask_server_looks import Looks
from wukong.scheduler.dask_server_values import Values
from wukong.trace import RunRecord

logger = logging.getLogger(__name__)

INLINE_TASKS = 100
"""A graph of fewer tasks is planned in the loop's thread: handing it over takes longer."""
LOOK_S = 1.0
"""How often clients that have fallen silent are looked for."""

FIRST_BEAT_S = 6.0
"""A client's first heartbeat comes after the interval of its own configuration (5 s)."""
MOST_BEAT_S = 5.0
"""The longest interval that clients are asked for."""
GIVE_BACK_S = 1.0
"""What reading a large graph has taken is given back to the system after so long."""
RESTART_S = 0.05
"""A restart is answered so long after clients have been told of it."""
NO_ACTORS = (
    "Wukong has no actors: no executor keeps an object between tasks. Hold the state in a "
    "Variable, or pass it from task to task."
)
NO_PEERS = (
    "Wukong's executors do not talk to each other: this peer-to-peer shuffle runs as plain tasks, "
    'whose shards go through the store. method="tasks" is the default here, and quicker for many '
    "partitions."
)


OpenSession: TypeAlias = (
    "Callable[[Callable[[Sequence[News]], None], Callable[[Sequence[RunRecord]], None]], Work]"
)


class DaskServer(KeyServer):
    """Serves Dask clients from a session. For one event loop.

    Args:
        open_session: makes the session; it gets the functions that take news and records of runs,
            which it calls in any thread.
        n_executors: as many workers are shown to clients.
        are_threads: executors are threads of this process.
        security: TLS for `tls://` addresses.
    """

    default_port = 8786

    def __init__(
        self,
        open_session: OpenSession,
        *,
        n_executors: int,
        are_threads: bool,
        security: Security | None = None,
    ) -> None:
        self.security = security or Security()
        self.n_executors = n_executors
        self.started_at = time.time()
        self.services: dict[str, int] = {}
        """Name -> port; of pages that a browser can open."""
        self.workers: dict[str, str] = {}
        """Address -> name; filled when the server listens."""
        self._looked_at = time.monotonic()
        """When silent clients were looked for."""
        self._extending = asyncio.Lock()
        """Held from looking keys up until the new ones are in the table."""
        self._early: list[News] = []
        """News of values that are not in the table yet."""
        self._arrived: list[tuple[str, set[Key]]] = []
        """Graphs that are not in the table yet: whose, and the keys that were released since."""
        super().__init__(
            handlers={},
            deserialize=False,
            connection_args=self.security.get_connection_args("scheduler"),
            needs_workdir=False,
        )
        self.broker = Broker(dask.config.get("distributed.admin.low-level-log-length"), _any(self))
        # The base's own periodic work (ticks, profiles) is not started: it tells nothing here.
        self.periodic_callbacks.clear()
        self.periodic_callbacks["silent-clients"] = PeriodicCallback(
            self._remove_silent, LOOK_S * 1000
        )
        self._answer_clients()
        self.executors = Executors(self, are_threads)
        self.extensions = {
            "multi_locks": MultiLockExtension(self),
            "publish": PublishExtension(self),
            "queues": QueueExtension(self),
            "variables": VariableExtension(self),
            "semaphores": SemaphoreExtension(self),
            "events": EventExtension(self),
            "values": Values(self),
            "facts": Facts(self),
            "memory": MemorySamplerExtension(_any(self)),
        }
        self.looks = Looks(self)
        self.session = open_session(self._tell, self._tell_runs)

    def _answer_clients(self) -> None:
        """Mount what the server itself answers; its parts mount the rest."""
        self.handlers.update(
            {
                "register-client": self.add_client,
                "retry": self.retry,
                "restart": self.restart,
                "terminate": self.terminate,
            }
        )
        self.stream_handlers.update(
            {
                "update-graph": self.update_graph,
                "client-desires-keys": self.client_desires_keys,
                "client-releases-keys": self.client_releases_keys,
                "report-key": self.report_on_key,
                "heartbeat-client": self.client_heartbeat,
                "close-client": self.remove_client,
                "cancel-keys": self.cancel_keys,
                "subscribe-topic": self.subscribe_topic,
                "unsubscribe-topic": self.unsubscribe_topic,
                "log-event": self.log_event,
            }
        )

    # -------------------------------------------------------------- life

    async def start_unsafe(self) -> DaskServer:
        """Called once, by `start`."""
        base: Any = super()  # not annotated
        await base.start_unsafe()
        base.start_periodic_callbacks()
        return self

    async def listen_at(self, address: str) -> str:
        """Serve an address (`inproc://`, `tcp://host:port`, `tls://...`). Returns where it is."""
        base: Any = super()  # not annotated
        await base.listen(address, **self.security.get_listen_args("scheduler"))
        return str(self.listeners[-1].contact_address)

    def open_page(self) -> None:
        """Serve a page with counters, beside the first address."""
        protocol, _, place = self.address.partition("://")
        host = "127.0.0.1" if protocol == "inproc" else place.rpartition(":")[0]
        self.services["dashboard"] = self.looks.open_page(host)

    async def close(self, timeout: float | None = None, reason: str = "") -> None:
        """End the session, and say goodbye to clients. Idempotent."""
        if self.status in (Status.closing, Status.closed):
            await self._event_finished.wait()
            return
        self.status = Status.closing
        for plugin in list(self.plugins.values()):
            await self.call_plugin(plugin, "close")
        for outbox in list(self.client_comms.values()):
            outbox.send({"op": "stream-closed"})
            await outbox.close()
        # In this thread: at the interpreter's end there are no others to be had.
        self.session.close()
        self.executors.scratch.remove()
        self.looks.close_page()
        self.status = Status.closed
        await super().close(timeout, reason)

    async def terminate(self, reason: str = "asked by a client") -> None:
        """End the server: what `Client.shutdown` asks for. The answer is sent before."""
        self.loop.add_callback(self.close, reason=reason)

    async def restart(self, **_how: object) -> None:
        """Forget all keys and take their work back: what `Client.restart` asks for."""
        self.forget(list(self.tasks.values()))
        self.report({"op": "restart"})
        # The client is to see that before the answer: it drops all futures that it has then.
        await asyncio.sleep(RESTART_S)
        for plugin in list(self.plugins.values()):
            await self.call_plugin(plugin, "restart", scheduler=self)

    # -------------------------------------------------------------- clients

    async def add_client(self, comm: Comm, client: str, versions: dict[str, Any]) -> None:
        """Serve a client until its stream ends."""
        comm.name = "Server->Client"
        answer = check_versions(versions)
        outbox = Outbox(comm)
        outbox.send({"op": "stream-start", **answer})
        if answer["error"]:
            await outbox.close()
            return
        self.client_comms[client] = outbox
        holder = self.clients[client] = Holder(client, outbox.send)
        holder.silent_s = -FIRST_BEAT_S
        self.log_event(["all", client], {"action": "add-client", "client": client})
        for plugin in list(self.plugins.values()):
            await self.call_plugin(plugin, "add_client", scheduler=self, client=client)
        try:
            await self.handle_stream(comm, extra={"client": client})
        finally:
            self.remove_client(client)
            await outbox.close()
            self.client_comms.pop(client, None)

    def remove_client(self, client: str) -> None:
        """Release what a client holds. Idempotent; also for what stands in for clients."""
        is_there = client in self.clients
        super().remove_client(client)
        if is_there and client in self.client_comms:
            self.log_event(["all", client], {"action": "remove-client", "client": client})
            for plugin in list(self.plugins.values()):
                self.loop.add_callback(
                    self.call_plugin, plugin, "remove_client", scheduler=self, client=client
                )

    def client_heartbeat(self, client: str) -> None:
        """Note that a client lives."""
        if (holder := self.clients.get(client)) is not None:
            holder.silent_s = min(holder.silent_s, 0.0)

    def _remove_silent(self) -> None:
        silence_s = float(config.get("dask.client-silence-s"))
        now = time.monotonic()
        # A server that was held up itself has heard nobody meanwhile, which is nobody's fault.
        passed_s = min(now - self._looked_at, 2 * LOOK_S)
        self._looked_at = now
        for name, outbox in list(self.client_comms.items()):
            holder = self.clients.get(name)
            if holder is None:
                continue
            if not holder.is_paced and holder.silent_s > -FIRST_BEAT_S:
                # Not at the first look: a client expects its first message to come alone.
                holder.is_paced = True
                interval_s = min(MOST_BEAT_S, silence_s / 6)
                outbox.send({"op": "adjust-heartbeat-interval", "interval": interval_s})
            holder.silent_s += passed_s
            if holder.silent_s > silence_s:
                logger.warning(
                    "client %s has been silent for %.0f s: its futures are released",
                    name,
                    holder.silent_s,
                )
                self.remove_client(name)
                outbox.abort()

    # -------------------------------------------------------------- graphs

    async def update_graph(
        self,
        client: str,
        expr_ser: Any,
        keys: Collection[Key],
        annotations: Mapping[str, Any] | None = None,
        actors: object = None,
        **_scheduling: object,
    ) -> None:
        """Add a graph, or tell the client why that cannot be.

        Args:
            _scheduling: priorities by task, origin in the user's code: they have no use here.
        """
        keys = list(keys)
        released: set[Key] = set()
        self._arrived.append((client, released))
        try:
            if actors:
                raise NotImplementedError(NO_ACTORS)
            n_bytes = size_of_message(expr_ser)
            is_small = n_bytes < INLINE_BYTES
            sent = read_graph(expr_ser) if is_small else await offload(read_graph, expr_ser)
            if sent.is_peer_to_peer:
                self._warn_of_shuffles(client)
            source = expr_ser if isinstance(expr_ser, bytes) else keep_graph(expr_ser)
            if isinstance(expr_ser, Serialized):
                expr_ser.frames = []  # the stream keeps a message until the next one comes
            is_small = is_small and len(sent.dsk) < INLINE_TASKS
            async with self._extending:
                self.give_back()  # what the client has released before it sent this
                piece = cut_known(sent, keys, self.tasks, annotations or {})
                await self._extend(client, keys, piece, is_small, source, released)
                early, self._early = self._early, []
            self.learn(early)
            if not is_small:
                self.loop.call_later(GIVE_BACK_S, release_memory)
        except MissingKey as error:
            reason = {"reason": "lost dependencies", "msg": str(error)}
            self.send(client, {"op": "cancelled-keys", "keys": keys, **reason})
        except Exception as error:
            logger.info("a graph of client %s cannot be run: %s", client, error)
            failure = as_failure(error)
            report = {"exception": failure.pickled, "traceback": failure.frames or None}
            self.send(client, *[{"op": "task-erred", "key": key, **report} for key in keys])
        finally:
            self._arrived = [one for one in self._arrived if one[1] is not released]

    def _warn_of_shuffles(self, client: str) -> None:
        """Tell a client once that there are no shuffles from peer to peer."""
        holder = self.clients.get(client)
        if holder is not None and not holder.is_warned:
            holder.is_warned = True
            event = (time.time(), NO_PEERS)
            self.send(client, {"op": "event", "topic": "warn", "event": event})

    def client_releases_keys(self, keys: Iterable[Key], client: str) -> None:
        """Let a client hold keys no more, nor those of its graphs that are on their way."""
        keys = list(keys)
        super().client_releases_keys(keys, client)
        self._release_arrived(keys, client)

    def cancel_keys(
        self,
        keys: Collection[Key],
        client: str,
        force: bool = False,
        reason: str | None = None,
        msg: str | None = None,
    ) -> None:
        """Take back the work of keys, and of all that is computed from them; what is on its way
        is given back when it is there."""
        super().cancel_keys(keys, client, force, reason, msg)
        self._release_arrived(keys, client)

    def _release_arrived(self, keys: Collection[Key], client: str) -> None:
        for whose, released in self._arrived:
            if whose == client:
                released.update(keys)

    async def _extend(
        self,
        client: str,
        keys: Sequence[Key],
        piece: Piece,
        is_small: bool,
        source: bytes | None,
        released: Collection[Key],
    ) -> None:
        """Add a piece to the session's job and its keys to the table, held by the client.

        Args:
            released: keys that the client has released meanwhile.
        """
        guard = Holder("the graph that is being added")
        try:
            self.hold(piece.known, guard)
            values: Sequence[int] = ()
            if piece.keys:
                extend = partial(
                    self.session.extend,
                    piece.dsk,
                    piece.keys,
                    {key: entry.value for key, entry in piece.known.items()},
                    annotations=piece.annotations,
                    priority=piece.priority,
                    scene=self.executors.scene(),
                )
                values = extend() if is_small else await offload(extend)
            made: dict[Key, Entry] = dict(piece.known)
            for key, value in zip(piece.keys, values, strict=True):
                made[key] = self.futures.add(key, value)
                made[key].source = source
                self.futures.hold(made[key], guard)
            for key, upstream in piece.inputs.items():
                self.futures.link(made[key], [made[k] for k in upstream if k in made])
            # It may have gone meanwhile; then nobody holds the new keys.
            if (holder := self.clients.get(client)) is not None:
                self.hold([key for key in keys if key not in released], holder)
        finally:
            self.let_go(list(guard.entries), guard)

    def _tell(self, news: Sequence[News]) -> None:
        """What the session calls, in any thread."""
        self.loop.add_callback(self._learn, news)

    def _tell_runs(self, records: Sequence[RunRecord]) -> None:
        """As `_tell`, of what has run."""
        self.loop.add_callback(self.looks.take, records)

    def _learn(self, news: Sequence[News]) -> None:
        # While a graph is being added its values may be known here before their keys are.
        has_unknown = self.learn(news)
        if has_unknown and self._extending.locked():
            self._early += news

    # -------------------------------------------------------------- events and plugins

    def add_plugin(self, plugin: Any, *, name: str | None = None, **_more: object) -> None:
        """Show what happens to a scheduler plugin: clients, events, keys that get finished."""
        self.plugins[name or getattr(plugin, "name", None) or f"plugin-{id(plugin)}"] = plugin

    def remove_plugin(self, name: str) -> None:
        """Show a plugin nothing more.

        Raises:
            ValueError: there is none of that name.
        """
        if self.plugins.pop(name, None) is None:
            raise ValueError(f"there is no plugin {name!r}; there are {sorted(self.plugins)}")

    def log_event(self, topic: str | Collection[str], msg: Any, **_origin: object) -> None:
        """Publish an event to its subscribers, and keep it for a while."""
        self.broker.publish(topic, msg)

    def subscribe_topic(self, topic: str, client: str) -> None:
        """Send a topic's events to a client."""
        self.broker.subscribe(topic, client)

    def unsubscribe_topic(self, topic: str, client: str) -> None:
        """Send a topic's events no more."""
        self.broker.unsubscribe(topic, client)

    async def call_plugin(self, plugin: Any, name: str, **arguments: object) -> None:
        """Call a plugin's hook; what it raises is logged."""
        try:
            result = getattr(plugin, name)(**arguments)
            if asyncio.iscoroutine(result):
                await result
        except Exception:
            logger.exception("the plugin %r failed in %s", plugin, name)


def _any(server: DaskServer) -> Any:
    """For calls that ask for Dask's own scheduler, whose parts in question the server has."""
    return server
