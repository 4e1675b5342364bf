"""A report's numbers, stories and drawings, from records made by hand."""

import json
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wukong import trace
from wukong.executor.messages import JobId, JobView, Status
from wukong.report import ClientCounts, Report
from wukong.report_columns import Spans, decode_tasks, function_codes, merge_short

BEGUN_AT = 1_000.0


def record(
    strand: str,
    holder: str,
    times: tuple[float, float, float, float],
    tasks: Sequence[int],
    ended_s: Sequence[float],
    **changes: object,
) -> trace.RunRecord:
    """A run; its four times are seconds after the job's begin."""
    begun_at, fetched_at, ran_at, sent_at = (BEGUN_AT + at for at in times)
    made = trace.RunRecord(
        strand=strand,
        token=f"job.0.{strand}",
        attempt=f"a{strand}",
        holder=holder,
        n_starts=1,
        n_deaths=0,
        cause="",
        is_invoked=True,
        begun_at=begun_at,
        fetched_at=fetched_at,
        ran_at=ran_at,
        sent_at=sent_at,
        bytes_read=100,
        bytes_written=50,
        blob_bytes_written=20,
        n_blobs_read=1,
        n_blobs_written=2,
        n_round_trips=3,
        copied_bytes=7,
        peak_memory_bytes=1_000,
        tasks=trace.int32(list(tasks)),
        ended_s=trace.float32(list(ended_s)),
        retried=(),
    )
    return made._replace(**changes)  # type: ignore[arg-type]  # any field


KEYS = [("add-0f", 0), ("add-0f", 1), "sum-1a", ("x<b>&mul-2b", 0), "lost-3c"]
RECORDS = [
    # Not in the order of time: the store keeps them in the order of the commits.
    record("1", "w10", (1.0, 1.25, 2.0, 2.25), [3], [0.75], peak_memory_bytes=5_000),
    record("0", "w2", (0.25, 0.5, 1.5, 1.75), [0, 1], [0.25, 1.0], retried=((1, 2),)),
    record(
        "2",
        "w10",
        (2.5, 2.5, 3.0, 3.5),
        [2],
        [0.5],
        token="a0.0",
        n_starts=2,
        n_deaths=1,
        cause="killed by SIGKILL",
        is_invoked=False,
    ),
]
CLIENT = ClientCounts(10, 1_000, 2_000, 500, 1)


def view(status: Status = Status.DONE, n_tasks: int = 5) -> JobView:
    return JobView(JobId("j<1>"), 9, status, None, n_tasks, 3, n_tasks - 1, 4, 5, 0, 0, 1, 1)


def made(
    traces: Sequence[object] | None = None,
    keys: Sequence[object] = KEYS,
    status: Status = Status.DONE,
    wall_s: float = 4.0,
) -> Report:
    packed = [trace.pack(each) for each in RECORDS] if traces is None else traces
    return Report(
        keys,
        packed,
        view(status, len(keys)),
        begun_at=BEGUN_AT,
        wall_s=wall_s,
        client=CLIENT,
    )


COUNTERS = {
    "job": "j<1>",
    "status": "done",
    "tasks": 5,
    "strands": 3,
    "executors": 2,
    "invocations": 2,
    "commits": 4,
    "round_trips": 19,
    "bytes_read": 1_300,
    "bytes_written": 2_150,
    "blob_bytes_written": 560,
    "blobs_read": 3,
    "blobs_written": 6,
    "copied_bytes": 22,
    "peak_memory_bytes": 5_000,
    "user_s": 2.25,
    "wall_s": 4.0,
    "retries": 3,
    "deaths": 1,
}


def test_counters_are_the_exact_sums_of_records_and_client() -> None:
    assert made().to_dict() == COUNTERS
    assert json.loads(json.dumps(made().to_dict())) == COUNTERS


def test_records_that_were_never_packed_give_the_same_report() -> None:
    assert made(RECORDS).to_dict() == made().to_dict()
    assert made(RECORDS).story("sum-1a") == made().story("sum-1a")


def test_a_job_without_records_is_all_zeros() -> None:
    report = made([], status=Status.FAILED)
    assert (report.user_s, report.peak_memory_bytes, report.executors) == (0.0, 0, 0)
    assert report.status == "failed"
    assert "(failed)" in str(report)
    assert "<svg" in report._repr_html_()


