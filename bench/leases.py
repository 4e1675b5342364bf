"""Leased executors beside what the machine can do: ratios, counted copies, and what is left.

The two sides of a ratio take turns in every round: whatever else the machine does hits both.
The bare ping-pong has no call, no pickle and no future: it moves 1 KiB there and back. Its peer is
in a session of its own, as executors are in their agent's: Linux shares cores out by sessions.
"""

import ctypes
import mmap
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import micro
from bench.noops import back
from bench.present import Quantity
from wukong import LeasedCluster, LocalCluster
from wukong.rdma import AgentProcess, lease
from wukong.rdma.registry import read_registrations

PAYLOAD = bytes(1024)
N_CALLS = 2_000
N_SLOW_CALLS = 500
N_KILLS = 200
LARGE_BYTES = 64_000_000
WORD = 8
REPLY_AT = 8192
LEFT_S = 10.0
_PR_SET_PDEATHSIG = 1


def p50_us(call: Callable[[], object], n_calls: int) -> float:
    """The median time of a call, in microseconds."""
    return statistics.median(times_us(call, n_calls))


def times_us(call: Callable[[], object], n_calls: int) -> list[float]:
    """The time of each call, in microseconds."""
    clock, found = time.perf_counter, []
    for _ in range(n_calls):
        begun_at = clock()
        call()
        found.append((clock() - begun_at) * 1e6)
    return found


@contextmanager
def memory_ping_pong() -> Iterator[Callable[[], bytes]]:
    """The least that two Python processes need to exchange 1 KiB through memory, polling."""
    memory = memoryview(mmap.mmap(-1, 4 * REPLY_AT))
    words = memory.cast("Q")
    back = REPLY_AT // WORD
    size = len(PAYLOAD)
    pid = os.fork()
    if pid == 0:
        _be_peer()
        turn = 0
        while True:
            turn += 1
            while words[0] != turn:
                if words[1]:
                    os._exit(0)
            data = bytes(memory[64 : 64 + size])
            memory[REPLY_AT + 64 : REPLY_AT + 64 + size] = data
            words[back] = turn
    turn = 0

    def exchange() -> bytes:
        nonlocal turn
        turn += 1
        memory[64 : 64 + size] = PAYLOAD
        words[0] = turn
        while words[back] != turn:
            pass
        return bytes(memory[REPLY_AT + 64 : REPLY_AT + 64 + size])

    try:
        yield exchange
    finally:
        words[1] = 1
        os.waitpid(pid, 0)


@contextmanager
def socket_ping_pong() -> Iterator[Callable[[], bytes]]:
    """The least that two Python processes need to exchange 1 KiB through TCP."""
    size = len(PAYLOAD)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for each in (ours, theirs):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pid = os.fork()
    if pid == 0:
        _be_peer()
        ours.close()
        while data := theirs.recv(size):
            theirs.sendall(data)
        os._exit(0)
    theirs.close()

    def exchange() -> bytes:
        ours.sendall(PAYLOAD)
        return ours.recv(size)

    try:
        yield exchange
    finally:
        ours.close()
        os.waitpid(pid, 0)


def _be_peer() -> None:
    """In a session of its own; dies with the bench, since nothing else would reach it there."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@contextmanager
def agent(n_cores: int = 1, *arguments: str) -> Iterator[Path]:
    """An agent of this machine; yields its directory."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "agents"
        with AgentProcess(directory, n_cores, arguments):
            yield directory


