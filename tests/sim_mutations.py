"""Deliberately broken rules, each a patch of a core or a transition that the seeds must catch.

A mutation is one defect that a reader could write; the name of the function is the defect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from wukong.executor import core, outputs, split, work
from wukong.executor.core import ExecutorCore
from wukong.executor.events import Delete, PutValues, Renew, Run
from wukong.executor.messages import Absorbed, Commit, Entry, Receipt, Refused, TokenId
from wukong.executor.work import absorbing_feed
from wukong.storage import oversight, silence, state
from wukong.storage import rows as job_rows

Patch = pytest.MonkeyPatch
MUTATIONS: list[Callable[[Patch], None]] = []


def mutation(patch: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MUTATIONS.append(patch)
    return patch


# ------------------------------------------------------------------ the rules of the commit


@mutation
def commit_without_the_token_check(patch: Patch) -> None:
    real = state.commit

    def commit(rows: job_rows.Rows, request: Commit, now: float) -> Receipt | Refused:
        if rows.get(job_rows.TOKENS, request.token) is None:
            row = job_rows.TokenRow(request.token, request.token, None, (), "", 0, 0, now)
            rows.put(job_rows.TOKENS, request.token, row)
        return real(rows, request, now)

    patch.setattr(state, "commit", commit)


@mutation
def fan_in_owned_by_an_executor(patch: Patch) -> None:
    """Whoever makes the last input knows of the strand; the store does not."""
    real_mint, real_commit = state._mint, state.commit
    owned: dict[TokenId, Any] = {}

    def mint(rows: Any, job: Any, request: Commit, ready: Any, now: float) -> Receipt:
        receipt = real_mint(rows, job, request, ready, now)
        if receipt.become is not None:
            owned[receipt.become.token] = rows.get(job_rows.TOKENS, receipt.become.token)
            rows.delete(job_rows.TOKENS, receipt.become.token)
        return receipt

    def commit(rows: Any, request: Commit, now: float) -> Any:
        if request.token in owned:
            rows.put(job_rows.TOKENS, request.token, owned.pop(request.token))
        return real_commit(rows, request, now)

    patch.setattr(state, "_mint", mint)
    patch.setattr(state, "commit", commit)


@mutation
def put_after_commit(patch: Patch) -> None:
    _put_later(patch, lambda self: True)


@mutation
def spent_token_before_an_absorbed_value_is_durable(patch: Patch) -> None:
    """Large outputs are held back, and the commit names them; they are put afterwards."""
    _put_later(patch, lambda self: absorbing_feed(self._work, self.policy) is not None)
    patch.setattr(ExecutorCore, "_absorb", lambda self, absorbed: self._put())


def _put_later(patch: Patch, applies: Callable[[Any], bool]) -> None:
    real_put, real_commit = ExecutorCore._put, ExecutorCore._commit
    real_committed = ExecutorCore._committed
    held: dict[Any, Any] = {}

    def put(self: Any) -> Any:
        applied = applies(self)
        (action,) = real_put(self)
        if not applied:
            return [action]
        held[self.holder] = [item for item in action.items if item.blob is not None]
        return [PutValues(tuple(item for item in action.items if item.blob is None))]

    def commit(self: Any, entries: Any) -> Any:
        names = [(i.export, Entry(i.tasks, i.blob, None, 1, 0)) for i in held.get(self.holder, ())]
        return real_commit(self, (*entries, *names))

    def committed(self: Any, receipt: Receipt, now: float) -> Any:
        later = PutValues(tuple(held.pop(self.holder, ())))
        return [later, *real_committed(self, receipt, now)]

    patch.setattr(ExecutorCore, "_put", put)
    patch.setattr(ExecutorCore, "_commit", commit)
    patch.setattr(ExecutorCore, "_committed", committed)


@mutation
def delete_at_first_consumer(patch: Patch) -> None:
    real = state.count_consumers

    def count(rows: Any, job: Any, export: Any, n_more: int) -> None:
        row = rows.get(job_rows.EXPORTS, export)
        if n_more < 0 and row is not None:
            for entry in row.entries:
                job.garbage += () if entry.blob is None else (entry.blob,)
        real(rows, job, export, n_more)

    patch.setattr(state, "count_consumers", count)


@mutation
def token_ids_from_a_counter_of_the_store(patch: Patch) -> None:
    real = state._mint

    def mint(rows: Any, job: Any, request: Commit, ready: Any, now: float) -> Receipt:
        receipt = real(rows, job, replace(request, attempt=f"t{job.n_commits}"), ready, now)
        row = rows.get(job_rows.RECEIPTS, request.token)
        if row is not None:
            row.attempt = request.attempt
            rows.put(job_rows.RECEIPTS, request.token, row)
        return receipt

    patch.setattr(state, "_mint", mint)


@mutation
def garbage_deleted_before_the_commit_is_durable(patch: Patch) -> None:
    real = ExecutorCore.handle

    def handle(self: Any, event: Any, now: float) -> Any:
        actions = real(self, event, now)
        return [replace(a, confirm=False) if isinstance(a, Delete) else a for a in actions]

    patch.setattr(ExecutorCore, "handle", handle)


@mutation
def queued_tokens_swept_by_heartbeat(patch: Patch) -> None:
    """Queued and running are one: whoever is told of a token starts it."""
    real = state.start

    def start(rows: Any, token: Any, attempt: Any, holder: Any, now: float) -> Any:
        row = rows.get(job_rows.TOKENS, token)
        if row is not None and row.attempt != attempt:
            row.running = False
            rows.put(job_rows.TOKENS, token, row)
        return real(rows, token, attempt, holder, now)

    patch.setattr(state, "start", start)
    patch.setattr(silence, "_backoff_s", lambda n_invokes: 1.5)


# ------------------------------------------------------------------ further ones in the store


@mutation
def a_commit_leaves_its_token(patch: Patch) -> None:
    real = state.commit

    def commit(rows: Any, request: Commit, now: float) -> Any:
        row = rows.get(job_rows.TOKENS, request.token)
        reply = real(rows, request, now)
        if row is not None and isinstance(reply, Receipt) and not reply.job_over:
            rows.put(job_rows.TOKENS, request.token, row)
        return reply

    patch.setattr(state, "commit", commit)


@mutation
def a_strand_starts_one_input_early(patch: Patch) -> None:
    real = state._arrive

    def arrive(rows: Any, job: Any, feed: Any, export: Any) -> Any:
        return real(rows, job, feed._replace(n_inputs=max(1, feed.n_inputs - 1)), export)

    patch.setattr(state, "_arrive", arrive)


@mutation
def absorb_does_not_count_what_is_missing(patch: Patch) -> None:
    real = state.absorb

    def absorb(rows: Any, token: Any, attempt: Any, feed: Any, n_held: int) -> Any:
        row = rows.get(job_rows.WAITING, feed.strand)
        return real(rows, token, attempt, feed, feed.n_inputs if row is None else row.n_missing)

    patch.setattr(state, "absorb", absorb)


@mutation
def an_absorbed_strand_goes_on_waiting(patch: Patch) -> None:
    real = state._apply
    patch.setattr(
        state, "_apply", lambda rows, job, r, *rest: real(rows, job, replace(r, absorbed=()), *rest)
    )


@mutation
def retained_inputs_are_not_counted(patch: Patch) -> None:
    real = state._apply
    patch.setattr(
        state, "_apply", lambda rows, job, r, *rest: real(rows, job, replace(r, retained=()), *rest)
    )


@mutation
def a_report_of_loss_is_always_believed(patch: Patch) -> None:
    def report_lost(rows: Any, token: Any, attempt: Any, exports: Any) -> bool:
        job = rows.get(job_rows.JOB, job_rows.THE_JOB)
        if job is not None and job.status is state.Status.RUNNING:
            oversight._lose(rows, job, exports)
        return True

    patch.setattr(oversight, "report_lost", report_lost)


@mutation
def a_relaunch_forgets_which_strands_are_done(patch: Patch) -> None:
    real = oversight.relaunch
    patch.setattr(
        oversight, "relaunch", lambda rows, request, now: real(rows, replace(request, done=()), now)
    )


@mutation
def a_silent_token_stays_running(patch: Patch) -> None:
    def die(job: Any, row: Any) -> None:
        row.n_deaths += 1

    patch.setattr(state, "count_death", die)
    patch.setattr(silence, "count_death", die)


@mutation
def a_row_is_changed_and_not_put(patch: Patch) -> None:
    def renew(rows: Any, token: Any, attempt: Any, now: float) -> Any:
        row = rows.get(job_rows.TOKENS, token)
        if row is None or not row.running or row.attempt != attempt:
            return real(rows, token, attempt, now)
        row.stamped_at = now
        return None

    real = state.renew
    patch.setattr(state, "renew", renew)


# ------------------------------------------------------------------ further ones in the executor


@mutation
def absorbed_inputs_are_not_consumed(patch: Patch) -> None:
    real = ExecutorCore._absorb

    def absorb(self: Any, absorbed: Absorbed) -> Any:
        inputs = list(self._work.inputs)
        actions = real(self, absorbed)
        self._work.inputs = inputs
        return actions

    patch.setattr(ExecutorCore, "_absorb", absorb)


@mutation
def blobs_deleted_after_an_ambiguous_refusal(patch: Patch) -> None:
    real = ExecutorCore._commit_refused

    def refused(self: Any, refused: Refused) -> Any:
        self._ambiguous = False
        return real(self, refused)

    patch.setattr(ExecutorCore, "_commit_refused", refused)


@mutation
def no_heartbeat(patch: Patch) -> None:
    real = ExecutorCore.tick
    patch.setattr(
        ExecutorCore,
        "tick",
        lambda self, now: [a for a in real(self, now) if not isinstance(a, Renew)],
    )


@mutation
def blob_ids_without_the_attempt(patch: Patch) -> None:
    def blob(work: Any) -> str:
        work.n_blobs += 1
        return f"{work.job}/{work.token}/{work.n_blobs - 1}"

    patch.setattr(outputs, "_blob", blob)


@mutation
def a_deadly_task_is_never_alone(patch: Patch) -> None:
    patch.setattr(core, "task_limit", lambda work: len(work.part.tasks))


@mutation
def the_whole_part_runs_after_deaths(patch: Patch) -> None:
    real = ExecutorCore._fetched

    def fetched(self: Any, part: Any, *rest: Any) -> Any:
        return [
            Run(a.part, len(a.part.tasks)) if isinstance(a, Run) else a
            for a in real(self, part, *rest)
        ]

    patch.setattr(ExecutorCore, "_fetched", fetched)


@mutation
def a_lost_commit_is_given_up_at_once(patch: Patch) -> None:
    """The executor goes on as if its commit had been refused, and deletes what it had put."""
    real = ExecutorCore._store_failed

    def failed(self: Any, failure: Any, now: float) -> Any:
        if isinstance(failure.action, core.SendCommit):
            return self._commit_refused(Refused(state.Reason.SPENT))
        return real(self, failure, now)

    patch.setattr(ExecutorCore, "_store_failed", failed)


# ------------------------------------------------------------------ further ones in splitting


@mutation
def a_split_drops_a_share_of_an_export(patch: Patch) -> None:
    real = split._share

    def share(spec: Any, home: Any, done: Any, writes: Any) -> None:
        n_done = len(done)
        real(spec, home, done, writes)
        if len(done) > n_done and any(writes):
            done.pop()

    patch.setattr(split, "_share", share)


@mutation
def a_split_counts_inputs_by_occurrence(patch: Patch) -> None:
    """An input that a strand and one that it absorbed both read was counted twice."""

    def recount(inputs: Any, reads: Any) -> Any:
        consumed, retained = [], []
        for export in inputs:
            n_readers = sum(export in piece for piece in reads)
            if n_readers == 0:
                consumed.append(export)
            elif n_readers > 1:
                retained.append((export, n_readers - 1))
        return tuple(consumed), tuple(retained)

    patch.setattr(split, "_recount", recount)


@mutation
def pieces_do_not_wait_for_each_other(patch: Patch) -> None:
    real = split.split_rest

    def split_rest(**given: Any) -> Any:
        made = real(**given)
        return replace(made, spawns=tuple(s._replace(n_missing=0) for s in made.spawns))

    patch.setattr(core, "split_rest", split_rest)


@mutation
def the_running_task_is_given_away(patch: Patch) -> None:
    real = split.cut_rest

    def cut_rest(rest: Any, n_executors: int, all_away: bool = False) -> list[int]:
        pieces = real(rest, n_executors, all_away)
        return [max(pieces), *pieces[1:]]

    patch.setattr(work, "cut_rest", cut_rest)


@mutation
def a_split_of_a_part_that_follows_an_absorbed_one_forgets_it(patch: Patch) -> None:
    real = split.split_rest

    def split_rest(**given: Any) -> Any:
        made = real(**given)
        kept = tuple(e for e in made.done_exports if not e.export.startswith(given["attempt"]))
        return replace(made, done_exports=kept)

    patch.setattr(core, "split_rest", split_rest)
