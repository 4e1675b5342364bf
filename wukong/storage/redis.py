"""The store on Redis or Valkey, `redis://...`: jobs whose operations are Lua scripts.

Each operation of `wukong.storage.state` and `wukong.storage.oversight` is one call of a script,
which the server runs at once or not at all. What lies where:

    redis_url            URLs
    redis_link           connections, a cluster's nodes, errors
    redis_wire           requests and replies
    redis_watch          waiting for news, without polling
    redis_blobs          large values
    redis_rows.lua       the key schema, and what both scripts share
    redis_state.lua      executors' operations
    redis_oversight.lua  clients' and sweepers' operations
    redis_extension.lua  those of the client of an open job

Two keys are not in the slot of a job: PREFIXjobs, a sorted set of job ids by the time of their
creation, written before the job is, so that it names at least the jobs that there are; and blobs.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

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
from wukong.storage.contract import CallingStore
from wukong.storage.redis_blobs import index_key, listing_key, renew_blobs
from wukong.storage.redis_link import N_ROUNDS, Command, Link, pack
from wukong.storage.redis_watch import Watchers, listen
from wukong.storage.redis_wire import APPLIED, RedisWire, ids, invocations, or_false
from wukong.storage.rows import MANIFEST

TABLES = ("j", "t", "a", "w", "e", "v", "r", "p", "l", "n", "x", "g", "d", "s", "q")
"""The keys of a job, in the order in which the scripts name them."""
ROWS_AT_ONCE = 1000
"""Rows that one script of a long `create` writes."""
BYTES_AT_ONCE = 1 << 20
BEING_MADE_S = 60.0
"""A listed job without rows is being created; after so long it is gone."""
PREFIXES_KEPT = 64
"""Jobs whose commands' beginnings are kept, since they are the same each time."""


class Script:
    """A Lua script, and how it is called."""

    def __init__(self, name: str) -> None:
        folder = importlib.resources.files("wukong.storage")
        parts = [(folder / f"redis_{part}.lua").read_text() for part in ("rows", name)]
        self.text = "\n".join(parts).encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()
        self._begun: dict[JobId, bytes] = {}

    def begin(self, job: JobId, keys: Sequence[bytes]) -> bytes:
        """A call on the keys of a job, up to its argument."""
        begun = self._begun.get(job)
        if begun is None:
            while len(self._begun) >= PREFIXES_KEPT:
                self._begun.pop(next(iter(self._begun)), None)
            n_keys = b"%d" % len(keys)
            # One argument more than is packed here: the request.
            packed = pack(b"EVALSHA", self.sha, n_keys, *keys)
            head, _, rest = packed.partition(b"\r\n")
            begun = self._begun[job] = b"*%d\r\n%s" % (int(head[1:]) + 1, rest)
        return begun


