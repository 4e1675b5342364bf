"""The Redis store under the suite of all stores: its rows, read behind its back."""

from __future__ import annotations

from typing import Any

import msgpack
from storage_contract import SILENCE_S, Clock

from wukong.executor.messages import AttemptId, Entry, Grant, HolderId, Status
from wukong.storage.redis import RedisJobStore
from wukong.storage.redis_link import Command, Link, pack
from wukong.storage.redis_url import parse_url
from wukong.storage.redis_wire import RedisWire
from wukong.storage.rows import (
    ExportRow,
    JobRow,
    LateEdge,
    NoteRow,
    ProgramRow,
    ReceiptRow,
    TokenRow,
    TraceRow,
    WaitingRow,
)

WIRE = RedisWire()


class CountingStore(RedisJobStore):
    """With what the suite asks of a queue, though not the order of its tokens."""

    def n_queued(self) -> int:
        views = [self.view(job) for job in self.jobs()]
        return sum(view.n_queued for view in views if view is not None)

    def take(self, holder: HolderId, attempt: AttemptId) -> Grant | None:
        for job in self.jobs():
            for invocation in self.queued(job):
                reply = self.start(job, invocation.token, attempt, holder)
                if isinstance(reply, Grant):
                    return reply
        return None


class RedisBackend:
    """A store on some server, and its rows as `rows.py` has them."""

    def __init__(self, url: str, onlooker_url: str) -> None:
        self.clock = Clock()
        self.onlooker = Link(parse_url(onlooker_url))
        self.store = CountingStore(Link(parse_url(url)), SILENCE_S, self.clock)

    def forget_jobs(self) -> None:
        for job in self.store.jobs():
            self.store.forget(job)

    def close(self) -> None:
        self.store.close()
        self.onlooker.close()

    def ask(self, job: str, table: str, *command: bytes) -> Any:
        key = self.store._key(job, table)
        verb, *rest = command
        return self.onlooker.run_checked([Command(key, pack(verb, key, *rest))])[0]

    def table(self, job: str, table: str) -> dict[str, bytes]:
        flat = self.ask(job, table, b"HGETALL")
        found = {k.decode(): v for k, v in zip(flat[::2], flat[1::2], strict=True)}
        found.pop("", None)
        return found

    def members(self, job: str, table: str, *command: bytes) -> tuple[str, ...]:
        return tuple(m.decode() for m in self.ask(job, table, *command) if m)

    def rows(self, job: str) -> dict[tuple[str, str], object]:
        packed = self.ask(job, "j", b"GET")
        if packed is None:
            return {}
        row = msgpack.unpackb(packed)
        programs = self.table(job, "p")
        found: dict[tuple[str, str], object] = {("j", ""): self.job_row(job, row, programs)}
        programs.pop("error", None)
        more = self.table(job, "l")
        for name, content in programs.items():
            is_entry = name != "manifest"
            entry = WIRE.entries(content)[0] if is_entry else Entry((), None, content, 0, 0)
            found["p", name] = ProgramRow(entry, 1 + int(more.get(name, 0)))
        parts = {name: WIRE.part(part) for name, part in self.table(job, "a").items()}
        for name, content in self.table(job, "t").items():
            found["t", name] = token_row(msgpack.unpackb(content), parts)
        for name, content in self.table(job, "w").items():
            fields = msgpack.unpackb(content)
            found["w", name] = WaitingRow(
                fields["base"],
                parts[name] if fields["is_piece"] else None,
                fields["n_missing"],
                tuple(fields["inputs"]),
                fields["n_deaths"],
                fields["priority"],
            )
        entries = self.table(job, "v")
        for name, content in self.table(job, "e").items():
            fields = msgpack.unpackb(content)
            found["e", name] = ExportRow(
                fields["n_left"],
                fields["n_consumers"],
                fields["requested"],
                WIRE.entries(entries.pop(name, b"")),
                tuple(LateEdge(strand, tuple(tasks)) for strand, tasks in fields.get("late", ())),
            )
        assert not entries, "entries of exports that are not there"
        for name, content in self.table(job, "r").items():
            fields = msgpack.unpackb(content)
            minted = tuple(fields["minted"])
            found["r", name] = ReceiptRow(
                fields["attempt"], minted, fields["become"], fields["n_unstarted"]
            )
        for name, content in self.table(job, "n").items():
            fields = msgpack.unpackb(content, raw=True)
            trace = fields[b"trace"]
            recorded = WIRE.located(fields[b"recorded"])
            found["n", name] = NoteRow(recorded, None if trace is False else trace)
        for i, trace in enumerate(self.ask(job, "x", b"LRANGE", b"1", b"-1")):
            found["x", f"{i:09d}"] = TraceRow(trace)
        self.check_queues(job, found)
        return found

    def check_queues(self, job: str, rows: dict[tuple[str, str], object]) -> None:
        """The sorted sets name exactly the tokens, and no part is left over."""
        tokens = {name: row for (code, name), row in rows.items() if code == "t"}
        running = {name for name, row in tokens.items() if row.running}  # type: ignore[attr-defined]
        assert set(self.members(job, "s", b"ZRANGE", b"0", b"-1")) == running
        assert set(self.members(job, "q", b"ZRANGE", b"0", b"-1")) == set(tokens) - running
        pieces = {row.strand for row in tokens.values() if row.part is not None}  # type: ignore[attr-defined]
        pieces |= {n for (code, n), row in rows.items() if code == "w" and row.part is not None}  # type: ignore[attr-defined]
        assert set(self.table(job, "a")) == pieces
        for table in ("t", "w", "e", "v", "r", "p", "l", "n", "x", "g", "d", "s", "q", "a"):
            assert self.ask(job, table, b"PTTL") != -1, f"{table} never expires"

    def job_row(self, job: str, row: dict[str, Any], programs: dict[str, bytes]) -> JobRow:
        return JobRow(
            status=Status(row["status"]),
            n_requested=row["n_requested"],
            n_tasks=row["n_tasks"],
            n_strands=row["n_strands"],
            fail_fast=row["fail_fast"],
            priority=row["priority"],
            silence_s=row["silence_s"],
            sweep_at=row["sweep_at"],
            version=row["version"],
            generation=row["generation"],
            error=programs.get("error"),
            n_tasks_done=row["n_tasks_done"],
            n_commits=row["n_commits"],
            n_starts=row["n_starts"],
            n_retries=row["n_retries"],
            n_deaths=row["n_deaths"],
            garbage=self.members(job, "g", b"ZRANGE", b"0", b"-1"),
            lost=tuple(row["lost"]),
            done=tuple(sorted(self.members(job, "d", b"SMEMBERS"))),
            is_open=row["is_open"],
            n_extended=row["n_extended"],
            news_version=row["news_version"],
        )


def token_row(fields: dict[str, Any], parts: dict[str, Any]) -> TokenRow:
    return TokenRow(
        strand=fields["strand"],
        base=fields["base"],
        part=parts[fields["strand"]] if fields["is_piece"] else None,
        inputs=tuple(fields["inputs"]),
        minted_by=fields["minted_by"],
        n_deaths=fields["n_deaths"],
        priority=fields["priority"],
        stamped_at=fields["stamped_at"],
        running=fields["running"],
        attempt=fields["attempt"],
        holder=fields["holder"],
        n_starts=fields["n_starts"],
        n_invokes=fields["n_invokes"],
        cause=fields["cause"],
    )
