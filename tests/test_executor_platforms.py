"""Clusters on the executors of Dask, Parsl, MPI and Globus Compute, each a program of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from moto_service import needs

PROGRAM = Path(__file__).with_name("executor_platforms.py")
LIMIT_S = 240


def run_program(*command: str) -> dict:
    # Parsl looks for programs of its own in the path; what these packages warn of is theirs.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=LIMIT_S, cwd="/"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(found: dict) -> None:
    assert found["total"] == sum(range(1, 17))
    assert (found["tasks"], found["deaths"]) == (17, 0)
    assert found["commits"] >= found["strands"]
    assert found["n_workers"] == 2
    assert found["in order"]
    assert found["is exact"]
    assert found["raised"] == "ZeroDivisionError"
    assert found["jobs"] == []
    # The workers have computed, and not the client.
    assert found["n_processes"] == 2
    assert not found["here"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "package"),
    [("distributed", "distributed"), ("parsl", "parsl"), ("globus", "globus_compute_sdk")],
)
def test_a_platforms_executor_runs_graphs(platform: str, package: str) -> None:
    needs(package)
    check(run_program(sys.executable, str(PROGRAM), platform))


@pytest.mark.slow
def test_an_mpi_pool_runs_graphs() -> None:
    needs("mpi4py")
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        assert os.environ.get("CI") != "true", "CI needs mpiexec (the package mpich has it)"
        pytest.skip("no mpiexec")
    module = ["-m", "mpi4py.futures", str(PROGRAM), "mpi"]
    check(run_program(mpiexec, "-n", "3", sys.executable, *module))
