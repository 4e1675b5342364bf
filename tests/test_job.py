"""The client's state machine: events in, actions out; no store, no clock."""

from wukong.executor.messages import (
    Create,
    ExportId,
    ExportSpec,
    Feed,
    Invocation,
    JobId,
    JobView,
    Located,
    Part,
    Relaunch,
    RunningToken,
    Status,
    StrandId,
    TokenId,
)
from wukong.scheduler.job import (
    CancelAsked,
    CancelJob,
    Collect,
    Collected,
    Created,
    CreateJob,
    Duplicated,
    DuplicateTokens,
    End,
    Finish,
    InvokeTokens,
    JobCore,
    JobEvent,
    JobPolicy,
    ListRecorded,
    ListRunning,
    LogWaiting,
    MarkLost,
    Recorded,
    Relaunched,
    RelaunchJob,
    RunningListed,
    StoreDown,
    SweepJob,
    Swept,
    Unreadable,
    Watched,
    WatchJob,
)
from wukong.scheduler.recovery import find_stragglers, plan_relaunch

JOB = JobId("job")
POLICY = JobPolicy(sweep_s=5.0, log_after_s=7.0, give_up_s=60.0, retry_s=0.2)
REQUEST = Create(JOB, (StrandId("0"),), ((),), (), (), 1, 10, 2, True)
TOKENS = (Invocation(JOB, TokenId("a")), Invocation(JOB, TokenId("b")))
RESULT = (Located(ExportId("1"), ()),)


def view(status=Status.RUNNING, version=1, **fields) -> JobView:
    names = ["tasks", "strands", "tasks_done", "commits", "starts", "queued", "running"]
    counts = {f"n_{name}": 0 for name in [*names, "retries", "deaths"]}
    return JobView(job=JOB, version=version, status=status, error=None, **(counts | fields))


class Driven:
    """A core, with its invariants checked after every event."""

    def __init__(self, policy=POLICY, request=REQUEST, parts=()) -> None:
        self.core = JobCore(JOB, parts, policy, request)
        self.actions = self.core.start(0.0)

    def handle(self, event: JobEvent, now: float):
        actions = self.core.handle(event, now)
        self.core.check()
        return actions


def launched(policy=POLICY, **options) -> Driven:
    driven = Driven(policy, **options)
    driven.handle(Created(TOKENS), 0.0)
    return driven


def chain(n_strands: int) -> list[Part]:
    """Strand i reads export i - 1 and writes export i; the client has requested the last one."""
    parts = []
    for i in range(n_strands):
        is_last = i == n_strands - 1
        feeds = () if is_last else (Feed(StrandId(str(i + 1)), 1),)
        spec = ExportSpec(ExportId(str(i)), (i,), 1, 1, is_last, feeds)
        inputs = ((ExportId(str(i - 1)), (i - 1,)),) if i else ()
        parts.append(Part((i,), inputs, (spec,)))
    return parts


# ---------------------------------------------------------------- the ordinary way


def test_a_job_is_created_invoked_and_watched() -> None:
    driven = Driven()
    assert driven.actions == [CreateJob(REQUEST)]
    assert driven.handle(Created(TOKENS), 1.0) == [InvokeTokens(TOKENS), WatchJob(-1, 4.0)]


def test_a_job_without_tokens_invokes_nothing() -> None:
    assert Driven().handle(Created(()), 0.0) == [WatchJob(-1, 5.0)]


def test_a_change_that_ends_nothing_is_watched_on_from() -> None:
    assert launched().handle(Watched(view(version=3)), 2.0) == [WatchJob(3, 3.0)]


def test_a_done_job_is_collected_and_finished() -> None:
    driven, done = launched(), view(Status.DONE, 9)
    assert driven.handle(Watched(done), 1.0) == [Collect()]
    assert driven.handle(Collected(RESULT), 1.1) == [Finish(End.DONE, done, RESULT)]
    assert driven.core.is_finished


def test_a_failed_job_is_collected_too_for_its_report() -> None:
    driven, failed = launched(), view(Status.FAILED)
    assert driven.handle(Watched(failed), 1.0) == [Collect()]
    assert driven.handle(Collected(RESULT), 1.1) == [Finish(End.FAILED, failed, RESULT)]


