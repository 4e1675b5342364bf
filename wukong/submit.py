"""From a plan to results: make a job of it, launch it on a cluster's store, wait, and gather.

    Plan --cut_strands--> Strands --> programs, entries --> Create --> JobCore's actions --> results

The one place where a client's side of a job meets a real store and clock. What to do about it is
`wukong.scheduler.job`'s to say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wukong.errors import (
    SerializationError,
)
from wukong.executor.messages import (
    BlobId,
    Create,
    Entry,
    ExportId,
    Feed,
    JobId,
    Output,
    Part,
    StrandId,
)
from wukong.executor.scene import Scene
from wukong.executor.serialize import size_of
from wukong.executor.serialize_programs import ONCE, Program
from wukong.executor.wire import (
    PutRequest,
    Traffic,
    Wire,
    open_wire,
)
from wukong.scheduler.costs import Costs, strands_per_executor
from wukong.scheduler.parts import static_parts
from wukong.scheduler.plan import Plan, flatten_slots
from wukong.scheduler.strands import Strands, cut_strands
from wukong.storage import Store

LEAST_STRAND_S = 0.5e-3
"""What a strand is worth at least: about twice what taking and committing one costs."""
LEAST_TASK_S = 0.2e-6
"""What the loop over tasks itself takes for each."""
SOURCE_BYTES = 64 * 1024
"""A constant of this size that several strands read is stored once, and not in each program."""


class Manifest(NamedTuple):
    """What a client needs to gather a job that another one has launched."""

    keys: list[Any]
    """Task id -> Dask's key."""
    requested: Any
    """Slots of the requested keys, nested as they were."""
    literals: dict[int, Any]
    """Requested constants, by slot."""
    parts: list[Part]
    once: frozenset[int]
    """Tasks that may not be run again."""


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
    plan: Plan,
    strands: Strands,
    store: Store,
    *,
    fail_fast: bool,
    n_retries: int,
) -> Submission:
    """Make a job of a plan and its cut: programs, constants. Stores its large blobs.

    Args:
        n_retries: of a task that raises, where the plan's annotations say nothing.
    Raises:
        SerializationError: a task cannot be pickled; the message names its key.
    Cost: O(tasks + edges); a few blob puts.
    """
    job = JobId(os.urandom(8).hex())
    traffic = Traffic()
    wire = open_wire(store, job, traffic)
    try:
        manifest, request = _describe(plan, strands, wire, job, fail_fast, n_retries)
    except BaseException:  # Ctrl-C too: nobody knows the blobs that are there already
        if store.blobs is not None:
            store.blobs.delete_job(job)
        raise
    return Submission(job, manifest, wire, traffic, request)


def _describe(
    plan: Plan, strands: Strands, wire: Wire, job: JobId, fail_fast: bool, n_retries: int
) -> tuple[Manifest, Create]:
    """What has to be stored to gather the job, and to run it."""
    parts = static_parts(strands)
    retries = {t: int(a["retries"]) for t, a in plan.annotations.items() if "retries" in a}
    if n_retries:
        retries = {**dict.fromkeys(range(len(plan.keys)), n_retries), **retries}
    # Annotated with repeatable=False.
    once = [t for t, a in plan.annotations.items() if a.get("repeatable") is False]
    retries.update(dict.fromkeys(once, ONCE))
    sources: tuple[Output, ...] = ()
    if wire.is_measured:
        sources, parts = _share_constants(plan, parts, job, wire)
    shared = {e for output in sources for entry in output.entries for e in entry.tasks}
    context = None if wire.is_measured else copy_context()
    programs = []
    for number, part in enumerate(parts):
        program = make_program(plan, part, retries, fail_fast, shared, context)
        programs.append((StrandId(str(number)), put_program(plan, wire, program, job, number)))
    source_ids = {output.export for output in sources}
    entries = [
        (StrandId(str(i)), tuple(export for export, _ in part.inputs))
        for i, part in enumerate(parts)
        if all(export in source_ids for export, _ in part.inputs)
    ]
    requested_literals = {
        slot: plan.literals[~slot] for slot in flatten_slots(plan.requested) if slot < 0
    }
    manifest = Manifest(plan.keys, plan.requested, requested_literals, parts, frozenset(once))
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
    return manifest, request


def cut_plan(
    plan: Plan, n_executors: int, costs: Costs | None, least_strand_s: float = LEAST_STRAND_S
) -> Strands:
    """Cut a plan for so many executors.

    Args:
        least_strand_s: what a strand is worth at least, in seconds of work.
        costs: what is known of the plan's functions; None makes every task a strand of its own
            (to measure what strands are worth).
    """
    requested = sorted({slot for slot in flatten_slots(plan.requested) if slot >= 0})
    if len(plan.keys) == 1:
        return cut_strands(plan.inputs_ptr, plan.inputs, requested, grain=1.0)
    grain, seconds = choose_grain(plan, n_executors, costs, least_strand_s)
    return cut_strands(plan.inputs_ptr, plan.inputs, requested, grain=grain, costs=seconds)


def choose_grain(
    plan: Plan, n_executors: int, costs: Costs | None, least_strand_s: float = LEAST_STRAND_S
) -> tuple[float, NDArray[np.float64] | None]:
    """What a strand should cost, and what each task does; in tasks if nothing is known of them."""
    seconds = None
    n_strands = strands_per_executor(n_executors) * n_executors
    grain = len(plan.keys) / n_strands
    if costs is None:
        grain = 0.5
    else:
        seconds = costs.estimate(plan.calls)
    if seconds is not None:
        seconds = np.maximum(seconds, LEAST_TASK_S)
        grain = max(least_strand_s, float(seconds.sum()) / n_strands)
    return max(grain, 0.5) if seconds is None else grain, seconds


def make_program(
    plan: Plan,
    part: Part,
    retries: dict[int, int],
    fail_fast: bool,
    shared: set[int],
    context: Context | None = None,
    scene: Scene | None = None,
) -> Program:
    """The code of one strand, with the constants that it reads.

    Args:
        shared: slots of constants that are exports of the job, and so not in programs.
        context: the client's, if executors can have it.
        scene: what is to surround the tasks while they run.
    """
    base = plan.base
    calls = [plan.calls[task - base] for task in part.tasks]
    return Program(
        part=part,
        calls=calls,
        literals={s: plan.literals[~s] for s in _literal_slots(calls) if s not in shared},
        retries={task: retries[task] for task in part.tasks if task in retries} if retries else {},
        fail_fast=fail_fast,
        context=context,
        scene=scene,
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


def put_program(plan: Plan, wire: Wire, program: Program, job: JobId, number: int) -> Entry:
    """Encode a strand's program; the error of one that cannot be sent names the task's key."""
    try:
        return wire.put_program(program, BlobId(f"{job}/plan/{number}"))
    except SerializationError as error:
        raise _unsendable(plan, error.task, error) from error


def _unsendable(plan: Plan, task: int | None, error: SerializationError) -> SerializationError:
    key = "?" if task is None else repr(plan.keys[task - plan.base])
    return SerializationError(f"the task {key} cannot be sent to an executor: {error}")


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
        PutRequest(
            ExportId(f"c{~slot}"), (slot,), [plan.literals[~slot]], BlobId(f"{job}/c/{~slot}")
        )
        for slot in shared
    ]
    try:
        made = dict(wire.put(requests))
    except SerializationError as error:
        tasks = parts[shared[error.task or -1][0]].tasks
        reads = (t for t in tasks if error.task in _literal_slots([plan.calls[t]]))
        raise _unsendable(plan, next(reads), error) from error
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
