"""Rows as bytes, and the rows of one job inside a transaction of the embedded store.

A row is `marshal` of a plain tuple, its table's code first, and a checksum at its end. Loading it
builds numbers, strings, bytes and tuples, and runs nothing, whatever the bytes are; the checksum
finds damage before `marshal` sees it.

The keys of the rows (all text in UTF-8, ids never contain NUL):

    rows    job NUL code id        row of the table with this code (`job_rows.Table.code`)
            job NUL "v" name       a watcher's pipe; one byte: 1 = wants progress, 0 = the end only
    queue   place                  marshal of (job, token)

A place is made when a token is queued: inverted priority (4 bytes), number of the transaction (8),
number within it (4), all big-endian, so that the keys' order is the order of taking. The token's
row names its place, as last field, until the token is started.
"""

from __future__ import annotations

import marshal
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from wukong.errors import CorruptBlob
from wukong.executor.messages import (
    Entry,
    ExportSpec,
    Feed,
    JobId,
    Located,
    Part,
    Status,
)
from wukong.storage.rows import (
    TOKENS,
    ExportRow,
    JobRow,
    LateEdge,
    NoteRow,
    ProgramRow,
    ReceiptRow,
    Table,
    TokenRow,
    TraceRow,
    WaitingRow,
)

if TYPE_CHECKING:
    import lmdb

R = TypeVar("R")
Plain = tuple[object, ...]

MARSHAL_VERSION = 2
"""Without references between objects: 1.5 to 3 times as fast for small rows as version 4."""
CRC_RESIDUE = 0x2144DF1C
"""The CRC-32 of any bytes that end with their own CRC-32, little-endian."""
WATCH_CODE = "v"
NO_PLACE = b""
N_ROW_BYTES = 8192
"""Dirty pages that one written row may cost: its leaf and a share of the branches."""

_place = struct.Struct(">IQI")


# ------------------------------------------------------------------ NamedTuples <-> plain tuples


def _plain_bytes(value: object) -> bytes | None:
    """Encoded values are bytes here; other buffers are copied into bytes."""
    if value is None or type(value) is bytes:
        return value
    if not isinstance(value, bytearray | memoryview):
        raise TypeError(f"the embedded store takes encoded values, not {type(value).__name__}")
    return bytes(value)


def _plain_entry(entry: Entry) -> Plain:
    tasks, blob, payload, size_bytes, n_errors = entry
    if tasks and type(tasks[0]) is not int:
        # numpy's integers have a buffer, which marshal would take for bytes.
        raise TypeError(f"a task id is an int, not {type(tasks[0]).__name__}")
    return (tasks, blob, _plain_bytes(payload), size_bytes, n_errors)


def _plain_part(part: Part | None) -> Plain | None:
    if part is None:
        return None
    if part.tasks and type(part.tasks[0]) is not int:
        raise TypeError(f"a task id is an int, not {type(part.tasks[0]).__name__}")
    exports = tuple((*spec[:-1], tuple(map(tuple, spec.feeds))) for spec in part.exports)
    return (part.tasks, part.inputs, exports)


def _part(plain: Part | None) -> Part | None:
    """A part from the plain tuples in its shape."""
    if plain is None:
        return None
    tasks, inputs, exports = plain
    specs = (ExportSpec._make((*spec[:-1], tuple(map(Feed._make, spec[-1])))) for spec in exports)
    return Part(tasks, inputs, tuple(specs))


# ------------------------------------------------------------------ rows <-> plain tuples


# Written out field by field: this is the larger part of what an operation costs.


def plain_token(row: TokenRow, place: bytes) -> Plain:
    """A token's row is stored with its place in the queue, `NO_PLACE` for none."""
    return (
        "t",
        row.strand,
        row.base,
        None if row.part is None else _plain_part(row.part),
        row.inputs,
        row.minted_by,
        row.n_deaths,
        row.priority,
        row.stamped_at,
        row.running,
        row.attempt,
        row.holder,
        row.n_starts,
        row.n_invokes,
        row.cause,
        place,
    )


def _plain_waiting(row: WaitingRow) -> Plain:
    part = None if row.part is None else _plain_part(row.part)
    return ("w", row.base, part, row.n_missing, row.inputs, row.n_deaths, row.priority)


def _plain_export(row: ExportRow) -> Plain:
    entries = tuple([_plain_entry(entry) for entry in row.entries])
    late = tuple([tuple(edge) for edge in row.late])
    return ("e", row.n_left, row.n_consumers, row.requested, entries, late)


def _plain_receipt(row: ReceiptRow) -> Plain:
    return ("r", row.attempt, row.minted, row.become, row.n_unstarted)


def _plain_program(row: ProgramRow) -> Plain:
    return ("p", _plain_entry(row.entry), row.n_live)


def _plain_trace(row: TraceRow) -> Plain:
    return ("x", _plain_bytes(row.packed))


