"""The driver of a job's client: performs the job core's actions on a real store and clock.

What to do about a job is `wukong.scheduler.job`'s to say; there is no policy here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from operator import sub
from typing import Any

from wukong import trace
from wukong.chores import Chores
from wukong.errors import (
    InternalError,
    JobCancelled,
    JobNotFound,
    JobTimeout,
    MissingBlob,
    StoreUnavailable,
    TaskError,
    WukongError,
)
from wukong.executor.invoker import Invoker
from wukong.executor.messages import (
    JobView,
)
from wukong.executor.serialize_failures import Failure, Raised
from wukong.executor.wire import (
    UnreadableExports,
    raise_error,
)
from wukong.report import ClientCounts, Report
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
    JobAction,
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
from wukong.storage import Store
from wukong.submit import Manifest, Submission

logger = logging.getLogger(__name__)

OnTasks = Callable[[Sequence[int], str], None]


class JobRun:
    """Performs a job core's actions until the job has ended for this client.

    Args:
        submission: what to run.
        store, invoker: of the cluster.
        policy: the core's.
        chores: where to leave what the caller need not wait for.
        on_tasks: called with the ids of tasks as they are known to be done, and who ran them;
            asks the store to report every commit.
    """

    def __init__(
        self,
        submission: Submission,
        store: Store,
        invoker: Invoker,
        policy: JobPolicy,
        chores: Chores,
        on_tasks: OnTasks | None = None,
    ) -> None:
        self._submission = submission
        self._job = submission.job
        self._jobs = store.jobs
        self._blobs = store.blobs
        self._invoker = invoker
        self._chores = chores
        self._on_tasks = on_tasks
        self._n_reported = 0
        self._traces: tuple[object, ...] = ()
        self._is_there = True
        """The store may know the job, and nobody else will remove it."""
        self.values: dict[int, Any] = {}
        """The requested values, by task."""
        self._core = JobCore(
            self._job,
            submission.manifest.parts,
            policy,
            submission.request,
            submission.manifest.once,
        )
        self.view: JobView | None = None
        self.report: Report | None = None

    def run(self) -> None:
        """Run to the end; then `values` are there, and the `report`.

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
        except BaseException:  # Ctrl-C at any moment, a callback that raises, the job's own error
            for action in self._core.handle(CancelAsked(), time.monotonic()):
                if isinstance(action, CancelJob):
                    self._step(action)
            if self._is_there:
                self._forget()
            raise

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
                self._chores.do_pending()
            case WatchJob(version, timeout_s):
                return Watched(self._watch(version, timeout_s))
            case SweepJob():
                return Swept(self._jobs.expired(self._job))
            case ListRunning():
                return RunningListed(self._jobs.running(self._job), self._finished_runs())
            case DuplicateTokens(tokens):
                logger.info("job %s: %d strands are late, and start again", self._job, len(tokens))
                return Duplicated(self._jobs.duplicate(self._job, tokens))
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

    def _finished_runs(self) -> tuple[tuple[int, float], ...]:
        records = map(trace.read, self._jobs.traces(self._job))
        return tuple((len(trace.ints(r.tasks)), r.ran_at - r.begun_at) for r in records)

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
            record = trace.read(packed)
            self._on_tasks(trace.ints(record.tasks), record.holder)
        self._n_reported = len(traces)

    def _collect(self) -> JobEvent:
        located, self._traces = self._jobs.collect(self._job)
        try:
            self.values = self._submission.wire.read(located, lambda task: True)
        except UnreadableExports as unreadable:
            return Unreadable(unreadable.exports)
        return Collected(located)

    def _forget(self, has_blobs: bool = True) -> None:
        try:
            self._jobs.forget(self._job)
            if self._blobs is not None and has_blobs:  # where blobs are far away, to ask takes long
                self._blobs.delete_job(self._job)
        except StoreUnavailable as error:
            logger.warning("job %s: not removed (%s); its lease ends by itself", self._job, error)
        self._is_there = False

    # -------------------------------------------------------------- the end

    def _finish(self, finish: Finish) -> None:
        self.view = finish.view
        if finish.end is End.STORE_DOWN:
            self._is_there = False  # somebody may attach to it later
        elif self._blobs is not None and self._is_small(finish):
            self._chores.add(lambda: self._forget(has_blobs=False))
            self._is_there = False
        else:
            self._forget()
        if finish.view is not None:
            self.report = self._make_report(finish.view)
        error = self._error(finish)
        if error is None:
            self._report_tasks(self._traces)
            for task, value in self.values.items():
                if isinstance(value, Failure | Raised):
                    raise raise_error(value, self._key(task))
            return
        raise error

    def _is_small(self, finish: Finish) -> bool:
        """The job has ended well, and has no blobs: its few rows may stay for a moment."""
        view = finish.view
        if finish.end is not End.DONE or view is None or view.n_retries or view.n_deaths:
            return False
        if self._submission.traffic.n_blobs_written:
            return False
        return not any(trace.read(packed).n_blobs_written for packed in self._traces)

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
            case End.NOT_REPEATABLE:
                return TaskError(
                    f"job {self._job}: stored values were lost, and tasks that may not be run "
                    "again (repeatable=False) would have to make them"
                )
            case End.CONSTANT_LOST:
                return MissingBlob(
                    f"job {self._job}: stored values were lost, and could only be made again from "
                    "a constant that is not stored any more; compute it once more"
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

    def durations(self) -> tuple[list[int], list[float]]:
        """The tasks that ran (n), and how long each took, in seconds (n)."""
        tasks: list[int] = []
        seconds: list[float] = []
        for packed in self._traces:
            record = trace.read(packed)
            tasks += trace.ints(record.tasks)
            ended = trace.floats(record.ended_s)
            seconds += map(sub, ended, [0.0, *ended])
        return tasks, seconds


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
        f"job {view.job}: waited {waited_s:.1f} s; "
        f"{view.n_tasks_done} of {view.n_tasks} tasks done, {view.n_running} strands running, "
        f"{view.n_queued} queued, {view.n_retries} retried, {view.n_deaths} attempts lost"
    )
