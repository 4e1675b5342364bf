"""Blobs as files: put once, mapped without a copy, spilled past the limit, gone when deleted."""

import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wukong.errors import CorruptBlob, MissingBlob, SecurityError, StoreUnavailable
from wukong.executor.serialize import Codec
from wukong.storage import blobfiles
from wukong.storage.blobfiles import BlobFiles

LIMIT_BYTES = 1 << 20
PAGE_BYTES = 4096


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobFiles]:
    store = BlobFiles(tmp_path / "root", tmp_path / "spill", LIMIT_BYTES)
    yield store
    store.close()


def parts(*pieces: bytes) -> list[memoryview]:
    return [memoryview(piece) for piece in pieces]


def files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".usage"
    )


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Make files larger than this fail, as on a full disk: with EFBIG instead of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_blobs_come_back_in_the_order_asked_for(blobs: BlobFiles) -> None:
    blobs.put_many(
        [("j/a/1", parts(b"one", b"", b"!")), ("j/b/2", parts()), ("k/a/1", parts(b"3"))]
    )
    assert [bytes(view) for view in blobs.get_many(["k/a/1", "j/a/1", "j/b/2"])] == [
        b"3",
        b"one!",
        b"",
    ]
    assert blobs.list("j") == ["j/a/1", "j/b/2"]
    assert blobs.used_bytes() == 5


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.binary(max_size=200), max_size=5), max_size=8))
def test_any_parts_come_back_joined(
    tmp_path_factory: pytest.TempPathFactory, contents: list[list[bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("blobs")
    store = BlobFiles(folder / "root", folder / "spill", 300)
    ids = [f"j/a/{number}" for number in range(len(contents))]
    store.put_many([(blob_id, parts(*pieces)) for blob_id, pieces in zip(ids, contents)])
    joined = [b"".join(pieces) for pieces in contents]
    assert [bytes(view) for view in store.get_many(ids)] == joined
    assert store.used_bytes() == sum(map(len, joined))
    assert store.used_bytes() - store.spilled_bytes() <= 300
    store.delete_many(ids)
    assert store.used_bytes() == 0
    assert files(folder) == []
    store.close()


def test_a_mapped_array_is_aligned_private_and_outlives_its_blob(blobs: BlobFiles) -> None:
    codec = Codec(b"key")
    array = np.arange(10_000.0)
    blobs.put_many([("j/a/1", codec.encode([1, array], b"").parts)])
    first, second = (codec.decode(view, b"")[1] for view in blobs.get_many(["j/a/1"] * 2))
    blobs.delete_many(["j/a/1"])
    assert first.ctypes.data % 64 == 0
    first[0] = 7
    assert second[0] == 0
    np.testing.assert_array_equal(second, array)


def test_a_blob_that_is_put_again_replaces_the_first_under_its_readers(blobs: BlobFiles) -> None:
    blobs.put_many([("j/a/1", parts(b"x" * 9000))])
    (old,) = blobs.get_many(["j/a/1"])
    blobs.put_many([("j/a/1", parts(b"new"))])
    assert bytes(old) == b"x" * 9000
    assert bytes(blobs.get_many(["j/a/1"])[0]) == b"new"
    assert blobs.used_bytes() == 3


def test_a_missing_blob_is_named(blobs: BlobFiles) -> None:
    with pytest.raises(MissingBlob, match="j/a/7"):
        blobs.get_many(["j/a/7"])


def test_deleting_twice_is_no_error(blobs: BlobFiles) -> None:
    blobs.put_many([("j/a/1", parts(b"x")), ("j/a/2", parts(b"yy"))])
    for _ in range(2):
        blobs.delete_many(["j/a/1", "j/b/9"])
        assert blobs.used_bytes() == 2
        assert blobs.list("j") == ["j/a/2"]


def test_a_job_is_deleted_alone_and_whole(blobs: BlobFiles, tmp_path: Path) -> None:
    big = b"x" * LIMIT_BYTES
    blobs.put_many([("k/a/1", parts(b"kept")), ("j/a/1", parts(b"x")), ("j/a/2", parts(big))])
    for _ in range(2):
        blobs.delete_job("j")
        assert files(tmp_path) == ["root/k/a.1"]
        assert blobs.used_bytes() == 4
        assert blobs.list("j") == []
    assert not (tmp_path / "root/j").exists()
    assert not (tmp_path / "spill/j").exists()


def test_past_the_limit_blobs_go_to_disk(blobs: BlobFiles, tmp_path: Path) -> None:
    half = b"x" * (LIMIT_BYTES // 2)
    blobs.put_many([(f"j/a/{number}", parts(half)) for number in range(4)])
    assert files(tmp_path) == ["root/j/a.0", "root/j/a.1", "spill/j/a.2", "spill/j/a.3"]
    assert blobs.spilled_bytes() == LIMIT_BYTES
    assert [bytes(view) == half for view in blobs.get_many(blobs.list("j"))] == [True] * 4
    blobs.delete_many(["j/a/0", "j/a/2"])
    blobs.put_many([("j/a/4", parts(half))])
    assert files(tmp_path) == ["root/j/a.1", "root/j/a.4", "spill/j/a.3"]


def test_the_limit_counts_all_processes_forked_and_started(tmp_path: Path) -> None:
    folders = tmp_path / "root", tmp_path / "spill"
    parent, other = BlobFiles(*folders, LIMIT_BYTES), BlobFiles(*folders, LIMIT_BYTES)
    parent.put_many([("j/a/1", parts(b"x" * 600_000))])
    pid = os.fork()
    if pid == 0:
        parent.put_many([("j/b/1", parts(b"x" * 600_000)), ("j/b/2", parts(b"x" * 400_000))])
        parent.delete_many(["j/a/1"])
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert files(tmp_path) == ["root/j/b.2", "spill/j/b.1"]
    assert parent.used_bytes() == other.used_bytes() == 1_000_000
    other.put_many([("j/c/1", parts(b"x" * 600_000))])
    assert "root/j/c.1" in files(tmp_path)
    for store in (parent, other):
        store.close()


def test_many_threads_may_put_and_delete_at_once(blobs: BlobFiles) -> None:
    def work(name: str) -> None:
        for number in range(20):
            blobs.put_many([(f"j/{name}/{number}", parts(b"x" * 100))])
            if number % 2:
                blobs.delete_many([f"j/{name}/{number}"])

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert blobs.used_bytes() == 4 * 10 * 100
    assert len(blobs.list("j")) == 40


def test_a_full_disk_is_told_with_the_blob_and_nothing_is_left(
    blobs: BlobFiles, tmp_path: Path
) -> None:
    too_large = parts(b"x" * 60_000)
    with file_size_limit(50_000), pytest.raises(StoreUnavailable, match=r"j/a/2 of 60000 bytes"):
        blobs.put_many([("j/a/1", parts(b"fits")), ("j/a/2", too_large)])
    assert files(tmp_path) == []
    assert blobs.used_bytes() == 0
    blobs.put_many([("j/a/2", too_large)])
    assert blobs.used_bytes() == 60_000


def test_full_shared_memory_below_the_limit_spills(
    blobs: BlobFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.writev

    def writev(fd: int, buffers: list[memoryview]) -> int:
        if "/root/" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        return real(fd, buffers)

    monkeypatch.setattr(blobfiles.os, "writev", writev)
    blobs.put_many([("j/a/1", parts(b"x" * 100))])
    assert files(tmp_path) == ["spill/j/a.1"]
    assert blobs.spilled_bytes() == blobs.used_bytes() == 100


def test_partial_writes_and_thousands_of_parts_are_continued(
    blobs: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [bytes([n % 251]) * (n % 7) for n in range(3000)]
    real = os.writev

    def writev(fd: int, buffers: list[memoryview]) -> int:
        joined = b"".join(buffers)
        return real(fd, [joined[: max(1, len(joined) // 3)]])

    blobs.put_many([("j/a/1", parts(*pieces))])
    monkeypatch.setattr(blobfiles.os, "writev", writev)
    blobs.put_many([("j/a/2", parts(*pieces))])
    for view in blobs.get_many(["j/a/1", "j/a/2"]):
        assert bytes(view) == b"".join(pieces)


def test_a_truncated_file_is_a_corrupt_blob(blobs: BlobFiles, tmp_path: Path) -> None:
    codec = Codec(b"key")
    blobs.put_many([("j/a/1", codec.encode(np.ones(5000), b"").parts)])
    for size_bytes in (20_000, 10, 0):
        os.truncate(tmp_path / "root/j/a.1", size_bytes)
        with pytest.raises(CorruptBlob):
            codec.decode(blobs.get_many(["j/a/1"])[0], b"")


def test_mappings_never_use_up_the_descriptors(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        store = BlobFiles(tmp_path / "root", tmp_path / "spill", LIMIT_BYTES)
        store.put_many([("j/a/1", parts(b"x" * 10_000))])
        views = store.get_many(["j/a/1"] * 500)
        views[-1][0] = 0
        assert [bytes(view[1:]) for view in views] == [b"x" * 9_999] * 500
        store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "blob_id", ["../x", "j/../k/1", "/etc/passwd", "", "j//1", ".usage", "j/a.1"]
)
def test_an_id_cannot_name_a_file_elsewhere(blobs: BlobFiles, blob_id: str) -> None:
    for operation in (blobs.get_many, blobs.delete_many):
        with pytest.raises(SecurityError):
            operation([blob_id])
    with pytest.raises(SecurityError):
        blobs.put_many([(blob_id, parts(b"x"))])


def test_folders_and_files_are_for_this_user_only(blobs: BlobFiles, tmp_path: Path) -> None:
    blobs.put_many([("j/a/1", parts(b"x")), ("j/a/2", parts(b"x" * LIMIT_BYTES))])
    paths = list(tmp_path.rglob("*"))
    assert len(paths) == 7
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_dir()} == {0o700}
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_file()} == {0o600}