def _plain_note(row: NoteRow) -> Plain:
    recorded = tuple([(e, tuple(map(_plain_entry, entries))) for e, entries in row.recorded])
    return ("n", recorded, _plain_bytes(row.trace))


def _note(recorded: tuple[Located, ...], trace: bytes | None) -> NoteRow:
    """A note from the plain tuples in its shape."""
    located = (Located(e, tuple(map(Entry._make, entries))) for e, entries in recorded)
    return NoteRow(tuple(located), trace)


def _plain_job(row: JobRow) -> Plain:
    return (
        "j",
        row.status.value,
        row.n_requested,
        row.n_tasks,
        row.n_strands,
        row.fail_fast,
        row.priority,
        row.silence_s,
        row.sweep_at,
        row.version,
        row.generation,
        _plain_bytes(row.error),
        row.n_tasks_done,
        row.n_commits,
        row.n_starts,
        row.n_retries,
        row.n_deaths,
        row.garbage,
        row.lost,
        row.done,
        row.is_open,
        row.n_extended,
        row.news_version,
    )


_STATUSES = {status.value: status for status in Status}


_PLAIN: dict[str, Callable[..., Plain]] = {
    "w": _plain_waiting,
    "e": _plain_export,
    "r": _plain_receipt,
    "p": _plain_program,
    "x": _plain_trace,
    "n": _plain_note,
    "j": _plain_job,
}
_MAKE: dict[str, Callable[..., object]] = {
    "t": lambda plain: TokenRow(plain[1], plain[2], _part(plain[3]), *plain[4:-1]),
    "w": lambda plain: WaitingRow(plain[1], _part(plain[2]), *plain[3:]),
    "e": lambda plain: ExportRow(
        plain[1],
        plain[2],
        plain[3],
        tuple([Entry._make(entry) for entry in plain[4]]),
        tuple([LateEdge._make(edge) for edge in plain[5]]),
    ),
    "r": lambda plain: ReceiptRow(*plain[1:]),
    "p": lambda plain: ProgramRow(Entry._make(plain[1]), plain[2]),
    "x": lambda plain: TraceRow(*plain[1:]),
    "n": lambda plain: _note(*plain[1:]),
    "j": lambda plain: JobRow(_STATUSES[plain[1]], *plain[2:]),
}


# ------------------------------------------------------------------ plain tuples <-> bytes


def pack(plain: Plain) -> bytes:
    """A row's bytes, with their checksum at the end."""
    body = marshal.dumps(plain, MARSHAL_VERSION)  # type: ignore[arg-type]  # nested plain values
    return body + zlib.crc32(body).to_bytes(4, "little")


def pack_row(table: Table[R], row: R) -> bytes:
    """Encode a row of any table but `TOKENS`, whose rows have a place besides."""
    return pack(_PLAIN[table.code](row))


def unpack(code: str, packed: bytes) -> Plain:
    """The fields of a row of the table `code`, the code first.

    Raises:
        CorruptBlob: the bytes are damaged, or are no row of this table.
    """
    if zlib.crc32(packed) != CRC_RESIDUE:
        raise CorruptBlob(f"a row of table {code!r} is damaged ({len(packed)} bytes)")
    try:
        plain = marshal.loads(packed)
    except (ValueError, TypeError, EOFError) as error:
        raise CorruptBlob(f"a row of table {code!r} is no marshalled tuple: {error}") from error
    if type(plain) is not tuple or not plain or plain[0] != code:
        raise CorruptBlob(f"a row of table {code!r} holds something else")
    return plain


def make_row(table: Table[R], plain: Plain) -> R:
    """Build a row from what `unpack` returns.

    Raises:
        CorruptBlob: these are not the fields of such a row.
    """
    try:
        return _MAKE[table.code](plain)  # type: ignore[return-value]  # by the table's code
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise CorruptBlob(f"a row of table {table.code!r} has other fields: {error}") from error


# ------------------------------------------------------------------ the rows of one job


