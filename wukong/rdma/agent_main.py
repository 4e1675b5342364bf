"""Starts an agent in a process of its own: `wukong agent`, and from Python.

The process must have the environment of `agent_environment` before it begins: a BLAS reads the
number of its threads once, and every executor has one core.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from wukong.errors import LeaseRefused
from wukong.executor.pool_launch import ALLOCATOR_VARIABLES, BLAS_VARIABLES, HASH_SEED
from wukong.rdma.agent import Agent, AgentSettings
from wukong.rdma.registry import default_directory, open_secret, read_registrations

BOOT = "import sys; from wukong.rdma.agent_main import main; sys.exit(main())"
START_S = 20.0
MEMORY_PART = 0.8
"""Of the machine's memory, what is leased unless something else is said."""


def agent_environment() -> dict[str, str]:
    """The environment of agents and their executors: one BLAS thread, strings that hash alike."""
    return {
        **dict.fromkeys(BLAS_VARIABLES, "1"),
        **ALLOCATOR_VARIABLES,
        "PYTHONHASHSEED": HASH_SEED,
        **os.environ,
    }


def agent_command(arguments: Sequence[str]) -> list[str]:
    """The command line of an agent's process."""
    return [sys.executable, "-c", BOOT, *arguments]


class AgentProcess:
    """An agent on this machine, as a context manager: for tests, trials and single nodes. It ends
    with this process, however that ends.

    Args:
        directory: where it registers.
        n_cores: how many of this process's cores it leases; None, or more than there are: all. A
            core is leased once at a time; two agents may lease the same ones.
        arguments: further arguments of `wukong agent`.
    Raises:
        LeaseRefused: it does not start.
    """

    def __init__(
        self, directory: Path, n_cores: int | None = None, arguments: Sequence[str] = ()
    ) -> None:
        open_secret(directory)
        cores = sorted(os.sched_getaffinity(0))[:n_cores]
        chosen = ",".join(map(str, cores))
        self.directory = directory
        self.process = subprocess.Popen(
            agent_command(
                ["--directory", str(directory), "--cores", chosen, "--lifeline", *arguments]
            ),
            env=agent_environment(),
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        give_up_at = time.monotonic() + START_S
        while not any(r.pid == self.process.pid for r in read_registrations(directory)):
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                self.close(0.0)
                raise LeaseRefused(f"the agent does not start ({self.process.returncode})")
            time.sleep(0.01)

    def close(self, timeout_s: float = 10.0) -> None:
        """Have it revoke its leases and end; kill it after so long. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Be an agent until SIGTERM."""
    parser = argparse.ArgumentParser(prog="wukong agent", description="Leases this node's cores.")
    parser.add_argument("--directory", default=str(default_directory()), help="where to register")
    parser.add_argument("--name", default="", help="under which to register; default: a new one")
    parser.add_argument("--cores", default="", help="numbers, as 0,1,2; default: all that are ours")
    parser.add_argument("--memory-bytes", type=int, default=0, help="that may be leased")
    parser.add_argument("--spares", type=int, default=2, help="executors that are ready in advance")
    parser.add_argument("--host", default="", help="address for TCP; default: this node only")
    parser.add_argument("--cert", default="", help="file with certificate and key: TLS on TCP")
    parser.add_argument("--preload", default="numpy,dask.base", help="modules that executors have")
    parser.add_argument("--grace-s", type=float, default=5.0, help="for leases, when it ends")
    parser.add_argument("--lifeline", action="store_true", help="end with standard input")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    cores = sorted({int(core) for core in given.cores.split(",") if core})
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    settings = AgentSettings(
        directory=Path(given.directory),
        cores=tuple(cores or sorted(os.sched_getaffinity(0))),
        memory_bytes=given.memory_bytes or int(MEMORY_PART * memory_bytes),
        n_spares=given.spares,
        host=given.host,
        cert=given.cert,
        preload=tuple(module for module in given.preload.split(",") if module),
        grace_s=given.grace_s,
        name=given.name,
        lifeline_fd=0 if given.lifeline else -1,
    )
    Agent(settings).run()
    return 0
