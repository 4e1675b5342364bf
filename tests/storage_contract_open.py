"""The third part of the suite for job stores: open jobs."""

from __future__ import annotations

import pytest
from storage_contract import Backend, commit, create, entry, invocation, output, program, spawn
from storage_contract_jobs import WatchedJobs

from wukong.executor.messages import (
    Create,
    Extend,
    Feed,
    Grant,
    Located,
    NewExport,
    News,
    NewStrand,
    Note,
    Reason,
    Receipt,
    Refused,
    Restart,
    Status,
)
from wukong.storage.contract import QueueStore
from wukong.storage.rows import ExportRow

T1 = "job.0.1.0"
"""The token of strand 1.0, the only one of the first extension, which writes export 1.0."""
FIRST = output("1.0", 1, 2, 3, consumers=1, requested=True)


def extension(number: int = 1, *strands: NewStrand, **rest: object) -> Extend:
    """An extension with strands that write one export each: three values, pinned."""
    return Extend(
        job="job",
        number=number,
        programs=tuple((new.strand, program(new.strand)) for new in strands),
        strands=strands,
        exports=tuple(NewExport(new.strand, 3, 1, True) for new in strands),
        n_tasks=3,
        **rest,  # type: ignore[arg-type]
    )


def open_job() -> Create:
    """An open job without anything to do."""
    return create(entries=(), n_requested=0, is_open=True)


def reader(strand: str, *tasks: int, of: str = "1.0") -> NewStrand:
    return NewStrand(strand, (), ((of, tasks),))


