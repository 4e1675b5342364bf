"""How many batch jobs with agents there should be."""

import random

import pytest

from wukong.rdma.scaling import FAILURES_MAX, Cancel, Job, Node, Scaling, Submit

IDLE_S = 60.0


def jobs(*names: str) -> list[Job]:
    return [Job(name, f"agent-{name}") for name in names]


def nodes(**free: int) -> dict[str, Node]:
    return {f"agent-{name}": Node(4, n_free) for name, n_free in free.items()}


def test_nothing_is_asked_for_while_nothing_waits() -> None:
    assert Scaling(0, 8).decide([], {}, 0, 0.0) == []


def test_nodes_are_asked_for_while_work_waits() -> None:
    scaling = Scaling(0, 8, cores_per_node=4)
    assert scaling.decide([], {}, 10, 0.0) == [Submit(3)]
    assert scaling.decide(jobs("1", "2", "3"), {}, 10, 1.0) == []
    assert scaling.decide(jobs("1", "2", "3"), nodes(a=4), 14, 2.0) == [Submit(1)]


def test_never_more_nodes_than_allowed() -> None:
    scaling = Scaling(0, 2, cores_per_node=4)
    assert scaling.decide([], {}, 1000, 0.0) == [Submit(2)]
    assert scaling.decide(jobs("1", "2"), {}, 1000, 0.0) == []


def test_free_cores_are_used_first() -> None:
    scaling = Scaling(0, 8, cores_per_node=4)
    assert scaling.decide(jobs("1"), nodes(**{"1": 3}), 3, 0.0) == []
    assert scaling.decide(jobs("1"), nodes(**{"1": 3}), 4, 0.0) == [Submit(1)]


def test_what_agents_tell_of_their_cores_counts_more_than_what_was_expected() -> None:
    scaling = Scaling(0, 8, cores_per_node=1)
    assert scaling.decide(jobs("1"), nodes(**{"1": 0}), 8, 0.0) == [Submit(2)]


def test_an_idle_node_is_given_back_after_a_while() -> None:
    scaling = Scaling(0, 8, 4, IDLE_S)
    idle = nodes(**{"1": 4, "2": 1})
    assert scaling.decide(jobs("1", "2"), idle, 0, 0.0) == []
    assert scaling.decide(jobs("1", "2"), idle, 0, IDLE_S - 1) == []
    assert scaling.decide(jobs("1", "2"), idle, 0, IDLE_S) == [Cancel(("1",))]


def test_a_node_that_was_used_meanwhile_is_kept() -> None:
    scaling = Scaling(0, 8, 4, IDLE_S)
    scaling.decide(jobs("1"), nodes(**{"1": 4}), 0, 0.0)
    scaling.decide(jobs("1"), nodes(**{"1": 3}), 0, IDLE_S / 2)
    assert scaling.decide(jobs("1"), nodes(**{"1": 4}), 0, IDLE_S) == []
    assert scaling.decide(jobs("1"), nodes(**{"1": 4}), 0, 2 * IDLE_S) == [Cancel(("1",))]


def test_a_job_that_still_queues_is_given_back_too_when_nobody_needs_it() -> None:
    scaling = Scaling(0, 8, 4, IDLE_S)
    scaling.decide(jobs("1"), {}, 0, 0.0)
    assert scaling.decide(jobs("1"), {}, 0, IDLE_S) == [Cancel(("1",))]


def test_a_node_that_is_coming_is_kept_while_work_waits_for_it() -> None:
    scaling = Scaling(0, 8, 1, IDLE_S)
    used = {"agent-1": Node(1, 0)}
    for now in (0.0, IDLE_S, 2 * IDLE_S):
        assert scaling.decide(jobs("1", "2"), used, 1, now) == []
    assert scaling.decide(jobs("1", "2"), used, 0, 3 * IDLE_S) == [Cancel(("2",))]


def test_some_nodes_may_be_kept_always() -> None:
    scaling = Scaling(1, 8, 4, IDLE_S)
    assert scaling.decide([], {}, 0, 0.0) == [Submit(1)]
    both = nodes(**{"1": 4, "2": 4})
    scaling.decide(jobs("1", "2"), both, 0, 0.0)
    assert scaling.decide(jobs("1", "2"), both, 0, IDLE_S) == [Cancel(("2",))]


def test_a_preempted_job_is_replaced_while_work_waits() -> None:
    scaling = Scaling(0, 1, 4, IDLE_S)
    scaling.decide(jobs("1"), nodes(**{"1": 0}), 4, 0.0)
    for number in range(2, 20):
        assert scaling.decide([], {}, 4, float(number)) == [Submit(1)]
        scaling.decide(jobs(str(number)), nodes(**{str(number): 0}), 4, float(number))
    assert not scaling.has_given_up


def test_jobs_that_end_before_their_agents_come_up_end_the_asking() -> None:
    scaling = Scaling(0, 8, 4, IDLE_S)
    for number in range(FAILURES_MAX):
        assert scaling.decide([], {}, 4, 0.0) == [Submit(1)]
        assert scaling.decide(jobs(str(number)), {}, 4, 0.0) == []
    assert scaling.decide([], {}, 4, 0.0) == []
    assert scaling.has_given_up


def test_jobs_that_were_cancelled_are_no_failures() -> None:
    scaling = Scaling(0, 8, 4, IDLE_S)
    for number in range(2 * FAILURES_MAX):
        scaling.decide(jobs(str(number)), {}, 0, 0.0)
        scaling.cancelled([str(number)])
    scaling.decide([], {}, 0, 0.0)
    assert scaling.n_failures == 0


@pytest.mark.parametrize(("least", "most", "cores"), [(-1, 2, 1), (3, 2, 1), (0, 0, 1), (0, 1, 0)])
def test_limits_that_make_no_sense_are_refused(least: int, most: int, cores: int) -> None:
    with pytest.raises(ValueError, match="nodes"):
        Scaling(least, most, cores)


def test_at_random_limits_hold_and_work_is_served_in_the_end() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        least, most = rng.randint(0, 2), rng.randint(2, 6)
        scaling = Scaling(least, most, rng.randint(1, 8), IDLE_S)
        living: dict[str, Job] = {}
        up: set[str] = set()
        n_made = 0
        for step in range(200):
            now = step * 10.0
            is_calm = step >= 150
            n_wanted = 0 if is_calm else rng.choice([0, 0, 1, 5, 30])
            for name in sorted(living):
                if name not in up and rng.random() < 0.5:
                    up.add(name)
                elif not is_calm and name in up and rng.random() < 0.1:
                    del living[name]  # preempted
            free = {name: Node(4, 4 if is_calm else rng.randint(0, 4)) for name in up & set(living)}
            seen = {f"agent-{name}": node for name, node in free.items()}
            for wish in scaling.decide(list(living.values()), seen, n_wanted, now):
                match wish:
                    case Submit(n):
                        assert n > 0
                        for _ in range(n):
                            n_made += 1
                            living[str(n_made)] = Job(str(n_made), f"agent-{n_made}")
                    case Cancel(given_back):
                        scaling.cancelled(given_back)
                        for name in given_back:
                            del living[name]
            scaling.check()
            assert len(living) <= most
        assert len(living) == least
