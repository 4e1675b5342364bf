"""Outputs that are put while a run goes on: when, what stays in memory, what the commit says."""

import threading
import time

import numpy as np
import pytest

from tests.executor_world import World, interruptions, n_runs, run_all, task
from wukong import trace
from wukong.errors import StoreUnavailable
from wukong.executor.core import ExecutorCore, Phase
from wukong.executor.early import EarlyPuts
from wukong.executor.events import (
    AbsorbAnswered,
    AskAbsorb,
    Delete,
    EarlyPut,
    Fetched,
    Forget,
    Piled,
    Put,
    PutEarly,
    PutItem,
    PutValues,
    Ran,
    Renewed,
    SendCommit,
)
from wukong.executor.messages import Entry, ExportSpec, Feed, Grant, Part, Reason, Status
from wukong.executor.ops import Running
from wukong.executor.work import Policy
from wukong.scheduler import costs

MB = 1 << 20


# ---------------------------------------------------------------- the core


def entry(task: int, size_bytes: int) -> Entry:
    return Entry((task,), f"j/a/{task}-{size_bytes}", None, size_bytes, 0)


def running_core(is_shared: bool, **policy) -> ExecutorCore:
    """A core that runs tasks 0 to 3, each an output; one strand reads them, or two do."""
    feeds = tuple(Feed(str(i), 1) for i in range(1 + is_shared))
    specs = (ExportSpec("x", (0, 1, 2, 3), 4, 1 + is_shared, False, feeds),)
    core = ExecutorCore("h", Policy(**policy), lambda: "next")
    core.adopt(Grant("j", "t", "a", "9", "9", Entry((), None, b"", 0, 0), None, (), 1, 0), 0.0)
    core.handle(Fetched(Part((0, 1, 2, 3), (), specs)), 0.0)
    assert core.phase is Phase.RUNNING
    return core


def test_outputs_pile_up_to_the_bound() -> None:
    core = running_core(is_shared=False, pile_bytes=3 * MB)
    assert core.handle(Piled({0: MB}), 0.1) == []
    assert core.handle(Piled({1: MB}), 0.2) == []
    items = tuple(PutItem("x", (t,), f"j/a/{t}") for t in range(3))
    assert core.handle(Piled({2: MB}), 0.3) == [PutEarly("a", items, True)]
    core.check()


def test_what_was_put_is_not_put_again_and_is_in_the_commit() -> None:
    core = running_core(is_shared=False, pile_bytes=2 * MB)
    core.handle(Piled({0: MB, 1: MB}), 0.1)
    early = (("x", entry(0, MB)), ("x", entry(1, MB)))
    assert core.handle(EarlyPut("a", early), 0.2) == []
    # Nothing is held back any more: part of it is gone from memory.
    rest = PutValues((PutItem("x", (2,), "j/a/2"), PutItem("x", (3,), None)))
    assert core.handle(Ran(4, {2: MB, 3: 10}), 0.3) == [rest]
    late = (("x", entry(2, MB)), ("x", Entry((3,), None, b"..", 10, 0)))
    (send,) = core.handle(Put(late), 0.4)
    assert isinstance(send, SendCommit)
    (output,) = send.commit.outputs
    assert output.entries == tuple(e for _, e in (*early, *late))
    # Whoever reads it finds so much of it here.
    assert output.feeds == (Feed("0", 1, MB + 10),)


def test_one_put_at_a_time_takes_along_what_was_made_meanwhile() -> None:
    core = running_core(is_shared=True, early_bytes=1)
    assert core.handle(Piled({0: MB}), 0.1) == [
        PutEarly("a", (PutItem("x", (0,), "j/a/0"),), False)
    ]
    assert core.handle(Piled({1: MB}), 0.2) == []
    core.handle(EarlyPut("a", (("x", entry(0, MB)),)), 0.3)
    items = (PutItem("x", (1,), "j/a/1"), PutItem("x", (2,), "j/a/2"))
    assert core.handle(Piled({2: MB}), 0.4) == [PutEarly("a", items, False)]


def test_what_may_be_absorbed_is_held_back() -> None:
    core = running_core(is_shared=False, early_bytes=1, absorb_bytes=1)
    assert core.handle(Piled({0: MB, 1: MB}), 0.1) == []
    (ask,) = core.handle(Ran(4, dict.fromkeys(range(4), MB)), 0.2)
    assert isinstance(ask, AskAbsorb)


def test_small_outputs_wait_for_the_commit() -> None:
    core = running_core(is_shared=True, early_bytes=1)
    assert core.handle(Piled({0: 1000, 1: 1000}), 0.1) == []


def test_a_put_that_failed_is_left_to_the_end() -> None:
    core = running_core(is_shared=True, early_bytes=1)
    core.handle(Piled({0: MB}), 0.1)
    core.handle(EarlyPut("a", None), 0.2)
    assert core.handle(Piled({1: MB}), 0.3) == []
    (put,) = core.handle(Ran(4, dict.fromkeys(range(4), MB)), 0.4)
    assert isinstance(put, PutValues)
    assert [item.tasks for item in put.items] == [(0,), (1,), (2,), (3,)]


def test_what_was_put_in_vain_is_deleted() -> None:
    core = running_core(is_shared=True, early_bytes=1)
    core.handle(Piled({0: MB}), 0.1)
    core.handle(EarlyPut("a", (("x", entry(0, MB)),)), 0.2)
    core.handle(Renewed("a", Reason.SPENT), 0.3)
    assert core.handle(Ran(1, {}), 0.4) == [Delete((f"j/a/0-{MB}",), False), Forget()]


