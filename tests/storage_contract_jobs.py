"""The second half of the suite for job stores: ends, faults, the queue, waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from storage_contract import (
    SILENCE_S,
    T0,
    T1,
    Backend,
    UsualBeginning,
    commit,
    create,
    entry,
    invocation,
    output,
)

from wukong.executor.messages import (
    Feed,
    Grant,
    JobView,
    Located,
    Reason,
    Receipt,
    Refused,
    Relaunch,
    Status,
)
from wukong.storage.contract import QueueStore

AT_ONCE_S = 5.0
"""Far more than a wake-up takes, and far less than what the test waits for."""


class WatchedJobs(UsualBeginning):
    """Looking at jobs, and waiting for them."""

    def view(self, job: str = "job") -> JobView:
        view = self.backend.store.view(job)
        assert view is not None
        return view

    def wakes(
        self, change: Callable[[], object], version: int = 1, progress: bool = False
    ) -> JobView | None:
        """Wait for the job in a thread; it must sleep until the change and wake at once."""
        replies: list[JobView | None] = []

        def wait() -> None:
            replies.append(self.backend.store.wait("job", version, 60.0, progress))

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.02)
        assert thread.is_alive(), f"woke without a reason: {replies}"
        change()
        thread.join(AT_ONCE_S)
        assert not thread.is_alive(), "did not wake"
        return replies[0]


class JobContract(WatchedJobs):
    """What concerns a whole job, or all of them."""

    # -------------------------------------------------------------- the end

    def test_a_job_is_done_when_all_that_is_requested_is_complete(self, store: QueueStore) -> None:
        last = output("0", 1, requested=True)
        reply = store.commit(commit(T0, outputs=(last,), n_tasks=3))
        assert reply == Receipt(None, (), (), job_over=True)
        view = self.view()
        assert (view.status, view.n_tasks_done) == (Status.DONE, 3)
        assert store.results("job") == (Located("0", (entry(1),)),)
        with self.nothing_changes():
            assert store.commit(commit(T1, "b")) == Refused(Reason.OVER)

    def test_an_error_ends_a_fail_fast_job(self, store: QueueStore) -> None:
        reply = store.commit(commit(T0, failed=b"error"))
        assert reply == Receipt(None, (), (), job_over=True)
        view = self.view()
        assert (view.status, view.error) == (Status.FAILED, b"error")
        assert (view.n_queued, view.n_running, store.n_queued()) == (0, 0, 0)
        with self.nothing_changes():
            assert store.commit(commit(T1, "b", failed=b"other")) == Refused(Reason.OVER)
            assert store.expired("job") == ()

    def test_the_queued_tokens_are_those_that_nobody_runs(self, store: QueueStore) -> None:
        with self.nothing_changes():
            assert store.queued("job") == (invocation(T1),)
        store.start("job", T1, "b", "h")
        assert store.queued("job") == store.queued("nojob") == ()
        self.backend.clock.now += SILENCE_S
        store.release("h", "killed")
        assert sorted(store.queued("job")) == [invocation(T0), invocation(T1)]
        store.cancel("job")
        assert store.queued("job") == ()

    def test_cancel_ends_a_job_once(self, store: QueueStore) -> None:
        assert store.cancel("job")
        assert self.view().status is Status.CANCELLED
        assert (self.ids("t"), store.n_queued()) == ([], 0)
        with self.nothing_changes():
            assert not store.cancel("job")
            assert store.commit(commit(T0)) == Refused(Reason.OVER)
        assert not store.cancel("nojob")

    def test_forget_leaves_nothing(self, store: QueueStore) -> None:
        self.fan_in(store)
        store.create(create("job2"))
        store.commit(commit("job2.0.0", job="job2", trace=b"t"))
        store.forget("job")
        assert self.backend.rows("job") == {}
        assert store.jobs() == ("job2",)
        assert store.n_queued() == 1
        assert (store.view("job"), store.results("job"), store.manifest("job")) == (None, (), None)
        store.forget("job")
        store.forget("job2")
        assert (store.jobs(), store.n_queued()) == ((), 0)

    def test_a_job_whose_id_begins_with_anothers_is_left_alone(self, store: QueueStore) -> None:
        store.create(create("job2"))
        store.create(create("jo"))
        assert store.jobs() == ("jo", "job", "job2")
        store.forget("job")
        assert store.jobs() == ("jo", "job2")
        assert store.n_queued() == 4

    def test_traces_and_results_are_collected_together(self, store: QueueStore) -> None:
        store.commit(commit(T1, "b", trace=b"first", outputs=(output("1", 2, requested=True),)))
        assert store.manifest("job") == b"manifest"
        assert store.traces("job") == (b"first",)
        assert store.collect("job") == ((Located("1", (entry(2),)),), (b"first",))

    def test_traces_come_in_the_order_of_the_commits(self, backend: Backend) -> None:
        backend.store.create(create(entries=tuple(str(i) for i in range(12))))
        for i in range(12):
            backend.store.commit(commit(f"job.0.{i}", str(i), trace=b"%d" % i))
        assert backend.store.traces("job") == tuple(b"%d" % i for i in range(12))

    # -------------------------------------------------------------- faults

    def test_release_queues_again_what_a_dead_holder_ran(self, store: QueueStore) -> None:
        store.start("job", T1, "b", "other")
        store.create(create("job2"))
        store.start("job2", "job2.0.1", "c", "h")
        found = store.release("h", "killed by signal 9")
        assert found == (invocation(T0), invocation("job2.0.1", "job2"))
        assert (self.view().n_queued, self.view().n_running, self.view().n_deaths) == (1, 1, 1)
        assert store.n_queued() == 3
        with self.nothing_changes():
            assert store.release("h", "again") == ()
        grant = store.start("job", T0, "d", "h2")
        assert isinstance(grant, Grant)
        assert (grant.n_starts, grant.n_deaths, grant.cause) == (2, 1, "killed by signal 9")
        assert self.view().n_retries == 1

    def test_release_leaves_ended_jobs_alone(self, store: QueueStore) -> None:
        store.commit(commit(T1, "b", outputs=(output("1", 2, requested=True),)))
        with self.nothing_changes():
            assert store.release("h", "died") == ()

    def test_a_straggler_starts_again_and_the_first_commit_wins(self, store: QueueStore) -> None:
        (running,) = store.running("job")
        assert (running.token, running.strand, running.tasks, running.n_starts) == (
            T0,
            "0",
            None,
            1,
        )
        assert store.duplicate("job", [T0, "unknown"]) == (invocation(T0),)
        assert store.running("job") == ()
        grant = store.start("job", T0, "second", "h2")
        assert isinstance(grant, Grant)
        assert (grant.n_starts, grant.n_deaths) == (2, 0)
        with self.nothing_changes():
            assert store.duplicate("job", [T0]) == ()
            assert store.renew("job", T0, "a") is Reason.HELD
        assert isinstance(store.commit(commit(T0, "a")), Receipt)
        assert store.commit(commit(T0, "second")) == Refused(Reason.SPENT)

    def test_running_tokens_expire_by_their_heartbeat(self, store: QueueStore) -> None:
        store.start("job", T1, "b", "h2")
        self.backend.clock.now += SILENCE_S / 2
        store.renew("job", T1, "b")
        self.backend.clock.now += SILENCE_S / 2
        assert store.expired("job") == (invocation(T0),)
        assert store.expired("job") == (invocation(T0),)

    def test_queued_tokens_expire_after_a_growing_back_off(self, store: QueueStore) -> None:
        store.commit(commit(T0))
        waits = []
        for _ in range(6):
            begun = self.backend.clock.now
            while store.expired("job") == ():
                self.backend.clock.now += 1
            waits.append(self.backend.clock.now - begun)
        assert waits == [4, 8, 16, 32, 60, 60]

    def test_few_tokens_expire_at_a_time_the_oldest_first(self, backend: Backend) -> None:
        entries = tuple(f"{i:03d}" for i in range(100))
        backend.store.create(create(entries=entries))
        backend.clock.now += 4
        first, second = backend.store.expired("job"), backend.store.expired("job")
        assert (len(first), len(second)) == (64, 36)
        assert [i.token for i in first + second] == [f"job.0.{e}" for e in entries]
        assert backend.store.expired("job") == ()

    def test_a_commit_names_a_few_expired_tokens(self, backend: Backend) -> None:
        backend.store.create(create(entries=tuple(str(i) for i in range(7))))
        backend.clock.now += SILENCE_S
        reply = backend.store.commit(commit("job.0.0"))
        assert reply == Receipt(None, tuple(invocation(f"job.0.{i}") for i in range(1, 5)), ())
        reply = backend.store.commit(commit("job.0.1"))
        assert reply == Receipt(None, (), ())

    def test_expired_in_no_job_finds_nothing(self, backend: Backend) -> None:
        assert backend.store.expired("nojob") == ()
        assert backend.store.jobs() == ()

    def test_a_reported_loss_stops_the_job(self, store: QueueStore) -> None:
        with self.nothing_changes():
            assert not store.report_lost("job", T0, "b", ["0"])
            assert not store.report_lost("job", T1, "a", ["0"])
        assert store.report_lost("job", T0, "a", ["x", "0"])
        view = self.view()
        assert (view.lost, view.version, view.status) == (("0", "x"), 2, Status.RUNNING)
        assert (self.ids("t"), store.n_queued()) == ([], 0)
        with self.nothing_changes():
            assert not store.report_lost("job", T0, "a", ["x", "0"])

    def test_a_client_reports_the_loss_of_results(self, store: QueueStore) -> None:
        store.commit(commit(T1, "b", outputs=(output("1", 2, requested=True),)))
        assert self.view().status is Status.DONE
        store.mark_lost("job", ["1"])
        view = self.view()
        assert (view.lost, view.status) == (("1",), Status.RUNNING)
        store.mark_lost("nojob", ["1"])
        assert store.jobs() == ("job",)

    # -------------------------------------------------------------- relaunch

    def test_a_relaunch_keeps_survivors_and_mints_the_rest(self, store: QueueStore) -> None:
        self.fan_in(store)
        request = Relaunch(
            job="job",
            generation=1,
            survivors=(("0", 1),),
            entries=("1",),
            entry_inputs=((),),
            waiting=(("2", 1, ("0",)),),
            done=("3",),
            n_requested=1,
        )
        assert store.relaunch(request) == (invocation("job.1.1"),)
        assert (self.ids("e"), self.ids("w")) == (["0"], ["2"])
        assert (self.ids("t"), self.ids("r")) == (["job.1.1"], [])
        with self.nothing_changes():
            assert store.relaunch(request) == ()
            assert store.commit(commit("b.0", "old")) == Refused(Reason.SPENT)
        feeds = (Feed("2", 2), Feed("3", 1))
        reply = store.commit(commit("job.1.1", "n", outputs=(output("1", 2, feeds=feeds),)))
        assert reply == Receipt(None, (invocation("n.0"),), ())

    # -------------------------------------------------------------- waiting

    def test_wait_wakes_at_the_end(self, store: QueueStore) -> None:
        def change() -> None:
            store.commit(commit(T0))
            store.commit(commit(T1, "b", outputs=(output("1", 2, requested=True),)))

        view = self.wakes(change)
        assert view is not None
        assert (view.status, view.n_commits) == (Status.DONE, 2)

    def test_wait_wakes_at_a_failure(self, store: QueueStore) -> None:
        view = self.wakes(lambda: store.commit(commit(T0, failed=b"error")))
        assert view is not None
        assert view.error == b"error"

    def test_wait_wakes_at_a_loss(self, store: QueueStore) -> None:
        view = self.wakes(lambda: store.report_lost("job", T0, "a", ["0"]))
        assert view is not None
        assert view.lost == ("0",)

    def test_wait_wakes_when_the_job_is_cancelled(self, store: QueueStore) -> None:
        view = self.wakes(lambda: store.cancel("job"))
        assert view is not None
        assert view.status is Status.CANCELLED

    def test_wait_wakes_when_the_job_is_forgotten(self, store: QueueStore) -> None:
        assert self.wakes(lambda: store.forget("job")) is None

    def test_wait_for_progress_wakes_at_each_commit(self, store: QueueStore) -> None:
        view = self.wakes(lambda: store.commit(commit(T0)), progress=True)
        assert view is not None
        assert (view.version, view.status) == (2, Status.RUNNING)
        view = self.wakes(lambda: store.commit(commit(T1, "b")), version=2, progress=True)
        assert view is not None
        assert view.version == 3

    def test_wait_returns_at_once_what_is_known_already(self, store: QueueStore) -> None:
        store.commit(commit(T0))
        view = store.wait("job", 1, 60.0, progress=True)
        assert view is not None
        assert view.version == 2
        store.cancel("job")
        assert store.wait("job", 99, 60.0) == self.view()
        assert store.wait("nojob", 0, 60.0) is None

    def test_wait_ends_when_its_time_is_up(self, store: QueueStore) -> None:
        begun = time.monotonic()
        assert store.wait("job", 1, 0.02) == self.view()
        assert time.monotonic() - begun >= 0.02
        assert store.wait("job", 1, 0.0) == self.view()

    def test_several_threads_wait_at_once(self, store: QueueStore) -> None:
        store.create(create("job2"))
        replies: dict[str, list[Status]] = {"job": [], "job2": []}

        def wait(job: str, progress: bool) -> None:
            view = store.wait(job, 1, 60.0, progress)
            assert view is not None
            replies[job].append(view.status)

        threads = [
            threading.Thread(target=wait, args=(job, progress))
            for job in replies
            for progress in (False, True, False)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        store.cancel("job2")
        for thread in threads[3:]:
            thread.join(AT_ONCE_S)
        assert replies == {"job": [], "job2": [Status.CANCELLED] * 3}
        store.cancel("job")
        for thread in threads:
            thread.join(AT_ONCE_S)
        assert replies["job"] == [Status.CANCELLED] * 3

    @pytest.mark.parametrize("n_threads", [4])
    def test_threads_commit_at_once_and_nothing_is_lost(
        self, backend: Backend, n_threads: int
    ) -> None:
        store, n = backend.store, 25
        store.create(create(entries=tuple(str(i) for i in range(n * n_threads)), n_requested=1))

        def work(name: str) -> None:
            while (grant := store.take("h", f"{name}.{time.perf_counter_ns()}")) is not None:
                made = output("all", int(grant.strand), n_values=n * n_threads, requested=True)
                store.commit(commit(grant.token, grant.attempt, outputs=(made,), n_tasks=1))

        threads = [threading.Thread(target=work, args=(str(i),)) for i in range(n_threads)]
        for thread in threads:
            thread.start()
        view = store.wait("job", 1, 60.0)
        for thread in threads:
            thread.join()
        assert view is not None
        assert (view.status, view.n_tasks_done, view.n_starts) == (Status.DONE, 100, 100)
        (located,) = store.results("job")
        assert sorted(t for e in located.entries for t in e.tasks) == list(range(100))


class QueueContract(UsualBeginning):
    """What stores do besides whose queued tokens are the queue of a pool."""

    def test_take_starts_what_was_queued_first(self, backend: Backend) -> None:
        backend.store.create(create("b"))
        backend.store.create(create("a"))
        taken = [backend.store.take("h", f"t{i}") for i in range(4)]
        assert [t.token for t in taken if t] == ["b.0.0", "b.0.1", "a.0.0", "a.0.1"]
        assert [t.attempt for t in taken if t] == ["t0", "t1", "t2", "t3"]
        assert (backend.store.take("h", "t4"), backend.store.n_queued()) == (None, 0)
        view = backend.store.view("a")
        assert view is not None
        assert (view.n_running, view.n_starts) == (2, 2)

    def test_take_prefers_the_higher_priority(self, backend: Backend) -> None:
        for job, priority in (("low", -5), ("usual", 0), ("high", 7)):
            backend.store.create(create(job, entries=("0",), priority=priority))
        taken = [backend.store.take("h", f"t{i}") for i in range(3)]
        assert [t.job for t in taken if t] == ["high", "usual", "low"]

    def test_take_gives_what_a_start_has_taken_to_nobody(self, store: QueueStore) -> None:
        taken = store.take("h", "b")
        assert taken is not None
        assert taken.token == T1
        assert store.take("h", "c") is None

    def test_a_released_token_is_queued_at_the_end(self, store: QueueStore) -> None:
        store.release("h", "died")
        taken = [store.take("h", f"t{i}") for i in range(2)]
        assert [t.token for t in taken if t] == [T1, T0]

    def test_take_skips_jobs_that_are_over(self, store: QueueStore) -> None:
        store.create(create("job2", entries=("0",)))
        store.commit(commit(T0, outputs=(output("0", 1, requested=True),)))
        assert self.view().status is Status.DONE
        taken = store.take("h", "b")
        assert taken is not None
        assert taken.job == "job2"
        assert store.n_queued() == 0
        store.forget("job")
        assert store.n_queued() == 0

    def test_a_minted_strand_is_queued_and_a_become_one_is_not(self, store: QueueStore) -> None:
        feeds = (Feed("2", 1), Feed("3", 1))
        store.commit(commit(T0, outputs=(output("0", 1, consumers=2, feeds=feeds),), become="n"))
        taken = [store.take("h", f"t{i}") for i in range(3)]
        assert [t and t.token for t in taken] == [T1, "a.1", None]
