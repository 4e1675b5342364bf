"""The futures' table: every key that somebody holds on the server, and the value it stands for.

A key is one entry for all clients. It lives while somebody holds it: a client, or what stands in a
client's place (a published dataset, a queue, a variable). When nobody does it is gone from here,
and its value is given back to the session.

The table knows nothing of comms and of the session. What an entry offers under Dask's names
(`state`, `who_wants`, `exception_blame`) is what distributed's own extensions and plugins read of
a scheduler's task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from dask.utils import key_split

from wukong.errors import TaskError
from wukong.executor.scene import Scene
from wukong.executor.serialize_failures import Failure, Raised, encode_error
from wukong.scheduler.calls import Key

WAITING = "processing"
DONE = "memory"
FAILED = "erred"
FIRE_AND_FORGET = "fire-and-forget"
"""The holder of keys that are to be computed, and dropped when they are."""


class News(Protocol):
    """What the session says of values that have been recorded."""

    @property
    def values(self) -> Sequence[int]:
        """Their ids."""

    @property
    def size_bytes(self) -> int:
        """What all of them take in the store."""

    @property
    def errors(self) -> Mapping[int, object]:
        """Those that are errors: `Failure`, `Raised` or an exception."""


class Work(Protocol):
    """The part of a session that the server needs; all of it may be called by any thread."""

    def extend(
        self,
        dsk: Any,
        keys: Sequence[Key],
        known: Mapping[Key, int] | None = None,
        *,
        annotations: Mapping[str, Mapping[Any, Any]] | None = None,
        priority: int = 0,
        scene: Scene | None = None,
    ) -> list[int]:
        """Add a graph; returns one value id for each key, each pinned once."""

    def put(self, values: Sequence[Any]) -> list[int]:
        """Store values, each pinned once."""

    def read(self, values: Sequence[int]) -> list[Any]:
        """The objects of finished values."""

    def release(self, values: Sequence[int]) -> None:
        """Give up a pin of each; work that nobody needs any more is taken back."""

    def retry(self, values: Sequence[int]) -> None:
        """Run again what ended in errors."""

    def close(self) -> None:
        """End the job."""


class Holder:
    """Somebody who holds keys: a client, or what stands in a client's place."""

    __slots__ = ("alone", "entries", "is_paced", "is_warned", "name", "send", "silent_s")

    def __init__(self, name: str, send: Callable[..., None] | None = None) -> None:
        self.name = name
        self.send = send
        """How to report to it; None: it wants no reports."""
        self.silent_s = 0.0
        """How long it has not been heard of; below 0: it need not be yet."""
        self.is_paced = False
        """It has been told how often to be heard of."""
        self.is_warned = False
        """It has been told that its shuffles run as plain tasks."""
        self.entries: set[Entry] = set()
        self.alone = (self,)
        """What most entries have as holders; shared by all of them."""


class Entry:
    """One key, and what is known of its value. Small: clients hold hundreds of thousands."""

    __slots__ = (
        "failure",
        "holders",
        "inputs",
        "key",
        "readers",
        "size_bytes",
        "source",
        "state",
        "type",
        "value",
    )

    def __init__(self, key: Key, value: int) -> None:
        self.key = key
        self.value = value
        """The session's id."""
        self.state = WAITING
        self.size_bytes = -1
        self.type: bytes | None = None
        """Its value's type, pickled, where somebody has looked."""
        self.source: bytes | None = None
        """The graph that it came with, as `read_graph` takes it."""
        self.failure: Failure | None = None
        self.holders: tuple[Holder, ...] = ()
        self.inputs: tuple[Entry, ...] = ()
        """The entries that its computation read."""
        self.readers: dict[Entry, None] | None = None
        """The entries whose computation reads it; None: none ever has."""

    # What distributed's extensions and plugins read of a task.

    @property
    def who_wants(self) -> tuple[Holder, ...]:
        """Who holds it."""
        return self.holders

    @property
    def who_has(self) -> bool:
        """Whether its value is there."""
        return self.state == DONE

    @property
    def dependencies(self) -> tuple[Entry, ...]:
        """What it was computed from, as far as that is in the table."""
        return self.inputs

    @property
    def nbytes(self) -> int:
        """Its size in the store; -1 while it is not there."""
        return self.size_bytes

    @property
    def exception(self) -> bytes | None:
        """Its pickled exception."""
        return None if self.failure is None else self.failure.pickled

    @property
    def traceback(self) -> bytes | None:
        """Its pickled traceback."""
        return None if self.failure is None else self.failure.frames or None

    @property
    def exception_blame(self) -> Entry:
        """The task that raised: its error is this entry's own."""
        return self

    @property
    def prefix_name(self) -> str:
        """The part of its key that it shares with tasks of the same kind."""
        return str(key_split(self.key))

    def report(self) -> dict[str, Any] | None:
        """What a client is told of it; None while there is nothing to tell."""
        if self.state == DONE:
            report: dict[str, Any] = {"op": "key-in-memory", "key": self.key}
            if self.type is not None:
                report["type"] = self.type
            return report
        if self.state == FAILED:
            return {
                "op": "task-erred",
                "key": self.key,
                "exception": self.exception,
                "traceback": self.traceback,
            }
        return None


