"""The suite that every blob store passes: its tests inherit `BlobContract` and give it `blobs`.

The ids are as the wire makes them: each says the size of its blob.
"""

from __future__ import annotations

import threading

import pytest

from wukong.errors import MissingBlob
from wukong.executor.messages import BlobId, JobId
from wukong.storage.contract import BlobStore, sized_id

SIZES = (0, 1, 100, 4096, 65_536, 300_000)
JOB = JobId("0123456789abcdef")


def parts(*pieces: bytes) -> list[memoryview]:
    return [memoryview(piece) for piece in pieces]


def pattern(size_bytes: int, first: int = 0) -> bytes:
    """Bytes of which no two pages are alike."""
    return b"".join(i.to_bytes(8, "little") for i in range(first, first + size_bytes // 8 + 1))[
        :size_bytes
    ]


def blob_of(number: int, content: bytes, job: str = JOB) -> BlobId:
    return sized_id(f"{job}/a/{number}", len(content))


class BlobContract:
    """What callers of `BlobStore` rely on."""

    @pytest.mark.parametrize("size_bytes", SIZES)
    def test_a_blob_comes_back_as_it_was_put(self, blobs: BlobStore, size_bytes: int) -> None:
        content = pattern(size_bytes)
        blob = blob_of(0, content)
        blobs.put_many([(blob, parts(content))])
        assert bytes(blobs.get_many([blob])[0]) == content
        assert blobs.used_bytes() == size_bytes

    def test_a_blob_is_put_as_its_parts_in_order(self, blobs: BlobStore) -> None:
        pieces = [pattern(n, n) for n in (7, 0, 70_001, 3, 150_000)]
        content = b"".join(pieces)
        blob = blob_of(0, content)
        blobs.put_many([(blob, parts(*pieces))])
        assert bytes(blobs.get_many([blob])[0]) == content

    def test_parts_of_any_shape_are_bytes(self, blobs: BlobStore) -> None:
        content = pattern(4096)
        shaped = memoryview(content).cast("d", (64, 8))
        blob = blob_of(0, content)
        blobs.put_many([(blob, [shaped, *parts(b"")])])
        assert bytes(blobs.get_many([blob])[0]) == content

    def test_many_blobs_of_all_sizes_come_back_in_the_order_asked_for(
        self, blobs: BlobStore
    ) -> None:
        contents = {blob_of(i, c := pattern(size, i)): c for i, size in enumerate(SIZES * 2)}
        blobs.put_many([(blob, parts(content)) for blob, content in contents.items()])
        asked = [*reversed(contents)]
        assert [bytes(view) for view in blobs.get_many(asked)] == [contents[b] for b in asked]
        assert blobs.used_bytes() == 2 * sum(SIZES)

    def test_nothing_is_asked_for_and_nothing_comes(self, blobs: BlobStore) -> None:
        blobs.put_many([])
        blobs.delete_many([])
        assert blobs.get_many([]) == []

    @pytest.mark.parametrize("size_bytes", SIZES[1:])
    def test_what_is_read_may_be_written_to_without_effect(
        self, blobs: BlobStore, size_bytes: int
    ) -> None:
        content = pattern(size_bytes)
        blob = blob_of(0, content)
        blobs.put_many([(blob, parts(content))])
        view = blobs.get_many([blob])[0]
        view[:] = bytes(size_bytes)
        assert bytes(blobs.get_many([blob])[0]) == content

    @pytest.mark.parametrize("size_bytes", SIZES)
    def test_a_missing_blob_is_named(self, blobs: BlobStore, size_bytes: int) -> None:
        content = pattern(size_bytes)
        there, gone = blob_of(0, content), blob_of(1, content)
        blobs.put_many([(there, parts(content))])
        with pytest.raises(MissingBlob, match=gone):
            blobs.get_many([gone])
        with pytest.raises(MissingBlob, match=gone):
            blobs.get_many([there, gone])

    def test_deleting_twice_is_no_error(self, blobs: BlobStore) -> None:
        contents = {blob_of(i, c := pattern(size, i)): c for i, size in enumerate(SIZES)}
        blobs.put_many([(blob, parts(content)) for blob, content in contents.items()])
        deleted, kept = [*contents][::2], [*contents][1::2]
        for _ in range(2):
            blobs.delete_many([*deleted, blob_of(99, b"never put")])
            assert blobs.used_bytes() == sum(len(contents[blob]) for blob in kept)
        assert [bytes(view) for view in blobs.get_many(kept)] == [contents[b] for b in kept]

    def test_a_job_goes_with_all_its_blobs_and_no_others(self, blobs: BlobStore) -> None:
        other = f"{JOB}0"  # its id begins as the first one's
        for job in (JOB, other):
            made = [(blob_of(i, c := pattern(size), job), c) for i, size in enumerate(SIZES)]
            blobs.put_many([(blob, parts(content)) for blob, content in made])
        for _ in range(2):
            blobs.delete_job(JOB)
            assert blobs.used_bytes() == sum(SIZES)

    def test_a_put_that_is_repeated_changes_nothing(self, blobs: BlobStore) -> None:
        content = pattern(70_000)
        blob = blob_of(0, content)
        for _ in range(2):
            blobs.put_many([(blob, parts(content))])
        assert bytes(blobs.get_many([blob])[0]) == content
        assert blobs.used_bytes() == len(content)

    def test_many_threads_use_it_at_once(self, blobs: BlobStore) -> None:
        failures: list[BaseException] = []

        def use(number: int) -> None:
            try:
                for size in (100, 70_000):
                    content = pattern(size, number)
                    blob = sized_id(f"{JOB}/t{number}/0", size)
                    blobs.put_many([(blob, parts(content))])
                    assert bytes(blobs.get_many([blob])[0]) == content
                    blobs.delete_many([blob])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert blobs.used_bytes() == 0
