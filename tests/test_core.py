"""The executor's core: facts in, wishes out, invariants after every step."""

from __future__ import annotations

from itertools import count

import pytest

from wukong.executor.core import ExecutorCore
from wukong.executor.events import (
    AbsorbAnswered,
    Action,
    AskAbsorb,
    Broken,
    Committed,
    Condemn,
    Delete,
    Done,
    Edges,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Invoke,
    Overdue,
    Put,
    PutItem,
    PutValues,
    Ran,
    Renew,
    Renewed,
    ReportLost,
    Resume,
    Run,
    SendCommit,
    Start,
    Started,
    StoreFailed,
)
from wukong.executor.messages import (
    Absorbed,
    AttemptId,
    BlobId,
    Commit,
    Entry,
    ExportId,
    ExportSpec,
    Feed,
    Grant,
    HolderId,
    Invocation,
    JobId,
    Located,
    Part,
    Reason,
    Receipt,
    Refused,
    Spawn,
    StrandId,
    TokenId,
)
from wukong.executor.work import Phase, Policy

JOB = JobId("j")
T = TokenId("t")
PROGRAM = Entry((), None, b"program", 7, 0)
FEED = Feed(StrandId("9"), 1)
INPUT = Located(ExportId("i"), (Entry((0,), None, b"x", 1, 0),))


def spec(export: str, *tasks: int, feeds: tuple[Feed, ...] = (FEED,)) -> ExportSpec:
    return ExportSpec(ExportId(export), tasks, len(tasks), len(feeds), False, feeds)


PART = Part((1, 2), ((INPUT.export, (0,)),), (spec("o", 2),))
LARGE = 5_000_000


def grant(
    token: str = "t",
    attempt: str = "n1",
    *,
    strand: str = "1",
    part: Part | None = None,
    n_starts: int = 1,
    n_deaths: int = 0,
) -> Grant:
    return Grant(
        job=JOB,
        token=TokenId(token),
        attempt=AttemptId(attempt),
        strand=StrandId(strand),
        base=StrandId("1"),
        program=PROGRAM,
        part=part,
        inputs=(INPUT,),
        n_starts=n_starts,
        n_deaths=n_deaths,
    )


FETCH = Fetch(JOB, StrandId("1"), PROGRAM, None, (INPUT,))


class Driven:
    """A core, checked after every step."""

    def __init__(self, policy: Policy | None = None) -> None:
        numbers = count(1)
        self.core = ExecutorCore(
            HolderId("h"), policy or Policy(), lambda: AttemptId(f"n{next(numbers)}")
        )
        self.now = 0.0

    def begin(self) -> list[Action]:
        actions = self.core.start(JOB, T)
        self.core.check()
        return actions

    def give(self, *events: Event) -> list[Action]:
        """Hand in events; return what the last one brings about."""
        actions: list[Action] = []
        for event in events:
            actions = self.core.handle(event, self.now)
            self.core.check()
        return actions

    def tick(self, now: float) -> list[Action]:
        self.now = now
        actions = self.core.tick(now)
        self.core.check()
        return actions


@pytest.fixture
def idle() -> Driven:
    return Driven()


@pytest.fixture
def running() -> Driven:
    driven = Driven()
    driven.begin()
    driven.give(Started(grant()), Fetched(PART))
    return driven


@pytest.fixture
def committing(running: Driven) -> Driven:
    running.give(Ran(2, {2: 10}), Put(((ExportId("o"), entry(2)),)))
    return running


def entry(*tasks: int, blob: str | None = None, size_bytes: int = 10) -> Entry:
    payload = None if blob else b"v"
    return Entry(tasks, None if blob is None else BlobId(blob), payload, size_bytes, 0)


# ------------------------------------------------------------------ from a token to a commit


