"""The queue of a local Lambda service on disk: an accepted event outlives the service.

One SQLite file; a row for each event that was accepted and has neither succeeded nor been given up.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple

SCHEMA = """
create table if not exists events (
    id text primary key,
    function text not null,
    payload blob not null,
    depth integer not null,
    accepted_at real not null,
    ready_at real not null,
    n_failures integer not null
) without rowid
"""


class StoredEvent(NamedTuple):
    """An event on disk; times are the wall clock's, in seconds."""

    id: str
    function: str
    payload: bytes
    depth: int
    accepted_at: float
    ready_at: float
    n_failures: int


class EventFile:
    """The events of one service. For one thread.

    It outlives the service's process; not the machine's sudden end, for that would cost a sync of
    the disk for each event.
    """

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("pragma journal_mode = wal")
        self._db.execute("pragma synchronous = off")
        self._db.execute(SCHEMA)

    def add(self, event: StoredEvent) -> None:
        """Keep an event, durable on return."""
        self._db.execute("insert into events values (?, ?, ?, ?, ?, ?, ?)", event)

    def delay(self, id: str, ready_at: float, n_failures: int) -> None:
        """Note a failure of an event, and when it is to be tried again."""
        change = "update events set ready_at = ?, n_failures = ? where id = ?"
        self._db.execute(change, (ready_at, n_failures, id))

    def remove(self, id: str) -> None:
        """Forget an event."""
        self._db.execute("delete from events where id = ?", (id,))

    def load(self) -> list[StoredEvent]:
        """All events, the oldest first."""
        rows = self._db.execute("select * from events order by accepted_at").fetchall()
        return [StoredEvent(*row) for row in rows]

    def close(self) -> None:
        """Close the file; the events stay."""
        self._db.close()
