"""What all clusters are: a store, an invoker and a policy, with Dask's `get`.

A kind of cluster opens its store, makes what starts executors, hands both to `Cluster`, and adds
what is its own: the shape of its constructor, what to do about `num_workers`, what to remove.
"""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, TypeVar

import dask.config
from dask.callbacks import local_callbacks

from wukong import config
from wukong.callbacks import CallbackFeed
from wukong.chores import Chores
from wukong.errors import JobNotFound, WukongError
from wukong.executor.invoker import Pool
from wukong.executor.messages import JobId
from wukong.executor.wire import Traffic, open_wire
from wukong.executor.work import Policy
from wukong.futures import CallExecutor
from wukong.job_driver import JobRun, OnTasks, resolve
from wukong.report import Report
from wukong.scheduler.costs import Costs
from wukong.scheduler.dask_cluster import DaskCluster
from wukong.scheduler.graph import plan_graph
from wukong.scheduler.job import JobPolicy
from wukong.scheduler.plan import Plan
from wukong.session import Session
from wukong.session_watch import OnNews, OnRuns
from wukong.storage import Store, memory_bytes
from wukong.submit import LEAST_STRAND_S, Submission, cut_plan, submit_plan

CANCEL_S = 5.0
"""A cluster that is closed waits so long for threads to notice that their jobs are cancelled."""

Self = TypeVar("Self", bound="Cluster")


