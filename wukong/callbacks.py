"""Dask's callbacks (`dask.callbacks.Callback`, `ProgressBar`, ...) fed from a job's commits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import TracebackType
from typing import Any

from dask.callbacks import unpack_callbacks
from dask.utils import ensure_dict

_VALUE_FREE = frozenset({"ProgressBar", "Profiler", "ResourceProfiler"})
"""Classes of `dask.diagnostics` that look at keys and times only."""


class CallbackFeed:
    """Calls callbacks in Dask's order: start, start_state, (pretask, posttask)*, finish.

    Tasks are reported when their strand has committed. A posttask callback gets the task's value,
    as with Dask; since executors drop values, every task's is requested then, except for those of
    `dask.diagnostics`, which do not look at them and get None.

    Args:
        callbacks: the active ones, as Dask keeps them: tuples of five functions or None.
        dsk, keys: as given to `get`. A start callback may change the graph that it sees
            (`dask.cache.Cache` does); then the changed one is run.
    """

    def __init__(self, callbacks: Any, dsk: Any, keys: Any) -> None:
        self._callbacks = list(callbacks)
        _, _, self._pretask, self._posttask, _ = unpack_callbacks(self._callbacks)
        graph = dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__()
        self._before: dict[Hashable, Any] = dict(ensure_dict(graph))
        self._seen = dict(self._before)
        self._original = dsk
        self._wanted = keys
        self._needs_values = any(map(_reads_values, self._posttask))
        self._state: dict[str, Any] = {}
        self._started: list[Any] = []
        self._keys: Sequence[Hashable] = ()

    @property
    def graph(self) -> Any:
        """What to run: the given graph, or what a callback made of it."""
        if all(self._seen.get(key) is task for key, task in self._before.items()):
            return self._original  # with its annotations
        return self._seen

    @property
    def keys(self) -> Any:
        """What to request."""
        return [self._wanted, sorted(self._seen, key=str)] if self._needs_values else self._wanted

    def bind(self, keys: Sequence[Hashable]) -> Callable[[Sequence[int]], None] | None:
        """Tell the tasks of the plan. Returns: what to call when some of them are done."""
        self._keys = keys
        self._state.update(waiting=dict.fromkeys(keys))
        for _, start_state, _, _, _ in self._callbacks:
            if start_state:
                start_state(self._seen, self._state)
        return None if self._needs_values else self._done

    def finish(self, values: Any) -> Any:
        """Report tasks with their values, if that is what callbacks want.

        Returns: the values that the caller of `get` wants.
        """
        if not self._needs_values:
            return values
        wanted, every = values
        known = dict(zip(sorted(self._seen, key=str), every, strict=True))
        for key in self._keys:
            self._report(key, known.get(key))
        return wanted

    def _done(self, tasks: Sequence[int]) -> None:
        for task in tasks:
            self._report(self._keys[task], None)

    def _report(self, key: Hashable, value: Any) -> None:
        state = self._state
        state["waiting"].pop(key, None)
        state["running"].add(key)
        for pretask in self._pretask:
            pretask(key, self._seen, state)
        state["running"].discard(key)
        state["finished"].add(key)
        if self._needs_values:
            state["cache"][key] = value
        for posttask in self._posttask:
            posttask(key, value, self._seen, state, "wukong")

    def __enter__(self) -> CallbackFeed:
        self._state = {
            "dependencies": {},
            "dependents": {},
            "waiting": {},
            "waiting_data": {},
            "cache": {},
            "ready": [],
            "running": set(),
            "finished": set(),
            "released": set(),
        }
        for callback in self._callbacks:
            if callback[0]:
                callback[0](self._seen)
            self._started.append(callback)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for callback in self._started:
            if callback[4]:
                callback[4](self._seen, self._state, error is not None)


def _reads_values(posttask: Any) -> bool:
    owner = type(getattr(posttask, "__self__", None))
    is_known = owner.__module__.startswith("dask.diagnostics") and owner.__name__ in _VALUE_FREE
    return not is_known