def test_a_strand_is_started_fetched_run_put_and_committed(idle: Driven) -> None:
    assert idle.begin() == [Start(JOB, T, AttemptId("n1"))]
    assert idle.give(Started(grant())) == [FETCH]
    assert idle.core.held == (JOB, T, "n1")
    assert idle.give(Fetched(PART)) == [Run(PART, 2)]
    assert idle.give(Ran(2, {2: 10})) == [PutValues((PutItem(ExportId("o"), (2,), None),))]
    (action,) = idle.give(Put(((ExportId("o"), entry(2)),)))
    assert isinstance(action, SendCommit)
    commit = action.commit
    assert (commit.token, commit.attempt, commit.holder) == (T, "n1", "h")
    assert (commit.consumed, commit.n_tasks, commit.become) == (("i",), 2, "n2")
    (output,) = commit.outputs
    assert (output.export, output.entries) == ("o", (entry(2),))
    assert output.feeds == (FEED._replace(held_bytes=10),)


def test_a_refused_start_leaves_the_executor_idle(idle: Driven) -> None:
    others = (Invocation(JOB, TokenId("u")),)
    idle.begin()
    assert idle.give(Started(Refused(Reason.SPENT, others))) == [Invoke(others)]
    assert idle.core.phase is Phase.IDLE


def test_a_token_that_the_driver_took_is_adopted(idle: Driven) -> None:
    assert idle.core.adopt(grant(), 0.0) == [FETCH]


def test_large_values_are_blobs_and_the_rest_fills_the_commit() -> None:
    driven = Driven(Policy(inline_bytes=100, blob_bytes=50, absorb_bytes=0))
    part = Part((1, 2, 3, 4), (), (spec("o", 1, 2, 3), spec("p", 4)))
    driven.begin()
    actions = driven.give(Started(grant()), Fetched(part), Ran(4, {1: 40, 2: 60, 3: 45, 4: 20}))
    assert actions == [
        PutValues(
            (
                PutItem(ExportId("o"), (2,), BlobId("j/n1/0")),
                PutItem(ExportId("o"), (1, 3), None),
                PutItem(ExportId("p"), (4,), BlobId("j/n1/1")),
            )
        )
    ]


def test_values_without_sizes_travel_as_they_are(running: Driven) -> None:
    assert running.give(Ran(2, {})) == [PutValues((PutItem(ExportId("o"), (2,), None),))]


# ------------------------------------------------------------------ after a commit


def test_the_committer_invokes_deletes_and_becomes(committing: Driven) -> None:
    others = (Invocation(JOB, TokenId("u")),)
    receipt = Receipt(grant("t2", "n2"), others, (BlobId("g"),))
    assert committing.give(Committed(receipt)) == [
        Invoke(others),
        Delete((BlobId("g"),), False),
        FETCH,
    ]
    assert committing.core.held == (JOB, "t2", "n2")


def test_deleted_garbage_is_named_in_the_next_commit(committing: Driven) -> None:
    committing.give(Committed(Receipt(grant("t2", "n2"), (), (BlobId("g"),))))
    commit = sent(committing.give(Fetched(PART), Ran(2, {2: 1}), Put(((ExportId("o"), entry(2)),))))
    assert commit.collected == ("g",)


def test_an_executor_without_a_successor_forgets_everything(committing: Driven) -> None:
    assert committing.give(Committed(Receipt(None, (), ()))) == [Forget()]
    assert committing.core.phase is Phase.IDLE


def test_what_a_refused_commit_has_put_is_deleted() -> None:
    driven = Driven(Policy(absorb_bytes=0))
    driven.begin()
    driven.give(Started(grant()), Fetched(PART), Ran(2, {2: LARGE}))
    driven.give(Put(((ExportId("o"), entry(2, blob="j/n1/0")),)))
    assert driven.give(Committed(Refused(Reason.SPENT))) == [
        Delete((BlobId("j/n1/0"),), False),
        Forget(),
    ]


