"""What must never be seen: checked after every change of a job's rows, and at its end.

A simulated value knows the attempt that computed it and the values it was computed from, so that
two attempts of one task are told apart wherever they turn up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from wukong.executor.messages import (
    AttemptId,
    BlobId,
    Commit,
    ExportId,
    Part,
    Relaunch,
    Status,
    StrandId,
)
from wukong.storage.rows import ExportRow, JobRow, TokenRow, WaitingRow

Tables = Mapping[str, Mapping[str, Any]]
"""Rows by table code and id, as a store holds them."""


class Violation(AssertionError):
    """A simulation has seen what must never happen: a bug in a core, a transition or the world."""


class Value:
    """What a task has computed, once."""

    __slots__ = ("attempt", "inputs", "is_error", "task")

    def __init__(
        self, task: int, attempt: AttemptId, inputs: tuple[Value, ...], is_error: bool
    ) -> None:
        self.task = task
        self.attempt = attempt
        self.inputs = inputs
        self.is_error = is_error

    def __repr__(self) -> str:
        return f"{self.task}@{self.attempt}"


class Checker:
    """The invariants of one job.

    Its memory goes back with the job's rows when the store fails over: see `saved`, `restore`.

    Args:
        parts: of the static strands.
        wrong: tasks whose value is an error in a world without faults.
    """

    def __init__(self, parts: Sequence[Part], wrong: frozenset[int]) -> None:
        self._parts = {StrandId(str(s)): part for s, part in enumerate(parts)}
        self._wrong = wrong
        self.condemned: set[int] = set()
        """Tasks that were given up after many deaths."""
        self._needed = tuple(self._parts)
        self._survivors: frozenset[ExportId] = frozenset()
        self._done: set[int] = set()
        self._chosen: dict[int, Value] = {}

    # -------------------------------------------------------------- what happens

    def committed(
        self,
        request: Commit,
        made: Mapping[int, Value],
        tables: Tables,
        blobs: Mapping[BlobId, tuple[Value, ...]],
        lost: Collection[BlobId],
    ) -> None:
        """A commit was applied.

        Args:
            made: the tasks that its work has done.
            tables: the rows after it.
            lost: blobs that faults have taken away.
        """
        if request.failed is not None:
            return
        if len(made) != request.n_tasks:
            raise Violation(f"{request.token}: {len(made)} tasks done, {request.n_tasks} counted")
        for task, value in made.items():
            if task in self._done:
                raise Violation(f"task {task} was committed twice ({request.token})")
            self._done.add(task)
            for source in value.inputs:
                self._see(source)
        for output in request.outputs:
            for entry in output.entries:
                payload = entry.payload
                if entry.blob is not None:
                    if entry.blob not in blobs and entry.blob not in lost:
                        raise Violation(f"blob {entry.blob} was committed before it was put")
                    payload = blobs.get(entry.blob, ())
                assert isinstance(payload, tuple)
                for value in payload:
                    self._see(value)
        self.check_rows(tables)

    def relaunched(self, request: Relaunch, tables: Tables) -> None:
        """A new generation was opened."""
        self._survivors = frozenset(export for export, _ in request.survivors)
        home = {spec.export: s for s, part in self._parts.items() for spec in part.exports}
        again: set[StrandId] = set()
        stack = [
            home[spec.export]
            for part in self._parts.values()
            for spec in part.exports
            if spec.requested and spec.export not in self._survivors
        ]
        while stack:
            strand = stack.pop()
            if strand in again:
                continue
            again.add(strand)
            inputs = self._parts[strand].inputs
            stack.extend(home[export] for export, _ in inputs if export not in self._survivors)
        self._needed = tuple(s for s in self._parts if s in again)
        self._done.clear()
        self._chosen.clear()
        self.check_rows(tables)

    def restarted(self, tables: Tables) -> None:
        """An open job has begun a new generation."""
        raise Violation("the job is not open")

    def deleted(self, blob: BlobId, tables: Tables) -> None:
        """A blob is about to be deleted."""
        for export, row in tables["e"].items():
            if any(entry.blob == blob for entry in row.entries):
                raise Violation(f"blob {blob} of export {export} was deleted; it is still needed")

    def saved(self) -> tuple[Any, ...]:
        """All that `restore` needs."""
        return self._needed, self._survivors, self._done.copy(), self._chosen.copy()

    def restore(self, saved: tuple[Any, ...]) -> None:
        """The rows went back to what they were then."""
        self._needed, self._survivors, done, chosen = saved
        self._done, self._chosen = done.copy(), chosen.copy()

    def ended(self, status: Status, values: Mapping[int, Value], requested: Iterable[int]) -> None:
        """The client has its results."""
        if status is Status.FAILED:
            if not self._wrong | self.condemned:
                raise Violation("the job failed, and no task did")
            return
        for task in requested:
            if task not in values:
                raise Violation(f"the value of task {task} is not among the results")
            value = values[task]
            self._see(value)
            # Of a task that was given up, another attempt may have ended well.
            allowed = self._wrong | self.condemned if value.is_error else self._wrong
            culprits = _found_behind(value, allowed)
            if value.is_error != bool(culprits):
                raise Violation(f"task {task}: error is {value.is_error}, because of {culprits}")

    def _see(self, value: Value) -> None:
        seen = self._chosen.setdefault(value.task, value)
        if seen is not value:
            raise Violation(f"two attempts of one task were seen: {seen} and {value}")

    # -------------------------------------------------------------- what is in the rows

    def check_rows(self, tables: Tables) -> None:
        """Live tokens and waiting strands are exactly the remaining work; counters are right."""
        job = tables["j"].get("")
        if job is None or job.status in (Status.FAILED, Status.CANCELLED):
            return
        if job.lost or job.status is Status.DONE:
            if tables["t"] or tables["w"]:
                left = [*tables["t"], *tables["w"]]
                raise Violation(f"the job is {job.status.name}, and work is left: {left}")
            return
        exports: Mapping[str, ExportRow] = tables["e"]
        complete = {e for e, row in exports.items() if row.n_left == 0}
        owner: dict[int, str] = {}
        readers: Counter[str] = Counter()
        for key, token in tables["t"].items():
            self._check_token(key, token, complete)
            self._own(owner, key, token)
            readers.update(token.inputs)
        for key, waiting in tables["w"].items():
            readers.update(self._check_waiting(key, waiting, complete))
            self._own(owner, key, waiting)
        self._check_needed(owner, complete, readers)
        self._check_consumers(exports, readers, job)

    def _part(self, row: TokenRow | WaitingRow) -> Part:
        return self._parts[row.base] if row.part is None else row.part

    def _own(self, owner: dict[int, str], key: str, row: TokenRow | WaitingRow) -> None:
        for task in self._part(row).tasks:
            if task in self._done or owner.setdefault(task, key) != key:
                raise Violation(f"task {task} of {key} is done or in {owner.get(task)}")

    def _check_token(self, key: str, token: TokenRow, complete: set[str]) -> None:
        wanted = {export for export, _ in self._part(token).inputs}
        if set(token.inputs) != wanted or len(token.inputs) != len(wanted):
            raise Violation(f"{key} reads {token.inputs}, its part {sorted(wanted)}")
        if not wanted <= complete:
            raise Violation(f"{key} was minted too early: {sorted(wanted - complete)} are missing")

    def _check_waiting(self, key: str, row: WaitingRow, complete: set[str]) -> set[ExportId]:
        wanted = {export for export, _ in self._part(row).inputs}
        n_missing = len(wanted - complete)
        if row.n_missing != n_missing or n_missing == 0:
            raise Violation(
                f"strand {key} misses {n_missing} exports; its row says {row.n_missing}"
            )
        expected = wanted & complete if row.part is None else wanted
        if set(row.inputs) != expected or len(row.inputs) != len(expected):
            raise Violation(f"strand {key} has {row.inputs}, not {sorted(expected)}")
        return wanted

    def _check_needed(
        self, owner: Mapping[int, str], complete: set[str], readers: Counter[str]
    ) -> None:
        """Every strand is done, live or waiting as a whole, or nothing of it has begun."""
        for strand in self._needed:
            part = self._parts[strand]
            n_known = sum(task in self._done or task in owner for task in part.tasks)
            if n_known not in (0, len(part.tasks)):
                raise Violation(f"tasks of strand {strand} are neither done nor to be done")
            if n_known == 0:
                inputs = [export for export, _ in part.inputs]
                if not inputs or not complete.isdisjoint(inputs):
                    raise Violation(f"strand {strand} is nowhere, and some of its inputs are there")
                readers.update(inputs)

    def _check_consumers(
        self, exports: Mapping[str, ExportRow], readers: Mapping[str, int], job: JobRow
    ) -> None:
        feeds = {
            spec.export: spec.feeds
            for strand in self._needed
            for spec in self._parts[strand].exports
        }
        for export, row in exports.items():
            expected = readers.get(export, 0) + row.requested
            if export not in self._survivors:
                expected += sum(feed.strand in job.done for feed in feeds.get(ExportId(export), ()))
            if row.n_consumers != expected:
                raise Violation(f"export {export}: {row.n_consumers} consumers, not {expected}")


def _found_behind(value: Value, wanted: Collection[int]) -> list[int]:
    """Those of some tasks from whose values a value was computed, and it itself."""
    if not wanted:
        return []
    seen, stack = {id(value)}, [value]
    found = set()
    while stack:
        value = stack.pop()
        found.add(value.task)
        for source in value.inputs:
            if id(source) not in seen:
                seen.add(id(source))
                stack.append(source)
    return sorted(found.intersection(wanted))
