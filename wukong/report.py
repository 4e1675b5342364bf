"""What a finished job did and cost: exact counters, the story of a task, drawings and exports.

Made by a client from the records that came with the commits (`wukong.trace`). Making a report
costs next to nothing: the records stay packed until the first counter that needs them is read, and
their tasks stay packed until a story or a drawing is asked for. The drawings themselves are in
`wukong.report_drawing` and `wukong.report_chrome`, imported when the first one is made: every
import of wukong would pay for them.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from wukong.aws.prices import JobCost
from wukong.executor.messages import JobView, Status
from wukong.report_columns import (
    TaskColumns,
    count_text,
    decode_tasks,
    function_codes,
    minters_of,
    size_text,
    time_text,
)
from wukong.trace import RunRecord, read

if TYPE_CHECKING:
    from wukong.report_drawing import Picture

Path: TypeAlias = "str | os.PathLike[str]"

# Comparing a mistyped key with a million others by difflib would take a minute.
MAX_COMPARED_KEYS = 500


class ClientCounts(NamedTuple):
    """What the client itself did for one job, beside its executors."""

    n_round_trips: int = 0
    """Operations on the job store and multi-operations on the blob store."""
    bytes_read: int = 0
    """Encoded results, inline ones included."""
    bytes_written: int = 0
    """Encoded plan and constants, inline ones included."""
    blob_bytes_written: int = 0
    """Of these, what went to the blob store."""
    copied_bytes: int = 0
    """Array memory that was copied inside the client."""


class Report:
    """The record of one job. Counters are exact; sums include what the client itself did.

    Only committed work is in it: what an executor did before it died is known as a death.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        traces: Sequence[object],
        view: JobView,
        *,
        begun_at: float,
        wall_s: float,
        client: ClientCounts,
    ) -> None:
        """Take the job's records; O(1), nothing is unpacked or copied.

        Args:
            keys: task id -> Dask's key, as the plan has them.
            traces: the commits' packed `RunRecord`s (or the records themselves), in any order.
            view: the job as the store saw it last.
            begun_at: when the client was asked for the results, on the wall clock.
            wall_s: from then until it had them.
            client: what the client did itself.
        """
        self._keys = keys
        self._traces = traces
        self._view = view
        self._begun_at = begun_at
        self._client = client
        self.wall_s = wall_s
        """From the request to the results, in seconds."""
        self.cost: JobCost | None = None
        """What it cost, where executors are paid for."""

    @cached_property
    def records(self) -> list[RunRecord]:
        """One record for each committed run, in the order in which they began."""
        return sorted(map(read, self._traces), key=lambda record: (record.begun_at, record.token))

    @cached_property
    def _tasks(self) -> TaskColumns:
        return decode_tasks(self.records, self._begun_at)

    @cached_property
    def _minters(self) -> list[int]:
        return minters_of(self.records)

    @property
    def job(self) -> str:
        """The job's id."""
        return self._view.job

    @property
    def status(self) -> str:
        """How the job stands: running, done, failed or cancelled."""
        return Status(self._view.status).name.lower()

    @property
    def tasks(self) -> int:
        """Tasks of the plan; constants and aliases are none."""
        return len(self._keys)

    @property
    def strands(self) -> int:
        """Strands that the plan was cut into, before any was split."""
        return self._view.n_strands

    @property
    def commits(self) -> int:
        """Commits that were applied."""
        return self._view.n_commits

    @cached_property
    def invocations(self) -> int:
        """Executors that were invoked and committed; the other runs were become by one."""
        return sum(record.is_invoked for record in self.records)

    @cached_property
    def executors(self) -> int:
        """Executors that committed something."""
        return len({record.holder for record in self.records})

    @cached_property
    def round_trips(self) -> int:
        """Operations on the job store and multi-operations on the blob store, the client's too."""
        return self._client.n_round_trips + sum(r.n_round_trips for r in self.records)

    @cached_property
    def bytes_read(self) -> int:
        """Encoded inputs, programs and results that were read, inline ones included."""
        return self._client.bytes_read + sum(r.bytes_read for r in self.records)

    @cached_property
    def bytes_written(self) -> int:
        """Encoded outputs, programs and constants that were written, inline ones included."""
        return self._client.bytes_written + sum(r.bytes_written for r in self.records)

    @cached_property
    def blob_bytes_written(self) -> int:
        """Of the bytes written, those that went to the blob store."""
        return self._client.blob_bytes_written + sum(r.blob_bytes_written for r in self.records)

    @cached_property
    def blobs_read(self) -> int:
        """Blobs that executors read."""
        return sum(r.n_blobs_read for r in self.records)

    @cached_property
    def blobs_written(self) -> int:
        """Blobs that executors wrote."""
        return sum(r.n_blobs_written for r in self.records)

    @cached_property
    def copied_bytes(self) -> int:
        """Array memory that was copied inside a process, in executors and in the client."""
        return self._client.copied_bytes + sum(r.copied_bytes for r in self.records)

    @cached_property
    def peak_memory_bytes(self) -> int:
        """Largest resident size of any one executor; 0 where executors are the client's threads."""
        return max((r.peak_memory_bytes for r in self.records), default=0)

    @cached_property
    def user_s(self) -> float:
        """Seconds in the tasks' own code, summed over executors."""
        return sum((r.ran_at - r.fetched_at for r in self.records), 0.0)

    @cached_property
    def retries(self) -> int:
        """What was begun again: tokens whose attempt was lost, and tasks that had raised."""
        raised = sum(n for record in self.records for _, n in record.retried)
        return self._view.n_retries + raised

    @property
    def deaths(self) -> int:
        """Attempts whose executor is known to have died."""
        return self._view.n_deaths

    def story(self, key: Hashable) -> str:
        """What happened to one task, as text: where and when it ran, and with what trouble.

        Times count from the job's begin; those of executors on other machines are by their clocks.

        Raises:
            KeyError: no task of this job has this key; the message names similar ones.
        Cost: O(tasks), a few milliseconds for a million.
        """
        try:
            task = self._keys.index(key)
        except ValueError:
            raise KeyError(_unknown_key(key, self._keys)) from None
        head = f"{key!r}: task id {task:,} of a job of {count_text(self.tasks, 'task')}"
        rows = np.flatnonzero(self._tasks.task == task).tolist()
        if not rows:
            done = f"{count_text(self._view.n_tasks_done, 'task')} done"
            troubles = f"deaths: {self.deaths:,}, retries: {self.retries:,}"
            return f"{head}\n  no committed run; the job is {self.status}, {done}; {troubles}"
        if len(rows) > 1:
            head += f", committed {len(rows)} times (once in each generation of the job)"
        return "\n".join([head, *(line for row in rows for line in self._run_story(task, row))])

    def _run_story(self, task: int, row: int) -> list[str]:
        """The lines about one run of a task."""
        columns = self._tasks
        run = int(columns.run[row])
        record = self.records[run]
        begin_s, end_s = float(columns.begin_s[row]), float(columns.end_s[row])
        first = int(np.searchsorted(columns.run, run))
        n_tasks = int(np.searchsorted(columns.run, run, side="right")) - first
        before, after = self._neighbours(run)
        lines = [
            f"  where     strand {record.strand}, token {record.token}, executor {record.holder}",
            f"  ran       {self._after(begin_s)} to {self._after(end_s)}"
            f" ({time_text(end_s - begin_s)}), number {row - first + 1:,} of {n_tasks:,}",
            f"  attempts  {_attempts(record, task)}",
            f"  begun     {self._after(record.begun_at - self._begun_at)}, {self._origin(run)}",
            f"  fetch     {time_text(record.fetched_at - record.begun_at)}:"
            f" {size_text(record.bytes_read)}, {count_text(record.n_blobs_read, 'blob')}",
            f"  run       {time_text(record.ran_at - record.fetched_at)}:"
            f" {count_text(n_tasks, 'task')}",
            f"  put       {time_text(record.sent_at - record.ran_at)}:"
            f" {size_text(record.bytes_written)}, {count_text(record.n_blobs_written, 'blob')};"
            f" committed at {self._after(record.sent_at - self._begun_at)}",
        ]
        for name, there, step, other in (
            ("before", row > first, -1, before),
            ("after", row < first + n_tasks - 1, 1, after),
        ):
            in_run = f"{self._keys[int(columns.task[row + step])]!r}" if there else "nothing"
            strand = f"strand {other.strand}" if other else "nothing"
            lines.append(f"  {name:<9} {in_run} in this run; {strand} on this executor")
        return lines

    def _neighbours(self, run: int) -> tuple[RunRecord | None, RunRecord | None]:
        """The runs that the executor of this one committed just before and just after it."""
        holder = self.records[run].holder
        before = (r for r in reversed(self.records[:run]) if r.holder == holder)
        after = (r for r in self.records[run + 1 :] if r.holder == holder)
        return next(before, None), next(after, None)

    def _origin(self, run: int) -> str:
        """How the executor came to this run, and how long the run had been queued."""
        record, minter = self.records[run], self._minters[run]
        minted_at = self._begun_at if minter < 0 else self.records[minter].sent_at
        since = "the job's begin"
        if minter >= 0:
            since = f"strand {self.records[minter].strand} committed"
            since += f" on {self.records[minter].holder}"
        how = "invoked" if record.is_invoked else "become by its executor"
        return f"{how} {time_text(record.begun_at - minted_at)} after {since}"

    def _after(self, time_s: float) -> str:
        return f"{time_s:.6f} s"

    def to_dict(self) -> dict[str, int | float | str]:
        """All counters under their names, ready for JSON."""
        return {
            "job": self.job,
            "status": self.status,
            **{name: getattr(self, name) for name in _COUNTERS},
            **(self.cost.to_dict() if self.cost else {}),
        }

    def to_chrome_trace(self, path: Path) -> None:
        """Write the job as a trace for chrome://tracing or ui.perfetto.dev.

        One row for each executor: strands, in them fetch, run and put, in the run its tasks. Tasks
        too short to be seen are merged; the slice says how many they are, so that the file of a
        million tasks has a few megabytes.
        """
        from wukong.report_chrome import write_chrome

        write_chrome(self._picture(), path)

    def timeline(self, path: Path) -> None:
        """Draw the job as a picture: executors as lanes, time to the right, functions as colours.

        Args:
            path: the PNG file to write.
        Raises:
            ImportError: matplotlib is missing; the message says how to install it.
        """
        from wukong.report_drawing import write_png

        write_png(self._picture(), path)

    def _picture(self) -> Picture:
        from wukong.report_drawing import Picture

        return Picture(
            self._keys,
            self.records,
            self._tasks,
            self._begun_at,
            self.wall_s,
            self._summary(),
            f"{count_text(self.invocations, 'invocation')}, {count_text(self.commits, 'commit')},"
            f" {count_text(self.round_trips, 'round trip')}, {size_text(self.bytes_read)} read,"
            f" {size_text(self.bytes_written)} written",
        )

    def _summary(self) -> str:
        state = "" if self.status == "done" else f" ({self.status})"
        return (
            f"{count_text(self.tasks, 'task')} in {time_text(self.wall_s)}{state}:"
            f" {count_text(self.strands, 'strand')}, {count_text(self.executors, 'executor')},"
            f" {time_text(self.user_s)} in user code"
        )

    def _cells(self) -> list[tuple[str, str]]:
        """The counters as (name, text), sizes and times with their units."""
        return [
            (title, size_text(value) if "bytes" in name else f"{value:,}")
            for name, title in _SHOWN.items()
            for value in [getattr(self, name)]
        ]

    def __repr__(self) -> str:
        cells = self._cells()
        groups = [cells[at : at + _TABLE_ROWS] for at in range(0, len(cells), _TABLE_ROWS)]
        lines = [self._summary()]
        for row in zip(*groups):
            padded = [
                f"{name:<{max(len(name) for name, _ in group)}} {text:>9}"
                for (name, text), group in zip(row, groups)
            ]
            lines.append("   ".join(padded))
        if self.cost is not None:
            lines.append(f"cost: {self.cost}")
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        """The counters and a timeline, for a notebook; it loads nothing from anywhere."""
        from wukong.report_drawing import to_html

        return to_html(self._picture(), self._cells())


