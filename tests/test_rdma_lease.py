"""The life of a lease on both sides, and both sides together on a virtual clock."""

from collections.abc import Callable
from typing import Any

import pytest

from wukong.rdma import lease_grants
from wukong.rdma.lease import (
    Ask,
    Cause,
    Drain,
    Ended,
    Granted,
    Holder,
    LeaseId,
    Lost,
    Phase,
    Refused,
    Release,
    Renew,
    Renewed,
    RenewRefused,
    Replaced,
    Request,
    Revoked,
    Seat,
    Send,
    Stop,
    Usage,
    Use,
)
from wukong.rdma.lease_grants import Asked, Died, Gone, Grants, Kill, Reply, Start, Started
from wukong.sim.checks import Violation
from wukong.sim.leases import run_leases

REQUEST = Request(2, 100, 3.0)
LEASE = LeaseId("lease1")
KEY = b"lease1/1"
SEATS = (Seat(0, 2, "a"), Seat(1, 3, "b"))
GRANTED = Granted("nonce", LEASE, 1, KEY, 3.0, SEATS)
RECEIPT = Ended(LEASE, 1, Cause.RELEASED, 2.0, Usage(5))


def held() -> Holder:
    holder = Holder("nonce", REQUEST)
    assert holder.start(10.0) == [Send(Ask("nonce", REQUEST))]
    assert holder.handle(GRANTED, 10.1) == [Use(SEATS[0]), Use(SEATS[1])]
    return holder


def test_a_lease_is_renewed_at_a_third_of_its_time_to_live() -> None:
    holder = held()
    assert holder.ends_at == 13.0  # from when it was asked for
    assert holder.wake_at() == 11.0
    assert holder.tick(11.0) == [Send(Renew(LEASE, 1, KEY, 1))]
    assert holder.handle(Renewed(LEASE, 1, 1, SEATS), 11.2) == []
    assert holder.ends_at == 14.0
    assert holder.wake_at() == 12.0
    holder.check()


def test_an_unanswered_renewal_is_sent_again_until_the_time_is_up() -> None:
    holder = held()
    n_sent = 0
    while holder.phase is Phase.HELD:
        now = holder.wake_at()
        assert now is not None
        actions = holder.tick(now)
        n_sent += sum(isinstance(action, Send) for action in actions)
        holder.check()
    assert now == 13.0
    assert n_sent == 8
    assert actions == [Stop(Cause.EXPIRED, "it was not renewed")]


@pytest.mark.parametrize(
    ("event", "cause"),
    [
        (Lost(), Cause.LOST),
        (RenewRefused(LEASE, 1), Cause.EXPIRED),
        (RECEIPT, Cause.RELEASED),
    ],
)
def test_what_ends_a_lease_at_once(event: Any, cause: Cause) -> None:
    holder = held()
    (stop,) = holder.handle(event, 11.0)
    assert isinstance(stop, Stop)
    assert stop.cause is cause
    assert holder.wake_at() is None
    assert holder.handle(event, 11.0) == []


@pytest.mark.parametrize(
    "event",
    [
        Granted("other", LeaseId("x"), 9, b"", 3.0, ()),
        GRANTED,
        Refused("nonce", "late"),
        Renewed(LEASE, 1, 7, SEATS),
        Renewed(LEASE, 0, 1, SEATS),
        RenewRefused(LeaseId("x"), 1),
        RenewRefused(LEASE, 0),
        Revoked(LEASE, 2, 1.0),
        Replaced(LEASE, 1, Seat(0, 1, "earlier")),
        Ended(LEASE, 0, Cause.EXPIRED, 0.0, Usage()),
    ],
    ids=lambda event: type(event).__name__,
)
def test_late_repeated_and_foreign_messages_change_nothing(event: Any) -> None:
    holder = held()
    assert holder.handle(event, 11.0) == []
    assert (holder.phase, holder.ends_at) == (Phase.HELD, 13.0)


def test_a_revoked_lease_drains_and_ends_after_its_grace() -> None:
    holder = held()
    assert holder.handle(Revoked(LEASE, 1, 0.5), 11.0) == [Drain(0.5)]
    assert holder.tick(11.2) == []
    assert holder.tick(11.5) == [Stop(Cause.REVOKED, "its time is up")]


