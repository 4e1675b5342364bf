"""An MPI program that gives half of its work to leased executors.

    mpiexec -n 2 python -m mpi4py -m bench.mpi_offload --directory AGENTS

Every rank leases an executor of its own. In a matrix product the rank computes the upper half of
its rows, and the executor the lower half, at the same time. In Jacobi's method the executor keeps
its half of the matrix after the first sweep, so that a sweep moves vectors only. Both are also done
by the ranks alone, in turns; rank 0 prints times, ratios and errors as JSON.

Source: rFaaS (IPDPS '23), section 5.4, which offloads the same two.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from wukong.errors import LeaseRefused
from wukong.rdma import Lease, lease

Array = npt.NDArray[np.float64]

LEASE_S = 30.0
_kept: dict[str, tuple[Array, Array, Array]] = {}
"""In an executor: by the caller's name for it, rows of a matrix, their diagonal, the right side."""


def multiply(rows: Array, matrix: Array) -> Array:
    """Run by an executor: its part of a product."""
    return rows @ matrix


def keep(name: str, rows: Array, diagonal: Array, right: Array) -> None:
    """Run by an executor: keep these for its sweeps."""
    # What has come lies in the connection's arena, which is for the next call.
    _kept[name] = (rows.copy(), diagonal.copy(), right.copy())


def sweep(name: str, x: Array, own: slice) -> Array:
    """Run by an executor: Jacobi's next values of the rows that it keeps."""
    rows, diagonal, right = _kept[name]
    return relax(rows, diagonal, right, x, own)


def relax(rows: Array, diagonal: Array, right: Array, x: Array, own: slice) -> Array:
    """One sweep of Jacobi's method over some rows; `own` are their indices."""
    return (right - rows @ x) / diagonal + x[own]


def product(comm: Any, executor: Lease, size: int, n_rounds: int) -> dict[str, float]:
    """Compare both ways of multiplying; each rank has its rows of the left matrix."""
    rng = np.random.default_rng(comm.rank)
    n_rows = size // comm.size
    half = n_rows // 2
    left = rng.standard_normal((n_rows, size))
    right = executor.empty((size, size))
    right[:] = comm.bcast(rng.standard_normal((size, size)) if comm.rank == 0 else None)
    lower = executor.empty((n_rows - half, size))
    lower[:] = left[half:]
    result = np.empty((n_rows, size))

    def shared() -> Array:
        future = executor.submit(multiply, lower, right)
        np.matmul(left[:half], right, out=result[:half])
        result[half:] = future.result()
        return result

    found = compare(comm, lambda: left @ right, shared, n_rounds)
    return {**found, "offloaded_rows": comm.allreduce(len(lower))}


def jacobi(comm: Any, executor: Lease, size: int, n_sweeps: int, n_rounds: int) -> dict[str, float]:
    """Compare both ways of solving a system whose rows are divided among the ranks."""
    rng = np.random.default_rng(7)
    matrix = rng.standard_normal((size, size))
    np.fill_diagonal(matrix, np.abs(matrix).sum(axis=1) + 1.0)
    right = rng.standard_normal(size)
    n_rows = size // comm.size
    first, last = comm.rank * n_rows, (comm.rank + 1) * n_rows
    middle = (first + last) // 2
    own, upper, lower = slice(first, last), slice(first, middle), slice(middle, last)
    diagonal = np.diagonal(matrix).copy()
    name = f"rank {comm.rank}"
    executor.submit(keep, name, matrix[lower], diagonal[lower], right[lower]).result()
    whole = np.empty(n_rows * comm.size)

    def alone() -> Array:
        x = np.zeros(size)
        for _ in range(n_sweeps):
            part = relax(matrix[own], diagonal[own], right[own], x, own)
            comm.Allgather(part, whole)
            x = whole.copy()
        return x

    def shared() -> Array:
        x = np.zeros(size)
        part = np.empty(n_rows)
        for _ in range(n_sweeps):
            future = executor.submit(sweep, name, x, lower)
            part[: middle - first] = relax(matrix[upper], diagonal[upper], right[upper], x, upper)
            part[middle - first :] = future.result()
            comm.Allgather(part, whole)
            x = whole.copy()
        return x

    found = compare(comm, alone, shared, n_rounds)
    return {**found, "offloaded_rows": comm.allreduce(last - middle)}


def compare(
    comm: Any, alone: Callable[[], Array], shared: Callable[[], Array], n_rounds: int
) -> dict[str, float]:
    """Time both in turns, the slowest rank counting, and say how far their results differ."""
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    results: dict[str, Array] = {}
    for _ in range(n_rounds + 1):
        for name, run in (("alone", alone), ("shared", shared)):
            comm.Barrier()
            start = time.perf_counter()
            results[name] = np.array(run())
            seconds[name].append(comm.allreduce(time.perf_counter() - start, op=_max()))
    difference = float(np.abs(results["alone"] - results["shared"]).max())
    # The first round warms up.
    alone_s, shared_s = (float(np.median(seconds[name][1:])) for name in ("alone", "shared"))
    return {
        "alone_s": alone_s,
        "shared_s": shared_s,
        "speedup": alone_s / shared_s,
        "difference": comm.allreduce(difference, op=_max()),
    }


def lease_one(directory: str | None) -> Lease:
    """Lease an executor. Several ranks may want the same free core: those that lose ask again."""
    give_up_at = time.monotonic() + LEASE_S
    while True:
        try:
            return lease(1, directory=directory)
        except LeaseRefused:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.1)


def _max() -> Any:
    from mpi4py import MPI

    return MPI.MAX


def main() -> None:
    """Run both comparisons on every rank."""
    from mpi4py import MPI

    parser = argparse.ArgumentParser(prog="python -m bench.mpi_offload")
    parser.add_argument("--directory", default=None, help="where agents register")
    parser.add_argument("--size", type=int, default=1536, help="rows of the matrices")
    parser.add_argument("--sweeps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    comm = MPI.COMM_WORLD
    size = given.size - given.size % (2 * comm.size)
    with lease_one(given.directory) as executor:
        found = {
            "ranks": comm.size,
            "size": size,
            "transport": executor.transports[0],
            "product": product(comm, executor, size, given.rounds),
            "jacobi": jacobi(comm, executor, size, given.sweeps, given.rounds),
        }
    if comm.rank == 0:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    # Executors import the functions of `bench.mpi_offload`; those of `__main__` they do not have.
    from bench import mpi_offload

    mpi_offload.main()
