"""A local Lambda service: the cloud's Invoke API in front, real runtime clients behind.

    boto3 --Invoke--> LambdaService -- Platform (decides) --> Environment (process, runtime API)
                            |
                        EventFile (accepted events outlive the service)

Only `endpoint_url` tells it from the cloud. It binds loopback only, and takes its functions from
whoever starts it: a request over the network can run a function, and not bring one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from wukong.aws.lambda_environment import Environment, Invocation, Outcome
from wukong.aws.lambda_events import EventFile, StoredEvent
from wukong.aws.lambda_function import LocalFunction, runtime_folder
from wukong.aws.limits import ASYNC_PAYLOAD_BYTES, CONCURRENCY, SYNC_PAYLOAD_BYTES
from wukong.aws.platform import (
    LOOP,
    Action,
    Bury,
    Deliver,
    EndEnvironment,
    EnvironmentId,
    Platform,
    Refuse,
    Remember,
    Request,
    RequestId,
    StartEnvironment,
)

if TYPE_CHECKING:
    from aiohttp import web

GRACE_S = 10.0
"""A service that is to end waits so long for what runs."""
_FUNCTION = "/functions/{name}"


@dataclass(slots=True)
class Counters:
    """What a service has done since it was started. Exact."""

    requests: int = 0
    """Accepted, events and others."""
    events: int = 0
    throttled: int = 0
    invocations: int = 0
    """Deliveries to an environment, retries included."""
    cold_starts: int = 0
    failures: int = 0
    """Invocations whose handler raised, or whose process ended."""
    buried: int = 0
    payload_bytes: int = 0
    """Of accepted requests."""
    billed_ms: int = 0
    """Each invocation rounded up to a millisecond; without cold starts."""


@dataclass(slots=True)
class _Pending:
    """A request between its acceptance and its end."""

    request: Request
    payload: bytes
    trace_id: str
    reply: asyncio.Future[Outcome] | None
    """Of a request that somebody waits for."""
    refusal: str | None = None
    outcome: Outcome | None = None
    """The last failure of an event."""


@dataclass(slots=True)
class _Held:
    """An environment and what the platform thinks it does."""

    environment: Environment
    pending: _Pending | None = None
    reply: Callable[[], None] = lambda: None
    """Answers whoever waits for the last invocation; called when the environment is free, so that
    one request after the other meets the same environment."""


@dataclass(slots=True)
class _Error(Exception):
    """An answer in the shape of the API's errors."""

    status: int
    code: str
    message: str
    fields: dict[str, str] = field(default_factory=dict)


