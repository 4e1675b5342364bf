"""The rules of a platform of functions, on a clock of the test's own."""

from dataclasses import replace

import pytest

from wukong.aws.platform import (
    LOOP,
    Action,
    Bury,
    Deliver,
    EndEnvironment,
    EnvironmentId,
    Platform,
    Refuse,
    Remember,
    Request,
    RequestId,
    Scaling,
    StartEnvironment,
)

E1, E2, E3 = map(EnvironmentId, (1, 2, 3))


class World:
    """A platform with one function, whose invariants are checked after every fact."""

    def __init__(self, requests_per_s: float = float("inf"), **scaling: object) -> None:
        self.now = 0.0
        self.n = 0
        self.platform = Platform(
            {"f": Scaling(**scaling)},  # type: ignore[arg-type]
            self.now,
            requests_per_s,
        )

    def request(self, is_event: bool = True, **fields: object) -> Request:
        self.n += 1
        return Request(RequestId(f"r{self.n}"), "f", is_event, self.now, **fields)  # type: ignore[arg-type]

    def do(self, fact: str, *arguments: object) -> list[Action]:
        actions = getattr(self.platform, fact)(*arguments, self.now)
        self.platform.check()
        return actions


def test_a_warm_environment_is_used_again_and_the_last_one_first() -> None:
    world = World(concurrency=3)
    requests = [world.request() for _ in range(4)]
    assert world.do("invoke", requests[0]) == [StartEnvironment(E1, requests[0])]
    assert world.do("invoke", requests[1]) == [StartEnvironment(E2, requests[1])]
    assert world.do("freed", E1) == []
    assert world.do("freed", E2) == []
    assert world.do("invoke", requests[2]) == [Deliver(E2, requests[2])]
    assert world.do("invoke", requests[3]) == [Deliver(E1, requests[3])]


def test_events_beyond_the_concurrency_wait_and_others_are_refused() -> None:
    world = World(concurrency=1)
    first, second = world.request(), world.request()
    third = world.request(is_event=False)
    world.do("invoke", first)
    assert world.do("invoke", second) == []
    assert world.do("invoke", third) == [Refuse(third, "ConcurrentInvocationLimitExceeded")]
    assert world.platform.n_waiting("f") == 1
    assert world.do("freed", E1) == [Deliver(E1, second)]


def test_a_reserved_limit_is_called_so() -> None:
    world = World(concurrency=1, is_reserved=True)
    world.do("invoke", world.request())
    refused = world.request(is_event=False)
    reason = "ReservedFunctionConcurrentInvocationLimitExceeded"
    assert world.do("invoke", refused) == [Refuse(refused, reason)]


def test_new_environments_come_in_a_burst_and_then_at_a_rate() -> None:
    world = World(concurrency=100, burst=2.0, ramp_per_s=10.0)
    started = [world.do("invoke", world.request()) for _ in range(5)]
    assert [len(actions) for actions in started] == [1, 1, 0, 0, 0]
    assert world.platform.wake_at() == pytest.approx(0.1)
    world.now = 0.11
    assert len(world.do("tick")) == 1
    world.now = 10.0
    assert len(world.do("tick")) == 2
    refused = world.request(is_event=False)
    world.now = 10.01
    reason = "FunctionInvocationRateLimitExceeded"
    assert world.do("invoke", refused) == [Refuse(refused, reason)]


def test_requests_of_all_kinds_are_counted_against_the_rate() -> None:
    world = World(requests_per_s=2.0, concurrency=10)
    refused = []
    for _ in range(5):
        actions = world.do("invoke", world.request())
        refused.append(isinstance(actions[0], Refuse))
    assert refused == [False, False, True, True, True]
    world.now = 0.5
    assert not isinstance(world.do("invoke", world.request())[0], Refuse)


def test_an_event_that_fails_is_tried_again_twice_and_then_given_up() -> None:
    world = World(concurrency=1)
    event = world.request()
    world.do("invoke", event)
    world.do("freed", E1)
    once = replace(event, n_failures=1)
    assert world.do("failed", event) == [Remember(once, 60.0)]
    assert world.platform.wake_at() == 60.0
    world.now = 60.0
    assert world.do("tick") == [Deliver(E1, once)]
    world.do("freed", E1)
    twice = replace(event, n_failures=2)
    assert world.do("failed", once) == [Remember(twice, 180.0)]
    world.now = 180.0
    world.do("tick")
    world.do("freed", E1)
    assert world.do("failed", twice) == [Bury(twice, "RetriesExhausted")]


def test_an_event_that_waited_too_long_is_given_up() -> None:
    world = World(concurrency=1, event_age_max_s=5.0)
    world.do("invoke", world.request())
    late = world.request()
    world.do("invoke", late)
    world.now = 6.0
    assert world.do("freed", E1) == [Bury(late, "EventAgeExceeded")]


@pytest.mark.parametrize("allows", [False, True])
def test_a_long_chain_is_a_loop_unless_the_function_allows_it(allows: bool) -> None:
    world = World(allows_loops=allows)
    short, long = world.request(depth=15), world.request(depth=16)
    assert not isinstance(world.do("invoke", short)[0], Refuse)
    assert (world.do("invoke", long) == [Refuse(long, LOOP)]) is not allows


def test_environments_are_recycled_by_use_and_by_age() -> None:
    world = World(concurrency=2, n_invocations_max=2, age_max_s=100.0)
    world.do("invoke", world.request())
    assert world.do("freed", E1) == []
    world.do("invoke", world.request())
    assert world.do("freed", E1) == [EndEnvironment(E1)]
    world.do("invoke", world.request())
    world.now = 100.0
    assert world.do("freed", E2) == [EndEnvironment(E2)]


def test_an_environment_that_idles_is_ended() -> None:
    world = World(idle_s=10.0)
    world.do("invoke", world.request())
    world.do("freed", E1)
    assert world.platform.wake_at() == 10.0
    world.now = 10.0
    assert world.do("tick") == [EndEnvironment(E1)]
    assert world.platform.wake_at() is None


def test_a_dead_environment_makes_room() -> None:
    world = World(concurrency=1)
    first, second = world.request(), world.request()
    world.do("invoke", first)
    world.do("invoke", second)
    assert world.do("lost", E1) == [StartEnvironment(E2, second)]
    assert world.do("lost", E1) == []
    world.do("freed", E2)
    assert world.do("lost", E2) == []
    assert world.platform.n_running("f") == 0
