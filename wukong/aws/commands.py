"""`wukong lambda-local`: the local Lambda service from the command line."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import click

from wukong.aws.lambda_function import HANDLER, LocalFunction
from wukong.aws.lambda_service import GRACE_S, LambdaService
from wukong.aws.limits import BURST, MEMORY_PER_CORE_MB, RAMP_PER_S, TIMEOUT_MAX_S
from wukong.aws.platform import Scaling


@click.command()
@click.option("--port", default=9001, show_default=True, help="On loopback; 0 chooses one.")
@click.option("--name", default="wukong", show_default=True, help="The function's name.")
@click.option("--store", help="Where executors find their jobs; WUKONG_STORE of the function.")
@click.option("--blobs", help="Where large values go; WUKONG_BLOBS of the function.")
@click.option(
    "--package",
    type=click.Path(exists=True, path_type=Path),
    help="A zip package or a folder; by default what this Python can import.",
)
@click.option("--handler", default=HANDLER, show_default=True)
@click.option("--python", help="The interpreter for the package; by default this one.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="Repeatable.")
@click.option("--memory-mb", default=MEMORY_PER_CORE_MB, show_default=True)
@click.option("--timeout-s", default=float(TIMEOUT_MAX_S), show_default=True)
@click.option("--concurrency", type=int, help="Invocations at a time; one for each core.")
@click.option("--burst", default=float(BURST), show_default=True, help="New environments at once.")
@click.option("--ramp-per-s", default=RAMP_PER_S, show_default=True, help="And after the burst.")
@click.option("--requests-per-s", default=float("inf"), help="Requests beyond are throttled.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("wukong-lambda"),
    show_default=True,
    help="For the queue, logs, and events that were given up.",
)
def lambda_local(
    port: int,
    name: str,
    store: str | None,
    blobs: str | None,
    package: Path | None,
    handler: str,
    python: str | None,
    variables: tuple[str, ...],
    memory_mb: int,
    timeout_s: float,
    concurrency: int | None,
    burst: float,
    ramp_per_s: float,
    requests_per_s: float,
    directory: Path,
) -> None:
    """Run a Lambda service on this machine, with the cloud's limits and errors.

    Give its address to AWS clients as endpoint URL. Ends at Ctrl-C or SIGTERM, after what runs;
    events that were accepted stay in DIRECTORY, and are delivered when it is started again.
    """
    environment = dict(item.partition("=")[::2] for item in variables)
    named = {"WUKONG_STORE": store, "WUKONG_BLOBS": blobs}
    environment.update({key: value for key, value in named.items() if value})
    scaling = Scaling(
        concurrency=concurrency or len(os.sched_getaffinity(0)),
        burst=burst,
        ramp_per_s=ramp_per_s,
        allows_loops=True,
    )
    function = LocalFunction(
        name,
        handler,
        package.absolute() if package else None,
        python=python or sys.executable,
        environment=environment,
        memory_mb=memory_mb,
        timeout_s=timeout_s,
        scaling=scaling,
    )
    service = LambdaService(
        [function], directory.absolute(), port=port, requests_per_s=requests_per_s
    )
    try:
        asyncio.run(_serve(service))
    except (OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error


async def _serve(service: LambdaService) -> None:
    """Run until a signal."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    await service.start()
    click.echo(f"listening on {service.url}")
    await ended.wait()
    click.echo("ending after what runs")
    await service.stop(GRACE_S)
    counters = service.counters
    click.echo(
        f"{counters.requests} requests, {counters.throttled} throttled, "
        f"{counters.invocations} invocations, {counters.cold_starts} cold starts, "
        f"{counters.failures} failed, {counters.billed_ms} ms billed"
    )
