"""Deployments, from end to end against moto's server; templates; who may do what."""

import contextlib
import fnmatch
import itertools
import json
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from click.testing import CliRunner

from tests.lambda_world import World, world
from tests.servers import needs
from wukong import cli
from wukong.aws.deploy import Deployment
from wukong.aws.limits import UNZIPPED_MAX_BYTES
from wukong.aws.package import (
    Package,
    _files,
    _too_large,
    build_package,
    default_requirements,
)
from wukong.aws.template import deployer_template, executors_template
from wukong.errors import DeploymentError

needs("boto3", "cfnlint", "moto")

__all__ = ["world"]

SECRET = "ab" * 32
ACCOUNT, REGION = "123456789012", "us-east-1"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)


NUMBERS = itertools.count()


@pytest.fixture
def deployment(moto_url: str, keys: None) -> Iterator[Deployment]:
    # Moto keeps a removed stack's policy, so a name is used once.
    made = Deployment(f"trial-{next(NUMBERS)}", endpoint_url=moto_url, look_s=0.01)
    yield made
    made.destroy()
    made.close()


@contextlib.contextmanager
def client(service: str, url: str) -> Iterator[Any]:
    import boto3

    made = boto3.client(service, endpoint_url=url)
    yield made
    made.close()


def small_package(tmp_path: Path, text: str = "def handler(event, context): pass") -> Package:
    path = tmp_path / "package.zip"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("wukong.py", text)
    return Package(path, f"{abs(hash(text)):x}", path.stat().st_size, len(text), ())


PARAMETERS = {"Store": "rediss://cache:6379", "Secret": SECRET, "MemoryMb": "1024"}


# ------------------------------------------------------------------ templates


