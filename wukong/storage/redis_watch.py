"""Waiting for news of a job on Redis: subscribe, then read, then wait for a message.

The scripts publish the job's version to PREFIX{JOB}:all whenever it changes, and to PREFIX{JOB}:end
when the job ends or has lost values. A message says only that there is something to read. One
connection for each thread that waits at the same time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from wukong.errors import StoreUnavailable
from wukong.executor.messages import JobId, JobView, Status
from wukong.storage.redis_link import Line, Link, pack

RECONNECT_S = 0.5
LOOK_S = 0.5
"""A listener looks this often whether its store object is closed; it hears messages at once."""
EARS_KEPT = 4
"""Connections that stay subscribed while nobody waits."""


class Watchers:
    """The connections of one store object on which its threads wait. Thread-safe."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._free: list[_Ear] = []
        self._lent: set[_Ear] = set()
        self._is_closed = False

    def prepare(self, job: JobId, key: bytes) -> None:
        """Listen to a job that is about to be created."""
        ear = self._take(job, key, progress=False)
        ear.is_fresh = True
        self._give_back(ear)

    def wait(
        self,
        job: JobId,
        key: bytes,
        version: int,
        deadline: float,
        progress: bool,
        look: Callable[[], tuple[JobView | None, int]],
    ) -> JobView | None:
        """Block until `look` shows news since `version`, or the deadline (`time.monotonic`).

        Args:
            look: reads the job, and the version at which there was news for its client.
        """
        with self._borrow(job, key, progress) as ear:
            if ear.is_fresh and not progress:
                # Subscribed since before the job was there: had it ended, there were a message.
                ear.is_fresh = False
                ear.wait(deadline)
            while True:
                ear.drain()
                view, news_version = look()
                if view is None or is_news(view, news_version, version, progress):
                    return view
                if time.monotonic() >= deadline:
                    return view
                ear.wait(deadline)

    def close(self) -> None:
        """Close all connections, and wake those who wait."""
        with self._lock:
            self._is_closed = True
            ears = [*self._free, *self._lent]
            self._free = []
        for ear in ears:
            ear.close()

    @contextlib.contextmanager
    def _borrow(self, job: JobId, key: bytes, progress: bool) -> Iterator[_Ear]:
        ear = self._take(job, key, progress)
        try:
            yield ear
        except BaseException:
            with self._lock:
                self._lent.discard(ear)
            ear.close()
            self._link.forget_nodes()
            raise
        self._give_back(ear)

    def _take(self, job: JobId, key: bytes, progress: bool) -> _Ear:
        """A connection that is subscribed to the job, by now."""
        channels = [key[:-1] + b"end"] + [key[:-1] + b"all"] * progress
        address = self._link.address_of(key)
        with self._lock:
            if self._is_closed:
                raise StoreUnavailable(f"{self._link.url}: this store object has been closed")
            near = [ear for ear in self._free if ear.line.address == address]
            ear = next((ear for ear in near if ear.channels == channels), None)
            # The oldest of the others: it listens to a job that nobody has waited for longest.
            if ear is None and len(self._free) >= EARS_KEPT and near:
                ear = near[0]
            if ear is not None:
                self._free.remove(ear)
                self._lent.add(ear)
        if ear is None:
            ear = _Ear(self._link.open_line(address))
            with self._lock:
                self._lent.add(ear)
        try:
            if ear.channels != channels:
                ear.subscribe(channels)
        except BaseException:
            with self._lock:
                self._lent.discard(ear)
            ear.close()
            raise
        return ear

    def _give_back(self, ear: _Ear) -> None:
        with self._lock:
            self._lent.discard(ear)
            self._free.append(ear)
            surplus = self._free.pop(0) if len(self._free) > EARS_KEPT else None
            if self._is_closed:
                surplus = ear
        if surplus is not None:
            surplus.close()


def listen(
    link: Link,
    channel: bytes,
    on_message: Callable[[bytes], None],
    is_over: threading.Event,
) -> None:
    """Pass on what is said in a channel, in a thread of its own, until `is_over`."""

    def hear() -> None:
        while not is_over.is_set():
            try:
                ear = _Ear(link.open_line(link.address_of(channel)))
                try:
                    ear.subscribe([channel])
                    while not is_over.is_set():
                        if ear.line.is_readable(LOOK_S):
                            on_message(ear.receive())
                finally:
                    ear.close()
            except StoreUnavailable:
                is_over.wait(RECONNECT_S)

    threading.Thread(target=hear, name="wukong-listener", daemon=True).start()


class _Ear:
    """A connection that is subscribed to the channels of one job."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.channels: list[bytes] = []
        self.is_fresh = False
        """It has been subscribed since before the job was created, and has not been read from."""

    def subscribe(self, channels: list[bytes]) -> None:
        """Listen to these channels only; returns when the server says so."""
        self.is_fresh = False
        packed = [pack(b"UNSUBSCRIBE", *self.channels)] if self.channels else []
        self.channels = channels
        self.line.send([*packed, pack(b"SUBSCRIBE", *channels)])
        wanted = set(channels)
        while wanted:
            kind, channel, _ = self._receive()
            if kind == b"subscribe":
                wanted.discard(channel)

    def drain(self) -> None:
        """Read what has been said so far."""
        while self.line.is_readable(0):
            self._receive()

    def wait(self, deadline: float) -> None:
        """Block until something is said, or the deadline."""
        timeout_s = deadline - time.monotonic()
        if timeout_s > 0:
            self.line.is_readable(timeout_s)

    def receive(self) -> bytes:
        """What is said next."""
        content = self._receive()[2]
        return content if isinstance(content, bytes) else b""

    def close(self) -> None:
        """Close the connection; a thread that waits on it is woken."""
        self.line.close()

    def _receive(self) -> tuple[bytes, bytes, object]:
        reply = self.line.receive()
        if isinstance(reply, Exception):
            raise self.line.translate(reply)
        kind, channel, content = reply
        return kind, channel, content


def is_news(view: JobView, news_version: int, version: int, progress: bool) -> bool:
    """As `wukong.storage.oversight.is_news`, of a view."""
    if view.status is not Status.RUNNING or news_version > version:
        return True
    return view.version > version and (progress or bool(view.lost))
