"""How invocations become payloads, and how fast they are sent: pure rules."""

import json

import pytest

from wukong.aws.limits import ASYNC_PAYLOAD_BYTES
from wukong.executor.aws_lambda_pace import (
    CUT,
    FANOUT,
    GROUP_MAX,
    PAUSE_MAX_S,
    PAUSE_S,
    RAISE_PER_S,
    Group,
    Pace,
    encode_payloads,
    group_tokens,
    merge_payloads,
    plan_payloads,
)


def tokens(n: int) -> Group:
    return [("0123456789abcdef", f"{i:016x}.{i}") for i in range(n)]


def flatten(groups: list[Group]) -> Group:
    return [token for group in groups for token in group]


@pytest.mark.parametrize(
    ("n", "n_executors", "n_groups"),
    [(0, 4, 0), (3, 4, 3), (4, 4, 4), (9, 4, 4), (1024, 100, 100), (1000, 1, 4), (5, 0, 1)],
)
def test_each_executor_gets_its_own_tokens_in_order(
    n: int, n_executors: int, n_groups: int
) -> None:
    groups = group_tokens(tokens(n), n_executors)
    assert len(groups) == n_groups
    assert flatten(groups) == tokens(n)
    assert all(1 <= len(group) <= GROUP_MAX for group in groups)
    if groups:
        assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_many_groups_go_out_as_a_tree() -> None:
    few = group_tokens(tokens(FANOUT), FANOUT)
    assert [len(payload) for payload in plan_payloads(few)] == [1] * FANOUT
    many = group_tokens(tokens(1000), 1000)
    payloads = plan_payloads(many)
    assert len(payloads) == FANOUT
    assert [group for payload in payloads for group in payload] == many
    # Whoever gets a payload forwards all but the first: the next hop is the last one.
    assert max(len(plan_payloads(payload[1:])[0]) for payload in payloads) == 1


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_a_payload_is_cut_just_over_the_limit(excess: int) -> None:
    groups = [tokens(4), tokens(3)]
    ((_, whole),) = encode_payloads(groups, {"n_executors": 7})
    parts = encode_payloads(groups, {"n_executors": 7}, len(whole) - excess)
    assert len(parts) == (2 if excess > 0 else 1)
    assert [group for part, _ in parts for group in part] == groups
    assert all(json.loads(encoded)["n_executors"] == 7 for _, encoded in parts)


def test_a_group_that_is_too_long_is_cut_too() -> None:
    parts = encode_payloads([tokens(30_000)], {})
    assert flatten([group for part, _ in parts for group in part]) == tokens(30_000)
    assert all(len(encoded) <= ASYNC_PAYLOAD_BYTES for _, encoded in parts)
    assert len(parts) == 2


def test_what_is_refused_goes_as_one_group() -> None:
    payloads = plan_payloads(group_tokens(tokens(10), 10))
    assert merge_payloads(payloads) == [tokens(10)]


def test_nothing_is_held_back_before_the_first_refusal() -> None:
    pace = Pace()
    for i in range(1000):
        assert pace.wait_s(i * 1e-3) == 0.0
        pace.sent(i * 1e-3)
        pace.accepted(i * 1e-3)
    assert pace.rate_per_s == float("inf")


def test_a_refusal_cuts_the_rate_and_pauses_and_the_rate_grows_again() -> None:
    pace = Pace()
    for i in range(100):
        pace.sent(i * 0.01)
        pace.accepted(i * 0.01)
    pace.refused(1.0)
    assert pace.rate_per_s == pytest.approx(CUT * 100)
    assert pace.wait_s(1.0) == pytest.approx(PAUSE_S)
    assert pace.n_merged == 2
    pace.refused(1.1)  # was under way
    assert pace.rate_per_s == pytest.approx(CUT * 100)
    now = 1.0 + PAUSE_S
    assert pace.wait_s(now) == pytest.approx(0.0)
    pace.sent(now)
    assert pace.wait_s(now) == pytest.approx(1 / (CUT * 100))
    pace.accepted(now + 0.5)
    assert pace.rate_per_s == pytest.approx(CUT * 100 + RAISE_PER_S / 2)
    assert pace.n_merged == 1


def test_refusals_in_a_row_pause_longer_and_merge_more() -> None:
    pace, now, pauses, merged = Pace(), 0.0, [], []
    for _ in range(10):
        pace.refused(now)
        pauses.append(pace.wait_s(now))
        merged.append(pace.n_merged)
        now += pauses[-1]
    assert pauses[:3] == pytest.approx([PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S])
    assert max(pauses) == pytest.approx(PAUSE_MAX_S)
    assert merged[:3] == [2, 4, 8]
    assert max(merged) == GROUP_MAX
    assert pace.rate_per_s >= 1.0
