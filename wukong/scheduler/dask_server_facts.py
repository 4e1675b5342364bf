"""Calls that ask, or change nothing but the server's own notes.

Where Dask's answer is about workers, the answer is about what stands for them here: addresses of
the server, as many as there are executors, over which the keys are dealt out evenly.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dask.typing import no_default
from dask.utils import parse_timedelta
from distributed import profile
from distributed.cluster_dump import write_state
from distributed.comm import Comm
from distributed.core import Status
from distributed.protocol import pickle
from distributed.protocol.serialize import ToPickle
from distributed.sizeof import sizeof
from distributed.system import MEMORY_LIMIT
from distributed.versions import get_versions
from distributed.worker import run

from wukong.scheduler.calls import Key
from wukong.scheduler.dask_server_futures import DONE, FAILED, Entry, failed_inputs
from wukong.scheduler.dask_server_graphs import read_graph

if TYPE_CHECKING:
    from wukong.scheduler.dask_server import DaskServer


REPLAYED = "replayed-tasks"
"""Holds what a client needs to run a task again itself."""
REPLAY_S = 30.0


class Facts:
    """The handlers; for the loop's thread."""

    def __init__(self, server: DaskServer) -> None:
        self._server = server
        self._metadata: dict[Any, Any] = {}
        self._collected: dict[str, set[Key]] = {}
        server.handlers.update(
            {
                "identity": self.identity,
                "versions": self.versions,
                "ncores": self.ncores,
                "ncores_running": self.ncores,
                "who_has": self.who_has,
                "has_what": self.has_what,
                "nbytes": self.nbytes,
                "processing": self.processing,
                "call_stack": lambda keys=None: {},
                "profile": lambda **_: profile.create(),
                "profile_metadata": lambda **_: {"counts": [], "keys": {}},
                "get_task_status": self.task_status,
                "get_task_prefix_states": self.prefix_states,
                "get_runspec": self.run_spec,
                "get_error_cause": self.error_cause,
                "key_of_task": self.key_of_task,
                "get_story": lambda keys_or_stimuli=(): [],
                "get_metadata": self.get_metadata,
                "set_metadata": self.set_metadata,
                "start_task_metadata": self.start_task_metadata,
                "stop_task_metadata": self.stop_task_metadata,
                "log_event": server.log_event,
                "events": server.broker.get_events,
                "get_logs": lambda n=None: (),
                "logs": lambda n=None: (),
                "worker_logs": lambda **_: {},
                "get_cluster_state": self.cluster_state,
                "dump_cluster_state_to_url": self.dump_cluster_state,
                "run_function": self.run_function,
                "feed": self.feed,
                "rebalance": lambda **_: {"status": "OK"},
                "replicate": lambda **_: None,
                "retire_workers": lambda **_: {},
                "check_idle": lambda: None,
                "adaptive_target": lambda **_: server.n_executors,
                "set_restrictions": lambda **_: None,
            }
        )

    def identity(self, n_workers: int = -1) -> dict[str, Any]:
        """What the server is, and what stands for its workers."""
        server = self._server
        shown = list(server.workers.items())
        return {
            "type": "Scheduler",
            "id": server.id,
            "address": server.address,
            "services": server.services,
            "started": server.started_at,
            "n_workers": len(shown),
            "total_threads": len(shown),
            "total_memory": MEMORY_LIMIT,
            "workers": {
                address: self._worker(address, name)
                for address, name in (shown if n_workers == -1 else shown[:n_workers])
            },
        }

    def cluster_state(self, exclude: object = ()) -> dict[str, Any]:
        """What `dump_cluster_state` writes; less than Dask's, as there is less to know."""
        described = self.identity()
        return {
            "scheduler": {**described, "tasks": {str(k): e.state for k, e in self._tasks()}},
            "workers": described["workers"],
            "versions": {"scheduler": self.versions()},
        }

    async def dump_cluster_state(
        self, url: str, exclude: object = (), format: Any = "msgpack", **storage_options: Any
    ) -> None:
        """Write it to wherever fsspec can write."""

        async def state() -> dict[str, Any]:
            return self.cluster_state()

        await write_state(state, url, format, **storage_options)

    def _tasks(self) -> list[tuple[Key, Entry]]:
        return list(self._server.tasks.items())

    def _worker(self, address: str, name: str) -> dict[str, Any]:
        memory_bytes = MEMORY_LIMIT // max(1, len(self._server.workers))
        return {
            "type": "Worker",
            "id": name,
            "name": name,
            "host": address.partition("://")[2].rpartition(":")[0],
            "resources": {},
            "local_directory": self._server.local_directory,
            "nthreads": 1,
            "memory_limit": memory_bytes,
            "last_seen": time.time(),
            "services": {},
            "metrics": {},
            "status": Status.running.name,
            "nanny": address,
        }

    def versions(self, packages: Iterable[str] | None = None) -> Any:
        """The versions that are installed on the server."""
        return get_versions(packages=packages)

    def ncores(self, workers: Iterable[str] | None = None) -> dict[str, int]:
        """One core for each executor."""
        wanted = None if workers is None else set(workers)
        return {
            address: 1
            for address, name in self._server.workers.items()
            if wanted is None or address in wanted or name in wanted
        }

    # -------------------------------------------------------------- keys

    def _address(self, entry: Entry) -> str:
        addresses = list(self._server.workers)
        return addresses[entry.value % len(addresses)]

    def who_has(self, keys: Iterable[Key] | None = None) -> dict[Key, list[str]]:
        """The address that answers for each key."""
        tasks = self._server.tasks
        found = {key: tasks.get(key) for key in (tasks if keys is None else keys)}
        return {
            key: [self._address(entry)] if entry is not None and entry.state == DONE else []
            for key, entry in found.items()
        }

    def has_what(self, workers: Iterable[str] | None = None) -> dict[str, list[Key]]:
        """The keys for which each address answers."""
        return self._dealt(workers, lambda entry: entry.state == DONE)

    def processing(self, workers: Iterable[str] | None = None) -> dict[str, list[Key]]:
        """The keys that are not there yet; which of them are run just now nobody here knows."""
        return self._dealt(workers, lambda entry: entry.state not in (DONE, FAILED))

    def _dealt(self, workers: Iterable[str] | None, wanted: Any) -> dict[str, list[Key]]:
        shown = self._server.workers if workers is None else list(workers)
        dealt: dict[str, list[Key]] = {address: [] for address in shown}
        for key, entry in self._server.tasks.items():
            address = self._address(entry)
            if address in dealt and wanted(entry):
                dealt[address].append(key)
        return dealt

    def nbytes(
        self, keys: Iterable[Key] | None = None, summary: bool = True
    ) -> dict[Key, int] | dict[str, int]:
        """Bytes of the keys that are there, by key or by kind."""
        tasks = self._server.tasks
        found = {key: tasks[key] for key in (tasks if keys is None else keys)}
        unknown = [e for e in found.values() if e.state == DONE and not e.size_bytes]
        objects = self._server.session.read([entry.value for entry in unknown])
        for entry, value in zip(unknown, objects, strict=True):
            entry.size_bytes = int(sizeof(value))
        sizes = {key: e.size_bytes for key, e in found.items() if e.size_bytes >= 0}
        if not summary:
            return sizes
        total: dict[str, int] = defaultdict(int)
        for key, size in sizes.items():
            total[found[key].prefix_name] += size
        return dict(total)

    def task_status(self, keys: Iterable[Key]) -> dict[Key, str | None]:
        """The state of each key; None: not known."""
        found = {key: self._server.tasks.get(key) for key in keys}
        return {key: None if e is None else e.state for key, e in found.items()}

    def prefix_states(self) -> dict[str, dict[str, int]]:
        """How many keys of each kind are in which state."""
        states: dict[str, dict[str, int]] = {}
        for entry in self._server.tasks.values():
            counts = states.setdefault(
                entry.prefix_name,
                dict.fromkeys(("memory", "erred", "released", "processing", "waiting"), 0),
            )
            counts[entry.state] += 1
        return states

    def key_of_task(self, task: int) -> Key:
        """The key of a task that is run; its number where no client holds it."""
        entry = self._server.futures.entry_of(task)
        return task if entry is None else entry.key

    async def run_spec(self, key: Any) -> Any:
        """A key's node, for a client that runs it itself; what it reads is there again for a while.

        Raises:
            KeyError: it is not known, or came with a graph that was too large to be kept.
        """
        name = tuple(key) if isinstance(key, list) else key
        server = self._server
        entry = server.tasks[name]
        if entry.source is None:
            raise KeyError(f"the graph of {name!r} is not kept: it is large, or it was scattered")
        gone = [e for e in entry.inputs if e.key not in server.tasks and e.source is not None]
        if gone:
            server.client_desires_keys((), REPLAYED)
            server.loop.call_later(REPLAY_S, server.remove_client, REPLAYED)
        for reader in gone:
            await server.update_graph(REPLAYED, reader.source, [reader.key])
        node = read_graph(entry.source).dsk[name]
        # A comm inside the process hands the answer over as it is.
        return node if server.address.startswith("inproc://") else ToPickle(node)

    def error_cause(self, keys: Iterable[Any]) -> Key | None:
        """The key whose computation raised the error that the first failed one of `keys` has."""
        for key in keys:
            entry = self._server.tasks.get(tuple(key) if isinstance(key, list) else key)
            if entry is not None and entry.state == FAILED:
                return failed_inputs([entry])[-1].key
        return None

    # -------------------------------------------------------------- notes

    def set_metadata(self, keys: list[Any], value: object = None) -> None:
        """Keep a value under a path of keys."""
        place = self._metadata
        for key in keys[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[keys[-1]] = value

    def get_metadata(self, keys: list[Any], default: Any = no_default) -> Any:
        """The value under a path of keys.

        Raises:
            KeyError: there is none, and no default.
        """
        place: Any = self._metadata
        try:
            for key in keys:
                place = place[key]
        except (KeyError, TypeError):
            if default is no_default:
                raise
            return default
        return place

    def start_task_metadata(self, name: str) -> None:
        """Begin to note which keys are finished."""
        self._collected[name] = {
            key for key, entry in self._server.tasks.items() if entry.state in (DONE, FAILED)
        }

    def stop_task_metadata(self, name: str) -> dict[str, Any]:
        """The keys that have been finished since, with their states."""
        before = self._collected.pop(name, set())
        state = {
            key: entry.state
            for key, entry in self._server.tasks.items()
            if key not in before and entry.state in (DONE, FAILED)
        }
        return {"metadata": {key: {} for key in state}, "state": state}

    # -------------------------------------------------------------- functions

    async def run_function(
        self,
        comm: Comm,
        function: bytes,
        args: Any = (),
        kwargs: Any = None,
        wait: bool = True,
    ) -> Any:
        """Run a client's function in the server; it may take `dask_scheduler`."""
        return await run(self._server, comm, function=function, args=args, kwargs=kwargs, wait=wait)

    async def feed(
        self,
        comm: Comm,
        function: bytes,
        setup: bytes | None = None,
        teardown: bytes | None = None,
        interval: str | float = "1s",
        **_more: object,
    ) -> None:
        """Send what a client's function finds in the server, again and again."""
        interval_s = parse_timedelta(interval)
        call = pickle.loads(function)
        state = pickle.loads(setup)(self._server) if setup else None
        if inspect.isawaitable(state):
            state = await state
        arguments: tuple[Any, ...] = (self._server,)
        if setup:
            arguments += (state,)
        try:
            while self._server.status == Status.running:
                await comm.write(call(*arguments))
                await asyncio.sleep(interval_s)
        except OSError:
            pass  # the client has closed it, which is how it ends
        finally:
            if teardown:
                pickle.loads(teardown)(self._server, state)
