"""The rows of a job: what stores keep, and how transitions read and write them. Pure.

tokens    the live invocations: queued or running. Together they are the work that can begin.
waiting   strands that miss inputs, with one counter each
exports   values: recorded entries, and how many consumers have not read them yet
receipts  of commits whose minted tokens have not all been started
programs  where the code of each static strand is
notes     of an open job: what commits have brought and its client has not acknowledged
job       status, counters, garbage
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from wukong.executor.messages import (
    AttemptId,
    BlobId,
    Entry,
    ExportId,
    HolderId,
    JobId,
    Located,
    Part,
    Status,
    StrandId,
    TokenId,
)

NO_ATTEMPT = AttemptId("")
NO_HOLDER = HolderId("")


@dataclass(slots=True)
class TokenRow:
    """One live invocation."""

    strand: StrandId
    base: StrandId
    part: Part | None
    inputs: tuple[ExportId, ...]
    minted_by: str
    """The spent token whose receipt waits for this one to start; "" for none."""
    n_deaths: int
    priority: int
    stamped_at: float
    """When it was queued, or its last heartbeat."""
    running: bool = False
    attempt: AttemptId = NO_ATTEMPT
    holder: HolderId = NO_HOLDER
    n_starts: int = 0
    n_invokes: int = 1
    cause: str = ""
    """How the last attempt died, as far as known."""


@dataclass(slots=True)
class WaitingRow:
    """A strand that misses inputs."""

    base: StrandId
    part: Part | None
    n_missing: int
    inputs: tuple[ExportId, ...]
    """Static strand of a closed job: those that are complete. Any other strand: all of them."""
    n_deaths: int = 0
    priority: int = 0


class LateEdge(NamedTuple):
    """A strand of a later extension waits for some values of an export."""

    strand: StrandId
    tasks: tuple[int, ...]
    """Those that are not recorded yet."""


@dataclass(slots=True)
class ExportRow:
    """The values of one export."""

    n_left: int
    """Values still to be recorded."""
    n_consumers: int
    """Strands and clients that have not read it."""
    requested: bool
    entries: tuple[Entry, ...]
    late: tuple[LateEdge, ...] = ()


@dataclass(slots=True)
class ReceiptRow:
    """What a commit minted, until all of it has been started."""

    attempt: AttemptId
    minted: tuple[TokenId, ...]
    become: TokenId
    n_unstarted: int


@dataclass(slots=True)
class JobRow:
    """The job itself."""

    status: Status
    n_requested: int
    """Requested exports that are not complete."""
    n_tasks: int
    n_strands: int
    fail_fast: bool
    priority: int
    silence_s: float
    """A running token without heartbeat for this long counts as dead."""
    sweep_at: float
    version: int = 1
    generation: int = 0
    error: bytes | object | None = None
    n_tasks_done: int = 0
    n_commits: int = 0
    n_starts: int = 0
    n_retries: int = 0
    n_deaths: int = 0
    garbage: tuple[BlobId, ...] = ()
    lost: tuple[ExportId, ...] = ()
    done: tuple[StrandId, ...] = ()
    """Strands of an earlier generation that are not to run again."""
    is_open: bool = False
    n_extended: int = 0
    """The number of the last extension."""
    news_version: int = 0
    """The version at which there was news for the client of an open job."""


@dataclass(slots=True)
class ProgramRow:
    """Where the program of a static strand is."""

    entry: Entry
    n_live: int = 1
    """In an open job: its strand, or pieces of it, that are not committed; at 0 the row goes."""


@dataclass(slots=True)
class TraceRow:
    """The packed trace of one commit."""

    packed: bytes | object


@dataclass(slots=True)
class NoteRow:
    """What one commit of an open job has brought; see `messages.Note`."""

    recorded: tuple[Located, ...]
    trace: bytes | object | None


R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Table(Generic[R]):
    """Names one kind of row; `code` is its tag in the stores' keys."""

    code: str
    row: type[R]


TOKENS: Table[TokenRow] = Table("t", TokenRow)
WAITING: Table[WaitingRow] = Table("w", WaitingRow)
EXPORTS: Table[ExportRow] = Table("e", ExportRow)
RECEIPTS: Table[ReceiptRow] = Table("r", ReceiptRow)
PROGRAMS: Table[ProgramRow] = Table("p", ProgramRow)
TRACES: Table[TraceRow] = Table("x", TraceRow)
NOTES: Table[NoteRow] = Table("n", NoteRow)
JOB: Table[JobRow] = Table("j", JobRow)
TABLES = (TOKENS, WAITING, EXPORTS, RECEIPTS, PROGRAMS, TRACES, NOTES, JOB)
THE_JOB = ""
"""The id of the one row of `JOB`."""
MANIFEST = "manifest"
"""The id of the manifest's row in `PROGRAMS`."""


class Rows(Protocol):
    """The rows of one job, inside one atomic operation.

    A row that was read may be changed in place; it counts as written only after `put`.
    """

    job: JobId

    def get(self, table: Table[R], key: str) -> R | None:
        """The row, or None."""
        ...

    def put(self, table: Table[R], key: str, row: R) -> None:
        """Write a row."""
        ...

    def delete(self, table: Table[R], key: str) -> None:
        """Remove a row; one that is absent is no error."""
        ...

    def scan(self, table: Table[R]) -> Iterator[tuple[str, R]]:
        """All rows of a table, in a fixed order, safe against changes while it is read."""
        ...