def test_a_grant_that_nobody_waits_for_any_more_is_given_back() -> None:
    holder = Holder("nonce", REQUEST)
    holder.start(0.0)
    assert [type(a) for a in holder.release(1.0)] == [Stop]
    assert holder.handle(GRANTED, 2.0) == [Send(Release(LEASE, 1, KEY))]
    assert holder.handle(GRANTED, 2.1) == []


def test_an_agent_that_does_not_answer_is_given_up() -> None:
    holder = Holder("nonce", REQUEST, answer_s=2.0, retry_s=1.0)
    holder.start(0.0)
    assert holder.tick(1.0) == [Send(Ask("nonce", REQUEST))]
    assert holder.tick(2.0) == [Stop(Cause.LOST, "no answer in 2 s")]


# ------------------------------------------------------------------ the agent


def grants() -> Grants:
    return Grants((0, 1, 2), 1000, 0, lambda: LEASE, lambda lease, epoch: KEY)


def granted() -> Grants:
    table = grants()
    actions = table.handle(Asked(7, Ask("nonce", REQUEST)), 0.0)
    assert actions == [Start(LEASE, n, 2 + n, n, 100, False, KEY, 7) for n in (0, 1)]
    assert table.handle(Started(LEASE, SEATS[0]), 0.1) == []
    assert table.handle(Started(LEASE, SEATS[1]), 0.2) == [Reply(7, GRANTED)]
    table.check()
    return table


KILLS = [Kill(LEASE, 0, 2), Kill(LEASE, 1, 3)]


def test_cores_are_free_when_their_executors_are_dead_and_not_before() -> None:
    table = granted()
    assert table.free_cores == {2}
    assert table.handle(Asked(7, Release(LEASE, 1, KEY)), 1.0) == KILLS
    assert table.handle(Died(LEASE, 0, 2, Usage(3, 0.5, 0.1)), 1.1) == []
    assert table.free_cores == {2}
    receipt = Ended(LEASE, 1, Cause.RELEASED, 2 * 1.5, Usage(4, 1.5, 0.1))
    assert table.handle(Died(LEASE, 1, 3, Usage(1, 1.0, 0.0)), 1.5) == [Reply(7, receipt)]
    assert table.free_cores == {0, 1, 2}
    assert table.free_memory_bytes == 1000
    # Who missed its receipt asks again.
    assert table.handle(Asked(7, Release(LEASE, 1, KEY)), 9.0) == [Reply(7, receipt)]
    assert table.handle(Asked(7, Release(LEASE, 1, b"forged")), 9.0) == []


def test_a_lease_that_is_not_renewed_expires() -> None:
    table = granted()
    assert table.tick(2.9) == []
    (reply,) = table.handle(Asked(7, Renew(LEASE, 1, KEY, 5)), 2.9)
    assert reply == Reply(7, Renewed(LEASE, 1, 5, SEATS))
    assert table.wake_at() == pytest.approx(5.9)
    assert table.tick(5.9) == KILLS
    assert table.handle(Asked(7, Renew(LEASE, 1, KEY, 6)), 5.9) == [
        Reply(7, RenewRefused(LEASE, 1))
    ]


@pytest.mark.parametrize(
    ("client", "renew"),
    [
        (7, Renew(LEASE, 0, KEY, 1)),
        (7, Renew(LEASE, 2, KEY, 1)),
        (7, Renew(LEASE, 1, b"forged", 1)),
        (7, Renew(LeaseId("other"), 1, KEY, 1)),
        (8, Renew(LEASE, 1, KEY, 1)),
    ],
    ids=["stale", "of the future", "forged", "unknown", "another client's"],
)
def test_renewals_that_are_not_right_are_refused(client: int, renew: Renew) -> None:
    table = granted()
    assert table.handle(Asked(client, renew), 2.0) == [
        Reply(client, RenewRefused(renew.lease, renew.epoch))
    ]
    assert table.wake_at() == 3.0


def test_a_wish_is_granted_once() -> None:
    table = granted()
    assert table.handle(Asked(7, Ask("nonce", REQUEST)), 1.0) == [Reply(7, GRANTED)]
    (reply,) = table.handle(Asked(8, Ask("nonce", REQUEST)), 1.0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Refused)
    table.handle(Gone(7), 2.0)
    for number, epoch in ((0, 2), (1, 3)):
        table.handle(Died(LEASE, number, epoch, Usage()), 2.0)
    (late,) = table.handle(Asked(7, Ask("nonce", REQUEST)), 3.0)
    assert isinstance(late, Reply)
    assert isinstance(late.message, Refused)
    assert table.n_leases == 0


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(4, 1, 1.0), "3 of 3 cores"),
        (Request(1, 1001, 1.0), "1000 of 1000 bytes"),
        (Request(0, 1, 1.0), "no sense"),
        (Request(1, -1, 1.0), "no sense"),
        (Request(1, 1, float("nan")), "no sense"),
    ],
)
def test_a_refusal_says_why(request_: Request, reason: str) -> None:
    (reply,) = grants().handle(Asked(1, Ask("n", request_)), 0.0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Refused)
    assert reason in reply.message.reason


