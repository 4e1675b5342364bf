"""What every test run has: a watchdog, the `full` switch, and a check that nothing is left behind.

Pytest's own `faulthandler_timeout` dumps the stacks of this process. The watchdog here comes later:
it also makes the executors dump theirs, and ends a run that would otherwise hang for ever.
"""

import contextlib
import faulthandler
import gc
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import dask
import psutil
import pytest

WATCHDOG_S = 300.0
SLOW_WATCHDOG_S = 900.0
LEFTOVER_GRACE_S = 10.0
SHARED_MEMORY = Path("/dev/shm")
STORE_NAME = re.compile(r"wukong-\d+-(?P<pid>\d+)-\w+")

# Every process that a test starts inherits this from the environment, an orphan too.
RUN_MARK = f"WUKONG_TEST_RUN={uuid.uuid4().hex}"
# Processes of the standard library, and of loky, that live as long as their parent.
LIVES_WITH_PARENT = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "loky.backend.resource_tracker",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run what is marked `full` too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    kept, beyond = [], []
    for item in items:
        (beyond if item.get_closest_marker("full") else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=beyond)


def started_processes() -> list[psutil.Process]:
    """Every living process but this one that this run has started, orphans included."""
    found = []
    name, _, mark = RUN_MARK.partition("=")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.environ().get(name) != mark:
                continue
            if any(word in " ".join(process.cmdline()) for word in LIVES_WITH_PARENT):
                continue
            found.append(process)
    return found


def shared_files() -> set[str]:
    """Files in shared memory, but for those of living processes that this run has not started."""
    own = {os.getpid(), *(process.pid for process in started_processes())}
    made = [found for path in SHARED_MEMORY.iterdir() if (found := STORE_NAME.fullmatch(path.name))]
    return {
        found.group()
        for found in made
        if int(found["pid"]) in own or not psutil.pid_exists(int(found["pid"]))
    }


def end_hung_run(config: pytest.Config, test: str, timeout_s: float) -> None:
    """Dump all stacks, of this process and of those it started, and end the run."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    sys.stderr.write(f"\n{test} runs for more than {timeout_s} s; all stacks follow\n")
    faulthandler.dump_traceback(all_threads=True)
    processes = started_processes()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            sys.stderr.write(f"started: {process.pid} {process.status()} {process.cmdline()}\n")
            # The handler of faulthandler dumps the stacks, then the process ends.
            process.send_signal(signal.SIGABRT)
    sys.stderr.flush()
    for process in psutil.wait_procs(processes, timeout=3)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    if capture is not None:  # what they dumped went to the standard error that they inherited
        sys.stderr.write("".join(capture.read_global_capture()))
        sys.stderr.flush()
    os._exit(70)


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the run when this test hangs."""
    slow = request.node.get_closest_marker("slow") or request.node.get_closest_marker("full")
    timeout_s = SLOW_WATCHDOG_S if slow else WATCHDOG_S
    timer = threading.Timer(
        timeout_s, end_hung_run, (request.config, request.node.nodeid, timeout_s)
    )
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After the last test no process and no file in shared memory may be left."""
    name, _, mark = RUN_MARK.partition("=")
    os.environ[name] = mark
    files_before = shared_files()
    yield
    close_default_cluster()
    gc.collect()
    deadline = time.monotonic() + LEFTOVER_GRACE_S
    while True:
        processes = started_processes()
        files = shared_files() - files_before
        if not processes and not files:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    listed = [" ".join(process.cmdline()) or process.name() for process in processes]
    pytest.fail(f"left behind: processes {listed}, files in shared memory {sorted(files)}")


def close_default_cluster() -> None:
    """Close the warm cluster of `wukong.get`, which otherwise lives until this process ends."""
    client = sys.modules.get("wukong.client")
    if client is not None:
        client.close_default_cluster()


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """The endpoint of moto's server, one for all tests."""
    from moto_service import needs, start_moto

    needs("moto", "boto3", "aiobotocore")
    with start_moto() as url:
        yield url


@pytest.fixture(autouse=True, scope="module")
def no_client_of_another_module() -> None:
    """A client that another module has left open is not Dask's default scheduler here."""
    dask.config.config.pop("scheduler", None)
