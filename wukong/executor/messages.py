"""What executors, stores and clients say to each other: ids, requests, replies, events, actions.

Everything here is a fact or a wish, immutable and comparable with ==. Values never appear in it,
only their ids, sizes and encoded bytes (`Entry.payload`; in `memory://` the object itself).

Ids are strings. A static strand or export has its number in the plan ("17"); whatever is made while
the job runs has the random nonce of the attempt that made it and a number ("9f2c...e1.3"), never a
counter of the store (design.md, section 3, rule 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, NewType

JobId = NewType("JobId", str)
TokenId = NewType("TokenId", str)
StrandId = NewType("StrandId", str)
ExportId = NewType("ExportId", str)
AttemptId = NewType("AttemptId", str)
HolderId = NewType("HolderId", str)
BlobId = NewType("BlobId", str)


# ------------------------------------------------------------------ values in the store


class Entry(NamedTuple):
    """Some or all values of one export, and where they are."""

    tasks: tuple[int, ...]
    """Task ids of the values, ascending; the payload holds them in this order."""
    blob: BlobId | None
    """Where the payload lies; None: it is `payload` itself."""
    payload: object
    """Encoded bytes (in `memory://` the list of values itself); None when it is a blob."""
    size_bytes: int
    """Size of the encoded payload; 0 in `memory://`."""
    n_errors: int
    """How many of the values are errors."""


class Located(NamedTuple):
    """One export as a reader finds it."""

    export: ExportId
    entries: tuple[Entry, ...]


class Feed(NamedTuple):
    """A strand that waits for an export."""

    strand: StrandId
    n_inputs: int
    """Exports that the strand waits for in all."""
    held_bytes: int = 0
    """How many bytes of its inputs the committing executor holds; it becomes the largest."""


class Output(NamedTuple):
    """Values that a commit records for one export."""

    export: ExportId
    entries: tuple[Entry, ...]
    n_values: int
    """Values of the whole export; it is complete when all of them are recorded."""
    n_consumers: int
    """Strands that will read it, plus one when the client has requested it."""
    requested: bool
    feeds: tuple[Feed, ...]


class Spawn(NamedTuple):
    """A strand that a commit adds to the job: a piece of the strand that is committed."""

    strand: StrandId
    base: StrandId
    """The static strand whose program holds the piece's tasks."""
    part: Part
    inputs: tuple[ExportId, ...]
    n_missing: int
    """How many of the inputs are still to be recorded, after this commit's outputs."""
    n_deaths: int
    """Attempts that died with these tasks; decides how much the next attempt runs at a time."""
    held_bytes: int


class ExportSpec(NamedTuple):
    """What a strand has to write: one row of the store."""

    export: ExportId
    tasks: tuple[int, ...]
    """The values of the export that this strand computes, ascending."""
    n_values: int
    """Values of the whole export (more than `tasks` in a piece of a split strand)."""
    n_consumers: int
    requested: bool
    feeds: tuple[Feed, ...]


class Part(NamedTuple):
    """What one strand, or a piece of it, runs, reads and writes."""

    tasks: tuple[int, ...]
    """Task ids, ascending, which is an execution order."""
    inputs: tuple[tuple[ExportId, tuple[int, ...]], ...]
    """Exports that it reads, each with the values of it that are needed."""
    exports: tuple[ExportSpec, ...]


# ------------------------------------------------------------------ the store's replies


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to run one strand, with all that is needed to begin."""

    job: JobId
    token: TokenId
    attempt: AttemptId
    strand: StrandId
    base: StrandId
    """The static strand whose program to run; differs from `strand` for a piece."""
    program: Entry
    part: Part | None
    """The piece; None: the whole static strand, whose part is in its program."""
    inputs: tuple[Located, ...]
    n_starts: int
    """How often this token has been started, this time included."""
    n_deaths: int
    """Attempts known to have died with these tasks, before the token or under it."""
    cause: str = ""
    """How the last attempt died, as far as known."""
    priority: int = 0
    is_open: bool = False
    """Somebody waits for single values of the job, as soon as they are there."""


class Invocation(NamedTuple):
    """A token that somebody has to start."""

    job: JobId
    token: TokenId
    priority: int = 0


class RunningToken(NamedTuple):
    """A token that some executor runs."""

    token: TokenId
    strand: StrandId
    tasks: tuple[int, ...] | None
    """None: all of the static strand."""
    n_starts: int


class Reason(IntEnum):
    """Why a store refuses."""

    SPENT = 1  # the token is absent: its work is committed, or it was never minted
    HELD = 2  # another attempt runs it
    OVER = 3  # the job has ended or was cancelled, or it is not open
    UNKNOWN_JOB = 4
    GONE = 5  # what the request builds on is not in the store (any more)


@dataclass(frozen=True, slots=True)
class Refused:
    """The store's no; it has changed nothing."""

    reason: Reason
    invoke: tuple[Invocation, ...] = ()
    """Tokens that the spending commit minted and that nobody has started."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a commit did."""

    become: Grant | None
    """The minted strand that the committing executor goes on with."""
    invoke: tuple[Invocation, ...]
    """The other minted tokens; a few expired ones may be among them."""
    garbage: tuple[BlobId, ...]
    """Blobs that nobody needs any more; delete them, then name them in `Commit.collected`."""
    job_over: bool = False


