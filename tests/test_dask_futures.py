"""The table of keys behind a Dask client, and how a sent graph is read."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from operator import add, neg

import pytest
from dask._expr import LLGExpr
from dask._task_spec import Task, TaskRef

pytest.importorskip("distributed")

from wukong.scheduler.dask_server_clients import is_supported, requirement
from wukong.scheduler.dask_server_futures import (
    DONE,
    FAILED,
    Futures,
    Holder,
    as_failure,
    failed_inputs,
    with_readers,
)
from wukong.scheduler.dask_server_graphs import cut_known, read_graph


@dataclass
class Told:
    values: list[int]
    errors: dict[int, object] = field(default_factory=dict)
    size_bytes: int = 8


def graph(**tasks: Task) -> LLGExpr:
    return LLGExpr(tasks)


def test_an_entry_lives_while_somebody_holds_it() -> None:
    futures, one, other = Futures(), Holder("one"), Holder("other")
    entry = futures.add("x", 7)
    futures.hold(entry, one)
    futures.hold(entry, other)
    futures.hold(entry, one)
    assert entry.holders == (one, other)
    assert not futures.let_go(entry, one)
    assert futures.let_go(entry, other)
    assert not one.entries
    assert not other.entries


def test_news_reach_every_name_of_a_value() -> None:
    futures = Futures()
    x, y = futures.add("x", 7), futures.add("y", 7)
    unknown: list[int] = []
    assert futures.finish(Told([7, 9]), unknown) == [x, y]
    assert unknown == [9]
    assert (x.state, y.state) == (DONE, DONE)
    late = futures.add("z", 7)
    assert late.state == DONE
    futures.forget(x)
    futures.forget(x)
    assert futures.finish(Told([7]), unknown) == [y, late]


def test_readers_come_before_what_they_read_when_it_is_cancelled() -> None:
    futures = Futures()
    x, y, z = futures.add("x", 1), futures.add("y", 2), futures.add("z", 3)
    futures.link(y, [x])
    futures.link(z, [x, y])
    assert with_readers([x]) == [z, y, x]
    futures.forget(z)
    assert with_readers([x]) == [y, x]


def test_a_retry_takes_the_failed_inputs_along() -> None:
    futures = Futures()
    x, y, z = futures.add("x", 1), futures.add("y", 2), futures.add("z", 3)
    futures.link(y, [x, z])
    error = ValueError("no")
    futures.finish(Told([1, 2], {1: error, 2: error}), [])
    assert failed_inputs([y]) == [y, x]
    assert (x.state, z.state) == (FAILED, "processing")


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.handle = open(__file__, encoding="utf-8")  # noqa: SIM115  # its state is the point
        self.handle.close()

    def __reduce__(self) -> str:
        raise TypeError("cannot pickle this")


def test_an_error_that_cannot_be_pickled_is_told_by_type_and_text() -> None:
    class Local(Unpicklable):
        pass

    for kind in (Unpicklable, Local):
        error = pickle.loads(as_failure(kind("what happened")).pickled)
        assert "what happened" in str(error)
        assert type(error) is kind or kind.__name__ in str(error)


def test_what_is_known_is_an_input_and_not_computed_again() -> None:
    futures = Futures()
    x = futures.add("x", 1)
    sent = read_graph(graph(x=Task("x", neg, 1), y=Task("y", add, TaskRef("x"), 1)))
    piece = cut_known(sent, ["y", "x"], futures.entries, {})
    assert piece.keys == ["y"]
    assert piece.known == {"x": x}
    assert piece.inputs == {"y": ("x",)}


def test_edges_lead_to_the_nearest_requested_or_known_key() -> None:
    futures = Futures()
    a = futures.add("a", 1)
    sent = read_graph(
        graph(
            b=Task("b", neg, TaskRef("a")),
            c=Task("c", neg, TaskRef("b")),
            d=Task("d", neg, TaskRef("c")),
            e=Task("e", neg, 1),
        )
    )
    piece = cut_known(sent, ["c", "d", "e"], futures.entries, {})
    assert piece.known == {"a": a}
    assert piece.inputs == {"c": ("a",), "d": ("c",)}


def test_a_cycle_in_a_sent_graph_ends_the_search() -> None:
    sent = read_graph(graph(b=Task("b", neg, TaskRef("c")), c=Task("c", neg, TaskRef("b"))))
    assert cut_known(sent, ["b", "c"], {}, {}).keys == ["b", "c"]


def test_common_annotations_yield_to_a_graph_s_own() -> None:
    sent = read_graph(graph(x=Task("x", neg, 1)))
    sent.annotations["retries"] = {"x": 3}
    piece = cut_known(sent, ["x"], {}, {"retries": 1, "priority": lambda key: len(key)})
    assert piece.annotations == {"retries": {"x": 3}, "priority": {"x": 1}}
    assert piece.priority == 0


@pytest.mark.parametrize(
    ("version", "is_in"),
    [
        ("2025.12.0", False),
        ("2026.1.2", True),
        ("2026.8.3", True),
        ("2026.8.0+3.g1234", True),
        ("2026.9.0", False),
        ("unknown", False),
    ],
)
def test_a_version_out_of_range_is_refused(version: str, is_in: bool) -> None:
    assert is_supported(version) is is_in
    assert requirement() == "distributed>=2026.1.2,<2026.9"
