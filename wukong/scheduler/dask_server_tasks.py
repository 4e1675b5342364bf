"""What a task that came from a Dask client finds around it: a worker, and through it a client.

A `TaskScene` travels with the programs of such tasks. Where one arrives in a process for the first
time, the process gets a `Home`: a loop in a thread of its own and a stream to the server, over
which it is called (`Client.run`, plugins) and reports (`log_event`). Threads of the server's own
process need none: they have the server.

`get_worker()` gives a `TaskWorker`: Dask's words for what there is. Imported by executors only when
such a task arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from dask.utils import parse_timedelta
from distributed.client import Client
from distributed.comm import CommClosedError, connect
from distributed.core import ConnectionPool, Status, error_message
from distributed.protocol import pickle
from distributed.security import Security
from distributed.threadpoolexecutor import thread_state as pool_state
from distributed.utils import LoopRunner, import_file, in_async_call, set_thread_state, sync
from distributed.versions import get_versions
from distributed.worker import _worker_cvar, run

from wukong.executor.scene import Place
from wukong.scheduler.dask_server_shuffles import Passing

logger = logging.getLogger(__name__)

T = TypeVar("T")

WELCOME_S = 10.0
"""A task that needs the server's greeting (its plugins, its address) waits so long for it."""


class TaskScene:
    """Says where a task's server is. Sent with programs, or shared by threads.

    Args:
        address: the server's.
        security: for `tls://`.
        n_plugins: how many times plugins have been registered or taken away until now.
        local: what a thread of the server's own process finds, by the holder's name.
    """

    def __init__(
        self,
        address: str,
        security: Security | None,
        n_plugins: int,
        local: Callable[[str], TaskWorker] | None = None,
    ) -> None:
        self.address = address
        self.security = security
        self.n_plugins = n_plugins
        self._local = local

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickled before the functions and constants of the tasks, which may ask for the worker.
        return _arrive, (self.address, self.security, self.n_plugins)

    def play(self, loop_over_tasks: Callable[[], T], place: Place) -> T:
        """Run tasks in the scene."""
        if self._local is not None:
            worker = self._local(place.holder)
        else:
            home = _arrive(self.address, self.security, self.n_plugins).home
            worker = home.worker
            home.wait_plugins(self.n_plugins)
        seat = _Seat(place)
        state = {"worker": worker, "scheduler": worker.scheduler.address, "executor": seat}
        token = _worker_cvar.set(worker)  # type: ignore[arg-type]  # it stands in for Dask's
        pool_state.executor, pool_state.proceed = seat, True
        try:
            with set_thread_state(start_time=time.time(), execution_state=state, key=worker.name):
                return loop_over_tasks()
        finally:
            if self._local is not None:
                _worker_cvar.reset(token)

    @property
    def home(self) -> Home:
        """This process's."""
        return _homes[self.address]


class _Seat:
    """What `secede` and `rejoin` know as the thread pool in which a task runs."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._has_left = False
        self._threads = self
        self._rejoin_lock = threading.Lock()
        self._rejoin_list: list[tuple[threading.Thread, threading.Event]] = []

    def remove(self, thread: threading.Thread) -> None:
        """The task's thread leaves: another one may run tokens meanwhile.

        Raises:
            KeyError: it has left already.
        """
        if self._has_left:
            raise KeyError(thread)
        self._has_left = True
        self.place.lender.lend(self.place.holder)

    def _adjust_thread_count(self) -> None:
        """`remove` has seen to it."""

    def submit(self, *_call: object) -> None:
        """The task's thread comes back, at once."""
        with self._rejoin_lock:
            waiting, self._rejoin_list = self._rejoin_list, []
        if self._has_left:
            self._has_left = False
            self.place.lender.take_back()
        for _, event in waiting:
            event.set()


