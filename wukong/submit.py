"""From a plan to results: make a job of it, launch it on a cluster's store, wait, and gather.

    Plan --cut_strands--> Strands --> programs, entries --> Create --> JobCore's actions --> results

The one place where a client's side of a job meets a real store and clock. What to do about it is
`wukong.scheduler.job`'s to say.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


from wukong import trace
from wukong.errors import (
    InternalError,
    JobCancelled,
    JobNotFound,
    JobTimeout,
    SerializationError,
    StoreUnavailable,
    WukongError,
)
from wukong.executor.messages import (
    BlobId,
    Create,
    Entry,
    ExportId,
    Feed,
    JobId,
    JobView,
    Output,
    Part,
    StrandId,
)
from wukong.executor.run import Invoker
from wukong.executor.serialize import size_of
from wukong.executor.serialize_failures import Failure, Raised
from wukong.executor.serialize_programs import Program
from wukong.executor.wire import (
    PutRequest,
    Traffic,
    UnreadableExports,
    Wire,
    open_wire,
    raise_error,
)
from wukong.report import ClientCounts, Report
from wukong.scheduler.graph import Plan
from wukong.scheduler.job import (
    CancelAsked,
    CancelJob,
    Collect,
    Collected,
    Created,
    CreateJob,
    End,
    Finish,
    InvokeTokens,
    JobAction,
    JobCore,
    JobEvent,
    JobPolicy,
    ListRecorded,
    LogWaiting,
    MarkLost,
    Recorded,
    Relaunched,
    RelaunchJob,
    StoreDown,
    SweepJob,
    Swept,
    Unreadable,
    Watched,
    WatchJob,
)
from wukong.scheduler.parts import static_parts
from wukong.scheduler.strands import Strands, cut_strands
from wukong.storage import Store

logger = logging.getLogger(__name__)

STRANDS_PER_EXECUTOR = 4
"""Of a graph without other limits: enough that executors end together (design.md, section 2)."""
SOURCE_BYTES = 64 * 1024
"""A constant of this size that several strands read is stored once, and not in each program."""
PROGRAM_INLINE_BYTES = 128 * 1024
"""Programs up to this size are rows of the job; larger ones are blobs."""

OnTasks = Callable[[Sequence[int]], None]


class Manifest(NamedTuple):
    """What a client needs to gather a job that another one has launched."""

    keys: list[Any]
    """Task id -> Dask's key."""
    requested: Any
    """Slots of the requested keys, nested as they were."""
    literals: dict[int, Any]
    """Requested constants, by slot."""
    parts: list[Part]


@dataclass(slots=True)
class Submission:
    """A job that is about to be launched, or attached to."""

    job: JobId
    manifest: Manifest
    wire: Wire
    traffic: Traffic
    request: Create | None
    """None: the job exists."""
    begun_at: float = field(default_factory=time.time)


def submit_plan(
    plan: Plan, store: Store, n_executors: int, *, fail_fast: bool, is_cut: bool, n_retries: int
) -> Submission:
    """Make a job of a plan: strands, programs, constants. Stores its large blobs.

    Args:
        n_executors: how many the work should be divided among.
        is_cut: False makes every task a strand of its own (to measure what strands are worth).
        n_retries: of a task that raises, where the plan's annotations say nothing.
    Raises:
        SerializationError: a task cannot be pickled; the message names its key.
    Cost: O(tasks + edges); a few blob puts.
    """
    job = JobId(os.urandom(8).hex())
    traffic = Traffic()
    wire = open_wire(store, job, traffic)
    strands = cut_plan(plan, n_executors, is_cut)
    parts = static_parts(strands)
    retries = {t: int(a["retries"]) for t, a in plan.annotations.items() if "retries" in a}
    if n_retries:
        retries = {**dict.fromkeys(range(len(plan.keys)), n_retries), **retries}
    sources: tuple[Output, ...] = ()
    if wire.is_measured:
        sources, parts = _share_constants(plan, parts, job, wire)
    shared = {e for output in sources for entry in output.entries for e in entry.tasks}
    programs = []
    for number, part in enumerate(parts):
        program = make_program(plan, part, retries, fail_fast, shared)
        programs.append((StrandId(str(number)), _put_program(plan, wire, program, job, number)))
    source_ids = {output.export for output in sources}
    entries = [
        (StrandId(str(i)), tuple(export for export, _ in part.inputs))
        for i, part in enumerate(parts)
        if all(export in source_ids for export, _ in part.inputs)
    ]
    requested_literals = {
        slot: plan.literals[~slot] for slot in _slots(plan.requested) if slot < 0
    }
    manifest = Manifest(plan.keys, plan.requested, requested_literals, parts)
    priorities = [a["priority"] for a in plan.annotations.values() if "priority" in a]
    request = Create(
        job=job,
        entries=tuple(strand for strand, _ in entries),
        entry_inputs=tuple(inputs for _, inputs in entries),
        programs=tuple(programs),
        sources=sources,
        n_requested=sum(export.requested for export in strands.exports),
        n_tasks=len(plan.keys),
        n_strands=strands.n_strands,
        fail_fast=fail_fast,
        priority=max(priorities, default=0),
        manifest=wire.put_manifest(manifest),
    )
    return Submission(job, manifest, wire, traffic, request)


