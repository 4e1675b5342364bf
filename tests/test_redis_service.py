"""What the Redis store does with its server: calls, leases, limits, secrets, Lua scripts."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import fault_tasks as tasks
import pytest
from servers import needs

needs("redis", "msgpack")
pytest.register_assert_rewrite("storage_contract")

from redis_servers import ACL_LINE, Server, n_calls, wait_until  # noqa: E402
from storage_contract import T0, commit, create, output  # noqa: E402

import wukong  # noqa: E402
from wukong.errors import StoreError, StoreUnavailable  # noqa: E402
from wukong.executor.messages import Grant, Receipt  # noqa: E402
from wukong.executor.serialize import derive_key  # noqa: E402
from wukong.storage import Store, open_store  # noqa: E402
from wukong.storage.redis_link import slot_of  # noqa: E402
from wukong.storage.redis_url import parse_url, with_options  # noqa: E402

SECRET = bytes(range(100, 132))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        yield server


@pytest.fixture
def store(server: Server) -> Iterator[Store]:
    store = open_store(server.url, secret=SECRET)
    yield store
    for job in store.jobs.jobs():
        store.jobs.forget(job)
    store.jobs.close()


# ---------------------------------------------------------------- calls


def test_a_script_is_sent_once_and_again_when_the_server_has_forgotten_it(
    server: Server, store: Store
) -> None:
    server.ask("SCRIPT", "FLUSH")
    server.ask("CONFIG", "RESETSTAT")
    store.jobs.create(create())
    n_sent = n_calls(server, "script|load")
    assert n_sent == 3
    assert isinstance(store.jobs.start("job", T0, "a", "h"), Grant)
    assert n_calls(server, "script|load") == n_sent
    server.ask("SCRIPT", "FLUSH")
    assert isinstance(store.jobs.commit(commit(T0)), Receipt)
    assert n_calls(server, "script|load") == 2 * n_sent


def test_waiting_asks_nothing(server: Server, store: Store) -> None:
    store.jobs.create(create())
    store.jobs.wait("job", 1, 0.01, progress=True)
    server.ask("CONFIG", "RESETSTAT")
    store.jobs.wait("job", 1, 0.1, progress=True)
    assert n_calls(server, "evalsha") == 2  # before and after


def test_a_long_job_is_created_in_pieces(server: Server, store: Store) -> None:
    entries = tuple(f"{i:04d}" for i in range(2500))
    server.ask("CONFIG", "RESETSTAT")
    minted = store.jobs.create(create(entries=entries))
    assert [invocation.token for invocation in minted] == [f"job.0.{e}" for e in entries]
    assert n_calls(server, "evalsha") == 3
    assert store.jobs.create(create(entries=entries)) == minted


# ---------------------------------------------------------------- leases


@pytest.mark.slow
def test_an_abandoned_job_vanishes_and_a_living_one_does_not(server: Server) -> None:
    short = with_options(server.url, lease_s=0.6, prefix="short:")
    store = open_store(short, secret=SECRET)
    assert store.blobs is not None
    for job in ("left", "kept"):
        store.jobs.create(create(job))
        store.blobs.put_many([(f"{job}/a/0-5", [memoryview(b"bytes")])])
    store.jobs.start("kept", "kept.0.0", "a", "h")
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert store.jobs.renew("kept", "kept.0.0", "a") is None
        time.sleep(0.05)
    assert store.jobs.jobs() == ("kept",)
    assert bytes(store.blobs.get_many(["kept/a/0-5"])[0]) == b"bytes"
    assert {name.partition("}")[0] for name in server.keys("short:{*")} == {"short:{kept"}
    assert isinstance(store.jobs.commit(commit("kept.0.0", "a", job="kept")), Receipt)
    wait_until(lambda: not server.keys("short:{*") and not server.keys("short:b:*"), 2.0)
    assert store.jobs.view("kept") is None
    server.ask("DEL", "short:jobs")
    store.jobs.close()


# ---------------------------------------------------------------- secrets


class Tap:
    """Passes bytes between clients and a server on, and keeps them."""

    def __init__(self, server: Server, path: Path) -> None:
        self.seen = bytearray()
        self._target = str(server.socket)
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(path))
        self._door.listen()
        threading.Thread(target=self._open, daemon=True).start()

    def _open(self) -> None:
        while True:
            try:
                near, _ = self._door.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with source, sink:
            while True:
                try:
                    found = source.recv(1 << 16)
                    sink.sendall(found)
                except OSError:
                    return
                if not found:
                    return
                self.seen += found

    def close(self) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()


@pytest.mark.slow
def test_no_key_crosses_the_wire(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        tap = Tap(server, path)
        with (
            dask.config.set({"wukong.store.secret": SECRET.hex()}),
            wukong.LocalCluster(1, store=f"unix://{path}") as cluster,
        ):
            assert cluster._store.secret == SECRET
            graph = {"x": (tasks.ones, 200_000, 1), "y": (tasks.n_bytes, "x")}
            assert cluster.get(graph, "y") == 200_000
            names = bytes(tap.seen)
        tap.close()
    jobs = {part.partition(b"}")[0].decode() for part in names.split(b"wukong:{")[1:]}
    assert len(jobs) == 1
    for key in (SECRET, *(derive_key(SECRET, job) for job in jobs)):
        for form in (key, key.hex().encode(), repr(key).encode()):
            assert form not in names


# ---------------------------------------------------------------- URLs and errors


def test_a_url_says_where_and_how() -> None:
    url = parse_url("rediss+cluster://me:word@a:1,b:2?prefix=p:&lease_s=60&replicas=1")
    assert [tuple(address) for address in url.addresses] == [("a", 1), ("b", 2)]
    assert (url.is_cluster, url.is_encrypted, url.prefix) == (True, True, "p:")
    assert (url.lease_s, url.n_replicas, url.is_durable) == (60.0, 1, True)
    assert url.options == {"username": "me", "password": "word"}
    assert str(url) == "rediss://a:1,b:2"
    assert "word" not in str(url)
    assert parse_url("unix:///a/socket?db=2").addresses[0] == ("/a/socket", 0)
    assert parse_url("redis://host").addresses[0] == ("host", 6379)


@pytest.mark.parametrize("query", ["prefix={a}", "lease_s=0", "replicas=-1", "chunk_bytes=x"])
def test_a_url_with_a_senseless_option_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match=r"prefix|positive|invalid"):
        parse_url(f"redis://host?{query}")


def test_a_server_that_is_not_there_is_named() -> None:
    store = open_store("redis://127.0.0.1:1", secret=SECRET)
    with pytest.raises(StoreUnavailable, match=r"127.0.0.1:1.*refused"):
        store.jobs.view("job")


def test_a_command_that_the_user_may_not_use_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "users.acl").write_text(
            "user default on nopass ~* -@all +ping\nuser wukong on >x ~wukong:* -@all +get\n"
        )
        with Server(Path(folder), "aclfile users.acl") as server:
            store = open_store(f"unix://wukong:x@{server.socket}", secret=SECRET)
            with pytest.raises(StoreError, match=r"evalsha.*docs/redis.md"):
                store.jobs.view("job")
            store.jobs.close()
            wrong = open_store(f"unix://wukong:y@{server.socket}", secret=SECRET)
            with pytest.raises(StoreError, match="password") as caught:
                wrong.jobs.view("job")
            assert ":y" not in str(caught.value)


def test_the_guide_has_the_acl_line_that_is_tested() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "redis.md").read_text()
    assert " ".join(ACL_LINE.replace(">a-password", ">PASSWORD").split()) in " ".join(guide.split())


def test_keys_of_one_job_are_in_one_slot() -> None:
    assert slot_of(b"wukong:{job}:t") == slot_of(b"wukong:{job}:j") == slot_of(b"job")
    assert slot_of(b"123456789") == 12739  # the specification's example


def test_two_prefixes_on_one_server_do_not_meet(server: Server, store: Store) -> None:
    other = open_store(with_options(server.url, prefix="other:"), secret=SECRET)
    store.jobs.create(create())
    other.jobs.create(create())
    store.jobs.commit(commit(T0, outputs=(output("0", 1, requested=True),)))
    view = other.jobs.view("job")
    assert view is not None
    assert (view.n_commits, view.n_queued) == (0, 2)
    other.jobs.forget("job")
    assert store.jobs.jobs() == ("job",)
    other.jobs.close()
