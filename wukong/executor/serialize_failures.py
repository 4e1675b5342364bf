"""Exceptions of tasks <-> values: a user's exception comes back as itself, with its traceback.

An exception is pickled where it was raised and unpickled only where it is raised again; between
them it is a `Failure`, which every executor can hand on without importing what the task imports.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from wukong.errors import TaskError
from wukong.executor.serialize import is_picklable, pickle_in_band

N_CAUSES = 5
"""Of a chain of exceptions that cause each other, so many are pickled."""


class RemoteTraceback(Exception):
    """The traceback of a task's exception as it was on the executor; its text is `str(self)`.

    Never raised: it is the `__cause__` of the exception that a client raises.
    """

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A task's exception as a value: plain text and bytes that run nothing until decoded."""

    key: object
    """Dask's key of the task, or its number where the executor knows no more."""
    type_name: str
    """Module and name of the exception's type."""
    message: str
    """`str()` of the exception."""
    traceback_text: str
    """As Python would have printed it on the executor, without Wukong's own frames."""
    pickled: bytes
    """The exception itself; empty if it cannot be pickled in any form."""
    frames: bytes = b""
    """The traceback itself, where tblib is installed, which lets Dask pickle tracebacks."""


@dataclass(frozen=True, slots=True)
class Raised:
    """A task's exception as a value inside one process: the object itself."""

    error: BaseException
    key: object
    """The task's number."""


def encode_error(error: BaseException, key: object) -> Failure:
    """Make a value of a task's exception; it never fails.

    That the exception can be unpickled is tried here. One whose unpickling fails or alters it is
    rebuilt without calling its `__init__`; state that cannot be pickled is left out.
    """
    kind = type(error)
    try:
        message = str(error)
    except Exception as failed:
        message = f"<str() failed: {type(failed).__name__}>"
    return Failure(
        key,
        f"{kind.__module__}.{kind.__qualname__}",
        message,
        _traceback_text(error),
        next((p for p in _pickled_forms(error, message) if _same(p, error, message)), b""),
        _pickled_frames(error),
    )


def decode_error(failure: Failure, key: object = None) -> BaseException:
    """Return the exception of a failure, as itself where that is possible.

    Its `__cause__` is the remote traceback, and a note names the key. Call it only for failures
    that a `Codec` decoded: it unpickles.

    Args:
        key: stands for the failure's own key where the client knows better.
    Returns:
        A new exception; a `TaskError` with the same text if the type cannot be rebuilt here.
    """
    error: object = None
    if failure.pickled:
        try:
            error = pickle.loads(failure.pickled)
        except Exception:
            # The type is not importable here, or __setstate__ fails: the stand-in tells the rest.
            error = None
    if not isinstance(error, BaseException):
        error = TaskError(f"{failure.type_name}: {failure.message}")
    if failure.frames:
        error.__traceback__ = pickle.loads(failure.frames)
    error.__cause__ = RemoteTraceback(failure.traceback_text)
    note_key(error, failure.key if key is None else key)
    return error


def note_key(error: BaseException, key: object) -> None:
    """Add a note that names the task which raised, once; None: no task did."""
    if key is None:
        return
    # What add_note does since Python 3.11.
    notes = vars(error).setdefault("__notes__", [])
    note = f"Raised by the task {key!r}"
    if note not in notes:
        notes.append(note)


def _frames(error: BaseException) -> TracebackType | None:
    """The traceback without Wukong's own frames."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_globals.get("__name__", "").startswith("wukong."):
        frames = frames.tb_next
    return frames


def _pickled_frames(error: BaseException) -> bytes:
    frames = _frames(error)
    try:
        return pickle_in_band(frames) if frames else b""
    except Exception:  # no tblib
        return b""


def exit_error(raised: SystemExit) -> TaskError:
    """What a task raises in effect when it calls sys.exit."""
    error = TaskError(f"the task called sys.exit({raised.code!r})")
    frames = raised.__traceback__  # the first one is the executor's
    error.__cause__ = raised.with_traceback(frames and frames.tb_next)
    return error


def death_error(n_deaths: int, cause: str) -> TaskError:
    """The error of a task that has killed so many executors, the last one of which `cause`.

    0: it may have run before, in one that died, and may not be run again.
    """
    if n_deaths == 0:
        died = cause or "has died"
        return TaskError(f"the task may not be run again, and an executor that held it {died}")
    times = "once" if n_deaths == 1 else f"{n_deaths} times"
    return TaskError(f"the task killed its executor {times}; the last one {cause}")


def _traceback_text(error: BaseException) -> str:
    frames = _frames(error)
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except Exception as failed:
        return f"<the traceback cannot be formatted: {type(failed).__name__}: {failed}>"


def _pickled_forms(error: BaseException, message: str) -> Iterator[bytes]:
    """Yield pickles of an exception, the most faithful first."""
    state = {name: item for name, item in vars(error).items() if is_picklable(item)}
    forms = (
        *([_Caused(error, N_CAUSES)] if error.__cause__ is not None else []),
        _Reduced(error),
        error,
        _Rebuilt(type(error), error.args, state),
        _Rebuilt(type(error), (message,), state),
    )
    for form in forms:
        try:
            yield pickle_in_band(form)
        except Exception:
            # Lost state, local types, a failing __reduce__: the next form asks for less.
            continue


def _same(pickled: bytes, error: BaseException, message: str) -> bool:
    try:
        copy = pickle.loads(pickled)
        return type(copy) is type(error) and str(copy) == message
    except Exception:
        return False


@dataclass(frozen=True, slots=True)
class _Caused:
    """Pickles as an exception with its cause, which unpickling sets as any attribute."""

    error: BaseException
    n_causes: int
    """So many of a chain are kept."""

    def __reduce__(self) -> Any:
        reduced: Any = self.error.__reduce_ex__(5)
        kind, args, *state = reduced
        attributes = dict(state[0] or {}) if state else {}
        cause = self.error.__cause__
        if cause is not None and self.n_causes > 0:
            attributes["__cause__"] = _Caused(cause, self.n_causes - 1)
        return kind, args, attributes


@dataclass(frozen=True, slots=True)
class _Reduced:
    """Pickles as its class says, whatever others (tblib) have registered for exceptions."""

    error: BaseException

    def __reduce__(self) -> Any:
        return self.error.__reduce_ex__(5)


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """Pickles as an exception that is made without its `__init__`."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.kind, self.args, self.state)


def _rebuild(
    kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error
