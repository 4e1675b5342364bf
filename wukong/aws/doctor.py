"""What `wukong doctor` finds out about a deployment: credentials, versions, store, limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wukong.aws.limits import MEMORY_PER_CORE_MB
from wukong.cluster_lambda import check_versions, describe_function
from wukong.errors import WukongError
from wukong.executor.messages import JobId
from wukong.storage import open_store

PINGS = 10
SLOW_STORE_S = 0.005
"""Inside an availability zone a round trip takes less than a millisecond."""
SHORT_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    what: str
    found: str
    problem: str = ""
    """What is wrong and how to mend it; empty: nothing is."""


def examine_store(store: str, blobs: str | None) -> Finding:
    """How far the store is from here."""
    times = []
    try:
        opened = open_store(store, blobs=blobs)
        try:
            for _ in range(PINGS):
                begun_at = time.perf_counter()
                opened.jobs.view(JobId("ping"))
                times.append(time.perf_counter() - begun_at)
        finally:
            opened.jobs.close()
            if opened.blobs is not None:
                opened.blobs.close()
    except (WukongError, ValueError, ImportError) as error:
        return Finding("store, from here", "not reached", f"{type(error).__name__}: {error}")
    return Finding("store, from here", f"{min(times) * 1e3:.2f} ms a round trip")


def examine_function(
    function: str, endpoint_url: str | None, region: str | None
) -> Iterator[Finding]:
    """Everything about a function and the account that it is in, one finding after the other."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        yield Finding("AWS", "no SDK", "pip install 'wukong[aws]'")
        return
    try:
        session = boto3.Session(region_name=region)
        found = session.get_credentials()
    except BotoCoreError as error:
        yield Finding("credentials", "none", str(error))
        return
    if found is None:
        yield Finding("credentials", "none", "run `aws configure`, or set AWS_PROFILE")
        return
    yield Finding("credentials", f"by {found.method}")
    try:
        client = session.client("lambda", endpoint_url=endpoint_url)
    except (BotoCoreError, ValueError) as error:
        yield Finding("region", "none", f"{error}: set AWS_DEFAULT_REGION, or give --region")
        return
    try:
        configuration = client.get_function_configuration(FunctionName=function)
        yield _configured(configuration)
        yield from _limits(client, function, configuration)
    except (BotoCoreError, ClientError) as error:
        hint = "; `wukong aws deploy` makes it" if "ResourceNotFound" in str(error) else ""
        yield Finding("function", "not found", f"{error}{hint}")
        return
    finally:
        client.close()
    yield from _described(function, endpoint_url, region)


def _configured(configuration: dict[str, Any]) -> Finding:
    memory_mb, limit_s = configuration["MemorySize"], configuration["Timeout"]
    problems = []
    if configuration.get("State") not in (None, "Active", "Inactive"):
        problems.append(f"it is {configuration['State']}: {configuration.get('StateReason', '')}")
    if memory_mb < MEMORY_PER_CORE_MB:
        part = memory_mb / MEMORY_PER_CORE_MB
        problems.append(f"it has {part:.0%} of a core: deploy with --memory-mb 1769 or more")
    if limit_s < SHORT_LIMIT_S:
        problems.append("a longer task cannot end: deploy with a larger --timeout-s")
    found = f"{configuration['Runtime']}, {memory_mb} MB, {limit_s} s"
    return Finding("function", found, "; ".join(problems))


def _limits(client: Any, function: str, configuration: dict[str, Any]) -> Iterator[Finding]:
    """Concurrency and loops, as far as one may look."""
    from botocore.exceptions import ClientError

    try:
        account = client.get_account_settings()["AccountLimit"]
        yield Finding(
            "concurrency of the account",
            f"{account['UnreservedConcurrentExecutions']:,} of "
            f"{account['ConcurrentExecutions']:,} are not reserved",
        )
    except ClientError as error:
        yield Finding("concurrency of the account", f"may not be seen ({_code(error)})")
    try:
        reply = client.get_function_recursion_config(FunctionName=function)
        is_cut = reply.get("RecursiveLoop") == "Terminate"
        problem = "a chain of 16 invocations is cut off: `wukong aws deploy` allows longer ones"
        yield Finding("chains of invocations", reply["RecursiveLoop"], problem if is_cut else "")
    except ClientError as error:
        yield Finding("chains of invocations", f"may not be seen ({_code(error)})")
    variables = configuration.get("Environment", {}).get("Variables", {})
    if "WUKONG_STORE" not in variables:
        yield Finding("the function's store", "none", "it has no WUKONG_STORE: deploy it again")


def _described(function: str, endpoint_url: str | None, region: str | None) -> Iterator[Finding]:
    """What the function says of itself."""
    try:
        described = describe_function(function, endpoint_url, region)
    except WukongError as error:
        yield Finding("invocation", "failed", str(error))
        return
    shown = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    try:
        check_versions(described["versions"], function)
        yield Finding("versions", shown)
    except WukongError as error:
        yield Finding("versions", shown, str(error))
    if described["store_problem"]:
        yield Finding("store, from the function", "not reached", described["store_problem"])
        return
    store_s = float(described["store_s"])
    problem = ""
    if store_s > SLOW_STORE_S:
        problem = "put the function into the store's subnets (--subnet, --security-group)"
    yield Finding("store, from the function", f"{store_s * 1e3:.2f} ms a round trip", problem)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "refused"))
