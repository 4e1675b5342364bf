"""A real Slurm for tests: several nodes on this machine, nothing of /etc used, stopped by pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

READY_S = 30.0
STOP_S = 10.0
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """\
ClusterName=wukong
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/socket/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=10000,bf_interval=1,\
batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
MpiDefault=none
ReturnToService=2
SlurmdTimeout=30
KillWait={grace_s}
MinJobAge=300
InactiveLimit=0
SlurmdParameters=config_overrides
{nodes}
PartitionName=spare Nodes=node[1-{n_nodes}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=node[1-{n_nodes}] MaxTime=INFINITE State=UP PriorityTier=10 \
PreemptMode=OFF
"""


def find_daemon(name: str) -> str:
    """The path of a daemon; the test is skipped when it is missing, but never in CI."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    if found is None or os.geteuid() != 0:
        why = f"Slurm's tests need root and {name} (Debian: apt install slurm-wlm munge)"
        assert os.environ.get("CI") != "true", why
        pytest.skip(why)
    return found


class SlurmCluster:
    """Nodes of one core and two partitions: jobs of `urgent` take the nodes of those of `spare`.

    Args:
        n_nodes: how many.
        grace_s: from the notice (SIGTERM) to the end of a job that is cancelled or preempted.
    """

    def __init__(self, n_nodes: int = 3, grace_s: int = 5) -> None:
        munged, slurmctld, slurmd = (find_daemon(name) for name in DAEMONS)
        self.n_nodes = n_nodes
        self.folder = Path(tempfile.mkdtemp(prefix="wukong-slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._configure(grace_s)
            socket_path = self.folder / "socket" / "munge"
            _run(
                *(munged, "--force", f"--key-file={self.folder}/munge/key"),
                *(f"--socket={socket_path}", f"--pid-file={self.folder}/munged.pid"),
                *(f"--log-file={self.folder}/munge/log", f"--seed-file={self.folder}/munge/seed"),
            )
            _run(slurmctld, "-c", "-f", self.environment["SLURM_CONF"])
            for number in range(1, n_nodes + 1):
                _run(slurmd, "-N", f"node{number}", "-f", self.environment["SLURM_CONF"])
            self.wait_idle(n_nodes)
        except BaseException:
            self.close()
            raise

    def _configure(self, grace_s: int) -> None:
        self.folder.chmod(0o755)
        for name, mode in {"munge": 0o700, "socket": 0o711, "state": 0o755}.items():
            (self.folder / name).mkdir(mode=mode)
            (self.folder / name).chmod(mode)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(1 + self.n_nodes)
        nodes = [
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]}"
            " CPUs=1 RealMemory=1024 State=UNKNOWN"
            for number in range(1, self.n_nodes + 1)
        ]
        for number in range(1, self.n_nodes + 1):
            (self.folder / f"spool.node{number}").mkdir()
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                port=ports[0],
                folder=self.folder,
                nodes="\n".join(nodes),
                n_nodes=self.n_nodes,
                grace_s=grace_s,
            )
        )

    def command(self, *arguments: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(
            arguments,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def jobs(self) -> dict[str, str]:
        """State of each living job by its id, as R or PD."""
        lines = self.command("squeue", "--noheader", "--format=%i %t").splitlines()
        return dict(line.split() for line in lines)  # type: ignore[misc]

    def wait_idle(self, n_nodes: int, timeout_s: float = READY_S) -> None:
        """Wait until so many nodes have nothing to do."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                shown = self.command("sinfo", "-h", "-t", "idle", "-p", "spare", "-o", "%D").strip()
                if shown and int(shown.splitlines()[0]) >= n_nodes:
                    return
            assert time.monotonic() < deadline, f"Slurm does not come to rest; see {self.folder}"
            time.sleep(0.1)

    def close(self) -> None:
        """End all jobs, then the daemons, and remove what they wrote."""
        with contextlib.suppress(subprocess.CalledProcessError, AssertionError):
            self.command("scancel", "--user=root", "--full")
            deadline = time.monotonic() + STOP_S
            while self.jobs() and time.monotonic() < deadline:
                time.sleep(0.1)
        pids = []
        for path in self.folder.glob("*.pid"):
            with contextlib.suppress(ValueError, OSError):
                pids.append(int(path.read_text()))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            if time.monotonic() > deadline:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)


def _run(*command: str) -> None:
    """Start a daemon, which goes on by itself."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert done.returncode == 0, f"{command[0]}: {done.stderr.decode(errors='replace')}"


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens to now."""
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
