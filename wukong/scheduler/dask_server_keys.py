"""The part of the server that knows keys: who holds them, who is told of them, when they go.

Its methods have the names under which distributed's extensions (publish, queues, variables) call
a scheduler's.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from distributed.core import Server
from distributed.scheduler import MemoryState
from distributed.sizeof import safe_sizeof

from wukong.scheduler.calls import Key
from wukong.scheduler.dask_server_clients import Outbox
from wukong.scheduler.dask_server_futures import (
    DONE,
    FAILED,
    FIRE_AND_FORGET,
    Entry,
    Futures,
    Holder,
    News,
    Work,
    failed_inputs,
    with_readers,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 0.02
"""A retry begins so long after its answer, which the client must see before the new results."""


LOOKED_AT = 64
LOOKED_AT_BYTES = 1 << 18
"""News of at most so many values, of so many bytes together, are reported with their types."""


@cache
def pickled_type(kind: Any) -> bytes | None:
    """A type as a client can be told of it; None if it could not import it."""
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        return None
    try:
        return pickle.dumps(kind)
    except Exception:  # types that have no name of their own, as that of bound methods
        return None


class KeyServer(Server):
    """A server with a table of keys and a session. All of it is for the loop's thread."""

    session: Work
    """Set by who opens it."""

    def __init__(self, **options: Any) -> None:
        self.futures = Futures()
        self.client_comms: dict[str, Outbox] = {}
        self.plugins: dict[str, Any] = {}
        self._unwanted: list[Entry] = []
        """Entries that nobody holds since the last turn of the loop."""
        super().__init__(**options)  # type: ignore[no-untyped-call]  # distributed's

    # What distributed's extensions and plugins know a scheduler's parts as.

    @property
    def tasks(self) -> Mapping[Key, Entry]:
        """The entries by key."""
        return self.futures.entries

    @property
    def clients(self) -> dict[str, Holder]:
        """Clients and what stands in for them, by name."""
        return self.futures.holders

    @property
    def memory(self) -> MemoryState:
        """What `MemorySampler` measures: values in the store, and the server's own process."""
        managed = sum([max(0, entry.size_bytes) for entry in self.tasks.values()])
        process = int(self.monitor.get_process_memory())
        return MemoryState(
            process=max(process, managed), unmanaged_old=0, managed=managed, spilled=0
        )

    # -------------------------------------------------------------- reports

    def send(self, client: str, *messages: Mapping[str, Any]) -> None:
        """Send reports to a client, if it is there still."""
        if (outbox := self.client_comms.get(client)) is not None:
            outbox.send(*messages)

    def send_all(
        self,
        client_msgs: Mapping[str, Sequence[Mapping[str, Any]]],
        worker_msgs: Mapping[str, object],
    ) -> None:
        """What distributed's broker calls."""
        for client, messages in client_msgs.items():
            self.send(client, *messages)

    def report(self, message: Mapping[str, Any]) -> None:
        """Send a report to all clients."""
        for outbox in self.client_comms.values():
            outbox.send(message)

    def report_on_key(self, key: Key, client: str) -> None:
        """Report on a key to a client that asks."""
        entry = self.tasks.get(key)
        report = {"op": "cancelled-keys", "keys": [key]} if entry is None else entry.report()
        if report is not None:
            self.send(client, report)

    def learn(self, news: Iterable[News]) -> bool:
        """Report values that have been recorded. Returns: some are not in the table."""
        reports: dict[Holder, list[Mapping[str, Any]]] = {}
        finished: list[Entry] = []
        unknown: list[int] = []
        for one in news:
            finished += self.futures.finish(one, unknown)
        self.look_at(finished)
        for entry in finished:
            report = entry.report()
            for holder in entry.holders:
                if report is not None and holder.send is not None:
                    reports.setdefault(holder, []).append(report)
        for holder, messages in reports.items():
            if holder.send is not None:
                holder.send(*messages)
        if self.plugins:
            for entry in finished:
                exception = {"exception": entry.exception} if entry.state == FAILED else {}
                self.show_transition(entry.key, entry.state, exception)
        nobody = self.clients.get(FIRE_AND_FORGET)
        if nobody is not None:
            self.let_go([entry for entry in finished if nobody in entry.holders], nobody)
        return bool(unknown)

    def look_at(self, finished: Sequence[Entry]) -> None:
        """Note types and sizes of values, where that costs little: of some small ones."""
        there = [entry for entry in finished if entry.state == DONE and entry.type is None]
        n_bytes = sum([entry.size_bytes for entry in there])
        if not there or len(there) > LOOKED_AT or n_bytes > LOOKED_AT_BYTES:
            return
        try:
            objects = self.session.read([entry.value for entry in there])
        except Exception:  # not to be read here, or gone: then nobody needs to know
            return
        for entry, value in zip(there, objects, strict=True):
            entry.type = pickled_type(type(value))  # type: ignore[arg-type]  # types hash
            if not entry.size_bytes:  # the store has the object itself
                entry.size_bytes = int(safe_sizeof(value))

    def show_transition(self, key: Key, state: str, facts: Mapping[str, object]) -> None:
        """Tell plugins that a key has got another state."""
        for plugin in list(self.plugins.values()):
            try:
                plugin.transition(key, "processing", state, stimulus_id="wukong", **facts)
            except Exception:
                logger.exception("the plugin %r failed", plugin)

    # -------------------------------------------------------------- holding and letting go

    def client_desires_keys(self, keys: Iterable[Key], client: str) -> None:
        """Let a client hold keys, and report those that are finished."""
        holder = self.clients.get(client)
        if holder is None:  # a dataset, a queue, a variable
            holder = self.clients[client] = Holder(client)
        self.hold(keys, holder)

    def hold(self, keys: Iterable[Key], holder: Holder) -> None:
        """As `client_desires_keys`."""
        reports: list[Mapping[str, Any]] = []
        for key in keys:
            entry = self.tasks.get(key)
            if entry is None:
                logger.info("%s wants %r, which is not known", holder.name, key)
                continue
            self.futures.hold(entry, holder)
            if holder.send is not None and (report := entry.report()) is not None:
                reports.append(report)
        if reports and holder.send is not None:
            holder.send(*reports)
        if holder.name == FIRE_AND_FORGET:
            self.let_go([e for e in holder.entries if e.state in (DONE, FAILED)], holder)

    def client_releases_keys(self, keys: Iterable[Key], client: str) -> None:
        """Let a client hold keys no more."""
        holder = self.clients.get(client)
        if holder is not None:
            there = [self.tasks.get(key) for key in keys]
            self.let_go([entry for entry in there if entry is not None], holder)

    def remove_client(self, client: str) -> None:
        """Release what a client holds. Idempotent; also for what stands in for clients."""
        holder = self.clients.pop(client, None)
        if holder is not None:
            self.let_go(list(holder.entries), holder)

    def let_go(self, entries: Iterable[Entry], holder: Holder) -> None:
        """Let somebody hold entries no more; in the loop's next turn they go if nobody does."""
        unwanted = [entry for entry in entries if self.futures.let_go(entry, holder)]
        if unwanted:
            if not self._unwanted:
                self.loop.add_callback(self.give_back)
            self._unwanted += unwanted

    def give_back(self) -> None:
        """Give values back that nobody holds."""
        unwanted, self._unwanted = self._unwanted, []
        # Somebody may have taken it again meanwhile, or it may be twice in the list.
        entries = [
            entry
            for entry in dict.fromkeys(unwanted)
            if not entry.holders and self.tasks.get(entry.key) is entry
        ]
        self.forget(entries)

    def forget(self, entries: Sequence[Entry]) -> None:
        """Take entries out of the table; the session takes back what nobody waits for."""
        for entry in entries:
            self.futures.forget(entry)
        if entries:
            self.session.release([entry.value for entry in entries])

    def cancel_keys(
        self,
        keys: Collection[Key],
        client: str,
        force: bool = False,
        reason: str | None = None,
        msg: str | None = None,
    ) -> None:
        """Take back the work of keys, and of all that is computed from them."""
        holder = self.clients.get(client)
        if holder is None:
            return
        there = [self.tasks[key] for key in keys if key in self.tasks]
        cancelled: list[Entry] = []
        for entry in with_readers(there):
            if force or not set(entry.holders) - {holder}:
                cancelled.append(entry)
            else:
                self.futures.let_go(entry, holder)
        if not cancelled:
            return
        names = [entry.key for entry in cancelled]
        self.forget(cancelled)
        self.report({"op": "cancelled-keys", "keys": names, "reason": reason, "msg": msg})
        if self.plugins:
            for name in names:
                self.show_transition(name, "forgotten", {})

    def retry(self, keys: Iterable[Key], client: str | None = None) -> list[Key]:
        """Run what ended in errors again. Returns: the keys of the client's that will be."""
        again = failed_inputs([self.tasks[key] for key in keys if key in self.tasks])
        for entry in again:
            self.futures.restart(entry)
            for holder in entry.holders:
                if holder.send is not None and holder.name != client:
                    holder.send({"op": "task-retried", "key": entry.key})
        values = [entry.value for entry in again]
        if values:
            self.loop.call_later(RETRY_AFTER_S, self.session.retry, values)
        mine = self.clients.get(client or "")
        return [entry.key for entry in again if mine is None or mine in entry.holders]
