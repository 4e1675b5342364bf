"""Dask's callbacks (`dask.callbacks.Callback`, `ProgressBar`, ...) fed from a job's commits.

Also `cache=`, which other local schedulers of Dask take: both are about the state of a run as those
schedulers keep it, and that state is kept here, by Dask's own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any

from dask.callbacks import unpack_callbacks
from dask.local import finish_task, start_state_from_dask

from wukong.scheduler.graph import dask_nodes, is_constant

_VALUE_FREE = frozenset({"ProgressBar", "Profiler", "ResourceProfiler"})
"""Classes of `dask.diagnostics` that look at keys and times only."""


class CallbackFeed:
    """Calls callbacks in Dask's order: start, start_state, (pretask, posttask)*, finish.

    Tasks are reported when their strand has committed. A posttask callback gets the task's value,
    as with Dask; since executors drop values, every task's is requested then, and all are reported
    at the end, except for those of `dask.diagnostics`, which do not look at them and get None.

    Use it as a context manager: whatever happens in it, callbacks that have started are finished.

    Args:
        callbacks: the active ones, as Dask keeps them: tuples of five functions or None.
        dsk, keys: as given to `get`. A start callback may change the graph that it sees
            (`dask.cache.Cache` does); then the changed one is run.
        cache: values that stand for the graph's tasks; gets its constants and the results.
    """

    def __init__(
        self, callbacks: Any, dsk: Any, keys: Any, cache: MutableMapping[Any, Any] | None = None
    ) -> None:
        self._callbacks = list(callbacks)
        _, _, self._pretask, self._posttask, _ = unpack_callbacks(self._callbacks)
        self._original = dsk
        self._wanted = keys
        self._cache = cache
        self._needs_values = any(map(_reads_values, self._posttask))
        self._is_changed = bool(cache)
        self._seen: dict[Hashable, Any] = {}
        self._state: dict[str, Any] = {}
        self._started: list[Any] = []
        self._results: set[Hashable] = set()
        self._place: dict[Hashable, int] = {}
        self._keys: Sequence[Hashable] = ()
        self._ran: list[tuple[Hashable, str]] = []
        """Tasks and who ran them, while their values are not here."""

    def begin(self) -> None:
        """Call the start callbacks.

        Raises:
            MissingKey: a key is read that the graph has not, as from `plan_graph`.
        """
        self._seen = dask_nodes(self._original, self._cache or {})
        before = dict(self._seen)
        for callback in self._callbacks:
            if callback[0]:
                callback[0](self._seen)
            self._started.append(callback)
        self._is_changed |= before.keys() != self._seen.keys() or any(
            self._seen[key] is not node for key, node in before.items()
        )

    @property
    def graph(self) -> Any:
        """What to run: the given graph, with its annotations, or what callbacks made of it."""
        return self._seen if self._is_changed else self._original

    @property
    def keys(self) -> Any:
        """What to request."""
        return [self._wanted, list(self._seen)] if self._needs_values else self._wanted

    def bind(self, keys: Sequence[Hashable]) -> Callable[[Sequence[int], str], None]:
        """Tell the tasks of the plan, and call the start_state callbacks.

        Returns: what to call with tasks that are done and the executor that ran them.
        """
        self._keys = keys
        self._place = dict(zip(keys, range(len(keys))))
        self._results = set(_flat(self._wanted))
        cache = {} if self._cache is None else self._cache
        self._state = start_state_from_dask(
            self._seen, cache=cache, keys=self._results, sortkey=self._order
        )
        for _, start_state, _, _, _ in self._callbacks:
            if start_state:
                start_state(self._seen, self._state)
        return self._done

    def finish(self, values: Any) -> Any:
        """Report tasks with their values, if that is what callbacks want.

        Returns: the values that the caller of `get` wants.
        """
        if self._needs_values:
            values, every = values
            known = dict(zip(self._seen, every, strict=True))
            for key, holder in self._ran:
                self._report({key: holder}, known)
        if self._cache is not None:
            self._cache.update(zip(_flat(self._wanted), _flat(values, tuple)))
        return values
