"""What must never be seen of an open job, after every change of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from wukong.executor.messages import Part
from wukong.sim.checks import Checker, Tables, Violation
from wukong.storage.rows import MANIFEST, ExportRow, TokenRow, WaitingRow


class OpenChecker(Checker):
    """The invariants of one open job.

    Args:
        parts: of the strands by number; it grows with every extension.
        wrong: tasks whose value is an error in a world without faults.
    """

    def __init__(self, parts: list[Part], wrong: frozenset[int]) -> None:
        super().__init__((), wrong)
        self._numbered = parts

    def restarted(self, tables: Tables) -> None:
        """A new generation was opened."""
        self._done.clear()
        self._chosen.clear()
        self.check_rows(tables)

    def check_rows(self, tables: Tables) -> None:
        """Every reader is counted, waits for exactly what it misses, and can read what it needs."""
        job = tables["j"].get("")
        if job is None:
            return
        if job.lost:
            # Until the restart, only strands of extensions that came meanwhile may be there.
            return
        exports: Mapping[str, ExportRow] = tables["e"]
        readers: Counter[str] = Counter()
        owner: dict[int, str] = {}
        for key, token in tables["t"].items():
            readers.update(token.inputs)
            self._own_tasks(owner, key, token)
            missing = self._missing(token, exports)
            if missing:
                raise Violation(f"{key} was minted too early, or its inputs are gone: {missing}")
        for key, waiting in tables["w"].items():
            readers.update(waiting.inputs)
            self._own_tasks(owner, key, waiting)
            missing = self._missing(waiting, exports)
            if waiting.n_missing != len(missing) or not missing:
                raise Violation(f"strand {key} misses {missing}; its row says {waiting.n_missing}")
        for export, row in exports.items():
            expected = readers.get(export, 0) + row.requested
            if row.n_consumers != expected:
                raise Violation(f"export {export}: {row.n_consumers} consumers, not {expected}")
            if row.n_left == 0 and expected == 0:
                raise Violation(f"export {export} is complete, and nobody reads it")
        bases = Counter(row.base for code in "tw" for row in tables[code].values())
        programs = {key: row.n_live for key, row in tables["p"].items() if key != MANIFEST}
        if programs != dict(bases):
            raise Violation(f"programs are counted as {programs}, and there are {dict(bases)}")

    def _own_tasks(self, owner: dict[int, str], key: str, row: TokenRow | WaitingRow) -> None:
        for task in self._part_of(row).tasks:
            if task in self._done or owner.setdefault(task, key) != key:
                raise Violation(f"task {task} of {key} is done or in {owner.get(task)}")

    def _part_of(self, row: TokenRow | WaitingRow) -> Part:
        return self._numbered[int(row.base)] if row.part is None else row.part

    def _missing(self, row: TokenRow | WaitingRow, exports: Mapping[str, ExportRow]) -> list[str]:
        """Inputs of which a value that is needed is not recorded."""
        inputs = self._part_of(row).inputs
        if {export for export, _ in inputs} != set(row.inputs) or len(inputs) != len(row.inputs):
            raise Violation(f"a strand of {row.base} reads {row.inputs}, its part {inputs}")
        missing = []
        for export, tasks in inputs:
            found = exports.get(export)
            recorded = {t for entry in found.entries for t in entry.tasks} if found else set()
            if not recorded.issuperset(tasks):
                missing.append(str(export))
        return missing

    def check_nothing_is_left(self, tables: Tables) -> None:
        """Everything was released, and taken back."""
        left = {code: list(tables[code]) for code in "twern" if tables[code]}
        left |= {"p": [key for key in tables["p"] if key != MANIFEST]}
        if any(left.values()):
            raise Violation(f"everything was released, and there are {left}")
