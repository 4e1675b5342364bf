"""Other systems that a user would pick instead, opened for a comparison.

Each gets as many processes as the other sides, stays open, and is used as its documentation says:
Ray runs Dask graphs by its own `ray_dask_get`; Parsl, Lithops and loky run calls, so they take part
where the work can be said as maps. One that is not installed is reported as absent.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Protocol

RAY = "ray"
PARSL = "parsl"
LITHOPS = "lithops"
LOKY = "loky"
PEERS = (RAY, PARSL, LITHOPS, LOKY)
OBJECT_STORE_BYTES = 4 * 2**30
"""Ray's share of memory for values: more than the largest workload needs."""


class Future(Protocol):
    """What `submit` gives."""

    def result(self) -> Any:
        """Wait for the value."""
        ...


class CallPool(Protocol):
    """Runs calls, not graphs."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        """Begin one call."""
        ...

    def map(self, function: Callable[..., Any], /, *iterables: Iterable[Any]) -> Iterable[Any]:
        """Run many calls; their values in order."""
        ...


def open_ray(n_workers: int, stack: ExitStack) -> Callable[..., object]:
    """Start Ray on this machine. Returns: its scheduler for Dask."""
    # Ray reads it when it is imported.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray.util.dask import ray_dask_get

        ray.init(
            address="local",  # a cluster that somebody else has left behind is not ours to use
            num_cpus=n_workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    stack.callback(ray.shutdown)
    get: Callable[..., object] = ray_dask_get
    return get


def open_pool(name: str, n_workers: int, stack: ExitStack) -> CallPool:
    """Start a peer that runs calls."""
    if name == LOKY:
        import loky

        pool: CallPool = stack.enter_context(loky.ProcessPoolExecutor(max_workers=n_workers))
        return pool
    if name == PARSL:
        return _open_parsl(n_workers, stack)
    if name == LITHOPS:
        return _Lithops(n_workers, stack)
    raise ValueError(f"{name!r} is none of {', '.join(PEERS)}")


def _open_parsl(n_workers: int, stack: ExitStack) -> CallPool:
    """Parsl's HighThroughputExecutor, as a `concurrent.futures` executor."""
    from parsl import Config, HighThroughputExecutor
    from parsl.concurrent import ParslPoolExecutor
    from parsl.providers import LocalProvider

    # Parsl starts programs of its own by name, also where the environment is not activated.
    programs = os.path.dirname(sys.executable)
    if programs not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((programs, os.environ["PATH"]))
    config = Config(
        executors=[
            HighThroughputExecutor(
                label="bench",
                address="127.0.0.1",
                loopback_address="127.0.0.1",
                cores_per_worker=1 / n_workers,
                max_workers_per_node=n_workers,
                provider=LocalProvider(init_blocks=1, max_blocks=1),
            )
        ],
        run_dir=stack.enter_context(tempfile.TemporaryDirectory()),
        initialize_logging=False,
    )
    pool: CallPool = stack.enter_context(ParslPoolExecutor(config))
    return pool


class _Lithops:
    """Lithops with its localhost backend and storage."""

    def __init__(self, n_workers: int, stack: ExitStack) -> None:
        import lithops

        self._executor = lithops.FunctionExecutor(
            config={
                "lithops": {"backend": "localhost", "storage": "localhost", "log_level": "ERROR"},
                "localhost": {"worker_processes": n_workers},
            }
        )
        stack.callback(self._executor.clean)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        """See `CallPool`."""
        future: Future = self._executor.call_async(function, arguments)
        return future

    def map(self, function: Callable[..., Any], /, *iterables: Iterable[Any]) -> Iterable[Any]:
        """See `CallPool`."""
        calls = [tuple(arguments) for arguments in zip(*iterables)]
        found: Iterable[Any] = self._executor.get_result(self._executor.map(function, calls))
        return found
