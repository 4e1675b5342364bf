"""Requests and replies of the Redis scripts: messages of the contract <-> MessagePack and bytes.

What the scripts seldom look into (entries, parts) crosses them as bytes that are MessagePack
themselves. Redis knows MessagePack's old form only, with one kind of strings, and Lua knows no
absent values in tables: they are false. Nothing that is read here can run code, whatever the bytes
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from wukong.errors import CorruptBlob
from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    BlobId,
    Commit,
    Entry,
    ExportId,
    ExportSpec,
    Extend,
    Feed,
    Grant,
    Invocation,
    JobId,
    JobView,
    Located,
    News,
    Note,
    Output,
    Part,
    Reason,
    Receipt,
    Refused,
    RunningToken,
    Spawn,
    Status,
    StrandId,
    TokenId,
)

GRANTED, REFUSED, APPLIED = 1, 2, 3
"""The first item of a reply."""
MAX_BYTES = 1 << 30
"""Of the entries of one export; Redis takes half of it."""


def import_msgpack() -> Any:
    """MessagePack, which is optional.

    Raises:
        ImportError: it says what to install.
    """
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("stores on Redis need msgpack: pip install 'wukong[redis]'") from error
    return msgpack


class RedisWire:
    """Encodes requests and decodes replies. Thread-safe."""

    def __init__(self) -> None:
        msgpack = import_msgpack()
        self._errors = (msgpack.UnpackException, ValueError, TypeError, AttributeError)
        self._unpackb = msgpack.unpackb
        self._unpacker = msgpack.Unpacker
        self._packb = msgpack.packb

    def pack(self, value: object) -> bytes:
        """A plain value."""
        packed: bytes = self._packb(value, use_bin_type=False)
        return packed

    # -------------------------------------------------------------- what is opaque

    def pack_entry(self, entry: Entry) -> bytes:
        """One entry of an export or a program."""
        if not (entry.payload is None or isinstance(entry.payload, bytes | bytearray | memoryview)):
            raise TypeError(f"Redis takes encoded values, not {type(entry.payload).__name__}")
        tasks, blob, payload, size_bytes, n_errors = entry
        return self.pack((tasks, blob or False, or_false(payload), size_bytes, n_errors))

    def entries(self, stream: bytes) -> tuple[Entry, ...]:
        """Entries that stand one after the other."""
        unpacker = self._unpacker(raw=True, use_list=False, max_buffer_size=MAX_BYTES)
        unpacker.feed(stream)
        try:
            return tuple([_entry(*fields) for fields in unpacker])
        except self._errors as error:
            raise CorruptBlob(f"stored entries are damaged: {error}") from error

    def part(self, packed: bytes | None) -> Part | None:
        """A piece of a strand; None: all of it."""
        if packed is None:
            return None
        try:
            tasks, inputs, exports = self._unpackb(packed, use_list=False, raw=False)
            specs = [
                ExportSpec._make((*spec[:-1], tuple([Feed._make(feed) for feed in spec[-1]])))
                for spec in exports
            ]
        except self._errors as error:
            raise CorruptBlob(f"a stored part is damaged: {error}") from error
        return Part(tasks, inputs, tuple(specs))

    # -------------------------------------------------------------- requests

    def output(self, output: Output) -> tuple[object, ...]:
        """As `record` in `redis_rows.lua` reads it."""
        entries = [
            (self.pack_entry(entry), len(entry.tasks), entry.blob or False, entry.size_bytes)
            for entry in output.entries
        ]
        return (output.export, entries, *output[2:])

    def commit(self, request: Commit, now: float | bool) -> bytes:
        """As `commit` in `redis_state.lua` reads it."""
        return self.pack(
            {
                "op": "commit",
                "now": now,
                "token": request.token,
                "attempt": request.attempt,
                "holder": request.holder,
                "outputs": [self.output(output) for output in request.outputs],
                "spawns": [self._spawn(spawn) for spawn in request.spawns],
                "consumed": request.consumed,
                "absorbed": request.absorbed,
                "retained": request.retained,
                "n_tasks": request.n_tasks,
                "failed": or_false(request.failed),
                "become": request.become or False,
                "collected": request.collected,
                "trace": or_false(request.trace),
            }
        )

    def _spawn(self, spawn: Spawn) -> tuple[object, ...]:
        return (spawn.strand, spawn.base, self.pack(spawn.part), *spawn[3:])

    def extend(self, request: Extend, now: float | bool) -> bytes:
        """As `extend` in `redis_extension.lua` reads it."""
        restart = request.restart
        return self.pack(
            {
                "op": "extend",
                "now": now,
                "name": request.job,
                "number": request.number,
                "programs": [(s, self.pack_entry(entry)) for s, entry in request.programs],
                "strands": request.strands,
                "exports": request.exports,
                "sources": [self.output(output) for output in request.sources],
                "n_tasks": request.n_tasks,
                "restart": restart is not None and (restart.generation, restart.survivors),
            }
        )

    # -------------------------------------------------------------- replies

    def located(self, flat: Sequence[bytes]) -> tuple[Located, ...]:
        """Exports and their entries, which alternate."""
        return tuple(
            [
                Located(ExportId(flat[i].decode()), self.entries(flat[i + 1]))
                for i in range(0, len(flat), 2)
            ]
        )

    def grant(self, job: JobId, reply: Sequence[Any]) -> Grant:
        """A reply that begins with GRANTED."""
        _, token, attempt, strand, base, program, part, inputs, *rest = reply
        n_starts, n_deaths, cause, priority, is_open = rest
        return Grant(
            job=job,
            token=TokenId(token.decode()),
            attempt=AttemptId(attempt.decode()),
            strand=StrandId(strand.decode()),
            base=StrandId(base.decode()),
            program=self.entries(program)[0],
            part=self.part(part),
            inputs=self.located(inputs),
            n_starts=n_starts,
            n_deaths=n_deaths,
            cause=cause.decode(),
            priority=priority,
            is_open=bool(is_open),
        )

    def started(self, job: JobId, reply: Sequence[Any]) -> Grant | Refused:
        """The reply of `start`."""
        return self.grant(job, reply) if reply[0] == GRANTED else refused(job, reply)

    def absorbed(self, job: JobId, reply: Sequence[Any]) -> Absorbed | Refused:
        """The reply of `absorb`."""
        if reply[0] == REFUSED:
            return refused(job, reply)
        _, base, program, part, inputs = reply
        return Absorbed(
            StrandId(base.decode()),
            self.entries(program)[0],
            self.part(part),
            self.located(inputs),
        )

    def receipt(self, job: JobId, reply: Sequence[Any]) -> Receipt | Refused:
        """The reply of `commit`."""
        if reply[0] == REFUSED:
            return refused(job, reply)
        _, granted, invoke, garbage, is_over, _ = reply
        return Receipt(
            None if granted is None else self.grant(job, granted),
            invocations(job, invoke),
            tuple([BlobId(blob.decode()) for blob in garbage]),
            job_over=bool(is_over),
        )

    def view(self, job: JobId, reply: Sequence[Any] | None) -> JobView | None:
        """The reply of `view`."""
        if reply is None:
            return None
        version, status, error, *counts, lost, generation, _ = reply
        tasks, strands, done, commits, starts, queued, running, retries, deaths = counts
        return JobView(
            job=job,
            version=version,
            status=Status(status),
            error=error,
            n_tasks=tasks,
            n_strands=strands,
            n_tasks_done=done,
            n_commits=commits,
            n_starts=starts,
            n_queued=queued,
            n_running=running,
            n_retries=retries,
            n_deaths=deaths,
            lost=ids(lost),
            generation=generation,
        )

    def news(self, reply: Sequence[Any]) -> News:
        """The reply of `news`."""
        notes, garbage = reply
        return News(
            tuple([Note(name.decode(), self.located(flat), trace) for name, flat, trace in notes]),
            tuple([BlobId(blob.decode()) for blob in garbage]),
        )

    def offered(self, message: bytes) -> tuple[Invocation, ...]:
        """Tokens that a sweeper offers."""
        try:
            found = self._unpackb(message, use_list=False, raw=False)
            return tuple([Invocation(JobId(j), TokenId(t), int(p)) for j, t, p in found])
        except self._errors as error:
            raise CorruptBlob(f"a message for pools is damaged: {error}") from error

    def running(self, reply: Sequence[Any]) -> tuple[RunningToken, ...]:
        """The reply of `running`."""
        found = []
        for token, strand, packed, n_starts in reply:
            part = self.part(packed)
            found.append(
                RunningToken(
                    TokenId(token.decode()),
                    StrandId(strand.decode()),
                    None if part is None else part.tasks,
                    n_starts,
                )
            )
        return tuple(found)


def or_false(payload: object) -> object:
    """Encoded bytes; absent ones are false in the scripts."""
    return False if payload is None else payload


def refused(job: JobId, reply: Sequence[Any]) -> Refused:
    """A reply that begins with REFUSED."""
    _, reason, *rest = reply
    return Refused(Reason(reason), invocations(job, rest[0]) if rest else ())


def invocations(job: JobId, flat: Sequence[Any]) -> tuple[Invocation, ...]:
    """Tokens of one job and their priorities, which alternate."""
    return tuple(
        [Invocation(job, TokenId(flat[i].decode()), flat[i + 1]) for i in range(0, len(flat), 2)]
    )


def _entry(
    tasks: tuple[int, ...], blob: Any, payload: Any, size_bytes: int, n_errors: int
) -> Entry:
    return Entry(
        tasks,
        BlobId(blob.decode()) if blob else None,
        None if payload is False else payload,
        size_bytes,
        n_errors,
    )


def ids(found: Iterable[bytes]) -> tuple[ExportId, ...]:
    """Ids of exports."""
    return tuple([ExportId(name.decode()) for name in found])
