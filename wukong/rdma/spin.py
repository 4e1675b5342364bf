"""PURE: how long to poll before sleeping.

Polling wastes a core, sleeping costs some 10 to 50 us at the next frame. A hot lease polls always.
Any other polls as long as the last waits were short: then the next one probably is, too.
"""

from __future__ import annotations

SPIN_S = 0.0002
"""A few times what a sleep and a wake-up cost: at worst polling takes that much more."""
HOT_S = 3600.0


class Spin:
    """Learns from the lengths of waits.

    Args:
        is_hot: polls always, or for `hot_s`.
    """

    def __init__(self, is_hot: bool, hot_s: float = HOT_S) -> None:
        self._is_hot = is_hot
        self._n_long = 0
        self.spin_s = hot_s if is_hot else SPIN_S

    def waited(self, wait_s: float) -> float:
        """Take the length of a wait; returns how much of it was polled."""
        spun_s = min(wait_s, self.spin_s)
        if not self._is_hot:
            # One long wait is the pause between two bursts; several are slow traffic.
            self._n_long = 0 if wait_s <= SPIN_S else min(self._n_long + 1, 8)
            self.spin_s = SPIN_S if self._n_long < 4 else 0.0
        return spun_s
