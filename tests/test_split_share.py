"""What a split gains, and how much of what is idle one executor may count on."""

import pytest

from wukong.executor.events import Edges, Overdue
from wukong.executor.invoker import share_of_idle
from wukong.executor.work import gain_s


@pytest.mark.parametrize(
    ("n_left", "hand_over_s", "gain"),
    [(1, 0.25, 0.15), (2, 0.25, 0.4 + 2 * 0.5 - 0.9), (8, 1.0, 0.4 + 4.0 - 3.0)],
)
def test_a_split_gains_what_others_do_less_the_time_until_they_begin(
    n_left: int, hand_over_s: float, gain: float
) -> None:
    edges = Edges(tuple(range(n_left + 1)), ((),) * (n_left + 1))
    overdue = Overdue(1, {}, edges, n_idle=1, running_s=0.1)
    assert gain_s(overdue, 0.5, hand_over_s) == pytest.approx(gain)


def test_executors_that_look_at_once_give_away_as_much_as_there_is_room_for() -> None:
    chances = [i / 1000 for i in range(1000)]
    assert sum(share_of_idle(10, 1000, chance) for chance in chances) == 10
    assert share_of_idle(10, 1, 0.9) == 10
    assert share_of_idle(-3, 5, 0.0) == 0
