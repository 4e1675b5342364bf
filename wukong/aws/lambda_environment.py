"""One execution environment of the local Lambda service: a process and the API that it polls.

    process (awslambdaric) --GET next--> frozen until `deliver` --POST response--> GET next ...

The real runtime client runs the function's handler. Each environment has a port of its own, so that
the client finds the paths where it expects them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wukong.aws.lambda_function import LocalFunction
from wukong.aws.limits import INIT_S, SYNC_PAYLOAD_BYTES

if TYPE_CHECKING:
    from aiohttp import web

LOG_TAIL_BYTES = 4096
"""What an invoker with LogType=Tail gets."""
_API = "/2018-06-01/runtime"


@dataclass(frozen=True, slots=True)
class Invocation:
    """What an environment is given to do."""

    id: str
    payload: bytes
    trace_id: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an invocation."""

    payload: bytes
    error: str | None
    """None: it succeeded. Unhandled: the handler raised, or the process ended."""
    duration_s: float
    log_tail: bytes = b""


class Environment:
    """A process that runs one invocation at a time, and is stopped in between. For one event loop.

    Args:
        function: what it runs.
        name: of the environment, for its log and its folder.
        variables, root, directory: see `LocalFunction.variables`; the folder of the service.
        on_outcome: called with the invocation and what came of it.
        on_waiting: called when the process waits for its next invocation.
        on_exit: called once when the process is gone.
    """

    def __init__(
        self,
        function: LocalFunction,
        name: str,
        *,
        variables: dict[str, str],
        root: Path | None,
        directory: Path,
        on_outcome: Callable[[Invocation, Outcome], None],
        on_waiting: Callable[[], None],
        on_exit: Callable[[], None],
    ) -> None:
        self.function = function
        self.name = name
        self._variables = variables
        self._root = root
        self._on_outcome = on_outcome
        self._on_waiting = on_waiting
        self._on_exit = on_exit
        self._scratch = directory / "tmp" / name
        self._log_path = directory / "logs" / f"{name}.log"
        self._next: asyncio.Future[Invocation] | None = None
        """The runtime client waits for this; None while it works."""
        self._current: Invocation | None = None
        self._begun_at = 0.0
        self._log_begin = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._cause = ""
        """Why it was killed, for the invocation that it was at."""
        self._error_type = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._pid_fd = -1
        self._server: asyncio.Server | None = None
        self.started_at = time.monotonic()
        self.init_s: float | None = None
        """How long the cold start took."""

    # -------------------------------------------------------------- life

    async def start(self) -> None:
        """Open the port and start the process; `on_waiting` follows, or `on_exit`."""
        from aiohttp import web

        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(web.Server(self._serve), "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.function.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._root or self._scratch,
                env={
                    **self._variables,
                    "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{port}",
                    "TMPDIR": str(self._scratch),
                },
                start_new_session=True,
            )
        self._pid_fd = os.pidfd_open(self._process.pid)
        loop.add_reader(self._pid_fd, self._exited)
        # The cloud starts a late one again, within the first invocation's time.
        limit_s = INIT_S + self.function.timeout_s
        self._alarm = loop.call_later(
            limit_s, self.kill, "Init phase timed out", "Sandbox.Timedout"
        )

    def assign(self, invocation: Invocation) -> None:
        """The invocation that the environment is started for; delivered when it is ready."""
        self._current = invocation

    def deliver(self, invocation: Invocation) -> None:
        """Thaw the process and hand it an invocation; it must be waiting."""
        assert self._next is not None, "the environment is at work"
        assert self._process is not None, "the environment was never started"
        self._current = invocation
        waiting, self._next = self._next, None
        self._begun_at = time.monotonic()
        self._log_begin = self._log_size()
        self._log(f"START RequestId: {invocation.id} Version: $LATEST\n")
        self._alarm = asyncio.get_running_loop().call_later(self.function.timeout_s, self._time_out)
        self._signal(signal.SIGCONT)
        if not waiting.done():
            waiting.set_result(invocation)

    def kill(self, cause: str, error_type: str = "Runtime.ExitError") -> None:
        """End the process at once, for a reason that the invocation it is at will give."""
        self._cause = self._cause or cause
        self._error_type = self._error_type or error_type
        self._signal(signal.SIGKILL)

    @property
    def pid(self) -> int | None:
        """The process, once it is started."""
        return None if self._process is None else self._process.pid

    @property
    def is_frozen(self) -> bool:
        """It waits for an invocation, and gets no time."""
        return self._next is not None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _time_out(self) -> None:
        limit_s = self.function.timeout_s
        self.kill(f"Task timed out after {limit_s:.2f} seconds", "Sandbox.Timedout")

    def _exited(self) -> None:
        """The process is gone."""
        assert self._process is not None, "nothing was started"
        asyncio.get_running_loop().remove_reader(self._pid_fd)
        os.close(self._pid_fd)
        status = self._process.wait()
        self._signal_rest()
        if self._alarm is not None:
            self._alarm.cancel()
        if self._next is not None:
            self._next.cancel()
        if self._server is not None:
            self._server.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        if self._current is not None:
            how = f"signal: {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            error = {
                "errorType": self._error_type or "Runtime.ExitError",
                "errorMessage": f"RequestId: {self._current.id} Error: "
                + (self._cause or f"Runtime exited with error: {how}"),
            }
            self._end(json.dumps(error).encode(), "Unhandled")
        self._on_exit()

    def _signal_rest(self) -> None:
        """Processes that the function has started end with it."""
        assert self._process is not None, "nothing was started"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    # -------------------------------------------------------------- the runtime API

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        from aiohttp import web

        path = request.path.removeprefix(_API)
        if request.method == "GET" and path == "/invocation/next":
            return await self._serve_next()
        body = bytearray()
        async for chunk in request.content.iter_any():
            if len(body) <= SYNC_PAYLOAD_BYTES:  # what is beyond that is read and dropped
                body += chunk
        if request.method == "POST" and path == "/init/error":
            self._cause, self._error_type = _read_error(bytes(body))
            return web.json_response({"status": "OK"}, status=202)
        *_, id, kind = ["", *path.split("/")]
        if request.method != "POST" or self._current is None or id != self._current.id:
            return web.json_response({"errorType": "InvalidRequestID"}, status=400)
        if kind == "error":
            self._end(bytes(body), "Unhandled")
        elif len(body) > SYNC_PAYLOAD_BYTES:
            error = {
                "errorType": "Function.ResponseSizeTooLarge",
                "errorMessage": "Response payload size exceeded maximum allowed payload size "
                f"({SYNC_PAYLOAD_BYTES} bytes).",
            }
            self._end(json.dumps(error).encode(), "Unhandled")
            return web.json_response({"errorType": "RequestEntityTooLarge"}, status=413)
        else:
            self._end(bytes(body), None)
        return web.json_response({"status": "OK"}, status=202)

    async def _serve_next(self) -> web.StreamResponse:
        """The long poll: freeze the process until there is an invocation."""
        from aiohttp import web

        assert self._process is not None, "nothing was started"
        self._next = asyncio.get_running_loop().create_future()
        waiting = self._next
        if self.init_s is None:
            self.init_s = time.monotonic() - self.started_at
            if self._alarm is not None:
                self._alarm.cancel()
            if self._current is not None:
                self.deliver(self._current)
        else:
            self._signal(signal.SIGSTOP)
            self._on_waiting()
        invocation = await waiting
        deadline_s = time.time() + self.function.timeout_s
        return web.Response(
            body=invocation.payload,
            content_type="application/json",
            headers={
                "Lambda-Runtime-Aws-Request-Id": invocation.id,
                "Lambda-Runtime-Deadline-Ms": str(int(deadline_s * 1000)),
                "Lambda-Runtime-Invoked-Function-Arn": self.function.arn,
                "Lambda-Runtime-Trace-Id": invocation.trace_id,
            },
        )

    # -------------------------------------------------------------- the end of an invocation

    def _end(self, payload: bytes, error: str | None) -> None:
        invocation, self._current = self._current, None
        assert invocation is not None, "there is no invocation to end"
        duration_s = time.monotonic() - self._begun_at if self.init_s is not None else 0.0
        if self._alarm is not None:
            self._alarm.cancel()
        self._log(
            f"END RequestId: {invocation.id}\nREPORT RequestId: {invocation.id}\t"
            f"Duration: {duration_s * 1e3:.2f} ms\tMemory Size: {self.function.memory_mb} MB\t"
            f"Max Memory Used: {self._peak_mb()} MB\n"
        )
        self._on_outcome(invocation, Outcome(payload, error, duration_s, self._log_tail()))

    def _peak_mb(self) -> int:
        """The largest resident size of the process so far; 0 when it is gone."""
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) // 1024
        return 0

    def _log(self, line: str) -> None:
        with self._log_path.open("a") as log:
            log.write(line)

    def _log_size(self) -> int:
        return self._log_path.stat().st_size if self._log_path.exists() else 0

    def _log_tail(self) -> bytes:
        """The end of what was logged since the invocation began."""
        with self._log_path.open("rb") as log:
            log.seek(max(self._log_begin, self._log_size() - LOG_TAIL_BYTES))
            return log.read()


def _read_error(body: bytes) -> tuple[str, str]:
    """(message, type) of an error that the runtime client reports."""
    try:
        found: Any = json.loads(body)
        return str(found.get("errorMessage", "")), str(found.get("errorType", "Runtime.Unknown"))
    except ValueError:
        return body.decode(errors="replace"), "Runtime.Unknown"
