"""Agents in the jobs of a batch system: Slurm, and whatever else Parsl has a provider for.

    with SlurmAgents(partition="spare", nodes=8, walltime="00:20:00") as agents:
        with agents.lease(n_executors=16) as executors:
            list(executors.map(f, xs))

Each job is one node with one agent (`wukong agent`), which registers in a directory that all nodes
share. Nodes are asked for while leases wait, one by one, so that short jobs fit into the gaps of
the schedule; they are given back when they are idle. When the batch system takes a node away
(preemption, scancel, the end of its time), it warns the job by SIGTERM: the agent then revokes its
leases with grace, and their work goes elsewhere.

Writing, submitting, watching and cancelling jobs is Parsl's; `scaling.py` decides how many.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from wukong.errors import LeaseRefused
from wukong.rdma.agent_main import agent_command, agent_environment
from wukong.rdma.client import Lease, lease
from wukong.rdma.registry import open_secret, read_registrations
from wukong.rdma.scaling import Cancel, Job, Node, Scaling, Submit

logger = logging.getLogger(__name__)

HOSTNAME = "$(hostname)"
"""For the shell of the job: the name by which other nodes reach its own."""
WARNING_S = 5.0
"""The batch system warns so much earlier than the agent's grace needs."""
LEASE_AGAIN_S = 0.2
"""Between two looks at whether a lease is granted now."""
CLOSE_S = 5.0


class JobStatus(Protocol):
    """What Parsl tells of a job."""

    @property
    def terminal(self) -> bool:
        """Whether it has ended, in whatever way."""
        ...


class Provider(Protocol):
    """One of Parsl's `ClusterProvider`s, of one node for each block."""

    script_dir: str | None
    """Where it writes scripts, and jobs what they print."""

    def submit(self, command: str, tasks_per_node: int, job_name: str = ...) -> str:
        """Queue a job; returns its id."""
        ...

    def status(self, job_ids: list[str]) -> Sequence[JobStatus]:
        """How they stand, in the same order."""
        ...

    def cancel(self, job_ids: list[str]) -> Sequence[bool]:
        """End them."""
        ...


