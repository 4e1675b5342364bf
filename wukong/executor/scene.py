"""What may surround a program's tasks while an executor runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from wukong.executor.messages import HolderId

T = TypeVar("T")


class Lender(Protocol):
    """Lets others use an executor's place while its task waits for something."""

    def lend(self, holder: HolderId) -> None:
        """From now on others may run tokens in this executor's place, until `take_back`."""
        ...

    def take_back(self) -> None:
        """The task that waited goes on. Returns at once; others finish what they have begun."""
        ...


class NoLender:
    """An executor's place that cannot be lent: others are started elsewhere, or nowhere."""

    def lend(self, holder: HolderId) -> None:
        """See `Lender`."""

    def take_back(self) -> None:
        """See `Lender`."""


@dataclass(frozen=True, slots=True)
class Place:
    """The executor that runs tasks, as far as a scene needs it."""

    holder: HolderId
    """Its name in the store."""
    lender: Lender
    task_now: Callable[[], int]
    """The id of the task that is run just now."""


class Scene(Protocol):
    """Sent with a program, and entered for each of its runs. Must pickle where programs do."""

    def play(self, loop_over_tasks: Callable[[], T], place: Place) -> T:
        """Run tasks in the scene, by calling `loop_over_tasks` once."""
        ...


def lender_of(invoker: object) -> Lender:
    """The invoker itself, if it lends."""
    lends = hasattr(invoker, "lend") and hasattr(invoker, "take_back")
    return invoker if lends else NoLender()  # type: ignore[return-value]  # as was just looked up
