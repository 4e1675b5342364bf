"""What one executor holds while it runs a token, and what may be tuned about it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from wukong.executor.events import Overdue
from wukong.executor.messages import (
    AttemptId,
    BlobId,
    Entry,
    ExportId,
    ExportSpec,
    Feed,
    JobId,
    Part,
    StrandId,
    TokenId,
)
from wukong.executor.split import Split, cut_rest


class Phase(IntEnum):
    """What the executor waits for."""

    IDLE = 0
    STARTING = 1
    FETCHING = 2
    RUNNING = 3
    ABSORBING = 4
    PUTTING = 5
    COMMITTING = 6


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be tuned, and the switches that let each idea be measured alone."""

    inline_bytes: int = 256 * 1024
    """Bytes of values that travel inside one commit; design.md, section 3, rule 11."""
    blob_bytes: int = 64 * 1024
    """A value of at least this size is a blob of its own."""
    absorb_bytes: int = 1024 * 1024
    """Outputs of at least this size ask to absorb their consumer; 0: never (delayed I/O off)."""
    pile_bytes: int = 256 * 1024 * 1024
    """Outputs that a run has made are put at once when they are so many; rule 11."""
    early_bytes: int = 0
    """The same for outputs that will be put in any case, where blobs are far away; 0: off."""
    prefetch_bytes: int = 0
    """Inputs of a next strand that may be fetched while another one runs; 0: none are."""
    keep_bytes: int = 0
    """Values of blobs that the executors of a pool keep, all together; 0: none."""
    split: bool = True
    """Give away the rest of a strand that runs long while executors are idle."""
    split_bytes_per_s: float = 5e6
    """A split may store so many bytes for each second of work that is left: storing them then
    takes a two-hundredth of it, at 1 GB/s."""
    hand_over_s: float = 0.0
    """What passes until another executor has begun with what a split gives it."""
    become: bool = True
    """Go on with one of the strands that a commit mints; off: every strand is invoked anew."""
    heartbeat_s: float = 1.0
    """Time between renewals of a running token."""
    n_deaths_max: int = 3
    """A task that has killed this many executors, running alone, becomes an error."""
    retry_s: float = 0.05
    """First wait before a store that did not answer is asked again; doubles up to 64 times."""
    give_up_s: float = 60.0
    """An executor abandons its work when the store has not answered for this long."""
    full_s: float = 10.0
    """A value for which the store has had no room for this long is an error of the job."""
    long_s: float = 0.5
    """In an open job, a task that runs for this long may wait for one that stands behind it: what
    has not begun is given away."""
    confirm: bool = False
    """Wait for the store's replicas before garbage is deleted (rule 3)."""


@dataclass(slots=True)
class Work:
    """All that is done under one token: its strand, and the strands absorbed on the way."""

    job: JobId
    token: TokenId
    attempt: AttemptId
    base: StrandId
    n_starts: int
    n_deaths: int
    cause: str
    part: Part = Part((), (), ())
    """The part that runs now."""
    n_tasks: int = 0
    """Tasks done so far."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of the values that are to be recorded."""
    specs: tuple[ExportSpec, ...] = ()
    """Exports that are to be recorded."""
    inputs: list[ExportId] = field(default_factory=list)
    """Recorded exports that this work reads."""
    recorded: dict[int, ExportId] = field(default_factory=dict)
    """Values of those exports."""
    absorbed: list[StrandId] = field(default_factory=list)
    split: Split | None = None
    failed: bytes | object | None = None
    blobs: tuple[BlobId, ...] = ()
    """Blobs that this attempt has put and not yet committed."""
    n_blobs: int = 0
    """Blobs that it has named."""
    is_sent: bool = False
    """A commit has been sent: what it names may be somebody's input (seed 1685)."""
    early: dict[tuple[ExportId, int], Entry] = field(default_factory=dict)
    """Outputs that were put while the run went on."""
    piled: dict[int, int] = field(default_factory=dict)
    """Large outputs that have not been put, and their sizes."""
    made_bytes: int = 0
    """All large outputs so far."""
    is_putting: bool = False
    """Outputs are being put while the run goes on."""
    has_failed_early: bool = False
    """That has failed: the rest is put at the end."""
    is_once: bool = False
    """A task of the part may not be run again."""
    is_open: bool = False
    """Of an open job: single values are waited for, and errors are values."""
    run_at: float = 0.0
    """When the part that runs now was begun."""
    doomed: bool = False
    """The token is spent or the job is over: stop, and record nothing."""