class Futures:
    """All entries, by key and by value. For one thread."""

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self.holders: dict[str, Holder] = {}
        self._by_value: dict[int, Entry | list[Entry]] = {}

    def add(self, key: Key, value: int) -> Entry:
        """Enter a key that is not in the table."""
        entry = self.entries[key] = Entry(key, value)
        there = self._by_value.get(value)
        if there is None:
            self._by_value[value] = entry
        else:  # keys that are names of the same value
            others = there if isinstance(there, list) else [there]
            entry.state, entry.failure = others[0].state, others[0].failure
            entry.size_bytes = others[0].size_bytes
            self._by_value[value] = [*others, entry]
        return entry

    def link(self, entry: Entry, inputs: Sequence[Entry]) -> None:
        """Note what an entry is computed from."""
        entry.inputs = tuple(inputs)
        for source in inputs:
            if source.readers is None:
                source.readers = {}
            source.readers[entry] = None

    def entry_of(self, value: int) -> Entry | None:
        """An entry that a value belongs to."""
        there = self._by_value.get(value)
        return there[0] if isinstance(there, list) else there

    def forget(self, entry: Entry) -> None:
        """Take an entry out; its holders have none of it any more. Idempotent."""
        if self.entries.get(entry.key) is not entry:
            return
        del self.entries[entry.key]
        for holder in entry.holders:
            holder.entries.discard(entry)
        entry.holders = ()
        there = self._by_value.get(entry.value)
        if isinstance(there, list):
            there.remove(entry)
        if there is entry or there == []:
            del self._by_value[entry.value]
        for source in entry.inputs:
            if source.readers is not None:
                source.readers.pop(entry, None)
        entry.inputs = ()

    def hold(self, entry: Entry, holder: Holder) -> None:
        """Let somebody hold an entry. Idempotent."""
        if entry in holder.entries:
            return
        holder.entries.add(entry)
        entry.holders = (*entry.holders, holder) if entry.holders else holder.alone

    def let_go(self, entry: Entry, holder: Holder) -> bool:
        """Let somebody hold an entry no more. Returns: nobody holds it now."""
        if entry in holder.entries:
            holder.entries.remove(entry)
            others = [other for other in entry.holders if other is not holder]
            entry.holders = others[0].alone if len(others) == 1 else tuple(others)
        return not entry.holders

    def finish(self, news: News, unknown: list[int]) -> list[Entry]:
        """Note that values have been recorded.

        Args:
            unknown: gets those that are not in the table.
        Returns: the entries that wait for them.
        """
        finished: list[Entry] = []
        size_bytes = news.size_bytes // max(1, len(news.values))
        by_value, errors = self._by_value, news.errors
        for value in news.values:
            there = by_value.get(value)
            if there is None:
                unknown.append(value)
                continue
            failure = as_failure(errors[value]) if value in errors else None
            for entry in there if isinstance(there, list) else (there,):
                entry.state = DONE if failure is None else FAILED
                entry.failure = failure
                entry.size_bytes = size_bytes
                finished.append(entry)
        return finished

    def restart(self, entry: Entry) -> None:
        """Wait for an entry's value again."""
        entry.state, entry.failure, entry.size_bytes = WAITING, None, -1


def with_readers(entries: Iterable[Entry]) -> list[Entry]:
    """Entries and all that is computed from them, each once; readers before what they read."""
    found: dict[Entry, None] = {}
    stack = [(entry, False) for entry in entries]
    while stack:
        entry, is_left = stack.pop()
        if is_left:
            found.setdefault(entry)
        elif entry not in found:
            stack.append((entry, True))
            stack.extend((reader, False) for reader in entry.readers or ())
    return list(found)


def failed_inputs(entries: Iterable[Entry]) -> list[Entry]:
    """Entries that ended in errors, and those of their inputs that did."""
    found: dict[Entry, None] = {}
    stack = list(entries)
    while stack:
        entry = stack.pop()
        if entry.state == FAILED and entry not in found:
            found[entry] = None
            stack.extend(entry.inputs)
    return list(found)


def as_failure(error: object) -> Failure:
    """An error as the client can be sent it: pickled, whatever it is."""
    if isinstance(error, Raised):
        error = error.error
    if isinstance(error, BaseException):
        error = encode_error(error, None)
    assert isinstance(error, Failure), error
    if error.pickled:
        return error
    # Nothing of it could be pickled: its type and its text are all that can be told.
    stand_in = encode_error(TaskError(f"{error.type_name}: {error.message}"), error.key)
    return Failure(
        error.key,
        error.type_name,
        error.message,
        error.traceback_text,
        stand_in.pickled,
        error.frames,
    )
