"""Executors as AWS Lambda functions: the handler, and what an environment does with a payload.

    payload --> forward the other groups --> run the tokens of the first one --> flush --> return
                                              |       (the next one's inputs come meanwhile)
          heartbeat thread: renew, split, hand unstarted tokens on; near the time limit, drain

An environment keeps its store, its invoker, programs and blobs between invocations. Whatever
happens to it, its tokens are in the store: near the time limit it commits what is done, and what is
left becomes new invocations; where it is killed, the sweeper brings the token back.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from wukong import config
from wukong.errors import InvokeError
from wukong.executor.aws_lambda_invoker import LambdaInvoker
from wukong.executor.aws_lambda_pace import Token
from wukong.executor.aws_lambda_warm import WarmBlobs
from wukong.executor.lanes import LaneExecutor, SecondLane, Turn
from wukong.executor.messages import HolderId, Invocation, JobId, StrandId, TokenId
from wukong.executor.ops import LOOK_AFTER_S, Running
from wukong.executor.run import HAND_OVER_AFTER_S
from wukong.executor.serialize_programs import Program
from wukong.executor.work import Policy
from wukong.storage import Store, open_store

logger = logging.getLogger(__name__)

VERSIONED = ("wukong", "dask", "cloudpickle", "numpy")
"""Packages whose versions a client compares with its own."""
MARGIN_S = HAND_OVER_AFTER_S + 2.0
"""Before the time limit, at least: to hand over the task that runs, and to commit."""
MARGIN_MAX_S = 30.0
MARGIN_PART = 0.1
"""Of the time limit."""
EARLY_PART = 0.2
"""A task that was begun in this part of the limit, and runs into the margin, would run into the
next one's too: it is not handed over, and counts as one that kills executors."""
HAND_ON_S = 0.25
"""Tokens of a group that have not been begun after this long go to others, if any idle."""
FLUSH_S = 10.0
"""An environment waits so long for its invocations to be accepted before it returns."""
BUSY_LOOK_S = 1.0
"""Between two looks at how many executors work."""
STUCK_STATUS = 70
PINGS = 5


