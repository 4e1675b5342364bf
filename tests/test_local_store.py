"""What the embedded store does besides being a job store: bytes, directory, processes."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

pytest.register_assert_rewrite("storage_contract")

from storage_contract import T0, commit, create, output  # noqa: E402 - to be rewritten

from wukong.errors import CorruptBlob, InternalError, SecurityError, StoreUnavailable  # noqa: E402
from wukong.executor.messages import (  # noqa: E402
    Create,
    Entry,
    ExportSpec,
    Feed,
    Located,
    Part,
    Status,
)
from wukong.storage import local_env, local_files  # noqa: E402
from wukong.storage.local import LocalJobStore  # noqa: E402
from wukong.storage.local_rows import make_row, pack, pack_row, plain_token, unpack  # noqa: E402
from wukong.storage.rows import (  # noqa: E402
    EXPORTS,
    JOB,
    NOTES,
    PROGRAMS,
    RECEIPTS,
    TABLES,
    TOKENS,
    TRACES,
    WAITING,
    ExportRow,
    JobRow,
    LateEdge,
    NoteRow,
    ProgramRow,
    ReceiptRow,
    TokenRow,
    TraceRow,
    WaitingRow,
)

PART = Part(
    tasks=(3, 2**40),
    inputs=(("e1", (1, 2)), ("n.4", ())),
    exports=(
        ExportSpec("7", (3,), 2, 3, True, (Feed("8", 2, 900), Feed("9", 1))),
        ExportSpec("8", (), 1, 1, False, ()),
    ),
)
ENTRY = Entry((1, 2), None, b"\0payload", 8, 1)
BLOB = Entry((3,), "job/a/1", None, 2**33, 0)
TOKEN = TokenRow("s", "b", PART, ("e1",), "by", 1, -2, 3.5, True, "a", "h", 4, 5, "killed")
ROWS = [
    (WAITING, WaitingRow("b", PART, 3, ("e1", "e2"), 1, 2)),
    (EXPORTS, ExportRow(1, 2, True, (ENTRY, BLOB), (LateEdge("s", (1, 2)),))),
    (RECEIPTS, ReceiptRow("a", ("a.0", "a.1"), "a.1", 2)),
    (PROGRAMS, ProgramRow(BLOB, 3)),
    (TRACES, TraceRow(b"trace")),
    (NOTES, NoteRow((Located("e1", (BLOB,)), Located("e2", ())), b"trace")),
    (
        JOB,
        JobRow(
            Status.FAILED,
            *(2, 3, 4, True, 6, 7.5, 8.5, 9, 10),
            b"error",
            *(12, 13, 14, 15, 16),
            ("job/a/1",),
            ("e1",),
            ("s1", "s2"),
            *(True, 17, 18),
        ),
    ),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(directory: Path) -> Iterator[LocalJobStore]:
    store = LocalJobStore(directory)
    yield store
    store.close()


# ------------------------------------------------------------------ rows as bytes


def test_every_row_comes_back_as_it_was() -> None:
    for table, row in ROWS:
        again = make_row(table, unpack(table.code, pack_row(table, row)))
        assert again == row
        assert all(type(getattr(again, f.name)) is type(getattr(row, f.name)) for f in fields(row))
    packed = pack(plain_token(TOKEN, b"place"))
    token = make_row(TOKENS, unpack("t", packed))
    assert token == TOKEN
    assert unpack("t", packed)[-1] == b"place"
    assert token.part is not None
    assert type(token.part.exports[0].feeds[0]) is Feed


def test_the_rows_of_this_test_use_every_field_and_every_table() -> None:
    for _, row in [*ROWS, (TOKENS, TOKEN)]:
        assert all(getattr(row, f.name) != f.default for f in fields(row))
    assert {table.code for table, _ in ROWS} | {"t"} == {table.code for table in TABLES}
    assert "v" not in {table.code for table in TABLES}


def test_a_row_with_any_byte_changed_is_corrupt() -> None:
    for table, row in ROWS:
        packed = pack_row(table, row)
        for i in range(len(packed)):
            with pytest.raises(CorruptBlob):
                unpack(table.code, packed[:i] + bytes([packed[i] ^ 4]) + packed[i + 1 :])
            with pytest.raises(CorruptBlob):
                unpack(table.code, packed[:i])


@pytest.mark.parametrize("plain", [(), ("w",), ("e", 1), ("t",) + (None,) * 40, 5, None, ["j"]])
def test_a_row_of_another_shape_is_corrupt(plain: object) -> None:
    for table in TABLES:
        if not isinstance(plain, tuple) or not plain or plain[0] != table.code:
            with pytest.raises(CorruptBlob):
                unpack(table.code, pack(plain))  # type: ignore[arg-type]  # on purpose
        else:
            with pytest.raises(CorruptBlob):
                make_row(table, unpack(table.code, pack(plain)))


def test_a_pickle_is_no_row() -> None:
    with pytest.raises(CorruptBlob):
        unpack("x", pickle.dumps(TraceRow(b"trace")))


def test_a_damaged_row_is_reported_by_whoever_reads_it(store: LocalJobStore) -> None:
    store.create(create())
    store._environment.write(lambda txn: (txn.put(b"job\0j", b"damaged"), 0))
    with pytest.raises(CorruptBlob, match="damaged"):
        store.view("job")
    with pytest.raises(CorruptBlob, match="damaged"):
        store.start("job", T0, "a", "h")
    store.forget("job")
    assert store.jobs() == ()


def test_buffers_are_stored_as_bytes_and_nothing_else_is_taken(store: LocalJobStore) -> None:
    def job(payload: object) -> Create:
        return Create("job", (), (), (("0", Entry((), None, payload, 1, 0)),), (), 1, 1, 1, True)

    for payload in ([1, 2], "text", np.zeros(2), 5):
        with pytest.raises(TypeError, match="takes encoded values"):
            store.create(job(payload))
    assert store.jobs() == ()
    with pytest.raises(TypeError, match="a task id is an int"):
        store.create(create(sources=(output("0", np.int64(4)),)))  # type: ignore[arg-type]
    request = create(entries=("0",))
    store.create(request)
    store.commit(commit(T0, trace=memoryview(b"trace"), failed=bytearray(b"error")))
    view = store.view("job")
    assert view is not None
    assert (store.traces("job"), view.error) == ((b"trace",), b"error")


@pytest.mark.parametrize("job", ["", "a\0b", "x" * 129, "\u00e9" * 65])
def test_a_job_id_that_makes_no_key_is_refused(store: LocalJobStore, job: str) -> None:
    with pytest.raises(ValueError, match="job's id"):
        store.create(create(job))


def test_the_longest_job_id_works(store: LocalJobStore) -> None:
    job = "x" * 128
    store.create(create(job))
    grant = store.take("h", "a")
    assert grant is not None
    assert grant.job == job
    with pytest.raises(InternalError, match="too long"):
        store.commit(commit(grant.token, job=job, outputs=(output("e" * 500, 1),)))
    assert store.commit(commit(grant.token, job=job)) is not None


# ------------------------------------------------------------------ the directory


def test_the_secret_is_made_once_and_for_its_user_only(directory: Path) -> None:
    with_secret = LocalJobStore(directory)
    assert len(with_secret.secret) == 32
    assert stat.S_IMODE((directory / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    with_secret.close()
    again = LocalJobStore(directory)
    assert again.secret == with_secret.secret
    again.close()
    assert sorted(os.listdir(directory)) == [
        *("alive", "data.mdb", "lock.mdb", "pipes", "secret", "writers")
    ]
    assert os.listdir(directory / "pipes") == os.listdir(directory / "writers") == []


def test_a_secret_that_others_can_read_is_refused(directory: Path) -> None:
    LocalJobStore(directory).close()
    (directory / "secret").chmod(0o640)
    with pytest.raises(SecurityError, match="mode 0600"):
        LocalJobStore(directory)
    (directory / "secret").chmod(0o600)
    (directory / "secret").write_bytes(b"short")
    with pytest.raises(CorruptBlob, match="5 bytes instead of 32"):
        LocalJobStore(directory)
    assert os.listdir(directory / "writers") == []


def test_a_directory_that_others_can_write_to_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(SecurityError, match="nobody else may write"):
        LocalJobStore(directory)


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot hold a job store"):
        LocalJobStore(tmp_path / "file" / "store")


def test_only_unused_directories_of_dead_processes_are_stale(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    uid = os.getuid()
    names = {
        "left": f"wukong-{uid}-{dead.pid}-a1",
        "never_opened": f"wukong-{uid}-{dead.pid}-b2",
        "being_made": f"wukong-{uid}-{os.getpid()}-c3",
        "in_use": f"wukong-{uid}-{dead.pid}-d4",
        "kept": f"wukong-{uid}-{dead.pid}-e5",
        "pid_reused": f"wukong-{uid}-{os.getpid()}-f6",
        "others": f"wukong-{uid + 1}-{dead.pid}-a7",
        "no_store": f"wukong-{uid}-notes",
    }
    for name in names.values():
        (tmp_path / name).mkdir(mode=0o700)
    for kind in ("left", "kept", "pid_reused"):
        LocalJobStore(tmp_path / names[kind]).close()
    (tmp_path / names["kept"] / local_files.KEEP).touch()
    spill = local_files.spill_directory(tmp_path / names["left"])
    (spill / "blob").write_bytes(b"large")
    in_use = LocalJobStore(tmp_path / names["in_use"])
    removed = {path.name for path in local_files.remove_stale(tmp_path)}
    assert removed == {names["left"], names["never_opened"], names["pid_reused"]}
    assert not spill.exists()
    in_use.create(create())
    in_use.close()
    assert local_files.remove_stale(tmp_path) == [tmp_path / names["in_use"]]


def test_a_default_directory_is_new_and_private(tmp_path: Path) -> None:
    first, second = local_files.default_directory(tmp_path), local_files.default_directory(tmp_path)
    assert first != second
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert local_files.spill_directory(first) == local_files.spill_directory(first)
    local_files.remove_directory(first)
    assert list(tmp_path.iterdir()) == [second]


def test_a_store_that_is_being_removed_cannot_be_opened(directory: Path) -> None:
    import fcntl

    LocalJobStore(directory).close()
    with (directory / "alive").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="being removed"):
            LocalJobStore(directory)
    LocalJobStore(directory).close()


# ------------------------------------------------------------------ room


def test_a_full_map_is_reported_and_changes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_env, "MAP_BYTES", 1 << 20)
    store = LocalJobStore(directory)
    source = output("s", 1)
    large = source._replace(entries=(source.entries[0]._replace(payload=bytes(50_000)),))

    def create_jobs() -> None:
        for i in range(1000):
            store.create(create(f"job{i:03d}", sources=(large,)))

    with pytest.raises(StoreUnavailable, match="full"):
        create_jobs()
    n_jobs = len(store.jobs())
    assert 5 < n_jobs < 25
    for job in store.jobs():
        store.forget(job)
    store.create(create("job"))
    assert store.jobs() == ("job",)
    store.close()


def test_a_full_file_system_is_reported(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, n_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = LocalJobStore(directory)
    monkeypatch.setattr(os, "posix_fallocate", full)
    source = output("s", 1)
    large = source._replace(entries=(source.entries[0]._replace(payload=bytes(20 << 20)),))
    with pytest.raises(StoreUnavailable, match="no room for"):
        store.create(create(sources=(large,)))
    store.create(create("small"))
    assert store.jobs() == ("small",)
    store.close()
    with pytest.raises(StoreUnavailable, match="no room"):
        LocalJobStore(directory.with_name("other"))


# ------------------------------------------------------------------ one environment in a process


def test_a_path_is_opened_once_in_a_process(directory: Path, store: LocalJobStore) -> None:
    link = directory.with_name("link")
    link.symlink_to(directory)
    other = LocalJobStore(link)
    assert other._environment is store._environment
    other.create(create())
    other.close()
    other.close()
    assert store.jobs() == ("job",)


def test_a_closed_store_says_so(directory: Path) -> None:
    store = LocalJobStore(directory)
    store.create(create())
    store.close()
    uses: list[Callable[[], object]] = [
        store.jobs,
        lambda: store.cancel("job"),
        lambda: store.wait("job", 0, 1.0),
    ]
    for use in uses:
        with pytest.raises(StoreUnavailable, match="closed"):
            use()


def run_program(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python program that has the imports of this test."""
    head = (
        "import os, signal, sys, time\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "from pathlib import Path\n"
        "from wukong.storage.local import LocalJobStore\n"
        "from wukong.errors import StoreUnavailable\n"
        "from storage_contract import *\n"
    )
    command = [sys.executable, "-c", head + program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_forked_child_is_refused_and_harms_nobody(directory: Path) -> None:
    program = """
store = LocalJobStore(Path(sys.argv[1]))
store.create(create())
pid = os.fork()
if pid == 0:
    for use in (store.jobs, lambda: store.cancel("job"), lambda: LocalJobStore(store.directory)):
        try:
            use()
        except StoreUnavailable as error:
            assert "forked" in str(error), error
        else:
            os._exit(1)
    store.close()
    other = LocalJobStore(store.directory / "other")
    other.create(create())
    other.close()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
store.create(create("job2"))
assert store.jobs() == ("job", "job2")
assert len(os.listdir(store.directory / "pipes")) == 1
store.close()
"""
    process = run_program(program, directory)
    process.communicate(timeout=30)
    assert process.returncode == 0