# The counters in the order of `to_dict`.
_COUNTERS = (
    "tasks",
    "strands",
    "executors",
    "invocations",
    "commits",
    "round_trips",
    "bytes_read",
    "bytes_written",
    "blob_bytes_written",
    "blobs_read",
    "blobs_written",
    "copied_bytes",
    "peak_memory_bytes",
    "user_s",
    "wall_s",
    "retries",
    "deaths",
)
# What the tables show beside the summary, column by column, with the words they use.
_SHOWN = {
    "invocations": "invocations",
    "commits": "commits",
    "round_trips": "round trips",
    "retries": "retries",
    "deaths": "deaths",
    "bytes_read": "read",
    "bytes_written": "written",
    "blob_bytes_written": "written to blobs",
    "copied_bytes": "copied",
    "peak_memory_bytes": "peak of an executor",
}
_TABLE_ROWS = 5


def _attempts(record: RunRecord, task: int) -> str:
    n_raised = dict(record.retried).get(task, 0)
    said = [f"start {record.n_starts:,} of its token"]
    if record.n_deaths:
        cause = f" (the last one: {record.cause})" if record.cause else ""
        deaths = f"{count_text(record.n_deaths, 'attempt')} with these tasks died before"
        said.append(deaths + cause)
    if n_raised:
        said.append(f"the task raised and was run again {count_text(n_raised, 'time')}")
    return "; ".join(said)


