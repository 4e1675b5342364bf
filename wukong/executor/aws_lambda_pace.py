"""How invocations become payloads, and how fast these are sent. Pure.

A payload is a list of groups, a group a list of tokens. Whoever receives a payload forwards all
groups but the first, and runs the tokens of that one after the other: a thousand invocations are
some thirty requests by their sender, and are all there after two hops.

    {"wukong": "run", "groups": [[[job, token], ...], ...], ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeVar

from wukong.aws.limits import ASYNC_PAYLOAD_BYTES

FANOUT = 32
"""Payloads that one sender makes of many groups: 32 requests of 1 ms CPU are sent in the 20 ms to
40 ms that one of them takes to be accepted, and 32 * 32 is the usual limit of concurrency."""
GROUP_MAX = 256
"""Tokens in one group, however scarce executors are."""
RAISE_PER_S = 50.0
"""After a refusal, the rate grows by so much each second."""
CUT = 0.7
"""A refusal leaves this part of the rate."""
RATE_MIN = 1.0
PAUSE_S = 0.2
"""After a refusal nothing is sent for so long; doubles with each further one."""
PAUSE_MAX_S = 5.0

Token: TypeAlias = "tuple[str, str]"
"""A job, and a token of it."""
Group: TypeAlias = "list[Token]"
T = TypeVar("T")


def group_tokens(tokens: Sequence[Token], n_executors: int) -> list[Group]:
    """Divide tokens among executors: each its own while there are enough, in order.

    Returns: at most `n_executors` groups, or more where they would be too long.
    """
    n_groups = min(len(tokens), max(n_executors, 1, -(-len(tokens) // GROUP_MAX)))
    return [list(part) for part in _divide(tokens, n_groups)]


def plan_payloads(groups: Sequence[Group]) -> list[list[Group]]:
    """Divide groups among payloads: one in each, or a tree of them."""
    return [list(part) for part in _divide(groups, min(len(groups), FANOUT))]


def merge_payloads(payloads: Iterable[Sequence[Group]]) -> list[Group]:
    """One group of everything: where the platform refuses, fewer executors do more each."""
    tokens = [token for groups in payloads for group in groups for token in group]
    return group_tokens(tokens, 1)


def encode_payloads(
    groups: Sequence[Group], fields: dict[str, object], limit_bytes: int = ASYNC_PAYLOAD_BYTES
) -> list[tuple[list[Group], bytes]]:
    """Encode a payload; as several, where one would be over the platform's limit.

    Returns: each with the groups that are in it.
    """
    body = {"wukong": "run", "groups": groups, **fields}
    encoded = json.dumps(body, separators=(",", ":")).encode()
    if len(encoded) <= limit_bytes or sum(map(len, groups)) <= 1:
        return [(list(groups), encoded)]
    if len(groups) > 1:
        halves = [list(half) for half in _divide(groups, 2)]
    else:
        halves = [[list(half)] for half in _divide(groups[0], 2)]
    return [item for half in halves for item in encode_payloads(half, fields, limit_bytes)]


def _divide(items: Sequence[T], n_parts: int) -> Iterable[Sequence[T]]:
    """Cut into parts of nearly the same length."""
    for i in range(n_parts):
        yield items[len(items) * i // n_parts : len(items) * (i + 1) // n_parts]


class Pace:
    """How fast requests are sent, learnt from refusals; times are seconds of a monotonic clock.

    Unlimited until the first refusal. A refusal leaves a part of the rate at which requests were
    accepted, and a growing pause; after it, the rate grows evenly.
    """

    def __init__(self) -> None:
        self.rate_per_s = float("inf")
        self.n_merged = 1
        """Payloads to make one of; more with each refusal in a row."""
        self._n_refused = 0
        self._pause_until = 0.0
        self._next_at = 0.0
        self._raised_at = 0.0
        self._window_at = 0.0
        self._n_in_window = 0

    def wait_s(self, now: float) -> float:
        """How long to wait before the next request; 0: send it."""
        return max(0.0, self._pause_until - now, self._next_at - now)

    def sent(self, now: float) -> None:
        """A request goes out."""
        if self.rate_per_s != float("inf"):
            self._next_at = max(now, self._next_at) + 1.0 / self.rate_per_s

    def accepted(self, now: float) -> None:
        """A request was accepted."""
        if now - self._window_at >= 1.0:
            self._window_at, self._n_in_window = now, 0
        self._n_in_window += 1
        self._n_refused, self.n_merged = 0, 1
        if self.rate_per_s != float("inf"):
            self.rate_per_s += RAISE_PER_S * min(1.0, max(0.0, now - self._raised_at))
            self._raised_at = now

    def refused(self, now: float) -> None:
        """A request was refused for now."""
        if now < self._pause_until:
            return  # it was under way when the first of them came back
        rate = self.rate_per_s
        if rate == float("inf"):
            rate = self._n_in_window / max(0.1, now - self._window_at)
        self.rate_per_s = max(RATE_MIN, CUT * rate)
        pause_s = min(PAUSE_MAX_S, PAUSE_S * 2**self._n_refused)
        self._n_refused += 1
        self.n_merged = min(GROUP_MAX, 2**self._n_refused)
        self._pause_until = now + pause_s
        self._raised_at = self._pause_until
        self._next_at = self._pause_until
