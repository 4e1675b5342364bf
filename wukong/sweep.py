"""Looking after the jobs of a store from outside: for jobs whose client is gone, or asleep.

A running job looks after itself, and its client looks after it. What is left is a job whose client
died while its executors, of this pool or another one, could still go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wukong.errors import StoreUnavailable
from wukong.executor.messages import Invocation, JobView, Status
from wukong.executor.pool_launch import wake_pools
from wukong.storage import open_store
from wukong.storage.contract import CallingStore
from wukong.storage.local_files import DATA, POOLS

OFFERED_MAX = 1_000
"""Tokens of a job that one look offers to pools."""


@dataclass(frozen=True, slots=True)
class SweptJob:
    """What a look at one job has found."""

    view: JobView
    """The job, after the look."""
    n_invoked: int
    """Tokens that were silent, and are to be started again."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a look at a store has found and done."""

    jobs: tuple[SweptJob, ...]
    n_pools: int | None
    """Pools that were woken; None: no job has anything to run."""


def sweep_store(url: str) -> Sweep:
    """The same for a store on other machines, as `redis://...`: offers what is queued to the pools.

    Args:
        url: as of `open_store`.
    Raises:
        StoreUnavailable: it does not answer.
        ValueError: there is no such store, or nobody can be reached by it.
    Cost: three calls a job.
    """
    store = open_store(url)
    jobs = store.jobs
    if not isinstance(jobs, CallingStore):
        raise ValueError(f"{url.partition('://')[0]}: give the directory of a LocalCluster")
    try:
        found: list[SweptJob] = []
        queued: list[Invocation] = []
        for job in jobs.jobs():
            n_invoked = len(jobs.expired(job))
            view = jobs.view(job)
            if view is not None:  # it may have been removed meanwhile
                found.append(SweptJob(view, n_invoked))
                queued += jobs.queued(job)[:OFFERED_MAX]
        return Sweep(tuple(found), jobs.call_pools(queued) if queued else None)
    finally:
        jobs.close()


def sweep_directory(directory: Path) -> Sweep:
    """Queue again what executors hold that are silent for long, and wake the pools that wait.

    Safe at any time, beside clients and other sweepers.

    Args:
        directory: of a `LocalCluster`.
    Raises:
        StoreUnavailable: there is no store.
    Cost: one transaction a job.
    """
    if not (directory / DATA).is_file():
        raise StoreUnavailable(f"{directory}: there is no job store")
    store = open_store(f"local://{directory.absolute()}")
    try:
        found = []
        for job in store.jobs.jobs():
            n_invoked = len(store.jobs.expired(job))
            view = store.jobs.view(job)
            if view is not None:  # it may have been removed meanwhile
                found.append(SweptJob(view, n_invoked))
    finally:
        store.jobs.close()
    is_work = any(j.view.n_queued for j in found if j.view.status is Status.RUNNING)
    return Sweep(tuple(found), wake_pools(directory / POOLS) if is_work else None)
