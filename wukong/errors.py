"""Every exception that Wukong raises on purpose.

A user's own exception is none of these: it comes back as itself, with the remote traceback as its
`__cause__`. Each class below also subclasses the builtin it is, and its docstring says whose fault
it is, what is known when it is raised, and what to do.
"""

from __future__ import annotations


class WukongError(Exception):
    """Base of all; catch it to catch whatever Wukong itself reports."""


class GraphError(WukongError, ValueError):
    """The graph cannot be run as given. Nothing has been started; the message names the key."""


class MissingKey(GraphError, KeyError):
    """A key that was requested, or that a task needs, is not in the graph."""

    __str__ = Exception.__str__  # KeyError would show the message's repr


class CycleError(GraphError, RuntimeError):
    """Tasks that wait for each other; the message lists the cycle's keys."""


class SerializationError(WukongError, TypeError):
    """A task, an argument or a result cannot be pickled; the message names the type and the key."""

    def __init__(self, message: str, task: int | None = None) -> None:
        super().__init__(message)
        self.task = task

    def __reduce__(self) -> tuple[type[SerializationError], tuple[str, int | None]]:
        return SerializationError, (str(self), self.task)


class TaskError(WukongError, RuntimeError):
    """A task ended in a way that leaves no exception to re-raise: it exited or killed its executor.

    Also stands in for a task's exception that could not be pickled; the message then names its
    type and carries its text.
    """


class JobTimeout(WukongError, TimeoutError):
    """The deadline passed; the message says what was running, queued, retried and lost."""


class JobCancelled(WukongError):
    """The job was cancelled, by this client or by another one; its results are gone."""


class JobNotFound(WukongError, KeyError):
    """The store has no such job: it was never created, was forgotten, or its lease ran out."""

    __str__ = Exception.__str__


class StoreError(WukongError):
    """A store could not do what it was asked; see the subclasses."""


class MissingBlob(StoreError, KeyError):
    """A blob is gone. An executor whose token is no longer live ignores it; else it was lost."""

    __str__ = Exception.__str__


class StoreUnavailable(StoreError, ConnectionError):
    """The store did not answer, or is full; the operation may or may not have taken effect.

    All operations may be repeated.
    """


class StoreFull(StoreUnavailable, MemoryError):
    """The store has no room for this; nothing of it has taken effect. Make room, or compute less
    at a time; executors try for some seconds, then the job ends in this error."""


class CorruptBlob(StoreError, ValueError):
    """A blob's bytes are not those that were put (truncated, or damaged)."""


class InvokeError(WukongError):
    """An executor could not be started; see the subclasses."""


class Throttled(InvokeError):
    """The platform refuses more invocations for now; try again later."""


class PayloadTooLarge(InvokeError, ValueError):
    """An invocation is larger than the platform takes; send it through the store."""


class VersionMismatch(InvokeError, RuntimeError):
    """Client and executors have other versions of Python or of a package, so that one cannot read
    what the other pickles. Nothing was started; the message says what differs and how to mend it.
    """


class DeploymentError(WukongError, RuntimeError):
    """Executors could not be deployed or removed; the message says what the cloud has answered.

    Every step may be repeated.
    """


class LeaseError(WukongError):
    """A lease on executors cannot be used; see the subclasses."""


class LeaseExpired(LeaseError, TimeoutError):
    """The lease ended before it was renewed; its executors are gone."""


class LeaseRefused(LeaseError):
    """No node grants the lease asked for; the message says why."""


class LeaseLost(LeaseError, ConnectionError):
    """A leased executor, or its node, is gone: died, was taken back, or does not answer.

    Calls that had begun may have run or not.
    """


class FrameError(LeaseError, ValueError):
    """The other end of a connection breaks the protocol, or lies; the connection is cut."""


class SecurityError(WukongError, PermissionError):
    """A signature does not match: the bytes were not written with the job's key. Nothing of them
    has been unpickled."""


class InternalError(WukongError, AssertionError):
    """A defect in Wukong. Please report it, with the text of the message."""