def test_a_failed_job_whose_results_are_gone_is_failed() -> None:
    driven, failed = launched(), view(Status.FAILED)
    driven.handle(Watched(failed), 1.0)
    assert driven.handle(Unreadable((ExportId("0"),)), 1.1) == [Finish(End.FAILED, failed)]


def test_a_done_job_without_all_its_results_is_watched_on() -> None:
    driven = launched(parts=chain(2))
    driven.handle(Watched(view(Status.DONE, 9)), 1.0)
    (action,) = driven.handle(Collected(()), 1.1)
    assert isinstance(action, WatchJob)


def test_a_job_that_somebody_cancelled_is_over() -> None:
    cancelled = view(Status.CANCELLED)
    assert launched().handle(Watched(cancelled), 1.0) == [Finish(End.CANCELLED, cancelled)]


def test_a_job_that_is_gone_is_over() -> None:
    assert launched().handle(Watched(None), 1.0) == [Finish(End.GONE, None)]


def test_nothing_happens_after_the_end() -> None:
    driven = launched()
    driven.handle(Watched(None), 1.0)
    assert driven.handle(Created(TOKENS), 2.0) == []
    assert driven.handle(CancelAsked(), 2.0) == []
    assert driven.handle(StoreDown(), 2.0) == []


def test_the_user_may_cancel_at_any_time() -> None:
    assert launched().handle(CancelAsked(), 1.0) == [CancelJob(), Finish(End.CANCELLED, None)]


def test_attaching_sweeps_at_once() -> None:
    driven = Driven(request=None)
    assert driven.actions == [WatchJob(-1, 0.0)]
    assert driven.handle(Watched(view()), 0.0) == [SweepJob()]
    assert driven.handle(Swept(TOKENS), 0.1) == [InvokeTokens(TOKENS), WatchJob(1, 4.9)]


# ---------------------------------------------------------------- sweeping, logging, deadlines


def test_silent_tokens_are_looked_for_at_intervals() -> None:
    driven = launched()
    assert driven.handle(Watched(view()), 5.0) == [SweepJob()]
    # Nothing is silent; executors that cannot start are found out about by invoking none.
    assert driven.handle(Swept(()), 5.0) == [InvokeTokens(()), WatchJob(1, 2.0)]
    assert driven.handle(Watched(view()), 10.0)[-1] == SweepJob()


def test_a_waiting_client_logs_at_doubling_intervals() -> None:
    driven = launched(JobPolicy(sweep_s=1e9, log_after_s=1.0, log_every_max_s=4.0))
    logged_at, now = [], 0.0
    while now < 30.0:
        actions = driven.handle(Watched(view()), now)
        logged_at += [action.waited_s for action in actions if isinstance(action, LogWaiting)]
        watch = actions[-1]
        assert isinstance(watch, WatchJob)
        now += watch.timeout_s
    assert logged_at == [1.0, 3.0, 7.0, 11.0, 15.0, 19.0, 23.0, 27.0]


def test_a_job_ends_at_its_deadline() -> None:
    driven = launched(JobPolicy(sweep_s=5.0, deadline_s=3.0))
    running = view(n_running=2)
    assert driven.handle(Watched(running), 1.0) == [WatchJob(1, 2.0)]
    assert driven.handle(Watched(running), 3.0) == [CancelJob(), Finish(End.TIMED_OUT, running)]


def test_a_job_that_is_done_at_its_deadline_is_done() -> None:
    driven = launched(JobPolicy(sweep_s=5.0, deadline_s=3.0))
    assert driven.handle(Watched(view(Status.DONE)), 3.5) == [Collect()]


# ---------------------------------------------------------------- the store does not answer


def test_what_the_store_did_not_answer_is_asked_again() -> None:
    driven = Driven()
    assert driven.handle(StoreDown(), 1.0) == []
    assert driven.core.wake_at() == 1.2
    assert driven.core.tick(1.1) == []
    assert driven.core.tick(1.2) == [CreateJob(REQUEST)]
    assert driven.core.wake_at() is None
    assert driven.handle(Created(()), 1.3) == [WatchJob(-1, 3.7)]