class Context(Protocol):
    """What the platform tells of an invocation."""

    aws_request_id: str
    function_name: str
    invoked_function_arn: str
    memory_limit_in_mb: str

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until the platform kills the environment."""
        ...


def handler(event: dict[str, Any], context: Context) -> dict[str, Any]:
    """The function's entry point: runs what clients, executors and the schedule send.

    Raises:
        ValueError: the event is none of Wukong's.
    """
    return _warm_environment().handle(event, context)


class FunctionEnvironment:
    """One environment of the function: warm state, and what to do with an event.

    Args:
        variables: WUKONG_STORE and WUKONG_BLOBS, and what `open_store` looks up itself.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self._store: Store | None = None
        self._silence_s = 0.0
        self._invoker: LambdaInvoker | None = None
        if "AWS_LAMBDA_FUNCTION_NAME" in variables:
            # The SDK takes longest to load: meanwhile the rest of the cold start goes on.
            self._invoker = LambdaInvoker(variables["AWS_LAMBDA_FUNCTION_NAME"], n_executors=1)
            self._invoker.connect()
        self._programs: dict[tuple[JobId, StrandId], Program] = {}
        self._n_runs = 0

    def handle(self, event: dict[str, Any], context: Context) -> dict[str, Any]:
        """See `handler`."""
        match event.get("wukong"):
            case "run":
                return self._run(event, context)
            case "sweep":
                return self._sweep(context)
            case "describe":
                return self._describe(context)
            case other:
                raise ValueError(f"no event of Wukong's: {other!r}")

    # -------------------------------------------------------------- warm state

    def _open_store(self, silence_s: float) -> Store:
        if self._store is not None and self._silence_s == silence_s:
            return self._store
        url = self._variables.get("WUKONG_STORE")
        if not url:
            raise ValueError("the function has no WUKONG_STORE in its environment")
        blobs = self._variables.get("WUKONG_BLOBS") or None
        store = open_store(url, blobs=blobs, silence_s=silence_s)
        if store.blobs is not None:
            store = replace(store, blobs=WarmBlobs(store.blobs, self._part_bytes()))
        self._store, self._silence_s = store, silence_s
        return store

    def _part_bytes(self) -> int:
        """So much memory may be filled with what may be of use later."""
        memory_bytes = int(self._variables.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", 1024)) << 20
        return int(memory_bytes * float(config.get("lambda.warm-part")))

    def _invoker_of(self, context: Context, event: dict[str, Any]) -> LambdaInvoker:
        """The invoker of this function, set for what the payload's sender wants."""
        if self._invoker is None:
            self._invoker = LambdaInvoker(context.invoked_function_arn, n_executors=1)
        self._invoker.n_executors = int(event.get("n_executors", 1))
        self._invoker.fields = {
            name: event[name] for name in ("n_executors", "policy", "silence_s") if name in event
        }
        return self._invoker

    # -------------------------------------------------------------- tokens

    def _run(self, event: dict[str, Any], context: Context) -> dict[str, Any]:
        store = self._open_store(float(event["silence_s"]))
        invoker = self._invoker_of(context, event)
        own, *others = event["groups"]
        invoker.forward(others)
        self._n_runs += 1
        policy = Policy(**event.get("policy", {}))
        prefetch_bytes = min(policy.prefetch_bytes, self._part_bytes())
        run = _Run(
            HolderId(f"{context.aws_request_id[:8]}-{os.urandom(3).hex()}"),
            store,
            invoker,
            replace(policy, prefetch_bytes=prefetch_bytes),
            context,
            [(str(job), str(token)) for job, token in own],
            self._programs,
        )
        n_begun = run.run()
        is_sent = invoker.flush(min(FLUSH_S, context.get_remaining_time_in_millis() / 2000))
        return {"begun": n_begun, "handed_on": len(own) - n_begun, "is_sent": is_sent}

    # -------------------------------------------------------------- the schedule, and questions

    def _sweep(self, context: Context) -> dict[str, Any]:
        """Have everything started again that is silent, in all jobs."""
        silence_s = float(config.get("job.silence-s"))
        store = self._open_store(silence_s)
        # Nobody says how many executors there may be; a silent token is worth one of its own.
        event = {"n_executors": 1000, "silence_s": silence_s}
        invoker = self._invoker_of(context, event)
        n_jobs, n_invoked = 0, 0
        for job in store.jobs.jobs():
            found = store.jobs.expired(job)
            n_jobs, n_invoked = n_jobs + 1, n_invoked + len(found)
            if found:
                invoker.invoke(found)
        invoker.flush(FLUSH_S)
        return {"jobs": n_jobs, "invoked": n_invoked}

    def _describe(self, context: Context) -> dict[str, Any]:
        """What a client wants to know before it sends work."""
        pings: list[float] = []
        problem = ""
        try:
            store = self._open_store(float(config.get("job.silence-s")))
            for _ in range(PINGS):
                begun_at = time.perf_counter()
                store.jobs.view(JobId("ping"))
                pings.append(time.perf_counter() - begun_at)
        except Exception as error:  # whatever it is, the client shows it
            problem = f"{type(error).__name__}: {error}"
        return {
            "versions": versions(),
            "memory_mb": int(context.memory_limit_in_mb),
            "time_limit_s": context.get_remaining_time_in_millis() / 1000,
            "architecture": platform.machine(),
            "n_runs": self._n_runs,
            "store_s": min(pings, default=None),
            "store_problem": problem,
        }


class _Run:
    """One payload's tokens, run one after the other beside a heartbeat thread."""

    def __init__(
        self,
        holder: HolderId,
        store: Store,
        invoker: LambdaInvoker,
        policy: Policy,
        context: Context,
        tokens: list[Token],
        programs: dict[tuple[JobId, StrandId], Program],
    ) -> None:
        self._jobs = store.jobs
        self._invoker = invoker
        self._context = context
        self._tokens = deque(tokens)
        """Not begun; both threads take from it, each token once."""
        self._limit_s = self._remaining_s()
        self._margin_s = min(
            max(MARGIN_S, min(MARGIN_MAX_S, MARGIN_PART * self._limit_s)), self._limit_s / 2
        )
        self._begun_at = time.perf_counter()
        self._is_over = threading.Event()
        self._is_draining = False
        self._n_handed_on = 0
        self._n_busy = 0
        self._busy_looked_at = -BUSY_LOOK_S
        early_until = self._begun_at + EARLY_PART * self._limit_s
        self._turn = Turn()
        self._programs = [programs]
        if len(tokens) > 1 and policy.prefetch_bytes:
            self._programs.append(dict(programs))  # of a second lane, for a second token
        self._executors = [
            LambdaExecutor(self._turn, holder, store, invoker, policy, early_until, own)
            for own in self._programs
        ]
        invoker.count_busy = self._count_busy

    def run(self) -> int:
        """Run the tokens, and what they become. Returns: how many were begun."""
        n_tokens = len(self._tokens)
        heart = threading.Thread(target=self._beat, name="wukong-heart", daemon=True)
        heart.start()
        first, *others = self._executors
        lanes = [self._begin_lane(executor) for executor in others]
        try:
            while self._take(first):
                pass
        finally:
            for lane in lanes:
                lane.end()
            self._programs[0].update(self._programs[-1])
            self._is_over.set()
            heart.join()
            self._hand_on()
        return n_tokens - self._n_handed_on

    def _begin_lane(self, executor: LambdaExecutor) -> SecondLane:
        n_queued, n_enough = self._tokens.__len__, 1
        return SecondLane(executor, self._turn, n_queued, n_enough, lambda: self._take(executor))

    def _take(self, executor: LambdaExecutor) -> bool:
        """Run the next token, and what it becomes. False: there is none, or no time."""
        if self._is_draining:
            return False
        try:
            job, token = self._tokens.popleft()
        except IndexError:
            return False
        executor.run(JobId(job), TokenId(token))
        return True

    def _beat(self) -> None:
        wait_s = HAND_ON_S
        while not self._is_over.wait(wait_s):
            if not self._is_draining and self._remaining_s() < self._margin_s:
                self._is_draining = True
                for executor in self._executors:
                    executor.drain()
            if self._tokens and (self._is_draining or self._invoker.n_idle()):
                self._hand_on()
            to_margin_s = max(0.05, self._remaining_s() - self._margin_s)
            wait_s = min(to_margin_s, *[executor.beat() for executor in self._executors])

    def _hand_on(self) -> None:
        """Have others begin what has not been begun."""
        left: list[Invocation] = []
        try:
            while True:
                job, token = self._tokens.popleft()
                left.append(Invocation(JobId(job), TokenId(token)))
        except IndexError:
            pass
        self._n_handed_on += len(left)
        try:
            if left:
                self._invoker.invoke(left)
        except InvokeError as error:
            logger.warning("%s; its tokens stay queued in the store", error)

    def _count_busy(self) -> int:
        """Executors at work for the job that this one works for, as of a moment ago."""
        held = self._executors[0].held
        now = time.monotonic()
        if held is not None and now - self._busy_looked_at >= BUSY_LOOK_S:
            self._busy_looked_at = now
            view = self._jobs.view(held[0])
            # What waits in this very group keeps nobody busy.
            n_waiting = len(self._tokens)
            self._n_busy = 0 if view is None else view.n_running + view.n_queued - n_waiting
        return self._n_busy

    def _remaining_s(self) -> float:
        return self._context.get_remaining_time_in_millis() / 1000


class LambdaExecutor(LaneExecutor):
    """An executor with a time limit, and programs that were loaded before.

    Args:
        turn: of all executors of a payload.
        early_until: a task begun before this moment (of `time.perf_counter`) is never handed over.
        programs: kept by the environment; used and added to.
    """

    def __init__(
        self,
        turn: Turn,
        holder: HolderId,
        store: Store,
        invoker: LambdaInvoker,
        policy: Policy,
        early_until: float,
        programs: dict[tuple[JobId, StrandId], Program],
    ) -> None:
        super().__init__(turn, holder, store, invoker, policy, on_stuck=_end_stuck)
        self._early_until = early_until
        self._programs = programs

    def _split(self, running: Running) -> None:
        if self._core.is_draining and self._record.task_begun_at < self._early_until:
            running.look_at = time.monotonic() + LOOK_AFTER_S
            return
        super()._split(running)


def versions() -> dict[str, str]:
    """What has to be alike in client and function."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # A source tree on the path, or a package that was copied without its metadata.
            module = __import__(package)
            found[package] = str(getattr(module, "__version__", "unknown"))
    return found


def _end_stuck() -> None:
    """A task goes on though its job is over: end, instead of being paid for until the limit."""
    logger.warning("a task goes on after its job has ended; this environment ends")
    os._exit(STUCK_STATUS)


_environment: FunctionEnvironment | None = None


def _warm_environment() -> FunctionEnvironment:
    global _environment
    if _environment is None:
        _environment = FunctionEnvironment(os.environ)
    return _environment


if "AWS_LAMBDA_RUNTIME_API" in os.environ:
    _warm_environment()  # in the init phase, before the first event
