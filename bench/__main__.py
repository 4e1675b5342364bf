"""Start of the benchmarks: limits BLAS threads for all sides, then hands over to the commands.

A BLAS reads these variables once, when numpy is imported; so they are set before anything else is
imported, and every process that a side starts inherits them.
"""

import os

from bench import N_WORKERS

if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(max(1, len(os.sched_getaffinity(0)) // N_WORKERS))

    from bench.commands import main

    main(prog_name="bench")