def test_a_late_answer_changes_nothing() -> None:
    core = running_core(is_shared=True, early_bytes=1)
    assert core.handle(EarlyPut("other", (("x", entry(0, MB)),)), 0.1) == []
    assert core.handle(AbsorbAnswered(None), 0.1) == []
    (put,) = core.handle(Ran(4, dict.fromkeys(range(4), MB)), 0.4)
    assert len(put.items) == 4


# ---------------------------------------------------------------- the driver


class SlowBlobs:
    """A blob store that is far away: each put waits until the test lets it go."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.begun = threading.Event()
        self.go = threading.Event()
        self.n_puts: list[int] = []
        self.fails = False

    def put_many(self, items) -> None:
        self.n_puts.append(len(items))
        self.begun.set()
        assert self.go.wait(30)
        if self.fails:
            raise StoreUnavailable("far away")
        self._inner.put_many(items)

    def __getattr__(self, name):
        return getattr(self._inner, name)


@pytest.fixture
def world(tmp_path):
    n_runs.clear()
    interruptions.clear()
    world = World(f"local://{tmp_path}/store")
    yield world
    world.close()


def large(name, *values):
    task(name)
    return np.full(MB // 8, name, np.float64)


def total(name, *values):
    task(name)
    return float(sum(value[0] for value in values))


@pytest.fixture(autouse=True)
def one_strand(monkeypatch) -> None:
    """However many tasks there are."""
    monkeypatch.setattr(costs, "STRANDS_PER_EXECUTOR", 0.01)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("fails", [False, True])
def test_outputs_are_put_while_the_next_tasks_run(world, fails) -> None:
    blobs = SlowBlobs(world.store.blobs)
    object.__setattr__(world.store, "blobs", blobs)
    executor = world.executor(early_bytes=1, pile_bytes=1)
    keys = [("x", i) for i in range(4)]
    submission = world.launch({("x", i): (large, i) for i in range(4)}, keys)
    here: list[set[int]] = []

    def look() -> None:
        executor.beat()
        assert blobs.begun.wait(30)  # it puts, and this task runs

    def let_go() -> None:
        executor.beat()  # while it puts, nothing more begins
        blobs.fails = fails
        blobs.go.set()
        wait_for(lambda: not executor._early.is_busy)
        blobs.fails = False
        executor.beat()
        here.append({t for t in range(4) if t in executor._values})

    interruptions[1], interruptions[2] = look, let_go
    run_all(executor)
    assert [float(v[0]) for v in world.results(submission)] == [0.0, 1.0, 2.0, 3.0]
    assert world.view(submission.job).status is Status.DONE
    assert sum(blobs.n_puts) == (5 if fails else 4)
    # What was put has left the memory, when memory is short.
    assert here == [{0, 1}] if fails else here == [{1}]
    records = [trace.read(packed) for packed in world.store.jobs.traces(submission.job)]
    assert sum(record.n_blobs_written for record in records) == 4


def test_what_a_later_task_reads_stays_until_it_has_been_read(world) -> None:
    executor = world.executor(early_bytes=1, pile_bytes=1)
    graph = {
        ("x", 0): (large, 0),
        ("y", 0): (task, 1),
        "z": (total, 2, ("x", 0)),
        "e": (task, 3, "z"),
    }
    graph["f"] = (task, 4, "e")
    submission = world.launch(graph, [("x", 0), ("y", 0), "f"])
    seen: dict[str, bool] = {}

    def look(name: str) -> None:
        executor.beat()
        wait_for(lambda: not executor._early.is_busy)
        executor.beat()
        seen[name] = any(isinstance(v, np.ndarray) for v in executor._values.values())

    order = iter(("first", "second", "third", "fourth"))
    for number in range(1, 5):
        interruptions[number] = lambda: look(next(order))
    run_all(executor)
    x, y, f = world.results(submission)
    assert (x[0], y, f) == (0.0, 1, 1 + 1 + 0.0)
    # Before the task that reads it has ended it is there; once that has ended it is not.
    assert seen[[*seen][-1]] is False
    assert True in seen.values()


def test_a_put_does_not_outlive_its_run() -> None:
    """`finish` waits for the thread, and hands its event over first."""
    events: list[object] = []
    begun, go = threading.Event(), threading.Event()

    def hand(event):
        events.append(event)
        return [PutEarly("a", (PutItem("x", (0,), "j/a/0"),), False)] if len(events) == 1 else []

    class SlowWire:
        is_measured = True

        def put(self, requests):
            begun.set()
            assert go.wait(30)
            return [(r.export, entry(0, MB)) for r in requests]

    part = Part((0, 1), (), (ExportSpec("x", (0,), 1, 1, False, ()),))
    running = Running(part, [(0, int, (), ()), (1, int, (), ())], iter(()), 0.0)
    early = EarlyPuts(hand)
    early.look(running, 1, {0: bytes(MB)}, SlowWire())
    assert begun.wait(30)
    assert early.is_busy
    threading.Timer(0.01, go.set).start()
    early.finish()
    assert not early.is_busy
    assert events == [Piled(events[0].sizes), EarlyPut("a", (("x", entry(0, MB)),))]
