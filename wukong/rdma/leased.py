"""A leased executor: one process on one core, which runs the calls of one client.

It listens for its client, takes the first that proves to hold the lease, and then reads frames,
runs calls in their order, and answers. It has one thread. It ends when its client goes; when the
lease ends its agent kills it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import mmap
import os
import pickle
import random
import resource
import secrets
import signal
import socket
import ssl
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from wukong.errors import (
    FrameError,
    LeaseError,
    LeaseLost,
    LeaseRefused,
    SecurityError,
    WukongError,
)
from wukong.executor.pool_seats import flush_output
from wukong.executor.serialize_failures import encode_error, exit_error
from wukong.rdma.frames import Frame, Kind
from wukong.rdma.greeting import Door, Talk
from wukong.rdma.hot import Failed, Meter
from wukong.rdma.hot_stream import shortest_way
from wukong.rdma.line import ArenaFull, Line, encode
from wukong.rdma.ports import find_ports
from wukong.rdma.shm import SharedArena, ShmEnd
from wukong.rdma.spin import Spin
from wukong.rdma.tcp import TcpEnd
from wukong.rdma.transport import TransportEnd
from wukong.rdma.transport_verbs import VerbsEnd, missing

CONNECT_S = 60.0
"""An executor to which its client does not come ends."""
ARENA_WAIT_S = 5.0
"""How long a result waits for room in its arena, which its client holds."""
KWARGS = 2
"""Flag of a CALL: the stream is (args, kwargs), else args alone."""
FAILED = 70
"""Exit status of an executor that ended by a defect (`EX_SOFTWARE`)."""
ORDER_BYTES = 65536
_PR_SET_PDEATHSIG = 1
# Loaded before the first fork: that takes milliseconds.
_LIBC = ctypes.CDLL(None)
USAGE_BYTES = 24
"""Calls, seconds in calls, seconds of polling: as float64 each, in memory that the agent reads."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What an agent tells a spare process."""

    lease: str
    number: int
    epoch: int
    core: int
    memory_bytes: int
    """Above what the process has already; 0: no limit."""
    is_hot: bool
    key: str
    """Of the line, hexadecimal."""
    host: str
    """Where to listen for TCP; "": nowhere."""
    cert: str
    """File with the certificate and its key; "": no TLS."""


