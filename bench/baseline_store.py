"""The stores of the baselines: the real ones, counted, and one with an operation for each edge.

Whatever a scheme asks of the embedded store is counted where it is asked, in the executors and in
the client alike, in one file that all of them map: a row for each executor, and one for the client.
"""

from __future__ import annotations

import itertools
import marshal
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb

from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    Commit,
    Create,
    Entry,
    ExportId,
    Feed,
    Grant,
    HolderId,
    Invocation,
    JobId,
    Located,
    Output,
    Receipt,
    Refused,
    TokenId,
)
from wukong.executor.pool_handed import HandedExecutor, HandedTokens
from wukong.executor.pool_seats import ProcessSeat
from wukong.executor.pool_zygote import Settings
from wukong.executor.run import Executor
from wukong.sim.schemes import SCHEMES, Scheme
from wukong.storage import Store, default_limit_bytes
from wukong.storage.blobfiles import BlobFiles
from wukong.storage.contract import QueueStore
from wukong.storage.local import LocalJobStore
from wukong.storage.local_env import MAP_BYTES
from wukong.storage.local_files import spill_directory

SILENCE_S = 300.0
"""Long: a client that works in stages holds queued tokens back, and nobody else may offer them."""
FIELDS = (
    "invocations",
    "commits",
    "operations",
    "round_trips",
    "sets",
    "increments",
    "gets",
    "blobs_put",
    "blobs_read",
    "written_bytes",
    "read_bytes",
)
MAIL = "mail"
TOKENS_PER_LETTER = 40
"""Of some 60 bytes each: a letter is written to a FIFO in one piece, up to 4,096 bytes."""