class OpenContract(WatchedJobs):
    """What is different in an open job; everything else is as in any."""

    @pytest.fixture
    def opened(self, backend: Backend) -> QueueStore:
        """An open job with one extension, whose strand is queued."""
        self.backend = backend
        backend.store.create(open_job())
        assert backend.store.extend(extension(1, NewStrand("1.0", ()))) == (invocation(T1),)
        return backend.store

    def export(self, name: str) -> ExportRow:
        row = self.row("e", name)
        assert isinstance(row, ExportRow)
        return row

    def finish(self, store: QueueStore) -> None:
        """Commit strand 1.0."""
        assert isinstance(store.commit(commit(T1, "a", outputs=(FIRST,))), Receipt)

    # -------------------------------------------------------------- extend

    def test_an_open_job_goes_on_when_nothing_is_requested(self, backend: Backend) -> None:
        self.backend = backend
        backend.store.create(open_job())
        assert self.view().status is Status.RUNNING

    def test_a_repeated_extension_names_what_is_queued(self, opened: QueueStore) -> None:
        with self.nothing_changes():
            again = opened.extend(extension(1, NewStrand("1.0", ())))
            assert again == (invocation(T1),)
        opened.start("job", T1, "a", "h")
        with self.nothing_changes():
            assert opened.extend(extension(1, NewStrand("1.0", ()))) == ()

    def test_what_an_extension_builds_on_must_be_there(self, opened: QueueStore) -> None:
        with self.nothing_changes():
            assert opened.extend(extension(3)) == Refused(Reason.GONE)
            stranger = extension(2, reader("2.0", 1, of="0.9"))
            assert opened.extend(stranger) == Refused(Reason.GONE)

    def test_a_job_that_is_not_open_cannot_be_extended(self, store: QueueStore) -> None:
        with self.nothing_changes():
            assert store.extend(extension(1)) == Refused(Reason.OVER)
        store.forget("job")
        assert store.extend(extension(1)) == Refused(Reason.UNKNOWN_JOB)

    def test_an_edge_from_a_recorded_value_counts_as_arrived(self, opened: QueueStore) -> None:
        self.finish(opened)
        assert self.export("1.0").n_consumers == 1
        minted = opened.extend(extension(2, reader("2.0", 2)))
        assert minted == (invocation("job.0.2.0"),)
        assert self.export("1.0").n_consumers == 2
        grant = opened.start("job", "job.0.2.0", "b", "h")
        assert isinstance(grant, Grant)
        assert grant.inputs == (Located("1.0", FIRST.entries),)

    def test_a_late_edge_arrives_with_its_value(self, opened: QueueStore) -> None:
        assert opened.extend(extension(2, reader("2.0", 2, 3))) == ()
        receipt = opened.commit(commit(T1, "a", outputs=(FIRST,)))
        assert receipt == Receipt(None, (invocation("a.0"),), ())
        assert self.export("1.0").n_consumers == 2

    def test_a_reader_does_not_wait_for_values_that_it_does_not_need(
        self, opened: QueueStore
    ) -> None:
        opened.extend(extension(2, reader("2.0", 1), reader("2.1", 2, 3)))
        parts = [output("1.0", t, n_values=3, requested=True) for t in (1, 2, 3)]
        split = commit(T1, "a", outputs=(parts[0],), spawns=(spawn("a.s0"),))
        receipt = opened.commit(split)
        assert receipt == Receipt(None, (invocation("a.0"), invocation("a.1")), ())
        again = commit("a.1", "b", outputs=(parts[1],), spawns=(spawn("b.s0"),))
        assert opened.commit(again) == Receipt(None, (invocation("b.0"),), ())
        grant = opened.start("job", "a.0", "x", "h")
        assert isinstance(grant, Grant)
        assert grant.strand == "2.0"
        assert grant.inputs == (Located("1.0", (entry(1), entry(2))),)
        last = opened.commit(commit("b.0", "c", outputs=(parts[2],)))
        assert last == Receipt(None, (invocation("c.0"),), ())

    def test_a_reader_may_end_before_the_export_is_complete(self, opened: QueueStore) -> None:
        opened.extend(extension(2, reader("2.0", 1)))
        opened.unpin("job", ["1.0"])
        part = output("1.0", 1, n_values=3, requested=True)
        opened.commit(commit(T1, "a", outputs=(part,), spawns=(spawn("a.s0"),)))
        opened.commit(commit("a.0", "b", consumed=("1.0",)))
        assert self.export("1.0").n_consumers == 0
        rest = output("1.0", 2, 3, n_values=3, requested=True, blob="job/c/0")
        assert opened.commit(commit("a.1", "c", outputs=(rest,))) == Receipt(None, (), ("job/c/0",))
        assert "1.0" not in self.ids("e")

    def test_strands_of_an_extension_wait_for_each_other(self, opened: QueueStore) -> None:
        request = Extend(
            job="job",
            number=2,
            programs=(("2.0", program("2.0")), ("2.1", program("2.1"))),
            strands=(NewStrand("2.0", (), (), 4), NewStrand("2.1", ("2.c", "2.0"), (), 5)),
            exports=(NewExport("2.0", 1, 1, False), NewExport("2.1", 1, 1, True)),
            sources=(output("2.c", 9),),
            n_tasks=2,
        )
        assert opened.extend(request) == (invocation("job.0.2.0", priority=4),)
        made = output("2.0", 7, feeds=(Feed("2.1", 2),))
        receipt = opened.commit(commit("job.0.2.0", "b", outputs=(made,)))
        assert receipt == Receipt(None, (invocation("b.0", priority=5),), ())
        grant = opened.start("job", "b.0", "c", "h")
        assert isinstance(grant, Grant)
        assert [located.export for located in grant.inputs] == ["2.c", "2.0"]
        assert grant.is_open

    # -------------------------------------------------------------- pins

    def test_an_export_goes_with_its_pin(self, opened: QueueStore) -> None:
        opened.commit(commit(T1, "a", outputs=(output("1.0", 1, 2, 3, requested=True, blob="b"),)))
        opened.unpin("job", ["1.0", "unknown"])
        assert self.ids("e") == []
        assert opened.news("job", (), ()).garbage == ("b",)
        with self.nothing_changes():
            opened.unpin("nojob", ["1.0"])
        assert opened.news("job", (), ["b"]).garbage == ()

    def test_a_pin_is_given_up_once(self, opened: QueueStore) -> None:
        self.finish(opened)
        opened.extend(extension(2, reader("2.0", 2)))
        opened.unpin("job", ["1.0"])
        with self.nothing_changes():
            opened.unpin("job", ["1.0"])
        assert self.export("1.0").n_consumers == 1
        opened.commit(commit("job.0.2.0", "b", consumed=("1.0",)))
        assert self.ids("e") == ["2.0"]

    def test_what_nobody_wants_any_more_is_not_kept(self, opened: QueueStore) -> None:
        opened.unpin("job", ["1.0"])
        self.finish(opened)
        assert self.ids("e") == []
        assert opened.news("job", (), ()).notes == ()

    # -------------------------------------------------------------- news

    def test_news_comes_until_it_is_acknowledged(self, opened: QueueStore) -> None:
        opened.commit(commit(T1, "a", outputs=(FIRST,), trace=b"trace"))
        bare = entry(1, 2, 3)._replace(payload=None)
        note = Note("000000001.a", (Located("1.0", (bare,)),), b"trace")
        with self.nothing_changes():
            assert opened.news("job", (), ()) == News((note,), ())
        assert opened.news("job", (note.name,), ()) == News((), ())
        assert (self.ids("n"), opened.traces("job")) == ([], ())
        assert opened.news("nojob", ("x",), ()) == News((), ())

    def test_recorded_values_are_located(self, opened: QueueStore) -> None:
        self.finish(opened)
        with self.nothing_changes():
            assert opened.located("job", ["1.0", "none"]) == (Located("1.0", FIRST.entries),)
            assert opened.located("nojob", ["1.0"]) == ()

    def test_wait_wakes_at_a_requested_value(self, opened: QueueStore) -> None:
        opened.extend(extension(2, NewStrand("2.0", ())))
        opened.commit(commit("job.0.2.0", "x", n_tasks=1))
        view = self.wakes(lambda: self.finish(opened), version=2)
        assert view is not None
        assert (view.status, view.version) == (Status.RUNNING, 3)
        view = self.wakes(
            lambda: opened.commit(commit("nothing")) and opened.cancel("job"), version=3
        )
        assert view is not None
        assert view.status is Status.CANCELLED

    def test_a_program_goes_with_its_last_piece(self, opened: QueueStore) -> None:
        pieces = tuple(spawn(f"a.s{i}")._replace(base="1.0") for i in range(2))
        opened.commit(commit(T1, "a", spawns=pieces))
        opened.commit(commit("a.0", "b"))
        assert self.ids("p") == ["1.0", "manifest"]
        opened.commit(commit("a.1", "c"))
        assert self.ids("p") == ["manifest"]

    # -------------------------------------------------------------- drop

    def test_dropped_work_is_taken_back(self, opened: QueueStore) -> None:
        self.finish(opened)
        opened.extend(extension(2, reader("2.0", 1), NewStrand("2.1", ("2.0",), (("1.0", (2,)),))))
        opened.start("job", "job.0.2.0", "b", "h")
        opened.unpin("job", ["2.0", "2.1"])
        opened.drop("job", [("2.0", ("2.0",)), ("2.1", ("2.1",))])
        assert (self.ids("t"), self.ids("w"), self.ids("e")) == ([], [], ["1.0"])
        assert (self.ids("p"), self.export("1.0").n_consumers) == (["manifest"], 1)
        with self.nothing_changes():
            opened.drop("job", [("2.0", ("2.0",)), ("2.1", ("2.1",))])
            refused = opened.commit(commit("job.0.2.0", "b", consumed=("1.0",)))
            assert refused == Refused(Reason.SPENT)
            assert opened.renew("job", "job.0.2.0", "b") is Reason.SPENT
            opened.drop("nojob", [("2.0", ())])

    def test_pieces_of_a_dropped_strand_go_too(self, opened: QueueStore) -> None:
        made = output("a.e0", 1, consumers=2, blob="job/a/0")
        pieces = tuple(
            spawn(f"a.s{i}", inputs=("a.e0",), n_missing=i)._replace(base="1.0") for i in range(2)
        )
        opened.commit(commit(T1, "a", outputs=(made,), spawns=pieces))
        assert self.ids("w") == ["a.s1"]
        opened.unpin("job", ["1.0"])
        opened.drop("job", [("1.0", ("1.0",))])
        assert (self.ids("t"), self.ids("w"), self.ids("e")) == ([], [], [])
        assert opened.news("job", (), ()).garbage == ("job/a/0",)
        assert self.ids("r") == []

    def test_a_commit_that_has_absorbed_dropped_work_is_done_again(
        self, opened: QueueStore
    ) -> None:
        opened.extend(extension(2, NewStrand("2.0", ()), NewStrand("2.1", ("2.0",))))
        opened.unpin("job", ["2.1"])
        opened.drop("job", [("2.1", ("2.1",))])
        reply = opened.commit(
            commit("job.0.2.0", "b", outputs=(output("2.1", 1, 2, 3),), absorbed=("2.1",))
        )
        assert reply == Refused(Reason.HELD, (invocation("job.0.2.0"),))
        assert opened.n_queued() == 2
        assert opened.absorb("job", "job.0.2.0", "b", Feed("2.1", 1), 1) == Refused(Reason.SPENT)
        opened.start("job", "job.0.2.0", "c", "h")
        assert opened.absorb("job", "job.0.2.0", "c", Feed("2.1", 1), 1) == Refused(Reason.HELD)

    # -------------------------------------------------------------- losses

    def test_an_open_job_goes_on_after_a_loss_with_what_it_is_given(
        self, opened: QueueStore
    ) -> None:
        self.finish(opened)
        opened.extend(extension(2, NewStrand("2.0", ()), reader("2.1", 1)))
        opened.commit(commit("job.0.2.0", "b", outputs=(output("2.0", 4, 5, 6, requested=True),)))
        opened.mark_lost("job", ["2.0"])
        assert self.view().lost == ("2.0",)
        request = extension(
            3,
            NewStrand("2.0", ()),
            reader("2.1", 1),
            restart=Restart(1, (("1.0", 1),)),
        )
        again = (invocation("job.1.2.0"), invocation("job.1.2.1"))
        assert opened.extend(request) == again
        view = self.view()
        assert (view.lost, view.generation, view.n_queued) == ((), 1, 2)
        assert (self.ids("e"), self.ids("p")) == (
            ["1.0", "2.0", "2.1"],
            ["2.0", "2.1", "manifest"],
        )
        assert self.export("1.0").n_consumers == 2
        with self.nothing_changes():
            assert opened.extend(request) == again
            assert opened.commit(commit("job.0.2.1", "old")) == Refused(Reason.SPENT)

    def test_what_only_dropped_work_has_read_does_not_survive(self, opened: QueueStore) -> None:
        self.finish(opened)
        opened.mark_lost("job", ["x"])
        opened.extend(extension(2, restart=Restart(1, (("1.0", 0),))))
        assert self.ids("e") == []
        lost = extension(3, restart=Restart(2, (("1.0", 1),)))
        assert opened.extend(lost) == Refused(Reason.GONE)