def test_what_a_commit_of_unknown_outcome_has_put_is_kept() -> None:
    driven = Driven(Policy(absorb_bytes=0))
    driven.begin()
    driven.give(Started(grant()), Fetched(PART), Ran(2, {2: LARGE}))
    (action,) = driven.give(Put(((ExportId("o"), entry(2, blob="j/n1/0")),)))
    driven.give(StoreFailed(action))
    assert driven.tick(0.05) == [action]
    assert driven.give(Committed(Refused(Reason.SPENT))) == [Forget()]


def test_a_draining_executor_becomes_nothing(running: Driven) -> None:
    running.core.is_draining = True
    commit = sent(running.give(Ran(2, {2: 10}), Put(((ExportId("o"), entry(2)),))))
    assert commit.become is None


def sent(actions: list[Action]) -> Commit:
    (action,) = actions
    assert isinstance(action, SendCommit)
    return action.commit


# ------------------------------------------------------------------ delayed output


def test_a_large_output_asks_to_absorb_its_only_reader(running: Driven) -> None:
    ask = AskAbsorb(JOB, T, AttemptId("n1"), FEED, 1)
    assert running.give(Ran(2, {2: LARGE})) == [ask]
    absorbed = Absorbed(StrandId("9"), PROGRAM, None, (INPUT._replace(export=ExportId("k")),))
    (fetch,) = running.give(AbsorbAnswered(absorbed))
    assert fetch == Fetch(JOB, StrandId("9"), PROGRAM, None, absorbed.inputs)
    part = Part((3,), ((ExportId("k"), (0,)), (ExportId("o"), (2,))), (spec("p", 3, feeds=()),))
    commit = sent(running.give(Fetched(part), Ran(1, {3: 1}), Put(((ExportId("p"), entry(3)),))))
    assert (commit.absorbed, commit.consumed, commit.n_tasks) == (("9",), ("i", "k"), 3)
    assert [output.export for output in commit.outputs] == ["p"]


def test_an_output_that_may_not_be_held_back_is_put(running: Driven) -> None:
    running.give(Ran(2, {2: LARGE}))
    item = PutItem(ExportId("o"), (2,), BlobId("j/n1/0"))
    assert running.give(AbsorbAnswered(Refused(Reason.HELD))) == [PutValues((item,))]


@pytest.mark.parametrize(
    "exports",
    [
        (spec("o", 2, feeds=(FEED, Feed(StrandId("8"), 1))),),
        (spec("o", 1), spec("p", 2, feeds=(Feed(StrandId("8"), 1),))),
        (spec("o", 2)._replace(requested=True),),
        (spec("o", 2)._replace(n_values=2),),
    ],
    ids=["two readers", "two strands", "requested", "a share"],
)
def test_an_output_that_others_wait_for_is_not_held_back(
    idle: Driven, exports: tuple[ExportSpec, ...]
) -> None:
    idle.begin()
    part = PART._replace(exports=exports)
    (action,) = idle.give(Started(grant()), Fetched(part), Ran(2, {1: LARGE, 2: LARGE}))
    assert isinstance(action, PutValues)


@pytest.mark.parametrize("policy", [Policy(absorb_bytes=0), Policy(confirm=True)])
def test_nothing_is_absorbed_where_that_is_switched_off(policy: Policy) -> None:
    driven = Driven(policy)
    driven.begin()
    (action,) = driven.give(Started(grant()), Fetched(PART), Ran(2, {2: LARGE}))
    assert isinstance(action, PutValues)


def test_nothing_is_absorbed_after_a_death(idle: Driven) -> None:
    idle.begin()
    part = PART._replace(tasks=(2,))
    (action,) = idle.give(Started(grant(n_starts=2, n_deaths=1)), Fetched(part), Ran(1, {2: LARGE}))
    assert isinstance(action, PutValues)


# ------------------------------------------------------------------ deaths and lost inputs