class Scratch:
    """A directory for files that clients upload, from which tasks can import; made when needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path = ""

    def path(self) -> str:
        """Where it is."""
        with self._lock:
            if not self._path:
                self._path = tempfile.mkdtemp(prefix="wukong-uploads-")
                sys.path.insert(0, self._path)
            return self._path

    def remove(self) -> None:
        """Remove it, with all that is in it."""
        with self._lock:
            path, self._path = self._path, ""
        if path:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(ValueError):
                sys.path.remove(path)


class TaskWorker:
    """What `get_worker()` gives inside a task. It is false, so that clients do not look into it.

    A client that runs in a worker takes values out of the worker's memory and puts them there. Here
    they are in the store, so it is to gather and to scatter as a client elsewhere does.
    """

    status = Status.running
    nthreads = 1

    def __init__(
        self,
        name: str,
        scheduler: Any,
        loop: Any,
        security: Security,
        log: Callable[[str, Any], None],
        address: Callable[[], str],
        scratch: Scratch,
    ) -> None:
        self.name = name
        self.id = name
        self.scheduler = scheduler
        """Calls to the server."""
        self.loop = self.io_loop = loop
        self.security = security
        self.data: dict[Any, Any] = {}
        """Empty: values are in the store."""
        self.plugins: dict[str, Any] = {"shuffle": Passing()}
        self.extensions: dict[str, Any] = {}
        self.resources: dict[str, float] = {}
        self._scratch = scratch
        self._log = log
        self._address = address
        self._client: Client | None = None

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<TaskWorker {self.name!r}>"

    @property
    def address(self) -> str:
        """One of the addresses that the server shows as workers'."""
        return self._address()

    contact_address = worker_address = address

    @property
    def local_directory(self) -> str:
        """Where uploaded files are."""
        return self._scratch.path()

    def log_event(self, topic: Any, msg: Any) -> None:
        """Publish an event to the clients that have subscribed to its topic."""
        if isinstance(msg, dict):
            msg = {**msg, "worker": self.name}
        self._log(topic, msg)

    def get_current_task(self) -> Any:
        """The key of the task that asks; a number where it is no key that a client holds.

        Raises:
            ValueError: it is not asked by a task.
        """
        seat = getattr(pool_state, "executor", None)
        if not isinstance(seat, _Seat):
            raise ValueError("not in a task")
        return sync(self.loop, self.scheduler.key_of_task, task=seat.place.task_now())

    def handle_stimulus(self, *_events: object) -> None:
        """Of no interest to the server."""

    @property
    def client(self) -> Client:
        """As `get_client()`."""
        return self._get_client()

    def _get_client(self, timeout: float | str | None = None) -> Client:
        """What `get_client()` calls."""
        with contextlib.suppress(ValueError):
            current: Client = Client.current()
            theirs = current.scheduler
            if theirs is not None and theirs.address == self.scheduler.address:
                return current
        if self._client is None or self._client.status == "closed":
            asynchronous = in_async_call(self.loop)
            self._client = Client(
                self.scheduler.address,
                loop=self.loop,
                security=self.security,
                set_as_default=True,
                asynchronous=asynchronous,
                direct_to_workers=False,
                name="worker",
                timeout=parse_timedelta(timeout or "30s"),
            )
        return self._client

    async def upload_file(
        self, filename: str, data: str | bytes, load: bool = True
    ) -> dict[str, Any]:
        """Put a file where tasks can import it."""
        path = os.path.join(self.local_directory, filename)
        content = data.encode() if isinstance(data, str) else data
        with open(path, "wb") as file:
            file.write(content)
        if load:
            import_file(path)
        return {"status": "OK", "nbytes": len(content)}

    async def plugin_add(self, plugin: Any, name: str, catch_errors: bool = True) -> dict[str, Any]:
        """Set a worker plugin up, in place of one with its name."""
        if isinstance(plugin, bytes):
            plugin = pickle.loads(plugin)
        if name in self.plugins:
            await self.plugin_remove(name)
        self.plugins[name] = plugin
        return await _outcome(lambda: plugin.setup(worker=self))

    async def plugin_remove(self, name: str) -> dict[str, Any]:
        """Tear a worker plugin down."""
        plugin = self.plugins.pop(name, None)
        if plugin is None:
            return {"status": "OK"}
        return await _outcome(lambda: plugin.teardown(worker=self))

    async def answer(self, msg: dict[str, Any]) -> Any:
        """Answer what the server would have asked a worker."""
        options = {name: value for name, value in msg.items() if name not in ("op", "reply")}
        match msg["op"]:
            case "run":
                return await run(self, None, **options)
            case "plugin-add":
                return await self.plugin_add(**options)
            case "plugin-remove":
                return await self.plugin_remove(**options)
            case "upload_file":
                return await self.upload_file(**options)
            case "versions":
                return get_versions(packages=options.get("packages"))
            case "get_story":
                return []
        return error_message(NotImplementedError(f"there is no {msg['op']!r} here"))