class Counts:
    """Counters of one process, in a file that the client sums up.

    Args:
        row: which part of the file is this process's own.
    """

    def __init__(self, directory: Path, row: int, n_rows: int) -> None:
        fd = os.open(directory / "counts", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.truncate(fd, n_rows * len(FIELDS) * 8)
            self._all = memoryview(mmap.mmap(fd, 0)).cast("q")
        finally:
            os.close(fd)
        self._first = row * len(FIELDS)

    def add(self, **amounts: int) -> None:
        """Count."""
        for name, amount in amounts.items():
            self._all[self._first + FIELDS.index(name)] += amount

    def total(self) -> dict[str, int]:
        """The sums over all processes."""
        return {name: sum(self._all[i :: len(FIELDS)]) for i, name in enumerate(FIELDS)}

    def clear(self) -> None:
        """Begin anew; nobody may be counting."""
        for i in range(len(self._all)):
            self._all[i] = 0


class CountedBlobs(BlobFiles):
    """Blobs in shared memory. Programs are counted as operations, and not as bytes of values."""

    counts: Counts

    def put_many(self, items: Sequence[tuple[str, Sequence[memoryview]]]) -> None:
        super().put_many(items)
        values = [parts for blob, parts in items if "/plan/" not in blob]
        self.counts.add(
            operations=len(items),
            round_trips=1,
            blobs_put=len(values),
            written_bytes=sum(part.nbytes for parts in values for part in parts),
        )

    def get_many(self, blob_ids: Sequence[str]) -> list[memoryview]:
        found = super().get_many(blob_ids)
        values = [view for blob, view in zip(blob_ids, found) if "/plan/" not in blob]
        self.counts.add(
            operations=len(found),
            round_trips=1,
            blobs_read=len(values),
            read_bytes=sum(view.nbytes for view in values),
        )
        return found


class CountedJobs(LocalJobStore):
    """The embedded store. A look that finds nothing queued is not counted, nor is a heartbeat."""

    counts: Counts
    mail: Callable[[tuple[Invocation, ...]], None] | None = None
    """Tells a client that invokes what each commit has minted."""

    def create(self, request: Create) -> tuple[Invocation, ...]:
        sizes = [_inline_bytes(output) for output in request.sources]
        self.counts.add(operations=1, round_trips=1, written_bytes=sum(sizes))
        return super().create(request)

    def take(self, holder: HolderId, attempt: AttemptId) -> Grant | None:
        grant = super().take(holder, attempt)
        if grant is not None:
            self._begun(grant)
        return grant

    def start(
        self, job: JobId, token: TokenId, attempt: AttemptId, holder: HolderId
    ) -> Grant | Refused:
        reply = super().start(job, token, attempt, holder)
        if isinstance(reply, Grant):
            self._begun(reply)
        return reply

    def absorb(
        self, job: JobId, token: TokenId, attempt: AttemptId, feed: Feed, n_held: int
    ) -> Absorbed | Refused:
        reply = super().absorb(job, token, attempt, feed, n_held)
        self.counts.add(operations=1, round_trips=1)
        if isinstance(reply, Absorbed):
            self.counts.add(read_bytes=sum(map(_inline_bytes, reply.inputs)))
        return reply

    def commit(self, request: Commit) -> Receipt | Refused:
        sizes = [_inline_bytes(output) for output in request.outputs]
        # Before the client can learn that the job is over, and read the counts.
        self.counts.add(commits=1, operations=1, round_trips=1, written_bytes=sum(sizes))
        reply = super().commit(request)
        if isinstance(reply, Refused):
            return reply  # the job has ended by an error of another task
        if reply.become is not None:
            own = {output.export for output in request.outputs}
            others = [part for part in reply.become.inputs if part.export not in own]
            self.counts.add(read_bytes=sum(map(_inline_bytes, others)))
        if self.mail is not None:
            self.mail(reply.invoke)
        return reply

    def collect(self, job: JobId) -> tuple[tuple[Located, ...], tuple[object, ...]]:
        results, traces = super().collect(job)
        n_bytes = sum(map(_inline_bytes, results))
        self.counts.add(operations=1, round_trips=1, read_bytes=n_bytes)
        return results, traces

    def _begun(self, grant: Grant) -> None:
        n_bytes = sum(map(_inline_bytes, grant.inputs))
        self.counts.add(invocations=1, operations=1, round_trips=1, read_bytes=n_bytes)


class EdgeJobs(CountedJobs):
    """A set for each output, an increment for each edge of a fan-in, a get for each input.

    Small values lie in an environment of their own, with its own lock: they are set there, and the
    commit that follows carries the increments only. Who takes or becomes a strand gets those of
    its inputs that it has not just made, in one round trip.
    """

    scheme: Scheme
    _values: lmdb.Environment | None = None

    def commit(self, request: Commit) -> Receipt | Refused:
        n_sets, n_edges = self.scheme.sets_and_increments(request)
        if n_sets:
            self._set(request)
            self.counts.add(sets=n_sets, operations=n_sets, round_trips=1)
            request = replace(request, outputs=tuple(map(_without_payload, request.outputs)))
        self.counts.add(increments=n_edges, operations=max(1, n_edges) - 1)
        reply = super().commit(request)
        if not isinstance(reply, Receipt) or reply.become is None:
            return reply
        own = {output.export for output in request.outputs}
        inputs = self._get(reply.become.job, reply.become.inputs, own)
        return replace(reply, become=replace(reply.become, inputs=inputs))

    def take(self, holder: HolderId, attempt: AttemptId) -> Grant | None:
        grant = super().take(holder, attempt)
        if grant is None:
            return None
        return replace(grant, inputs=self._get(grant.job, grant.inputs, set()))

    def absorb(
        self, job: JobId, token: TokenId, attempt: AttemptId, feed: Feed, n_held: int
    ) -> Absorbed | Refused:
        reply = super().absorb(job, token, attempt, feed, n_held)
        if not isinstance(reply, Absorbed):
            return reply
        return replace(reply, inputs=self._get(job, reply.inputs, set()))

    def forget(self, job: JobId) -> None:
        super().forget(job)
        environment = self._environment_of_values()
        with environment.begin(write=True) as transaction:
            transaction.drop(environment.open_db(None, transaction), delete=False)

    def _set(self, request: Commit) -> None:
        with self._environment_of_values().begin(write=True) as transaction:
            for output in request.outputs:
                for entry in output.entries:
                    if entry.blob is None:
                        name = _name(request.job, output.export, entry)
                        transaction.put(name, bytes(entry.payload))  # type: ignore[call-overload]  # inline

    def _get(
        self, job: JobId, inputs: tuple[Located, ...], held: set[ExportId]
    ) -> tuple[Located, ...]:
        """The inputs, with the small values that are not held."""
        names = {
            (export, entry.tasks): _name(job, export, entry)
            for export, entries in inputs
            if export not in held
            for entry in entries
            if entry.blob is None
        }
        if not names:
            return inputs
        self.counts.add(gets=len(names), operations=len(names), round_trips=1)
        with self._environment_of_values().begin() as transaction:
            found = {place: transaction.get(name) for place, name in names.items()}
        return tuple(
            Located(
                export,
                tuple(e._replace(payload=found.get((export, e.tasks), e.payload)) for e in entries),
            )
            for export, entries in inputs
        )

    def _environment_of_values(self) -> lmdb.Environment:
        if self._values is None:
            folder = self.directory / "values"
            folder.mkdir(mode=0o700, exist_ok=True)
            self._values = lmdb.open(
                str(folder), map_size=MAP_BYTES, writemap=True, sync=False, metasync=False
            )
        return self._values

    def close(self) -> None:
        super().close()
        if self._values is not None:
            self._values.close()
            self._values = None


def _inline_bytes(values: Output | Located) -> int:
    return sum(entry.size_bytes for entry in values.entries if entry.blob is None)


def _name(job: JobId, export: ExportId, entry: Entry) -> bytes:
    return f"{job}/{export}/{entry.tasks[0]}".encode()


def _without_payload(output: Output) -> Output:
    """An output whose small values have been set; what the client reads stays with the job."""
    if output.requested:
        return output
    entries = (e if e.blob is not None else e._replace(payload=b"") for e in output.entries)
    return output._replace(entries=tuple(entries))


# ------------------------------------------------------------------ opening, in every process


@dataclass(frozen=True, slots=True)
class _HandedStore(Store):
    """A store whose tokens are handed to executors: nobody takes what is queued there."""

    @property
    def queue(self) -> QueueStore | None:
        """None: the client, or whoever invokes, hands tokens to the pool."""
        return None


def open_counted(scheme: Scheme, directory: Path, row: int, n_rows: int) -> Store:
    """Open the store of a scheme, in the client or in an executor."""
    jobs = (EdgeJobs if scheme.edge_operations else CountedJobs)(directory, SILENCE_S)
    spill = spill_directory(jobs.directory)
    blobs = CountedBlobs(jobs.directory / "blobs", spill, default_limit_bytes(jobs.directory))
    jobs.counts = blobs.counts = Counts(jobs.directory, row, n_rows)
    if isinstance(jobs, EdgeJobs):
        jobs.scheme = scheme
    return (_HandedStore if scheme.client_invokes else Store)(jobs, blobs, jobs.secret)


class Mailbox:
    """By which executors tell the client, where it invokes, that work has ended and what can begin.

    Args:
        is_reader: this is the client's end.
    """

    def __init__(self, directory: Path, is_reader: bool) -> None:
        path = directory / MAIL
        if is_reader:
            os.mkfifo(path, 0o600)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._rest = b""

    def send(self, minted: Sequence[Invocation]) -> None:
        """Say that one strand has ended, and which ones can begin."""
        n_ended = 1
        for first in range(0, max(1, len(minted)), TOKENS_PER_LETTER):
            letter = marshal.dumps(
                (n_ended, [tuple(m) for m in minted[first:][:TOKENS_PER_LETTER]])
            )
            os.write(self._fd, len(letter).to_bytes(4, "little") + letter)
            n_ended = 0

    def receive(self) -> tuple[int, list[Invocation]]:
        """Wait for letters. Returns: how many strands have ended, and what can begin."""
        self._rest += os.read(self._fd, 1 << 16)
        n_ended = 0
        minted: list[Invocation] = []
        while len(self._rest) >= 4:
            end = 4 + int.from_bytes(self._rest[:4], "little")
            if len(self._rest) < end:
                break
            n, tokens = marshal.loads(self._rest[4:end])
            self._rest = self._rest[end:]
            n_ended += n
            minted += itertools.starmap(Invocation, tokens)
        return n_ended, minted

    def close(self) -> None:
        """Give back the descriptor."""
        os.close(self._fd)


class _Silent:
    """The invoker of executors that do not invoke; the client hears of commits by itself."""

    def __init__(self, seat: ProcessSeat) -> None:
        self.n_idle = seat.n_idle

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """See `Invoker`."""


def run_executor(seat: ProcessSeat, settings: Settings) -> None:
    """What the processes of a baseline's pool do: run tokens by the scheme's policy."""
    scheme = SCHEMES[str(settings.store_options["scheme"])]
    directory = Path(settings.store_url.removeprefix("local://"))
    store = open_counted(scheme, directory, seat.number, settings.n_seats + 1)
    if not scheme.client_invokes:
        executor = Executor(seat.holder, store, seat, settings.policy, seat.report_stuck)
        assert store.queue is not None
        seat.serve(executor, store.queue.n_queued)
    else:
        assert isinstance(store.jobs, CountedJobs)
        store.jobs.mail = Mailbox(directory, is_reader=False).send
        tokens = HandedTokens(settings.handed_fd, settings.n_seats, seat.number)
        rest = (seat.holder, store, _Silent(seat), settings.policy, seat.report_stuck)
        seat.serve(HandedExecutor(tokens, *rest), tokens.n_queued)
    store.jobs.close()
