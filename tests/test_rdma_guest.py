"""The guest's kernel is made beside other tests, without disturbing or outliving them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rdma_guest import guest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes the kernel"),
]
WAIT_S = 20.0


def world(folder: Path, apt: str) -> dict[str, str]:
    """An environment in which nothing is made yet, and in which `apt-get` does what is said."""
    script = folder / "apt-get"
    script.write_text(f"#!/bin/sh\n{apt}\n")
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder)}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.rdma_guest", *arguments],
        cwd=guest.REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_made_beside_ends_with_whoever_has_wanted_it(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    environment = world(tmp_path, f"echo $$ >{said}; exec sleep 60")
    program = (
        "import time; from tests.rdma_guest.making import Making; m = Making(); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=guest.REPOSITORY, env=environment)
    deadline = time.monotonic() + WAIT_S
    while not said.exists() or not said.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int(said.read_text())
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    owner.kill()
    owner.wait()
    wait_until_gone(pid)


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("true", 1)])
def test_without_a_kernel_tests_of_verbs_are_left_out_but_not_in_ci(
    tmp_path: Path, ci: str, status: int
) -> None:
    environment = {**world(tmp_path, "echo no network >&2; exit 100"), "CI": ci}
    done = run("--after", "echo others have run", **environment)
    assert done.returncode == status
    assert "others have run" in done.stdout
    assert "tests of verbs are left out" in done.stdout
    assert "no network" in done.stdout + done.stderr


def test_the_status_of_what_ran_before_counts(tmp_path: Path) -> None:
    environment = world(tmp_path, "exit 100")
    done = run(
        "--after", "true", "--after", "sh -c 'exit 3'", "--after", "echo too far", **environment
    )
    assert done.returncode == 3
    assert "too far" not in done.stdout
