"""While one strand computes, the next one's inputs are fetched and the last one's outputs are put.

Stores here are a wrapper away: each blob operation takes `LATENCY_S`, and is written down.
"""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from wukong.executor.lanes import LaneExecutor, SecondLane, Turn
from wukong.executor.messages import HolderId
from wukong.executor.run import Executor
from wukong.executor.work import Policy
from wukong.scheduler.graph import plan_graph
from wukong.storage import open_store
from wukong.submit import cut_plan, submit_plan

LATENCY_S = 0.02
N_STRANDS = 12
LARGE = 1 << 17


class FarBlobs:
    """Adds latency, and writes down when each operation began and ended."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.spans: list[tuple[str, float, float]] = []

    def _far(self, name, *args):
        begun_at = time.perf_counter()
        time.sleep(LATENCY_S)
        found = getattr(self._inner, name)(*args)
        self.spans.append((name, begun_at, time.perf_counter()))
        return found

    def put_many(self, items) -> None:
        self._far("put_many", items)

    def get_many(self, ids):
        return self._far("get_many", ids)

    def __getattr__(self, name):
        return getattr(self._inner, name)


class Nobody:
    def invoke(self, invocations) -> None:
        pass

    def n_idle(self) -> int:
        return 0


class World:
    """A job of strands that each read a large constant, compute, and write a large value."""

    def __init__(self, folder) -> None:
        store = open_store(f"local://{folder}")
        self.blobs = FarBlobs(store.blobs)
        self.store = replace(store, blobs=self.blobs, is_remote=True)
        self.runs: list[tuple[float, float]] = []
        self._lock = threading.Lock()
        self.n_at_once = 0
        self._n_now = 0

    def launch(self):
        n, constant = N_STRANDS, np.arange(LARGE / 8)
        graph = {("c", i): constant + i for i in range(n)}
        graph |= {("x", i): (compute, ("c", i), ("c", (i + 1) % n)) for i in range(n)}
        plan = plan_graph(graph, [("x", i) for i in range(n)])
        cut = cut_plan(plan, 1, None)
        submission = submit_plan(plan, cut, self.store, fail_fast=True, n_retries=0)
        self.store.jobs.create(submission.request)
        self.blobs.spans.clear()
        return submission

    def compute(self, x, y):
        with self._lock:
            self._n_now += 1
            self.n_at_once = max(self.n_at_once, self._n_now)
        begun_at = time.perf_counter()
        time.sleep(2 * LATENCY_S)
        self.runs.append((begun_at, time.perf_counter()))
        with self._lock:
            self._n_now -= 1
        return x + y

    def overlapped(self, name: str) -> int:
        """Operations that were under way while some task ran."""
        return sum(
            any(a < end and begun < b for a, b in self.runs)
            for found, begun, end in self.blobs.spans
            if found == name
        )

    def counts(self) -> dict[str, int]:
        found = [name for name, _, _ in self.blobs.spans]
        return {name: found.count(name) for name in sorted(set(found))}

    def check(self, submission) -> None:
        values = submission.wire.read(self.store.jobs.results(submission.job), lambda _: True)
        assert len(values) == N_STRANDS
        for i in range(N_STRANDS):
            np.testing.assert_array_equal(
                values[submission.manifest.keys.index(("x", i))][:2],
                np.array([0.0, 2.0]) + i + (i + 1) % N_STRANDS,
            )
        self.store.jobs.forget(submission.job)
        self.store.blobs.delete_job(submission.job)


_world: World


def compute(x, y):
    return _world.compute(x, y)


@pytest.fixture
def world(tmp_path):
    global _world
    _world = World(tmp_path / "store")
    yield _world
    assert _world.store.blobs.used_bytes() == 0
    _world.store.jobs.close()


def run_in_lanes(world: World, policy: Policy) -> None:
    turn = Turn()
    first, second = (
        LaneExecutor(turn, HolderId("h"), world.store, Nobody(), policy) for _ in range(2)
    )
    lane = SecondLane(second, turn, world.store.queue.n_queued, 1, second.take)
    while first.take():
        pass
    lane.end()


@pytest.mark.slow
def test_inputs_are_fetched_and_outputs_put_while_the_other_lane_computes(world) -> None:
    submission = world.launch()
    begun_at = time.perf_counter()
    run_in_lanes(world, Policy(prefetch_bytes=1 << 30))
    in_lanes_s = time.perf_counter() - begun_at
    # As many operations as ever: one multi-get and one multi-put a strand; and one run at a time.
    assert world.counts() == {"get_many": N_STRANDS, "put_many": N_STRANDS}
    assert world.n_at_once == 1
    assert world.overlapped("get_many") >= N_STRANDS - 2
    assert world.overlapped("put_many") >= N_STRANDS - 2
    world.check(submission)
    world.runs.clear()
    submission = world.launch()
    executor = Executor(HolderId("h"), world.store, Nobody(), Policy())
    begun_at = time.perf_counter()
    while executor.take():
        pass
    assert world.counts() == {"get_many": N_STRANDS, "put_many": N_STRANDS}
    assert world.overlapped("get_many") == world.overlapped("put_many") == 0
    world.check(submission)
    # Half of each strand's time is waiting: 0.5 with everything hidden.
    assert in_lanes_s < 0.8 * (time.perf_counter() - begun_at)


@pytest.mark.slow
def test_what_is_fetched_ahead_is_bounded(world) -> None:
    submission = world.launch()
    run_in_lanes(world, Policy(prefetch_bytes=LARGE))  # one of a strand's two inputs
    assert world.counts() == {"get_many": N_STRANDS, "put_many": N_STRANDS}
    assert world.overlapped("get_many") == 0
    assert world.overlapped("put_many") >= N_STRANDS // 2
    world.check(submission)


def test_the_second_lane_leaves_to_others_what_is_scarce(world) -> None:
    submission = world.launch()
    turn = Turn()
    policy = Policy(prefetch_bytes=1 << 30)
    second = LaneExecutor(turn, HolderId("h"), world.store, Nobody(), policy)
    lane = SecondLane(second, turn, world.store.queue.n_queued, N_STRANDS + 1, second.take)
    with turn:
        pass
    lane.end()
    assert world.store.jobs.view(submission.job).n_starts == 0
    world.store.jobs.forget(submission.job)
    world.store.blobs.delete_job(submission.job)


def test_a_lane_whose_token_was_spent_meanwhile_runs_nothing(world) -> None:
    submission = world.launch()
    turn = Turn()
    executor = LaneExecutor(turn, HolderId("h"), world.store, Nobody(), Policy(prefetch_bytes=1))
    with turn:
        thread = threading.Thread(target=executor.take)
        thread.start()
        while executor.held is None:
            time.sleep(0.001)
        world.store.jobs.cancel(submission.job)
        for action in executor._core.tick(time.monotonic() + 100):
            executor._step(action)
    thread.join()
    assert executor.held is None
    assert world.runs == []
    world.store.jobs.forget(submission.job)
    world.store.blobs.delete_job(submission.job)


def test_a_defect_ends_the_lane_and_is_raised(world) -> None:
    turn = Turn()
    told: list[BaseException] = []
    second = LaneExecutor(turn, HolderId("h"), world.store, Nobody(), Policy())

    def n_queued() -> int:
        raise LookupError("a defect")

    lane = SecondLane(second, turn, n_queued, 1, second.take, told.append)
    with turn:
        while not told:
            time.sleep(0.001)
    with pytest.raises(LookupError, match="a defect"):
        lane.end()
    assert len(told) == 1


def test_a_task_that_waits_for_the_other_lane_lends_its_turn(world) -> None:
    turn = Turn()
    policy = Policy(prefetch_bytes=1 << 30)
    lanes = [LaneExecutor(turn, HolderId("h"), world.store, Nobody(), policy) for _ in range(2)]
    submission = world.launch()
    is_first = threading.Lock()

    def compute(x, y):
        if is_first.acquire(blocking=False):
            lender = lanes[0]._place.lender
            lender.lend(HolderId("h"))
            deadline = time.monotonic() + 20
            while not world.runs:  # it waits for what the second lane computes
                assert time.monotonic() < deadline, "the second lane does not compute"
                time.sleep(0.001)
            lender.take_back()
            return x + y
        return World.compute(world, x, y)

    world.compute = compute
    lane = SecondLane(lanes[1], turn, world.store.queue.n_queued, 1, lanes[1].take)
    while lanes[0].take():
        pass
    lane.end()
    assert len(world.runs) == N_STRANDS - 1
    world.check(submission)


def test_a_lane_that_is_to_end_begins_no_task(world) -> None:
    submission = world.launch()
    turn = Turn()
    executor = LaneExecutor(turn, HolderId("h"), world.store, Nobody(), Policy(prefetch_bytes=1))
    with turn:
        thread = threading.Thread(target=executor.take)
        thread.start()
        while executor.held is None:
            time.sleep(0.001)
        executor.drain()
    thread.join()
    assert world.runs == []
    view = world.store.jobs.view(submission.job)
    assert (view.n_running, view.n_queued, view.n_deaths) == (0, N_STRANDS, 0)
    world.store.jobs.forget(submission.job)
    world.store.blobs.delete_job(submission.job)
