"""A local Lambda service in a thread of this process: for tests, notebooks and trials."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from wukong.aws.lambda_environment import Environment
from wukong.aws.lambda_function import LocalFunction
from wukong.aws.lambda_service import GRACE_S, Counters, LambdaService
from wukong.errors import WukongError

START_S = 30.0
"""The service listens after a few milliseconds; a busy machine may take longer."""


class LocalLambda:
    """A running service; a context manager. Give `url` to boto3 as `endpoint_url`.

    Args:
        functions, port, requests_per_s: see `LambdaService`.
        directory: see `LambdaService`; None: one that goes with the service.
    Raises:
        OSError, ImportError: as `LambdaService.start`.
    """

    def __init__(
        self,
        functions: Sequence[LocalFunction],
        directory: Path | None = None,
        *,
        port: int = 0,
        requests_per_s: float = float("inf"),
    ) -> None:
        self._own = None if directory else tempfile.TemporaryDirectory(prefix="wukong-lambda-")
        self.directory = directory or Path(self._own.name if self._own else "")
        self._service = LambdaService(
            functions, self.directory, port=port, requests_per_s=requests_per_s
        )
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._failures: list[BaseException] = []
        """Why it has not come up."""
        self._grace_s = GRACE_S
        self._end: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="wukong-lambda", daemon=True)
        self._thread.start()
        if not self._is_up.wait(START_S):
            raise WukongError("the local Lambda service has not come up")
        for failure in self._failures:
            self._thread.join()
            raise failure

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._is_up.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        try:
            await self._service.start()
        except BaseException as error:  # whatever it is, it is the caller's to see
            self._failures.append(error)
            return
        self._is_up.set()
        await self._end.wait()
        await self._service.stop(self._grace_s)

    @property
    def url(self) -> str:
        """Where the service listens."""
        return self._service.url

    @property
    def counters(self) -> Counters:
        """What it has done."""
        return self._service.counters

    def environments(self) -> list[Environment]:
        """The environments that there are at this moment."""
        return self._service.environments()

    def close(self, grace_s: float = GRACE_S) -> None:
        """End it, after what runs or after `grace_s`. Idempotent."""
        if self._thread.is_alive() and self._end is not None:
            self._grace_s = grace_s
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
        if self._own is not None:
            self._own.cleanup()

    def __enter__(self) -> LocalLambda:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(0.0 if error else GRACE_S)
