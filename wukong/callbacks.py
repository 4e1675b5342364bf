"""Dask's callbacks (`dask.callbacks.Callback`, `ProgressBar`, ...) fed from a job's commits.

Also `cache=`, which other local schedulers of Dask take: both are about the state of a run as those
schedulers keep it, and here Dask's own functions keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from itertools import groupby
from operator import itemgetter
from types import TracebackType
from typing import Any

from dask.callbacks import unpack_callbacks
from dask.local import finish_task, start_state_from_dask

from wukong.scheduler.graph import dask_nodes
from wukong.scheduler.plan import flatten_keys

_VALUE_FREE = frozenset({"ProgressBar", "Profiler", "ResourceProfiler"})
"""Classes of `dask.diagnostics` that look at keys and times only."""


class CallbackFeed:
    """Calls callbacks in Dask's order: start, start_state, (pretask, posttask)*, finish.

    Tasks are reported when their strand has committed. A posttask callback gets the task's value,
    as with Dask; since executors drop values, every task's is requested then, and all are reported
    at the end, except for those of `dask.diagnostics`, which do not look at them and get None.

    As a context manager it finishes those callbacks that have started, whatever happens.

    Args:
        callbacks: the active ones, as Dask keeps them: tuples of five functions or None.
        dsk, keys: as given to `get`. A start callback may change the graph that it sees
            (`dask.cache.Cache` does); then the changed one is run.
        cache: values that stand for the graph's tasks; gets its constants, and the results.
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
        self._results: set[Hashable] = set(flatten_keys(keys))
        self._keys: Sequence[Hashable] = ()
        self._passing: set[Hashable] = set()
        """What Dask would run as a task, and a plan does not: aliases."""
        self._ran: list[tuple[Hashable, str]] = []
        """Tasks and who ran them, while their values are not here."""

    def begin(self) -> None:
        """Call the start and the start_state callbacks."""
        self._seen = dask_nodes(self._original, self._cache or {})
        before = dict(self._seen)
        for callback in self._callbacks:
            if callback[0]:
                callback[0](self._seen)
            self._started.append(callback)
        if self._seen.keys() != before.keys() or any(
            self._seen[key] is not node for key, node in before.items()
        ):
            self._is_changed = True
        place = dict(zip(self._seen, range(len(self._seen))))
        self._order: Callable[[Hashable], int] = place.__getitem__
        self._state = start_state_from_dask(
            self._seen, cache={}, keys=self._results, sortkey=self._order
        )
        if self._cache is not None:
            self._cache.update(self._state["cache"])
        for _, start_state, _, _, _ in self._callbacks:
            if start_state:
                start_state(self._seen, self._state)

    @property
    def graph(self) -> Any:
        """What to run: the given graph, with its annotations, or what callbacks made of it."""
        return self._seen if self._is_changed else self._original

    @property
    def keys(self) -> Any:
        """What to request."""
        return [self._wanted, self._needed] if self._needs_values else self._wanted

    @property
    def _needed(self) -> list[Hashable]:
        return [key for key in self._state["dependencies"] if key in self._seen]

    def bind(self, keys: Sequence[Hashable]) -> Callable[[Sequence[int], str], None]:
        """Tell the tasks of the plan, by id.

        Returns: what to call with tasks that are done, and the executor that ran them.
        """
        self._keys = keys
        self._passing = set(self._needed).difference(keys, self._state["cache"])
        self._done([key for key in self._state["ready"] if key in self._passing], "wukong")
        return lambda tasks, holder: self._done([keys[task] for task in tasks], holder)

    def finish(self, values: Any) -> Any:
        """Report tasks with their values, if that is what callbacks want.

        Returns: the values that the caller of `get` wants.
        """
        if self._needs_values:
            values, every = values
            known = dict(zip(self._needed, every, strict=True))
            for holder, tasks in groupby(self._ran, itemgetter(1)):
                self._report([key for key, _ in tasks], holder, known)
        if self._cache is not None:
            self._cache.update(_pairs(self._wanted, values))
        return values

    def _done(self, keys: Sequence[Hashable], holder: str) -> None:
        if self._needs_values:
            self._ran.extend([(key, holder) for key in keys])
        else:
            self._report(keys, holder, {})

    def _report(
        self, keys: Sequence[Hashable], holder: str, values: Mapping[Hashable, Any]
    ) -> None:
        """Report tasks, each after its inputs, and the aliases that can be resolved then."""
        state = self._state
        finished = state["finished"]
        left = [key for key in reversed(keys) if key not in finished]  # some may have run again
        batch = set(left)
        state["ready"][:] = [key for key in state["ready"] if key not in batch]
        while left:
            key = left.pop()
            state["running"].add(key)
            for pretask in self._pretask:
                pretask(key, self._seen, state)
            value = state["cache"][key] = values.get(key)
            finish_task(self._seen, key, state, self._results, self._order)
            for posttask in self._posttask:
                posttask(key, value, self._seen, state, holder)
            aliases = self._passing & state["dependents"][key]
            left.extend(alias for alias in aliases if alias not in state["waiting"])
        state["ready"][:] = [key for key in state["ready"] if key not in finished]

    def __enter__(self) -> CallbackFeed:
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


def _pairs(keys: Any, values: Any) -> Iterator[tuple[Hashable, Any]]:
    """Each key of lists in lists, with its value out of tuples in tuples."""
    if not isinstance(keys, list):
        yield keys, values
        return
    for key, value in zip(keys, values):
        yield from _pairs(key, value)
