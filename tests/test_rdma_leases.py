"""Agents, executors and clients, as real processes."""

import concurrent.futures
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.test_rdma_transports import certificate
from wukong.errors import (
    JobTimeout,
    LeaseError,
    LeaseExpired,
    LeaseLost,
    LeaseRefused,
    PayloadTooLarge,
    SecurityError,
    SerializationError,
)
from wukong.rdma.agent_main import AgentProcess
from wukong.rdma.client import lease
from wukong.rdma.greeting import Talk
from wukong.rdma.lease import Ask, Cause, Ended, LeaseId, Release, Renew, RenewRefused, Request
from wukong.rdma.lease_wire import agent_key, from_json, line_key, signed_receipt, to_json
from wukong.rdma.registry import open_secret, read_registrations
from wukong.rdma.tenancy import Connector, Tenancy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    directory = tmp_path_factory.mktemp("rdma") / "agents"
    with AgentProcess(directory, 2, ["--host", "127.0.0.1", "--preload", "numpy"]) as running:
        yield running


@pytest.fixture(autouse=True)
def all_is_free_again(agent: AgentProcess) -> Iterator[None]:
    yield
    gc.collect()
    wait_until(lambda: n_free(agent) == 2)


def n_free(agent: AgentProcess) -> int:
    return sum(found.n_free_cores for found in read_registrations(agent.directory))


def wait_until(is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < give_up_at, "it does not happen"
        time.sleep(0.01)


def double(x: Any) -> Any:
    return x * 2


def pid_after(delay_s: float = 0.0) -> int:
    time.sleep(delay_s)
    return os.getpid()


def raise_error(text: str) -> None:
    raise ZeroDivisionError(text)


def touch(path: str, delay_s: float) -> None:
    Path(path).touch()
    time.sleep(delay_s)


# ------------------------------------------------------------------ calls


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_a_lease_is_an_executor(agent: AgentProcess, kind: str) -> None:
    with lease(2, ttl_s=5, directory=agent.directory, transports=(kind,)) as executors:
        assert executors.transports == (kind, kind)
        assert executors.submit(double, 21).result(10) == 42
        assert executors.call(double, "ab") == "abab"
        assert executors.call(double, x=4) == 8
        assert executors.submit(lambda x, y=1: x + y, 1, y=5).result(10) == 6
        assert list(executors.map(double, range(200))) == list(range(0, 400, 2))
        futures = [executors.submit(double, n) for n in range(20)]
        done, _ = concurrent.futures.wait(futures, 10)
        assert len(done) == 20
        assert sorted(f.result() for f in concurrent.futures.as_completed(futures)) == list(
            range(0, 40, 2)
        )


def test_an_error_comes_back_as_itself(agent: AgentProcess) -> None:
    with lease(1, directory=agent.directory) as executors:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="why"):
                executors.call(raise_error, "why")
        assert isinstance(executors.submit(raise_error, "x").exception(10), ZeroDivisionError)
        with pytest.raises(SerializationError):
            executors.submit(double, (n for n in ()))
        assert executors.call(double, 1) == 2


def memory_of(array: Any) -> tuple[int, bool]:
    """Where an executor finds an argument, and whether that is shared memory."""
    at = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= at < last:
            return at, "memfd:wukong-rdma" in line
    raise AssertionError("an array outside of memory")


