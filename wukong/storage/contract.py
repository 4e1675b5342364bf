"""What every store is held to: backends implement it, and `tests/storage_contract.py` checks them.

Two protocols. A `JobStore` holds the state of jobs and changes it in atomic operations whose
meaning is that of `wukong.storage.state`; a `BlobStore` holds large encoded values. Calls block.
Every operation may be repeated: a repetition changes nothing, or is refused.

Any operation may raise `StoreUnavailable`: it may or may not have taken effect; do it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    BlobId,
    Commit,
    Create,
    ExportId,
    Extend,
    Feed,
    Grant,
    HolderId,
    Invocation,
    JobId,
    JobView,
    Located,
    News,
    Reason,
    Receipt,
    Refused,
    Relaunch,
    RunningToken,
    StrandId,
    TokenId,
)


class JobStore(Protocol):
    """The rows of jobs, and the operations on them (design.md, section 3). Thread-safe."""

    def create(self, request: Create) -> tuple[Invocation, ...]:
        """Begin a job and mint its entry tokens, queued.

        Returns: the tokens to invoke (n entries, their order).
        Cost: one round trip.
        """
        ...

    def start(
        self, job: JobId, token: TokenId, attempt: AttemptId, holder: HolderId
    ) -> Grant | Refused:
        """Take a token to run it.

        The same attempt gets the same answer again. A token that runs elsewhere is refused while
        its heartbeat is fresh. Cost: one round trip, O(inputs).
        """
        ...

    def renew(self, job: JobId, token: TokenId, attempt: AttemptId) -> Reason | None:
        """Heartbeat. None: all is well.

        SPENT, OVER: the work is in vain, stop it. HELD: it has been given to another attempt too;
        whichever commits first wins.
        """
        ...

    def absorb(
        self, job: JobId, token: TokenId, attempt: AttemptId, feed: Feed, n_held: int
    ) -> Absorbed | Refused:
        """Ask whether a waiting strand may become part of a running token's work.

        It may when it misses exactly `n_held` exports, which the asking attempt has yet to record.
        Nothing is recorded. Cost: one round trip.
        """
        ...

    def commit(self, request: Commit) -> Receipt | Refused:
        """Spend one invocation and mint the next ones, atomically.

        Idempotent in effect: a second commit of the same token is refused and changes nothing; the
        same attempt gets its receipt again while it is kept.

        Cost: one round trip, O(outputs + feeds + consumed).
        Source: design.md, section 3; replaces the counters of SoCC '20, section 3.3.
        """
        ...

    def confirm(self, job: JobId) -> None:
        """Wait until what this thread has committed survives the loss of the store's server.

        Returns at once where that is so after every operation.

        Raises:
            StoreUnavailable: it is not known to survive; it may be gone.
        """
        ...

    def release(self, holder: HolderId, cause: str) -> tuple[Invocation, ...]:
        """A holder is known to be dead: what it ran is queued again.

        Args:
            cause: how it died, for the error of a task that does this again and again.
        Returns: the tokens to invoke, of all jobs.
        """
        ...

    def expired(self, job: JobId) -> tuple[Invocation, ...]:
        """Tokens to invoke again: running with an old heartbeat, or queued past a back-off."""
        ...

    def queued(self, job: JobId) -> tuple[Invocation, ...]:
        """The tokens that nobody runs, those that wait longest first. Cost: one round trip."""
        ...

    def running(self, job: JobId) -> tuple[RunningToken, ...]:
        """The tokens that are run, by whomever."""
        ...

    def duplicate(self, job: JobId, tokens: Sequence[TokenId]) -> tuple[Invocation, ...]:
        """Queue tokens that run for the first time besides: of two attempts the first commit wins.

        Returns: the tokens to invoke; others that were named do not run, or have been begun twice.
        """
        ...

    def report_lost(
        self, job: JobId, token: TokenId, attempt: AttemptId, exports: Sequence[ExportId]
    ) -> bool:
        """Blobs of these exports are gone, found under a live token. False: it is not live."""
        ...

    def mark_lost(self, job: JobId, exports: Sequence[ExportId]) -> None:
        """As `report_lost`, by the client that cannot read its results."""
        ...

    def recorded(self, job: JobId) -> tuple[ExportId, ...]:
        """The exports that are complete."""
        ...

    def relaunch(self, request: Relaunch) -> tuple[Invocation, ...]:
        """Open a new generation of a job: live tokens are cancelled, other exports are forgotten.

        Nothing happens when the job is at the generation already; then it returns ().
        """
        ...

    # -------------------------------------------------------------- open jobs

    def extend(self, request: Extend) -> tuple[Invocation, ...] | Refused:
        """Add a piece to an open job; the rules stand in `wukong.storage.extension`.

        A repetition changes nothing.

        Returns: the tokens to invoke, or a refusal, which has changed nothing.
        Cost: one round trip, O(strands + exports + edges).
        """
        ...

    def unpin(self, job: JobId, exports: Sequence[ExportId]) -> None:
        """Give up the client's hold on exports, recorded or not. Cost: one round trip."""
        ...

    def drop(self, job: JobId, strands: Sequence[tuple[StrandId, tuple[ExportId, ...]]]) -> None:
        """Take back work that nobody needs: strands, each with the exports that it writes.

        With a strand, every strand that reads from it has to be named.
        Cost: one round trip, O(live tokens and waiting strands of the job).
        """
        ...

    def news(self, job: JobId, acknowledged: Sequence[str], collected: Sequence[BlobId]) -> News:
        """What commits of an open job have brought; what is acknowledged comes no more.

        Args:
            acknowledged: names of notes.
            collected: blobs of earlier news that have been deleted.
        """
        ...

    def located(self, job: JobId, exports: Sequence[ExportId]) -> tuple[Located, ...]:
        """Where the recorded values of exports are, as far as they are in the store."""
        ...

    # -------------------------------------------------------------- looking, and the end

    def view(self, job: JobId) -> JobView | None:
        """The job as it stands; None when there is none."""
        ...

    def wait(
        self, job: JobId, version: int, timeout_s: float, progress: bool = False
    ) -> JobView | None:
        """Block until there is news of the job since `version`, or the time is up.

        News is what `oversight.is_news` says: the end of the job, a failure, a loss; in an open
        job a requested value, or garbage; with `progress` every commit. Subscribes before it
        reads; wakes at once, without polling. Any number of threads may wait at once.

        Args:
            version: of the view that the caller knows; 0 for none.
        Returns: the job as it stands; None when there is none, or it was forgotten meanwhile.
        """
        ...

    def results(self, job: JobId) -> tuple[Located, ...]:
        """The complete exports that the client has requested."""
        ...

    def traces(self, job: JobId) -> tuple[object, ...]:
        """The packed traces of all commits so far, in their order."""
        ...

    def collect(self, job: JobId) -> tuple[tuple[Located, ...], tuple[object, ...]]:
        """`results` and `traces`, at one moment. Cost: one round trip."""
        ...

    def manifest(self, job: JobId) -> object | None:
        """What `Create.manifest` said; None when there is no such job."""
        ...

    def cancel(self, job: JobId) -> bool:
        """End a running job; its tokens are refused from now on. False: it has ended before."""
        ...

    def forget(self, job: JobId) -> None:
        """Remove all rows of a job. Its blobs are the caller's to delete (`delete_job`)."""
        ...

    def jobs(self) -> tuple[JobId, ...]:
        """The jobs that the store knows."""
        ...

    def close(self) -> None:
        """Release what this process holds of the store; the jobs stay."""
        ...


