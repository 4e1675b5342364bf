"""The local Lambda service, seen through boto3: real runtime clients behind, real processes."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import needs
from wukong.aws.lambda_function import LocalFunction
from wukong.aws.lambda_local import LocalLambda
from wukong.aws.limits import ASYNC_PAYLOAD_BYTES, SYNC_PAYLOAD_BYTES
from wukong.aws.platform import Scaling

needs("aiohttp", "awslambdaric", "boto3")

CODE = """
import ctypes, json, os, time
count = 0
def handler(event, context):
    global count
    count += 1
    print("seen", event.get("word"))
    if "mark" in event:
        with open(event["mark"], "a") as file:
            file.write("x")
    time.sleep(event.get("sleep", 0))
    if event.get("raise"):
        raise ValueError("as told")
    if event.get("exit"):
        os._exit(3)
    if event.get("kill"):
        ctypes.string_at(0)
    if "allocate" in event:
        return len(bytearray(event["allocate"]))
    if "answer" in event:
        return "a" * event["answer"]
    return {"count": count, "pid": os.getpid(), "left_ms": context.get_remaining_time_in_millis(),
            "memory": context.memory_limit_in_mb, "arn": context.invoked_function_arn}
"""

Start = Callable[..., LocalLambda]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "told.py").write_text(CODE)
    (folder / "broken.py").write_text("import no_such_module_anywhere")
    return folder


@pytest.fixture
def start(tmp_path: Path, code: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def begin(handler: str = "told.handler", **fields: Any) -> LocalLambda:
            rate = fields.pop("requests_per_s", float("inf"))
            function = LocalFunction("f", handler, code, **fields)
            return stack.enter_context(
                LocalLambda([function], tmp_path / "service", requests_per_s=rate)
            )

        yield begin


CLIENTS: list[Any] = []


@pytest.fixture(autouse=True)
def clients_are_closed() -> Iterator[None]:
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def connect(url: str) -> Any:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "lambda",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=Config(retries={"total_max_attempts": 1}),
    )
    CLIENTS.append(client)
    return client


def invoke(client: Any, event: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """The answer's payload and the kind of its error."""
    reply = client.invoke(FunctionName="f", Payload=json.dumps(event), **options)
    payload = reply["Payload"].read()
    return (json.loads(payload) if payload else None), reply.get("FunctionError")


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def state_of(pid: int) -> str:
    """The process's state: S sleeps, T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_an_environment_stays_warm_and_frozen_between_invocations(start: Start) -> None:
    with start(memory_mb=256, timeout_s=30) as service:
        client = connect(service.url)
        first, _ = invoke(client, {})
        second, _ = invoke(client, {})
        assert (first["count"], second["count"]) == (1, 2)
        assert first["pid"] == second["pid"]
        assert first["memory"] == "256"
        assert 0 < first["left_ms"] <= 30_000
        assert first["arn"].endswith(":function:f")
        wait_until(lambda: state_of(first["pid"]) == "T")
        assert service.counters.cold_starts == 1
        assert service.counters.invocations == 2


@pytest.mark.slow
def test_errors_come_as_the_cloud_tells_them(start: Start) -> None:
    client = connect(start(timeout_s=1.0, memory_mb=256).url)
    raised, kind = invoke(client, {"raise": True})
    assert (raised["errorType"], raised["errorMessage"], kind) == (
        "ValueError",
        "as told",
        "Unhandled",
    )
    exited, kind = invoke(client, {"exit": True})
    assert (exited["errorType"], kind) == ("Runtime.ExitError", "Unhandled")
    assert "status 3" in exited["errorMessage"]
    killed, _ = invoke(client, {"kill": True})
    assert "SIGSEGV" in killed["errorMessage"]
    late, kind = invoke(client, {"sleep": 20})
    assert (late["errorType"], kind) == ("Sandbox.Timedout", "Unhandled")
    assert "timed out after 1.00 seconds" in late["errorMessage"]
    full, _ = invoke(client, {"allocate": 1 << 29})
    assert full["errorType"] == "MemoryError"
    after, kind = invoke(client, {})
    assert (after["count"], kind) == (2, None)


@pytest.mark.slow
def test_a_handler_that_cannot_be_imported_is_an_error_of_the_invocation(start: Start) -> None:
    failed, kind = invoke(connect(start("broken.handler").url), {})
    assert (failed["errorType"], kind) == ("Runtime.ImportModuleError", "Unhandled")
    assert "no_such_module_anywhere" in failed["errorMessage"]


def event_of(size_bytes: int) -> bytes:
    """JSON of exactly so many bytes."""
    return b'{"word": "' + b"a" * (size_bytes - 12) + b'"}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "limit"), [("Event", ASYNC_PAYLOAD_BYTES), ("RequestResponse", SYNC_PAYLOAD_BYTES)]
)
def test_payloads_are_taken_up_to_the_limit_and_no_further(
    start: Start, kind: str, limit: int
) -> None:
    service = start()
    client = connect(service.url)
    for size_bytes in (limit - 1, limit):
        reply = client.invoke(FunctionName="f", Payload=event_of(size_bytes), InvocationType=kind)
        assert reply["StatusCode"] == (202 if kind == "Event" else 200)
    with pytest.raises(client.exceptions.RequestTooLargeException) as caught:
        client.invoke(FunctionName="f", Payload=event_of(limit + 1), InvocationType=kind)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 413
    assert service.counters.requests == 2
    wait_until(lambda: service.counters.invocations == 2)


@pytest.mark.slow
def test_an_answer_over_the_limit_is_an_error(start: Start) -> None:
    client = connect(start().url)
    fits, kind = invoke(client, {"answer": SYNC_PAYLOAD_BYTES - 2})
    assert (len(fits), kind) == (SYNC_PAYLOAD_BYTES - 2, None)
    large, kind = invoke(client, {"answer": SYNC_PAYLOAD_BYTES - 1})
    assert (large["errorType"], kind) == ("Function.ResponseSizeTooLarge", "Unhandled")


def test_what_cannot_be_invoked_is_named(start: Start) -> None:
    client = connect(start().url)
    with pytest.raises(client.exceptions.ResourceNotFoundException, match="no-such"):
        client.invoke(FunctionName="no-such")
    with pytest.raises(client.exceptions.InvalidRequestContentException):
        client.invoke(FunctionName="f", Payload=b"{not json")
    assert client.invoke(FunctionName="f", InvocationType="DryRun")["StatusCode"] == 204
    arn = "arn:aws:lambda:us-east-1:000000000000:function:f"
    assert client.get_function_configuration(FunctionName=arn)["FunctionArn"] == arn


@pytest.mark.slow
def test_an_invoker_may_have_the_end_of_the_log(start: Start) -> None:
    client = connect(start().url)
    reply = client.invoke(FunctionName="f", Payload=b'{"word": "hello"}', LogType="Tail")
    log = base64.b64decode(reply["LogResult"]).decode()
    assert "seen hello" in log
    assert "REPORT RequestId: " + reply["ResponseMetadata"]["RequestId"] in log


@pytest.mark.slow
def test_those_who_wait_are_throttled_and_events_are_not(start: Start, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    service = start(scaling=Scaling(concurrency=1))
    client = connect(service.url)
    for _ in range(3):
        invoke(client, {"sleep": 0.2, "mark": str(mark)}, InvocationType="Event")
    with pytest.raises(client.exceptions.TooManyRequestsException) as caught:
        invoke(client, {})
    assert caught.value.response["Reason"] == "ConcurrentInvocationLimitExceeded"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
    wait_until(lambda: mark.exists() and mark.read_text() == "xxx")
    assert service.counters.cold_starts == 1
    assert service.counters.throttled == 1


def test_a_caller_beyond_the_rate_is_throttled(start: Start) -> None:
    client = connect(start(requests_per_s=1.0, scaling=Scaling(concurrency=0)).url)
    invoke(client, {}, InvocationType="Event")
    with pytest.raises(client.exceptions.TooManyRequestsException) as caught:
        invoke(client, {}, InvocationType="Event")
    assert caught.value.response["Reason"] == "CallerRateLimitExceeded"


@pytest.mark.slow
def test_an_event_that_fails_is_tried_again_and_ends_at_its_destination(
    tmp_path: Path, code: Path
) -> None:
    mark = tmp_path / "mark"
    scaling = Scaling(retry_after_s=(0.05, 0.05))
    functions = [
        LocalFunction("f", "told.handler", code, scaling=scaling, on_failure="g"),
        LocalFunction("g", "told.handler", code),
    ]
    with LocalLambda(functions, tmp_path / "service") as service:
        invoke(connect(service.url), {"raise": True, "mark": str(mark)}, InvocationType="Event")
        wait_until(lambda: service.counters.buried == 1)
        wait_until(lambda: service.counters.invocations == 4)
        assert mark.read_text() == "xxx"
        (path,) = (tmp_path / "service" / "given-up").iterdir()
        record = json.loads(path.read_text())
        assert record["requestContext"]["condition"] == "RetriesExhausted"
        assert record["requestContext"]["approximateInvokeCount"] == 3
        assert record["requestPayload"]["mark"] == str(mark)
        assert record["responsePayload"]["errorMessage"] == "as told"


@pytest.mark.slow
def test_a_dead_environment_is_replaced(start: Start) -> None:
    service = start()
    client = connect(service.url)
    first, _ = invoke(client, {})
    os.kill(first["pid"], signal.SIGKILL)  # frozen
    wait_until(lambda: not service.environments())
    second, kind = invoke(client, {})
    assert (second["count"], kind) == (1, None)


SERVE = """
import sys, time
from pathlib import Path
from wukong.aws.lambda_function import LocalFunction
from wukong.aws.lambda_local import LocalLambda
from wukong.aws.platform import Scaling
function = LocalFunction("f", "told.handler", Path(sys.argv[1]), scaling=Scaling(concurrency=1))
service = LocalLambda([function], Path(sys.argv[2]), port=int(sys.argv[3]))
print(service.url, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_events_outlive_a_killed_service_and_processes_do_not(tmp_path: Path, code: Path) -> None:
    mark = tmp_path / "mark"

    def begin(port: str) -> tuple["subprocess.Popen[str]", str]:
        command = [sys.executable, "-c", SERVE, str(code), str(tmp_path / "service"), port]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    process, url = begin("0")
    try:
        client = connect(url)
        first, _ = invoke(client, {})
        for _ in range(5):
            invoke(client, {"mark": str(mark), "sleep": 0.2}, InvocationType="Event")
        wait_until(mark.exists)
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: not Path(f"/proc/{first['pid']}").exists())
    n_before = len(mark.read_text())
    assert n_before < 5
    process, again = begin(url.rpartition(":")[2])
    try:
        assert again == url
        # The one that was at work when the service was killed runs once more: at least once.
        wait_until(lambda: len(mark.read_text()) >= 6 - (n_before == 5))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path, code: Path) -> None:
    mark = tmp_path / "mark"
    run = "import sys; from wukong.cli import main; sys.argv[0] = 'wukong'; main()"
    command = [sys.executable, "-u", "-c", run, "lambda-local", "--port", "0"]
    command += ["--name", "f", "--package", str(code), "--handler", "told.handler"]
    command += ["--directory", str(tmp_path / "service"), "--concurrency", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = connect(process.stdout.readline().split()[-1])
        first, _ = invoke(client, {})
        for _ in range(3):
            invoke(client, {"sleep": 0.5, "mark": str(mark)}, InvocationType="Event")
        wait_until(mark.exists)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert "4 requests, 0 throttled" in rest
    assert not Path(f"/proc/{first['pid']}").exists()
    # The one that ran has ended; the last one is kept for the next service.
    assert len(mark.read_text()) == 1