class RedisJobStore(CallingStore):
    """Jobs in Redis. Thread-safe; open it after forking, not before."""

    def __init__(
        self,
        link: Link,
        silence_s: float = 10.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Nothing is connected before it is used.

        Args:
            link: the server; closed with this store.
            silence_s: a running token without heartbeat for this long counts as dead.
            clock: seconds; None: the server's. Only tests give another one.
        """
        self.link = link
        self._silence_s = silence_s
        self._clock = clock
        self._wire = RedisWire()
        self._state = Script("state")
        self._oversight = Script("oversight")
        self._extension = Script("extension")
        self._watchers = Watchers(link)
        self._listing = listing_key(link)
        self._pools_channel = f"{link.url.prefix}pools".encode()
        self._is_closed = threading.Event()

    # -------------------------------------------------------------- executors

    def create(self, request: Create) -> tuple[Invocation, ...]:
        job = request.job
        if not job or set(job) & set("{}*?[]\\ /"):
            raise ValueError(f"a job's id has no braces, blanks, slashes or wildcards: {job!r}")
        # Before the job is there, so that no news is missed, and the first wait need not look.
        self.link.check_durability(self._key(job, "j"))
        self._watchers.prepare(job, self._key(job, "j"))
        listing = pack(b"ZADD", self._listing, b"%.3f" % time.time(), job.encode())
        commands = [Command(self._listing, listing)]
        commands += [
            self._command(self._oversight, job, "create", **chunk)
            for chunk in self._chunks(request)
        ]
        replies = self._run(commands)[1:]
        minted = tuple(found for _, flat in replies for found in invocations(job, flat))
        return minted if replies[-1][0] else tuple(sorted(minted))  # it was there

    def start(
        self, job: JobId, token: TokenId, attempt: AttemptId, holder: HolderId
    ) -> Grant | Refused:
        reply = self._call(self._state, job, "start", token=token, attempt=attempt, holder=holder)
        return self._wire.started(job, reply)

    def renew(self, job: JobId, token: TokenId, attempt: AttemptId) -> Reason | None:
        kind, answer = self._call(self._state, job, "renew", token=token, attempt=attempt)
        if kind != APPLIED:
            return Reason(answer)
        self._renewed(job, answer)
        return None

    def absorb(
        self, job: JobId, token: TokenId, attempt: AttemptId, feed: Feed, n_held: int
    ) -> Absorbed | Refused:
        reply = self._call(
            self._state, job, "absorb", token=token, attempt=attempt, feed=feed, n_held=n_held
        )
        return self._wire.absorbed(job, reply)

    def commit(self, request: Commit) -> Receipt | Refused:
        job = request.job
        packed = self._wire.commit(request, self._now())
        reply = self._run([self._packed_command(self._state, job, packed)])[0]
        if reply[0] == APPLIED:
            self._renewed(job, reply[5])
        return self._wire.receipt(job, reply)

    def confirm(self, job: JobId) -> None:
        self.link.confirm(self._key(job, "j"))

    # -------------------------------------------------------------- faults

    def release(self, holder: HolderId, cause: str) -> tuple[Invocation, ...]:
        jobs = self._listed()
        commands = [
            self._command(self._oversight, job, "release", holder=holder, cause=cause)
            for job in jobs
        ]
        found: list[Invocation] = []
        for job, released in zip(jobs, self._run(commands), strict=True):
            found += invocations(job, released)
        return tuple(found)

    def expired(self, job: JobId) -> tuple[Invocation, ...]:
        found, is_renewed = self._call(self._oversight, job, "expired")
        self._renewed(job, is_renewed)
        return invocations(job, found)

    def queued(self, job: JobId) -> tuple[Invocation, ...]:
        return invocations(job, self._call(self._oversight, job, "queued"))

    def running(self, job: JobId) -> tuple[RunningToken, ...]:
        return self._wire.running(self._call(self._oversight, job, "running"))

    def duplicate(self, job: JobId, tokens: Sequence[TokenId]) -> tuple[Invocation, ...]:
        found = self._call(self._oversight, job, "duplicate", tokens=tuple(tokens))
        return invocations(job, found)

    def report_lost(
        self, job: JobId, token: TokenId, attempt: AttemptId, exports: Sequence[ExportId]
    ) -> bool:
        fields = {"token": token, "attempt": attempt, "exports": tuple(exports)}
        return bool(self._call(self._oversight, job, "report_lost", **fields))

    def mark_lost(self, job: JobId, exports: Sequence[ExportId]) -> None:
        self._call(self._oversight, job, "mark_lost", exports=tuple(exports))

    def recorded(self, job: JobId) -> tuple[ExportId, ...]:
        return ids(self._call(self._oversight, job, "recorded"))

    def relaunch(self, request: Relaunch) -> tuple[Invocation, ...]:
        found = self._call(
            self._oversight,
            request.job,
            "relaunch",
            name=request.job,
            generation=request.generation,
            survivors=request.survivors,
            entries=tuple(zip(request.entries, request.entry_inputs, strict=True)),
            waiting=request.waiting,
            done=request.done,
            n_requested=request.n_requested,
        )
        return invocations(request.job, found)

    # -------------------------------------------------------------- open jobs

    def extend(self, request: Extend) -> tuple[Invocation, ...] | Refused:
        job = request.job
        packed = self._wire.extend(request, self._now())
        kind, answer = self._run([self._packed_command(self._extension, job, packed)])[0]
        return invocations(job, answer) if kind == APPLIED else Refused(Reason(answer))

    def unpin(self, job: JobId, exports: Sequence[ExportId]) -> None:
        self._call(self._extension, job, "unpin", exports=tuple(exports))

    def drop(self, job: JobId, strands: Sequence[tuple[StrandId, tuple[ExportId, ...]]]) -> None:
        self._call(self._extension, job, "drop", strands=tuple(strands))

    def news(self, job: JobId, acknowledged: Sequence[str], collected: Sequence[BlobId]) -> News:
        fields = {"acknowledged": tuple(acknowledged), "collected": tuple(collected)}
        return self._wire.news(self._call(self._extension, job, "news", **fields))

    def located(self, job: JobId, exports: Sequence[ExportId]) -> tuple[Located, ...]:
        found = self._call(self._extension, job, "located", exports=tuple(exports))
        return self._wire.located(found)

    # -------------------------------------------------------------- clients

    def view(self, job: JobId) -> JobView | None:
        return self._wire.view(job, self._call(self._oversight, job, "view"))

    def wait(
        self, job: JobId, version: int, timeout_s: float, progress: bool = False
    ) -> JobView | None:
        deadline = time.monotonic() + timeout_s
        key = self._key(job, "j")

        def look() -> tuple[JobView | None, int]:
            reply = self._call(self._oversight, job, "view")
            return self._wire.view(job, reply), reply[-1] if reply is not None else 0

        return self._watchers.wait(job, key, version, deadline, progress, look)

    def results(self, job: JobId) -> tuple[Located, ...]:
        return self._wire.located(self._call(self._oversight, job, "results"))

    def traces(self, job: JobId) -> tuple[object, ...]:
        key = self._key(job, "x")
        found = self._run([Command(key, pack(b"LRANGE", key, b"1", b"-1"))])[0]
        return tuple(found)

    def collect(self, job: JobId) -> tuple[tuple[Located, ...], tuple[object, ...]]:
        located, traces = self._call(self._oversight, job, "collect")
        # The renewal of the lease is a write: what was read is as durable as that.
        self.confirm(job)
        return self._wire.located(located), tuple(traces)

    def manifest(self, job: JobId) -> object | None:
        key = self._key(job, "p")
        found: object | None = self._run([Command(key, pack(b"HGET", key, MANIFEST.encode()))])[0]
        return found

    def cancel(self, job: JobId) -> bool:
        return bool(self._call(self._oversight, job, "cancel"))

    def forget(self, job: JobId) -> None:
        unlisting = Command(self._listing, pack(b"ZREM", self._listing, job.encode()))
        self._run([self._command(self._oversight, job, "forget"), unlisting])

    def jobs(self) -> tuple[JobId, ...]:
        return tuple(self._listed())

    # -------------------------------------------------------------- pools

    def call_pools(self, invocations: Sequence[Invocation]) -> int:
        channel = self._pools_channel
        message = self._wire.pack(tuple(invocations))
        found: int = self._run([Command(channel, pack(b"PUBLISH", channel, message))])[0]
        return found

    def listen(self, on_tokens: Callable[[Sequence[Invocation]], None]) -> None:
        def on_message(message: bytes) -> None:
            on_tokens(self._wire.offered(message))

        listen(self.link, self._pools_channel, on_message, self._is_closed)

    def close(self) -> None:
        self._is_closed.set()
        self._watchers.close()
        self.link.close()

    # -------------------------------------------------------------- inside

    def _chunks(self, request: Create) -> list[dict[str, Any]]:
        """The requests of `create`, each of bounded size; the last one makes the job visible."""
        url = self.link.url
        row = {
            "status": 1,
            "n_requested": request.n_requested,
            "n_tasks": request.n_tasks,
            "n_strands": request.n_strands,
            "fail_fast": request.fail_fast,
            "priority": request.priority,
            "silence_s": self._silence_s,
            "lease_s": url.lease_s,
            "version": 1,
            "generation": 0,
            "lost": (),
            "has_done": False,
            "is_open": request.is_open,
            **dict.fromkeys(COUNTERS, 0),
        }
        programs = [(MANIFEST, or_false(request.manifest))] if request.manifest else []
        programs += [(strand, self._wire.pack_entry(entry)) for strand, entry in request.programs]
        entries = list(zip(request.entries, request.entry_inputs, strict=True))
        groups = _groups(programs)
        n_chunks = max(len(groups), -(-len(entries) // ROWS_AT_ONCE), 1)
        chunks = []
        for i in range(n_chunks):
            some = entries[i * ROWS_AT_ONCE : (i + 1) * ROWS_AT_ONCE]
            chunks.append(
                {
                    "row": row,
                    "name": request.job,
                    "is_first": i == 0,
                    "is_last": i == n_chunks - 1,
                    "programs": groups[i] if i < len(groups) else (),
                    "entries": some,
                    "sources": (),
                }
            )
        chunks[-1]["sources"] = [self._wire.output(output) for output in request.sources]
        return chunks

    def _listed(self) -> list[JobId]:
        """The jobs that there are, ascending; forgets those whose lease has ended."""
        listing = self._run(
            [Command(self._listing, pack(b"ZRANGE", self._listing, b"0", b"-1", b"WITHSCORES"))]
        )[0]
        names, times = listing[::2], listing[1::2]
        keys = [self._key(JobId(name.decode()), "j") for name in names]
        found = self._run([Command(key, pack(b"EXISTS", key)) for key in keys])
        before = time.time() - BEING_MADE_S
        old = [
            name
            for name, made_at, is_there in zip(names, times, found, strict=True)
            if not is_there and float(made_at) < before
        ]
        if old:  # they may still have blobs, which are counted by this list
            keys = [index_key(self.link, JobId(name.decode())) for name in old]
            kept = self._run([Command(key, pack(b"EXISTS", key)) for key in keys])
            gone = [name for name, is_kept in zip(old, kept, strict=True) if not is_kept]
            if gone:
                self._run([Command(self._listing, pack(b"ZREM", self._listing, *gone))])
        there = [name for name, is_there in zip(names, found, strict=True) if is_there]
        return sorted(JobId(name.decode()) for name in there)

    def _renewed(self, job: JobId, is_renewed: int) -> None:
        """The lease of the rows has just been renewed: so is that of the blobs."""
        if is_renewed:
            renew_blobs(self.link, job)

    def _key(self, job: JobId, table: str) -> bytes:
        return f"{self.link.url.prefix}{{{job}}}:{table}".encode()

    def _now(self) -> float | bool:
        return self._clock() if self._clock is not None else False

    def _command(self, script: Script, job: JobId, operation: str, **fields: object) -> Command:
        request = {"op": operation, "now": self._now(), **fields}
        return self._packed_command(script, job, self._wire.pack(request))

    def _packed_command(self, script: Script, job: JobId, request: bytes) -> Command:
        begun = script.begin(job, [self._key(job, table) for table in TABLES])
        return Command(self._key(job, "j"), b"%s$%d\r\n%s\r\n" % (begun, len(request), request))

    def _call(self, script: Script, job: JobId, operation: str, **fields: object) -> Any:
        return self._run([self._command(script, job, operation, **fields)])[0]

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands in one round trip, and once more what met a server without our scripts."""
        replies = self.link.run(commands)
        for _ in range(N_ROUNDS):  # a slot that moves is at one node after the other
            unknown = [i for i, reply in enumerate(replies) if is_unknown_script(reply)]
            if not unknown:
                break
            for refusal in {replies[i].__dict__.get("node"): replies[i] for i in unknown}.values():
                for script in (self._state, self._oversight, self._extension):
                    self.link.load(script.text, refusal)
            # All that follows is repeated, too: it may build on what was not done.
            replies[unknown[0] :] = self.link.run(commands[unknown[0] :])
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Exception):
                raise self.link.translate(reply, command.key)
        return replies


COUNTERS = (
    "n_tasks_done",
    "n_commits",
    "n_starts",
    "n_retries",
    "n_deaths",
    "n_garbage",
    "n_extended",
    "news_version",
    "sweep_at",
    "renew_at",
)
"""Fields of a job's row that begin at zero."""


def is_unknown_script(reply: object) -> bool:
    """The server has never seen the script, or has forgotten it in a restart."""
    return isinstance(reply, Exception) and type(reply).__name__ == "NoScriptError"


def _groups(programs: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Programs in groups that one script takes."""
    groups: list[list[tuple[str, Any]]] = []
    n_bytes = 0
    for program in programs:
        size_bytes = len(program[1])
        if not groups or len(groups[-1]) >= ROWS_AT_ONCE or n_bytes + size_bytes > BYTES_AT_ONCE:
            groups.append([])
            n_bytes = 0
        groups[-1].append(program)
        n_bytes += size_bytes
    return groups
