"""Starts executors as AWS Lambda functions: asynchronous invocations, paced and batched.

    invoke() --tokens--> groups --> payloads --> (event loop of a thread) --Event--> Lambda

Clients and executors invoke alike; executors with the role of their function. What cannot be
invoked stays queued in the store, where the sweeper finds it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wukong.errors import InvokeError, Throttled
from wukong.executor.aws_lambda_pace import (
    Group,
    Pace,
    Token,
    encode_payloads,
    group_tokens,
    merge_payloads,
    plan_payloads,
)
from wukong.executor.invoker import share_of_idle
from wukong.executor.messages import Invocation

logger = logging.getLogger(__name__)

IN_FLIGHT = 64
"""Requests at once: at 20 ms each that is 3,200 a second, more than one core can sign."""
PATIENCE_S = 30.0
"""What the platform has refused for so long is left to the sweeper."""
CLOSE_S = 5.0
NEEDED = "AWS Lambda needs its SDK: pip install 'wukong[aws]'"
_THROTTLED = frozenset(
    {
        "TooManyRequestsException",
        "ThrottlingException",
        "Throttling",
        "EC2ThrottledException",
        "ServiceException",
        "ServiceUnavailable",
        "InternalServerError",
    }
)


@dataclass(slots=True)
class InvokerCounters:
    """What an invoker has done. Exact."""

    requests: int = 0
    """Accepted by the platform."""
    tokens: int = 0
    """In them."""
    refused: int = 0
    """Requests that were throttled or not answered, and sent again or given up."""
    given_up: int = 0
    """Tokens that were left to the sweeper."""
    payload_bytes: int = 0


@dataclass(slots=True)
class _Waiting:
    """A payload that has not been accepted."""

    groups: list[Group]
    since: float


class LambdaInvoker:
    """Invokes a function for tokens. Thread-safe.

    Args:
        function: its name or ARN.
        n_executors: executors that run at a time, at most.
        fields: what every payload carries beside the tokens.
        endpoint_url, region: of the service; None: as the SDK finds them.
        count_busy: executors that are at work, as far as known.
        patience_s: how long a refused payload is tried again.
    """

    def __init__(
        self,
        function: str,
        *,
        n_executors: int,
        fields: dict[str, object] | None = None,
        endpoint_url: str | None = None,
        region: str | None = None,
        count_busy: Callable[[], int] = lambda: 0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.function = function
        self.n_executors = n_executors
        self.fields = dict(fields or {})
        self.count_busy = count_busy
        self.counters = InvokerCounters()
        self._endpoint = {"endpoint_url": endpoint_url, "region_name": region}
        self._patience_s = patience_s
        self._pace = Pace()
        self._changed = threading.Condition()
        """Guards what follows."""
        self._waiting: deque[_Waiting] = deque()
        self._n_in_flight = 0
        self._failure: str | None = None
        """Why the platform refuses for good."""
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None

    # -------------------------------------------------------------- what executors and clients call

    def invoke(self, invocations: Sequence[Invocation]) -> None:
        """See `Invoker.invoke`; returns before the platform has answered.

        Raises:
            InvokeError: the platform has refused an earlier one for good, or this is closed.
        """
        tokens: list[Token] = [(i.job, i.token) for i in invocations]
        self.forward(group_tokens(tokens, self.n_executors))

    def forward(self, groups: Sequence[Group]) -> None:
        """Send groups as they are; raises as `invoke`."""
        now = time.monotonic()
        with self._changed:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise InvokeError(f"{self.function} cannot be invoked: {failure}")
            if self._is_closing:
                raise InvokeError("the invoker is closed")
            for payload in plan_payloads(groups):
                self._waiting.append(_Waiting(payload, now))
            if groups:
                self._wake()

    def connect(self) -> None:
        """Begin to load the SDK and to connect, beside the caller."""
        with self._changed:
            self._wake()

    def n_idle(self) -> int:
        """The caller's share of the executors that would start at once, as far as known."""
        n_busy = self.count_busy()
        return share_of_idle(self.n_executors - n_busy, n_busy, random.random())

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is under way. False: something still is."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and not self._n_in_flight, timeout_s
            )

    def close(self) -> None:
        """Send what waits, for a few seconds, and end. Idempotent."""
        self.flush(CLOSE_S)
        with self._changed:
            self._is_closing = True
            self._waiting.clear()
            thread = self._thread
            if thread is not None:
                self._wake()
        if thread is not None:
            thread.join(CLOSE_S)

    # -------------------------------------------------------------- the thread

    def _wake(self) -> None:
        """Have the thread look; the lock is held."""
        if self._thread is None:
            self._loop = asyncio.new_event_loop()
            self._news = asyncio.Event()
            self._thread = threading.Thread(
                target=self._work, args=(self._loop,), name="wukong-invoker", daemon=True
            )
            self._thread.start()
        assert self._loop is not None, "a thread has its loop"
        assert self._news is not None, "and its event"
        self._loop.call_soon_threadsafe(self._news.set)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_until_complete(self._serve())
        except Exception as error:  # no SDK, no region, no credentials: whoever invokes is told
            logger.warning("%s cannot be invoked: %s", self.function, error)
            with self._changed:
                self._failure = str(error)
                self._waiting.clear()
                self._n_in_flight = 0
                self._thread = None
                self._changed.notify_all()
        finally:
            loop.close()

    async def _serve(self) -> None:
        assert self._news is not None, "the thread was started with it"
        async with connect_async(**self._endpoint) as client:
            tasks: set[asyncio.Task[None]] = set()
            while not self._is_closing:
                payload = self._take()
                if payload is None:
                    self._news.clear()
                    if not self._waiting or self._n_in_flight >= IN_FLIGHT:
                        await self._news.wait()
                    continue
                wait_s = self._pace.wait_s(time.monotonic())
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                self._pace.sent(time.monotonic())
                task = asyncio.get_running_loop().create_task(self._send(client, payload))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks, timeout=CLOSE_S)
        # Connections end in the loop's next rounds, not in the call that closes them.
        for _ in range(3):
            await asyncio.sleep(0)

    def _take(self) -> _Waiting | None:
        """The next payload; several as one after refusals."""
        with self._changed:
            if not self._waiting or self._n_in_flight >= IN_FLIGHT:
                return None
            n = min(self._pace.n_merged, len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(n)]
            self._n_in_flight += 1
        if n == 1:
            return taken[0]
        return _Waiting(merge_payloads(w.groups for w in taken), min(w.since for w in taken))

    async def _send(self, client: Any, payload: _Waiting) -> None:
        parts = deque(encode_payloads(payload.groups, self.fields))
        try:
            while parts:
                await self._send_one(client, *parts[0])
                parts.popleft()
        except Throttled:
            self._pace.refused(time.monotonic())
            left = [group for groups, _ in parts for group in groups]
            self._try_again(_Waiting(left, payload.since))
        except InvokeError as error:
            logger.warning("%s; its tokens stay queued in the store", error)
            with self._changed:
                self._failure = str(error)
        finally:
            with self._changed:
                self._n_in_flight -= 1
                self._changed.notify_all()
            assert self._news is not None, "the thread was started with it"
            self._news.set()

    async def _send_one(self, client: Any, groups: list[Group], encoded: bytes) -> None:
        """Invoke once. Raises: Throttled: later, perhaps. InvokeError: never."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            await client.invoke(FunctionName=self.function, InvocationType="Event", Payload=encoded)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in _THROTTLED or status in (429, 500, 502, 503, 504):
                raise Throttled(str(error)) from error
            raise InvokeError(str(error)) from error
        except (BotoCoreError, OSError) as error:
            # The service is away, or about to be started again; it may have taken the request.
            raise Throttled(str(error)) from error
        self._pace.accepted(time.monotonic())
        self.counters.requests += 1
        self.counters.tokens += sum(map(len, groups))
        self.counters.payload_bytes += len(encoded)

    def _try_again(self, payload: _Waiting) -> None:
        self.counters.refused += 1
        n_tokens = sum(map(len, payload.groups))
        if time.monotonic() - payload.since < self._patience_s:
            with self._changed:
                self._waiting.appendleft(payload)
            return
        self.counters.given_up += n_tokens
        logger.warning(
            "%s: refused for %.0f s; %d tokens stay queued, and are swept up later",
            self.function,
            self._patience_s,
            n_tokens,
        )


def connect_async(**endpoint: str | None) -> Any:
    """An asynchronous client of Lambda, as a context manager; retries are ours, not the SDK's.

    Raises:
        ImportError: the SDK is missing; the message says how to install it.
    """
    try:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session
    except ImportError:
        raise ImportError(NEEDED) from None
    config = AioConfig(
        retries={"total_max_attempts": 1},
        max_pool_connections=IN_FLIGHT,
        connect_timeout=5,
        read_timeout=30,
    )
    return get_session().create_client("lambda", config=config, **endpoint)


class LambdaClient:
    """Calls a function and waits for its answer; see `connect`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __enter__(self) -> LambdaClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def invoke(self, function: str, event: dict[str, object]) -> dict[str, Any]:
        """The function's answer.

        Raises:
            InvokeError: it cannot be invoked, or has failed.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            reply = self._client.invoke(FunctionName=function, Payload=json.dumps(event))
            payload: dict[str, Any] = json.loads(reply["Payload"].read() or b"null")
        except (BotoCoreError, ClientError, ValueError) as error:
            raise InvokeError(f"{function} cannot be invoked: {error}") from error
        if "FunctionError" in reply:
            raise InvokeError(f"{function} has failed: {payload.get('errorMessage', payload)}")
        return payload


def connect(endpoint_url: str | None, region: str | None) -> LambdaClient:
    """A client for single calls, as a context manager.

    Raises:
        ImportError: the SDK is missing; the message says how to install it.
        InvokeError: no region or no credentials.
    """
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ImportError(NEEDED) from None
    try:
        return LambdaClient(boto3.client("lambda", endpoint_url=endpoint_url, region_name=region))
    except (BotoCoreError, ValueError) as error:
        raise InvokeError(f"AWS Lambda cannot be reached: {error}") from error
