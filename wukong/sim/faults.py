"""Which faults a simulated world has, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities are for each action, message or run; times are absolute, in seconds."""

    until_s: float = 0.0
    """No fault happens later."""
    death: float = 0.0
    """An executor dies before or after an action."""
    run_death: float = 0.0
    """An executor dies somewhere in a run."""
    stop: float = 0.0
    """An executor is stopped for a while, and goes on later."""
    request_lost: float = 0.0
    reply_lost: float = 0.0
    late: float = 0.0
    """A request takes effect only after its sender has given it up."""
    slow: float = 0.0
    """A message takes 200 times as long."""
    invoke_lost: float = 0.0
    invoke_repeated: float = 0.0
    invoke_delayed: float = 0.0
    throttled: float = 0.0
    """An invocation is refused."""
    news_lost: float = 0.0
    """A watching client is not told of a change."""
    outages: tuple[tuple[float, float], ...] = ()
    """From, to: the stores answer nobody."""
    failovers: tuple[float, ...] = ()
    """The job store goes back to what its replica has."""
    lag_s: float = 0.0
    """How far the replica is behind."""
    takes_blobs: bool = False
    """Blobs that are younger than the lag are lost with a failover."""
    blob_losses: tuple[float, ...] = ()
    """Some blob disappears."""
    second_starts: tuple[float, ...] = ()
    """All running tokens are taken for stragglers, and started a second time."""
    client_deaths: tuple[tuple[float, float], ...] = ()
    """The client dies, and another one attaches."""

    @property
    def are_none(self) -> bool:
        """Nothing will go wrong."""
        return self.until_s == 0.0


NO_FAULTS = Faults()


def draw_faults(rng: Random, horizon_s: float, severity: float) -> Faults:
    """Draw kinds and probabilities of faults.

    Args:
        horizon_s: about how long the job would take without faults.
        severity: 0.0 (hardly any) to 1.0 (a storm).
    """
    until_s = horizon_s * rng.uniform(1.0, 4.0) + rng.choice((1.0, 20.0))

    def chance(most: float) -> float:
        return most * severity * rng.random() if rng.random() < 0.5 else 0.0

    def moments(most: int) -> tuple[float, ...]:
        n = rng.randint(0, most) if rng.random() < 0.5 else 0
        return tuple(sorted(rng.uniform(0.0, horizon_s * 1.5) for _ in range(n)))

    def spells(most: int, longest_s: float) -> tuple[tuple[float, float], ...]:
        begun = [a for a in moments(most) if a < until_s]
        return tuple((a, min(a + rng.uniform(0.1, longest_s), until_s)) for a in begun)

    failovers = moments(4) if rng.random() < 0.7 else ()
    return Faults(
        until_s=until_s,
        death=chance(0.1),
        run_death=chance(0.3),
        stop=chance(0.03),
        request_lost=chance(0.1),
        reply_lost=chance(0.1),
        late=chance(0.1),
        slow=chance(0.1),
        invoke_lost=chance(0.3),
        invoke_repeated=chance(0.3),
        invoke_delayed=chance(0.3),
        throttled=chance(0.3),
        news_lost=chance(0.5),
        outages=spells(2, 80.0 if severity > 0.8 else 5.0),
        failovers=failovers,
        lag_s=rng.choice((0.01, 0.2, 2.0, 0.2 * horizon_s)) if failovers else 0.0,
        takes_blobs=rng.random() < 0.3,
        blob_losses=moments(3) if rng.random() < 0.4 else (),
        client_deaths=spells(2, 30.0),
        second_starts=moments(3),
    )
