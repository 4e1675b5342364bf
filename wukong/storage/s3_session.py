"""How the S3 store reaches its service: options, clients, requests at once, errors translated.

It knows nothing of blobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from wukong import config
from wukong.errors import MissingBlob, StoreUnavailable

T = TypeVar("T")

READS_MAX = 4
"""A body that breaks off is asked for so often: the SDK's retries end with the reply's head."""
_MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
_NEEDED = "S3 needs boto3 and aiobotocore: pip install 'wukong[aws]'"


@dataclass(frozen=True, slots=True)
class Options:
    """Where and how; all but the place from the configuration, where the URL says nothing."""

    bucket: str
    prefix: str
    """Without slashes at its ends; "" for the whole bucket."""
    region: str | None
    endpoint_url: str | None
    """None: Amazon's."""
    profile: str | None
    """Of the shared credentials file; None: the SDK's usual chain."""
    tier_bytes: int
    """Blobs below this size stay in the job store's own blob store."""
    part_bytes: int
    """Larger blobs are written and read in parts of this size."""
    n_connections: int
    buffer_bytes: int
    """Of bodies under way at once, at most (or one body)."""
    retry_mode: str
    """The SDK's: standard or adaptive."""
    attempts_max: int
    """Of each request, by the SDK."""
    timeout_s: float
    """To connect, and between two packets."""
    access_key: str = field(default="", repr=False)
    """"": by the SDK's chain."""
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)

    def url(self) -> str:
        """The URL that gives the same options anywhere, whatever is configured there."""
        names = [f.name for f in fields(self) if f.name not in _PLACE]
        found = {name: getattr(self, name) for name in names}
        query = urlencode({k: v for k, v in found.items() if v not in (None, "")})
        user = ""
        if self.access_key:
            user = f"{quote(self.access_key, '')}:{quote(self.secret_key, '')}@"
        return f"s3://{user}{self.bucket}/{self.prefix}?{query}"


_PLACE = ("bucket", "prefix", "access_key", "secret_key")
_NUMBERS = ("tier_bytes", "part_bytes", "n_connections", "buffer_bytes", "attempts_max")
_SETTINGS = ("region", "endpoint_url", "profile", "retry_mode", "timeout_s", *_NUMBERS)


def parse_url(url: str) -> Options:
    """The options of `s3://bucket/prefix?region=...`; `s3://key:secret@bucket` has credentials.

    Raises:
        ValueError: it is no such URL; its credentials are not in the message.
    """
    parts = urlsplit(url)
    shown = f"s3://{parts.hostname or ''}{parts.path}"
    # The host, in the case in which it was written, since bucket names may not be lowered.
    _, _, bucket = parts.netloc.rpartition("@")
    if parts.scheme != "s3" or not bucket or ":" in bucket:
        raise ValueError(f"no bucket in {shown!r}; give s3://bucket/prefix")
    given = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    unknown = given.keys() - {*_SETTINGS, "session_token"}
    if unknown:
        raise ValueError(
            f"{shown!r}: S3 has no option {', '.join(sorted(unknown))}; "
            f"there are {', '.join(_SETTINGS)}, session_token"
        )
    found: dict[str, Any] = {
        name: given.get(name, config.get(f"s3.{name.replace('_', '-')}")) for name in _SETTINGS
    }
    found.update({name: int(found[name]) for name in _NUMBERS})
    found["timeout_s"] = float(found["timeout_s"])
    if min(found["part_bytes"], found["n_connections"], found["attempts_max"]) < 1:
        raise ValueError(f"{shown!r}: part_bytes, n_connections and attempts_max are 1 or more")
    return Options(
        bucket=bucket,
        prefix=parts.path.strip("/"),
        access_key=unquote(parts.username or ""),
        secret_key=unquote(parts.password or ""),
        session_token=given.get("session_token", ""),
        **found,
    )


# ------------------------------------------------------------------ clients


def _client_arguments(options: Options) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "region_name": options.region,
        "endpoint_url": options.endpoint_url,
    }
    if options.access_key:
        arguments["aws_access_key_id"] = options.access_key
        arguments["aws_secret_access_key"] = options.secret_key
        arguments["aws_session_token"] = options.session_token or None
    return arguments