def _unknown_key(key: Hashable, keys: Sequence[Hashable]) -> str:
    """Say that there is no such task, and which keys look alike.

    Looked at are the keys whose function has a similar name, and of them those that begin alike.
    """
    import difflib  # only an error needs it

    wanted = repr(key)
    names, codes = function_codes(keys)
    (function,), _ = function_codes([key])
    head = str(key[0]) if isinstance(key, tuple) and key else str(key)
    # Of a mistyped key Dask may take a word for part of its hash and split it too early.
    alike = difflib.get_close_matches(function, names) or difflib.get_close_matches(head, names)
    chosen = np.flatnonzero(np.isin(codes, [names.index(name) for name in alike])).tolist()

    def n_shared(text: str) -> int:
        return next((i for i, (a, b) in enumerate(zip(wanted, text)) if a != b), len(text))

    texts = (repr(keys[task]) for task in chosen or range(len(keys)))
    nearest = heapq.nlargest(MAX_COMPARED_KEYS, texts, key=n_shared)
    # Dask's keys end in 32 hexadecimal digits: the function alone may be all that is alike.
    similar = difflib.get_close_matches(wanted, nearest) or nearest[: 3 if alike else 0]
    hint = f"; similar: {', '.join(similar)}" if similar else ""
    return f"no task of this job has the key {wanted}{hint}"