def task_limit(work: Work) -> int:
    """How many tasks to run before a commit.

    Each death makes the next attempt run a sixteenth, so that the task which kills executors is
    alone soon (rule 6 asks for halves; this takes fewer deaths).
    """
    return max(1, len(work.part.tasks) >> (4 * work.n_deaths))


def choose_pieces(
    work: Work, overdue: Overdue, policy: Policy, now: float, is_draining: bool
) -> list[int] | None:
    """The piece of each task that a run has left, number 0 stays; None: leave the run as it is."""
    rest = overdue.edges
    if work.n_deaths or (is_draining and work.is_once):
        return None
    if work.is_putting:
        return None  # what is being put now belongs to this attempt, and not to a piece (seed 168)
    all_stay = [0] * len(rest.tasks)
    if is_draining:
        return all_stay  # others go on, with the running task too
    if work.is_open and overdue.running_s >= policy.long_s and len(rest.tasks) > 1:
        return cut_rest(rest, overdue.n_idle + 1, all_away=True)
    if not is_worth_a_split(work, overdue, policy, now):
        return None
    if policy.split and overdue.n_idle >= 1:
        piece_of = cut_rest(rest, overdue.n_idle + 1)
        if max(piece_of):
            return piece_of
    done = set(work.part.tasks[: overdue.n_done])
    is_awaited = any(spec.requested and done.intersection(spec.tasks) for spec in work.part.exports)
    return all_stay if work.is_open and is_awaited else None


def is_worth_a_split(work: Work, overdue: Overdue, policy: Policy, now: float) -> bool:
    """Whether a split ends earlier, and what it has to store is little beside what is left to run.

    If that is not little, a later moment may be better: between two groups of tasks nothing large
    lives.
    """
    mean_s = (now - work.run_at) / (overdue.n_done + 1)
    if policy.hand_over_s and gain_s(overdue, mean_s, policy.hand_over_s) <= policy.hand_over_s:
        return False
    wanted = {v for values in overdue.edges.inputs for v in values} - work.recorded.keys()
    n_bytes = sum(overdue.sizes.get(value, 0) for value in wanted)
    left_s = mean_s * len(overdue.edges.tasks)
    return n_bytes <= max(policy.blob_bytes, left_s * policy.split_bytes_per_s)


def gain_s(overdue: Overdue, task_s: float, hand_over_s: float) -> float:
    """How much earlier a run ends when one other executor takes half of what has not begun."""
    n_left = len(overdue.edges.tasks) - 1
    running_s = max(0.0, task_s - overdue.running_s)
    n_kept = n_left // 2
    kept_s = running_s + n_kept * task_s
    return running_s + n_left * task_s - max(kept_s, hand_over_s + (n_left - n_kept) * task_s)


def absorbing_feed(work: Work, policy: Policy) -> Feed | None:
    """The strand that alone reads everything this work has made, if that is much (rule 8).

    When anybody else waits for an output, holding it back would hold them up.
    """
    if policy.absorb_bytes > sum(work.sizes.values()) or work.early:
        return None
    return work.specs[0].feeds[0] if _is_absorbable(work, policy, work.specs) else None


def may_absorb(work: Work, policy: Policy) -> bool:
    """Whether what the running part makes could be held back for its only reader."""
    return _is_absorbable(work, policy, work.part.exports)


def _is_absorbable(work: Work, policy: Policy, specs: tuple[ExportSpec, ...]) -> bool:
    if policy.absorb_bytes <= 0:
        return False
    if work.n_deaths:
        return False  # a task that kills executors is to end alone, and not its inputs' tasks
    if policy.confirm:
        # What an absorbed strand has read may be rolled back, and recorded anew by others,
        # while the token that absorbed it stays: two attempts would be seen (seed 427).
        return False
    feeds = [feed for spec in specs for feed in spec.feeds]
    if len(feeds) != len(specs) or len({feed.strand for feed in feeds}) != 1:
        return False
    # In a piece of a split strand, the rest of an export is made elsewhere.
    return not any(
        spec.requested or len(spec.feeds) != 1 or spec.n_values != len(spec.tasks) for spec in specs
    )