@runtime_checkable
class QueueStore(JobStore, Protocol):
    """A job store whose queued tokens are themselves the queue of a pool of executors."""

    def take(self, holder: HolderId, attempt: AttemptId) -> Grant | None:
        """Start the first queued token of all jobs; None when nothing is queued.

        The first is the one of the highest priority, and of these the one that was queued first;
        one that was released is queued again at its end. Not idempotent: an executor whose reply
        was lost has died with it, and `release` queues the token again.
        """
        ...

    def n_queued(self) -> int:
        """Tokens that `take` could still find, of all jobs."""
        ...


@runtime_checkable
class CallingStore(JobStore, Protocol):
    """A job store by which sweepers reach the pools that work on it, wherever these are."""

    def call_pools(self, invocations: Sequence[Invocation]) -> int:
        """Offer tokens to all pools that listen. Returns: how many there are."""
        ...

    def listen(self, on_tokens: Callable[[Sequence[Invocation]], None]) -> None:
        """Have a thread pass on what is offered, until this store object is closed."""
        ...


def sized_id(stem: str, size_bytes: int) -> BlobId:
    """The id of a blob: its stem, "job/attempt/number", and its exact size."""
    return BlobId(f"{stem}-{size_bytes}")


def stem_of(blob: BlobId) -> str:
    """What a blob's id was made of."""
    return blob.rpartition("-")[0] or blob


def size_of_blob(blob: BlobId) -> int:
    """The size of a blob, in bytes, from its id alone; 0 where the id does not say."""
    _, _, size = blob.rpartition("-")
    return int(size) if size.isdecimal() else 0


class BlobStore(Protocol):
    """Encoded values under ids that are never used twice. Thread-safe.

    An id is "job/attempt/number-size" (see `sized_id`), so that a store can tell from it, without
    asking anybody, where a blob lies and how to fetch it. A blob is written once and never changed.
    """

    def put_many(self, items: Sequence[tuple[BlobId, Sequence[memoryview]]]) -> None:
        """Store each blob, given as the buffers that it consists of; durable on return.

        Raises:
            StoreUnavailable: the store is full or away; nothing partial is left under an id.
        """
        ...

    def get_many(self, ids: Sequence[BlobId]) -> list[memoryview]:
        """The bytes of each blob, in order; views of a mapping where the store can.

        Raises:
            MissingBlob: one of them is gone; the message names it.
        """
        ...

    def delete_many(self, ids: Sequence[BlobId]) -> None:
        """Delete; a blob that is gone already is no error."""
        ...

    def delete_job(self, job: JobId) -> None:
        """Delete all blobs of a job."""
        ...

    def used_bytes(self) -> int:
        """Bytes of all blobs."""
        ...

    def close(self) -> None:
        """Release what this process holds of the store; blobs, and views of them, stay."""
        ...
