"""The benchmarks measure what they say: graphs, rounds, ratios, files."""

import json
from collections.abc import Callable
from pathlib import Path

import dask
import pytest

from bench import micro, present
from bench.drawing import draw
from bench.measure import Case, Comparison, Timing, compare
from bench.present import Quantity, Target
from bench.sides import Side

FORMS = pytest.mark.parametrize("form", micro.FORMS)


@FORMS
def test_the_micro_graphs_have_the_sizes_they_are_named_after(form: micro.Form) -> None:
    found = {case.name: len(case.build("t")[0]) for case in micro.cases(form)}
    assert found == {
        "10,000 independent": 10_000,
        "tree of 8,191": 8_191,
        "chain of 2,000": 2_000,
        "fan 1-2,000-1": 2_002,
        "tree of 64 leaves": 127,
        "one warm call": 1,
    }


@pytest.mark.slow
@FORMS
def test_the_micro_graphs_give_what_they_should_by_dask_get(form: micro.Form) -> None:
    for case in micro.cases(form):
        case.check(dask.get(*case.build("t")))


@FORMS
def test_two_tags_share_no_key(form: micro.Form) -> None:
    for case in micro.cases(form)[2:]:
        assert not set(case.build("a")[0]) & set(case.build("b")[0])


def counted_side(name: str, calls: list[str], answer: object = 1) -> Side:
    def get(graph: object, keys: object) -> object:
        calls.append(name)
        return answer

    return Side(name, get)


def small_case(check: Callable[[object], None] = lambda result: None) -> Case:
    return Case("small", 1, lambda tag: ({tag: 1}, tag), check)


@pytest.mark.slow
def test_sides_take_turns_and_another_one_begins_each_round() -> None:
    calls: list[str] = []
    sides = [counted_side("a", calls), counted_side("b", calls)]
    comparison = compare(small_case(), sides, 2, lambda text: None)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert [len(timing.seconds) for timing in comparison.timings] == [2, 2]


def test_a_wrong_result_ends_the_comparison() -> None:
    def check(result: object) -> None:
        assert result == 1

    with pytest.raises(AssertionError):
        compare(small_case(check), [counted_side("a", [], answer=2)], 1, lambda text: None)


def test_a_side_without_graphs_is_left_out_where_it_has_no_way() -> None:
    sides = [counted_side("a", []), Side("pool", None)]
    comparison = compare(small_case(), sides, 1, lambda text: None)
    assert [timing.side for timing in comparison.timings] == ["a"]


COMPARISON = Comparison(
    "case",
    10,
    (Timing("a", (1.0, 2.0, 6.0)), Timing("b", (4.0, 4.0, 8.0)), Timing("c", (1.5, 1.5, 1.5))),
)


def test_a_ratio_is_of_medians_and_of_minima() -> None:
    ratio = COMPARISON.ratio("a", "b")
    assert ratio is not None
    assert (ratio.medians, ratio.minima) == (0.5, 0.25)


def test_the_best_of_two_sides_counts() -> None:
    ratio = COMPARISON.ratio("a|c", "b")
    assert ratio is not None
    assert (ratio.medians, ratio.minima) == (0.375, 0.25)


def test_there_is_no_ratio_to_a_side_that_did_not_take_part() -> None:
    assert COMPARISON.ratio("a", "d") is None


@pytest.mark.slow
def test_the_files_hold_every_measurement(tmp_path: Path) -> None:
    targets = [Target("ca*", "a", "b", 0.8, 0.4), Target("other", "a", "b", 1, 1)]
    quantity = Quantity("memory", (3.0, 1.0, 2.0), "MB", 120)
    path = tmp_path / "new" / "x.json"
    present.write_json(path, "x", [COMPARISON], targets, [quantity])
    draw(tmp_path / "x.png", "x", [COMPARISON])
    record = json.loads(path.read_text())
    assert record["comparisons"][0]["sides"]["a"]["seconds"] == [1.0, 2.0, 6.0]
    assert [ratio["medians"] for ratio in record["ratios"]] == [0.5]
    assert record["quantities"][0]["median"] == 2.0
    assert record["machine"]["cores"] >= 1
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
