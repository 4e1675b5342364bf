"""An executor's events (facts) and actions (wishes): how its core and its driver talk.

All immutable, and comparable with ==.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    BlobId,
    Commit,
    Entry,
    ExportId,
    Feed,
    Grant,
    Invocation,
    JobId,
    Located,
    Part,
    Reason,
    Receipt,
    Refused,
    StrandId,
    TokenId,
)

# ------------------------------------------------------------------ the executor's events (facts)


class Edges(NamedTuple):
    """Which tasks read which, among the tasks of one part (and its inputs)."""

    tasks: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    """For each of `tasks`, the task ids whose values it reads."""


@dataclass(frozen=True, slots=True)
class Started:
    """The store's answer to `Start`."""

    reply: Grant | Refused


@dataclass(frozen=True, slots=True)
class Fetched:
    """Program and inputs are here."""

    part: Part
    """The grant's own part, or what the program says of the whole strand."""
    is_once: bool = False
    """It has a task that is annotated as not to be run again."""


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """Blobs of these inputs are gone or damaged."""

    exports: tuple[ExportId, ...]


@dataclass(frozen=True, slots=True)
class Ran:
    """A run has ended: all tasks, or as many as its limit allowed."""

    n_done: int
    """Tasks done, the first ones of the part."""
    sizes: Mapping[int, int]
    """Bytes of each done value that is exported or that the rest reads; {} where sizes do not
    matter since nothing is ever encoded (`memory://`)."""
    edges: Edges | None = None
    """Given when tasks are left: what the rest reads."""
    error: bytes | object | None = None
    """The encoded error of the first task that raised, when the job is fail-fast."""


@dataclass(frozen=True, slots=True)
class Overdue:
    """A run goes on for long; what has not begun has been taken from it and awaits a decision.

    Task number `n_done` of the part is running while this is decided.
    """

    n_done: int
    sizes: Mapping[int, int]
    edges: Edges
    """Of the running task and all behind it."""
    n_idle: int
    """Executors that would start at once (a hint)."""
    running_s: float = 0.0
    """How long the running task has been seen to run."""


@dataclass(frozen=True, slots=True)
class Piled:
    """Outputs that a run has made, and which is still under way."""

    sizes: Mapping[int, int]
    """Of those that were made since the last time, in bytes."""


@dataclass(frozen=True, slots=True)
class EarlyPut:
    """What became of the last `PutEarly`."""

    attempt: AttemptId
    entries: tuple[tuple[ExportId, Entry], ...] | None
    """None: nothing was put."""


@dataclass(frozen=True, slots=True)
class Put:
    """Encoded and, where blobs, durable: what the last `PutValues` asked for."""

    entries: tuple[tuple[ExportId, Entry], ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """The store's answer to `SendCommit`."""

    reply: Receipt | Refused


@dataclass(frozen=True, slots=True)
class AbsorbAnswered:
    """The store's answer to `AskAbsorb`."""

    reply: Absorbed | Refused


@dataclass(frozen=True, slots=True)
class Renewed:
    """The store's answer to `Renew`."""

    attempt: AttemptId
    """The attempt that was renewed; by now the executor may be at another."""
    reason: Reason | None
    """None when all is well; see `JobStore.renew`."""


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """The store did not answer; the action may or may not have taken effect."""

    action: Action
    error: bytes | object | None = None
    """For `PutValues`: the encoded error to end the job in, when this goes on."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The work cannot go on here or anywhere: a value cannot be pickled, unpickled or trusted.

    The encoded error says which.
    """

    error: bytes | object
    part: Part | None = None
    """What was to run, where the job may go on with errors as its results."""


@dataclass(frozen=True, slots=True)
class Done:
    """An action that has no answer of its own has been performed, or given up."""


Event = (
    Started
    | Fetched
    | FetchFailed
    | Ran
    | Overdue
    | Piled
    | EarlyPut
    | Put
    | Committed
    | AbsorbAnswered
    | Renewed
    | StoreFailed
    | Broken
    | Done
)


# ------------------------------------------------------------------ the executor's actions (wishes)


@dataclass(frozen=True, slots=True)
class Start:
    """Ask the store for the right to run a token. Answer: `Started`."""

    job: JobId
    token: TokenId
    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get the program and the inputs. Answer: `Fetched`, `FetchFailed`, `Broken`."""

    job: JobId
    base: StrandId
    program: Entry
    part: Part | None
    inputs: tuple[Located, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Run the first `limit` tasks of the fetched part. Answer: `Ran`; before it, `Overdue`s."""

    part: Part
    limit: int


@dataclass(frozen=True, slots=True)
class Condemn:
    """Make errors of all results of this part: it has killed too many executors.

    Or it has a task that may not be run again after one has died: then `n_deaths` is 0. Answer:
    `Ran`.
    """

    part: Part
    n_deaths: int
    cause: str
    error: bytes | object | None = None
    """Given when it cannot be run at all: the encoded error that its results are to be."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Let the interrupted run go on to task number `limit` of the (new) part. No answer."""

    part: Part
    limit: int


class PutItem(NamedTuple):
    """One entry to be made."""

    export: ExportId
    tasks: tuple[int, ...]
    blob: BlobId | None
    """The stem of its blob's id; None: encode it inline."""


@dataclass(frozen=True, slots=True)
class PutValues:
    """Encode values, and make those with a blob id durable. Answer: `Put`, `Broken`."""

    items: tuple[PutItem, ...]
    error: bytes | object | None = None
    """The encoded error to put in place of each value."""


@dataclass(frozen=True, slots=True)
class PutEarly:
    """Make outputs durable while the run goes on. Answer, before that of the run: `EarlyPut`."""

    attempt: AttemptId
    items: tuple[PutItem, ...]
    drop: bool
    """Memory is short: forget what was put and no later task of the run reads."""


@dataclass(frozen=True, slots=True)
class SendCommit:
    """Answer: `Committed`."""

    commit: Commit


@dataclass(frozen=True, slots=True)
class AskAbsorb:
    """May this strand become part of the token's work? Answer: `AbsorbAnswered`."""

    job: JobId
    token: TokenId
    attempt: AttemptId
    feed: Feed
    n_held: int
    """How many of the strand's inputs are this work's unrecorded exports."""


@dataclass(frozen=True, slots=True)
class Invoke:
    """Have executors started for these tokens. Answer: `Done`; what fails stays queued."""

    invocations: tuple[Invocation, ...]


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete blobs that nobody needs. Answer: `Done`."""

    blobs: tuple[BlobId, ...]
    confirm: bool
    """Only after the last commit is known to survive a failover of the store."""


@dataclass(frozen=True, slots=True)
class Renew:
    """Heartbeat. Answer: `Renewed`."""

    job: JobId
    token: TokenId
    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class ReportLost:
    """Tell the job that these exports cannot be read. Answer: `Done`."""

    job: JobId
    token: TokenId
    attempt: AttemptId
    exports: tuple[ExportId, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop all values of the ended work. Answer: `Done`."""


Action = (
    Start
    | Fetch
    | Run
    | Condemn
    | Resume
    | PutValues
    | PutEarly
    | SendCommit
    | AskAbsorb
    | Invoke
    | Delete
    | Renew
    | ReportLost
    | Forget
)