def test_the_text_is_a_compact_table() -> None:
    assert str(made()).splitlines() == [
        "5 tasks in 4.00 s: 3 strands, 2 executors, 2.25 s in user code",
        "  invocations         2   read                   1.3 kB",
        "  commits             4   written                2.1 kB",
        "  round trips        19   written to blobs        560 B",
        "  retries             3   copied                   22 B",
        "  deaths              1   peak of an executor    5.0 kB",
    ]
    assert repr(made()) == str(made())


def test_nothing_is_unpacked_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[object] = []
    decoded: list[object] = []
    monkeypatch.setattr("wukong.report.read", lambda t: (unpacked.append(t), trace.read(t))[1])
    monkeypatch.setattr(
        "wukong.report.decode_tasks", lambda *a: (decoded.append(a), decode_tasks(*a))[1]
    )
    report = made()
    assert (report.tasks, report.commits, report.deaths, report.wall_s) == (5, 4, 1, 4.0)
    assert (len(unpacked), len(decoded)) == (0, 0)
    assert report.bytes_read == 1_300
    str(report)
    assert (len(unpacked), len(decoded)) == (3, 0)
    report.story("sum-1a")
    report.story("sum-1a")
    assert (len(unpacked), len(decoded)) == (3, 1)


def test_making_a_report_takes_no_time() -> None:
    packed = [trace.pack(RECORDS[1])] * 20
    took_s = []
    for _ in range(50):
        begun_s = time.perf_counter()
        made(packed)
        took_s.append(time.perf_counter() - begun_s)
    assert min(took_s) < 50e-6


def test_a_story_tells_where_and_when_a_task_ran() -> None:
    assert made().story(("add-0f", 1)).splitlines() == [
        "('add-0f', 1): task id 1 of a job of 5 tasks",
        "  where     strand 0, token job.0.0, executor w2",
        "  ran       0.750000 s to 1.500000 s (750 ms), number 2 of 2",
        "  attempts  start 1 of its token; the task raised and was run again 2 times",
        "  begun     0.250000 s, invoked 250 ms after the job's begin",
        "  fetch     250 ms: 100 B, 1 blob",
        "  run       1.00 s: 2 tasks",
        "  put       250 ms: 50 B, 2 blobs; committed at 1.750000 s",
        "  before    ('add-0f', 0) in this run; nothing on this executor",
        "  after     nothing in this run; nothing on this executor",
    ]


def test_a_story_tells_of_deaths_and_of_the_run_before() -> None:
    lines = made().story("sum-1a").splitlines()
    assert lines[3:5] == [
        "  attempts  start 2 of its token; 1 attempt with these tasks died before"
        " (the last one: killed by SIGKILL)",
        "  begun     2.500000 s, become by its executor 750 ms after strand 0 committed on w2",
    ]
    assert lines[-2:] == [
        "  before    nothing in this run; strand 1 on this executor",
        "  after     nothing in this run; nothing on this executor",
    ]


def test_the_story_of_a_task_that_never_ended_says_so() -> None:
    story = made(status=Status.FAILED).story("lost-3c")
    assert story == (
        "'lost-3c': task id 4 of a job of 5 tasks\n"
        "  no committed run; the job is failed, 4 tasks done; deaths: 1, retries: 3"
    )


def test_a_task_of_two_generations_has_both_runs_in_its_story() -> None:
    again = record("0", "w2", (5, 5, 6, 6), [0, 1], [0.5, 1.0], token="again")
    story = made([*RECORDS, again]).story(("add-0f", 0))
    assert "committed 2 times" in story
    assert re.findall(r"token ([\w.]+),", story) == ["job.0.0", "again"]


@pytest.mark.parametrize(
    ("key", "similar"),
    [
        (("add-0f", 7), "similar: ('add-0f', 1), ('add-0f', 0)"),
        ("sum-1b", "similar: 'sum-1a'"),
        ("sun", "similar: 'sum-1a'"),
    ],
    ids=["index", "hash", "function"],
)
def test_an_unknown_key_names_similar_ones(key: object, similar: str) -> None:
    with pytest.raises(KeyError) as caught:
        made().story(key)
    assert caught.value.args[0] == f"no task of this job has the key {key!r}; {similar}"


def test_an_unknown_key_without_likeness_is_just_named() -> None:
    with pytest.raises(KeyError, match="no task of this job has the key 99"):
        made().story(99)


# ------------------------------------------------------------------ columns


def test_tasks_begin_where_their_predecessors_end() -> None:
    columns = decode_tasks(
        [RECORDS[1], RECORDS[0]._replace(tasks=b"", ended_s=b""), RECORDS[2]], BEGUN_AT
    )
    assert columns.task.tolist() == [0, 1, 2]
    assert columns.run.tolist() == [0, 0, 2]
    assert columns.begin_s.tolist() == [0.5, 0.75, 2.5]
    assert columns.end_s.tolist() == [0.75, 1.5, 3.0]