def shared_memory(n_rounds: int) -> list[Quantity]:
    """A no-op call over shared memory, hot, beside a bare ping-pong and a process pool."""
    bare, pooled, times = [], [], []
    with (
        agent() as directory,
        ProcessPoolExecutor(1) as pool,
        lease(1, directory=directory, hot=True, transports=("shm",)) as executors,
        memory_ping_pong() as exchange,
    ):
        pool.submit(back, PAYLOAD).result()
        executors.submit(back, PAYLOAD).result()
        for _ in range(n_rounds):
            call_us = p50_us(lambda: executors.call(back, PAYLOAD), N_CALLS)
            pool_us = p50_us(lambda: pool.submit(back, PAYLOAD).result(), N_SLOW_CALLS)
            times.append(call_us)
            bare.append(call_us / p50_us(exchange, N_CALLS))
            pooled.append(call_us / pool_us)
    return [
        Quantity("no-op call, shm, hot, p50", tuple(times), "us", 1_000),
        Quantity("the same / a bare ping-pong in memory", tuple(bare), "x", 3),
        Quantity("the same / ProcessPoolExecutor", tuple(pooled), "x", 0.1),
    ]


def tcp(n_rounds: int) -> list[Quantity]:
    """A no-op call over TCP beside a bare ping-pong on a socket."""
    ratios, times = [], []
    with (
        agent(1, "--host", "127.0.0.1") as directory,
        lease(1, directory=directory, transports=("tcp",)) as executors,
        socket_ping_pong() as exchange,
    ):
        executors.submit(back, PAYLOAD).result()
        for _ in range(n_rounds):
            call_us = p50_us(lambda: executors.call(back, PAYLOAD), N_SLOW_CALLS)
            times.append(call_us)
            ratios.append(call_us / p50_us(exchange, N_SLOW_CALLS))
    return [
        Quantity("no-op call, tcp, p50", tuple(times), "us", 1_000),
        Quantity("the same / a bare ping-pong on a socket", tuple(ratios), "x", 3),
    ]