class LeasedExecutor:
    """The life of an executor.

    Args:
        assignment: the lease.
        usage: `USAGE_BYTES` of memory that the agent reads, also after this process's death.
    """

    def __init__(self, assignment: Assignment, usage: memoryview) -> None:
        self._assignment = assignment
        self._meter = Meter(usage)
        self._functions: dict[int, Callable[..., Any]] = {}
        self._backlog: deque[tuple[Frame, float]] = deque()
        """Calls that wait, with the time of their receipt."""
        self._cancelled: set[int] = set()
        self._spin = Spin(assignment.is_hot)
        self._listeners = self._listen()

    # -------------------------------------------------------------- the client comes

    def _listen(self) -> list[socket.socket]:
        # A name that begins with a zero byte is in no directory: nothing is left of it.
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(f"\0wukong-executor-{secrets.token_hex(8)}")
        unix.listen(8)
        listeners = [unix]
        if self._assignment.host:
            listeners.append(socket.create_server((self._assignment.host, 0), backlog=8))
        return listeners

    @property
    def address(self) -> str:
        """Where it listens, for its client."""
        unix, *tcp = self._listeners
        return json.dumps(
            {
                "unix": unix.getsockname()[1:].decode(),
                "tcp": [*tcp[0].getsockname()[:2]] if tcp else None,
                "tls": bool(self._assignment.cert),
            }
        )

    def run(self) -> None:
        """Wait for the client, serve it, and return when it is gone."""
        line = self._meet()
        for listener in self._listeners:
            listener.close()
        try:
            self._serve(line)
        except LeaseLost:
            pass  # the client has gone: so does this
        finally:
            line.close()

    def _meet(self) -> Line:
        """Take the first who proves to hold the lease; cut off everybody else."""
        tls = None
        if self._assignment.cert:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self._assignment.cert)
        door = Door(self._listeners, bytes.fromhex(self._assignment.key), tls)
        give_up_at = time.monotonic() + CONNECT_S
        try:
            while (left_s := give_up_at - time.monotonic()) > 0:
                talk = door.admit(left_s)
                if talk is None:
                    continue
                try:
                    return self._greet(talk)
                except (OSError, WukongError) as error:
                    # A liar, or a client that died: neither is this executor's end.
                    sys.stderr.write(f"an executor has refused somebody: {error}\n")
                    talk.sock.close()
        finally:
            door.close()
        raise LeaseLost("no client has come")

    def _greet(self, talk: Talk) -> Line:
        hello, _ = talk.receive()
        arena_bytes = hello.get("arena_bytes")
        if hello.get("lease") != self._assignment.lease or not isinstance(arena_bytes, int):
            raise SecurityError("a greeting for another lease")
        # What the client can import shall be found here too, where the file system is shared.
        path = hello.get("path", [])
        if not isinstance(path, list) or not all(isinstance(entry, str) for entry in path):
            raise FrameError("a path that is none")
        sys.path += [entry for entry in path if entry not in sys.path]
        end = self._end(str(hello.get("transport")), talk.sock, arena_bytes)
        try:
            talk.send({"offer": dict(end.offer)}, end.fds)
            answer, fds = talk.receive()
            offer = answer.get("offer")
            if not isinstance(offer, dict):
                raise FrameError("an offer that is none")
            transport = end.connect(offer, fds)
        except BaseException:
            end.close()
            raise
        return Line(transport, self._assignment.epoch, talk.parley.line_keys())

    def _end(self, kind: str, sock: socket.socket, arena_bytes: int) -> TransportEnd:
        if not 0 < arena_bytes <= 1 << 40:
            raise FrameError(f"an arena of {arena_bytes} bytes")
        if kind == "shm" and sock.family == socket.AF_UNIX:
            return ShmEnd(sock, SharedArena(arena_bytes))
        if kind == "verbs":
            if not (ports := find_ports()):
                raise LeaseRefused(missing())
            return VerbsEnd(sock, ports[0], arena_bytes)
        if kind == "tcp":
            return TcpEnd(sock, arena_bytes)
        raise FrameError(f"no such transport: {kind!r:.40}")

    # -------------------------------------------------------------- calls

    def _serve(self, line: Line) -> None:
        """Read and run, until the client is gone."""
        meter, spin, backlog = self._meter, self._spin, self._backlog
        hot = shortest_way(line, spin)
        while True:
            # Small calls of known functions, while they come one after the other.
            if hot is not None and (served := hot.serve(self._functions, meter)):
                self._answer(line, *served)
                continue
            begun_at = time.perf_counter()
            frame = line.receive(3600.0, spin.spin_s)
            meter.add(0, 0.0, spin.waited(time.perf_counter() - begun_at))
            while frame is not None:
                self._note(frame)
                frame = line.poll()
            while backlog:
                self._run_next(line)
                # What came meanwhile may cancel the next call.
                while (frame := line.poll()) is not None:
                    self._note(frame)

    def _answer(self, line: Line, call: int, result: Any) -> None:
        if type(result) is Failed:
            self._fail(line, call, result.error)
        else:
            self._return(line, call, result)

    def _run_next(self, line: Line) -> None:
        frame, received_at = self._backlog.popleft()
        if frame.kind != Kind.CALL:
            self._handle(line, frame)
            return
        began_at = time.perf_counter()
        self._meter.add(1, 0.0, 0.0)
        if frame.call in self._cancelled or (
            frame.deadline_s and began_at - received_at > frame.deadline_s
        ):
            self._cancelled.discard(frame.call)
            line.send(Kind.CANCELLED, frame.call)
        else:
            self._call(line, frame)
        self._meter.add(0, time.perf_counter() - began_at, 0.0)

    def _note(self, frame: Frame) -> None:
        if frame.kind == Kind.CANCEL:
            if any(waiting.call == frame.call for waiting, _ in self._backlog):
                self._cancelled.add(frame.call)
        elif frame.kind != Kind.RELEASE:
            self._backlog.append((frame, time.perf_counter()))

    def _handle(self, line: Line, frame: Frame) -> None:
        match frame.kind:
            case Kind.DEFINE:
                try:
                    self._functions[frame.subject] = line.load(frame)
                except WukongError as error:
                    self._functions[frame.subject] = _raiser(error)
            case Kind.RELEASE | Kind.CANCEL:
                pass
            case _:
                raise FrameError(f"a client does not send frames of kind {frame.kind}")

    def _call(self, line: Line, frame: Frame) -> None:
        try:
            arguments = line.load(frame)
            function = self._functions[frame.subject] if frame.subject else None
            if function is None:
                function, arguments = arguments[0], arguments[1:]
            if frame.flags & KWARGS:
                *arguments, keywords = arguments
                result = function(*arguments, **keywords)
            else:
                result = function(*arguments)
        except BaseException as error:
            arguments = keywords = None
            self._fail(line, frame.call, error)
        else:
            # The arguments' memory is free before the answer says so.
            arguments = keywords = None
            self._return(line, frame.call, result)

    def _return(self, line: Line, call: int, result: Any) -> None:
        try:
            stream, buffers = encode(result)
            line.send(Kind.RESULT, call, stream, buffers)
        except ArenaFull as error:
            self._send_when_free(line, call, stream, buffers, error)
        except LeaseLost:
            raise
        except Exception as error:
            self._fail(line, call, error)

    def _fail(self, line: Line, call: int, error: BaseException) -> None:
        if isinstance(error, SystemExit):
            error = exit_error(error)
        line.send(Kind.RAISED, call, _failure(error))

    def _send_when_free(
        self,
        line: Line,
        call: int,
        stream: bytes,
        buffers: list[pickle.PickleBuffer],
        full: LeaseError,
    ) -> None:
        """The client holds earlier results: wait a while for it to let go of some."""
        give_up_at = time.monotonic() + ARENA_WAIT_S
        while time.monotonic() < give_up_at:
            further = line.receive(0.05)
            if further is not None:
                self._note(further)
            with contextlib.suppress(ArenaFull):
                line.send(Kind.RESULT, call, stream, buffers)
                return
        line.send(Kind.RAISED, call, _failure(full))


