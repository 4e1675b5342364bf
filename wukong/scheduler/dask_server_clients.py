"""One client's end of the server: what is sent to it, and which versions may be its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import distributed
from distributed import versions as distributed_versions
from distributed.comm import Comm, CommClosedError
from packaging.version import InvalidVersion, Version

logger = logging.getLogger(__name__)

OLDEST = "2026.1.2"
NEWEST = "2026.8"
"""The range of distributed with which the tests pass (`make test-oldest` runs the one end, every
other target the newest that pip finds); of the newest, any patch will do."""
CLOSE_S = 2.0
"""A client that reads no more is waited for so long, when its stream is closed."""


class Outbox:
    """Reports to one client, in order; what comes while one batch is written goes in the next."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._pending: list[Mapping[str, Any]] = []
        self._is_wanted = asyncio.Event()
        self._is_closing = False
        self._writer = asyncio.ensure_future(self._write())

    def send(self, *messages: Mapping[str, Any]) -> None:
        """Send messages soon; nothing if the client is gone."""
        self._pending += messages
        self._is_wanted.set()

    async def _write(self) -> None:
        while not (self._is_closing and not self._pending):
            await self._is_wanted.wait()
            self._is_wanted.clear()
            batch, self._pending = self._pending, []
            if not batch:
                continue
            try:
                await self._comm.write(batch, on_error="raise")
            except CommClosedError:
                return
            except Exception:
                logger.exception("a report cannot be sent; the client is disconnected")
                self._comm.abort()
                return
            del batch  # or it would stay until there is something to report again

    async def close(self) -> None:
        """Write what is left, and close the comm. Idempotent."""
        self._is_closing = True
        self._is_wanted.set()
        await asyncio.wait([self._writer], timeout=CLOSE_S)
        self._writer.cancel()
        if not self._comm.closed():
            await self._comm.close()

    def abort(self) -> None:
        """Close the comm at once."""
        self._writer.cancel()
        self._comm.abort()


def check_versions(client: Mapping[str, Any] | None) -> dict[str, str]:
    """Compare a client's versions with the server's.

    Args:
        client: as distributed's `get_versions` describes them.
    Returns: `warning` and `error`, as the client expects them when its stream starts; "": none.
    """
    packages = (client or {}).get("packages") or {}
    theirs = str(packages.get("distributed"))
    if not is_supported(theirs):
        return {
            "warning": "",
            "error": f"distributed {theirs} does not work with this Wukong; install one from "
            f"{OLDEST} to {NEWEST}.x: pip install '{requirement()}'",
        }
    answer = distributed_versions.error_message(distributed_versions.get_versions(), {}, client)
    return dict(answer)


def check_own_version() -> None:
    """Check the distributed that is installed here.

    Raises:
        ImportError: it is too old or too new; the message says what to install.
    """
    if not is_supported(distributed.__version__):
        raise ImportError(
            f"distributed {distributed.__version__} does not work with this Wukong; "
            f"pip install '{requirement()}'"
        )


def requirement() -> str:
    """What to ask pip for."""
    year, month = NEWEST.split(".")
    return f"distributed>={OLDEST},<{year}.{int(month) + 1}"


def is_supported(version: str) -> bool:
    """Whether a version of distributed is in the range; development versions count as theirs."""
    try:
        release = Version(version).release
    except InvalidVersion:
        return False
    newest = Version(NEWEST).release
    return Version(OLDEST).release <= release and release[: len(newest)] <= newest