def cut_plan(plan: Plan, n_executors: int, is_cut: bool) -> Strands:
    """Cut a plan for so many executors."""
    n_tasks = len(plan.keys)
    requested = sorted({slot for slot in _slots(plan.requested) if slot >= 0})
    grain = max(1.0, n_tasks / (STRANDS_PER_EXECUTOR * n_executors)) if is_cut else 0.5
    return cut_strands(plan.inputs_ptr, plan.inputs, requested, grain=grain)


def make_program(
    plan: Plan, part: Part, retries: dict[int, int], fail_fast: bool, shared: set[int]
) -> Program:
    """The code of one strand, with the constants that it reads.

    Args:
        shared: slots of constants that are exports of the job, and so not in programs.
    """
    calls = [plan.calls[task] for task in part.tasks]
    return Program(
        part=part,
        calls=calls,
        literals={s: plan.literals[~s] for s in _literal_slots(calls) if s not in shared},
        retries={task: retries[task] for task in part.tasks if task in retries} if retries else {},
        fail_fast=fail_fast,
    )


def _literal_slots(calls: Sequence[Any]) -> set[int]:
    """Slots of the constants that calls read, nested ones too."""
    found: set[int] = set()
    stack = [calls]
    while stack:
        for _, slots, _ in stack.pop():
            for slot in slots:
                if type(slot) is tuple:
                    stack.append([slot])
                elif slot < 0:
                    found.add(slot)
    return found


def _slots(requested: Any) -> list[int]:
    """All slots of a nested request."""
    flat: list[int] = []
    stack = [requested]
    while stack:
        item = stack.pop()
        if isinstance(item, tuple):
            stack.extend(item)
        else:
            flat.append(item)
    return flat


def _put_program(plan: Plan, wire: Wire, program: Program, job: JobId, number: int) -> Entry:
    try:
        return wire.put_program(program, BlobId(f"{job}/plan/{number}"))
    except SerializationError as error:
        key = "?" if error.task is None else repr(plan.keys[error.task])
        raise SerializationError(f"the task {key} cannot be sent to an executor: {error}") from error


def _share_constants(
    plan: Plan, parts: list[Part], job: JobId, wire: Wire
) -> tuple[tuple[Output, ...], list[Part]]:
    """Make exports of large constants that several strands read: each is stored once."""
    large = {~i for i, value in enumerate(plan.literals) if size_of(value) >= SOURCE_BYTES}
    if not large:
        return (), parts
    readers: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        for slot in sorted(large & _literal_slots([plan.calls[task] for task in part.tasks])):
            readers.setdefault(slot, []).append(number)
    shared = {slot: numbers for slot, numbers in readers.items() if len(numbers) > 1}
    requests = [
        PutRequest(ExportId(f"c{~slot}"), (slot,), [plan.literals[~slot]], BlobId(f"{job}/c/{~slot}"))
        for slot in shared
    ]
    made = dict(wire.put(requests))
    parts = list(parts)
    for slot, numbers in shared.items():
        for number in numbers:
            inputs = (*parts[number].inputs, (ExportId(f"c{~slot}"), (slot,)))
            parts[number] = parts[number]._replace(inputs=inputs)
    outputs = []
    for slot, numbers in shared.items():
        feeds = tuple(Feed(StrandId(str(n)), len(parts[n].inputs)) for n in numbers)
        export = ExportId(f"c{~slot}")
        outputs.append(Output(export, (made[export],), 1, len(numbers), False, feeds))
    counts = {StrandId(str(n)): len(part.inputs) for n, part in enumerate(parts)}
    return tuple(outputs), [_recount(part, counts) for part in parts]


