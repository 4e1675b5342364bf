"""Splits: what is left of a part is divided, and nothing of it is lost or counted twice."""

from __future__ import annotations

from random import Random

import pytest

from wukong.executor.events import Edges
from wukong.executor.messages import AttemptId, ExportId, ExportSpec, Feed, Part, StrandId
from wukong.executor.ops import Running
from wukong.executor.split import FIRST_BYTES, Split, cut_rest, split_rest

FEED = Feed(StrandId("9"), 2)


def spec(export: str, *tasks: int) -> ExportSpec:
    return ExportSpec(ExportId(export), tasks, len(tasks), 2, True, (FEED,))


def split(
    rest: Edges,
    piece_of: list[int],
    *,
    exports: tuple[ExportSpec, ...] = (),
    recorded: dict[int, str] | None = None,
    inputs: tuple[str, ...] = (),
) -> Split:
    return split_rest(
        rest=rest,
        piece_of=piece_of,
        base=StrandId("7"),
        exports=exports,
        recorded={value: ExportId(export) for value, export in (recorded or {}).items()},
        inputs=[ExportId(export) for export in inputs],
        attempt=AttemptId("a"),
        n_deaths=2,
    )


# ------------------------------------------------------------------ cut_rest


def test_a_single_task_cannot_be_given_away() -> None:
    assert cut_rest(Edges((5,), ((),)), 4) == [0]


def test_independent_tasks_are_divided() -> None:
    rest = Edges(tuple(range(41)), ((),) * 41)
    pieces = cut_rest(rest, 2)
    assert pieces[0] == 0
    assert max(pieces) == 7
    assert all(pieces.count(piece) >= 5 for piece in range(8))


def test_a_chain_stays() -> None:
    rest = Edges(tuple(range(6)), ((), (0,), (1,), (2,), (3,), (4,)))
    assert cut_rest(rest, 1) == [0] * 6


def test_the_running_task_is_alone_when_others_wait_for_it() -> None:
    rest = Edges(tuple(range(9)), ((), *[(0,)] * 8))
    pieces = cut_rest(rest, 2)
    assert pieces.count(0) == 1


@pytest.mark.parametrize("seed", range(20))
def test_pieces_read_only_from_earlier_pieces(seed: int) -> None:
    rng = Random(seed)
    n = rng.randint(2, 40)
    reads = tuple(
        tuple(sorted({rng.randrange(t) for _ in range(2)})) if t else () for t in range(n)
    )
    pieces = cut_rest(Edges(tuple(range(n)), reads), rng.randint(2, 5))
    assert pieces[0] == 0
    for task, values in enumerate(reads):
        assert all(pieces[value] <= pieces[task] for value in values)


# ------------------------------------------------------------------ split_rest


def test_the_rest_becomes_pieces_of_the_same_base() -> None:
    made = split(Edges((3, 4, 5), ((), (3,), ())), [0, 0, 1])
    assert [spawn.strand for spawn in made.spawns] == ["a.s0", "a.s1"]
    assert [spawn.part.tasks for spawn in made.spawns] == [(3, 4), (5,)]
    assert {(spawn.base, spawn.n_deaths) for spawn in made.spawns} == {("7", 2)}
    assert [spawn.held_bytes for spawn in made.spawns] == [FIRST_BYTES, 0]


def test_done_values_that_pieces_read_are_recorded() -> None:
    made = split(Edges((3, 4), ((1, 2), (2,))), [0, 1])
    assert made.done_exports == (
        ExportSpec(ExportId("a.e0"), (1,), 1, 1, False, ()),
        ExportSpec(ExportId("a.e1"), (2,), 1, 2, False, ()),
    )
    assert [spawn.inputs for spawn in made.spawns] == [("a.e0", "a.e1"), ("a.e1",)]
    assert [spawn.n_missing for spawn in made.spawns] == [0, 0]


def test_a_piece_waits_for_what_another_one_makes() -> None:
    made = split(Edges((3, 4), ((), (3,))), [0, 1])
    first, second = made.spawns
    assert first.part.exports == (
        ExportSpec(ExportId("a.e0"), (3,), 1, 1, False, (Feed(StrandId("a.s1"), 0),)),
    )
    assert (second.part.inputs, second.inputs, second.n_missing) == (
        ((ExportId("a.e0"), (3,)),),
        ("a.e0",),
        1,
    )


