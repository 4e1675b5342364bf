"""A random walk through the operations of two job stores, which must answer alike."""

from __future__ import annotations

from random import Random
from typing import cast

from storage_contract import Backend, Clock, commit, create, entry, program

from wukong.executor.messages import (
    Create,
    Extend,
    Feed,
    Grant,
    Invocation,
    NewExport,
    News,
    NewStrand,
    Output,
    Part,
    Receipt,
    Refused,
    Relaunch,
    Restart,
    Spawn,
)
from wukong.storage.rows import ExportRow, JobRow, TokenRow, WaitingRow

N_ENTRIES = 4
N_STATIC = 40
OPEN = "open"
"""The id of the job that is open."""
HOLDERS = ("h0", "h1", "h2")


class Walk:
    """Two stores, and as much of a plan as keeps the operations legal.

    Every operation is done on both. Commits of live tokens come with outputs that feed strands of
    one or two inputs; commits of spent tokens, repetitions and strangers are as frequent.
    """

    def __init__(self, random: Random, model: Backend, other: Backend) -> None:
        self.random = random
        self.model = model
        self.other = other
        self.jobs = ["job", "job2", OPEN]
        self.tokens: list[Invocation] = []
        self.attempts = ["none"]
        self.commits = [commit("never", "none")]
        self.half_fed: dict[str, list[str]] = {job: [] for job in self.jobs}
        self.n_strands = dict.fromkeys(self.jobs, N_ENTRIES)
        self.n_exports = 0

    def run(self, n_steps: int, has_queue: bool = True) -> None:
        """Take steps, comparing replies after each and rows now and then."""
        for job in self.jobs:
            self.create(job)
        for number in (1, 2):
            self.extend(number)
        take = self.take if has_queue else self.start
        steps = [self.start, take, self.commit, self.commit, self.commit, self.repeat]
        steps += [self.renew, self.absorb, self.release, self.expire, self.pass_time, self.look]
        steps += [self.extend, self.extend, self.unpin, self.drop, self.news]
        rare = [self.lose, self.relaunch, self.cancel, self.recreate]
        for i in range(n_steps):
            self.random.choice(rare if self.random.random() < 0.04 else steps)()
            if i % 8 == 0:
                self.compare_rows()
        self.compare_rows()

    def forget(self) -> None:
        """Leave nothing for the next walk."""
        for job in self.jobs:
            self.both("forget", job)
        self.compare_rows()

    # -------------------------------------------------------------- comparing

    def both(self, operation: str, *arguments: object) -> object:
        """Do it in both stores. Returns the reply."""
        expected = getattr(self.model.store, operation)(*arguments)
        found = getattr(self.other.store, operation)(*arguments)
        assert found == expected, f"{operation}{arguments}"
        self.note(expected)
        return expected

    def note(self, reply: object) -> None:
        if isinstance(reply, Grant):
            self.note((Invocation(reply.job, reply.token, reply.priority),))
        elif isinstance(reply, Receipt):
            self.note(reply.become)
            self.note(reply.invoke)
        elif isinstance(reply, Refused):
            self.note(reply.invoke)
        elif isinstance(reply, tuple):
            for item in reply:
                if isinstance(item, Invocation) and item not in self.tokens:
                    self.tokens.append(item)

    def compare_rows(self) -> None:
        for job in self.jobs:
            assert numbered(self.other.rows(job)) == numbered(self.model.rows(job))
        assert self.both("n_queued") == self.model.store.n_queued()
        self.both("jobs")

    # -------------------------------------------------------------- choices

    def token(self) -> Invocation:
        return self.random.choice(self.tokens[-8:])

    def attempt(self) -> str:
        if self.random.random() < 0.7:
            self.attempts.append(f"a{len(self.attempts)}")
            return self.attempts[-1]
        return self.random.choice(self.attempts[-6:])

    def live(self, token: Invocation) -> TokenRow | None:
        return cast("TokenRow | None", self.model.rows(token.job).get(("t", token.token)))

    def new_strand(self, job: str) -> str:
        self.n_strands[job] = (self.n_strands[job] + 1) % N_STATIC
        return str(self.n_strands[job])

    def new_output(self, job: str) -> Output:
        """An export that feeds up to three strands: new ones, or one that misses an input."""
        self.n_exports += 1
        feeds = []
        for _ in range(self.random.randrange(4)):
            if self.half_fed[job] and self.random.random() < 0.5:
                feeds.append(Feed(self.half_fed[job].pop(), 2, self.random.randrange(3)))
                continue
            n_inputs = self.random.choice((1, 1, 2))
            feeds.append(Feed(self.new_strand(job), n_inputs, self.random.randrange(3)))
            if n_inputs == 2:
                self.half_fed[job].append(feeds[-1].strand)
        strands = {feed.strand: feed for feed in feeds}
        requested = self.random.random() < 0.1
        blob = f"{job}/a/{self.n_exports}" if self.random.random() < 0.3 else None
        made = entry(self.n_exports, blob=blob)
        n_readers = len(strands) + requested
        return Output(
            f"e{self.n_exports}", (made,), 1, n_readers, requested, tuple(strands.values())
        )

    # -------------------------------------------------------------- steps

    def create(self, job: str) -> None:
        if job == OPEN:
            self.both("create", create(OPEN, entries=(), n_requested=0, is_open=True))
            return
        strands = [str(i) for i in range(N_STATIC)]
        priority = self.random.randrange(2)
        programs = tuple((strand, program(strand)) for strand in strands)
        entries = tuple(strands[:N_ENTRIES])
        inputs = ((),) * N_ENTRIES
        self.both(
            "create", Create(job, entries, inputs, programs, (), 3, 99, 9, True, priority, b"m")
        )

    def recreate(self) -> None:
        job = self.random.choice(self.jobs)
        if self.random.random() < 0.5:
            self.both("forget", job)
        self.create(job)

    def start(self) -> None:
        job, token, _ = self.token()
        self.both("start", job, token, self.attempt(), self.random.choice(HOLDERS))

    def take(self) -> None:
        self.both("take", self.random.choice(HOLDERS), self.attempt())

    def renew(self) -> None:
        token = self.token()
        row = self.live(token)
        attempt = self.attempt() if row is None or self.random.random() < 0.5 else row.attempt
        self.both("renew", token.job, token.token, attempt)

    def absorb(self) -> None:
        token = self.token()
        row = self.live(token)
        attempt = row.attempt if row is not None else self.attempt()
        strands = self.half_fed[token.job] or ["1"]
        feed = Feed(self.random.choice(strands), 2)
        self.both("absorb", token.job, token.token, attempt, feed, self.random.randrange(1, 3))

    def commit(self) -> None:
        token = self.token()
        row = self.live(token)
        attempt = self.attempt() if row is None or not row.running else row.attempt
        # An attempt commits once: the ids of what it mints carry its name.
        if any(attempt == earlier.attempt for earlier in self.commits):
            attempt = f"{attempt}+{len(self.commits)}"
        if token.job == OPEN:
            outputs = self.open_outputs(row)
        else:
            outputs = tuple(self.new_output(token.job) for _ in range(self.random.randrange(3)))
        inputs = () if row is None else row.inputs
        retained: tuple[tuple[str, int], ...] = ()
        spawns: tuple[Spawn, ...] = ()
        if inputs and self.random.random() < 0.3:
            part = Part((1, 2), tuple((i, (1,)) for i in inputs), ())
            names = [f"{attempt}.s{i}" for i in range(2)]
            base = "0" if row is None else row.base
            spawns = tuple(Spawn(name, base, part, inputs, 0, 1, 1) for name in names)
            retained = tuple((export, 2) for export in dict.fromkeys(inputs))
        request = commit(
            token.token,
            attempt,
            job=token.job,
            outputs=outputs,
            spawns=spawns,
            consumed=inputs,
            absorbed=self.absorbed() if token.job == OPEN else (),
            retained=retained,
            n_tasks=self.random.randrange(3),
            failed=b"error" if token.job != OPEN and self.random.random() < 0.01 else None,
            become=self.attempt() if self.random.random() < 0.5 else None,
            collected=tuple(f"{token.job}/a/{i}" for i in range(self.random.randrange(9))),
            trace=b"trace" if self.random.random() < 0.5 else None,
        )
        self.commits.append(request)
        self.both("commit", request)

    def repeat(self) -> None:
        self.both("commit", self.random.choice(self.commits[-4:]))

    def release(self) -> None:
        if self.random.random() < 0.3:
            self.both("release", self.random.choice(HOLDERS), "died")

    def expire(self) -> None:
        self.both("expired", self.random.choice(self.jobs))

    def pass_time(self) -> None:
        seconds = self.random.choice((0.5, 3.0, 11.0))
        for backend in (self.model, self.other):
            cast("Clock", backend.clock).now += seconds

    def look(self) -> None:
        for operation in ("view", "results", "traces", "collect", "recorded", "manifest", "queued"):
            self.both(operation, self.random.choice(self.jobs))

    def lose(self) -> None:
        token = self.token()
        row = self.live(token)
        if row is not None and self.random.random() < 0.5:
            self.both("report_lost", token.job, token.token, row.attempt, ["e1"])
        else:
            self.both("mark_lost", token.job, ["e1"])

    def cancel(self) -> None:
        self.both("cancel", self.random.choice(self.jobs))

    def relaunch(self) -> None:
        """Entries run again; up to two complete exports survive, read by one waiting strand."""
        job = self.random.choice(self.jobs[:2])
        view = self.model.store.view(job)
        rows = self.model.rows(job)
        complete = [k for (code, k), r in rows.items() if code == "e" and is_complete(r)]
        kept = tuple(sorted(complete)[: self.random.randrange(3)])
        strand = self.new_strand(job)
        self.half_fed[job] = [strand]
        request = Relaunch(
            job=job,
            generation=1 if view is None else view.generation + self.random.randrange(2),
            survivors=tuple((export, 1) for export in kept),
            entries=("0", "1"),
            entry_inputs=((), ()),
            waiting=((strand, 1, kept),),
            done=("3",),
            n_requested=2,
        )
        self.both("relaunch", request)

    # -------------------------------------------------------------- the open job

    def extend(self, number: int = 0) -> None:
        """One strand that makes one export of two values; it may read earlier exports."""
        job = cast("JobRow | None", self.model.rows(OPEN).get(("j", "")))
        if job is None:
            return
        number = number or job.n_extended + self.random.randrange(2)
        earlier = [e for e in self.open_exports() if self.random.random() < 0.4]
        restart = None
        if job.lost or self.random.random() < 0.05:
            complete = {k for k, r in self.open_exports().items() if r.n_left == 0}
            earlier = [e for e in earlier if e in complete]
            kept = sorted({*earlier, *(e for e in complete if self.random.random() < 0.5)})
            pinned = tuple((e, self.random.randrange(2)) for e in kept)
            restart = Restart(job.generation + 1, pinned)
        name = f"{number}.0"
        edges = tuple((e, (2 * int(e.split(".")[0]) + self.random.randrange(2),)) for e in earlier)
        request = Extend(
            job=OPEN,
            number=number,
            programs=((name, program(name)),),
            strands=(NewStrand(name, (), edges, self.random.randrange(2)),),
            exports=(NewExport(name, 2, 1, True),),
            n_tasks=2,
            restart=restart,
        )
        self.both("extend", request)

    def open_exports(self) -> dict[str, ExportRow]:
        rows = self.model.rows(OPEN)
        found = {key: cast("ExportRow", row) for (code, key), row in rows.items() if code == "e"}
        return {key: row for key, row in sorted(found.items()) if key.endswith(".0")}

    def open_outputs(self, row: TokenRow | None) -> tuple[Output, ...]:
        """Some of what is left of the export of the strand."""
        export = None if row is None else self.open_exports().get(row.base)
        if row is None or export is None or row.base.startswith("e"):
            return ()
        first = 2 * int(row.base.split(".")[0])
        done = {task for made in export.entries for task in made.tasks}
        left = [task for task in (first, first + 1) if task not in done]
        tasks = left[: self.random.randrange(1, 3)]
        blob = f"open/a/{tasks[0]}" if tasks and self.random.random() < 0.3 else None
        made = (entry(*tasks, blob=blob),) if tasks else ()
        return (Output(row.base, made, 2, 1, True, ()),) if made else ()

    def absorbed(self) -> tuple[str, ...]:
        """Seldom, a waiting strand that alone reads what is not written; or one that is gone."""
        if self.random.random() < 0.8:
            return ()
        exports = self.open_exports()
        found = ["0.0"]
        for (code, strand), row in sorted(self.model.rows(OPEN).items()):
            if code != "w":
                continue
            inputs = [exports.get(e) for e in cast("WaitingRow", row).inputs]
            unwritten = [e for e in inputs if e is not None and not e.entries]
            if all(e.n_consumers - e.requested == 1 for e in unwritten):
                found.append(strand)
        return (self.random.choice(found),)

    def unpin(self) -> None:
        self.both("unpin", OPEN, self.random.sample(["1.0", "2.0", "3.0", "5.0", "8.0"], 2))

    def drop(self) -> None:
        """The last strands of the job: what reads from them is among them."""
        if self.random.random() < 0.3:
            numbers = [int(e.split(".")[0]) for e in self.open_exports()]
            first = max(numbers, default=0) - self.random.randrange(2)
            strands = [f"{i}.0" for i in range(first, max(numbers, default=0) + 1)]
            self.both("drop", OPEN, [(strand, (strand,)) for strand in strands])

    def news(self) -> None:
        reply = cast("News", self.both("news", OPEN, (), ()))
        if self.random.random() < 0.5:
            names = [note.name for note in reply.notes[:2]]
            self.both("news", OPEN, names, list(reply.garbage[:3]))
        self.both("located", OPEN, ["1.0", "3.0"])


def numbered(rows: dict[tuple[str, str], object]) -> dict[tuple[str, str], object]:
    """Rows with the traces, whose ids are the store's own, numbered in their order."""
    traces = [rows[key] for key in sorted(rows) if key[0] == "x"]
    rest = {key: row for key, row in rows.items() if key[0] != "x"}
    return rest | {("x", str(i)): trace for i, trace in enumerate(traces)}


def is_complete(row: object) -> bool:
    assert isinstance(row, ExportRow)
    return row.n_left == 0