class LambdaService:
    """The service, for one event loop.

    Args:
        functions: what can be invoked.
        directory: for the queue, logs, unpacked packages and given-up events.
        port: of the Invoke API, on loopback; 0 chooses a free one.
        requests_per_s: how many requests a second are accepted.
    """

    def __init__(
        self,
        functions: Sequence[LocalFunction],
        directory: Path,
        *,
        port: int = 0,
        requests_per_s: float = float("inf"),
    ) -> None:
        self._functions = {function.name: function for function in functions}
        self._directory = directory
        self._port = port
        self._requests_per_s = requests_per_s
        self._held: dict[EnvironmentId, _Held] = {}
        self._pending: dict[RequestId, _Pending] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._is_closing = False
        self.counters = Counters()
        self.url = ""

    # -------------------------------------------------------------- life

    async def start(self) -> None:
        """Listen, and take up the events that a former service left.

        Raises:
            OSError: the port is taken.
            ImportError: the runtime client is missing.
        """
        from aiohttp import web

        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._runtime = runtime_folder(self._directory)
        self._roots = {f.name: f.unpack(self._directory) for f in self._functions.values()}
        scalings = {name: function.scaling for name, function in self._functions.items()}
        self._platform = Platform(scalings, time.monotonic(), self._requests_per_s)
        self._events = EventFile(self._directory / "events.sqlite")
        application = web.Application(client_max_size=2 * SYNC_PAYLOAD_BYTES)
        application.add_routes(
            [
                web.post(f"/2015-03-31{_FUNCTION}/invocations", self._serve_invoke),
                web.get(f"/2015-03-31{_FUNCTION}/configuration", self._serve_configuration),
                web.get(f"/2024-08-31{_FUNCTION}/recursion-config", self._serve_recursion),
                web.get("/2016-08-19/account-settings", self._serve_account),
                web.get("/2016-08-19/account-settings/", self._serve_account),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        for event in self._events.load():
            self._take_up(event)

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Refuse what comes, wait for what runs, end all processes. Events stay on disk."""
        self._is_closing = True
        if self._alarm is not None:
            self._alarm.cancel()
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and any(held.pending for held in self._held.values()):
            await asyncio.sleep(0.02)
        while self._held or self._tasks:
            for held in list(self._held.values()):
                held.environment.kill("the service ends")
            await asyncio.sleep(0.01)
        await self._runner.cleanup()
        self._events.close()

    def environments(self) -> list[Environment]:
        """The environments that there are."""
        return [held.environment for held in self._held.values()]

    def _take_up(self, event: StoredEvent) -> None:
        """An event of a former service: at work when that ended, or queued."""
        if event.function not in self._functions:
            return
        now, wall = time.monotonic(), time.time()
        request = Request(
            RequestId(event.id),
            event.function,
            is_event=True,
            accepted_at=now - (wall - event.accepted_at),
            depth=event.depth,
            n_failures=event.n_failures,
        )
        self._keep(request, event.payload, None)
        self._perform(self._platform.requeue(request, now + event.ready_at - wall, now))

    # -------------------------------------------------------------- the API in front

    async def _serve_invoke(self, http: web.Request) -> web.StreamResponse:
        from aiohttp import web

        try:
            return await self._invoke(http)
        except _Error as error:
            body = {"Type": "User", "message": error.message, **error.fields}
            headers = {"x-amzn-ErrorType": error.code, "x-amzn-RequestId": str(uuid.uuid4())}
            return web.json_response(body, status=error.status, headers=headers)

    async def _invoke(self, http: web.Request) -> web.StreamResponse:
        from aiohttp import web

        function = self._find(http)
        kind = http.headers.get("X-Amz-Invocation-Type", "RequestResponse")
        if kind not in ("RequestResponse", "Event", "DryRun"):
            raise _Error(400, "InvalidParameterValueException", f"no such invocation type: {kind}")
        payload = await _read_payload(http, kind)
        if self._is_closing:
            raise _Error(503, "ServiceException", "the service is about to end")
        if kind == "DryRun":
            return web.Response(status=204)
        lineage = _lineage(http.headers.get("X-Amzn-Trace-Id", ""))
        request = Request(
            RequestId(str(uuid.uuid4())),
            function.name,
            is_event=kind == "Event",
            accepted_at=time.monotonic(),
            depth=lineage,
        )
        reply = None if request.is_event else asyncio.get_running_loop().create_future()
        self._submit(request, payload, reply)
        headers: dict[str, str] = {"x-amzn-RequestId": request.id}
        if reply is None:
            return web.Response(status=202, headers=headers)
        outcome = await reply
        headers["X-Amz-Executed-Version"] = "$LATEST"
        if outcome.error is not None:
            headers["X-Amz-Function-Error"] = outcome.error
        if http.headers.get("X-Amz-Log-Type") == "Tail":
            headers["X-Amz-Log-Result"] = base64.b64encode(outcome.log_tail).decode()
        return web.Response(body=outcome.payload, headers=headers, content_type="application/json")

    def _submit(
        self, request: Request, payload: bytes, reply: asyncio.Future[Outcome] | None
    ) -> None:
        """Accept a request, or raise what it is refused with."""
        pending = self._keep(request, payload, reply)
        if request.is_event:
            wall = time.time()
            self._events.add(
                StoredEvent(request.id, request.function, payload, request.depth, wall, wall, 0)
            )
        self._perform(self._platform.invoke(request, time.monotonic()))
        if pending.refusal == LOOP:
            raise _Error(400, "RecursiveInvocationException", "a chain of invocations is too long")
        if pending.refusal is not None:
            self.counters.throttled += 1
            raise _Error(
                429, "TooManyRequestsException", "Rate Exceeded.", {"Reason": pending.refusal}
            )
        self.counters.requests += 1
        self.counters.events += request.is_event
        self.counters.payload_bytes += len(payload)

    async def _serve_configuration(self, http: web.Request) -> web.StreamResponse:
        from aiohttp import web

        try:
            return web.json_response(self._find(http).to_configuration())
        except _Error as error:
            body = {"Type": "User", "Message": error.message}
            headers = {"x-amzn-ErrorType": error.code}
            return web.json_response(body, status=error.status, headers=headers)

    async def _serve_recursion(self, http: web.Request) -> web.StreamResponse:
        from aiohttp import web

        function = self._functions.get(http.match_info["name"])
        allows = function is not None and function.scaling.allows_loops
        return web.json_response({"RecursiveLoop": "Allow" if allows else "Terminate"})

    async def _serve_account(self, http: web.Request) -> web.StreamResponse:
        from aiohttp import web

        limit = {
            "ConcurrentExecutions": CONCURRENCY,
            "UnreservedConcurrentExecutions": CONCURRENCY,
        }
        return web.json_response({"AccountLimit": limit, "AccountUsage": {}})

    def _find(self, http: web.Request) -> LocalFunction:
        """The function that a request names: by its name, or by a whole or partial ARN."""
        named = unquote(http.match_info["name"])
        name = named.partition("function:")[2].partition(":")[0] if ":" in named else named
        function = self._functions.get(name)
        if function is None:
            raise _Error(404, "ResourceNotFoundException", f"Function not found: {named}")
        return function

    def _keep(
        self, request: Request, payload: bytes, reply: asyncio.Future[Outcome] | None
    ) -> _Pending:
        root = f"Root=1-{int(time.time()):08x}-{uuid.uuid4().hex[:24]}"
        trace_id = f"{root};Sampled=0;Lineage=1:{request.function[:8]}:{request.depth + 1}"
        pending = self._pending[request.id] = _Pending(request, payload, trace_id, reply)
        return pending

    # -------------------------------------------------------------- what the platform decides

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartEnvironment(environment, request):
                    self._start(environment, self._pending[request.id])
                case Deliver(environment, request):
                    held = self._held[environment]
                    held.pending = self._pending[request.id]
                    self.counters.invocations += 1
                    held.environment.deliver(_to_invocation(held.pending))
                case EndEnvironment(environment):
                    self._held[environment].environment.kill("recycled")
                case Refuse(request, reason):
                    self._pending.pop(request.id).refusal = reason
                    if request.is_event:
                        self._events.remove(request.id)
                case Remember(request, ready_at):
                    self._pending[request.id].request = request
                    wall_at = time.time() + ready_at - time.monotonic()
                    self._events.delay(request.id, wall_at, request.n_failures)
                case Bury(request, condition):
                    self._bury(self._pending.pop(request.id), condition)
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        at = self._platform.wake_at()
        if at is not None and not self._is_closing:
            wait_s = max(0.0, at - time.monotonic())
            self._alarm = asyncio.get_running_loop().call_later(wait_s, self._tick)

    def _tick(self) -> None:
        self._alarm = None
        self._perform(self._platform.tick(time.monotonic()))

    def _start(self, id: EnvironmentId, pending: _Pending) -> None:
        function = self._functions[pending.request.function]
        name = f"{function.name}-{uuid.uuid4().hex[:8]}"
        root = self._roots[function.name]
        environment = Environment(
            function,
            name,
            variables=function.variables(root, self._runtime, self.url, name),
            root=root,
            directory=self._directory,
            on_outcome=lambda invocation, outcome: self._ended(id, outcome),
            on_waiting=lambda: self._freed(id),
            on_exit=lambda: self._lost(id),
        )
        environment.assign(_to_invocation(pending))
        self._held[id] = _Held(environment, pending)
        self.counters.cold_starts += 1
        self.counters.invocations += 1
        task = asyncio.get_running_loop().create_task(environment.start())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ended(self, id: EnvironmentId, outcome: Outcome) -> None:
        """An invocation has come to an end, well or not; its environment is not free yet."""
        held = self._held[id]
        pending, held.pending = held.pending, None
        assert pending is not None, "nobody asked for this"
        self.counters.billed_ms += -int(-outcome.duration_s * 1e3 // 1)
        self.counters.failures += outcome.error is not None
        if not pending.request.is_event:
            del self._pending[pending.request.id]
            held.reply = partial(_answer, pending.reply, outcome)
        elif outcome.error is None:
            del self._pending[pending.request.id]
            self._events.remove(pending.request.id)
        elif not self._is_closing:  # what is killed at the service's end runs again after it
            pending.outcome = outcome
            self._perform(self._platform.failed(pending.request, time.monotonic()))

    def _freed(self, id: EnvironmentId) -> None:
        self._held[id].reply()
        if not self._is_closing:
            self._perform(self._platform.freed(id, time.monotonic()))

    def _lost(self, id: EnvironmentId) -> None:
        self._held.pop(id).reply()
        if not self._is_closing:
            self._perform(self._platform.lost(id, time.monotonic()))

    def _bury(self, pending: _Pending, condition: str) -> None:
        """Keep the record of an event that was given up, and hand it to its destination."""
        self._events.remove(pending.request.id)
        self.counters.buried += 1
        function = self._functions[pending.request.function]
        record = {
            "version": "1.0",
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "requestContext": {
                "requestId": pending.request.id,
                "functionArn": f"{function.arn}:$LATEST",
                "condition": condition,
                "approximateInvokeCount": pending.request.n_failures + 1,
            },
            "requestPayload": json.loads(pending.payload),
        }
        if pending.outcome is not None:
            record["responsePayload"] = json.loads(pending.outcome.payload or b"null")
        folder = self._directory / "given-up"
        folder.mkdir(exist_ok=True)
        (folder / f"{pending.request.id}.json").write_text(json.dumps(record, indent=1))
        if function.on_failure is not None:
            request = Request(
                RequestId(str(uuid.uuid4())),
                function.on_failure,
                is_event=True,
                accepted_at=time.monotonic(),
                depth=pending.request.depth + 1,
            )
            with contextlib.suppress(_Error):  # its record is on disk
                self._submit(request, json.dumps(record).encode(), None)


def _answer(reply: asyncio.Future[Outcome] | None, outcome: Outcome) -> None:
    if reply is not None and not reply.done():
        reply.set_result(outcome)


def _to_invocation(pending: _Pending) -> Invocation:
    return Invocation(pending.request.id, pending.payload, pending.trace_id)


def _lineage(trace_id: str) -> int:
    """How many invocations led to this one, as the trace header says."""
    for item in trace_id.split(";"):
        name, _, value = item.strip().partition("=")
        if name == "Lineage" and (count := value.rpartition(":")[2]).isdecimal():
            return int(count)
    return 0


async def _read_payload(http: web.Request, kind: str) -> bytes:
    """The body of a request: JSON of at most so many bytes."""
    limit = ASYNC_PAYLOAD_BYTES if kind == "Event" else SYNC_PAYLOAD_BYTES
    body = bytearray()
    async for chunk in http.content.iter_any():
        if len(body) <= limit:  # the rest is read, so that the client gets the answer
            body += chunk
    if len(body) > limit:
        message = f"Request must be smaller than {limit} bytes for the InvokeFunction operation"
        raise _Error(413, "RequestTooLargeException", message)
    if not body:
        return b"{}"
    try:
        json.loads(body)
    except ValueError as error:
        message = f"Could not parse request body into json: {error}"
        raise _Error(400, "InvalidRequestContentException", message) from None
    return bytes(body)
