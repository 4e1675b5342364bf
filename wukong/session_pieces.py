"""What a session hands its store, made from plans and values."""

from __future__ import annotations

from typing import Any

from wukong.executor.messages import BlobId, Create, ExportId, JobId, NewStrand, Part, StrandId
from wukong.executor.serialize import size_of
from wukong.executor.serialize_programs import ONCE
from wukong.executor.wire import PutRequest
from wukong.scheduler.plan import Plan
from wukong.submit import SOURCE_BYTES


def new_strand(strand: int, part: Part, n_own: int, priority: int) -> NewStrand:
    """What the store is told of a strand, whose first inputs are of its own piece."""
    own = tuple(export for export, _ in part.inputs[:n_own])
    return NewStrand(StrandId(str(strand)), own, part.inputs[n_own:], priority)


def retries_of(plan: Plan, n_retries: int) -> dict[int, int]:
    """Task -> how often it may be run again when it raises, or `ONCE`."""
    tasks = range(plan.base, plan.base + len(plan.keys))
    retries = dict.fromkeys(tasks, n_retries) if n_retries else {}
    for task, notes in plan.annotations.items():
        if "retries" in notes:
            retries[task] = int(notes["retries"])
        if notes.get("repeatable") is False:
            retries[task] = ONCE
    return retries


def open_job(job: JobId) -> Create:
    """A job that stays open, with nothing to do yet."""
    return Create(
        job=job,
        entries=(),
        entry_inputs=(),
        programs=(),
        sources=(),
        n_requested=0,
        n_tasks=0,
        n_strands=0,
        fail_fast=False,
        is_open=True,
    )


def source_requests(
    job: JobId, values: dict[int, Any], first_export: int, is_measured: bool
) -> list[PutRequest]:
    """Entries to make of values that exist: a large one is an export, small ones share one."""
    sizes = {value: size_of(item) if is_measured else 0 for value, item in values.items()}
    small = [value for value, n_bytes in sizes.items() if n_bytes < SOURCE_BYTES]
    groups = [[value] for value, n_bytes in sizes.items() if n_bytes >= SOURCE_BYTES]
    requests = []
    for export, group in enumerate([*groups, small] if small else groups, first_export):
        is_large = sum(sizes[value] for value in group) >= SOURCE_BYTES
        requests.append(
            PutRequest(
                ExportId(str(export)),
                tuple(group),
                [values[value] for value in group],
                BlobId(f"{job}/c/{export}") if is_large else None,
            )
        )
    return requests