def test_a_store_that_stays_away_is_given_up() -> None:
    driven = launched()
    now = 1.0
    while not (actions := driven.handle(StoreDown(), now)):
        wake_at = driven.core.wake_at()
        assert wake_at is not None
        now = wake_at
        assert driven.core.tick(now) == [WatchJob(-1, 5.0)]
    assert actions == [Finish(End.STORE_DOWN, None)]
    assert 61.0 <= now < 61.5


def test_an_answer_ends_the_patience_that_is_used_up() -> None:
    driven = launched()
    driven.handle(StoreDown(), 1.0)
    driven.core.tick(1.2)
    driven.handle(Watched(view()), 2.0)
    driven.handle(StoreDown(), 100.0)
    assert not driven.core.is_finished


# ---------------------------------------------------------------- lost values


def test_a_loss_opens_a_new_generation() -> None:
    driven = launched(parts=chain(3))
    lost = view(lost=(ExportId("1"),), version=4)
    assert driven.handle(Watched(lost), 1.0) == [ListRecorded()]
    (relaunch,) = driven.handle(Recorded((ExportId("0"), ExportId("1"))), 1.1)
    assert isinstance(relaunch, RelaunchJob)
    assert relaunch.request.generation == 1
    assert relaunch.request.entries == (StrandId("1"),)
    assert driven.handle(Relaunched(TOKENS), 1.2) == [InvokeTokens(TOKENS), WatchJob(4, 3.8)]


def test_results_that_cannot_be_read_are_a_loss() -> None:
    driven = launched(parts=chain(1))
    driven.handle(Watched(view(Status.DONE)), 1.0)
    assert driven.handle(Unreadable((ExportId("0"),)), 1.1) == [MarkLost((ExportId("0"),))]
    assert driven.handle(Watched(view(lost=(ExportId("0"),))), 1.2) == [ListRecorded()]


def test_a_job_whose_values_are_lost_again_and_again_fails() -> None:
    driven = launched()
    lost = view(lost=(ExportId("1"),), generation=5)
    assert driven.handle(Watched(lost), 1.0) == [CancelJob(), Finish(End.LOST_TOO_OFTEN, lost)]


def test_only_what_is_missing_runs_again() -> None:
    request = plan_relaunch(JOB, 1, chain(4), {ExportId("0"), ExportId("1")})
    assert request == Relaunch(
        job=JOB,
        generation=1,
        survivors=((ExportId("1"), 1),),
        entries=(StrandId("2"),),
        entry_inputs=((ExportId("1"),),),
        waiting=(),
        done=(),
        n_requested=1,
    )


def test_nothing_runs_again_when_all_that_is_requested_survives() -> None:
    request = plan_relaunch(JOB, 1, chain(2), {ExportId("1")})
    assert (request.entries, request.waiting, request.n_requested) == ((), (), 0)
    assert request.survivors == ((ExportId("1"), 1),)


def test_everything_runs_again_when_nothing_survives() -> None:
    request = plan_relaunch(JOB, 2, chain(3), set())
    assert (request.entries, request.entry_inputs) == ((StrandId("0"),), ((),))
    assert (request.survivors, request.waiting, request.done) == ((), (), ())


def test_a_strand_that_reads_survivors_and_others_waits_for_the_others() -> None:
    left, right, both = ExportId("0"), ExportId("1"), StrandId("2")
    feeds = (Feed(both, 2),)
    parts = [
        Part((0,), (), (ExportSpec(left, (0,), 1, 1, False, feeds),)),
        Part((1,), (), (ExportSpec(right, (1,), 1, 1, False, feeds),)),
        Part(
            (2,), ((left, (0,)), (right, (1,))), (ExportSpec(ExportId("2"), (2,), 1, 1, True, ()),)
        ),
    ]
    request = plan_relaunch(JOB, 1, parts, {left})
    assert request.entries == (StrandId("1"),)
    assert request.waiting == ((both, 1, (left,)),)
    assert request.survivors == ((left, 1),)


def test_a_strand_that_is_done_is_not_fed_again() -> None:
    parts = chain(2)
    # Export 0 is requested too, and lost; what strand 1 made of it is there.
    spec = parts[0].exports[0]._replace(requested=True, n_consumers=2)
    parts[0] = parts[0]._replace(exports=(spec,))
    request = plan_relaunch(JOB, 1, parts, {ExportId("1")})
    assert request.entries == (StrandId("0"),)
    assert request.done == (StrandId("1"),)
    assert request.n_requested == 1


