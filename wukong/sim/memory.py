"""The values that a simulated executor has in its memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wukong.executor.events import Edges, PutItem
from wukong.executor.messages import AttemptId, BlobId, Entry, ExportId, Part
from wukong.sim.checks import Value, Violation
from wukong.sim.world import World

ERROR_BYTES = 500
_NOBODY = Value(-1, AttemptId(""), (), False)
"""The value of every task where lineage does not matter."""


class Memory:
    """Values by task, as the real executor keeps them: across strands, until they are dropped."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._setting = world.setting
        self._values: dict[int, Value] = {}
        self.made: dict[int, Value] = {}
        """What was computed under the token that is held."""

    def clear(self) -> None:
        """Drop everything."""
        self._values = {}
        self.made = {}

    def keep(self, wanted: set[int]) -> set[int]:
        """Drop all but these. Returns: those of them that are not here."""
        self._values = {t: v for t, v in self._values.items() if t in wanted}
        return wanted.difference(self._values)

    def drop(self, tasks: set[int]) -> None:
        """Drop these."""
        for task in tasks:
            self._values.pop(task, None)

    def receive(self, entry: Entry, payload: object) -> None:
        """Take in what was read."""
        assert isinstance(payload, tuple)
        for task, value in zip(entry.tasks, payload, strict=True):
            self._values.setdefault(task, value)

    def check_has(self, wanted: set[int], who: str) -> None:
        """Everything that a part reads must be here before it runs."""
        if not wanted <= self._values.keys():
            raise Violation(f"{who}: no {sorted(wanted - self._values.keys())} to read")

    def compute(self, tasks: Sequence[int], attempt: AttemptId, is_given_up: bool = False) -> None:
        """Run tasks."""
        self._world.counts["tasks"] += len(tasks)
        if self._world.checker is None:
            self._values.update(dict.fromkeys(tasks, _NOBODY))
            return
        reads, raising = self._setting.reads, self._setting.costs.raising
        for task in tasks:
            try:
                inputs = tuple([self._values[source] for source in reads[task]])
            except KeyError as missing:
                raise Violation(f"task {task} runs without the value of {missing}") from None
            fails = is_given_up or task in raising or any(value.is_error for value in inputs)
            self._values[task] = self.made[task] = Value(task, attempt, inputs, fails)

    def entry(self, tasks: tuple[int, ...], blob: BlobId | None) -> tuple[Entry, tuple[Value, ...]]:
        """Encode values. Returns: the entry, and what its blob holds."""
        values = tuple([self._values[task] for task in tasks])
        size_bytes = sum(map(self._size, tasks)) if self._setting.is_measured else 0
        n_errors = sum(value.is_error for value in values)
        return Entry(tasks, blob, values if blob is None else None, size_bytes, n_errors), values

    def encode(
        self, items: Iterable[PutItem]
    ) -> tuple[tuple[tuple[ExportId, Entry], ...], dict[BlobId, tuple[tuple[Value, ...], int]]]:
        """Make entries. Returns: these, and what has to be put for them, with its size."""
        entries: list[tuple[ExportId, Entry]] = []
        blobs: dict[BlobId, tuple[tuple[Value, ...], int]] = {}
        for export, tasks, blob in items:
            entry, values = self.entry(tasks, blob)
            entries.append((export, entry))
            if blob is not None:
                blobs[blob] = values, entry.size_bytes
        return tuple(entries), blobs

    def edges(self, tasks: tuple[int, ...]) -> Edges:
        """What tasks read."""
        return Edges(tasks, tuple(self._setting.reads[task] for task in tasks))

    def sizes(self, part: Part, reads: Iterable[Sequence[int]]) -> dict[int, int]:
        """Sizes of values that are exported, or that the rest reads, as far as they are here."""
        if not self._setting.is_measured:
            return {}
        wanted = dict.fromkeys(task for spec in part.exports for task in spec.tasks)
        wanted.update(dict.fromkeys(task for tasks in reads for task in tasks))
        return {task: self._size(task) for task in wanted if task in self._values}

    def _size(self, task: int) -> int:
        value = self._values[task]
        return ERROR_BYTES if value.is_error else self._setting.costs.sizes_bytes[task]