def test_an_export_is_divided_among_those_that_make_it() -> None:
    whole = spec("o", 1, 3, 4, 5)
    made = split(Edges((3, 4, 5), ((), (), ())), [0, 1, 1], exports=(whole,))
    shares = [made.done_exports, *(spawn.part.exports for spawn in made.spawns)]
    assert shares == [
        (whole._replace(tasks=(1,)),),
        (whole._replace(tasks=(3,)),),
        (whole._replace(tasks=(4, 5)),),
    ]


def test_inputs_are_counted_by_the_pieces_that_read_them() -> None:
    rest = Edges((3, 4, 5), ((0,), (0, 1), (0,)))
    made = split(rest, [0, 1, 2], recorded={0: "i", 1: "k", 2: "l"}, inputs=("i", "k", "l"))
    assert (made.consumed, made.retained) == (("l",), (("i", 2),))
    assert [spawn.inputs for spawn in made.spawns] == [("i",), ("i", "k"), ("i",)]


@pytest.mark.parametrize(
    ("n_readers", "consumed", "retained"),
    [(0, ("i", "i"), ()), (1, ("i",), ()), (2, (), ()), (3, (), (("i", 1),))],
)
def test_an_input_that_an_absorbed_strand_reads_too_has_two_consumers(
    n_readers: int, consumed: tuple[str, ...], retained: tuple[tuple[str, int], ...]
) -> None:
    reads = tuple((0,) if i < n_readers else () for i in range(3))
    made = split(Edges((3, 4, 5), reads), [0, 1, 2], recorded={0: "i"}, inputs=("i", "i"))
    assert (made.consumed, made.retained) == (consumed, retained)


@pytest.mark.parametrize("seed", range(20))
def test_a_split_loses_nothing(seed: int) -> None:
    rng = Random(seed)
    n, n_done = rng.randint(4, 40), 3
    reads = [tuple(sorted({rng.randrange(t) for _ in range(2)})) if t else () for t in range(n)]
    rest = Edges(tuple(range(n_done, n)), tuple(reads[n_done:]))
    exports = (spec("o", *range(0, n, 2)), spec("p", n - 1 - (n % 2)))
    made = split(rest, cut_rest(rest, rng.randint(2, 5)), exports=exports)
    assert sorted(t for spawn in made.spawns for t in spawn.part.tasks) == list(rest.tasks)
    shares = [*made.done_exports, *(e for spawn in made.spawns for e in spawn.part.exports)]
    for whole in exports:
        values = [t for share in shares if share.export == whole.export for t in share.tasks]
        assert sorted(values) == list(whole.tasks)
    for spawn in made.spawns:
        readable = {v for _, values in spawn.part.inputs for v in values} | set(spawn.part.tasks)
        assert all(set(reads[task]) <= readable for task in spawn.part.tasks)
    for share in shares:
        if share.export.startswith("a."):
            n_readers = sum(share.export in spawn.inputs for spawn in made.spawns)
            assert share.n_consumers == n_readers


# ------------------------------------------------------------------ going on after a split


def test_what_a_task_that_was_given_away_reads_stays_until_it_is_put() -> None:
    # 1 is made here and read by 2, after which nobody read it, so that 3 dropped it.
    ops = [(0, int, (), ()), (1, int, (), ()), (2, int, (1,), ()), (3, int, (0,), (1,))]
    running = Running(Part((0, 1, 2, 3), (), ()), list(ops), iter(ops), 0.0)
    next(running.iterator)  # 0 runs
    assert running.interrupt()
    kept = Part((0, 1, 3), (), (spec("made", 1),))
    running.resume(kept, len(kept.tasks))
    assert list(running.iterator) == [(1, int, (), ()), (3, int, (0,), ())]


def test_what_a_task_that_was_given_away_dropped_is_dropped_by_another() -> None:
    ops = [(0, int, (), ()), (1, int, (0,), ()), (2, int, (), (0,)), (3, int, (), ())]
    running = Running(Part((0, 1, 2, 3), (), ()), list(ops), iter(ops), 0.0)
    next(running.iterator)
    assert running.interrupt()
    kept = Part((0, 1, 3), (), ())
    running.resume(kept, len(kept.tasks))
    assert list(running.iterator) == [(1, int, (0,), ()), (3, int, (), (0,))]