def test_no_task_ends_after_its_run_for_rounding() -> None:
    run = record("0", "w", (0.0, 0.0, 0.1, 0.2), [0], [0.1])  # 0.1 is larger as a float32
    assert decode_tasks([run], BEGUN_AT).end_s.tolist() == [run.ran_at - run.fetched_at]


def test_functions_are_the_prefixes_of_keys() -> None:
    names, codes = function_codes(KEYS)
    assert names == ["add", "sum", "x<b>&mul", "lost"]
    assert codes.tolist() == [0, 0, 1, 2, 3]


def spans_of(rows: list[tuple[int, float, float, int, int]]) -> Spans:
    columns = np.array(rows, np.float64).reshape(-1, 5).T
    row, code, n_tasks = (columns[i].astype(np.int64) for i in (0, 3, 4))
    return Spans(row, columns[1], columns[2], code, n_tasks)


def rows_of(spans: Spans) -> list[tuple[float, ...]]:
    columns = (spans.row, spans.begin_s, spans.end_s, spans.code, spans.n_tasks)
    return list(zip(*(column.tolist() for column in columns)))


def test_short_spans_are_merged_and_long_ones_stay() -> None:
    spans = spans_of(
        [
            (1, 0.0, 0.25, 0, 1),
            (0, 0.5, 0.75, 5, 1),
            (0, 0.0, 0.25, 5, 1),
            (0, 0.25, 0.5, 5, 0),
            (0, 0.75, 0.875, 7, 1),
            (0, 1.0, 3.0, 5, 1),
            (0, 3.0, 3.25, 7, 1),
        ]
    )
    assert rows_of(merge_short(spans, 1.0)) == [
        (0, 0.0, 0.875, 5, 3),
        (0, 1.0, 3.0, 5, 1),
        (0, 3.0, 3.25, 7, 1),
        (1, 0.0, 0.25, 0, 1),
    ]
    assert rows_of(merge_short(spans, 1e-3)) == sorted(rows_of(spans))
    assert rows_of(merge_short(spans_of([]), 1.0)) == []


# ------------------------------------------------------------------ Chrome trace