def warm(n_rounds: int) -> list[Quantity]:
    """The tail of warm calls: executors sleep between them."""
    tails = []
    with agent() as directory, lease(1, directory=directory) as executors:
        executors.submit(back, PAYLOAD).result()
        for _ in range(n_rounds):
            found = sorted(times_us(lambda: executors.call(back, PAYLOAD), N_CALLS))
            tails.append(found[int(0.99 * N_CALLS)] / found[N_CALLS // 2])
    return [Quantity("warm calls, p99 / p50", tuple(tails), "x", 10)]


def address_of(array: npt.NDArray[np.float64]) -> bool:
    """Whether an array lies in memory that processes share: it was not copied then."""
    at = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= at < last:
            return "memfd:wukong-rdma" in line
    return False


def copies(_: int) -> list[Quantity]:
    """Copies of a 64 MB argument; exact, so counted once."""
    with agent() as directory, lease(1, directory=directory) as executors:
        array = np.ones(LARGE_BYTES // 8)
        in_place = executors.call(address_of, array)
        by_client = executors.copied_bytes / LARGE_BYTES
        own = executors.empty(LARGE_BYTES // 8)
        own[:] = 1
        in_place &= executors.call(address_of, own)
        of_own = executors.copied_bytes / LARGE_BYTES - by_client
        del own
    return [
        Quantity("copies of a 64 MB argument in the client", (by_client,), "", 1),
        Quantity("of one that was made in the arena", (of_own,), "", 0),
        Quantity("copies in the executor", (0.0 if in_place else 1.0,), "", 0),
    ]


def cold(n_rounds: int) -> list[Quantity]:
    """From wish to first answer, with a spare at hand, beside the start of an interpreter."""
    ratios = []
    with agent() as directory:
        for _ in range(n_rounds + 1):
            begun_at = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import numpy"], check=True)
            start_s = time.perf_counter() - begun_at
            time.sleep(0.2)  # spares are forked when there is nothing else to do
            begun_at = time.perf_counter()
            with lease(1, directory=directory) as executors:
                executors.submit(back, PAYLOAD).result()
                lease_s = time.perf_counter() - begun_at
            ratios.append(lease_s / start_s)
            _wait_free(directory, 1)
    # The first lease imports what clients need.
    return [Quantity("cold lease / start of Python with numpy", tuple(ratios[1:]), "x", 0.2)]


def graphs(n_rounds: int) -> list[Quantity]:
    """Micro graphs on leased executors beside the same on a pool of processes."""
    quantities = []
    with (
        agent(2) as directory,
        LeasedCluster(2, agents=directory, fallback=None) as leased,
        LocalCluster(2) as local,
    ):
        for case in micro.cases("tasks"):
            ratios = []
            for number in range(n_rounds + 1):
                seconds = []
                for cluster in (leased, local) if number % 2 else (local, leased):
                    built = [case.build(f"{number} {call}") for call in range(case.n_calls)]
                    begun_at = time.perf_counter()
                    for graph, keys in built:
                        result = cluster.get(graph, keys)
                    seconds.append(time.perf_counter() - begun_at)
                    case.check(result)
                ratios.append(seconds[0] / seconds[1] if number % 2 else seconds[1] / seconds[0])
            quantities.append(
                Quantity(f"{case.name}: leased / process pool", tuple(ratios[1:]), "x", 1.0)
            )
    return quantities


# ------------------------------------------------------------------ kills

VICTIM = """
import sys, time, os
from pathlib import Path
from wukong.rdma import lease
from bench.noops import back
executors = lease(1, 0, 2.0, directory=Path(sys.argv[1]))
print(executors.submit(os.getpid).result(), flush=True)
while True:
    executors.submit(bytes, 100_000).result(); time.sleep(0.001)
"""


def kills(_: int) -> list[Quantity]:
    """Kill clients, executors and agents at random moments; count what is left."""
    os.environ["WUKONG_BENCH"] = str(os.getpid())
    rng = random.Random(1)
    before = _segments()
    n_left = 0
    n_kills = 0
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "agents"
        running = AgentProcess(directory, 2)
        while n_kills < N_KILLS:
            client = subprocess.Popen(
                [sys.executable, "-c", VICTIM, str(directory)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert client.stdout is not None
            executor = int(client.stdout.readline() or 0)
            # One client sees several executors die; every tenth round takes the agent too.
            for _ in range(rng.randint(3, 8)):
                time.sleep(rng.uniform(0, 0.02))
                n_kills += executor > 0 and _kill_child(running.process.pid, rng)
            if rng.random() < 0.1:
                running.process.kill()
                running.close()
                n_kills += 1
                running = AgentProcess(directory, 2)
            client.kill()
            client.wait()
            client.stdout.close()
            n_kills += 1
        n_left += not _wait_free(directory, 2)
        running.close()
        n_left += len(list((directory / "agents").iterdir()))
    n_left += len(_processes()) + max(0, len(_segments()) - len(before))
    return [
        Quantity("kills of clients, executors, agents", (float(n_kills),), "", 10_000),
        Quantity("leases, processes, segments left", (float(n_left),), "", 0),
    ]


def _kill_child(agent_pid: int, rng: random.Random) -> bool:
    """Kill one of an agent's processes, spare or executor."""
    listed = Path(f"/proc/{agent_pid}/task/{agent_pid}/children")
    children = listed.read_text().split() if listed.exists() else []
    if not children:
        return False
    try:
        os.kill(int(rng.choice(children)), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _wait_free(directory: Path, n_cores: int) -> bool:
    give_up_at = time.monotonic() + LEFT_S
    while time.monotonic() < give_up_at:
        if sum(found.n_free_cores for found in read_registrations(directory)) == n_cores:
            return True
        time.sleep(0.005)
    return False


def _segments() -> list[str]:
    return [path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("wukong-")]


def _processes() -> list[int]:
    """Living processes that this one, or what it started, has left: all in its environment."""
    time.sleep(0.5)
    mine = f"WUKONG_BENCH={os.getpid()}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int(path.name) != os.getpid() and mine in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


LEASES: dict[str, Callable[[int], list[Quantity]]] = {
    "shm": shared_memory,
    "tcp": tcp,
    "warm": warm,
    "copies": copies,
    "cold": cold,
    "graphs": graphs,
    "kills": kills,
}
