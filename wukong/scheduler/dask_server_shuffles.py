"""Peer-to-peer shuffles (`method="p2p"`) as plain tasks, whose shards travel through the store.

In Dask, a transfer task hands its partition to its worker, which cuts it and sends the shards to
other workers; a barrier waits for all of them; an unpack task takes what has arrived. Here nothing
is kept between tasks, so the barrier is replaced:

    transfer i --> cut i --> shard i, j --> joined j --> unpack j

The graph's own transfer and unpack tasks stay, whatever they have been fused with. Instead of
Dask's plugin they find `Passing` with their worker: what is handed to it is the task's result, and
what is asked of it is the joined value that stands where the barrier was.

Cost: as many shards as there are pairs of an input and an output that overlap; for frames all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from dask._task_spec import Alias, GraphNode, Task, TaskRef
from distributed.shuffle._core import P2PBarrierTask
from distributed.shuffle._merge import merge_unpack
from distributed.shuffle._rechunk import (
    ArrayRechunkSpec,
    convert_chunk,
    rechunk_unpack,
    split_axes,
)
from distributed.shuffle._shuffle import shuffle_unpack

from wukong.scheduler.calls import Key

OUTPUT_ARGUMENT = {shuffle_unpack: 1, rechunk_unpack: 1, merge_unpack: 2}
"""Function -> which of its arguments says what it unpacks."""


class Sent(NamedTuple):
    """A partition on its way."""

    number: Any
    data: Any


class Passing:
    """What tasks of a shuffle find where Dask's workers have their plugin."""

    def add_partition(self, data: Any, partition_id: Any, id: str, **_how: object) -> Sent:
        """Hand a partition over."""
        return Sent(partition_id, data)

    def get_output_partition(
        self, id: str, arrived: Mapping[Any, Any], partition_id: Any, **_how: object
    ) -> Any:
        """Take an output out of what stands where the barrier was."""
        return arrived[partition_id]


def as_tasks(dsk: dict[Key, Any]) -> dict[Key, Any]:
    """A graph without barriers that does what this one does; itself if it has none."""
    barriers = {key: node for key, node in dsk.items() if isinstance(node, P2PBarrierTask)}
    if not barriers:
        return dsk
    made = dict(dsk)
    for barrier in barriers.values():
        made.update(_cut(barrier))
        del made[barrier.key]
    for key, node in dsk.items():
        joined: dict[Any, Any] = {}
        for name in barriers.keys() & node.dependencies:
            spec = barriers[name].spec
            unpacked = list(_unpacked(node, name))
            task = _join(barriers[name], unpacked or list(spec.output_partitions))
            made[task.key] = task
            joined[name] = task.key
        if joined:
            made[key] = node.substitute(joined)
    return made


def _cut(barrier: P2PBarrierTask) -> Iterator[tuple[Any, GraphNode]]:
    """Tasks that cut what is sent, and take single shards."""
    for i, (sent, wanted) in enumerate(_pairs(barrier)):
        cut: Any = ("p2p-cut", barrier.spec.id, i)
        yield cut, Task(cut, _cut_partition, barrier.spec, sent)
        for output in wanted:
            shard: Any = ("p2p-shard", barrier.spec.id, i, *_flat(output))
            yield shard, Task(shard, _take, TaskRef(cut), output)


def _join(barrier: P2PBarrierTask, outputs: Sequence[Any]) -> Task:
    """The task that joins the shards of some outputs."""
    spec = barrier.spec
    shards = [
        [
            TaskRef(("p2p-shard", spec.id, i, *_flat(output)))
            for i, (_, wanted) in enumerate(_pairs(barrier))
            if output in wanted
        ]
        for output in outputs
    ]
    key = ("p2p-joined", spec.id, *[n for output in outputs for n in _flat(output)])
    counts = [len(of_one) for of_one in shards]
    return Task(key, _join_shards, spec, outputs, counts, *[ref for one in shards for ref in one])


def _pairs(barrier: P2PBarrierTask) -> list[tuple[TaskRef, Any]]:
    """What is sent, in its order, and the outputs that have a shard of it."""
    sent = [TaskRef(one.target) for one in barrier.args if isinstance(one, Alias)]
    assert len(sent) == len(barrier.dependencies), barrier
    spec = barrier.spec
    if not isinstance(spec, ArrayRechunkSpec):
        everything = set(spec.output_partitions)
        return [(one, everything) for one in sent]
    axes = split_axes(spec.old, spec.new)
    assert len(sent) == math.prod(len(axis) for axis in axes), spec
    return [
        (one, set(product(*[[split.chunk_index for split in chunk] for chunk in place])))
        for one, place in zip(sent, product(*axes), strict=True)
    ]


def _unpacked(node: GraphNode, barrier: Key) -> Iterator[Any]:
    """The outputs that a task takes from behind a barrier, as far as that can be seen."""
    if not isinstance(node, Task) or barrier not in node.dependencies:
        return
    if node.func in OUTPUT_ARGUMENT:
        yield node.args[OUTPUT_ARGUMENT[node.func]]
    for argument in node.args:
        if isinstance(argument, dict):  # of a fused task
            for inner in argument.values():
                if isinstance(inner, GraphNode):
                    yield from _unpacked(inner, barrier)


def _flat(output: Any) -> tuple[int, ...]:
    """The number of an output, for keys."""
    return tuple(map(int, output)) if isinstance(output, tuple) else (int(output),)


# ------------------------------------------------------------------ in executors


def _cut_partition(spec: Any, sent: Sent) -> Mapping[Any, Any]:
    """The shards of a partition, by output."""
    data = sent.data
    if isinstance(spec, ArrayRechunkSpec):
        axes = split_axes(spec.old, spec.new)
        shards = {}
        for splits in product(*[axis[i] for axis, i in zip(axes, sent.number, strict=True)]):
            output, place, slices = zip(*splits, strict=True)
            shards[output] = (place, data[slices])
        return shards
    from dask.dataframe.dispatch import group_split_dispatch

    outputs = data[spec.column]
    rows = data.drop(columns=spec.column) if spec.drop_column else data
    groups: Mapping[int, Any] = group_split_dispatch(
        rows, outputs, spec.npartitions, ignore_index=False
    )
    return groups


def _take(shards: Mapping[Any, Any], output: Any) -> Any:
    return shards[output]


def _join_shards(spec: Any, outputs: Sequence[Any], counts: list[int], *shards: Any) -> Any:
    """Output -> its shards, joined."""
    arrived = {}
    begin = 0
    for output, count in zip(outputs, counts, strict=True):
        arrived[output] = _joined(spec, list(shards[begin : begin + count]))
        begin += count
    return arrived


def _joined(spec: Any, shards: list[Any]) -> Any:
    if isinstance(spec, ArrayRechunkSpec):
        return convert_chunk([shards])
    from dask.dataframe.dispatch import concat

    rows = [shard for shard in shards if len(shard)]
    if rows:
        return concat(rows)
    return spec.meta.drop(columns=spec.column) if spec.drop_column else spec.meta.copy()
