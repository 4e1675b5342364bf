"""Two executors in one place: while one computes, the other fetches, puts and commits.

    lane 1    take  fetch  RUN ........  put  commit  fetch  . . . .  RUN ........  put
    lane 2                 take  fetch  . . . .  RUN ..............  put  commit  fetch

Where the store is far away, an executor that does one thing after the other waits most of the time.
Each lane is a whole executor with a token of its own, so that nothing new can go wrong; they take
turns at computing. The second lane takes a token only while the first one computes, and only when
more are queued than others could begin at once; and it fetches ahead no more than a bound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from wukong.executor.events import Event, Fetch
from wukong.executor.invoker import Invoker
from wukong.executor.kept import Kept
from wukong.executor.messages import HolderId, Part
from wukong.executor.run import Executor
from wukong.executor.scene import Lender
from wukong.executor.work import Policy
from wukong.storage import Store

LOOK_S = 0.05
"""The second lane asks for more to do no oftener than this, where it found nothing."""


class Turn:
    """Lets one lane at a time compute, and tells when a run begins.

    A task that waits for others lends its turn, lest the other lane holds what it waits for.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_running = 0
        self._n_lent = 0
        """Runs whose tasks wait."""
        self._n_begun = 0
        self._is_over = False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._n_running <= self._n_lent)
            self._n_running += 1
            self._n_begun += 1
            self._changed.notify_all()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._n_running -= 1
            self._changed.notify_all()

    def lend(self) -> None:
        """A task waits: the other lane may compute meanwhile."""
        with self._changed:
            self._n_lent += 1
            self._changed.notify_all()

    def take_back(self) -> None:
        """The task goes on; so does whatever has begun meanwhile."""
        with self._changed:
            self._n_lent -= 1

    def wait_begun(self, n_known: int) -> int | None:
        """Wait until more runs have begun than are known. None: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_begun > n_known or self._is_over)
            return None if self._is_over else self._n_begun

    def wait_over(self, timeout_s: float) -> bool:
        """Wait for the end, or for so long. Returns: it is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over, timeout_s)

    def end(self) -> None:
        """Nobody shall wait for runs any more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class _TurnLender:
    """Lends a lane's turn together with its executor's place."""

    def __init__(self, turn: Turn, inner: Lender) -> None:
        self._turn = turn
        self._inner = inner

    def lend(self, holder: HolderId) -> None:
        """See `Lender`."""
        self._turn.lend()
        self._inner.lend(holder)

    def take_back(self) -> None:
        """See `Lender`."""
        self._inner.take_back()
        self._turn.take_back()


class LaneExecutor(Executor):
    """An executor that computes when it is its turn.

    Args:
        turn: shared with the other lane.
        others: as for `Executor`; `policy.prefetch_bytes` bounds what is fetched ahead.
    """

    def __init__(
        self,
        turn: Turn,
        holder: HolderId,
        store: Store,
        invoker: Invoker,
        policy: Policy,
        on_stuck: Callable[[], None] = lambda: None,
        kept: Kept | None = None,
    ) -> None:
        super().__init__(holder, store, invoker, policy, on_stuck, kept)
        self._place = replace(self._place, lender=_TurnLender(turn, self._place.lender))
        self._turn = turn
        self._prefetch_bytes = policy.prefetch_bytes

    def _fetch(self, fetch: Fetch) -> Event:
        n_bytes = sum(e.size_bytes for located in fetch.inputs for e in located.entries if e.blob)
        if n_bytes <= self._prefetch_bytes:
            return super()._fetch(fetch)
        with self._turn:  # what the other lane has in memory is done with then
            return super()._fetch(fetch)

    def _run(self, part: Part, limit: int) -> Event:
        with self._turn:
            # Its token may have been spent by somebody else meanwhile; or this place ends.
            is_late = self._core.is_doomed or self._core.is_draining
            return super()._run(part, 0 if is_late else limit)


class SecondLane:
    """A thread in which the second executor of a place runs tokens.

    Args:
        executor: the second one.
        turn: of both.
        n_queued: asks how many tokens are queued.
        n_enough: with so many it takes one; fewer are for executors that have nothing else to do.
        take: has `executor` run a queued token; False: there was none.
        on_error: told of a defect, which ends the lane; `end` raises it too.
    """

    def __init__(
        self,
        executor: Executor,
        turn: Turn,
        n_queued: Callable[[], int],
        n_enough: int,
        take: Callable[[], bool],
        on_error: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.executor = executor
        self.error: BaseException | None = None
        """A defect that has ended it."""
        self._turn = turn
        self._n_queued = n_queued
        self._n_enough = n_enough
        self._take = take
        self._on_error = on_error
        self._thread = threading.Thread(target=self._run, name="wukong-lane", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Take nothing more, and wait until what is held is spent.

        Raises: what has ended it, if that was a defect.
        """
        self._turn.end()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            n_known: int | None = 0
            while (n_known := self._turn.wait_begun(n_known or 0)) is not None:
                if self._n_queued() >= self._n_enough and self._take():
                    continue
                if self._turn.wait_over(LOOK_S):
                    return
        except BaseException as error:
            self.error = error
            self._on_error(error)
