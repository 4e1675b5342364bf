"""The tasks of one strand <-> buffers: the wire form of a piece of the plan.

A strand's tasks go in columns: ids, functions, counts of slots and slots as raw integers; each
function and each literal goes once, in one pickle for the strand. So a task that shares its
function with others costs 20 bytes and no pickling of its own.

A nested call is a row of its own behind the tasks; the slot that holds it is `_NESTED - row`.
"""

from __future__ import annotations

import contextlib
import pickle
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, TypeVar, cast

from wukong.errors import SerializationError
from wukong.executor.messages import Part
from wukong.executor.scene import Place, Scene
from wukong.executor.serialize import Buffer, Codec, Encoded, is_plain, pickle_value

if TYPE_CHECKING:
    from wukong.scheduler.calls import Call

T = TypeVar("T")

ONCE = -1
"""In place of a number of retries: never to be run again, not even after its executor died."""
# In the flat column of slots: -1 ... are literals, _NESTED - row a nested call.
_NESTED = -(1 << 30)


@dataclass(frozen=True, slots=True)
class Program:
    """A static strand, ready to run."""

    part: Part
    """What it runs, reads and writes; pieces of a split strand have parts of their own."""
    calls: list[Call]
    """One for each of the part's tasks, with the plan's own slots."""
    literals: dict[int, object]
    """The constants that the calls read, under their (negative) slots."""
    retries: dict[int, int]
    """Task -> how often it may be run again when it raises, or `ONCE`; others are left out."""
    fail_fast: bool
    """The first exception ends the job."""
    context: Context | None = None
    """The client's context variables, where tasks run in its own process; never sent."""
    scene: Scene | None = None
    """What surrounds the tasks while they run."""

    def play(self, loop_over_tasks: Callable[[], T], place: Place) -> T:
        """Call `loop_over_tasks` in the client's context and in the scene."""
        if self.scene is not None:
            loop_over_tasks = partial(self.scene.play, loop_over_tasks, place)
        # A copy of the context for each run: one is entered by one thread at a time.
        return (
            loop_over_tasks() if self.context is None else self.context.copy().run(loop_over_tasks)
        )


NO_PROGRAM = Program(Part((), (), ()), [], {}, {}, fail_fast=False)
"""Of no strand."""


def encode_program(codec: Codec, context: bytes, program: Program) -> Encoded:
    """Encode a strand, its tasks in columns; each function and literal goes once.

    Raises:
        SerializationError: a function or a literal cannot be pickled; `task` says of which task.
    Cost: about 1 us a task that shares its function and has plain literals.
    """
    literals = program.literals
    rows, slots = _rows(program.calls)
    # A function is told by its identity: equality may be anything, and need not hash.
    heads: list[object] = [id(row[0]) for row in rows]
    kwnames = [row[2] for row in rows]
    if any(kwnames):
        heads = list(zip(heads, kwnames))
    distinct = dict(zip(heads, rows))
    number = {head: n for n, head in enumerate(distinct)}
    head = program.part, program.retries, program.fail_fast
    payload = (
        # Unpickled before what follows, which may look for what the scene brings.
        program.scene,
        array("i", [number[head] for head in heads]).tobytes(),
        array("i", [len(row[1]) for row in rows]).tobytes(),
        slots.tobytes(),
        [(row[0], row[2]) for row in distinct.values()],
        array("i", literals).tobytes(),
        list(literals.values()),
    )
    try:
        # The lead can be read when the rest cannot be unpickled.
        lead = codec.seal(pickle.dumps(head, 5), context)
        return codec.encode(payload, context, is_plain=is_plain(payload[-1]), lead=lead)
    except SerializationError as error:
        found = _first_unpicklable(program)
        raise (found or error) from error.__cause__


def _rows(calls: Sequence[Call]) -> tuple[list[Call], array[int]]:
    """Return the calls with nested ones behind them as rows of their own, and all their slots."""
    rows = list(calls)
    with contextlib.suppress(TypeError):  # what array raises for a nested call
        unnested = cast("list[tuple[int, ...]]", [row[1] for row in rows])
        return rows, array("i", chain.from_iterable(unnested))
    flat = []
    for row in rows:  # grows while it is walked
        for slot in row[1]:
            if isinstance(slot, tuple):
                flat.append(_NESTED - len(rows))
                rows.append(slot)
            else:
                flat.append(slot)
    return rows, array("i", flat)


def _first_unpicklable(program: Program) -> SerializationError | None:
    """Find the first task that cannot be sent; None when only the whole cannot."""
    sent: set[int] = set()
    for task, call in zip(program.part.tasks, program.calls):
        rows, slots = _rows([call])
        parts: list[object] = [row[0] for row in rows]
        parts += [program.literals.get(s) for s in slots if _NESTED < s < 0]
        for part in parts:
            if id(part) in sent:
                continue
            sent.add(id(part))
            try:
                pickle_value(part)
            except SerializationError as error:
                return SerializationError(str(error), task)
    return None


def decode_program(codec: Codec, context: bytes, buffer: Buffer) -> Program:
    """Decode what `encode_program` made; large literals view `buffer`.

    Raises: as `Codec.decode`.
    Cost: under 1.5 us a task.
    """
    lead, load = codec.decode_led(buffer, context)
    part, retries, fail_fast = pickle.loads(lead)
    scene, *columns, heads, used, values = load()
    codes, counts, slots = (array("i", column) for column in columns)
    flat = iter(slots)
    named = map(heads.__getitem__, codes)
    n_same = counts[0] if counts and counts.count(counts[0]) == len(counts) else 0
    if n_same:
        arguments: Iterable[tuple[int, ...]] = zip(*[flat] * n_same)
    else:
        arguments = [tuple(islice(flat, count)) for count in counts]
    calls: list[Call] = [(func, row, names) for (func, names), row in zip(named, arguments)]
    if len(calls) > len(part.tasks):
        owners = [i for i, count in enumerate(counts) for _ in range(count)]
        _nest(calls, {owner for owner, slot in zip(owners, slots) if slot <= _NESTED})
        del calls[len(part.tasks) :]
    literals = dict(zip(array("i", used), values))
    return Program(part, calls, literals, retries, fail_fast, scene=scene)


def decode_part(codec: Codec, context: bytes, buffer: Buffer) -> Part:
    """The part of a program, whose functions and literals need not be readable.

    Raises:
        SecurityError, CorruptBlob: as `Codec.decode`.
    """
    part: Part = pickle.loads(codec.decode_led(buffer, context)[0])[0]
    return part


def _nest(calls: list[Call], owners: set[int]) -> None:
    """Put the nested calls into the rows that hold them, in place."""
    # From the end: a nested call stands behind the one that holds it.
    for owner in sorted(owners, reverse=True):
        func, row, kwnames = calls[owner]
        slots = cast("tuple[int, ...]", row)
        calls[owner] = (
            func,
            tuple([s if s > _NESTED else calls[_NESTED - s] for s in slots]),
            kwnames,
        )
