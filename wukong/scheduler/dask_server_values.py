"""Calls that move values: gather, scatter, and what a client would ask workers directly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distributed.comm import Comm
from distributed.core import Status
from distributed.protocol.serialize import Serialize, Serialized, ToPickle, deserialize
from distributed.sizeof import sizeof
from distributed.utils import offload

from wukong.scheduler.calls import Key
from wukong.scheduler.dask_server_futures import DONE, Entry
from wukong.scheduler.dask_server_keys import KeyServer

INLINE_BYTES = 1 << 20
"""Values up to this size together are read and stored in the loop's thread."""


class Values:
    """The handlers; each call is atomic between two turns of the loop, or says when it is not."""

    def __init__(self, server: KeyServer) -> None:
        self._server = server
        server.handlers.update(
            {
                "gather": self.gather,
                "get_data": self.get_data,
                "scatter": self.scatter,
                "update_data": self.update_data,
            }
        )

    async def _read(self, keys: Iterable[Key]) -> tuple[dict[Key, Any], list[Key]]:
        """The objects of keys that are finished, and the other keys."""
        entries: list[Entry] = []
        missing: list[Key] = []
        for key in keys:
            entry = self._server.tasks.get(key)
            if entry is not None and entry.state == DONE:
                entries.append(entry)
            else:
                missing.append(key)
        values = [entry.value for entry in entries]
        if sum([max(0, entry.size_bytes) for entry in entries]) < INLINE_BYTES:
            objects = self._server.session.read(values)
        else:
            objects = await offload(self._server.session.read, values)
        return {entry.key: one for entry, one in zip(entries, objects, strict=True)}, missing

    async def gather(
        self, keys: Iterable[Key], serializers: list[str] | None = None
    ) -> dict[str, Any]:
        """The values of keys; names those that are not there."""
        objects, missing = await self._read(keys)
        if missing:
            return {"status": "error", "keys": missing}
        # One pickle for all: one for each value costs a hundred times what it carries.
        return {"status": "OK", "data": ToPickle(objects)}

    async def get_data(self, comm: Comm, keys: Iterable[Key], **_transfer: object) -> Status:
        """What a worker would answer to a client that gathers directly."""
        objects, _ = await self._read(keys)
        await comm.write({"status": "OK", "data": ToPickle(objects)})
        await comm.read()  # the client says that it has it
        return Status.dont_reply

    async def scatter(
        self, data: Mapping[Key, Any], client: str | None = None, **_placing: object
    ) -> list[Key]:
        """Store values under keys; a key that has one already gets the new one.

        Args:
            _placing: on which workers: the store is everybody's.
        """
        await self._store(data)
        if client is not None:
            self._server.client_desires_keys(data, client)
        return list(data)

    async def update_data(
        self,
        data: Mapping[Key, Any] | None = None,
        who_has: Mapping[Key, object] | None = None,
        client: str | None = None,
        **_report: object,
    ) -> dict[str, Any]:
        """Values that a client sends as if to a worker, and its word that they are there."""
        n_bytes = {} if data is None else await self._store(data)
        if client is not None and who_has is not None:
            self._server.client_desires_keys(who_has, client)
        return {"nbytes": n_bytes, "status": "OK"}

    async def _store(self, data: Mapping[Key, Any]) -> dict[Key, int]:
        server = self._server
        objects = [plain(value) for value in data.values()]
        sizes = [int(sizeof(one)) for one in objects]
        if sum(sizes) < INLINE_BYTES:
            values = server.session.put(objects)
        else:
            values = await offload(server.session.put, objects)
        for key, value, size in zip(data, values, sizes, strict=True):
            old = server.tasks.get(key)
            holders = () if old is None else old.holders
            if old is not None:
                server.futures.forget(old)
                server.session.release([old.value])
            entry = server.futures.add(key, value)
            entry.state, entry.size_bytes = DONE, size
            for holder in holders:
                server.futures.hold(entry, holder)
        return dict(zip(data, sizes, strict=True))


def plain(value: Any) -> Any:
    """The object that a comm has brought, wrapped or not."""
    if isinstance(value, Serialize):
        return value.data
    return deserialize(value.header, value.frames) if isinstance(value, Serialized) else value
