"""One executor's decisions: what to start, fetch, run, put, commit, become and invoke. Pure.

    Started --> Fetch --> Run --+--> PutValues --> SendCommit --+--> Invoke others
       ^                  ^     |                               +--> Delete garbage
       |                  |     +--> AskAbsorb --> Fetch ...    +--> become: Fetch ...
    (invoked)             +------------------------------------------------+

It steps once for each strand, never for each task, and knows ids and sizes, never values. The
driver (`wukong.executor.run`, or the simulator) performs the actions, one after the other, and
hands back what came of each as an event. Beside that line of actions there is one more thing at
work while a run goes on: the heartbeat (`wake_at`, `tick`), and with it the splitting of a run
that takes long while other executors idle (`Overdue`).

Nothing here is remembered anywhere else: an executor that dies leaves a token in the store, and
whoever starts that token begins anew.
"""

from __future__ import annotations

from collections.abc import Callable

from wukong.executor.events import (
    AbsorbAnswered,
    Action,
    AskAbsorb,
    Broken,
    Committed,
    Condemn,
    Delete,
    Done,
    EarlyPut,
    Edges,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Invoke,
    Overdue,
    Piled,
    Put,
    PutEarly,
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
    Grant,
    HolderId,
    JobId,
    Part,
    Reason,
    Receipt,
    Refused,
    TokenId,
)
from wukong.executor.outputs import early_items, items_to_put, outputs_of
from wukong.executor.split import split_rest
from wukong.executor.work import Phase, Policy, Work, absorbing_feed, choose_pieces, task_limit

_EVENT_OF_PHASE: dict[Phase, tuple[type, ...]] = {
    Phase.STARTING: (Started,),
    Phase.FETCHING: (Fetched, FetchFailed, Broken),
    Phase.RUNNING: (Ran, Overdue, Piled),
    Phase.ABSORBING: (AbsorbAnswered,),
    Phase.PUTTING: (Put, Broken),
    Phase.COMMITTING: (Committed,),
}


