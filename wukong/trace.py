"""The record of a job: what ran where and when, what moved, and what it cost. No I/O, no clock.

Every commit carries one `RunRecord`, packed; the client unpacks them and makes a `Report`
(`wukong.report`). Times are the wall clock's, in seconds since the epoch, so that executors on one
machine can be drawn on one axis.
"""

from __future__ import annotations

import marshal
from array import array
from typing import NamedTuple


class RunRecord(NamedTuple):
    """One run of one strand or piece, from taking its token to sending its commit."""

    strand: str
    """The strand's id; a piece of a split strand has a name of its own."""
    token: str
    attempt: str
    """Under which it ran and committed; the tokens that it minted begin with it."""
    holder: str
    """The executor that ran it."""
    n_starts: int
    """How often the token had been started, this run included."""
    n_deaths: int
    """Attempts that are known to have died with these tasks before."""
    cause: str
    """How the last of them died, as far as known."""
    is_invoked: bool
    """The executor took the token; False: it became this strand after the one before."""
    begun_at: float
    fetched_at: float
    """When program and inputs were there."""
    ran_at: float
    """When the last task had ended."""
    sent_at: float
    """When the outputs were put and the commit was sent."""
    bytes_read: int
    """Encoded inputs and program, inline ones included."""
    bytes_written: int
    """Encoded outputs, inline ones included."""
    blob_bytes_written: int
    """Of these, what went to the blob store."""
    n_blobs_read: int
    n_blobs_written: int
    n_round_trips: int
    """Operations on the job store and multi-operations on the blob store since the last record."""
    copied_bytes: int
    """Array memory that was copied inside this process."""
    peak_memory_bytes: int
    """Largest resident size of the executor's process so far; 0 where it is the client itself."""
    tasks: bytes
    """Task ids in the order in which they ran: int32."""
    ended_s: bytes
    """For each task, when it ended, in seconds after `fetched_at`: float32."""
    retried: tuple[tuple[int, int], ...]
    """(task, further attempts) where a task raised and was run again."""


def pack(record: RunRecord) -> bytes:
    """Encode a record: plain data only, which cannot run when it is read."""
    return marshal.dumps(tuple(record))


def unpack(packed: bytes) -> RunRecord:
    """Decode what `pack` made."""
    return RunRecord(*marshal.loads(packed))


def int32(values: list[int]) -> bytes:
    """Pack ints as a record holds them."""
    return array("i", values).tobytes()


def float32(values: list[float]) -> bytes:
    """Pack floats as a record holds them."""
    return array("f", values).tobytes()


def ints(packed: bytes) -> list[int]:
    """Unpack `int32`."""
    return array("i", packed).tolist()


def floats(packed: bytes) -> list[float]:
    """Unpack `float32`."""
    return array("f", packed).tolist()


def read(packed: object) -> RunRecord:
    """The record of a commit, packed or not (`memory://` keeps the record itself)."""
    return packed if isinstance(packed, RunRecord) else unpack(bytes(packed))  # type: ignore[call-overload]  # bytes