def _failure(error: BaseException) -> bytes:
    return pickle.dumps(encode_error(error, None), 5)


def _raiser(error: Exception) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    return refuse


# ------------------------------------------------------------------ the process


def be_spare(
    sock: socket.socket, usage: mmap.mmap, parent: int, let_go: Callable[[], None]
) -> NoReturn:
    """The life of a spare process, and of the executor that it becomes, after the fork.

    Args:
        sock: brings the assignment; its end is the spare's.
        usage: shared with the agent.
        parent: the agent's pid; this process dies with it.
        let_go: closes what is the agent's alone.
    """
    status = FAILED
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(FAILED)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # A batch system warns all processes of a job; what is done about it is the agent's choice.
        # No SIG_IGN, which programs that calls start would inherit.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Its own group, so that what calls have started is killed together with it.
        os.setpgid(0, 0)
        let_go()
        # Forks share the state of random generators; calls that draw numbers must not.
        random.seed()
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()
        if sys.stderr is not None:
            faulthandler.enable()
        order = sock.recv(ORDER_BYTES)
        if order:
            live(Assignment(**json.loads(order)), usage, lambda text: sock.sendall(text.encode()))
        status = 0
    except LeaseError as error:
        sys.stderr.write(f"an executor ends: {error}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        flush_output()
        os._exit(status)


def live(assignment: Assignment, usage: mmap.mmap, tell: Callable[[str], None]) -> None:
    """Be an executor, in a process of its own, until its client is gone.

    Args:
        assignment: the lease.
        usage: shared with the agent.
        tell: says where it listens.
    """
    with contextlib.suppress(OSError):  # a core that is not there (any more): anywhere then
        os.sched_setaffinity(0, {assignment.core})
    if assignment.memory_bytes:
        limit_bytes = _data_bytes() + assignment.memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    executor = LeasedExecutor(assignment, memoryview(usage)[:USAGE_BYTES])
    tell(executor.address)
    try:
        executor.run()
    finally:
        flush_output()


def _data_bytes() -> int:
    """Private memory that this process has, as the kernel counts it for `RLIMIT_DATA`."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0