class Cluster(DaskCluster):
    """Runs Dask graphs on executors that some invoker starts, around a store.

    Usable by several threads at once. Close it, or use it as a context manager: that ends its
    executors and removes what is its own.

    Args:
        store: open; closed with the cluster.
        pool: starts executors that work on this store; closed with the cluster.
        n_workers: executors that graphs are cut for.
        timeout_s: each job ends in `JobTimeout` after this long; None: `wukong.job.timeout-s`.
    """

    def __init__(
        self, store: Store, pool: Pool, *, n_workers: int, timeout_s: float | None = None
    ) -> None:
        super().__init__(are_threads=store.blobs is None)
        self.n_workers = n_workers
        self._store = store
        self._pool = pool
        self._timeout_s = timeout_s if timeout_s is not None else config.get("job.timeout-s")
        self._silence_s = float(config.get("job.silence-s"))
        self._changed = threading.Condition()
        """Guards what follows."""
        self._running: set[JobId] = set()
        """Jobs that some thread waits for."""
        self._call_executors: list[CallExecutor] = []
        self._last_report: Report | None = None
        self._is_closed = False
        self._costs = Costs()
        self._chores = Chores()
        self._is_cut = bool(config.get("executor.strands"))
        self._least_strand_s = LEAST_STRAND_S
        """Large where invoking is dear."""

    # -------------------------------------------------------------- running graphs

    def get(
        self,
        dsk: Any,
        keys: Any,
        *,
        callbacks: Any = None,
        cache: MutableMapping[Any, Any] | None = None,
        num_workers: int | None = None,
        pool: Any = None,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a Dask graph: give it to any Dask call as `scheduler=cluster.get`.

        `cache`, `num_workers` and `pool` may also be set in `dask.config`, as for Dask's own.

        Args:
            dsk: a graph in any of Dask's forms.
            keys: one key, or lists of keys nested at will.
            callbacks: `dask.callbacks.Callback`s instead of the registered ones.
            cache: values of keys, which are not computed then; gets the graph's constants and the
                results.
            num_workers: run on so many executors, which are kept for further graphs (clusters of
                this machine only).
            pool: the same by example: as many executors as this pool has workers.
            timeout_s: instead of the cluster's.
            kwargs: what else other Dask schedulers take; without meaning here.
        Returns: the values of the keys; lists of keys give tuples, as with `dask.get`.
        Raises:
            GraphError: the graph cannot be run as it is; nothing has been started.
            JobTimeout: the deadline passed.
            Exception: what a task raised, with the remote traceback as its `__cause__`.

        Tasks may be annotated (`dask.annotate`): `retries=n` runs a task that raises up to n times
        more, `repeatable=False` ends the job in a `TaskError` where a task would have to run again
        since an executor died, and `priority` orders jobs. An annotation around `compute` holds for
        all tasks; one around the making of an array or a bag is lost when Dask fuses its tasks,
        with every scheduler, unless `optimization.fuse.active` is set to False. Retries of
        everything: `wukong.job.retries` in the configuration.
        """
        size = _pool_size(pool or dask.config.get("pool", None))
        size = size or num_workers or dask.config.get("num_workers", None) or self.n_workers
        if cache is None:
            cache = dask.config.get("cache", None)
        cluster = self if size == self.n_workers else self._resized(size)
        cluster._secede()
        try:
            with local_callbacks(callbacks) as active:
                if not active and cache is None:
                    return cluster._compute(plan_graph(dsk, keys), timeout_s, None)
                with CallbackFeed(active, dsk, keys, cache) as feed:
                    feed.begin()
                    plan = plan_graph(feed.graph, feed.keys)
                    return feed.finish(cluster._compute(plan, timeout_s, feed.bind(plan.keys)))
        finally:
            if cluster is not self:
                self._last_report = cluster._last_report

    def _resized(self, n_workers: int) -> Cluster:
        """A cluster like this one with so many executors, as far as it has such a thing."""
        return self

    def _look_at(self, job: JobId) -> None:
        """Have executors look at what is queued of a job."""
        self._pool.invoke(self._store.jobs.queued(job))

    def _secede(self) -> None:
        """A graph is about to be run, perhaps by a task, which must not hold the executor that the
        graph needs."""

    def _compute(self, plan: Plan, timeout_s: float | None, on_tasks: OnTasks | None) -> Any:
        if not plan.keys:
            return plan.resolve({})
        self._check_open()
        submission = submit_plan(
            plan,
            cut_plan(
                plan, self.n_workers, self._costs if self._is_cut else None, self._least_strand_s
            ),
            self._store,
            fail_fast=True,
            n_retries=int(config.get("job.retries")),
        )
        run = self._run(submission, timeout_s, on_tasks)
        self._chores.add(lambda: self._learn(plan, run))
        return plan.resolve(run.values)

    def _learn(self, plan: Plan, run: JobRun) -> None:
        tasks, seconds = run.durations()
        self._costs.learn([plan.calls[task] for task in tasks], seconds)

    def _run(
        self, submission: Submission, timeout_s: float | None, on_tasks: OnTasks | None
    ) -> JobRun:
        policy = JobPolicy(
            sweep_s=self._silence_s / 2,
            deadline_s=self._timeout_s if timeout_s is None else timeout_s,
            log_after_s=float(config.get("job.log-after-s")),
            speculate=bool(config.get("job.speculate")),
        )
        run = JobRun(submission, self._store, self._pool, policy, self._chores, on_tasks)
        with self._changed:
            self._check_open()
            self._running.add(submission.job)
        try:
            run.run()
        finally:
            with self._changed:
                self._running.discard(submission.job)
                self._changed.notify_all()
                if run.report is not None:
                    self._last_report = run.report
        return run

    def attach(self, job: str, timeout_s: float | None = None) -> Any:
        """Gather a job whose client is gone, and see it to its end.

        What is finished is not run again.

        Args:
            job: its id, one of `jobs()`.
        Returns: what the client that launched it would have got.
        Raises:
            JobNotFound: the store has no such job.
        """
        self._check_open()
        payload = self._store.jobs.manifest(JobId(job))
        if payload is None:
            raise JobNotFound(f"no job {job!r} here; there are: {', '.join(self.jobs()) or 'none'}")
        traffic = Traffic()
        wire = open_wire(self._store, JobId(job), traffic)
        manifest = wire.read_manifest(payload)
        self._look_at(JobId(job))
        run = self._run(Submission(JobId(job), manifest, wire, traffic, None), timeout_s, None)
        return resolve(manifest, run.values)

    def jobs(self) -> tuple[str, ...]:
        """Ids of the jobs in the store."""
        self._chores.do_pending()
        return self._store.jobs.jobs()

    def report(self) -> Report:
        """What the last job that ended on this cluster did and cost.

        Raises:
            WukongError: no job has ended yet.
        """
        if self._last_report is None:
            raise WukongError("no job has ended on this cluster yet")
        return self._last_report

    # -------------------------------------------------------------- running calls

    def executor(self) -> CallExecutor:
        """A `concurrent.futures.Executor` on this cluster: `submit`, `map`, `shutdown`.

        It is a context manager; it ends with the cluster at the latest. There may be several.

        Raises:
            WukongError: the cluster is closed.
        """
        with self._changed:
            self._check_open()
            executor = CallExecutor(
                self.open_session, secede=self._secede, n_retries=int(config.get("job.retries"))
            )
            self._call_executors = [e for e in self._call_executors if not e.is_ended]
            self._call_executors.append(executor)
            return executor

    def open_session(self, on_news: OnNews, on_runs: OnRuns | None = None) -> Session:
        """Open a job to which graphs can be added, on this cluster; close it before the cluster."""
        return Session(
            self._store,
            self._pool,
            n_workers=self.n_workers,
            costs=self._costs,
            on_news=on_news,
            on_runs=on_runs,
        )

    # -------------------------------------------------------------- life

    def _close_now(self) -> None:
        """See `DaskCluster.close`."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            for job in sorted(self._running):
                self._store.jobs.cancel(job)
            self._changed.wait_for(lambda: not self._running, CANCEL_S)
        for executor in self._call_executors:
            executor.abandon()
        self._close_server()
        self._close_others()
        self._chores.close()
        self._pool.close()
        self._store.jobs.close()
        if self._store.blobs is not None:
            self._store.blobs.close()
        self._remove()

    def _close_others(self) -> None:
        """Close the clusters that `_resized` has made."""

    def _remove(self) -> None:
        """Remove what is the cluster's own, after everything is closed."""

    def _check_open(self) -> None:
        if self._is_closed:
            raise WukongError("this cluster is closed; make a new one")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close_now()

    def _describe(self, executors: str) -> str:
        """The cluster's `repr`."""
        state = ", closed" if self._is_closed else ""
        return f"{type(self).__name__}({executors}{state})"


def _pool_size(pool: Any) -> int | None:
    """How many workers a `concurrent.futures` executor or a `multiprocessing` pool has."""
    workers = getattr(pool, "_max_workers", None) or getattr(pool, "_processes", None)
    return workers if isinstance(workers, int) else None


def executor_policy(is_measured: bool, confirm: bool = False, is_remote: bool = False) -> Policy:
    """The executors' policy from the configuration.

    Args:
        is_measured: values have sizes, since they are encoded.
        confirm: the store may lose its last changes, and can be asked for what it keeps.
        is_remote: jobs or blobs are on another machine.
    """
    return Policy(
        inline_bytes=int(config.get("executor.inline-bytes")),
        blob_bytes=int(config.get("executor.blob-bytes")),
        absorb_bytes=int(config.get("executor.absorb-bytes")) if is_measured else 0,
        pile_bytes=int(config.get("executor.pile-bytes")),
        early_bytes=int(config.get("executor.early-bytes")) if is_remote else 0,
        prefetch_bytes=int(config.get("executor.prefetch-bytes")) if is_remote else 0,
        keep_bytes=int(float(config.get("executor.keep-part")) * memory_bytes()),
        split=bool(config.get("executor.split")),
        heartbeat_s=float(config.get("executor.heartbeat-s")),
        n_deaths_max=int(config.get("executor.deaths-max")),
        confirm=confirm,
    )
