"""A store, executors on it that run in the test's own thread, and jobs."""

from collections.abc import Callable

from wukong.executor.messages import HolderId, JobId
from wukong.executor.run import Executor
from wukong.executor.work import Policy
from wukong.job_driver import resolve
from wukong.scheduler.costs import Costs
from wukong.scheduler.graph import plan_graph
from wukong.storage import open_store
from wukong.submit import Submission, cut_plan, submit_plan

LIMIT_BYTES = 1 << 26
n_runs: dict[object, int] = {}
interruptions: dict[object, Callable[[], object]] = {}


def task(name, *values):
    """Sums its inputs, counts its runs, and lets the test interrupt it."""
    n_runs[name] = n_runs.get(name, 0) + 1
    interruptions.pop(name, lambda: None)()
    return sum(values) + 1


def large(name, n_bytes, *values):
    n_runs[name] = n_runs.get(name, 0) + 1
    return bytes([len(values)]) * n_bytes


def fail(name):
    n_runs[name] = n_runs.get(name, 0) + 1
    raise LookupError(name)


class CountedInvoker:
    """Starts nobody; says that so many executors idle."""

    def __init__(self) -> None:
        self.n_idle_now = 0
        self.n_invoked = 0

    def invoke(self, invocations) -> None:
        self.n_invoked += len(invocations)

    def n_idle(self) -> int:
        return self.n_idle_now


class World:
    """A store, executors on it, and one job."""

    def __init__(self, url: str) -> None:
        self.store = open_store(url, limit_bytes=LIMIT_BYTES)
        self.invoker = CountedInvoker()
        self.n_stuck = 0

    def executor(self, name: str = "one", **policy) -> Executor:
        def on_stuck() -> None:
            self.n_stuck += 1

        return Executor(HolderId(name), self.store, self.invoker, Policy(**policy), on_stuck)

    def launch(
        self, graph, keys, *, n_executors: int = 1, fail_fast: bool = True, is_cut: bool = True
    ) -> Submission:
        """Create a job; each task is a strand of its own if it is not cut."""
        plan = plan_graph(graph, keys)
        cut = cut_plan(plan, n_executors, Costs() if is_cut else None)
        submission = submit_plan(plan, cut, self.store, fail_fast=fail_fast, n_retries=0)
        assert submission.request is not None
        self.store.jobs.create(submission.request)
        return submission

    def view(self, job: JobId):
        view = self.store.jobs.view(job)
        assert view is not None
        return view

    def results(self, submission: Submission):
        values = submission.wire.read(self.store.jobs.results(submission.job), lambda _: True)
        return resolve(submission.manifest, values)

    def close(self) -> None:
        for job in self.store.jobs.jobs():
            self.store.jobs.forget(job)
            if self.store.blobs is not None:
                self.store.blobs.delete_job(job)
        if self.store.blobs is not None:
            assert self.store.blobs.used_bytes() == 0
        self.store.jobs.close()


def run_all(*executors: Executor) -> None:
    """Let each of them take tokens until nothing is queued."""
    while sum(executor.take() for executor in executors):
        pass
