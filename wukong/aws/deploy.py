"""Makes, changes, shows and removes a deployment: a CloudFormation stack and a package.

no stack --create without code--> bucket --put package--> update with code --> ready
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wukong.aws.package import Package
from wukong.aws.template import CODE_PREFIX, executors_template
from wukong.errors import DeploymentError

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Between two looks at a stack that changes."""
LIMIT_S = 1800.0
"""A stack takes a minute or two; network interfaces of a removed function up to 20."""
_NEEDED = "deploying needs the SDK: pip install 'wukong[aws]'"


@dataclass(frozen=True, slots=True)
class StackState:
    """A deployment as it stands."""

    status: str
    """CloudFormation's word for it."""
    outputs: Mapping[str, str]
    parameters: Mapping[str, str]
    """Without those that are secret."""
    known: frozenset[str]
    """Names of all parameters that it has a value for."""


class Deployment:
    """The stack of one function.

    Args:
        name: of the function and, with "wukong-" before it, of the stack.
        region, endpoint_url: of AWS, or of something that speaks its protocols; None: as the SDK
            finds them.
        role: ARN of the role with which CloudFormation works; None: the caller's own rights.
        look_s: between two looks at a stack that changes.
    Raises:
        ImportError: the SDK is missing; the message says how to install it.
    """

    def __init__(
        self,
        name: str,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        role: str | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        try:
            import boto3
        except ImportError:
            raise ImportError(_NEEDED) from None
        self.name = name
        self.stack = f"wukong-{name}"
        self._role = {"RoleARN": role} if role else {}
        self._look_s = look_s
        self._stacks = boto3.client("cloudformation", region_name=region, endpoint_url=endpoint_url)
        self._bucket = boto3.client("s3", region_name=region, endpoint_url=endpoint_url)

    def close(self) -> None:
        """Close the connections."""
        self._stacks.close()
        self._bucket.close()

    def state(self) -> StackState | None:
        """The deployment as it stands; None: there is none."""
        from botocore.exceptions import ClientError

        try:
            (stack,) = self._stacks.describe_stacks(StackName=self.stack)["Stacks"]
        except ClientError as error:
            if "does not exist" in str(error):
                return None
            raise DeploymentError(f"the stack {self.stack} cannot be seen: {error}") from error
        if stack["StackStatus"] == "DELETE_COMPLETE":
            return None
        outputs = {o["OutputKey"]: o["OutputValue"] for o in stack.get("Outputs", ())}
        found = {p["ParameterKey"]: p["ParameterValue"] for p in stack.get("Parameters", ())}
        hidden = {k: v for k, v in executors_template()["Parameters"].items() if v.get("NoEcho")}
        shown = {k: v for k, v in found.items() if k not in hidden}
        return StackState(stack["StackStatus"], outputs, shown, frozenset(found))

    # -------------------------------------------------------------- deploy

    def deploy(self, package: Package, parameters: Mapping[str, str]) -> str:
        """Make the deployment what it shall be.

        Args:
            parameters: of the template; of a deployment that there is, others stay as they are.
        Returns: created, updated or unchanged.
        Raises:
            DeploymentError: with the cloud's reasons; what there was is as before.
        """
        state = self.state()
        if state is not None and state.status in ("ROLLBACK_COMPLETE", "REVIEW_IN_PROGRESS"):
            # A stack whose making failed can only be removed; nothing works in it.
            self.destroy()
            state = None
        is_new = state is None
        if state is None:
            defaults = executors_template()["Parameters"].items()
            first = {name: str(spec["Default"]) for name, spec in defaults if "Default" in spec}
            first |= {**parameters, "FunctionName": self.name, "CodeKey": ""}
            self._change(self._stacks.create_stack, first, frozenset())
            state = self._wait("CREATE_COMPLETE")
        self._put(state.outputs["Bucket"], package)
        wanted = {**parameters, "FunctionName": self.name, "CodeKey": package.key}
        is_changed = self._change(self._stacks.update_stack, wanted, state.known)
        if is_changed:
            state = self._wait("UPDATE_COMPLETE")
        self._remove_code(state.outputs["Bucket"], package.key)
        return "created" if is_new else "updated" if is_changed else "unchanged"

    def _change(self, call: Any, parameters: Mapping[str, str], known: frozenset[str]) -> bool:
        """Create or update the stack; parameters that it has and that are not given stay.

        Returns: False when it is as it shall be already.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        names = executors_template()["Parameters"]
        unknown = sorted(set(parameters) - set(names))
        if unknown:
            raise DeploymentError(f"no parameters of the template: {', '.join(unknown)}")
        given: list[dict[str, Any]] = [
            {"ParameterKey": name, "ParameterValue": value} for name, value in parameters.items()
        ]
        kept = sorted(known & set(names) - set(parameters))
        given += [{"ParameterKey": name, "UsePreviousValue": True} for name in kept]
        try:
            call(
                StackName=self.stack,
                TemplateBody=json.dumps(executors_template()),
                Parameters=given,
                Capabilities=["CAPABILITY_NAMED_IAM"],
                **self._role,
            )
        except ClientError as error:
            if "No updates are to be performed" in str(error):
                return False
            raise DeploymentError(f"{self.stack}: {error}") from error
        except BotoCoreError as error:
            raise DeploymentError(f"{self.stack}: {error}") from error
        return True

    def _wait(self, wanted: str) -> StackState:
        deadline = time.monotonic() + LIMIT_S
        while True:
            state = self.state()
            if state is not None and state.status == wanted:
                return state
            if state is None or not state.status.endswith("_IN_PROGRESS"):
                status = "gone" if state is None else state.status
                raise DeploymentError(f"{self.stack} is {status}: {self._reasons()}")
            if time.monotonic() > deadline:
                raise DeploymentError(f"{self.stack} is {state.status} for {LIMIT_S:.0f} s")
            time.sleep(self._look_s)

    def _reasons(self) -> str:
        """What CloudFormation says of its failures, the first one first."""
        from botocore.exceptions import ClientError

        try:
            events = self._stacks.describe_stack_events(StackName=self.stack)["StackEvents"]
        except ClientError:
            return "its events are gone with it"
        failed = [
            f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', 'no reason given')}"
            for event in reversed(events)
            if event["ResourceStatus"].endswith("_FAILED")
        ]
        return "; ".join(failed) or "no reason given"

    # -------------------------------------------------------------- the bucket

    def _put(self, bucket: str, package: Package) -> None:
        """Put the package, unless it is there."""
        if package.key in self._keys(bucket, f"{CODE_PREFIX}/"):
            return
        logger.info("%s: %.1f MB of code", bucket, package.zipped_bytes / 1e6)
        self._bucket.upload_file(str(package.path), bucket, package.key)

    def _remove_code(self, bucket: str, kept: str) -> None:
        """Remove packages that are not used any more."""
        self._delete(bucket, [k for k in self._keys(bucket, f"{CODE_PREFIX}/") if k != kept])

    def _keys(self, bucket: str, prefix: str = "") -> list[str]:
        pages = self._bucket.get_paginator("list_objects_v2")
        return [
            item["Key"]
            for page in pages.paginate(Bucket=bucket, Prefix=prefix)
            for item in page.get("Contents", ())
        ]

    def _delete(self, bucket: str, keys: list[str]) -> None:
        for i in range(0, len(keys), 1000):  # what one request takes
            objects = [{"Key": key} for key in keys[i : i + 1000]]
            self._bucket.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})

    # -------------------------------------------------------------- destroy

    def destroy(self) -> bool:
        """Remove everything: the stack, packages, and what jobs have left in the bucket.

        Returns: False when there was nothing.
        Raises:
            DeploymentError: with the cloud's reasons; do it again.
        """
        state = self.state()
        if state is None:
            return False
        bucket = state.outputs.get("Bucket")
        if bucket is not None:
            self._delete(bucket, self._keys(bucket))
        self._stacks.delete_stack(StackName=self.stack, **self._role)
        deadline = time.monotonic() + LIMIT_S
        while (state := self.state()) is not None:
            if state.status == "DELETE_FAILED" or time.monotonic() > deadline:
                raise DeploymentError(f"{self.stack} is {state.status}: {self._reasons()}")
            time.sleep(self._look_s)
        return True