@pytest.mark.parametrize(("n_deaths", "limit"), [(0, 100), (1, 6), (2, 1)])
def test_each_death_makes_the_next_run_shorter(idle: Driven, n_deaths: int, limit: int) -> None:
    idle.begin()
    part = PART._replace(tasks=tuple(range(100)))
    assert idle.give(Started(grant(n_deaths=n_deaths)), Fetched(part)) == [Run(part, limit)]


def test_a_suspect_task_becomes_a_strand_of_its_own(idle: Driven) -> None:
    idle.begin()
    part = Part((1, 2, 3), (), (spec("o", 3),))
    actions = idle.give(Started(grant(n_starts=2, n_deaths=1)), Fetched(part))
    assert actions == [Run(part, 0)]
    edges = Edges((1, 2, 3), ((), (1,), (2,)))
    assert idle.give(Ran(0, {}, edges)) == [PutValues(())]
    commit = sent(idle.give(Put(())))
    assert [spawn.part.tasks for spawn in commit.spawns] == [(1,), (2, 3)]
    assert [spawn.n_deaths for spawn in commit.spawns] == [1, 1]


def test_a_task_that_kills_again_and_again_is_condemned() -> None:
    driven = Driven(Policy(n_deaths_max=3))
    part = Part((2,), (), (spec("o", 2),))
    driven.begin()
    last = driven.give(Started(grant(n_starts=4, n_deaths=3)), Fetched(part))
    assert last == [Condemn(part, 3, "")]


def test_lost_inputs_are_reported(idle: Driven) -> None:
    idle.begin()
    lost = (ExportId("i"),)
    assert idle.give(Started(grant()), FetchFailed(lost)) == [
        ReportLost(JOB, T, AttemptId("n1"), lost),
        Forget(),
    ]


def test_a_task_that_raises_ends_a_fail_fast_job(running: Driven) -> None:
    commit = sent(running.give(Ran(1, {}, error=b"error")))
    assert (commit.failed, commit.outputs, commit.spawns) == (b"error", (), ())


def test_a_value_that_cannot_be_encoded_ends_the_job(running: Driven) -> None:
    running.give(Ran(2, {2: 10}))
    assert sent(running.give(Broken(b"error"))).failed == b"error"


# ------------------------------------------------------------------ splitting a run


REST = Edges((2, 3, 4, 5), ((1,), (), (), ()))
LONG = Part((1, 2, 3, 4, 5), ((INPUT.export, (0,)),), (spec("o", 1, 2, 3, 4, 5),))


@pytest.fixture
def splitting() -> Driven:
    driven = Driven()
    driven.begin()
    driven.give(Started(grant()), Fetched(LONG), Overdue(1, {1: 10}, REST, 1))
    return driven


def test_a_long_run_is_split_while_executors_idle(splitting: Driven) -> None:
    assert splitting.core.phase is Phase.PUTTING
    done, export = entry(1), ExportId("o")
    commit = sent(splitting.give(Put(((export, done), (ExportId("n1.e0"), done)))))
    tasks = [spawn.part.tasks for spawn in commit.spawns]
    assert tasks[0][0] == 2
    assert sorted(t for piece in tasks for t in piece) == [2, 3, 4, 5]
    assert commit.n_tasks == 1
    first: Spawn = commit.spawns[0]
    receipt = Receipt(grant("t2", "n2", strand="n1.s0", part=first.part), (), ())
    assert splitting.give(Committed(receipt)) == [Resume(first.part, len(first.part.tasks))]
    assert splitting.core.held == (JOB, "t2", "n2")


def test_a_split_that_is_refused_stops_the_run(splitting: Driven) -> None:
    splitting.give(Put(((ExportId("o"), entry(1)), (ExportId("n1.e0"), entry(1)))))
    assert splitting.give(Committed(Refused(Reason.SPENT))) == [Resume(LONG, 0)]
    assert splitting.give(Ran(2, {})) == [Forget()]


