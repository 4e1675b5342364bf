"""Pytest plugin: one scheduler stands in for all of Dask's, and each test's outcome is recorded.

Every name, default and module attribute by which a test may reach a local scheduler of Dask leads
to the one that is measured: Dask's tests ask for "sync" almost everywhere, and would otherwise
never meet it. Both sides of a comparison are patched alike.

Settings come from the environment, since pytest gives a plugin no better way before its imports:
`SIDE` (dask, wukong), `MODE` (threads, processes), `RECORD` (the file of outcomes), `SAMPLE` (how
many tests), `ONLY` (a file of the tests to run), `DONE` (a file of tests that have run),
`TIMEOUT_S` (of each test).
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

# Collections take their default schedulers when they are imported.
import dask.array
import dask.bag
import dask.dataframe
import dask.delayed
import dask.local
import dask.multiprocessing
import dask.threaded
import pytest

from tests.dask_suites.exceptions import LONG

PREFIX = "DASK_SUITES_"
FILES_SHARE = 4
"""A sample is drawn from one file in so many."""
N_WORKERS = 2
GetFunction = Callable[..., Any]


def setting(name: str, default: str = "") -> str:
    return os.environ.get(PREFIX + name, default)


# ------------------------------------------------------------------ the scheduler that is measured


class DaskProcesses:
    """`dask.multiprocessing.get` on processes that are kept, as Wukong keeps its own."""

    def __init__(self) -> None:
        self._get = dask.multiprocessing.get
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        if kwargs.keys() & {"pool", "initializer", "num_workers"} or self._is_configured():
            return self._get(dsk, keys, **kwargs)
        try:
            return self._get(dsk, keys, pool=self._open(), **kwargs)
        except BrokenExecutor:
            self._pool = None
            raise

    def _is_configured(self) -> bool:
        names = ("pool", "num_workers", "multiprocessing.initializer", "multiprocessing.context")
        return any(dask.config.get(name, None) for name in names)

    def _open(self) -> ProcessPoolExecutor:
        if self._pool is None:
            os.environ["PYTHONHASHSEED"] = "6640"  # as Dask does
            self._pool = ProcessPoolExecutor(
                N_WORKERS,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=dask.multiprocessing.initialize_worker_process,
            )
        return self._pool


class WukongCluster:
    """A cluster that is made at the first use, when all paths of the tests are known."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    @functools.cached_property
    def _get(self) -> GetFunction:
        import wukong

        cluster = wukong.LocalCluster(n_workers=N_WORKERS, processes=self._mode == "processes")
        atexit.register(cluster.close)
        return cluster.get

    def __call__(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        return self._get(dsk, keys, **kwargs)


def measured_scheduler(side: str, mode: str) -> GetFunction:
    if side == "dask" and mode == "threads":
        return dask.threaded.get
    if side == "wukong":
        importlib.import_module("wukong")  # now, so that its configuration is there
    schedule = WukongCluster(mode) if side == "wukong" else DaskProcesses()

    def get(dsk: Any, keys: Any, **kwargs: Any) -> Any:
        """A function, and of this name, since tests are named after it."""
        return schedule(dsk, keys, **kwargs)

    return get


def replace_schedulers(measured: GetFunction) -> None:
    """Put one function wherever one of Dask's schedulers is kept."""
    originals = {dask.local.get_sync, dask.threaded.get, dask.multiprocessing.get}
    for name in dask.base.named_schedulers:
        dask.base.named_schedulers[name] = measured
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "dask"]:
        for name, value in list(vars(module).items()):
            if callable(value) and _is_one_of(value, originals):
                setattr(module, name, measured)
            if isinstance(value, type) and "__dask_scheduler__" in vars(value):
                value.__dask_scheduler__ = staticmethod(measured)


def _is_one_of(value: Any, originals: set[GetFunction]) -> bool:
    return any(value is original for original in originals)


# ------------------------------------------------------------------ which tests run


def rank(nodeid: str) -> int:
    """A test's place in the order in which samples are drawn: the same everywhere."""
    return zlib.crc32(nodeid.encode())


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A sample is drawn from a quarter of the files: to collect all takes longer than to run it."""
    is_tests = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if not setting("SAMPLE") or not is_tests:
        return None
    return rank("/".join(collection_path.parts[-3:])) % FILES_SHARE != 0 or None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = items
    if setting("ONLY"):
        wanted = set(json.loads(Path(setting("ONLY")).read_text()))
        kept = [item for item in items if item.nodeid in wanted]
    elif setting("SAMPLE"):
        short = [item for item in items if not any(name in item.nodeid for name in LONG)]
        drawn = sorted(short, key=lambda item: rank(item.nodeid))[: int(setting("SAMPLE"))]
        chosen = {item.nodeid for item in drawn}
        kept = [item for item in items if item.nodeid in chosen]
    done = set(json.loads(Path(setting("DONE")).read_text())) if setting("DONE") else set()
    items[:] = [item for item in kept if item.nodeid not in done]
    _write({"n_tests": len(items)})


# ------------------------------------------------------------------ outcomes


class TimedOut(BaseException):
    """A test took too long; no test expects it."""


def _write(record: dict[str, Any]) -> None:
    with open(setting("RECORD"), "a") as file:
        file.write(json.dumps(record) + "\n")


def _time_out(signum: int, frame: FrameType | None) -> None:
    raise TimedOut


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Bound the test's time: an exception first, and the end of the process if that is no use."""
    timeout_s = float(setting("TIMEOUT_S", "60"))
    _write({"begun": item.nodeid})
    signal.signal(signal.SIGALRM, _time_out)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    faulthandler.dump_traceback_later(1.5 * timeout_s, exit=True, file=sys.__stderr__)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    _write({"ended": item.nodeid})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    result = yield
    report = result.get_result()  # type: ignore[attr-defined]
    if call.when == "call" or not report.passed:
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xpassed" if report.passed else "xfailed"
        elif call.when != "call" and report.failed:
            outcome = "error"
        if call.excinfo is not None and call.excinfo.errisinstance(TimedOut):
            outcome = "timed out"
        text = "" if report.passed or report.skipped else str(report.longrepr)
        _write(
            {
                "test": item.nodeid,
                "outcome": outcome,
                "text": text[-6000:],
                "seconds": round(call.duration, 3),
            }
        )


def pytest_configure(config: pytest.Config) -> None:
    shortened = dask.config.get("admin.traceback.shorten")
    own = re.escape(os.path.dirname(__file__))
    dask.config.update_defaults({"admin": {"traceback": {"shorten": [*shortened, own]}}})
    replace_schedulers(measured_scheduler(setting("SIDE"), setting("MODE")))