@pytest.mark.slow
@pytest.mark.parametrize("template", [executors_template, deployer_template])
def test_templates_pass_cfn_lint(template: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.json"
    path.write_text(json.dumps(template()))
    run = "import sys; from cfnlint.runner import main; sys.exit(main())"
    command = [sys.executable, "-W", "ignore", "-c", run, "--regions", REGION, "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_executors_may_invoke_themselves_in_long_chains() -> None:
    function = executors_template()["Resources"]["Function"]["Properties"]
    assert function["RecursiveLoop"] == "Allow"


def test_what_jobs_leave_in_the_bucket_expires() -> None:
    bucket = executors_template()["Resources"]["Bucket"]["Properties"]
    (rule,) = bucket["LifecycleConfiguration"]["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}


def resolve(value: Any) -> Any:
    """A template's value, with the deployment's names in it."""
    names = {
        "FunctionName": "trial",
        "BlobPrefix": "jobs",
        "AWS::Partition": "aws",
        "AWS::Region": REGION,
        "AWS::AccountId": ACCOUNT,
    }
    match value:
        case {"Fn::Sub": str(text)}:
            for name, found in names.items():
                text = text.replace("${" + name + "}", found)
            assert "${" not in text
            return text
        case dict():
            return {key: resolve(item) for key, item in value.items()}
        case list():
            return [resolve(item) for item in value]
    return value


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def holds(condition: dict[str, dict[str, str]], context: dict[str, str]) -> bool:
    return all(
        fnmatch.fnmatchcase(context.get(key, ""), pattern)
        for tests in condition.values()
        for key, pattern in tests.items()
    )


def allows(statements: list[Any], action: str, resource: str, **context: str) -> bool:
    """What IAM would decide: a deny wins, and what nothing allows is denied."""
    context = {key.replace("_", ":"): value for key, value in context.items()}
    found = {
        statement["Effect"]
        for statement in statements
        if any(fnmatch.fnmatchcase(action, pattern) for pattern in as_list(statement["Action"]))
        and any(fnmatch.fnmatchcase(resource, p) for p in as_list(statement["Resource"]))
        and holds(
            statement.get("Condition", {}), {k.replace("_", ":"): v for k, v in context.items()}
        )
    }
    return found == {"Allow"}


def statements_of(resource: Any) -> list[Any]:
    properties = resolve(resource)["Properties"]
    documents = [policy["PolicyDocument"] for policy in properties.get("Policies", ())]
    documents += [properties[key] for key in ("PolicyDocument",) if key in properties]
    return [statement for document in documents for statement in document["Statement"]]


FUNCTION = f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:trial"
BUCKET = f"arn:aws:s3:::trial-{ACCOUNT}-{REGION}"
LOGS = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/lambda/trial"


def test_an_executor_may_do_what_it_needs_and_nothing_else() -> None:
    resources = executors_template()["Resources"]
    role = [s for name in ("ExecutorRole", "NetworkPolicy") for s in statements_of(resources[name])]
    assert allows(role, "lambda:InvokeFunction", FUNCTION)
    assert allows(role, "s3:GetObject", f"{BUCKET}/jobs/1/2/3")
    assert allows(role, "s3:PutObject", f"{BUCKET}/jobs/1/2/3")
    assert allows(role, "s3:DeleteObject", f"{BUCKET}/jobs/1/2/3")
    assert allows(role, "s3:ListBucket", BUCKET, s3_prefix="jobs/1/")
    assert allows(role, "logs:PutLogEvents", f"{LOGS}:log-stream:x")
    assert allows(role, "ec2:CreateNetworkInterface", "*")

    assert not allows(role, "lambda:InvokeFunction", FUNCTION + "-other")
    assert not allows(role, "lambda:UpdateFunctionCode", FUNCTION)
    assert not allows(role, "s3:PutObject", f"{BUCKET}/code/1.zip")
    assert not allows(role, "s3:GetObject", f"{BUCKET}/code/1.zip")
    assert not allows(role, "s3:GetObject", "arn:aws:s3:::another/jobs/1")
    assert not allows(role, "s3:ListBucket", BUCKET, s3_prefix="code/")
    assert not allows(role, "s3:ListBucket", BUCKET)
    assert not allows(role, "s3:DeleteBucket", BUCKET)
    assert not allows(role, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/any")
    assert not allows(role, "logs:PutLogEvents", LOGS + "-other:log-stream:x")
    # The network is the platform's to use in the executor's name, and not its code's.
    by_code = {"lambda_SourceFunctionArn": FUNCTION}
    assert not allows(role, "ec2:CreateNetworkInterface", "*", **by_code)


def test_without_subnets_an_executor_has_no_rights_to_networks() -> None:
    policies = executors_template()["Resources"]["ExecutorRole"]["Properties"]["Policies"]
    assert [policy["PolicyName"] for policy in policies] == ["executor"]
    assert executors_template()["Resources"]["NetworkPolicy"]["Condition"] == "HasNetwork"


def test_a_client_may_run_graphs_and_nothing_else() -> None:
    policy = statements_of(executors_template()["Resources"]["ClientPolicy"])
    assert allows(policy, "lambda:InvokeFunction", FUNCTION)
    assert allows(policy, "s3:PutObject", f"{BUCKET}/jobs/1/2/3")
    assert not allows(policy, "lambda:UpdateFunctionCode", FUNCTION)
    assert not allows(policy, "s3:PutObject", f"{BUCKET}/code/1.zip")


def test_a_deployer_may_touch_one_deployment_only() -> None:
    role = statements_of(deployer_template()["Resources"]["DeployerRole"])
    executor = f"arn:aws:iam::{ACCOUNT}:role/trial-{REGION}-executor"
    to_lambda = {"iam_PassedToService": "lambda.amazonaws.com"}
    assert allows(role, "lambda:CreateFunction", FUNCTION)
    assert allows(role, "s3:CreateBucket", BUCKET)
    assert allows(role, "iam:CreateRole", executor)
    assert allows(role, "iam:PassRole", executor, **to_lambda)
    assert not allows(role, "lambda:CreateFunction", FUNCTION + "-other")
    assert not allows(role, "lambda:InvokeFunction", FUNCTION)
    assert not allows(role, "iam:PassRole", executor)
    assert not allows(role, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/admin", **to_lambda)
    assert not allows(role, "iam:CreateRole", f"arn:aws:iam::{ACCOUNT}:role/admin")
    assert not allows(role, "iam:AttachRolePolicy", executor)
    assert not allows(role, "s3:GetObject", f"{BUCKET}/jobs/1")


# ------------------------------------------------------------------ a deployment's life


@pytest.mark.slow
def test_a_deployment_is_made_changed_and_removed(
    deployment: Deployment, moto_url: str, tmp_path: Path
) -> None:
    first = small_package(tmp_path)
    assert deployment.state() is None
    assert deployment.deploy(first, PARAMETERS) == "created"
    state = deployment.state()
    assert state is not None
    assert state.parameters["MemoryMb"] == "1024"
    assert not {"Secret", "Store"} & set(state.parameters)
    bucket = state.outputs["Bucket"]
    with client("lambda", moto_url) as functions, client("s3", moto_url) as objects:
        made = functions.get_function_configuration(FunctionName=deployment.name)
        assert made["MemorySize"] == 1024
        assert made["Handler"] == "wukong.executor.aws_lambda.handler"
        assert made["Environment"]["Variables"]["WUKONG_STORE"] == PARAMETERS["Store"]
        assert made["Environment"]["Variables"]["WUKONG_BLOBS"] == f"s3://{bucket}/jobs"
        # What is not given stays; the package that is not used any more goes.
        second = small_package(tmp_path, "changed = True")
        assert deployment.deploy(second, {"TimeoutS": "60"}) == "updated"
        made = functions.get_function_configuration(FunctionName=deployment.name)
        assert (made["MemorySize"], made["Timeout"]) == (1024, 60)
        assert made["Environment"]["Variables"]["DASK_WUKONG__STORE__SECRET"] == SECRET
        listed = objects.list_objects_v2(Bucket=bucket)
        assert [item["Key"] for item in listed["Contents"]] == [second.key]

        objects.put_object(Bucket=bucket, Key="jobs/1/2/3", Body=b"left")
        assert deployment.destroy() is True
        assert deployment.state() is None
        assert functions.list_functions()["Functions"] == []
        assert bucket not in [b["Name"] for b in objects.list_buckets()["Buckets"]]
    assert deployment.destroy() is False


@pytest.mark.slow
def test_an_unknown_parameter_is_named(deployment: Deployment, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="Colour"):
        deployment.deploy(small_package(tmp_path), {**PARAMETERS, "Colour": "red"})


@pytest.mark.slow
def test_the_command_line_shows_and_removes_what_is_there(
    deployment: Deployment, moto_url: str, tmp_path: Path
) -> None:
    options = ["--name", deployment.name, "--endpoint-url", moto_url]
    runner = CliRunner()
    missing = runner.invoke(cli.main, ["aws", "status", *options])
    assert (missing.exit_code, missing.output) == (1, f"{deployment.stack}: there is none\n")
    deployment.deploy(small_package(tmp_path), PARAMETERS)
    shown = runner.invoke(cli.main, ["aws", "status", *options])
    assert shown.exit_code == 0
    assert "MemoryMb           1024" in shown.output
    assert SECRET not in shown.output
    removed = runner.invoke(cli.main, ["aws", "destroy", "--yes", *options])
    assert removed.output == f"{deployment.stack}: removed\n"
    again = runner.invoke(cli.main, ["aws", "destroy", "--yes", *options])
    assert again.output == f"{deployment.stack}: nothing there\n"


@pytest.mark.slow
def test_a_new_deployment_needs_a_store(moto_url: str, keys: None) -> None:
    options = ["--name", "other", "--endpoint-url", moto_url]
    refused = CliRunner().invoke(cli.main, ["aws", "deploy", *options])
    assert refused.exit_code == 2
    assert "--store" in refused.output


def test_the_deployers_template_is_printed() -> None:
    printed = CliRunner().invoke(cli.main, ["aws", "deployer-role"])
    assert json.loads(printed.output) == deployer_template()


# ------------------------------------------------------------------ the package


def test_default_requirements_are_this_environments_versions() -> None:
    found = dict(item.split("==") for item in default_requirements())
    assert found["dask"] == dask.__version__
    with pytest.raises(DeploymentError, match="no-such-package"):
        default_requirements(["no-such-package"])


def test_caches_scripts_and_tests_stay_out_of_a_package(tmp_path: Path) -> None:
    for name in (
        "numpy/core.py",
        "numpy/lib/tests/test_it.py",
        "mine/tests/kept.py",
        "mine/__pycache__/a.pyc",
        "bin/f2py",
        "numpy-1.dist-info/RECORD",
        "numpy-1.dist-info/METADATA",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    kept = ["mine/tests/kept.py", "numpy-1.dist-info/METADATA", "numpy/core.py"]
    assert sorted(name for name, _ in _files(tmp_path)) == kept


def test_a_package_that_is_too_large_names_what_is(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(3_000_000))
    small.write_bytes(b"")
    message = _too_large({"big/a": large, "big/b": large, "little": small}, UNZIPPED_MAX_BYTES + 1)
    assert "262 MB" in message
    assert "big 6 MB, little 0 MB" in message


@pytest.mark.slow
def test_a_package_runs_jobs_in_an_empty_environment(world: World, tmp_path: Path) -> None:
    package = build_package(tmp_path / "wukong.zip", default_requirements(["lmdb"]))
    empty = tmp_path / "empty"
    venv.create(empty, with_pip=False, symlinks=True)
    service = world.service(code=package.path, python=str(empty / "bin" / "python"))
    cluster = world.cluster(service.url)
    parts = [dask.delayed(pow)(i, 2) for i in range(10)]
    assert dask.delayed(sum)(parts).compute(scheduler=cluster.get) == 285
    assert service.counters.failures == 0


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    requirements = [item for item in default_requirements() if item.startswith("toolz==")]
    first, second = (
        build_package(tmp_path / f"{name}.zip", requirements) for name in ("first", "second")
    )
    assert first.digest == second.digest
    assert first.key == f"code/{first.digest}.zip"
    with zipfile.ZipFile(first.path) as package:
        names = package.namelist()
    assert "wukong/executor/aws_lambda.py" in names
    assert "toolz/__init__.py" in names


@pytest.mark.slow
def test_a_requirement_that_nobody_has_is_told_in_pips_words(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no-such-file"):
        build_package(tmp_path / "x.zip", (), requirements_file=tmp_path / "no-such-file.txt")


def test_a_deployment_that_is_as_it_shall_be_is_left_alone(
    moto_url: str, keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    deployment = Deployment("same", endpoint_url=moto_url)

    def update_stack(**_: object) -> None:
        message = "No updates are to be performed."
        raise ClientError({"Error": {"Code": "ValidationError", "Message": message}}, "UpdateStack")

    assert deployment._change(update_stack, {}, frozenset()) is False
    deployment.close()


@pytest.mark.slow
def test_the_doctor_finds_what_is_wrong_with_a_function(world: World) -> None:
    service = world.service(memory_mb=1024)
    options = ["--endpoint-url", service.url, "--region", REGION]
    found = CliRunner().invoke(
        cli.main, ["doctor", "--function", "wukong", "--store", world.store, *options]
    )
    text = " ".join(found.output.split())
    assert "58% of a core" in text
    assert "a round trip" in text
    assert f"dask {dask.__version__}" in text
    assert found.exit_code == 1
    missing = CliRunner().invoke(cli.main, ["doctor", "--function", "no-such", *options])
    assert missing.exit_code == 1
    assert "wukong aws deploy" in " ".join(missing.output.split())