def test_a_large_argument_is_copied_once_and_one_of_the_arena_never(agent: AgentProcess) -> None:
    size_bytes = 64_000_000
    with lease(1, directory=agent.directory) as executors:
        array = np.ones(size_bytes // 8)
        assert executors.call(memory_of, array)[1]
        assert executors.copied_bytes == size_bytes
        own = executors.empty(size_bytes // 8)
        own[:] = 2
        assert executors.call(memory_of, own)[1]
        assert executors.call(np.sum, own) == 2 * own.size
        assert executors.copied_bytes == size_bytes
        del own
        doubled = executors.call(double, array)
        assert memory_of(doubled)[1]  # a view of the executor's memory
    assert doubled.sum() == 2 * array.size  # it outlives the lease
    del doubled


def test_results_that_the_client_holds_and_an_arena_that_is_too_small(agent: AgentProcess) -> None:
    with lease(1, directory=agent.directory, arena_bytes=1 << 20) as executors:
        for _ in range(20):  # each is let go of before the next but one
            assert executors.call(np.zeros, 50_000).size == 50_000
        with pytest.raises(PayloadTooLarge):
            executors.call(double, np.zeros(1 << 18))
        with pytest.raises(PayloadTooLarge):
            executors.call(np.zeros, 1 << 18)
        futures = [executors.submit(double, np.zeros(60_000)) for _ in range(10)]
        assert sum(f.result(20).size for f in futures[:1]) == 60_000
        del futures
        assert executors.call(double, 1) == 2


def test_a_call_that_has_not_begun_can_be_cancelled(agent: AgentProcess, tmp_path: Path) -> None:
    with lease(1, directory=agent.directory) as executors:
        running = executors.submit(touch, str(tmp_path / "first"), 0.2)
        waiting = [executors.submit(touch, str(tmp_path / f"later{n}"), 0) for n in range(6)]
        assert all(future.cancel() for future in waiting)
        running.result(10)
        with pytest.raises(concurrent.futures.CancelledError):
            waiting[0].result(10)
        assert executors.call(double, 1) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_deadline_ends_a_call_and_one_that_waits_does_not_begin(
    agent: AgentProcess, tmp_path: Path
) -> None:
    with lease(1, directory=agent.directory) as executors:
        executors.submit(pid_after, 0.6)
        running = executors.submit_within(0.3, pid_after, 0.6)
        waiting = executors.submit_within(0.1, touch, str(tmp_path / "late"), 0)
        for future in (running, waiting):
            with pytest.raises(JobTimeout):
                future.result(10)
        with pytest.raises(TimeoutError):
            executors.submit(pid_after, 0.2).result(0.01)
        executors.call(double, 1)
    assert list(tmp_path.iterdir()) == []


def test_an_executor_has_one_core_and_its_memory_is_limited(agent: AgentProcess) -> None:
    with lease(1, 200 << 20, directory=agent.directory) as executors:
        assert len(executors.submit(lambda: os.sched_getaffinity(0)).result(10)) == 1
        with pytest.raises(MemoryError):
            executors.submit(lambda: len(bytearray(1 << 30))).result(10)
        assert executors.call(double, 1) == 2


# ------------------------------------------------------------------ leases


def test_a_refusal_says_what_there_is(agent: AgentProcess, tmp_path: Path) -> None:
    with pytest.raises(LeaseRefused, match="2 of 2 cores"):
        lease(3, directory=agent.directory)
    with pytest.raises(LeaseRefused, match="no agent is registered"):
        lease(1, directory=tmp_path / "nobody")
    with pytest.raises(ValueError, match="no sense"):
        lease(0, directory=agent.directory)


def test_a_lease_lives_as_long_as_it_is_renewed_and_its_use_is_signed(agent: AgentProcess) -> None:
    with lease(1, ttl_s=0.6, directory=agent.directory) as executors:
        time.sleep(1.5)
        assert executors.call(double, 1) == 2
    (receipt,) = executors.receipts
    signature = receipt.pop("signature")
    ended = from_json(receipt, of_client=False)
    assert isinstance(ended, Ended)
    assert ended.cause is Cause.RELEASED
    assert ended.usage.n_calls == 1
    assert ended.core_s > 1.4
    secret = open_secret(agent.directory)
    assert signed_receipt(secret, ended) == signature
    assert signed_receipt(secret, replace(ended, core_s=0.0)) != signature
    with pytest.raises(LeaseError):
        executors.submit(double, 1)


class Client:
    """A client that says what it likes."""

    def __init__(self, agent: AgentProcess) -> None:
        (self.found,) = read_registrations(agent.directory)
        self.secret = open_secret(agent.directory)
        self.connector = Connector(self.secret, ("tcp",), None, None, "")  # type: ignore[arg-type]
        self.sock = self.connector.reach(self.found.unix, None, False, True)
        self.talk = Talk(self.sock, agent_key(self.secret), is_server=False)

    def say(self, message: Any) -> None:
        self.talk.send(to_json(message))

    def hear(self) -> Any:
        message, _ = self.talk.receive()
        message.pop("signature", None)
        return from_json(message, of_client=False)

    def reach(self, seat: Any, lease_id: str, key: bytes) -> None:
        address = json.loads(seat.address)
        sock = self.connector.reach(address["unix"], None, False, True)
        try:
            talk = Talk(sock, key, is_server=False)
            talk.send({"lease": lease_id, "transport": "shm", "arena_bytes": 4096})
            talk.receive()
        finally:
            sock.close()


def test_an_unrenewed_lease_expires_and_its_executor_is_killed(agent: AgentProcess) -> None:
    client = Client(agent)
    client.say(Ask("expiry", Request(2, 0, 0.3)))
    granted = client.hear()
    assert n_free(agent) == 0
    ended = client.hear()
    assert (ended.lease, ended.cause) == (granted.lease, Cause.EXPIRED)
    client.say(Renew(granted.lease, granted.epoch, granted.key, 1))
    assert client.hear() == RenewRefused(granted.lease, granted.epoch)
    for seat in granted.seats:
        with pytest.raises(ConnectionRefusedError):
            client.reach(seat, granted.lease, line_key(client.secret, granted.lease, seat.epoch))
    client.sock.close()


def test_forged_stale_and_foreign_leases_are_refused(agent: AgentProcess) -> None:
    client = Client(agent)
    client.say(Ask("forgery", Request(1, 0, 5.0)))
    granted = client.hear()
    (seat,) = granted.seats
    for lease_id, epoch, key in (
        (granted.lease, granted.epoch, b"forged"),
        (granted.lease, granted.epoch - 1, granted.key),
        (LeaseId("0" * 32), granted.epoch, granted.key),
    ):
        client.say(Renew(lease_id, epoch, key, 1))
        assert client.hear() == RenewRefused(lease_id, epoch)
        client.say(Release(lease_id, epoch, key))
    for key in (
        b"forged",
        line_key(client.secret, granted.lease, seat.epoch - 1),
        line_key(client.secret, LeaseId("0" * 32), seat.epoch),
    ):
        with pytest.raises(LeaseLost):
            client.reach(seat, granted.lease, key)
    good = line_key(client.secret, granted.lease, seat.epoch)
    with pytest.raises(LeaseLost):
        client.reach(seat, "another", good)
    client.reach(seat, granted.lease, good)
    client.sock.close()


def test_who_does_not_know_the_secret_is_cut_off(agent: AgentProcess) -> None:
    client = Client(agent)
    for key in (b"guessed", agent_key(b"another directory's")):
        sock = client.connector.reach(client.found.unix, None, False, True)
        with pytest.raises((LeaseLost, SecurityError)):
            Talk(sock, key, is_server=False)
        sock.close()
    client.say(Ask("still there", Request(1, 0, 5.0)))
    assert client.hear().ttl_s == 5.0
    client.sock.close()


def test_a_recorded_conversation_cannot_be_replayed(agent: AgentProcess) -> None:
    client = Client(agent)
    client.sock.close()
    recorded = client.talk.parley.seal(to_json(Ask("replay", Request(1, 0, 5.0))))
    other = Client(agent)
    other.sock.sendall(recorded)
    with pytest.raises(LeaseLost):
        other.hear()
    other.sock.close()


def test_garbage_ends_only_its_own_connection(agent: AgentProcess) -> None:
    client = Client(agent)
    for garbage in (os.urandom(1000), b"\xff" * 100, b""):
        sock = client.connector.reach(client.found.unix, None, False, True)
        sock.sendall(garbage)
        sock.close()
    for message in ({"kind": "Ask"}, {"kind": "Ended"}, {"kind": "Renew", "lease": 1}):
        liar = Client(agent)
        liar.talk.send(message)
        with pytest.raises(LeaseLost):
            liar.hear()
        liar.sock.close()
    client.sock.close()
    with lease(2, directory=agent.directory) as executors:
        assert executors.call(double, 1) == 2


def test_a_socket_of_strangers_does_not_keep_a_client_out(agent: AgentProcess) -> None:
    client = Client(agent)
    client.say(Ask("strangers", Request(1, 0, 20.0)))
    granted = client.hear()
    (seat,) = granted.seats
    address = json.loads(seat.address)
    stranger = client.connector.reach(address["unix"], None, False, True)
    stranger.sendall(os.urandom(64))
    client.reach(seat, granted.lease, line_key(client.secret, granted.lease, seat.epoch))
    stranger.close()
    client.sock.close()


# ------------------------------------------------------------------ deaths


def test_a_killed_executor_fails_its_calls_and_is_replaced(agent: AgentProcess) -> None:
    with lease(1, directory=agent.directory) as executors:
        pid = executors.submit(pid_after).result(10)
        lost = executors.submit(pid_after, 5.0)
        time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LeaseLost):
            lost.result(10)
        assert executors.submit(pid_after).result(10) != pid


def test_a_line_that_is_cut_as_its_reader_begins_fails_its_calls(
    agent: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lease(1, directory=agent.directory) as executors:
        lost = executors.submit(pid_after, 5.0)
        (seat,) = executors._seats
        transport = seat.line.transport
        filenos = transport.filenos
        cutter = threading.Thread(target=executors._lost, args=(seat, LeaseLost("cut")))

        def filenos_and_cut() -> tuple[int, ...]:
            found = filenos()
            if cutter.ident is None:
                cutter.start()
                cutter.join(0.3)
            return found

        monkeypatch.setattr(transport, "filenos", filenos_and_cut)
        with pytest.raises(LeaseLost, match="cut"):
            lost.result(10)
        cutter.join()


def test_a_call_that_may_be_repeated_outlives_its_executor(
    agent: AgentProcess, tmp_path: Path
) -> None:
    def die_once(path: str) -> int:
        if not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    with lease(1, directory=agent.directory, retries=1) as executors:
        assert executors.submit(die_once, str(tmp_path / "died")).result(10) > 0


def test_a_killed_client_leaves_nothing(agent: AgentProcess) -> None:
    script = (
        "import sys, time, os; from wukong.rdma.client import lease\n"
        "from pathlib import Path\n"
        "executors = lease(2, directory=Path(sys.argv[1]))\n"
        "print(executors.submit(os.getpid).result(), flush=True)\n"
        "executors.submit(time.sleep, 60); time.sleep(60)\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", script, str(agent.directory)], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    client.kill()
    client.wait()
    client.stdout.close()
    wait_until(lambda: n_free(agent) == 2)
    wait_until(lambda: not psutil.pid_exists(pid))


def test_a_killed_agent_fails_what_it_had_leased_and_leaves_nothing(tmp_path: Path) -> None:
    with AgentProcess(tmp_path / "agents", 1, ["--preload", "numpy"]) as doomed:
        with lease(1, directory=doomed.directory) as executors:
            executors.submit(pid_after).result(10)
            children = psutil.Process(doomed.process.pid).children()
            lost = executors.submit(pid_after, 30.0)
            doomed.process.kill()
            with pytest.raises(LeaseError):
                lost.result(10)
            with pytest.raises(LeaseError):
                executors.submit(pid_after).result(10)
        _, alive = psutil.wait_procs(children, 10)
        assert not alive
        doomed.process.wait()
        assert read_registrations(doomed.directory) == []


def test_an_agent_that_is_told_to_end_gives_its_leases_grace(tmp_path: Path) -> None:
    arguments = ["--preload", "numpy", "--grace-s", "5"]
    with (
        AgentProcess(tmp_path / "agents", 1, arguments) as ending,
        lease(1, directory=ending.directory) as executors,
    ):
        running = executors.submit(pid_after, 0.5)
        time.sleep(0.1)
        ending.process.terminate()
        assert running.result(10) > 0
        wait_until(lambda: executors.n_executors == 0)


def test_a_client_that_cannot_renew_stops_before_its_agent(
    agent: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lease(1, ttl_s=0.5, directory=agent.directory) as executors:
        # Nothing reaches the agent any more, and the client does not know.
        (tenancy,) = executors._tenancies
        monkeypatch.setattr(Tenancy, "_say", lambda self, message: None)
        running = executors.submit(pid_after, 10.0)
        with pytest.raises((LeaseExpired, LeaseLost)):
            running.result(10)
        assert tenancy.is_over


def test_tls_is_checked(tmp_path: Path) -> None:
    cert = str(certificate(tmp_path))
    arguments = ["--preload", "numpy", "--host", "127.0.0.1", "--cert", cert]
    with AgentProcess(tmp_path / "agents", 1, arguments) as secure:
        given: dict[str, Any] = {"directory": secure.directory, "transports": ("tcp",)}
        with lease(1, ca=cert, **given) as executors:
            array = np.arange(100_000)
            np.testing.assert_array_equal(executors.call(double, array), array * 2)
        wait_until(lambda: n_free(secure) == 1)
        with pytest.raises(LeaseError):
            lease(1, timeout_s=2.0, **given)