@pytest.mark.parametrize(
    ("policy", "n_idle", "n_deaths"),
    [
        (Policy(split=False), 4, 0),
        (Policy(), 0, 0),
        (Policy(), 4, 1),
        (Policy(hand_over_s=9), 4, 0),
    ],
    ids=["off", "nobody idles", "after a death", "others would begin too late"],
)
def test_a_run_is_not_split(policy: Policy, n_idle: int, n_deaths: int) -> None:
    driven = Driven(policy)
    driven.begin()
    driven.give(Started(grant(n_deaths=n_deaths)), Fetched(LONG))
    limit = 1 if n_deaths else 5
    assert driven.give(Overdue(1, {1: 10}, REST, n_idle)) == [Resume(LONG, limit)]


def test_a_run_that_stopped_early_commits_and_goes_on_with_the_rest(idle: Driven) -> None:
    idle.begin()
    edges = Edges((2, 3, 4, 5), ((1,), (), (), ()))
    idle.give(Started(grant(n_deaths=1)), Fetched(LONG), Ran(1, {1: 10}, edges))
    commit = sent(idle.give(Put(((ExportId("o"), entry(1)), (ExportId("n1.e0"), entry(1))))))
    assert [spawn.part.tasks for spawn in commit.spawns] == [(2, 3, 4, 5)]
    assert (commit.consumed, commit.retained) == (("i",), ())


# ------------------------------------------------------------------ the heartbeat and the store


def test_a_token_is_renewed_while_it_is_held(running: Driven) -> None:
    assert running.core.wake_at() == 1.0
    assert running.tick(0.9) == []
    assert running.tick(1.0) == [Renew(JOB, T, AttemptId("n1"))]
    assert running.core.wake_at() == 2.0


@pytest.mark.parametrize("reason", [Reason.SPENT, Reason.OVER])
def test_work_in_vain_is_stopped(running: Driven, reason: Reason) -> None:
    assert running.give(Renewed(AttemptId("n1"), reason)) == [Resume(PART, 0)]
    assert running.give(Ran(1, {})) == [Forget()]


def test_a_late_answer_about_another_attempt_changes_nothing(running: Driven) -> None:
    assert running.give(Renewed(AttemptId("n0"), Reason.SPENT)) == []
    assert not running.core.is_doomed


@pytest.mark.parametrize("reason", [None, Reason.HELD])
def test_work_that_another_does_too_goes_on(running: Driven, reason: Reason | None) -> None:
    assert running.give(Renewed(AttemptId("n1"), reason)) == []
    (action,) = running.give(Ran(2, {2: 10}))
    assert isinstance(action, PutValues)


def test_an_unanswered_request_is_repeated_after_growing_waits(idle: Driven) -> None:
    (request,) = idle.begin()
    waits = []
    for _ in range(8):
        assert idle.give(StoreFailed(request)) == []
        wake_at = idle.core.wake_at()
        assert wake_at is not None
        waits.append(round((wake_at - idle.now) / 0.05))
        assert idle.tick(wake_at) == [request]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 64]


def test_work_is_abandoned_when_the_store_is_away_for_long(idle: Driven) -> None:
    (request,) = idle.begin()
    idle.give(StoreFailed(request))
    idle.now = 60.0
    assert idle.give(StoreFailed(request)) == []
    assert idle.core.phase is Phase.IDLE


@pytest.mark.parametrize("action", [Invoke(()), Delete((), False), Forget()])
def test_what_others_take_care_of_is_not_repeated(running: Driven, action: Action) -> None:
    assert running.give(StoreFailed(action)) == []
    assert running.core.wake_at() == 1.0


@pytest.mark.parametrize(
    "late",
    [Done(), Started(grant()), Fetched(PART), Put(()), Committed(Receipt(None, (), ()))],
    ids=lambda event: type(event).__name__,
)
def test_late_and_repeated_facts_change_nothing(running: Driven, late: Event) -> None:
    assert running.give(late) == []
    assert running.core.phase is Phase.RUNNING