async def _outcome(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        result = call()
        if isinstance(result, Awaitable):
            await result
    except Exception as error:
        logger.exception("a worker plugin failed")
        return dict(error_message(error))
    return {"status": "OK"}


# ------------------------------------------------------------------ in other processes


_homes: dict[str, Home] = {}
_homes_lock = threading.Lock()


def _arrive(address: str, security: Security | None, n_plugins: int) -> TaskScene:
    """Unpickle a scene: make the process at home at the server."""
    with _homes_lock:
        home = _homes.get(address)
        if home is None or home.is_lost:
            home = _homes[address] = Home(address, security)
    # So that a lock among the tasks' constants finds its server while it is unpickled.
    _worker_cvar.set(home.worker)  # type: ignore[arg-type]  # as above
    return TaskScene(address, security, n_plugins)


class Home:
    """A process's connection to a server: calls to it, and a stream for calls from it."""

    def __init__(self, address: str, security: Security | None) -> None:
        self._server = address
        self._security = security or Security()
        # As in the workers of Dask's own local cluster.
        logging.getLogger("distributed").setLevel(logging.WARNING)
        self._runner = LoopRunner()
        self._runner.start()
        self._loop = self._runner.loop
        self._is_welcome = threading.Event()
        self._loop_thread = 0
        self._scratch = Scratch()
        self._address = ""
        self._comm: Any = None
        self._n_plugins = 0
        self._has_plugins = threading.Condition()
        self.is_lost = False
        """The server is gone."""
        self._rpc: ConnectionPool = sync(self._loop, self._open_rpc)
        self.worker = TaskWorker(
            f"executor-{os.getpid()}",
            self._rpc(address),
            self._loop,
            self._security,
            self._log,
            self._own_address,
            self._scratch,
        )
        self._loop.add_callback(self._serve)

    async def _open_rpc(self) -> ConnectionPool:
        arguments = self._security.get_connection_args("worker")
        rpc = ConnectionPool(connection_args=arguments, timeout=WELCOME_S)
        await rpc.start()
        self._loop_thread = threading.get_ident()
        return rpc

    def _own_address(self) -> str:
        if threading.get_ident() != self._loop_thread:
            self._is_welcome.wait(WELCOME_S)
        return self._address

    def wait_plugins(self, n_plugins: int) -> None:
        """Wait until the plugins that were registered up to now are set up."""
        with self._has_plugins:
            self._has_plugins.wait_for(
                lambda: self._n_plugins >= n_plugins or self.is_lost, WELCOME_S
            )

    def _log(self, topic: str, msg: Any) -> None:
        self._loop.add_callback(self._send, {"op": "log-event", "topic": topic, "msg": msg})

    async def _send(self, message: dict[str, Any]) -> None:
        if self._comm is None:
            await asyncio.to_thread(self._is_welcome.wait, WELCOME_S)
        with contextlib.suppress(CommClosedError, AttributeError):
            await self._comm.write(message)

    async def _serve(self) -> None:
        """Answer the server until it is gone."""
        try:
            arguments = self._security.get_connection_args("worker")
            comm = await connect(self._server, timeout=WELCOME_S, **arguments)
            await comm.write(
                {
                    "op": "register-executor",
                    "name": self.worker.name,
                    "pid": os.getpid(),
                    "reply": False,
                }
            )
            self._comm = comm
            async for message in _messages(comm):
                if message["op"] == "welcome":
                    self._address = message["address"]
                    self._is_welcome.set()
                    await self._set_up(message["plugins"], message["n_plugins"])
                elif message["op"] == "call":
                    asyncio.ensure_future(self._answer(comm, message))  # noqa: RUF006  # it replies
        except (OSError, CommClosedError):
            pass
        finally:
            self.is_lost = True
            self._scratch.remove()
            self._is_welcome.set()
            with self._has_plugins:
                self._has_plugins.notify_all()

    async def _set_up(self, plugins: dict[str, bytes], n_plugins: int) -> None:
        for name, plugin in plugins.items():
            await self.worker.plugin_add(plugin, name)
        self._count_plugins(n_plugins)

    def _count_plugins(self, n_plugins: int) -> None:
        with self._has_plugins:
            self._n_plugins = max(self._n_plugins, n_plugins)
            self._has_plugins.notify_all()

    async def _answer(self, comm: Any, message: dict[str, Any]) -> None:
        try:
            result = await self.worker.answer(message["msg"])
        except Exception as error:
            result = error_message(error)
        self._count_plugins(message["n_plugins"])
        with contextlib.suppress(CommClosedError):
            await comm.write({"op": "executor-reply", "call": message["call"], "result": result})


async def _messages(comm: Any) -> Any:
    while True:
        read = await comm.read()
        for message in read if isinstance(read, list | tuple) else (read,):
            if message.get("op") == "stream-closed":
                return
            yield message


class CoroutineCall:
    """Calls a coroutine function from a task, in the loop of the task's worker."""

    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self.function = function
        functools.update_wrapper(self, function, updated=())

    def __reduce__(self) -> tuple[Any, ...]:
        return CoroutineCall, (self.function,)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        worker = _worker_cvar.get()
        return sync(worker.loop, self.function, *arguments, **options)


def greet(number: int) -> str:
    """What the server has executors do that it has not heard of: arriving registers them."""
    return _worker_cvar.get().address
