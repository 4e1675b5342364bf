"""`python -m tests.rdma_guest`: the tests that need an RDMA device, or commands, in guests.

python -m tests.rdma_guest                      all tests of verbs, and the comparison
python -m tests.rdma_guest 'rdma link'          one command in one guest
python -m tests.rdma_guest 'rdma link' 'ls'     two commands on two hosts of one network
"""

import argparse
import os
import sys

from tests.rdma_guest import guest

PYTEST = '"$PYTHON" -m pytest -q -p no:cacheprovider tests/rdma_guest'
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
    options = parser.parse_args()
    try:
        guest.install_verbs()
        kernel = guest.find_kernel(options.backend)
    except guest.NoGuest as missing:
        # A machine of a user may lack it; one that decides whether a change is good may not.
        sys.stdout.write(f"tests of verbs are left out: {missing}\n")
        return 1 if os.environ.get("CI") == "true" else 0
    if len(options.command) > 2:
        parser.error("one or two commands")
    for commands in [options.command] if options.command else PARTS:
        status = guest.run_guests(kernel, commands, options.timeout_s)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
