"""A task graph as plain data: what planning ends with, and cutting and submitting begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from wukong.scheduler.calls import Call, Key

Requested: TypeAlias = "int | tuple[Requested, ...]"
"""A slot, or the slots of a list of keys, nested as the keys were."""


@dataclass(slots=True)
class Plan:
    """A graph, culled to what the requested keys need and ready to be cut into strands.

    Constants and aliases are not tasks. Every task's inputs have smaller ids than the task. Task
    ids are `base`, `base + 1`, ...; smaller ones are of values that are computed elsewhere.
    """

    keys: list[Key]
    """Task id - base -> Dask's key (n)."""
    calls: list[Call]
    """Task id - base -> what to call (n)."""
    inputs_ptr: npt.NDArray[np.int64]
    """Task base + i reads the tasks `inputs[inputs_ptr[i]:inputs_ptr[i + 1]]` (n + 1)."""
    inputs: npt.NDArray[np.int32]
    """Task ids, each once for each reader, in the order of its arguments."""
    literals: list[object]
    """Constants, each object once; slot s < 0 is `literals[~s]`."""
    requested: Requested
    """Slots of the requested keys, in the shape of the request."""
    annotations: dict[int, dict[str, Any]]
    """Task id -> Dask's annotations (`retries`, `priority`, ...); annotated tasks only."""
    base: int = 0
    """The first task id; not 0 where the graph is a piece of something larger."""

    def resolve(self, values: Mapping[int, object]) -> Any:
        """The answer to the request, as `dask.get` shapes it: lists of keys become tuples.

        Args:
            values: task id -> result, for every requested task; literals are added here.
        """

        def value(slot: Requested) -> object:
            if isinstance(slot, tuple):
                return tuple([value(s) for s in slot])
            return values[slot] if slot >= 0 else self.literals[~slot]

        return value(self.requested)


def flatten_keys(keys: Any) -> list[Key]:
    """The requested keys, without the lists around them. A tuple is a key."""
    flat: list[Key] = []
    for key in keys if isinstance(keys, list) else [keys]:
        if isinstance(key, list):
            flat.extend(flatten_keys(key))
        else:
            flat.append(key)
    return flat


def flatten_slots(requested: Any) -> list[int]:
    """All slots of a nested request, in no particular order."""
    flat: list[int] = []
    stack = [requested]
    while stack:
        item = stack.pop()
        if isinstance(item, tuple):
            stack.extend(item)
        else:
            flat.append(item)
    return flat