class ExecutorCore:
    """The state machine of one executor, which runs one token at a time.

    Args:
        holder: the executor's name, under which it holds tokens.
        policy: see `Policy`.
        new_attempt: a fresh random nonce at each call (the driver's; rule 2).
    """

    def __init__(
        self, holder: HolderId, policy: Policy, new_attempt: Callable[[], AttemptId]
    ) -> None:
        self.holder = holder
        self.policy = policy
        self.phase = Phase.IDLE
        self.is_draining = False
        """Become nothing more: end after the strand that is held."""
        self._new_attempt = new_attempt
        self._work: Work | None = None
        self._overdue = False
        self._items: tuple[PutItem, ...] = ()
        """What is being put."""
        self._collected: tuple[BlobId, ...] = ()
        self._renew_at: float | None = None
        self._retry: Action | None = None
        self._retry_at: float | None = None
        self._failing_since: float | None = None
        self._n_failures = 0
        self._ambiguous = False

    # -------------------------------------------------------------- the four methods of a core

    def start(self, job: JobId, token: TokenId) -> list[Action]:
        """Begin with an invocation. The executor must be idle."""
        assert self.phase is Phase.IDLE, self.phase
        self.phase = Phase.STARTING
        return [Start(job, token, self._new_attempt())]

    def adopt(self, grant: Grant, now: float) -> list[Action]:
        """Begin with a token that the driver has taken already (`QueueStore.take`)."""
        assert self.phase is Phase.IDLE, self.phase
        return self._begin(grant, now)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Decide what to do about a fact. Late and repeated facts change nothing."""
        if isinstance(event, Done):
            return []
        if isinstance(event, Renewed):
            return self._renewed(event)
        if isinstance(event, EarlyPut):
            return self._put_early(event)
        if isinstance(event, StoreFailed):
            return self._store_failed(event, now)
        if not isinstance(event, _EVENT_OF_PHASE.get(self.phase, ())):
            return []
        self._n_failures, self._failing_since = 0, None
        match event:
            case Started(Grant() as grant):
                return self._begin(grant, now)
            case Started(Refused() as refused):
                return self._idle(refused)
            case Fetched(part, is_once):
                return self._fetched(part, is_once, now)
            case FetchFailed(exports):
                return self._lost(exports)
            case Ran():
                return self._ran(event)
            case Overdue():
                return self._split_running(event, now)
            case Piled():
                return self._piled(event)
            case AbsorbAnswered(Absorbed() as absorbed):
                return self._absorb(absorbed)
            case AbsorbAnswered(Refused()):
                return self._put()
            case Put(entries):
                self._held().blobs += tuple(e.blob for _, e in entries if e.blob is not None)
                return self._commit(entries)
            case Broken(error, part):
                return self._broken(error, part)
            case Committed(Receipt() as receipt):
                return self._committed(receipt, now)
            case Committed(Refused() as refused):
                return self._commit_refused(refused)
        raise AssertionError(event)

    def wake_at(self) -> float | None:
        """When `tick` wants to be called next; None: not at all."""
        times = [t for t in (self._renew_at, self._retry_at) if t is not None]
        return min(times, default=None)

    def tick(self, now: float) -> list[Action]:
        """Renew the token that is held, and repeat what the store did not answer."""
        actions: list[Action] = []
        if self._renew_at is not None and now >= self._renew_at:
            self._renew_at = now + self.policy.heartbeat_s
            if self._work is not None:
                actions.append(Renew(self._work.job, self._work.token, self._work.attempt))
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            assert self._retry is not None
            actions.append(self._retry)
            self._retry = None
        return actions

    def check(self) -> None:
        """Assert every invariant."""
        if self.phase in (Phase.IDLE, Phase.STARTING):
            assert self._work is None
            assert self._renew_at is None
        else:
            assert self._work is not None
        assert not self._overdue or self.phase is not Phase.IDLE
        assert (self._retry is None) == (self._retry_at is None)

    @property
    def held(self) -> tuple[JobId, TokenId, AttemptId] | None:
        """The token that this executor runs."""
        work = self._work
        return None if work is None else (work.job, work.token, work.attempt)

    @property
    def is_open(self) -> bool:
        """What runs is of an open job."""
        return self._work is not None and self._work.is_open

    @property
    def is_doomed(self) -> bool:
        """What runs is in vain: its token is spent, or its job is over."""
        return self._work is not None and self._work.doomed

    # -------------------------------------------------------------- from a token to a run

    def _begin(self, grant: Grant, now: float) -> list[Action]:
        self._work = Work(
            grant.job,
            grant.token,
            grant.attempt,
            grant.base,
            grant.n_starts,
            grant.n_deaths,
            grant.cause,
            is_open=grant.is_open,
        )
        self._renew_at = now + self.policy.heartbeat_s
        self._work.inputs = [located.export for located in grant.inputs]
        self.phase = Phase.FETCHING
        return [Fetch(grant.job, grant.base, grant.program, grant.part, grant.inputs)]

    def _fetched(self, part: Part, is_once: bool, now: float) -> list[Action]:
        work = self._held()
        work.part, work.is_once = part, is_once
        ours = set(work.inputs)
        for export, values in part.inputs:
            if export in ours:  # the others are outputs of this work, read by a strand it absorbed
                work.recorded.update(dict.fromkeys(values, export))
        self.phase = Phase.RUNNING
        work.run_at = now
        if work.doomed:
            return self._idle(None)
        n_tasks, limit = len(part.tasks), task_limit(work)
        if is_once and work.n_deaths:
            return [Condemn(part, 0, work.cause)]
        if n_tasks == 1 and work.n_starts > self.policy.n_deaths_max:
            return [Condemn(part, work.n_starts - 1, work.cause)]
        if limit == 1 < min(n_tasks, work.n_starts):
            limit = 0  # the first task is suspect: it is to be a strand of its own (seed 26)
        return [Run(part, limit)]

    def _lost(self, exports: tuple[ExportId, ...]) -> list[Action]:
        work = self._held()
        report = ReportLost(work.job, work.token, work.attempt, exports)
        return [report, *self._idle(None)]

    # -------------------------------------------------------------- from a run to a commit

    def _ran(self, ran: Ran) -> list[Action]:
        work = self._held()
        if work.doomed:
            # Nobody has heard of what was put already.
            is_unknown = work.blobs and not work.is_sent
            put = [Delete(work.blobs, False)] if is_unknown else []
            return [*put, *self._idle(None)]
        assert not work.is_putting, "a run ends after what is put while it goes on"
        work.n_tasks += ran.n_done
        work.sizes.update(ran.sizes)
        if ran.error is not None:
            return self._fail(ran.error)
        if ran.n_done < len(work.part.tasks):
            assert ran.edges is not None, "a run that stopped early says what is left"
            n_later = len(ran.edges.tasks) - 1
            return self._put_split(ran.edges, [0, *[int(ran.n_done == 0)] * n_later])
        work.specs = work.part.exports
        feed = absorbing_feed(work, self.policy)
        if feed is not None:
            self.phase = Phase.ABSORBING
            return [AskAbsorb(work.job, work.token, work.attempt, feed, len(work.specs))]
        return self._put()

    def _absorb(self, absorbed: Absorbed) -> list[Action]:
        work = self._held()
        work.absorbed.append(work.specs[0].feeds[0].strand)
        work.specs = ()
        work.sizes.clear()
        work.piled.clear()
        work.made_bytes = 0
        work.base = absorbed.base
        work.inputs.extend(located.export for located in absorbed.inputs)
        self.phase = Phase.FETCHING
        return [Fetch(work.job, absorbed.base, absorbed.program, absorbed.part, absorbed.inputs)]

    def _piled(self, piled: Piled) -> list[Action]:
        """Outputs of the run that goes on: when they are many, put them now (rule 11)."""
        work = self._held()
        if work.doomed:
            return []
        items, drop = early_items(work, self.policy, piled.sizes)
        return [PutEarly(work.attempt, items, drop)] if items else []

    def _put_early(self, put: EarlyPut) -> list[Action]:
        work = self._work
        if work is None or work.attempt != put.attempt:
            return []
        work.is_putting, work.has_failed_early = False, put.entries is None
        for export, entry in put.entries or ():
            work.early[export, entry.tasks[0]] = entry
            assert entry.blob is not None
            work.blobs += (entry.blob,)
        return []

    def _put(self) -> list[Action]:
        """Choose what travels inside the commit; the rest is put before it (rule 1)."""
        self.phase = Phase.PUTTING
        items = items_to_put(self._held(), self.policy)
        self._items = tuple(item._replace(blob=None) for item in items)
        return [PutValues(items)]

    def _commit(self, entries: tuple[tuple[ExportId, Entry], ...]) -> list[Action]:
        work = self._held()
        self._items = ()
        split = work.split
        return self._send(
            work,
            outputs=outputs_of(work, entries),
            spawns=split.spawns if split else (),
            consumed=split.consumed if split else tuple(work.inputs),
            retained=split.retained if split else (),
        )

    def _broken(self, error: bytes | object, part: Part | None) -> list[Action]:
        """What cannot be run or encoded ends the job; in an open one its results are errors."""
        work = self._held()
        if work.is_open and self._items:
            return [PutValues(self._items, error)]
        if part is None:
            return self._fail(error)
        work.part = part
        self.phase = Phase.RUNNING
        return [Condemn(part, 0, "", error)]

    def _fail(self, error: bytes | object) -> list[Action]:
        """A task's exception ends a fail-fast job; so does a value that cannot be encoded."""
        work = self._held()
        work.split = None
        return self._send(work, failed=error)

    def _send(self, work: Work, **fields: object) -> list[Action]:
        self.phase = Phase.COMMITTING
        self._ambiguous = False
        work.is_sent = True
        commit = Commit(
            job=work.job,
            token=work.token,
            attempt=work.attempt,
            holder=self.holder,
            absorbed=tuple(work.absorbed),
            n_tasks=work.n_tasks,
            become=self._new_attempt() if self.policy.become and not self.is_draining else None,
            collected=self._collected,
            **fields,  # type: ignore[arg-type]  # outputs, spawns, ... of `Commit`, given by name
        )
        return [SendCommit(commit)]

    # -------------------------------------------------------------- after a commit

    def _committed(self, receipt: Receipt, now: float) -> list[Action]:
        split_here = self._overdue
        actions: list[Action] = []
        if receipt.invoke:
            actions.append(Invoke(receipt.invoke))
        if receipt.garbage and not receipt.job_over:
            actions.append(Delete(receipt.garbage, self.policy.confirm))
        self._collected = receipt.garbage
        if split_here:
            return [*actions, *self._resume(receipt, now)]
        if receipt.become is None:
            return [*actions, *self._idle(None)]
        return [*actions, *self._begin(receipt.become, now)]

    def _commit_refused(self, refused: Refused) -> list[Action]:
        work = self._held()
        actions: list[Action] = []
        if work.blobs and not self._ambiguous:
            # A commit that was sent once and refused has never been applied: nobody knows the
            # blobs. After a lost reply it may have been, and they may be somebody's inputs.
            actions.append(Delete(work.blobs, False))
        if self._overdue:
            self._overdue = False
            work.doomed = True
            self.phase = Phase.RUNNING
            return [*actions, Resume(work.part, 0)]
        return [*actions, *self._idle(refused)]

    def _idle(self, refused: Refused | None) -> list[Action]:
        actions: list[Action] = []
        if refused is not None and refused.invoke:
            actions.append(Invoke(refused.invoke))
        if self._work is not None:
            actions.append(Forget())
        self._work = None
        self._renew_at = None
        self.phase = Phase.IDLE
        return actions

    # -------------------------------------------------------------- splitting

    def _put_split(self, rest: Edges, piece_of: list[int]) -> list[Action]:
        """Record what is done, and make pieces of what is not."""
        work = self._held()
        work.split = split_rest(
            rest=rest,
            piece_of=piece_of,
            base=work.base,
            exports=work.part.exports,
            recorded=work.recorded,
            inputs=work.inputs,
            attempt=work.attempt,
            n_deaths=work.n_deaths,
        )
        work.specs = work.split.done_exports
        return self._put()

    def _split_running(self, overdue: Overdue, now: float) -> list[Action]:
        """Give away what has not begun, while a task runs on (rule 9)."""
        work = self._held()
        if work.doomed:
            return [Resume(work.part, 0)]
        piece_of = choose_pieces(work, overdue, self.policy, now, self.is_draining)
        if piece_of is None:
            return [Resume(work.part, task_limit(work))]
        self._overdue = True
        work.n_tasks += overdue.n_done
        work.sizes.update(overdue.sizes)
        return self._put_split(overdue.edges, piece_of)

    def _resume(self, receipt: Receipt, now: float) -> list[Action]:
        """Go on with the piece that was kept; the run has waited for this."""
        self._overdue = False
        self.phase = Phase.RUNNING
        grant = receipt.become
        if grant is None or grant.part is None:
            self._held().doomed = True
            return [Resume(self._held().part, 0)]
        is_once = self._held().is_once
        self._begin(grant, now)  # its Fetch is dropped: everything the piece reads is here
        self._fetched(grant.part, is_once, now)
        return [Resume(grant.part, len(grant.part.tasks))]

    # -------------------------------------------------------------- what goes wrong beside it

    def _renewed(self, renewed: Renewed) -> list[Action]:
        if self._work is None or self._work.attempt != renewed.attempt:
            return []
        if renewed.reason in (Reason.SPENT, Reason.OVER):
            # HELD is no reason to stop: whichever attempt commits first wins.
            self._work.doomed = True
            if self.phase is Phase.RUNNING and not self._overdue:
                return [Resume(self._work.part, 0)]
        return []

    def _store_failed(self, failed: StoreFailed, now: float) -> list[Action]:
        """Ask again after a growing wait; abandon the work when that has been in vain for long."""
        match failed.action:
            case Invoke() | Delete() | Renew() | ReportLost() | Forget() | PutEarly():
                return []  # the sweeper, the job's end or the next heartbeat does it
        if self._failing_since is None:
            self._failing_since = now
        if isinstance(failed.action, SendCommit):
            self._ambiguous = True
        if failed.error is not None and now - self._failing_since >= self.policy.full_s:
            self._failing_since, self._n_failures = None, 0
            return self._broken(failed.error, None)
        if now - self._failing_since >= self.policy.give_up_s:
            self._failing_since, self._n_failures = None, 0
            if self._overdue:
                self._overdue = False
                self.phase = Phase.RUNNING
                self._held().doomed = True
                return [Resume(self._held().part, 0)]
            return self._idle(None)
        self._retry = failed.action
        self._retry_at = now + self.policy.retry_s * 2 ** min(self._n_failures, 6)
        self._n_failures += 1
        return []

    def _held(self) -> Work:
        assert self._work is not None, "the executor holds no token"
        return self._work