def test_a_dead_executor_is_replaced_under_a_new_epoch_and_a_broken_seat_ends_the_lease() -> None:
    table = granted()
    (start,) = table.handle(Died(LEASE, 0, 2, Usage(1)), 1.0)
    assert start == Start(LEASE, 0, 4, 0, 100, False, KEY, 7)
    assert table.handle(Died(LEASE, 0, 2, Usage(1)), 1.0) == []  # told twice
    seat = Seat(0, 4, "c")
    assert table.handle(Started(LEASE, seat), 1.1) == [Reply(7, Replaced(LEASE, 1, seat))]
    (start,) = table.handle(Died(LEASE, 0, 4, Usage()), 1.2)
    assert table.handle(Died(LEASE, 0, 5, Usage()), 1.3) == [Kill(LEASE, 1, 3)]


def test_revoking_gives_a_grace_period_that_no_renewal_extends() -> None:
    table = granted()
    assert table.close(0.5, 1.0) == [Reply(7, Revoked(LEASE, 1, 0.5))]
    assert table.handle(Asked(7, Renew(LEASE, 1, KEY, 1)), 1.2) == []
    assert table.tick(1.5) == KILLS
    (reply,) = table.handle(Asked(8, Ask("new", REQUEST)), 1.6)
    assert reply == Reply(8, Refused("new", "the node is given back"))


# ------------------------------------------------------------------ both, with faults

N_SEEDS = 24


@pytest.mark.slow
def test_leases_keep_their_promises_whatever_is_lost_late_or_repeated() -> None:
    n_lost = 0
    for seed in range(N_SEEDS):
        n_lost += run_leases(seed).counts["lost"]
    assert n_lost > 100


def test_a_seed_is_the_same_every_time() -> None:
    assert run_leases(3) == run_leases(3)


def count_from_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Holder._renewed

    def renewed(self: Holder, serial: int, seats: Any, now: float) -> Any:
        if serial in self._sent:
            self._sent[serial] = now
        return honest(self, serial, seats, now)

    monkeypatch.setattr(Holder, "_renewed", renewed)


def free_the_cores_before_death(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Grants._end

    def end(self: Grants, grant: Any, cause: Cause, now: float) -> Any:
        actions = honest(self, grant, cause, now)
        return actions if grant.lease not in self._grants else actions + self._over(grant, now)

    monkeypatch.setattr(Grants, "_end", end)


def grant_every_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Grants._ask

    def ask(self: Grants, client: int, ask: Ask, now: float) -> Any:
        self._nonces.clear()
        hidden, self._grants = self._grants, {}
        try:
            return honest(self, client, ask, now)
        finally:
            self._grants = {**hidden, **self._grants}

    monkeypatch.setattr(Grants, "_ask", ask)


def believe_any_death(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Grants._died

    def died(self: Grants, died: Died, now: float) -> Any:
        grant = self._grants.get(died.lease)
        if grant is not None and died.number in grant.living:
            died = Died(died.lease, died.number, grant.living[died.number], died.usage)
        return honest(self, died, now)

    monkeypatch.setattr(Grants, "_died", died)


def never_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grants, "tick", lambda self, now: [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_rule",
    [
        count_from_the_answer,
        free_the_cores_before_death,
        grant_every_wish,
        believe_any_death,
        never_expire,
    ],
)
def test_a_broken_rule_is_caught(
    break_rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch)
    assert any(is_violated(seed) for seed in range(200))


def is_violated(seed: int) -> bool:
    try:
        run_leases(seed)
    except Violation:
        return True
    return False


def test_the_agent_limits_what_a_client_asks_for() -> None:
    table = grants()
    table.handle(Asked(1, Ask("n", Request(1, 1, 1e9))), 0.0)
    assert table.wake_at() == lease_grants.MAX_TTL_S
