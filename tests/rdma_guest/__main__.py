"""`python -m tests.rdma_guest`: the tests that need an RDMA device, or commands, in guests.

python -m tests.rdma_guest                      all tests of verbs, and the comparison
python -m tests.rdma_guest 'rdma link'          one command in one guest
python -m tests.rdma_guest 'rdma link' 'ls'     two commands on two hosts of one network
python -m tests.rdma_guest --after 'pytest'     all tests of verbs, after something else that runs
                                                while the kernel is made
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys

from tests.rdma_guest import guest
from tests.rdma_guest.making import Making, be_last, end_with_standard_input

PYTEST = '"$PYTHON" -m pytest -q --reruns 2 -p no:cacheprovider tests/rdma_guest'
PARTS = (
    [f"{PYTEST}/inside.py"],
    [f"{PYTEST}/leases.py"],
    ['"$PYTHON" -m tests.rdma_guest.peer listen', f"{PYTEST}/across.py"],
    ['"$PYTHON" -m tests.rdma_guest.latency'],
)


def main() -> int:
    """Run what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.rdma_guest")
    parser.add_argument("command", nargs="*", help="one or two; default: the tests")
    parser.add_argument("--backend", choices=("auto", "uml", "qemu"), default="auto")
    parser.add_argument("--timeout-s", type=float, default=900.0)
    parser.add_argument("--after", action="append", default=[], help="command to run first")
    parser.add_argument("--make", action="store_true", help="only make the kernel; see `making`")
    options = parser.parse_args()
    if len(options.command) > 2:
        parser.error("one or two commands")
    try:
        if options.make:
            end_with_standard_input()
            be_last()
            guest.find_kernel("uml")
            return 0
        kernel = find_kernel_after(options.after, options.backend)
    except guest.NoGuest as missing:
        # A machine of a user may lack it; one that decides whether a change is good may not.
        sys.stdout.write(f"tests of verbs are left out: {missing}\n")
        return 1 if options.make or os.environ.get("CI") == "true" else 0
    except subprocess.CalledProcessError as failed:
        return failed.returncode
    for commands in [options.command] if options.command else PARTS:
        status = guest.run_guests(kernel, commands, options.timeout_s)
        if status:
            return status
    return 0


def find_kernel_after(commands: list[str], backend: str) -> guest.Kernel:
    """Run commands, one after the other, and have a kernel afterwards.

    Raises:
        NoGuest: there is none, and none can be made.
        CalledProcessError: a command has failed; the others were not run.
    """
    missing: guest.NoGuest | None = None
    with contextlib.ExitStack() as stack:
        making: Making | None = None
        try:
            guest.install_verbs()
            if commands and backend != "qemu" and not guest.uml_path().exists():
                guest.install_tools()
                making = stack.enter_context(Making())
        except guest.NoGuest as error:
            missing = error
        for command in commands:
            subprocess.run(shlex.split(command), check=True)
        if missing is not None:
            raise missing
        if making is not None:
            try:
                making.wait()
            except guest.NoGuest as error:
                sys.stdout.write(f"{error}\n")
                backend = "qemu"
    return guest.find_kernel(backend)


if __name__ == "__main__":
    # What is under way here ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