def _config_arguments(options: Options) -> dict[str, Any]:
    return {
        "retries": {"mode": options.retry_mode, "total_max_attempts": options.attempts_max},
        "max_pool_connections": options.n_connections,
        "connect_timeout": options.timeout_s,
        "read_timeout": options.timeout_s,
        # A blob carries checksums of its own, which its reader checks; other services that
        # speak the protocol do not all know Amazon's.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }


def make_client(options: Options) -> Any:
    """A client of boto3, for single calls; thread-safe.

    Cost: some 100 ms, the first time.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    with translated("configuration", options.bucket):
        session = boto3.session.Session(profile_name=options.profile)
        return session.client(
            "s3", **_client_arguments(options), config=Config(**_config_arguments(options))
        )


class BrokenOff(StoreUnavailable):
    """A body ended before it should have."""


class PastTheEnd(StoreUnavailable):
    """A range begins behind the end of its object."""


@contextlib.contextmanager
def translated(action: str, name: str) -> Iterator[None]:
    """Turn what the SDK raises into our errors.

    Raises:
        MissingBlob: there is no such object.
        BrokenOff: the connection was lost while a body was read.
        StoreUnavailable: anything else; the message says what was refused.
    """
    import aiohttp
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        known = error.response.get("Error", {})
        code = str(known.get("Code", ""))
        if code in _MISSING:
            raise MissingBlob(f"blob {name} does not exist") from error
        if code == "InvalidRange":
            raise PastTheEnd(f"{name} is shorter than it should be") from error
        raise StoreUnavailable(
            f"S3 refuses {action} of {name}: {code}: {known.get('Message', '')}"
        ) from error
    except (
        exceptions.IncompleteReadError,
        exceptions.ResponseStreamingError,
        exceptions.ReadTimeoutError,
        aiohttp.ClientPayloadError,
    ) as error:
        raise BrokenOff(f"S3 broke off {action} of {name}: {error}") from error
    except (exceptions.BotoCoreError, exceptions.HTTPClientError, aiohttp.ClientError) as error:
        raise StoreUnavailable(f"S3 does not answer {action} of {name}: {error}") from error
    except OSError as error:
        if isinstance(error, StoreUnavailable):
            raise
        raise StoreUnavailable(f"S3 does not answer {action} of {name}: {error}") from error


# ------------------------------------------------------------------ many requests at once


class Room:
    """Lets so many requests go at once, with so many bytes; first come, first served."""

    def __init__(self, n_requests: int, n_bytes: int) -> None:
        self._n_free = n_requests
        self._n_free_bytes = self._n_all_bytes = n_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def __call__(self, n_bytes: int) -> AsyncIterator[None]:
        """Wait for room; a body larger than all of it goes alone."""
        n_bytes = min(n_bytes, self._n_all_bytes)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((n_bytes, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._n_free += 1
                self._n_free_bytes += n_bytes
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            n_bytes, turn = self._waiting[0]
            if not turn.done():
                if not self._n_free or n_bytes > self._n_free_bytes:
                    return
                self._n_free -= 1
                self._n_free_bytes -= n_bytes
                turn.set_result(None)
            self._waiting.popleft()


class AsyncSide:
    """A client of aiobotocore on an event loop, in a thread of its own."""

    def __init__(self, options: Options) -> None:
        try:
            import aiobotocore.session  # noqa: F401  # to say at once, and here, that it is missing
        except ImportError as error:
            raise ImportError(_NEEDED) from error
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._client: Any = None
        self.room = Room(options.n_connections, options.buffer_bytes)
        self._thread = threading.Thread(target=self._run, name="wukong-s3", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait, in another thread, for what a coroutine returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def all(self, coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Wait for all; when one fails, end the others, and raise that one's error."""
        tasks = [asyncio.ensure_future(c) for c in coroutines]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def call(self, action: str, name: str, **arguments: Any) -> Any:
        """One request, by the name of the client's method."""
        with translated(action, name):
            if self._client is None:
                self._client = await self._open()
            return await getattr(self._client, action)(**arguments)

    async def get(self, name: str, **arguments: Any) -> bytes:
        """The body of an object, or of a range of it, whole."""
        for _ in range(READS_MAX - 1):
            with contextlib.suppress(BrokenOff):
                return await self._get(name, arguments)
        return await self._get(name, arguments)

    async def _get(self, name: str, arguments: dict[str, Any]) -> bytes:
        reply = await self.call("get_object", name, **arguments)
        body = reply["Body"]
        with translated("get_object", name), contextlib.closing(body):
            found: bytes = await body.read()
        return found

    async def _open(self) -> Any:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import AioSession

        self._stack = contextlib.AsyncExitStack()
        session = AioSession(profile=self._options.profile)
        settings = AioConfig(**_config_arguments(self._options))
        opening = session.create_client("s3", **_client_arguments(self._options), config=settings)
        client = await self._stack.enter_async_context(opening)
        return client

    def close(self) -> None:
        """End the thread; requests under way are given up."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            if self._client is not None:
                self._loop.run_until_complete(self._stack.aclose())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
