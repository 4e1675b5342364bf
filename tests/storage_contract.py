"""The suite that every job store passes: each operation in each state of a token.

A backend's tests inherit `TokenContract` (here) and `JobContract` (`storage_contract_jobs`), and
give them a `backend` fixture. The suite reads the rows behind the store's back, so that "changes
nothing" means that no row of the job has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import pytest

from wukong.executor.messages import (
    Absorbed,
    Commit,
    Create,
    Entry,
    Feed,
    Grant,
    Invocation,
    Located,
    Output,
    Part,
    Reason,
    Receipt,
    Refused,
    Spawn,
    Status,
)
from wukong.storage.contract import QueueStore

SILENCE_S = 10.0
N_STRANDS = 6


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Backend(Protocol):
    """A store under test."""

    store: QueueStore
    clock: Clock

    def rows(self, job: str) -> dict[tuple[str, str], object]:
        """Every row of a job as the store has it: (table code, id) -> row."""
        ...


# ------------------------------------------------------------------ short forms


def entry(*tasks: int, blob: str | None = None) -> Entry:
    payload = None if blob else b"values of %r" % (tasks,)
    return Entry(tasks, blob, payload, 20, 0)


def output(
    export: str,
    *tasks: int,
    consumers: int = 1,
    requested: bool = False,
    feeds: tuple[Feed, ...] = (),
    n_values: int | None = None,
    blob: str | None = None,
) -> Output:
    n = len(tasks) if n_values is None else n_values
    return Output(export, (entry(*tasks, blob=blob),), n, consumers, requested, feeds)


def program(strand: str) -> Entry:
    return Entry((), None, b"program of " + strand.encode(), 12, 0)


def create(
    job: str = "job",
    entries: tuple[str, ...] = ("0", "1"),
    inputs: tuple[tuple[str, ...], ...] | None = None,
    sources: tuple[Output, ...] = (),
    n_requested: int = 1,
    priority: int = 0,
    is_open: bool = False,
) -> Create:
    strands = dict.fromkeys((*(() if is_open else map(str, range(N_STRANDS))), *entries))
    return Create(
        job=job,
        entries=entries,
        entry_inputs=((),) * len(entries) if inputs is None else inputs,
        programs=tuple((strand, program(strand)) for strand in strands),
        sources=sources,
        n_requested=n_requested,
        n_tasks=100,
        n_strands=N_STRANDS,
        fail_fast=True,
        priority=priority,
        manifest=b"manifest",
        is_open=is_open,
    )


def commit(token: str, attempt: str = "a", *, job: str = "job", **rest: object) -> Commit:
    return Commit(job, token, attempt, "h", **rest)  # type: ignore[arg-type]


def spawn(strand: str, inputs: tuple[str, ...] = (), n_missing: int = 0, held: int = 0) -> Spawn:
    part = Part((7, 8), tuple((i, (1,)) for i in inputs), ())
    return Spawn(strand, "0", part, inputs, n_missing, 2, held)


FAN_IN = Feed("2", 2)
"""Strand 2 waits for the exports of strands 0 and 1."""
T0, T1 = "job.0.0", "job.0.1"


def invocation(token: str, job: str = "job", priority: int = 0) -> Invocation:
    return Invocation(job, token, priority)


class UsualBeginning:
    """A job with two entries, 0 and 1, the first of which runs as "a"."""

    backend: Backend

    @pytest.fixture
    def store(self, backend: Backend) -> QueueStore:
        self.backend = backend
        backend.store.create(create())
        backend.store.start("job", T0, "a", "h")
        return backend.store

    @contextlib.contextmanager
    def nothing_changes(self, job: str = "job") -> Iterator[None]:
        before = self.backend.rows(job)
        # Rows of the memory store are changed in place: compare texts.
        texts = {key: repr(row) for key, row in before.items()}
        n_queued = self.backend.store.n_queued()
        yield
        assert {key: repr(row) for key, row in self.backend.rows(job).items()} == texts
        assert self.backend.store.n_queued() == n_queued

    def row(self, code: str, key: str, job: str = "job") -> object:
        return self.backend.rows(job)[code, key]

    def ids(self, code: str, job: str = "job") -> list[str]:
        return sorted(key for table, key in self.backend.rows(job) if table == code)

    def fan_in(self, store: QueueStore, become: str | None = None) -> Receipt:
        """Commit both entries; the second mints strand 2."""
        store.commit(commit(T0, "a", outputs=(output("0", 1, feeds=(FAN_IN,)),)))
        receipt = store.commit(
            commit(T1, "b", outputs=(output("1", 2, feeds=(FAN_IN,)),), become=become)
        )
        assert isinstance(receipt, Receipt)
        return receipt


class TokenContract(UsualBeginning):
    """The operations on tokens, in the order of their table."""

    # -------------------------------------------------------------- create

    def test_create_queues_the_entries(self, backend: Backend) -> None:
        minted = backend.store.create(create(priority=3))
        assert minted == (invocation(T0, priority=3), invocation(T1, priority=3))
        view = backend.store.view("job")
        assert view is not None
        assert (view.status, view.n_queued, view.n_running) == (Status.RUNNING, 2, 0)
        assert (view.n_tasks, view.n_strands, view.version) == (100, N_STRANDS, 1)
        assert backend.store.n_queued() == 2

    def test_a_repeated_create_names_what_is_queued(self, store: QueueStore) -> None:
        with self.nothing_changes():
            assert store.create(create()) == (invocation(T1),)

    def test_sources_are_given_to_those_who_read_them(self, backend: Backend) -> None:
        source = output("s", 4, 5, consumers=2, feeds=(FAN_IN,))
        backend.store.create(create(inputs=((), ("s",)), sources=(source,)))
        grant = backend.store.start("job", T1, "a", "h")
        assert isinstance(grant, Grant)
        assert grant.inputs == (Located("s", (entry(4, 5),)),)
        reply = backend.store.commit(commit(T0, outputs=(output("0", 1, feeds=(FAN_IN,)),)))
        assert reply == Receipt(None, (invocation("a.0"),), ())

    def test_a_job_whose_results_all_exist_is_done(self, backend: Backend) -> None:
        source = output("s", 4, requested=True)
        assert backend.store.create(create(entries=(), sources=(source,))) == ()
        view = backend.store.view("job")
        assert view is not None
        assert view.status is Status.DONE
        assert backend.store.results("job") == (Located("s", (entry(4),)),)

    # -------------------------------------------------------------- start

    def test_start_of_a_queued_token_grants_it(self, backend: Backend) -> None:
        backend.store.create(create(priority=2))
        assert backend.store.start("job", T0, "a", "h") == Grant(
            job="job",
            token=T0,
            attempt="a",
            strand="0",
            base="0",
            program=program("0"),
            part=None,
            inputs=(),
            n_starts=1,
            n_deaths=0,
            priority=2,
        )
        assert backend.store.n_queued() == 1

    def test_start_by_the_same_attempt_has_the_same_answer(self, store: QueueStore) -> None:
        with self.nothing_changes():
            first = store.start("job", T0, "a", "h")
            assert isinstance(first, Grant)
            assert store.start("job", T0, "a", "h") == first

    def test_start_of_a_token_that_runs_elsewhere_is_refused(self, store: QueueStore) -> None:
        self.backend.clock.now += SILENCE_S - 0.1
        with self.nothing_changes():
            assert store.start("job", T0, "b", "h2") == Refused(Reason.HELD)

    def test_start_of_a_silent_token_takes_it_over(self, store: QueueStore) -> None:
        self.backend.clock.now += SILENCE_S
        grant = store.start("job", T0, "b", "h2")
        assert isinstance(grant, Grant)
        assert (grant.attempt, grant.n_starts, grant.n_deaths) == ("b", 2, 1)
        assert grant.cause == "no heartbeat for 10 s"
        assert store.start("job", T0, "a", "h") == Refused(Reason.HELD)
        view = store.view("job")
        assert view is not None
        assert (view.n_starts, view.n_retries, view.n_deaths) == (2, 1, 1)

    def test_start_of_an_absent_token_is_refused(self, store: QueueStore) -> None:
        with self.nothing_changes():
            assert store.start("job", "never", "a", "h") == Refused(Reason.SPENT)

    def test_start_of_a_spent_token_names_what_its_commit_minted(self, store: QueueStore) -> None:
        self.fan_in(store)
        with self.nothing_changes():
            refused = Refused(Reason.SPENT, (invocation("b.0"),))
            assert store.start("job", T1, "c", "h") == refused

    def test_start_in_no_job_is_refused(self, store: QueueStore) -> None:
        assert store.start("nojob", T0, "a", "h") == Refused(Reason.UNKNOWN_JOB)
        assert store.jobs() == ("job",)

    def test_start_in_a_cancelled_job_is_refused(self, store: QueueStore) -> None:
        assert store.cancel("job")
        with self.nothing_changes():
            assert store.start("job", T1, "a", "h") == Refused(Reason.OVER)

    # -------------------------------------------------------------- renew

    def test_renew_keeps_a_running_token(self, store: QueueStore) -> None:
        self.backend.clock.now += SILENCE_S - 0.1
        assert store.renew("job", T0, "a") is None
        self.backend.clock.now += SILENCE_S - 0.1
        assert store.start("job", T0, "b", "h2") == Refused(Reason.HELD)

    @pytest.mark.parametrize(
        ("token", "attempt", "reason"),
        [(T0, "b", Reason.HELD), (T1, "a", Reason.HELD), ("never", "a", Reason.SPENT)],
    )
    def test_renew_by_another_changes_nothing(
        self, store: QueueStore, token: str, attempt: str, reason: Reason
    ) -> None:
        self.backend.clock.now += 1
        with self.nothing_changes():
            assert store.renew("job", token, attempt) is reason

    def test_renew_in_an_ended_job_says_so(self, store: QueueStore) -> None:
        store.cancel("job")
        assert store.renew("job", T0, "a") is Reason.OVER
        assert store.renew("nojob", T0, "a") is Reason.OVER

    # -------------------------------------------------------------- absorb

    def test_absorb_of_a_strand_that_misses_only_what_is_held(self, store: QueueStore) -> None:
        store.commit(commit(T1, "b", outputs=(output("1", 2, feeds=(FAN_IN,)),)))
        answer = Absorbed("2", program("2"), None, (Located("1", (entry(2),)),))
        with self.nothing_changes():
            assert store.absorb("job", T0, "a", FAN_IN, 1) == answer
            assert store.absorb("job", T0, "a", FAN_IN, 1) == answer

    def test_absorb_of_a_strand_that_misses_more_is_refused(self, store: QueueStore) -> None:
        with self.nothing_changes():
            assert store.absorb("job", T0, "a", FAN_IN, 1) == Refused(Reason.HELD)

    @pytest.mark.parametrize(("token", "attempt"), [(T0, "b"), (T1, "a"), ("never", "a")])
    def test_absorb_under_a_token_that_is_not_ones_own_is_refused(
        self, store: QueueStore, token: str, attempt: str
    ) -> None:
        with self.nothing_changes():
            reply = store.absorb("job", token, attempt, Feed("2", 1), 1)
            assert reply == Refused(Reason.SPENT)

    def test_an_absorbed_strand_waits_no_longer(self, store: QueueStore) -> None:
        store.commit(commit(T1, "b", outputs=(output("1", 2, feeds=(FAN_IN,)),)))
        assert self.ids("w") == ["2"]
        reply = store.commit(
            commit(T0, outputs=(output("2", 9),), absorbed=("2",), consumed=("1",))
        )
        assert reply == Receipt(None, (), ())
        assert (self.ids("w"), self.ids("e"), self.ids("t")) == ([], ["2"], [])

    # -------------------------------------------------------------- commit: who may

    def test_commit_of_a_queued_token_is_applied(self, store: QueueStore) -> None:
        assert store.commit(commit(T1, "z", n_tasks=5)) == Receipt(None, (), ())
        view = store.view("job")
        assert view is not None
        assert (view.n_tasks_done, view.n_commits, view.version) == (5, 1, 2)
        assert store.n_queued() == 0

    def test_commit_of_a_running_token_is_applied_whoever_holds_it(self, store: QueueStore) -> None:
        assert store.commit(commit(T0, "z")) == Receipt(None, (), ())
        assert self.ids("t") == [T1]

    def test_of_two_attempts_the_first_commit_wins(self, store: QueueStore) -> None:
        self.backend.clock.now += SILENCE_S
        store.start("job", T0, "b", "h2")
        winner = output("0", 1, feeds=(FAN_IN,), blob="job/a/1")
        reply = store.commit(commit(T0, "a", outputs=(winner,), n_tasks=1))
        # Strand 1 has been queued for so long that it is named again.
        assert reply == Receipt(None, (invocation(T1),), ())
        loser = output("0", 1, feeds=(FAN_IN,), blob="job/b/1")
        with self.nothing_changes():
            reply = store.commit(commit(T0, "b", outputs=(loser,), n_tasks=1))
            assert reply == Refused(Reason.SPENT)

    def test_commit_of_an_absent_token_is_refused(self, store: QueueStore) -> None:
        with self.nothing_changes():
            reply = store.commit(commit("never", outputs=(output("0", 1),)))
            assert reply == Refused(Reason.SPENT)

    def test_commit_in_no_job_is_refused(self, store: QueueStore) -> None:
        assert store.commit(commit(T0, job="nojob")) == Refused(Reason.UNKNOWN_JOB)
        assert store.jobs() == ("job",)

    def test_a_repeated_commit_gets_its_receipt_again(self, store: QueueStore) -> None:
        request = commit(
            T0,
            outputs=(output("0", 1, consumers=2, feeds=(Feed("3", 1), Feed("4", 1))),),
            become="next",
        )
        receipt = store.commit(request)
        assert isinstance(receipt, Receipt)
        assert receipt.become is not None
        assert (receipt.become.strand, receipt.invoke) == ("3", (invocation("a.1"),))
        with self.nothing_changes():
            assert store.commit(request) == receipt
        store.start("job", "a.1", "b", "h2")
        assert store.commit(request) == Receipt(receipt.become, (), ())

    def test_another_attempts_repeated_commit_is_told_what_to_invoke(
        self, store: QueueStore
    ) -> None:
        self.fan_in(store)
        with self.nothing_changes():
            refused = Refused(Reason.SPENT, (invocation("b.0"),))
            assert store.commit(commit(T1, "other")) == refused

    # -------------------------------------------------------------- commit: fan-in and fan-out

    def test_a_fan_in_fires_once_with_its_last_input(self, store: QueueStore) -> None:
        first = store.commit(commit(T0, "a", outputs=(output("0", 1, feeds=(FAN_IN,)),)))
        assert first == Receipt(None, (), ())
        assert self.ids("w") == ["2"]
        second = store.commit(commit(T1, "b", outputs=(output("1", 2, feeds=(FAN_IN,)),)))
        assert second == Receipt(None, (invocation("b.0"),), ())
        assert self.ids("w") == []
        grant = store.start("job", "b.0", "c", "h")
        assert isinstance(grant, Grant)
        assert (grant.strand, grant.program) == ("2", program("2"))
        assert grant.inputs == (Located("0", (entry(1),)), Located("1", (entry(2),)))

    def test_the_committer_becomes_the_strand_it_holds_most_of(self, store: QueueStore) -> None:
        feeds = (Feed("2", 1, 10), Feed("3", 1, 30), Feed("4", 1, 30))
        reply = store.commit(
            commit(T0, outputs=(output("0", 1, consumers=3, feeds=feeds),), become="next")
        )
        assert isinstance(reply, Receipt)
        assert reply.become is not None
        assert (reply.become.token, reply.become.strand) == ("a.1", "3")
        assert (reply.become.attempt, reply.become.n_starts) == ("next", 1)
        assert reply.become.inputs == (Located("0", (entry(1),)),)
        assert reply.invoke == (invocation("a.0"), invocation("a.2"))
        assert store.n_queued() == 3
        with self.nothing_changes():
            assert store.start("job", "a.1", "next", "h") == reply.become

    def test_an_export_of_several_pieces_is_complete_with_the_last(self, store: QueueStore) -> None:
        part = output("0", 1, 2, n_values=3, feeds=(Feed("2", 1),))
        assert store.commit(commit(T0, outputs=(part,))) == Receipt(None, (), ())
        assert store.recorded("job") == ()
        rest = output("0", 3, n_values=3, feeds=(Feed("2", 1),))
        reply = store.commit(commit(T1, "b", outputs=(rest,)))
        assert reply == Receipt(None, (invocation("b.0"),), ())
        assert store.recorded("job") == ("0",)
        grant = store.start("job", "b.0", "c", "h")
        assert isinstance(grant, Grant)
        assert grant.inputs == (Located("0", (entry(1, 2), entry(3))),)

    def test_a_result_of_several_pieces_ends_the_job_with_the_last(self, store: QueueStore) -> None:
        part = output("0", 1, 2, n_values=3, requested=True)
        assert store.commit(commit(T0, outputs=(part,))) == Receipt(None, (), ())
        assert store.results("job") == ()
        rest = output("0", 3, n_values=3, requested=True)
        reply = store.commit(commit(T1, "b", outputs=(rest,)))
        assert reply == Receipt(None, (), (), job_over=True)
        assert store.results("job") == (Located("0", (entry(1, 2), entry(3))),)

    def test_an_input_is_garbage_after_its_last_consumer(self, store: QueueStore) -> None:
        feeds = (Feed("2", 1), Feed("3", 1))
        made = output("0", 1, consumers=2, feeds=feeds, blob="job/a/1")
        store.commit(commit(T0, outputs=(made,)))
        first = store.commit(commit("a.0", "b", consumed=("0",)))
        assert first == Receipt(None, (), ())
        assert self.ids("e") == ["0"]
        second = store.commit(commit("a.1", "c", consumed=("0",)))
        assert second == Receipt(None, (), ("job/a/1",))
        assert self.ids("e") == []

    def test_garbage_is_named_until_it_is_collected(self, store: QueueStore) -> None:
        unread = output("0", 1, consumers=0, blob="job/a/1")
        assert store.commit(commit(T0, outputs=(unread,))) == Receipt(None, (), ("job/a/1",))
        reply = store.commit(commit(T1, "b", collected=("job/a/1",)))
        assert reply == Receipt(None, (), ())

    # -------------------------------------------------------------- commit: receipts

    def test_a_receipt_is_kept_until_its_tokens_have_started(self, store: QueueStore) -> None:
        feeds = (Feed("2", 1), Feed("3", 1))
        store.commit(commit(T0, outputs=(output("0", 1, consumers=2, feeds=feeds),)))
        assert self.ids("r") == [T0]
        store.start("job", "a.0", "b", "h")
        assert self.ids("r") == [T0]
        store.commit(commit("a.1", "c"))
        assert self.ids("r") == []

    def test_what_a_committer_became_is_confirmed_by_its_heartbeat(self, store: QueueStore) -> None:
        reply = self.fan_in(store, become="next")
        assert reply.become is not None
        assert self.ids("r") == [T1]
        store.renew("job", reply.become.token, "next")
        assert self.ids("r") == []

    # -------------------------------------------------------------- commit: pieces

    def test_a_spawned_piece_that_misses_nothing_is_minted(self, store: QueueStore) -> None:
        reply = store.commit(commit(T0, spawns=(spawn("a.s0"), spawn("a.s1", held=5)), become="n"))
        assert isinstance(reply, Receipt)
        assert reply.become is not None
        assert (reply.become.strand, reply.become.base) == ("a.s1", "0")
        assert (reply.become.part, reply.become.n_deaths) == (Part((7, 8), (), ()), 2)
        assert reply.invoke == (invocation("a.0"),)
        view = store.view("job")
        assert view is not None
        assert view.n_strands == N_STRANDS + 2

    def test_a_spawned_piece_waits_for_what_it_misses(self, store: QueueStore) -> None:
        made = output("x", 1, feeds=())
        piece = spawn("a.s0", inputs=("x", "1"), n_missing=1)
        assert store.commit(commit(T0, outputs=(made,), spawns=(piece,))) == Receipt(None, (), ())
        last = output("1", 2, feeds=(Feed("a.s0", 2),))
        reply = store.commit(commit(T1, "b", outputs=(last,)))
        assert reply == Receipt(None, (invocation("b.0"),), ())
        grant = store.start("job", "b.0", "c", "h")
        assert isinstance(grant, Grant)
        assert grant.part == Part((7, 8), (("x", (1,)), ("1", (1,))), ())
        assert [located.export for located in grant.inputs] == ["x", "1"]

    def test_a_retained_input_outlives_the_split_strand(self, store: QueueStore) -> None:
        store.commit(
            commit(T1, "b", outputs=(output("1", 2, feeds=(Feed("2", 1),), blob="job/b/1"),))
        )
        pieces = (spawn("c.s0", ("1",)), spawn("c.s1", ("1",)))
        reply = store.commit(
            commit("b.0", "c", consumed=("1",), retained=(("1", 2),), spawns=pieces)
        )
        assert reply == Receipt(None, (invocation("c.0"), invocation("c.1")), ())
        store.commit(commit("c.0", "d", consumed=("1",)))
        last = store.commit(commit("c.1", "e", consumed=("1",)))
        assert last == Receipt(None, (), ("job/b/1",))
