"""Random open jobs in random worlds: nothing wrong is ever seen, and broken rules are found out.

New seeds are explored by hand: `python -m wukong.sim --open --seed 9000 --count 999`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from wukong.scheduler.holdings import Holdings
from wukong.sim import Violation
from wukong.sim.seeds_open import run_open_seed
from wukong.storage import extension, state, values

N_FAST, N_SLOW, N_SEEDS = 12, 120, 2_000
BLOCK = 2

Patch = pytest.MonkeyPatch
MUTATIONS: list[Callable[[Patch], None]] = []


def mutation(patch: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MUTATIONS.append(patch)
    return patch


@pytest.mark.parametrize("first", range(0, N_FAST, BLOCK))
def test_nothing_wrong_is_seen_of_an_open_job(first: int) -> None:
    for seed in range(first, first + BLOCK):
        run_open_seed(seed)


@pytest.mark.slow
def test_the_seeds_see_what_is_special_about_open_jobs() -> None:
    seen: Counter[str] = Counter()
    for seed in range(N_FAST, N_SLOW):
        seen.update(run_open_seed(seed))
    for kind in ("deaths", "stops", "blobs lost", "relaunches", "drops"):
        assert seen[kind] >= 5, f"{kind}: {seen[kind]}"


@pytest.mark.full
def test_nothing_wrong_is_seen_of_many_open_jobs() -> None:
    for seed in range(N_SLOW, N_SEEDS):
        run_open_seed(seed)


# ------------------------------------------------------------------ broken rules


@mutation
def a_late_edge_waits_for_the_whole_export(patch: Patch) -> None:
    """It then arrives with the first of its values, whichever that is."""

    def lower(late: Any, output: Any, arrivals: Any) -> Any:
        return real(tuple(edge._replace(tasks=()) for edge in late), output, arrivals)

    real = values._lower_late
    patch.setattr(values, "_lower_late", lower)


@mutation
def a_late_edge_is_no_consumer(patch: Patch) -> None:
    def begin(rows: Any, job: Any, new: Any, now: float) -> Any:
        reply = real(rows, job, new, now)
        for export, _ in new.earlier:
            values.count_consumers(rows, job, export, -1)
        return reply

    real = extension._begin
    patch.setattr(extension, "_begin", begin)


@mutation
def a_repeated_unpin_counts_again(patch: Patch) -> None:
    def unpin(rows: Any, exports: Any) -> None:
        for export in exports:
            row = rows.get(values.EXPORTS, export)
            if row is not None and not row.requested:
                row.requested = True
                rows.put(values.EXPORTS, export, row)
        real(rows, exports)

    real = extension.unpin
    patch.setattr(extension, "unpin", unpin)


@mutation
def dropped_work_keeps_its_inputs(patch: Patch) -> None:
    patch.setattr(extension, "_give_back", lambda rows, job, dropped: [])


@mutation
def a_dropped_strand_is_made_anew_by_its_input(patch: Patch) -> None:
    def waiting(rows: Any, job: Any, feed: Any) -> Any:
        row = rows.get(state.WAITING, feed.strand)
        return row or state.WaitingRow(feed.strand, None, max(1, feed.n_inputs), ())

    patch.setattr(state, "_waiting", waiting)


@mutation
def a_repeated_extension_is_applied_again(patch: Patch) -> None:
    def extend(rows: Any, request: Any, now: float) -> Any:
        job = rows.get(state.JOB, state.THE_JOB)
        if job is not None and request.number <= job.n_extended:
            job.n_extended = request.number - 1
            rows.put(state.JOB, state.THE_JOB, job)
        return real(rows, request, now)

    real = extension.extend
    patch.setattr(extension, "extend", extend)


@mutation
def pinned_results_are_dropped_with_their_strand(patch: Patch) -> None:
    def retire(self: Any, strands: Any, released: Any) -> None:
        pinned, self._pinned = self._pinned, dict(self._pinned)
        real(self, strands, released)
        self._pinned = pinned
        released.exports += [e for _, exports in released.strands for e in exports]

    real = Holdings._retire
    patch.setattr(Holdings, "_retire", retire)
    patch.setattr(Holdings, "_is_awaited", lambda self, work: False)


@pytest.mark.parametrize("broken", MUTATIONS, ids=lambda broken: str(broken.__name__))
@pytest.mark.slow
def test_a_broken_rule_of_open_jobs_is_found_out(
    broken: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    broken(monkeypatch)
    assert any(fails(seed) for seed in range(N_SEEDS)), "no seed has seen it"


def fails(seed: int) -> bool:
    try:
        run_open_seed(seed)
    except Violation:
        return True
    return False
