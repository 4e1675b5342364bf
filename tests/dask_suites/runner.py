"""Runs the suites in processes of their own, and compares the outcomes test by test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.dask_suites.exceptions import EXCEPTIONS, LEFT_OUT

SUITES = ("dask.array", "dask.bag", "dask.dataframe", "dask.diagnostics", "dask.tests")
SIDES = ("dask", "wukong")
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TIMEOUT_S = 180.0
"""Of one test; the longest takes a third of it on two busy cores."""
N_RESTARTS_MAX = 20
"""A test that ends its process is recorded, and the rest runs in a new one, so many times."""
NOT_RUN = "not run"
ENDED = "ended its process"
BAD = frozenset({"failed", "error", "timed out", ENDED})


@dataclass(frozen=True, slots=True)
class Difference:
    """A test whose outcomes differ, also, where Wukong's is the worse, when it is run once more."""

    mode: str
    test: str
    outcomes: tuple[str, str]
    """With Dask's scheduler, and with Wukong's."""
    text: str
    """What Wukong's side said."""

    @property
    def is_better(self) -> bool:
        return self.outcomes[1] == "passed" and self.outcomes[0] in BAD

    @property
    def reason(self) -> str | None:
        """Why it is accepted; None: it is not."""
        if self.is_better:
            return "only Dask's scheduler fails"
        for (mode, name), reason in EXCEPTIONS.items():
            if mode == self.mode and name in self.test:
                return reason
        return None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both sides of one mode."""

    mode: str
    counts: dict[str, Counter[str]]
    """Suite -> outcome, or "differs" -> number of tests."""
    differences: list[Difference]

    @property
    def unexpected(self) -> list[Difference]:
        return [difference for difference in self.differences if difference.reason is None]


def compare(mode: str, sample: int | None, suites: Sequence[str] = SUITES) -> Comparison:
    """Run the suites with both schedulers at once, and what ends worse with Wukong's once more.

    Args:
        mode: "threads" or "processes".
        sample: how many tests; always the same ones. None: all.
    """
    with tempfile.TemporaryDirectory(prefix="dask-suites-") as folder:
        runs = [_Side(side, mode, Path(folder), suites) for side in SIDES]
        with ThreadPoolExecutor(len(runs)) as threads:
            first = list(threads.map(lambda run: run.run(sample=sample), runs))
            found = _differences(mode, *first, runs[1].texts)
            suspects = [d.test for d in found if not d.is_better]
            again = list(threads.map(lambda run: run.run(only=suspects), runs))
    differences = [d for d in found if d.is_better]
    differences += _differences(mode, *again, runs[1].texts)
    differing = {difference.test for difference in differences}
    counts: dict[str, Counter[str]] = {}
    for test, outcome in first[0].items():
        count = counts.setdefault(_suite_of(test), Counter())
        count["differs" if test in differing else outcome] += 1
    return Comparison(mode, counts, differences)


def _differences(
    mode: str, dask: dict[str, str], wukong: dict[str, str], texts: dict[str, str]
) -> list[Difference]:
    return [
        Difference(mode, test, outcomes, texts.get(test, ""))
        for test in sorted(dask.keys() | wukong.keys())
        if len(set(outcomes := (dask.get(test, NOT_RUN), wukong.get(test, NOT_RUN)))) > 1
    ]


def _suite_of(test: str) -> str:
    head, _, rest = test.partition("dask/")[2].partition("/")
    return "dask.tests" if head == "tests" else f"dask.{head}" if rest else test


class _Side:
    """One scheduler's runs of the suites."""

    def __init__(self, side: str, mode: str, folder: Path, suites: Sequence[str]) -> None:
        self._side = side
        self._mode = mode
        self._folder = folder
        self._suites = suites
        self._n_runs = 0
        self.texts: dict[str, str] = {}

    def run(self, sample: int | None = None, only: Sequence[str] | None = None) -> dict[str, str]:
        """Outcome by test."""
        outcomes: dict[str, str] = {}
        if only is not None and not only:
            return outcomes
        for _ in range(N_RESTARTS_MAX):
            hung = self._run_once(sample, only, outcomes)
            if hung is None:
                return outcomes
            outcomes[hung] = ENDED
        raise RuntimeError(
            f"{self._side}, {self._mode}: more than {N_RESTARTS_MAX} processes ended"
        )

    def _run_once(
        self, sample: int | None, only: Sequence[str] | None, outcomes: dict[str, str]
    ) -> str | None:
        """Run what has no outcome. Returns the test that ended the process, if one did."""
        self._n_runs += 1
        name = f"{self._side}-{self._mode}-{self._n_runs}"
        record, cwd = self._folder / f"{name}.jsonl", self._folder / name
        cwd.mkdir()
        settings = {
            "SIDE": self._side,
            "MODE": self._mode,
            "RECORD": str(record),
            "TIMEOUT_S": str(TIMEOUT_S),
        }
        if sample is not None:
            settings["SAMPLE"] = str(sample)
        if only is not None:
            settings["ONLY"] = self._write(f"{name}-only", only)
        if outcomes:
            settings["DONE"] = self._write(f"{name}-done", list(outcomes))
        log = self._folder / f"{name}.log"
        with log.open("w") as output:
            code = subprocess.run(
                self._command(only),
                cwd=cwd,
                env={
                    **os.environ,
                    "PYTHONHASHSEED": "0",
                    "PYTHONPATH": str(REPOSITORY),
                    **{f"DASK_SUITES_{key}": value for key, value in settings.items()},
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        begun = self._read(record, outcomes)
        if begun is None and code not in (0, 1):
            raise RuntimeError(f"{name} ended with {code}:\n{log.read_text()[-4000:]}")
        if begun is not None:
            self.texts[begun] = log.read_text()[-6000:]
        return begun

    def _command(self, only: Sequence[str] | None) -> list[str]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(HERE / "pytest.ini"),
            f"--rootdir={_site_packages()}",
            "-p",
            "tests.dask_suites.plugin",
            "-m",
            "not network and not gpu",
            "--pyargs",
        ]
        command += [f"--ignore={_site_packages() / path}" for path in LEFT_OUT]
        if only is None:
            return [*command, *self._suites]
        files = {test.partition("::")[0] for test in only}
        return [*command, *sorted(str(_site_packages() / file) for file in files)]

    def _write(self, name: str, tests: Iterable[str]) -> str:
        path = self._folder / f"{name}.json"
        path.write_text(json.dumps(list(tests)))
        return str(path)

    def _read(self, record: Path, outcomes: dict[str, str]) -> str | None:
        """Add the record's outcomes. Returns the test that has begun and not ended."""
        begun: str | None = None
        for line in record.read_text().splitlines() if record.exists() else ():
            entry = json.loads(line)
            if "begun" in entry:
                begun = entry["begun"]
            elif "ended" in entry:
                begun = None
            elif "test" in entry:
                outcomes[entry["test"]] = entry["outcome"]
                self.texts[entry["test"]] = entry["text"]
        return begun


def _site_packages() -> Path:
    import dask

    return Path(dask.__file__).parents[1]