def events_of(report: Report, path: Path) -> list[dict[str, Any]]:
    report.to_chrome_trace(path)
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def test_a_chrome_trace_has_a_row_for_each_executor(tmp_path: Path) -> None:
    events = events_of(made(), tmp_path / "trace.json")
    names = {e["tid"]: e["args"] for e in events if e["name"] == "thread_name"}
    assert names == {0: {"name": "w2"}, 1: {"name": "w10"}}
    slices = [(e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices[:6] == [
        (0, "strand 0", 250_000, 1_500_000),
        (0, "fetch", 250_000, 250_000),
        (0, "run", 500_000, 1_000_000),
        (0, "put and commit", 1_500_000, 250_000),
        (0, "('add-0f', 0)", 500_000, 250_000),
        (0, "('add-0f', 1)", 750_000, 750_000),
    ]
    assert len(slices) == 3 * 4 + 4
    first = next(e for e in events if e["name"] == "strand 0")
    assert first["args"] == {
        "token": "job.0.0",
        "attempt": "a0",
        "start": 1,
        "deaths": 0,
        "cause of death": "",
        "invoked": True,
        "tasks": 2,
        "round trips": 3,
        "copied bytes": 7,
        "peak memory bytes": 1_000,
    }


def test_a_chrome_trace_leads_from_a_commit_to_what_it_minted(tmp_path: Path) -> None:
    events = events_of(made(), tmp_path / "trace.json")
    arrows = [(e["ph"], e["id"], e["tid"], e["ts"]) for e in events if e["name"] == "mint"]
    assert arrows == [("s", 2, 0, 1_500_000), ("f", 2, 1, 2_500_000)]


def test_a_chrome_trace_has_no_negative_time(tmp_path: Path) -> None:
    early = record("0", "w", (-2.0, -1.0, 1.0, 1.5), [0], [2.0])
    events = events_of(made([early]), tmp_path / "trace.json")
    begins = {e["name"]: e["ts"] for e in events if e["ph"] == "X"}
    assert begins["strand 0"] == 0
    assert begins["run"] == begins["('add-0f', 0)"] == 1_000_000


def test_a_chrome_trace_of_no_records_is_valid(tmp_path: Path) -> None:
    assert [e["name"] for e in events_of(made([]), tmp_path / "t.json")] == ["process_name"]


def large(n_tasks: int, n_runs: int) -> Report:
    """A job of tasks of 1 us on two executors."""
    size = n_tasks // n_runs
    ended_s = np.arange(1, size + 1) * 1e-6
    traces = []
    for run in range(n_runs):
        begin_s = run // 2 * (size * 1e-6 + 2e-3)
        fetched_s = begin_s + 1e-3
        tasks = range(run * size, (run + 1) * size)
        times = (begin_s, fetched_s, fetched_s + size * 1e-6, fetched_s + size * 1e-6 + 1e-3)
        traces.append(trace.pack(record(str(run), f"w{run % 2}", times, tasks, ended_s.tolist())))
    return made(traces, [(f"f{i % 20}-0a", i) for i in range(n_tasks)], wall_s=0.2)


def tasks_inside_their_runs(events: list[dict[str, Any]]) -> int:
    """How many tasks the slices stand for; each must lie in the last "run" slice before it."""
    low = high = 0.0
    n_tasks = 0
    for event in events:
        if event["ph"] != "X":
            continue
        begin, end = event["ts"], event["ts"] + event["dur"]
        if event["name"] == "run":
            low, high = begin, end
        elif "task" in event["args"] or "longest" in event["args"]:
            # Times are rounded to nanoseconds.
            assert low - 2e-3 <= begin
            assert end <= high + 2e-3
            n_tasks += event["args"].get("tasks", 1)
    return n_tasks


@pytest.mark.slow
def test_a_large_job_gives_small_drawings_that_count_every_task(tmp_path: Path) -> None:
    report = large(200_000, 16)
    events = events_of(report, tmp_path / "trace.json")
    assert len(events) < 45_000
    assert tasks_inside_their_runs(events) == 200_000
    assert len(report._repr_html_()) < 500_000
    report.timeline(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 500_000


# ------------------------------------------------------------------ HTML


def test_html_is_well_formed_escaped_and_self_contained() -> None:
    html = made()._repr_html_()
    ElementTree.fromstring(html)
    assert "<b>&mul" not in html
    assert "x&lt;b&gt;&amp;mul: 1 task" in html
    assert "19</td>" in html
    assert set(re.findall(r"(?:href|src|url)\W+([^'\")\s]+)", html)) == {
        "wukong-fetch",
        "wukong-put",
    }
    assert set(re.findall(r"https?://[^'\"]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "<script" not in html


def test_a_hostile_executor_name_is_escaped() -> None:
    evil = record("0", "</text><script>", (0.0, 0.0, 1.0, 1.0), [0], [1.0])
    html = made([evil])._repr_html_()
    assert "<script" not in html
    ElementTree.fromstring(html)


def test_the_html_shows_all_phases_and_restarts() -> None:
    html = made()._repr_html_()
    titles = re.findall(r"<title>([^<:]+)", html)
    assert sorted(titles) == sorted(
        ["add", "add", "sum", "x&lt;b&gt;&amp;mul", "begun again"]
        + ["fetch"] * 2
        + ["put and commit"] * 3
    )


# ------------------------------------------------------------------ PNG


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(imread(path)[:, :, :3] * 255).astype(int)


@pytest.mark.slow
def test_a_timeline_is_a_png_with_each_function_in_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    made().timeline(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = pixels(path)
    assert picture.shape[0] > 300
    assert picture.shape[1] == 1950
    for colour in ("#4477aa", "#ee6677", "#228833", "#cc0000"):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == wanted).all(axis=2).sum() > 20, colour


@pytest.mark.slow
def test_a_timeline_of_no_records_is_an_empty_axis(tmp_path: Path) -> None:
    made([]).timeline(str(tmp_path / "empty.png"))
    assert len(np.unique(pixels(tmp_path / "empty.png"))) > 2


@pytest.mark.slow
def test_a_timeline_of_many_executors_shows_the_busiest(tmp_path: Path) -> None:
    records = [
        record(str(i), f"w{i}", (0.0, 0.0, 1.0 + i, 1.0 + i), [0], [1.0 + i]) for i in range(200)
    ]
    report = made(records)
    assert "the 24 busiest of 200 executors" in report._repr_html_()
    assert ">w199<" in report._repr_html_()
    assert ">w0<" not in report._repr_html_()
    report.timeline(tmp_path / "many.png")
    assert pixels(tmp_path / "many.png").shape[0] == 1800


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'wukong\[demo\]'"):
        made().timeline(tmp_path / "never.png")
    assert not (tmp_path / "never.png").exists()
