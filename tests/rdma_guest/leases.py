"""Leases over verbs, run in a guest by `python -m tests.rdma_guest`: agents, executors, deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.rdma_guest.inside import resources
from wukong.errors import LeaseError, LeaseLost
from wukong.rdma import AgentProcess, agent_main, lease
from wukong.rdma.ports import Port
from wukong.rdma.registry import read_registrations
from wukong.rdma.transport_verbs import missing
from wukong.rdma.verbs import open_pair

WAIT_S = 60.0
ARENA_BYTES = 8 << 20
OPTIONS = ["--host", "127.0.0.1", "--preload", "numpy", "--spares", "1"]
NOTHING = {"pd": 0, "cq": 0, "qp": 0, "mr": 0}


# A busy machine gives the guest a part of a processor.
agent_main.START_S = WAIT_S


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    directory = tmp_path_factory.mktemp("rdma") / "agents"
    # The guest has one processor, and an agent leases each of its cores once.
    with AgentProcess(directory, 1, OPTIONS) as running, AgentProcess(directory, 1, OPTIONS):
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(agent: AgentProcess) -> Iterator[None]:
    yield
    deadline = time.monotonic() + WAIT_S
    while resources() != NOTHING or n_free(agent) != 2:
        assert time.monotonic() < deadline, (resources(), n_free(agent))
        time.sleep(0.1)


def n_free(agent: AgentProcess) -> int:
    return sum(found.n_free_cores for found in read_registrations(agent.directory))


def leased(agent: AgentProcess, n: int = 1, **options: Any) -> Any:
    options = {"transports": ("verbs", "tcp"), "arena_bytes": ARENA_BYTES, **options}
    return lease(n, directory=agent.directory, **options)


def double(x: Any) -> Any:
    return x * 2


def own_pid(_: int = 0) -> int:
    return os.getpid()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def total(array: np.ndarray) -> float:
    return float(array.sum())


def test_an_agent_with_a_device_offers_verbs(agent: AgentProcess) -> None:
    found = read_registrations(agent.directory)
    assert [each.transports for each in found] == [("shm", "verbs", "tcp")] * 2


def test_thousands_of_calls_over_verbs(agent: AgentProcess) -> None:
    with leased(agent, 2) as executors:
        assert executors.transports == ("verbs", "verbs")
        assert list(executors.map(double, range(2000))) == list(range(0, 4000, 2))
        for number in range(500):
            assert executors.call(double, number) == 2 * number


def test_large_arrays_travel_both_ways(agent: AgentProcess) -> None:
    with leased(agent, arena_bytes=80 << 20) as executors:
        array = np.random.default_rng(1).standard_normal(8 << 20)
        assert executors.transports == ("verbs",)
        copied = executors.copied_bytes
        assert executors.call(total, array) == float(array.sum())
        assert executors.copied_bytes - copied == array.nbytes
        part = array[: 1 << 20]
        for _ in range(20):
            assert np.array_equal(executors.call(double, part), 2 * part)


def test_a_killed_executor_fails_its_call_and_another_takes_its_place(agent: AgentProcess) -> None:
    with leased(agent) as executors:
        pid = executors.call(own_pid)
        future = executors.submit(sleep, WAIT_S)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LeaseError):
            future.result(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while executors.n_executors == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert executors.submit(own_pid).result(WAIT_S) != pid


def test_a_killed_client_leaves_no_queue_pairs(agent: AgentProcess, tmp_path: Path) -> None:
    program = (
        "import sys, time, os\n"
        "from tests.rdma_guest.leases import double, lease\n"
        f"held = lease(2, directory={str(agent.directory)!r}, transports=('verbs',),"
        f" arena_bytes={ARENA_BYTES})\n"
        "assert held.call(double, 4) == 8\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + WAIT_S
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    assert resources()["qp"] == 4
    process.kill()
    process.wait()


def test_an_expired_lease_loses_its_queue_pairs(agent: AgentProcess) -> None:
    # Renewing ends with the client's thread: a stopped process is what a partition looks like.
    program = (
        "import os, signal\n"
        "from tests.rdma_guest.leases import double, lease\n"
        f"held = lease(1, ttl_s=20.0, directory={str(agent.directory)!r}, transports=('verbs',),"
        f" arena_bytes={ARENA_BYTES})\n"
        "assert held.call(double, 4) == 8\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + WAIT_S
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert resources()["qp"] == 2
    deadline = time.monotonic() + WAIT_S
    while resources()["qp"] != 1 or n_free(agent) != 2:  # the stopped client's own is left
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()


def test_a_killed_agent_leaves_no_queue_pairs(tmp_path: Path) -> None:
    running = AgentProcess(tmp_path / "agents", 1, OPTIONS)
    with running, leased(running) as executors:
        assert executors.transports == ("verbs",)
        running.process.kill()
        with pytest.raises(LeaseError):
            executors.submit(sleep, WAIT_S).result(WAIT_S)


def test_without_its_device_a_client_goes_on_over_tcp(agent: AgentProcess) -> None:
    with leased(agent, retries=3) as executors:
        assert executors.transports == ("verbs",)
        subprocess.run(["ip", "link", "set", "rd0", "down"], check=True)
        try:
            deadline = time.monotonic() + WAIT_S
            while executors.transports != ("tcp",):
                assert time.monotonic() < deadline, executors.transports
                time.sleep(0.1)
            assert executors.submit(double, 21).result(WAIT_S) == 42
        finally:
            subprocess.run(["ip", "link", "set", "rd0", "up"], check=True)


def test_a_device_that_speaks_iwarp_is_named_and_left_alone(agent: AgentProcess) -> None:
    for command in ("link del rxe0", "link add siw0 type siw netdev rd0"):
        subprocess.run(["rdma", *command.split()], check=True)
    try:
        assert "siw0: iWARP" in missing()
        # The device exists, and its library; the kernel wants the connection manager.
        port = Port("siw0", 1, 0, bytes(10) + b"\xff\xff" + bytes([198, 18, 0, 1]), 0)
        pair = open_pair(port, 8)
        with pytest.raises(LeaseLost, match="no way from siw0"):
            pair.connect(pair.address)
        pair.close()
        with leased(agent) as executors:
            assert executors.transports == ("tcp",)
            assert executors.call(double, 21) == 42
    finally:
        for command in ("link del siw0", "link add rxe0 type rxe netdev rd0"):
            subprocess.run(["rdma", *command.split()], check=True)