def test_what_may_not_run_again_is_an_error_and_not_run() -> None:
    core = JobCore(JOB, chain(3), POLICY, REQUEST, once=frozenset({1}))
    core.start(0.0)
    lost = view(lost=(ExportId("1"),))
    core.handle(Watched(lost), 1.0)
    assert core.handle(Recorded((ExportId("0"),)), 1.1) == [
        CancelJob(),
        Finish(End.NOT_REPEATABLE, lost),
    ]


def test_what_need_not_run_again_may_be_unrepeatable() -> None:
    core = JobCore(JOB, chain(3), POLICY, REQUEST, once=frozenset({0}))
    core.start(0.0)
    core.handle(Watched(view(lost=(ExportId("1"),))), 1.0)
    (relaunch,) = core.handle(Recorded((ExportId("0"),)), 1.1)
    assert isinstance(relaunch, RelaunchJob)


def test_a_value_that_was_made_from_a_constant_which_is_gone_is_an_error() -> None:
    parts = chain(1)
    parts[0] = parts[0]._replace(inputs=((ExportId("c0"), (-1,)),))
    driven = launched(parts=parts)
    lost = view(lost=(ExportId("0"),))
    driven.handle(Watched(lost), 1.0)
    assert driven.handle(Recorded(()), 1.1) == [CancelJob(), Finish(End.CONSTANT_LOST, lost)]


# ---------------------------------------------------------------- stragglers


FINISHED = ((10, 1.0),) * 8
LATE = (RunningToken(TokenId("late"), StrandId("0"), None, 1),)


def test_a_run_far_beyond_what_others_took_is_a_straggler() -> None:
    running = [(TokenId("late"), 10, 0.0), (TokenId("long"), 100, 0.0), (TokenId("new"), 10, 9.0)]
    assert find_stragglers(FINISHED, running, 4.0) == ()
    assert find_stragglers(FINISHED, running, 4.1) == ("late",)
    assert find_stragglers(FINISHED, running, 41.0) == ("late", "long", "new")


def test_nothing_is_late_before_something_is_known() -> None:
    assert find_stragglers(FINISHED[:2], [(TokenId("a"), 1, 0.0)], 1e9) == ()
    assert find_stragglers(FINISHED, [(TokenId(str(i)), 1, 0.0) for i in range(9)], 1e9) == ()


def test_a_second_is_not_late_however_short_tasks_are() -> None:
    assert find_stragglers(((10, 1e-6),) * 8, [(TokenId("a"), 1, 0.0)], 0.9) == ()


def speculating(once: frozenset[int]) -> JobCore:
    core = JobCore(JOB, chain(1), JobPolicy(sweep_s=5.0, speculate=True), REQUEST, once)
    core.start(0.0)
    core.handle(Created(TOKENS), 0.0)
    core.handle(Watched(view()), 5.0)
    assert core.handle(Swept(()), 5.0) == [InvokeTokens(()), ListRunning()]
    # It is seen for the first time: nothing is known of when it began.
    assert core.handle(RunningListed(LATE, FINISHED), 5.0) == [WatchJob(1, 5.0)]
    core.handle(Watched(view()), 10.0)
    core.handle(Swept(()), 10.0)
    return core


def test_a_straggler_is_started_again() -> None:
    core = speculating(frozenset())
    assert core.handle(RunningListed(LATE, FINISHED), 10.0) == [DuplicateTokens((TokenId("late"),))]
    again = (Invocation(JOB, TokenId("late")),)
    assert core.handle(Duplicated(again), 10.1)[0] == InvokeTokens(again)


def test_a_straggler_that_may_run_once_is_waited_for() -> None:
    core = speculating(frozenset({0}))
    assert isinstance(core.handle(RunningListed(LATE, FINISHED), 10.0)[-1], WatchJob)


def test_a_straggler_is_not_started_a_third_time() -> None:
    core = speculating(frozenset())
    late = (LATE[0]._replace(n_starts=2),)
    assert isinstance(core.handle(RunningListed(late, FINISHED), 10.0)[-1], WatchJob)
