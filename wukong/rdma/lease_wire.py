"""Messages about leases <-> JSON, and the keys of leases."""

from __future__ import annotations

import dataclasses
import hmac
from typing import Any

from wukong.errors import FrameError
from wukong.rdma.lease import (
    Ask,
    Cause,
    Ended,
    Granted,
    LeaseId,
    Refused,
    Release,
    Renew,
    Renewed,
    RenewRefused,
    Replaced,
    Request,
    Revoked,
    Seat,
    ToAgent,
    ToClient,
    Usage,
)

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(Ask, Renew, Release),
        *(Granted, Refused, Renewed, RenewRefused, Replaced, Revoked, Ended),
    )
}
_TO_AGENT = (Ask, Renew, Release)
MAX_TEXT = 4096
"""Of an id, an address or a reason: agents keep some of them."""


def proof_of(secret: bytes, lease: LeaseId, epoch: int) -> bytes:
    """What shows an agent that a message is of the lease's holder."""
    return hmac.digest(secret, f"wukong lease {lease} {epoch}".encode(), "sha256")


def line_key(secret: bytes, lease: LeaseId, seat_epoch: int) -> bytes:
    """What shows an executor and a client to each other. Never sent; both derive it."""
    return hmac.digest(secret, f"wukong line {lease} {seat_epoch}".encode(), "sha256")


def agent_key(secret: bytes) -> bytes:
    """What shows an agent and a client to each other."""
    return hmac.digest(secret, b"wukong agent", "sha256")


def to_json(message: ToAgent | ToClient) -> dict[str, Any]:
    """A message as plain data."""
    fields = {
        field.name: _plain(getattr(message, field.name)) for field in dataclasses.fields(message)
    }
    return {"kind": type(message).__name__, **fields}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def from_json(plain: dict[str, Any], *, of_client: bool) -> Any:
    """A message from plain data, every field checked.

    Args:
        of_client: it must be one that clients send; else one that agents send.
    Raises:
        FrameError: it is none.
    """
    named = plain.get("kind")
    kind = _KINDS.get(named) if isinstance(named, str) else None
    if kind is None or (kind in _TO_AGENT) is not of_client:
        raise FrameError(f"no message: {plain.get('kind')!r:.40}")
    try:
        fields = {field.name: plain[field.name] for field in dataclasses.fields(kind)}
        return kind(**{name: _typed(name, value) for name, value in fields.items()})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"a {kind.__name__} that makes no sense: {error!r}") from error


def _typed(name: str, value: Any) -> Any:
    match name:
        case "request":
            return Request(
                _int(value["n_executors"]),
                _int(value["memory_bytes"]),
                float(value["ttl_s"]),
                bool(value["is_hot"]),
            )
        case "seat":
            return Seat(_int(value["number"]), _int(value["epoch"]), _text(value["address"]))
        case "seats":
            return tuple(_typed("seat", item) for item in value)
        case "key":
            return bytes.fromhex(value)
        case "cause":
            return Cause(value)
        case "usage":
            return Usage(_int(value["n_calls"]), float(value["execution_s"]), float(value["hot_s"]))
        case "epoch" | "serial":
            return _int(value)
        case "ttl_s" | "grace_s" | "core_s":
            return float(value)
        case _:
            return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise TypeError(f"{value!r:.40} is no text of at most {MAX_TEXT} characters")
    return value


def _int(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r:.40} is no integer")
    return value


def signed_receipt(secret: bytes, receipt: Ended) -> str:
    """The signature of a receipt: whoever knows the secret can check what a lease has used."""
    text = repr(sorted(to_json(receipt).items()))
    return hmac.digest(secret, b"wukong receipt " + text.encode(), "sha256").hex()
