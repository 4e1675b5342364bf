"""What a commit occupies the job's server for: measured on a real store, linear in its rows."""

import os
import statistics
import time
from dataclasses import dataclass

import numpy as np

from wukong.executor.messages import (
    AttemptId,
    Commit,
    Create,
    Entry,
    ExportId,
    Feed,
    Grant,
    HolderId,
    JobId,
    Output,
    StrandId,
)
from wukong.storage import Store

HOLDER = HolderId("bench")
N_FEEDS = (1, 4, 16, 64, 256)
"""Strands that the measured commits mint, each by an output of its own."""
VALUE = bytes(100)
ROWS_PER_FEED = 2
"""A minted strand writes its export and its token."""


@dataclass(frozen=True, slots=True)
class Service:
    """Seconds of one commit = `fixed_s` + `row_s` * rows that it writes."""

    fixed_s: float
    row_s: float


def measure_service(store: Store, n_rounds: int) -> Service:
    """Time commits of different sizes, one at a time, as one client sees them.

    That is an upper bound of what the server is occupied for: the way there and back is in it.
    """
    seconds: dict[int, list[float]] = {n: [] for n in N_FEEDS}
    for _ in range(n_rounds):
        for n in N_FEEDS:
            seconds[n].append(_time_commit(store, n))
    rows = np.array([ROWS_PER_FEED * n for n in N_FEEDS], float)
    medians = np.array([statistics.median(seconds[n]) for n in N_FEEDS])
    # Weighted by 1 / time: the small ones, of which there are most, count as much as the large.
    row_s, fixed_s = np.polyfit(rows, medians, 1, w=1 / medians)
    return Service(max(float(fixed_s), 0.0), max(float(row_s), 0.0))


def _time_commit(store: Store, n_feeds: int) -> float:
    job = JobId(os.urandom(8).hex())
    program = Entry((), None, b"", 0, 0)
    strands = [StrandId(str(s)) for s in range(n_feeds + 1)]
    (invocation,) = store.jobs.create(
        Create(
            job=job,
            entries=(strands[0],),
            entry_inputs=((),),
            programs=tuple((strand, program) for strand in strands),
            sources=(),
            n_requested=1,
            n_tasks=n_feeds + 1,
            n_strands=n_feeds + 1,
            fail_fast=False,
        )
    )
    attempt = AttemptId(os.urandom(8).hex())
    grant = store.jobs.start(job, invocation.token, attempt, HOLDER)
    assert isinstance(grant, Grant)
    outputs = tuple(
        Output(
            ExportId(str(e)),
            (Entry((e,), None, VALUE, len(VALUE), 0),),
            n_values=1,
            n_consumers=1,
            requested=False,
            feeds=(Feed(strands[e + 1], 1),),
        )
        for e in range(n_feeds)
    )
    commit = Commit(job, invocation.token, attempt, HOLDER, outputs=outputs, n_tasks=1)
    begun_at = time.perf_counter()
    store.jobs.commit(commit)
    taken_s = time.perf_counter() - begun_at
    store.jobs.forget(job)
    return taken_s