class StoredRows:
    """The rows of one job inside one transaction (`rows.Rows`); also keeps the queue in step."""

    __slots__ = (
        "_forgotten",
        "_found",
        "_number",
        "_places",
        "_prefix",
        "_queue",
        "_txn",
        "job",
        "n_dirty_bytes",
        "news",
    )

    def __init__(
        self,
        job: JobId,
        txn: lmdb.Transaction[bytes],
        queue: lmdb._Database,
        number: Iterator[int],
    ) -> None:
        """Look at a job.

        Args:
            txn: its default database is `rows`; this object lives no longer than it.
            number: numbers the places that this transaction makes, those of other jobs too.
        """
        self.job = job
        self.n_dirty_bytes = 0
        """Bytes of pages that the transaction has written, at most."""
        self.news: tuple[bool, bool] = (False, False)
        """Whether this transaction ended the job, lost values of it, or has news for an open job's
        client; whether it went on."""
        self._txn = txn
        self._queue = queue
        self._number = number
        self._prefix = f"{job}\0"
        self._places: dict[str, bytes] = {}
        self._forgotten: list[str] = []
        self._found: tuple[Status, int] | None = None

    def get(self, table: Table[R], key: str) -> R | None:
        packed = self._txn.get(f"{self._prefix}{table.code}{key}".encode())
        return None if packed is None else self._load(table, key, packed)

    def put(self, table: Table[R], key: str, row: R) -> None:
        if isinstance(row, TokenRow):
            packed = pack(plain_token(row, self._keep_in_queue(key, row)))
        else:
            if isinstance(row, JobRow):
                self._note_news(row)
            packed = pack_row(table, row)
        self.n_dirty_bytes += len(packed) + N_ROW_BYTES
        self._txn.put(f"{self._prefix}{table.code}{key}".encode(), packed)

    def delete(self, table: Table[R], key: str) -> None:
        if table.code == "t":
            if key not in self._places:
                self.get(TOKENS, key)
            self._leave_queue(key)
        self.n_dirty_bytes += N_ROW_BYTES
        self._txn.delete(f"{self._prefix}{table.code}{key}".encode())

    def scan(self, table: Table[R]) -> Iterator[tuple[str, R]]:
        found = list(self._packed(table.code))
        return ((key, self._load(table, key, packed)) for key, packed in found)

    def delete_all(self) -> None:
        """Remove every row of the job, its watchers too."""
        self._forgotten = [name for name, _ in self._packed(WATCH_CODE)]
        for key, packed in list(self._packed(TOKENS.code)):
            self._load(TOKENS, key, packed)
            self._leave_queue(key)
        prefix = self._prefix.encode()
        cursor = self._txn.cursor()
        there = cursor.set_range(prefix)
        while there and cursor.key().startswith(prefix):
            self.n_dirty_bytes += N_ROW_BYTES
            there = cursor.delete() and bool(cursor.key())

    def set_watch(self, name: str, progress: bool) -> None:
        """Have the watcher's pipe written to when there is news."""
        self._txn.put(f"{self._prefix}{WATCH_CODE}{name}".encode(), b"\1" if progress else b"\0")

    def get_watch(self, name: str) -> bool | None:
        """Whether the watcher wants progress; None when it is not registered."""
        packed = self._txn.get(f"{self._prefix}{WATCH_CODE}{name}".encode())
        return None if packed is None else packed == b"\1"

    def delete_watch(self, name: str) -> None:
        """Remove a watcher."""
        self._txn.delete(f"{self._prefix}{WATCH_CODE}{name}".encode())

    def to_wake(self) -> list[str]:
        """Names of the watchers who must hear of what this transaction has changed so far."""
        notable, progress = self.news
        if not progress:
            return self._forgotten
        return [name for name, packed in self._packed(WATCH_CODE) if notable or packed == b"\1"]

    def _packed(self, code: str) -> Iterator[tuple[str, bytes]]:
        """Ids and bytes of all rows under a code, ascending."""
        prefix = f"{self._prefix}{code}".encode()
        cursor = self._txn.cursor()
        if cursor.set_range(prefix):
            for key, packed in cursor:
                if not key.startswith(prefix):
                    return
                yield key[len(prefix) :].decode(), packed

    def _load(self, table: Table[R], key: str, packed: bytes) -> R:
        plain = unpack(table.code, packed)
        row = make_row(table, plain)
        if table.code == "t":
            place = plain[-1]
            if type(place) is not bytes:
                raise CorruptBlob(f"token {key} has no place")
            self._places[key] = place
            return row
        if isinstance(row, JobRow) and self._found is None:
            self._found = (row.status, row.version)
        return row

    def _keep_in_queue(self, key: str, row: TokenRow) -> bytes:
        """Queue a token, or take it out. Returns its place."""
        place = self._places.get(key, NO_PLACE)
        if row.running:
            self._leave_queue(key)
            return NO_PLACE
        if not place:
            place = _place.pack(2**31 - row.priority, self._txn.id(), next(self._number))
            self._places[key] = place
            self._txn.put(place, marshal.dumps((self.job, key), MARSHAL_VERSION), db=self._queue)
        return place

    def _leave_queue(self, key: str) -> None:
        place = self._places.get(key, NO_PLACE)
        if place:
            self._txn.delete(place, db=self._queue)
        self._places[key] = NO_PLACE

    def _note_news(self, row: JobRow) -> None:
        if self._found is None:
            return
        status, version = self._found
        changed = row.version != version or row.status is not status
        ended = row.status is not Status.RUNNING and status is Status.RUNNING
        has_news = row.is_open and row.news_version == row.version
        self.news = (ended or (changed and (has_news or bool(row.lost))), changed)
