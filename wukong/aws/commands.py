"""`wukong lambda-local` and `wukong aws`: the local Lambda service, and deployments."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from wukong.aws.deploy import Deployment
from wukong.aws.doctor import examine_function, examine_store
from wukong.aws.lambda_function import HANDLER, LocalFunction
from wukong.aws.lambda_service import GRACE_S, LambdaService
from wukong.aws.limits import BURST, MEMORY_PER_CORE_MB, RAMP_PER_S, TIMEOUT_MAX_S
from wukong.aws.package import build_package, default_requirements
from wukong.aws.platform import Scaling
from wukong.aws.template import deployer_template
from wukong.errors import WukongError
from wukong.storage.secret import deployment_secret


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
    python: str | None,
    variables: tuple[str, ...],
    concurrency: int | None,
    burst: float,
    ramp_per_s: float,
    requests_per_s: float,
    directory: Path,
    **options: Any,
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
        code=package.absolute() if package else None,
        python=python or sys.executable,
        environment=environment,
        scaling=scaling,
        **options,  # handler, memory_mb, timeout_s
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


# ------------------------------------------------------------------ deploying

PARAMETER_OF = {
    "store": "Store",
    "memory_mb": "MemoryMb",
    "timeout_s": "TimeoutS",
    "concurrency": "Concurrency",
    "blob_days": "BlobDays",
}
"""Of the template, for each option that is one as it stands."""


def _deployment_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that all commands about a deployment have."""
    for option in (
        click.option("--endpoint-url", help="Of another service that speaks AWS' protocols."),
        click.option("--region", help="By default the SDK's."),
        click.option("--role", help="ARN of the role that CloudFormation takes; see deployer-role"),
        click.option("--name", default="wukong", show_default=True, help="The function's name."),
    ):
        command = option(command)
    return command


@click.group()
def aws() -> None:
    """Deploy executors to AWS Lambda, look at them, remove them."""


@aws.command()
@_deployment_options
@click.option("--store", help="URL of the job store, rediss://...; kept once it is known.")
@click.option(
    "--requirements",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What tasks import, in pip's words.",
)
@click.option("--with", "extra", multiple=True, help="A package at this environment's version.")
@click.option("--memory-mb", type=int, help="1,769 are one core.")
@click.option("--timeout-s", type=int, help="Time limit of an executor, up to 900.")
@click.option("--architecture", type=click.Choice(["x86_64", "arm64"]), default="x86_64")
@click.option("--concurrency", type=int, help="Reserved for the function; 0 for none.")
@click.option("--subnet", "subnets", multiple=True, help="Of the Redis; repeatable.")
@click.option("--security-group", "groups", multiple=True, help="Repeatable.")
@click.option("--blob-days", type=int, help="What jobs leave in the bucket goes after so long.")
@click.option("--sweep/--no-sweep", default=None, help="Look after jobs every minute.")
@click.option(
    "--package",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the package is built; by default a temporary file.",
)
def deploy(
    name: str,
    role: str | None,
    region: str | None,
    endpoint_url: str | None,
    requirements: Path | None,
    extra: tuple[str, ...],
    architecture: str,
    subnets: tuple[str, ...],
    groups: tuple[str, ...],
    sweep: bool | None,
    path: Path | None,
    **options: object,
) -> None:
    """Make or change a deployment; nothing happens when it is as it shall be.

    Builds the function's package from this environment's versions, and a CloudFormation stack with
    a bucket, the function, its role, and a schedule that looks after jobs. What is not given stays
    as it is.
    """
    given = {
        **{PARAMETER_OF[option]: value for option, value in options.items()},
        "SubnetIds": ",".join(subnets) or None,
        "SecurityGroupIds": ",".join(groups) or None,
        "Sweep": None if sweep is None else "ENABLED" if sweep else "DISABLED",
        "Architecture": architecture,
        "Runtime": f"python{sys.version_info.major}.{sys.version_info.minor}",
    }
    parameters = {key: str(value) for key, value in given.items() if value is not None}
    with _deployment(name, role, region, endpoint_url) as deployment, TemporaryDirectory() as own:
        if "Store" not in parameters and deployment.state() is None:
            raise click.UsageError("a new deployment needs --store")
        parameters["Secret"] = deployment_secret().hex()
        package = build_package(
            path or Path(own) / f"{name}.zip",
            default_requirements(extra),
            requirements_file=requirements,
            architecture=architecture,
        )
        click.echo(
            f"package: {package.zipped_bytes / 1e6:.1f} MB zipped, "
            f"{package.unzipped_bytes / 1e6:.1f} MB unzipped, {package.digest[:12]}"
        )
        click.echo(f"{deployment.stack}: {deployment.deploy(package, parameters)}")
        _show(deployment)


@aws.command()
@_deployment_options
def status(name: str, role: str | None, region: str | None, endpoint_url: str | None) -> None:
    """Show a deployment; ends with status 1 where there is none."""
    with _deployment(name, role, region, endpoint_url) as deployment:
        if not _show(deployment):
            raise SystemExit(1)


@aws.command()
@_deployment_options
@click.option("--yes", is_flag=True, help="Do not ask.")
def destroy(
    name: str, role: str | None, region: str | None, endpoint_url: str | None, yes: bool
) -> None:
    """Remove a deployment: function, roles, bucket, and the values of jobs in it."""
    with _deployment(name, role, region, endpoint_url) as deployment:
        if not yes and deployment.state() is not None:
            click.confirm(f"Remove {deployment.stack} and everything in its bucket?", abort=True)
        is_removed = deployment.destroy()
        click.echo(f"{deployment.stack}: {'removed' if is_removed else 'nothing there'}")


@aws.command("deployer-role")
def deployer_role() -> None:
    """Print the template of the role that may deploy, for whoever administers the account."""
    click.echo(json.dumps(deployer_template(), indent=2))


@contextmanager
def _deployment(
    name: str, role: str | None, region: str | None, endpoint_url: str | None
) -> Iterator[Deployment]:
    """The deployment; what goes wrong is said without a traceback."""
    try:
        deployment = Deployment(name, role=role, region=region, endpoint_url=endpoint_url)
        try:
            yield deployment
        finally:
            deployment.close()
    except (WukongError, ImportError) as error:
        raise click.ClickException(str(error)) from error


def _show(deployment: Deployment) -> bool:
    state = deployment.state()
    if state is None:
        click.echo(f"{deployment.stack}: there is none")
        return False
    click.echo(f"{deployment.stack}: {state.status}")
    for key, value in sorted({**state.parameters, **state.outputs}.items()):
        click.echo(f"  {key:<18} {value}")
    return True


def examine(function: str | None, store: str | None, blobs: str | None, **where: str | None) -> int:
    """Show what is found of a function and a store. Returns: how much is wrong."""
    findings = [examine_store(store, blobs)] if store else []
    if function:
        findings += examine_function(function, where["endpoint_url"], where["region"])
    for finding in findings:
        click.echo(f"{finding.what:<28} {finding.found}")
    for finding in findings:
        if finding.problem:
            click.echo(f"! {finding.what}: {finding.problem}")
    return sum(bool(finding.problem) for finding in findings)
