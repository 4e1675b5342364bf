"""The transitions themselves: limits, policies and assertions that no store can change.

What each operation does in each state of a token is in `storage_contract`, for all stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

import pytest

from wukong.executor.messages import (
    Commit,
    Create,
    Entry,
    Feed,
    Grant,
    Invocation,
    Output,
    Part,
    Receipt,
    Refused,
    Relaunch,
    Spawn,
    Status,
)
from wukong.storage import oversight, state
from wukong.storage.rows import (
    EXPORTS,
    JOB,
    PROGRAMS,
    RECEIPTS,
    TABLES,
    THE_JOB,
    TOKENS,
    WAITING,
    JobRow,
    Table,
    TokenRow,
)

R = TypeVar("R")
SILENCE_S = 10.0


class DictRows:
    """Rows in a dictionary, in the order of their keys."""

    def __init__(self) -> None:
        self.job = "job"
        self.rows: dict[tuple[str, str], object] = {}

    def get(self, table: Table[R], key: str) -> R | None:
        return cast("R | None", self.rows.get((table.code, key)))

    def put(self, table: Table[R], key: str, row: R) -> None:
        self.rows[table.code, key] = row

    def delete(self, table: Table[R], key: str) -> None:
        self.rows.pop((table.code, key), None)

    def scan(self, table: Table[R]) -> Iterator[tuple[str, R]]:
        found = [(key, row) for (code, key), row in sorted(self.rows.items()) if code == table.code]
        return cast("Iterator[tuple[str, R]]", iter(found))

    def ids(self, table: Table[R]) -> list[str]:
        return [key for key, _ in self.scan(table)]


def output(export: str, *tasks: int, n_consumers: int = 1, blob: str | None = None) -> Output:
    payload = None if blob else b"value"
    return Output(export, (Entry(tasks, blob, payload, 5, 0),), len(tasks), n_consumers, False, ())


def begun(n_entries: int = 1, sources: tuple[Output, ...] = (), n_requested: int = 1) -> DictRows:
    rows = DictRows()
    strands = tuple(str(i) for i in range(n_entries))
    programs = tuple((strand, Entry((), None, b"program", 7, 0)) for strand in strands)
    request = Create(
        *("job", strands, ((),) * n_entries, programs, sources, n_requested, 9, n_entries, True)
    )
    state.create(rows, request, SILENCE_S, now=0.0)
    return rows


def commit(token: str, attempt: str, **rest: object) -> Commit:
    return Commit("job", token, attempt, "h", **rest)  # type: ignore[arg-type]


def job_of(rows: DictRows) -> JobRow:
    job = rows.get(JOB, THE_JOB)
    assert job is not None
    return job


# ------------------------------------------------------------------ policies


@pytest.mark.parametrize(
    ("status", "lost", "version", "progress", "news"),
    [
        (Status.RUNNING, (), 4, False, False),
        (Status.RUNNING, (), 4, True, True),
        (Status.RUNNING, (), 5, True, False),
        (Status.RUNNING, ("e",), 4, False, True),
        (Status.RUNNING, ("e",), 5, False, False),
        (Status.DONE, (), 5, False, True),
        (Status.FAILED, (), 9, True, True),
        (Status.CANCELLED, (), 4, False, True),
    ],
)
def test_news_are_ends_losses_and_where_asked_for_commits(
    status: Status, lost: tuple[str, ...], version: int, progress: bool, news: bool
) -> None:
    job = JobRow(status, 1, 9, 9, True, 0, SILENCE_S, 0.0, version=5, lost=lost)
    assert oversight.is_news(job, version, progress) is news


def test_a_token_that_was_queued_for_days_still_expires() -> None:
    rows = begun()
    row = rows.get(TOKENS, "job.0.0")
    assert row is not None
    row.n_invokes = 5000
    assert oversight.expired(rows, now=59.9) == ()
    assert oversight.expired(rows, now=60.0) == (Invocation("job", "job.0.0"),)


def test_silent_tokens_come_first_whatever_their_name() -> None:
    rows = begun(n_entries=3)
    state.start(rows, "job.0.2", "a", "h", now=0.0)
    for now in (1.0, 2.0):
        state.start(rows, f"job.0.{int(now) - 1}", "b", "h", now)
    found = oversight.expired(rows, now=20.0)
    assert [i.token for i in found] == ["job.0.2", "job.0.0", "job.0.1"]


def test_commits_look_for_expired_tokens_twice_in_a_silence() -> None:
    rows = begun(n_entries=9)
    found = []
    for i, now in enumerate((9.9, 10.0, 14.9, 15.0)):
        receipt = state.commit(rows, commit(f"job.0.{i}", f"a{i}"), now)
        assert isinstance(receipt, Receipt)
        found.append(len(receipt.invoke))
    assert found == [0, 4, 0, 3]


def test_a_receipt_names_a_bounded_part_of_the_garbage() -> None:
    rows = begun(n_entries=2)
    unread = tuple(output(f"e{i}", i, n_consumers=0, blob=f"job/a/{i}") for i in range(100))
    first = state.commit(rows, commit("job.0.0", "a", outputs=unread), now=1.0)
    assert isinstance(first, Receipt)
    assert first.garbage == tuple(f"job/a/{i}" for i in range(64))
    second = state.commit(rows, commit("job.0.1", "b", collected=first.garbage), now=2.0)
    assert isinstance(second, Receipt)
    assert second.garbage == tuple(f"job/a/{i}" for i in range(64, 100))


def test_the_first_cause_of_a_silent_token_is_kept() -> None:
    rows = begun()
    state.start(rows, "job.0.0", "a", "h", now=0.0)
    oversight.release(rows, "h", "killed by signal 9", now=1.0)
    state.start(rows, "job.0.0", "b", "h", now=1.0)
    grant = state.start(rows, "job.0.0", "c", "h2", now=11.0)
    assert isinstance(grant, Grant)
    assert (grant.cause, grant.n_deaths, grant.n_starts) == ("killed by signal 9", 2, 3)


# ------------------------------------------------------------------ generations


def test_strands_that_are_done_do_not_run_again() -> None:
    rows = begun(n_entries=4)
    feeds = (Feed("1", 1), Feed("2", 1))
    request = Relaunch("job", 1, (), ("0",), ((),), (), done=("1",), n_requested=1)
    assert oversight.relaunch(rows, request, now=1.0) == (Invocation("job", "job.1.0"),)
    made = output("0", 1)._replace(feeds=feeds)
    receipt = state.commit(rows, commit("job.1.0", "a", outputs=(made,)), now=2.0)
    assert isinstance(receipt, Receipt)
    assert [rows.get(TOKENS, i.token).strand for i in receipt.invoke] == ["2"]  # type: ignore[union-attr]


def test_a_relaunch_in_which_nothing_is_missing_ends_the_job() -> None:
    rows = begun()
    request = Relaunch("job", 1, (), (), (), (), (), n_requested=0)
    assert oversight.relaunch(rows, request, now=1.0) == ()
    assert job_of(rows).status is Status.DONE


def test_the_blobs_that_a_relaunch_drops_are_garbage() -> None:
    rows = begun(n_entries=2)
    outputs = tuple(output(f"e{i}", i, blob=f"job/a/{i}") for i in range(3))
    state.commit(rows, commit("job.0.0", "a", outputs=outputs), now=1.0)
    request = Relaunch("job", 1, (("e1", 4),), ("0",), ((),), (), (), n_requested=1)
    oversight.relaunch(rows, request, now=2.0)
    assert rows.ids(EXPORTS) == ["e1"]
    assert job_of(rows).garbage == ("job/a/0", "job/a/2")


# ------------------------------------------------------------------ what must never happen


def test_a_value_that_is_recorded_twice_is_a_defect() -> None:
    rows = begun(n_entries=2)
    state.commit(rows, commit("job.0.0", "a", outputs=(output("0", 1),)), now=1.0)
    with pytest.raises(AssertionError, match="recorded twice"):
        state.commit(rows, commit("job.0.1", "b", outputs=(output("0", 1),)), now=1.0)


def test_reading_what_was_discarded_is_a_defect() -> None:
    rows = begun(n_entries=2)
    with pytest.raises(AssertionError, match="discarded before its last consumer"):
        state.commit(rows, commit("job.0.0", "a", consumed=("gone",)), now=1.0)
    piece = Spawn("a.s0", "0", Part((1,), (("gone", (1,)),), ()), ("gone",), 0, 0, 0)
    with pytest.raises(AssertionError, match="discarded before its last consumer"):
        state.commit(rows, commit("job.0.1", "b", spawns=(piece,), become="c"), now=1.0)


def test_a_strand_without_program_is_a_defect() -> None:
    rows = begun()
    rows.delete(PROGRAMS, "0")
    with pytest.raises(AssertionError, match="no program"):
        state.start(rows, "job.0.0", "a", "h", now=1.0)


# ------------------------------------------------------------------ atomicity


def test_a_refusal_writes_no_row() -> None:
    class ReadOnly(DictRows):
        def put(self, table: Table[R], key: str, row: R) -> None:
            raise AssertionError(f"wrote {table.code}{key}")

        def delete(self, table: Table[R], key: str) -> None:
            raise AssertionError(f"deleted {table.code}{key}")

    rows = ReadOnly()
    source = begun(n_entries=2)
    state.start(source, "job.0.0", "a", "h", now=0.0)
    rows.rows = source.rows
    assert isinstance(state.start(rows, "job.0.0", "b", "h", now=1.0), Refused)
    assert isinstance(state.start(rows, "job.0.0", "a", "h", now=1.0), Grant)
    assert isinstance(state.start(rows, "spent", "a", "h", now=1.0), Refused)
    assert isinstance(state.commit(rows, commit("spent", "a"), now=1.0), Refused)
    assert isinstance(state.absorb(rows, "job.0.0", "a", Feed("2", 2), 1), Refused)
    assert state.renew(rows, "job.0.1", "a", now=1.0) is not None
    assert oversight.release(rows, "nobody", "", now=1.0) == ()
    assert not oversight.report_lost(rows, "job.0.0", "b", ["0"])
    assert oversight.view(rows) is not None


def test_an_ended_job_has_neither_tokens_nor_waiting_strands() -> None:
    rows = begun(n_entries=3)
    made = output("0", 1)._replace(feeds=(Feed("2", 2), Feed("1", 1)))
    state.commit(rows, commit("job.0.0", "a", outputs=(made,)), now=1.0)
    assert (rows.ids(WAITING), rows.ids(RECEIPTS)) == (["2"], ["job.0.0"])
    assert oversight.cancel(rows)
    assert (rows.ids(TOKENS), rows.ids(WAITING), rows.ids(RECEIPTS)) == ([], [], [])
    assert job_of(rows).version == 3


def test_every_table_has_a_code_and_a_row_of_its_own() -> None:
    assert len({table.code for table in TABLES}) == len({table.row for table in TABLES}) == 8
    assert all(len(table.code) == 1 for table in TABLES)
    assert TokenRow("0", "0", None, (), "", 0, 0, 0.0).running is False
