"""Agents in the jobs of a real Slurm, which the tests start and stop."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import needs
from tests.slurm_cluster import SlurmCluster
from wukong.errors import LeaseError, LeaseRefused
from wukong.rdma.batch import BatchAgents, SlurmAgents

needs("parsl")
pytestmark = pytest.mark.slow

READY_S = 60.0
KILL_WAIT_S = 8
"""From Slurm's SIGTERM to its SIGKILL."""
GRACE_S = 3.0
IDLE_S = 1.0
BEGUN_S = 0.3
"""After that a call has begun."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(n_nodes=2, grace_s=KILL_WAIT_S)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster
    cluster.close()


@pytest.fixture
def make(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Callable[..., SlurmAgents]]:
    made = []

    def start(nodes: int = 2, **options: object) -> SlurmAgents:
        settings: dict[str, object] = {
            "partition": "spare",
            "walltime": "00:10:00",
            "directory": tmp_path / "agents",
            "host": "127.0.0.1",
            "poll_s": 0.3,
            "idle_s": 3600.0,
            "grace_s": GRACE_S,
            # All nodes are this machine: each has one of its cores, and few spares.
            "options": ("--cores", "0", "--spares", "1", "--preload", "numpy"),
            **options,
        }
        made.append(SlurmAgents(nodes=nodes, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for agents in made:
        agents.close()
    slurm.wait_idle(slurm.n_nodes)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_S
    while not is_true():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def double(x: int) -> int:
    return 2 * x


def node() -> str:
    return os.environ["SLURMD_NODENAME"]


def work(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


def test_nodes_come_while_work_waits_and_go_when_they_are_idle(
    slurm: SlurmCluster, make: Callable[..., SlurmAgents]
) -> None:
    agents = make(idle_s=IDLE_S)
    assert slurm.jobs() == {}
    with agents.lease(1, timeout_s=READY_S) as first:
        assert first.submit(double, 4).result(READY_S) == 8
        assert len(agents.jobs) == 1
        with agents.lease(1, timeout_s=READY_S) as second:
            assert {first.call(node), second.call(node)} == {"node1", "node2"}
            assert len(agents.jobs) == 2
    wait_until(lambda: agents.jobs == () and slurm.jobs() == {})


def test_more_than_the_nodes_that_there_may_be_is_refused_in_the_end(
    make: Callable[..., SlurmAgents],
) -> None:
    agents = make(nodes=1)
    with pytest.raises(LeaseRefused, match=r"not in 3\.0 s, with 1 jobs queued or running"):
        agents.lease(2, timeout_s=3.0)


def test_a_cancelled_job_gives_its_lease_grace_and_another_one_follows(
    slurm: SlurmCluster, make: Callable[..., SlurmAgents]
) -> None:
    agents = make()
    with agents.lease(1, timeout_s=READY_S) as executors:
        running = executors.submit(work, 2.0)
        time.sleep(BEGUN_S)
        (job,) = agents.jobs
        slurm.command("scancel", job)
        # The call that had begun ends within the grace; new ones find no executor.
        assert running.result(READY_S) == "done"
        wait_until(lambda: executors.n_executors == 0)
        with pytest.raises(LeaseError):
            executors.submit(double, 1).result(READY_S)
    with agents.lease(1, timeout_s=READY_S) as executors:
        assert executors.submit(double, 4).result(READY_S) == 8
        assert job not in agents.jobs


def test_a_preempted_job_revokes_its_lease_with_grace(
    slurm: SlurmCluster, make: Callable[..., SlurmAgents]
) -> None:
    agents = make(nodes=1)
    with agents.lease(1, timeout_s=READY_S) as executors:
        running = executors.submit(work, 2.0)
        too_long = executors.submit(work, READY_S)
        time.sleep(BEGUN_S)
        urgent = slurm.command(
            "sbatch",
            "--parsable",
            "--partition=urgent",
            "--nodes=2",
            "--output=/dev/null",
            "--wrap=sleep 1",
        ).strip()
        assert running.result(READY_S) == "done"
        with pytest.raises(LeaseError):
            too_long.result(READY_S)
        wait_until(lambda: urgent not in slurm.jobs())
    # Opportunistic: the next one takes the node as soon as it is free again.
    with agents.lease(1, timeout_s=READY_S) as executors:
        assert executors.submit(double, 4).result(READY_S) == 8


def test_jobs_whose_agent_does_not_come_up_are_not_asked_for_again_and_again(
    slurm: SlurmCluster, make: Callable[..., SlurmAgents]
) -> None:
    agents = make(options=("--no-such-option",))
    with pytest.raises(LeaseRefused, match="3 jobs in a row have ended before their agents"):
        agents.lease(1, timeout_s=READY_S)


def test_a_closed_one_gives_back_all_nodes(
    slurm: SlurmCluster, make: Callable[..., SlurmAgents]
) -> None:
    agents = make()
    agents.scale(2)
    wait_until(lambda: list(slurm.jobs().values()) == ["R", "R"])
    agents.close()
    wait_until(lambda: slurm.jobs() == {})
    with pytest.raises(LeaseRefused, match="closed"):
        agents.lease(1)


def test_the_command_names_what_the_shell_has_to_read(
    make: Callable[..., SlurmAgents], tmp_path: Path
) -> None:
    agents: BatchAgents = make(host="$(hostname)")
    command = agents.command("job-1")
    assert command.startswith("exec env ")
    assert command.endswith('--host "$(hostname)"')
    assert f"--directory {tmp_path / 'agents'} --name job-1" in command