def _recount(part: Part, counts: dict[StrandId, int]) -> Part:
    """Tell producers how many inputs their readers have, constants included."""
    exports = tuple(
        spec._replace(feeds=tuple(Feed(f.strand, counts[f.strand]) for f in spec.feeds))
        for spec in part.exports
    )
    return part._replace(exports=exports)


# ------------------------------------------------------------------ driving a job


class JobRun:
    """Performs a job core's actions until the job has ended for this client.

    Args:
        submission: what to run.
        store, invoker: of the cluster.
        policy: the core's.
        on_tasks: called with the ids of tasks as they are known to be done; asks the store to
            report every commit.
    """

    def __init__(
        self,
        submission: Submission,
        store: Store,
        invoker: Invoker,
        policy: JobPolicy,
        on_tasks: OnTasks | None = None,
    ) -> None:
        self._submission = submission
        self._job = submission.job
        self._jobs = store.jobs
        self._blobs = store.blobs
        self._invoker = invoker
        self._on_tasks = on_tasks
        self._n_reported = 0
        self._traces: tuple[object, ...] = ()
        self._values: dict[int, Any] = {}
        self._core = JobCore(self._job, submission.manifest.parts, policy, submission.request)
        self.view: JobView | None = None
        self.report: Report | None = None

    def run(self) -> dict[int, Any]:
        """Run to the end. Returns: the requested values, by task.

        Raises: what the job ended in. Whatever happens, the job leaves nothing in the store.
        """
        actions = deque(self._core.start(time.monotonic()))
        try:
            while True:
                while actions:
                    action = actions.popleft()
                    if isinstance(action, Finish):
                        return self._finish(action)
                    actions.extend(self._step(action))
                wake_at = self._core.wake_at()
                assert wake_at is not None, "the client waits for nothing"
                time.sleep(max(0.0, wake_at - time.monotonic()))
                actions.extend(self._core.tick(time.monotonic()))
        except BaseException as error:
            if not self._core.is_finished:  # Ctrl-C, a callback that raises
                for action in self._core.handle(CancelAsked(), time.monotonic()):
                    if isinstance(action, CancelJob):
                        self._step(action)
                self._forget()
            raise error

    def _step(self, action: JobAction) -> list[JobAction]:
        self._submission.traffic.n_round_trips += 1
        try:
            event = self._perform(action)
        except StoreUnavailable as error:
            logger.warning("job %s: the store does not answer (%s); asking again", self._job, error)
            event = StoreDown()
        if event is None:
            return []
        return self._core.handle(event, time.monotonic())

    def _perform(self, action: JobAction) -> JobEvent | None:
        match action:
            case CreateJob(request):
                return Created(self._jobs.create(request))
            case InvokeTokens(invocations):
                self._submission.traffic.n_round_trips -= 1
                self._invoker.invoke(invocations)
            case WatchJob(version, timeout_s):
                return Watched(self._watch(version, timeout_s))
            case SweepJob():
                return Swept(self._jobs.expired(self._job))
            case ListRecorded():
                logger.warning("job %s: stored values were lost; running again", self._job)
                return Recorded(self._jobs.recorded(self._job))
            case MarkLost(exports):
                self._jobs.mark_lost(self._job, exports)
                return Watched(self._jobs.view(self._job))
            case RelaunchJob(request):
                return Relaunched(self._jobs.relaunch(request))
            case Collect():
                return self._collect()
            case CancelJob():
                self._jobs.cancel(self._job)
            case LogWaiting(view, waited_s):
                self._submission.traffic.n_round_trips -= 1
                logger.info("%s", describe_waiting(view, waited_s))
        return None

    def _watch(self, version: int, timeout_s: float) -> JobView | None:
        if self._on_tasks is None:
            return self._jobs.wait(self._job, version, timeout_s)
        view = self._jobs.wait(self._job, version, timeout_s, progress=True)
        self._report_tasks(self._jobs.traces(self._job))
        return view

    def _report_tasks(self, traces: tuple[object, ...]) -> None:
        if self._on_tasks is None:
            return
        for packed in traces[self._n_reported :]:
            self._on_tasks(trace.ints(trace.read(packed).tasks))
        self._n_reported = len(traces)

    def _collect(self) -> JobEvent:
        located, self._traces = self._jobs.collect(self._job)
        try:
            self._values = self._submission.wire.read(located, lambda task: True)
        except UnreadableExports as unreadable:
            return Unreadable(unreadable.exports)
        return Collected(located)

    def _forget(self) -> None:
        try:
            self._jobs.forget(self._job)
            if self._blobs is not None:
                self._blobs.delete_job(self._job)
        except StoreUnavailable as error:
            logger.warning("job %s: not removed (%s); its lease ends by itself", self._job, error)

    # -------------------------------------------------------------- the end

    def _finish(self, finish: Finish) -> dict[int, Any]:
        self.view = finish.view
        if finish.end is not End.STORE_DOWN:
            self._forget()
        if finish.view is not None:
            self.report = self._make_report(finish.view)
        error = self._error(finish)
        if error is None:
            self._report_tasks(self._traces)
            for task, value in self._values.items():
                if isinstance(value, Failure | Raised):
                    raise raise_error(value, self._key(task))
            return self._values
        raise error

    def _error(self, finish: Finish) -> BaseException | None:
        match finish.end:
            case End.DONE:
                return None
            case End.FAILED:
                assert finish.view is not None
                error = self._submission.wire.read_error(finish.view.error)
                return raise_error(error, self._key(error.key))
            case End.CANCELLED:
                return JobCancelled(f"job {self._job} was cancelled")
            case End.TIMED_OUT:
                waited_s = time.time() - self._submission.begun_at
                if finish.view is None:
                    return JobTimeout(f"job {self._job}: not begun after {waited_s:.1f} s")
                return JobTimeout(describe_waiting(finish.view, waited_s))
            case End.GONE:
                return JobNotFound(
                    f"job {self._job} is not in the store: it was forgotten, or its lease ran out"
                )
            case End.STORE_DOWN:
                return StoreUnavailable(
                    f"the store has not answered; attach to job {self._job} when it does"
                )
            case End.LOST_TOO_OFTEN:
                return WukongError(
                    f"job {self._job}: stored values were lost again and again; "
                    "does anything delete files in the store's directory?"
                )
        raise InternalError(f"job {self._job} ended as {finish.end!r}")

    def _key(self, task: object) -> object:
        keys = self._submission.manifest.keys
        return keys[task] if isinstance(task, int) and 0 <= task < len(keys) else task

    def _make_report(self, view: JobView) -> Report:
        traffic = self._submission.traffic
        return Report(
            self._submission.manifest.keys,
            self._traces,
            view,
            begun_at=self._submission.begun_at,
            wall_s=time.time() - self._submission.begun_at,
            client=ClientCounts(
                n_round_trips=traffic.n_round_trips,
                bytes_read=traffic.bytes_read,
                bytes_written=traffic.bytes_written,
                blob_bytes_written=traffic.blob_bytes_written,
                copied_bytes=traffic.copied_bytes,
            ),
        )


def resolve(manifest: Manifest, values: dict[int, Any]) -> Any:
    """The answer to the request, as `dask.get` shapes it: lists of keys become tuples."""

    def value(slot: Any) -> Any:
        if isinstance(slot, tuple):
            return tuple([value(s) for s in slot])
        return values[slot] if slot >= 0 else manifest.literals[slot]

    return value(manifest.requested)


def describe_waiting(view: JobView, waited_s: float) -> str:
    """One line about what a job waits for."""
    return (
        f"job {view.job}: waited {waited_s:.1f} s; {view.n_tasks_done} of {view.n_tasks} tasks done, "
        f"{view.n_running} strands running, {view.n_queued} queued, {view.n_retries} retried, "
        f"{view.n_deaths} attempts lost"
    )
