"""Every job store passes the same suite, and does what the memory store does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("storage_contract", "storage_contract_jobs")

from storage_contract import SILENCE_S, Clock, TokenContract  # noqa: E402 - to be rewritten
from storage_contract_jobs import JobContract  # noqa: E402 - to be rewritten

from wukong.storage import open_store  # noqa: E402
from wukong.storage.local import LocalJobStore  # noqa: E402
from wukong.storage.local_rows import StoredRows  # noqa: E402
from wukong.storage.memory import MemoryJobStore  # noqa: E402
from wukong.storage.state import TABLES  # noqa: E402


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


class TestMemoryJobs(JobContract):
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


class TestLocalJobs(JobContract):
    @pytest.fixture
    def backend(self, local_backend: LocalBackend) -> LocalBackend:
        return local_backend
