"""A cluster that runs graphs by one of the schemes of `wukong.sim.schemes`, on real processes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dask.callbacks import Callback
from dask.local import get_sync

from bench.baseline_store import SILENCE_S, Counts, Mailbox, open_counted
from wukong.cluster import preloaded
from wukong.cluster_base import Cluster, executor_policy
from wukong.executor.messages import Invocation
from wukong.executor.pool import ProcessPool
from wukong.executor.serialize import size_of
from wukong.job_driver import OnTasks
from wukong.scheduler.plan import Plan, flatten_slots
from wukong.scheduler.strands import Strands
from wukong.sim.schemes import Scheme, cut_by_scheme
from wukong.storage.local_files import default_directory, remove_directory
from wukong.submit import cut_plan, submit_plan

Sizes = Mapping[Any, int]


class BaselineCluster(Cluster):
    """Processes around the embedded store, as in `LocalCluster`, with another policy.

    Args:
        scheme: how graphs are run.
        n_workers: executors.
    """

    def __init__(self, scheme: Scheme, n_workers: int) -> None:
        self.scheme = scheme
        self.sizes: Sizes = {}
        """Bytes of values by key, as `sizes_of` finds them; for schemes that cluster by them."""
        self.directory = default_directory()
        store = open_counted(scheme, self.directory, n_workers, n_workers + 1)
        counts = store.jobs.counts  # type: ignore[attr-defined]  # as `open_counted` made it
        assert isinstance(counts, Counts)
        self.counts = counts
        self._mail = Mailbox(self.directory, True) if scheme.client_invokes else None
        pool = ProcessPool(
            f"local://{self.directory}",
            n_workers,
            scheme.policy(executor_policy(is_measured=True)),
            store=store,
            store_options={"scheme": scheme.name},
            preload=(*preloaded(), "bench.baseline_store"),
            entry="bench.baseline_store:run_executor",
        )
        invoker = pool if self._mail is None else _InvokingClient(pool, self._mail, scheme.staged)
        super().__init__(store, invoker, n_workers=n_workers)
        self._silence_s = SILENCE_S

    def _cut(self, plan: Plan) -> Strands:
        if self.scheme.strands:
            return cut_plan(plan, self.n_workers, self._costs, self._least_strand_s)
        requested = sorted({slot for slot in flatten_slots(plan.requested) if slot >= 0})
        sizes = [self.sizes.get(key, 0) for key in plan.keys]
        return cut_by_scheme(self.scheme, plan.inputs_ptr, plan.inputs, requested, sizes)

    def _compute(self, plan: Plan, timeout_s: float | None, on_tasks: OnTasks | None) -> Any:
        submission = submit_plan(plan, self._cut(plan), self._store, fail_fast=True, n_retries=0)
        run = self._run(submission, timeout_s, on_tasks)
        self._chores.add(lambda: self._learn(plan, run))
        return plan.resolve(run.values)

    def settle(self) -> None:
        """Do what the last job has left to be done: nothing of it is in the store then."""
        self._chores.do_pending()

    def _remove(self) -> None:
        remove_directory(self.directory)

    def __repr__(self) -> str:
        return self._describe(f"{self.scheme.name} on {self.n_workers} processes")


class _InvokingClient:
    """The invoker of schemes whose client invokes: executors tell it what they have minted.

    Args:
        is_staged: invoke when all that was invoked before has ended.
    """

    def __init__(self, pool: ProcessPool, mail: Mailbox, is_staged: bool) -> None:
        self._pool = pool
        self._mail = mail
        self._is_staged = is_staged
        self._lock = threading.Lock()
        """Guards what follows."""
        self._n_under_way = 0
        self._stage: list[Invocation] = []
        self._is_closing = False
        self._reader = threading.Thread(target=self._read, name="bench-client", daemon=True)
        self._reader.start()
        self.n_idle = pool.n_idle

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """See `Invoker`."""
        with self._lock:
            self._n_under_way += len(invocations)
        self._pool.invoke(invocations)

    def _read(self) -> None:
        while True:
            n_ended, minted = self._mail.receive()
            if self._is_closing:
                return
            with self._lock:
                self._n_under_way -= n_ended
                self._stage += minted
                if self._is_staged and self._n_under_way:
                    continue
                ready, self._stage = self._stage, []
            if ready:
                self.invoke(ready)

    def close(self) -> None:
        """See `Pool`."""
        self._pool.close()
        self._is_closing = True
        self._mail.send(())
        self._reader.join()
        self._mail.close()


def sizes_of(graph: Any, keys: Any) -> Sizes:
    """Run a graph in this thread, to learn the bytes of its values."""
    found: dict[Any, int] = {}

    def note(key: Any, result: Any, *_: Any) -> None:
        found[key] = size_of(result)

    with Callback(posttask=note):
        get_sync(graph, keys)
    return found