@dataclass(frozen=True, slots=True)
class Absorbed:
    """The asked strand is part of the asking token's work."""

    base: StrandId
    program: Entry
    part: Part | None
    inputs: tuple[Located, ...]
    """Inputs that are recorded; the others are the asking executor's own."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Spend one invocation and mint the next ones."""

    job: JobId
    token: TokenId
    attempt: AttemptId
    holder: HolderId
    outputs: tuple[Output, ...] = ()
    spawns: tuple[Spawn, ...] = ()
    consumed: tuple[ExportId, ...] = ()
    """Exports that this work has read; each loses one consumer."""
    absorbed: tuple[StrandId, ...] = ()
    """Strands that became part of this work; they wait no longer."""
    retained: tuple[tuple[ExportId, int], ...] = ()
    """Exports that several spawned pieces go on reading, each with its additional consumers."""
    n_tasks: int = 0
    """Tasks done by this work."""
    failed: bytes | object | None = None
    """The encoded error that ends a fail-fast job."""
    become: AttemptId | None = None
    """The attempt under which one minted strand goes on here; None: become none."""
    collected: tuple[BlobId, ...] = ()
    trace: bytes | object | None = None


class Status(IntEnum):
    """The life of a job."""

    RUNNING = 1
    DONE = 2
    FAILED = 3
    CANCELLED = 4


@dataclass(frozen=True, slots=True)
class Create:
    """A job as the client hands it to the store."""

    job: JobId
    entries: tuple[StrandId, ...]
    """Strands without inputs, or all of whose inputs are among `sources`."""
    entry_inputs: tuple[tuple[ExportId, ...], ...]
    """For each entry strand the exports it reads."""
    programs: tuple[tuple[StrandId, Entry], ...]
    sources: tuple[Output, ...]
    """Exports that exist from the start (large constants), with their readers counted."""
    n_requested: int
    """Requested exports; the job is done when all of them are complete."""
    n_tasks: int
    n_strands: int
    fail_fast: bool
    priority: int = 0
    manifest: bytes | object | None = None
    """What `attach` needs to turn exports into results again."""
    is_open: bool = False
    """It goes on when nothing is requested any more, and may be extended."""


@dataclass(frozen=True, slots=True)
class Relaunch:
    """A new generation of a job: what is missing is run again."""

    job: JobId
    generation: int
    survivors: tuple[tuple[ExportId, int], ...]
    """Complete exports that stay, each with its consumers in the new generation."""
    entries: tuple[StrandId, ...]
    entry_inputs: tuple[tuple[ExportId, ...], ...]
    waiting: tuple[tuple[StrandId, int, tuple[ExportId, ...]], ...]
    """Strands that read survivors and others: exports they miss, survivors they read."""
    done: tuple[StrandId, ...]
    """Strands that do not run again although exports they once read are recorded anew."""
    n_requested: int
    """Requested exports that are not among the survivors."""


# ------------------------------------------------------------------ open jobs


class NewExport(NamedTuple):
    """An export of an extension."""

    export: ExportId
    n_values: int
    n_consumers: int
    """Strands of the same extension that read it, plus one when it is requested."""
    requested: bool
    """It is pinned, and the client is told of each of its values."""


class NewStrand(NamedTuple):
    """A strand of an extension."""

    strand: StrandId
    inputs: tuple[ExportId, ...]
    """Exports and sources of the same extension that it reads, wholly."""
    earlier: tuple[tuple[ExportId, tuple[int, ...]], ...] = ()
    """Exports of earlier extensions, each with the values of it that the strand waits for."""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Restart:
    """A new generation of an open job: only what survives is kept."""

    generation: int
    survivors: tuple[tuple[ExportId, int], ...]
    """Complete exports that stay, each with 1 where it is pinned and 0 where it is only read."""


@dataclass(frozen=True, slots=True)
class Extend:
    """A further piece of an open job."""

    job: JobId
    number: int
    """1, 2, ...: each is applied once, and none before the one that precedes it."""
    programs: tuple[tuple[StrandId, Entry], ...]
    strands: tuple[NewStrand, ...]
    exports: tuple[NewExport, ...]
    sources: tuple[Output, ...] = ()
    """Values that exist already: constants, scattered values."""
    n_tasks: int = 0
    restart: Restart | None = None
    """After a loss of values: begin a new generation with this."""


class Note(NamedTuple):
    """What one commit of an open job has brought."""

    name: str
    """By which it is acknowledged."""
    recorded: tuple[Located, ...]
    """Values of requested exports; of their entries, the payloads are left out."""
    trace: bytes | object | None


@dataclass(frozen=True, slots=True)
class News:
    """What the client of an open job has not acknowledged."""

    notes: tuple[Note, ...]
    """In the order of the commits."""
    garbage: tuple[BlobId, ...]
    """Blobs that nobody needs any more; delete them, then name them in the next acknowledgement."""


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as its watchers see it."""

    job: JobId
    version: int
    """Grows with every commit."""
    status: Status
    error: bytes | object | None
    n_tasks: int
    n_strands: int
    n_tasks_done: int
    n_commits: int
    n_starts: int
    """Attempts begun."""
    n_queued: int
    n_running: int
    n_retries: int
    """Starts of tokens that had been started before."""
    n_deaths: int
    """Attempts whose executor is known to have died."""
    lost: tuple[ExportId, ...] = ()
    """Exports whose blobs are gone; a new generation is needed."""
    generation: int = 0
