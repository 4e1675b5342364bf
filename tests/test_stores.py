"""Every job store passes the same suite, and does what the memory store does."""

# The suite's modules are imported after pytest has been told to explain their asserts.
# ruff: noqa: E402

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.register_assert_rewrite(
    "storage_contract", "storage_contract_jobs", "storage_contract_open", "storage_walk"
)

from storage_contract import SILENCE_S, Clock, TokenContract
from storage_contract_jobs import JobContract, QueueContract
from storage_contract_open import OpenContract
from storage_walk import Walk

from wukong.storage import open_store
from wukong.storage.local import LocalJobStore
from wukong.storage.local_files import remove_directory, spill_directory
from wukong.storage.local_rows import StoredRows
from wukong.storage.memory import MemoryJobStore
from wukong.storage.rows import TABLES


class MemoryBackend:
    """The memory store and its rows."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = MemoryJobStore(SILENCE_S, self.clock)

    def rows(self, job: str) -> dict[tuple[str, str], object]:
        found = self.store._jobs.get(job)
        if found is None:
            return {}
        return {(table.code, key): row for table in TABLES for key, row in found.scan(table)}


class LocalBackend:
    """The embedded store and its rows."""

    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.store = LocalJobStore(directory, SILENCE_S, self.clock)

    def rows(self, job: str) -> dict[tuple[str, str], object]:
        def read(rows: StoredRows) -> dict[tuple[str, str], object]:
            return {(table.code, key): row for table in TABLES for key, row in rows.scan(table)}

        return self.store._look(job, read)


class TestMemoryTokens(TokenContract):
    @pytest.fixture
    def backend(self) -> MemoryBackend:
        return MemoryBackend()


class TestMemoryJobs(JobContract, QueueContract):
    @pytest.fixture
    def backend(self) -> MemoryBackend:
        return MemoryBackend()


class TestMemoryOpenJobs(OpenContract):
    @pytest.fixture
    def backend(self) -> MemoryBackend:
        return MemoryBackend()


@pytest.fixture
def local_backend(tmp_path: Path) -> Iterator[LocalBackend]:
    backend = LocalBackend(tmp_path / "store")
    yield backend
    backend.store.close()


class TestLocalTokens(TokenContract):
    @pytest.fixture
    def backend(self, local_backend: LocalBackend) -> LocalBackend:
        return local_backend


class TestLocalJobs(JobContract, QueueContract):
    @pytest.fixture
    def backend(self, local_backend: LocalBackend) -> LocalBackend:
        return local_backend


class TestLocalOpenJobs(OpenContract):
    @pytest.fixture
    def backend(self, local_backend: LocalBackend) -> LocalBackend:
        return local_backend


@pytest.mark.slow
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.randoms(use_true_random=False))
def test_the_embedded_store_does_what_the_memory_store_does(
    local_backend: LocalBackend, random: Random
) -> None:
    local_backend.clock.now = 1000.0
    walk = Walk(random, MemoryBackend(), local_backend)
    try:
        walk.run(n_steps=50)
    finally:
        walk.forget()


def test_a_url_names_the_store(tmp_path: Path) -> None:
    memory = open_store("memory://")
    assert isinstance(memory.jobs, MemoryJobStore)
    assert (memory.blobs, len(memory.secret)) == (None, 32)
    local = open_store(f"local://{tmp_path}/store")
    assert isinstance(local.jobs, LocalJobStore)
    assert local.blobs is not None
    local.blobs.put_many([("job/a/1", [memoryview(b"bytes")])])
    assert bytes(local.blobs.get_many(["job/a/1"])[0]) == b"bytes"
    again = open_store(f"local://{tmp_path}/store")
    assert again.secret == local.secret == local.jobs.secret
    again.jobs.close()
    local.jobs.close()
    spill = spill_directory(local.jobs.directory)
    remove_directory(local.jobs.directory)
    assert not spill.exists()


@pytest.mark.parametrize("url", ["", "memory", "local://", "local://host/path", "redis:/x", "/tmp"])
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no such store"):
        open_store(url)
