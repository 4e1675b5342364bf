"""An MPI program whose ranks give half of their work to leased executors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import needs
from wukong.rdma import AgentProcess

needs("mpi4py")
pytestmark = pytest.mark.slow

N_RANKS = 2


def test_half_of_a_product_and_of_a_sweep_is_computed_by_executors(tmp_path: Path) -> None:
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        assert os.environ.get("CI") != "true"
        pytest.skip("no mpiexec: pip install mpich")
    with AgentProcess(tmp_path / "agents", 1), AgentProcess(tmp_path / "agents", 1):
        command = [str(mpiexec), "-n", str(N_RANKS), sys.executable]
        # By way of mpi4py, one rank that fails ends all of them.
        command += ["-m", "mpi4py", "-m", "bench.mpi_offload"]
        command += ["--directory", str(tmp_path / "agents")]
        command += ["--size", "256", "--sweeps", "10", "--rounds", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ranks"], found["size"], found["transport"]) == (N_RANKS, 256, "shm")
    for part in ("product", "jacobi"):
        assert found[part]["difference"] < 1e-9
        # Ranks have 128 rows each, and executors compute 64 of them.
        assert found[part]["offloaded_rows"] == 128
