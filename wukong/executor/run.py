"""The driver of an executor: performs the core's actions on a store, an invoker and real values.

    take a token --> core: Fetch -> Run -> PutValues -> SendCommit --> (become: Fetch ...) --> idle
                            ^                 |
          heartbeat thread: beat() - renews, and takes from a long run what has not begun

There is no policy here: what to do next is the core's to say. The one loop over tasks is
`_run_ops`; it is the only code that runs once a task, and so the only code written for speed.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from wukong import trace
from wukong.errors import (
    CorruptBlob,
    InvokeError,
    MissingBlob,
    SecurityError,
    SerializationError,
    StoreFull,
    StoreUnavailable,
)
from wukong.executor import ops
from wukong.executor.core import ExecutorCore
from wukong.executor.early import EarlyPuts, requests_of
from wukong.executor.events import (
    AbsorbAnswered,
    Action,
    AskAbsorb,
    Broken,
    Committed,
    Condemn,
    Delete,
    Done,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Invoke,
    Overdue,
    Put,
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
from wukong.executor.invoker import Invoker
from wukong.executor.kept import Kept
from wukong.executor.messages import (
    AttemptId,
    Grant,
    HolderId,
    JobId,
    Part,
    Receipt,
    StrandId,
    TokenId,
)
from wukong.executor.recorder import Recorder
from wukong.executor.scene import Place, lender_of
from wukong.executor.serialize_failures import Failure, Raised, death_error, exit_error
from wukong.executor.serialize_programs import NO_PROGRAM, ONCE, Program
from wukong.executor.wire import Error, Traffic, UnreadableExports, Wire, open_wire
from wukong.executor.work import Phase, Policy
from wukong.storage import Store

STUCK_AFTER_S = 2.0
"""A task that goes on this long after its job has ended is stuck, as far as others can tell."""
HAND_OVER_AFTER_S = 2.0
"""An executor that is to end waits so long for the current task; then others shall run it again."""
_ROUND_TRIPS = (Start, SendCommit, AskAbsorb, Renew, Delete, ReportLost)
PROGRAMS_KEPT = 16
"""Programs that an executor keeps; pieces of a strand, and its further attempts, share one."""


class Executor:
    """Runs tokens, one at a time; one for each thread or process.

    Args:
        holder: its name in the store.
        store: where its tokens are.
        invoker: how it has others started.
        policy: the core's.
        on_stuck: called, in the heartbeat thread, when a task goes on although nobody waits for it
            any more; somebody should take this executor's place.
        kept: values of blobs, for all executors of this process.
    """

    def __init__(
        self,
        holder: HolderId,
        store: Store,
        invoker: Invoker,
        policy: Policy,
        on_stuck: Callable[[], None] = lambda: None,
        kept: Kept | None = None,
    ) -> None:
        self._store, self._kept = store, kept or Kept(0)
        self._jobs, self._queue, self._invoker = store.jobs, store.queue, invoker
        self._place = Place(holder, lender_of(invoker), lambda: ops.task_now(self._running))
        self._holder = holder
        self._core = ExecutorCore(holder, policy, new_attempt)
        self._policy = policy
        self._on_stuck = on_stuck
        self._doomed_at: float | None = None
        self._drained_at = math.inf
        self._lock = threading.Lock()
        """Guards the core: the run's thread and the heartbeat thread both step it."""
        self._traffic = Traffic()
        self._wires: dict[JobId, Wire] = {}
        self._programs: dict[tuple[JobId, StrandId], Program] = {}
        self._is_retrying = False
        self._values: dict[int, Any] = {}
        self._failed: set[int] = set()
        """Tasks whose value is an error."""
        self._running: ops.Running | None = None
        self._record = Recorder(holder, shares_client=store.blobs is None)
        self._early = EarlyPuts(self._hand)
        self._record_sent: tuple[SendCommit, trace.RunRecord] | None = None
        self._program = NO_PROGRAM

    # -------------------------------------------------------------- what pools call

    def take(self) -> bool:
        """Run the first queued token and whatever it becomes. False: nothing was queued."""
        if self._core.is_draining:
            return False
        self._traffic.n_round_trips += 1
        assert self._queue is not None, "the tokens of this store are handed to pools"
        grant = self._queue.take(self._holder, new_attempt())
        if grant is None:
            return False
        with self._lock:
            actions = self._core.adopt(grant, time.monotonic())
        self._record.begin(grant, is_invoked=True)
        self._drive(actions, lambda: self._core.phase is Phase.IDLE)
        return True

    def run(self, job: JobId, token: TokenId) -> None:
        """Run one given token and whatever it becomes; nothing if the store refuses it."""
        with self._lock:
            actions = self._core.start(job, token)
        self._drive(actions, lambda: self._core.phase is Phase.IDLE)

    def beat(self) -> float:
        """Renew the token that is held, and split a run that takes long. For a heartbeat thread.

        Returns: seconds until it wants to be called again.
        """
        now = time.monotonic()
        if not self._is_retrying:
            with self._lock:
                actions = self._core.tick(now)
            for action in actions:
                self._step(action)
        running = self._running
        if running is None:
            return self._policy.heartbeat_s
        self._look_if_stuck(now)
        is_due = now >= running.look_at and not (self._core.is_doomed or self._early.is_busy)
        is_wanted = self._core.is_open or (self._policy.split and self._invoker.n_idle() > 0)
        if is_due and (is_wanted or now - self._drained_at >= HAND_OVER_AFTER_S):
            self._split(running)
        with running.gate:
            if self._running is running:
                self._early.look(running, self._record.n_ended, self._values, self._wire_now())
        return ops.LOOK_AFTER_S

    def _look_if_stuck(self, now: float) -> None:
        if not self._core.is_doomed:
            self._doomed_at = None
        elif self._doomed_at is None:
            self._doomed_at = now
        elif now - self._doomed_at >= STUCK_AFTER_S:
            self._doomed_at = math.inf  # it is said once
            self._on_stuck()

    def drain(self) -> None:
        """Commit what is done when the current task ends, and become and take nothing more."""
        self._core.is_draining = True
        self._drained_at = time.monotonic()
        if (running := self._running) is not None:
            with running.gate:
                running.withhold()

    @property
    def held(self) -> tuple[JobId, TokenId, AttemptId] | None:
        """The token that is run."""
        return self._core.held

    # -------------------------------------------------------------- the loop over actions

    def _drive(self, actions: list[Action], is_done: Callable[[], bool]) -> None:
        """Perform actions, and what comes of them, until the core has what it wants."""
        pending = deque(actions)
        while True:
            while pending:
                pending.extend(self._step(pending.popleft()))
            if is_done():
                return
            self._is_retrying = True
            wake_at = self._core.wake_at()
            assert wake_at is not None, "the executor waits for nothing"
            time.sleep(max(0.0, wake_at - time.monotonic()))
            with self._lock:
                pending.extend(self._core.tick(time.monotonic()))
            self._is_retrying = False

    def _step(self, action: Action) -> list[Action]:
        try:
            event = self._perform(action)
        except StoreUnavailable as error:
            event = StoreFailed(action, self._put_error(action, error))
        return self._hand(event)

    def _hand(self, event: Event) -> list[Action]:
        with self._lock:
            return self._core.handle(event, time.monotonic())

    def _perform(self, action: Action) -> Event:
        self._traffic.n_round_trips += isinstance(action, _ROUND_TRIPS)
        match action:
            case Start(job, token, attempt):
                started = self._jobs.start(job, token, attempt, self._holder)
                if isinstance(started, Grant):
                    self._record.begin(started, is_invoked=True)
                return Started(started)
            case Fetch():
                return self._fetch(action)
            case Run(part, limit):
                return self._run(part, limit)
            case Condemn():
                return self._condemn(action)
            case Resume(part, limit):
                if self._running is not None:
                    self._running.resume(part, limit)
            case PutValues():
                return self._put(action)
            case SendCommit(commit):
                reply = self._jobs.commit(replace(commit, trace=self._packed(action)))
                if isinstance(reply, Receipt) and reply.become is not None:
                    self._record.begin(reply.become, is_invoked=False)
                return Committed(reply)
            case AskAbsorb(job, token, attempt, feed, n_held):
                return AbsorbAnswered(self._jobs.absorb(job, token, attempt, feed, n_held))
            case Renew(job, token, attempt):
                return Renewed(attempt, self._jobs.renew(job, token, attempt))
            case Invoke(invocations):
                try:
                    self._invoker.invoke(invocations)
                except InvokeError:
                    return Done()  # the tokens stay queued, and the sweeper finds them
            case Delete(blobs, confirm):
                assert self._store.blobs is not None
                if confirm:
                    self._jobs.confirm(JobId(blobs[0].partition("/")[0]))
                self._store.blobs.delete_many(blobs)
                self._kept.drop(blobs)
            case ReportLost(job, token, attempt, exports):
                self._jobs.report_lost(job, token, attempt, exports)
            case Forget():
                self._values, self._failed = {}, set()
        return Done()

    def _wire(self, job: JobId) -> Wire:
        wire = self._wires.get(job)
        if wire is None:
            while len(self._wires) >= PROGRAMS_KEPT:
                del self._wires[next(iter(self._wires))]
            wire = self._wires[job] = open_wire(self._store, job, self._traffic, self._kept)
        return wire

    # -------------------------------------------------------------- inputs

    def _fetch(self, fetch: Fetch) -> Event:
        """Get the program and those inputs that are not here already."""
        wire = self._wire(fetch.job)
        try:
            program = self._load(wire, fetch)
            part = fetch.part or program.part
            wanted = {value for _, values in part.inputs for value in values}
            # What this executor made before, and nobody here reads, goes now; the rest of it
            # need not be fetched.
            if len(self._values):
                self._values = {t: v for t, v in self._values.items() if t in wanted}
            missing = wanted.difference(self._values)
            values = wire.read(fetch.inputs, missing.__contains__)
        except UnreadableExports as unreadable:
            return FetchFailed(unreadable.exports)
        except (SerializationError, SecurityError, MissingBlob, CorruptBlob) as error:
            # A program that is gone can be made again by nobody; inputs have been dealt with above.
            # What a user's class raises when it is unpickled comes back as itself, as with Dask.
            users = error.__cause__ if isinstance(error, SerializationError) else None
            broken = wire.put_error(wire.failure(users or error, -1))
            return Broken(broken, self._part_of(wire, fetch) if self._core.is_open else None)
        self._values.update((t, v) for t, v in values.items() if t in missing)
        self._failed = {t for t, v in self._values.items() if isinstance(v, Failure | Raised)}
        return Fetched(part, any(program.retries.get(t) == ONCE for t in part.tasks))

    def _part_of(self, wire: Wire, fetch: Fetch) -> Part | None:
        """What was to run, though its program or its inputs cannot be unpickled here."""
        self._program = NO_PROGRAM
        return fetch.part or wire.read_part(fetch.program)

    def _load(self, wire: Wire, fetch: Fetch) -> Program:
        program = self._programs.get((fetch.job, fetch.base))
        if program is None:
            program = wire.read_program(fetch.program)
            while len(self._programs) >= PROGRAMS_KEPT:
                del self._programs[next(iter(self._programs))]
            self._programs[fetch.job, fetch.base] = program
        self._program = program
        return program

    # -------------------------------------------------------------- the run

    def _run(self, part: Part, limit: int) -> Event:
        program = self._program
        self._values.update(program.literals)
        flat = ops.prepare_ops(program, part)[:limit]
        iterator = iter(flat)
        running = ops.Running(part, flat, iterator, time.monotonic() + ops.LOOK_AFTER_S)
        self._record.fetched()
        self._running = running
        while True:
            loop_over_tasks = partial(self._run_ops, iterator, program)
            error = program.play(loop_over_tasks, self._place)
            with running.gate:  # a split may be under way: wait for what it leaves
                if error is not None or running.iterator is iterator:
                    self._running = None
                    break
                iterator = running.iterator
        self._early.finish()
        return self._ran(running.part, program, error)

    def _ran(self, part: Part, program: Program, error: Error | None) -> Ran:
        n_done = self._record.ran(part.tasks)
        if error is not None:
            return Ran(n_done, {}, error=self._wire_now().put_error(error))
        if n_done == len(part.tasks):
            return Ran(n_done, self._sizes(part, ()))
        left = part._replace(tasks=part.tasks[n_done:])
        edges = ops.reads_of(ops.prepare_ops(program, left), program)
        return Ran(n_done, self._sizes(part, edges.inputs), edges)

    def _run_ops(self, iterator: Iterator[ops.Op], program: Program) -> Error | None:
        """The loop over tasks. Returns the error that ends a fail-fast job, or None."""
        values, failed, ended = self._values, self._failed, self._record.ended
        clock = time.perf_counter
        while True:
            try:
                if not failed:
                    for task, func, slots, drops in iterator:
                        for slot in drops:
                            values.pop(slot, None)
                        values[task] = func(*[values[slot] for slot in slots])
                        ended.append(clock())
                    return None
                for task, func, slots, drops in iterator:
                    for slot in drops:
                        values.pop(slot, None)
                    source = next((slot for slot in slots if slot in failed), None)
                    if source is None:
                        values[task] = func(*[values[slot] for slot in slots])
                    else:  # a task takes the error of its input; other tasks run (rule 7)
                        values[task] = values[source]
                        failed.add(task)
                    ended.append(clock())
                return None
            except BaseException as raised:  # whatever a task raises is an outcome
                result = self._retried(task, func, slots, raised, program)
            if isinstance(result, Failure | Raised):
                if program.fail_fast:
                    return result
                failed.add(task)
            values[task] = result
            ended.append(clock())

    def _retried(
        self,
        task: int,
        func: Callable[..., Any],
        slots: Sequence[int],
        raised: BaseException,
        program: Program,
    ) -> object:
        """Run a task that raised again, as often as it is annotated. Returns its value or error."""
        for attempt in range(program.retries.get(task, 0)):
            self._record.retried[task] = attempt + 1
            try:
                return func(*[self._values[slot] for slot in slots])
            except BaseException as again:  # as above
                raised = again
        if isinstance(raised, SystemExit):
            raised = exit_error(raised)
        return self._wire_now().failure(raised, task)

    def _condemn(self, condemn: Condemn) -> Ran:
        tasks, program = condemn.part.tasks, self._program
        task = next((t for t in tasks if program.retries.get(t) == ONCE), tasks[0])
        failure = self._wire_now().failure(death_error(condemn.n_deaths, condemn.cause), task)
        if condemn.error is not None:
            failure = self._wire_now().read_error(condemn.error)
        self._record.fetched()
        if not program.fail_fast:
            self._values.update(dict.fromkeys(tasks, failure))
            self._record.ended += [time.perf_counter()] * len(tasks)
        return self._ran(condemn.part, program, failure if program.fail_fast else None)

    def _sizes(self, part: Part, reads: Sequence[Sequence[int]]) -> dict[int, int]:
        return ops.sizes_of(self._values, part, reads) if self._wire_now().is_measured else {}

    # -------------------------------------------------------------- splitting a run

    def _split(self, running: ops.Running) -> None:
        """Take what has not begun, and do with it what the core says. (Heartbeat thread.)"""
        with running.gate:
            if self._running is not running:
                return
            begun_at = time.monotonic()
            is_rest = running.interrupt() or self._core.is_draining or self._core.is_open
            if not is_rest or not running.n_begun:
                running.resume(running.part, len(running.part.tasks))
                return
            part, n_done = running.part, running.n_begun - 1
            edges = ops.reads_of(running.ops[n_done:], self._program)
            self._record.close(part.tasks[:n_done])
            sizes, running_s = self._sizes(part, edges.inputs), running.watch(begun_at)
            event = Overdue(n_done, sizes, edges, self._invoker.n_idle(), running_s)
            self._drive(self._hand(event), lambda: self._core.phase is Phase.RUNNING)
            if running.part is part:
                self._record.reopen(n_done)
            running.look_later(begun_at, time.monotonic())

    # -------------------------------------------------------------- outputs

    def _put(self, action: PutValues) -> Event:
        wire = self._wire_now()
        if action.error is not None:
            spoilt = [task for item in action.items for task in item.tasks]
            self._values.update(dict.fromkeys(spoilt, wire.read_error(action.error)))
        requests = requests_of(action.items, self._values)
        while True:
            try:
                return Put(tuple(wire.put(requests)))
            except SerializationError as error:
                task = -1 if error.task is None else error.task
                failure = wire.failure(error, task)
                if task < 0 or self._program.fail_fast:
                    return Broken(wire.put_error(failure))
                self._values[task] = failure
                for request in requests:
                    if task in request.tasks:
                        request.values[request.tasks.index(task)] = failure

    def _put_error(self, action: Action, error: StoreUnavailable) -> bytes | object | None:
        if not isinstance(action, PutValues | SendCommit) or not isinstance(error, StoreFull):
            return None
        items = action.items if isinstance(action, PutValues) else ()
        named, wire = [item.tasks[0] for item in items if item.blob is not None], self._wire_now()
        return wire.put_error(wire.failure(error, named[0] if named else -1))

    def _packed(self, action: SendCommit) -> object:
        """The trace of a commit; the same again when the commit is repeated."""
        if self._record_sent is None or self._record_sent[0] is not action:
            self._record_sent = (action, self._record.pack(self._traffic))
        record = self._record_sent[1]
        return trace.pack(record) if self._wire_now().is_measured else record

    def _wire_now(self) -> Wire:
        assert self.held is not None, "no token is held"
        return self._wire(self.held[0])


def new_attempt() -> AttemptId:
    """A nonce that no other attempt has or will have."""
    return AttemptId(os.urandom(8).hex())