class BatchAgents:
    """Agents in batch jobs, as many as leases wait for. A context manager. Thread-safe.

    Args:
        provider: from `parsl.providers`, with one node for each block, and
            `parsl.launchers.SimpleLauncher`: the agent takes the place of the job's shell, so that
            the batch system's signals reach it.
        nodes: at most.
        nodes_min: kept, used or not.
        directory: where agents register; must be on a file system that all nodes share.
        cores_per_node: what a node is expected to have.
        idle_s: a node without leases is given back after so long.
        poll_s: between two questions to the batch system.
        host: address of a node for the others, as its shell reads it.
        grace_s: what leases get when the batch system takes a node away.
        options: further options of `wukong agent`.
    """

    def __init__(
        self,
        provider: Provider,
        *,
        nodes: int = 1,
        nodes_min: int = 0,
        directory: str | os.PathLike[str] | None = None,
        cores_per_node: int = 1,
        idle_s: float = 60.0,
        poll_s: float = 10.0,
        host: str = HOSTNAME,
        grace_s: float = 5.0,
        options: Sequence[str] = (),
    ) -> None:
        self.directory = Path(directory or Path.home() / ".wukong" / "agents")
        open_secret(self.directory)
        scripts = self.directory / "jobs"
        scripts.mkdir(mode=0o700, exist_ok=True)
        provider.script_dir = str(scripts)
        self._provider = provider
        self._poll_s = poll_s
        self._host = host
        self._grace_s = grace_s
        self._options = tuple(options)
        self._scaling = Scaling(nodes_min, nodes, cores_per_node, idle_s)
        self._changed = threading.Condition()
        """Guards what follows."""
        self._jobs: list[Job] = []
        self._wanted: dict[object, int] = {}
        self._failure = ""
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="wukong-batch", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------- for callers

    def lease(self, n_executors: int = 1, *, timeout_s: float = 600.0, **options: Any) -> Lease:
        """Lease executors; nodes are asked for when too few are free.

        Args:
            timeout_s: to get them, time in the batch system's queue included.
            options: of `wukong.rdma.lease`.
        Raises:
            LeaseRefused: there were not so many in time; the message says why.
        """
        deadline = time.monotonic() + timeout_s
        with self._wanting(n_executors):
            while True:
                left_s = deadline - time.monotonic()
                try:
                    return lease(
                        n_executors,
                        directory=self.directory,
                        timeout_s=max(LEASE_AGAIN_S, left_s),
                        **options,
                    )
                except LeaseRefused as refused:
                    with self._changed:
                        if self._failure:
                            raise LeaseRefused(self._failure) from refused
                        n_jobs = len(self._jobs)
                    if left_s <= 0:
                        raise LeaseRefused(
                            f"not in {timeout_s} s, with {n_jobs} jobs queued or running: {refused}"
                        ) from refused
                time.sleep(LEASE_AGAIN_S)

    @contextlib.contextmanager
    def _wanting(self, n_cores: int) -> Iterator[None]:
        wish = object()
        with self._changed:
            if self._is_closed:
                raise LeaseRefused("these agents are closed")
            self._wanted[wish] = n_cores
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                del self._wanted[wish]

    def scale(self, n_nodes: int) -> None:
        """Have so many nodes at least, whether or not work waits."""
        with self._changed:
            self._scaling.nodes_min = min(n_nodes, self._scaling.nodes_max)
            self._changed.notify_all()

    @property
    def jobs(self) -> tuple[str, ...]:
        """The batch system's ids of the jobs that it has not ended."""
        with self._changed:
            return tuple(job.job for job in self._jobs)

    # -------------------------------------------------------------- the driver

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._step()
            except Exception as error:
                # The batch system does not answer, or refuses: its own words say why.
                logger.warning("the batch system: %s; asking again in %s s", error, self._poll_s)
                with self._changed:
                    self._failure = f"the batch system refuses: {error}"
            with self._changed:
                if not self._is_closed:
                    self._changed.wait(self._poll_s)

    def _step(self) -> None:
        with self._changed:
            jobs, n_wanted = list(self._jobs), sum(self._wanted.values())
        statuses = self._provider.status([job.job for job in jobs])
        jobs = [job for job, status in zip(jobs, statuses) if not status.terminal]
        agents = {agent.name: agent for agent in read_registrations(self.directory)}
        nodes = {name: Node(a.n_cores, a.n_free_cores) for name, a in agents.items()}
        with self._changed:
            wishes = self._scaling.decide(jobs, nodes, n_wanted, time.monotonic())
            self._jobs = jobs
            self._failure = ""
            if self._scaling.has_given_up:
                self._failure = (
                    f"{self._scaling.n_failures} jobs in a row have ended before their agents"
                    f" came up; what they said is in {self._provider.script_dir}"
                )
        for wish in wishes:
            match wish:
                case Submit(n_nodes):
                    for _ in range(n_nodes):
                        self._submit()
                case Cancel(given_back):
                    logger.info("giving back idle nodes: jobs %s", ", ".join(given_back))
                    self._cancel(list(given_back))

    def _submit(self) -> None:
        name = f"job-{uuid.uuid4().hex[:12]}"
        job = self._provider.submit(self.command(name), 1, "wukong")
        logger.info("job %s is queued, for agent %s", job, name)
        with self._changed:
            self._jobs.append(Job(job, name))

    def _cancel(self, jobs: list[str]) -> None:
        self._provider.cancel(jobs)
        with self._changed:
            self._scaling.cancelled(jobs)
            self._jobs = [job for job in self._jobs if job.job not in jobs]

    def command(self, name: str) -> str:
        """The command line of a job, for its shell."""
        own = agent_environment()
        # What the batch system does not hand on, or another login shell sets anew.
        inherited = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH")
        variables = {
            key: value
            for key, value in own.items()
            if os.environ.get(key) != value or key in inherited
        }
        settings = [f"{key}={shlex.quote(value)}" for key, value in sorted(variables.items())]
        command = agent_command(
            ["--directory", str(self.directory), "--name", name, "--grace-s", str(self._grace_s)]
        )
        words = [shlex.quote(word) for word in (*command, *self._options)]
        # The host is for the shell to read: by then it is known which one it is.
        return " ".join(["exec env", *settings, *words, "--host", f'"{self._host}"'])

    def close(self) -> None:
        """Give back all nodes; leases on them are revoked. Idempotent."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            jobs = [job.job for job in self._jobs]
        if jobs:
            self._cancel(jobs)

    def __enter__(self) -> BatchAgents:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SlurmAgents(BatchAgents):
    """Agents in Slurm's jobs; see `BatchAgents` for what else can be given.

    Args:
        partition: of the cluster; None: its default.
        nodes: at most.
        walltime: of a job, HH:MM:SS. Short ones fit into gaps; a new job follows while work waits.
        walltime_min: let Slurm shorten a job to this where that starts it earlier (backfill).
        account, qos, constraint: see sbatch.
        exclusive: share nodes with nobody's jobs.
        directives: further lines for the head of the script, as "#SBATCH --mem=4G".
        worker_init: shell commands before the agent starts, as "module load python".
    Raises:
        ImportError: Parsl is missing; the message says how to get it.
    """

    def __init__(
        self,
        partition: str | None = None,
        nodes: int = 1,
        walltime: str = "00:30:00",
        *,
        walltime_min: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        exclusive: bool = True,
        directives: str = "",
        worker_init: str = "",
        grace_s: float = 5.0,
        **options: Any,
    ) -> None:
        try:
            from parsl.launchers import SimpleLauncher
            from parsl.providers.slurm.slurm import SlurmProvider
        except ImportError as error:
            raise ImportError("batch systems need Parsl: pip install 'wukong[hpc]'") from error
        warned_s = math.ceil(grace_s + WARNING_S)
        lines = [
            # To the shell that the agent has replaced, before the time is up.
            f"#SBATCH --signal=B:TERM@{warned_s}",
            # A job that was preempted is not wanted back: another one is, if work still waits.
            "#SBATCH --no-requeue",
            *([f"#SBATCH --time-min={walltime_min}"] if walltime_min else []),
            *([directives] if directives else []),
        ]
        provider = SlurmProvider(
            partition=partition,
            account=account,
            qos=qos,
            constraint=constraint,
            nodes_per_block=1,
            init_blocks=0,
            max_blocks=nodes,
            walltime=walltime,
            scheduler_options="\n".join(lines),
            worker_init=worker_init,
            exclusive=exclusive,
            launcher=SimpleLauncher(),
        )
        super().__init__(provider, nodes=nodes, grace_s=grace_s, **options)
