"""What an environment keeps between invocations."""

import pytest

from wukong.errors import MissingBlob
from wukong.executor.aws_lambda_warm import WarmBlobs
from wukong.executor.messages import BlobId, JobId
from wukong.storage.contract import BlobStore


class Counting(BlobStore):
    """Blobs in a dictionary, and how often they were asked for."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.asked: list[list[str]] = []

    def put_many(self, items):  # type: ignore[no-untyped-def]
        self.blobs.update((blob, b"".join(parts)) for blob, parts in items)

    def get_many(self, ids):  # type: ignore[no-untyped-def]
        self.asked.append(list(ids))
        for blob in ids:
            if blob not in self.blobs:
                raise MissingBlob(blob)
        return [memoryview(bytearray(self.blobs[blob])) for blob in ids]

    def delete_many(self, ids):  # type: ignore[no-untyped-def]
        for blob in ids:
            self.blobs.pop(blob, None)

    def delete_job(self, job):  # type: ignore[no-untyped-def]
        self.blobs = {k: v for k, v in self.blobs.items() if not k.startswith(f"{job}/")}

    def used_bytes(self) -> int:
        return sum(map(len, self.blobs.values()))

    def close(self) -> None:
        pass


A, B, C = BlobId("j/1/0"), BlobId("j/1/1"), BlobId("k/1/0")


def filled(limit_bytes: int, size_bytes: int = 100) -> tuple[Counting, WarmBlobs]:
    inner = Counting()
    warm = WarmBlobs(inner, limit_bytes)
    warm.put_many([(blob, [memoryview(blob.encode() * size_bytes)]) for blob in (A, B, C)])
    return inner, warm


def test_a_blob_is_fetched_once() -> None:
    inner, warm = filled(1 << 20)
    first = warm.get_many([A, B])
    again = warm.get_many([B, C, A])
    assert inner.asked == [[A, B], [C]]
    assert bytes(again[0]) == bytes(first[1])
    assert bytes(again[2]) == bytes(first[0])
    assert warm.n_hits == 2


def test_what_a_task_does_to_its_copy_nobody_else_sees() -> None:
    _, warm = filled(1 << 20)
    for _ in range(3):
        (view,) = warm.get_many([A])
        assert bytes(view[:5]) == A.encode()
        view[:5] = b"?????"


def test_copies_stay_within_their_bound_and_the_oldest_goes() -> None:
    inner, warm = filled(1000, size_bytes=40)  # 200 bytes each: 5 fit
    for i in range(20):
        warm.put_many([(BlobId(f"j/2/{i}"), [memoryview(bytes(200))])])
        warm.get_many([BlobId(f"j/2/{i}")])
        assert warm.kept_bytes() <= 1000
    inner.asked.clear()
    warm.get_many([BlobId("j/2/19")])
    assert inner.asked == []
    warm.get_many([BlobId("j/2/0")])
    assert inner.asked == [["j/2/0"]]


def test_one_large_blob_does_not_push_out_the_others() -> None:
    _, warm = filled(1000, size_bytes=100)
    warm.get_many([A])
    assert warm.kept_bytes() == 0


def test_deleted_blobs_are_gone_here_too() -> None:
    inner, warm = filled(1 << 20)
    warm.get_many([A, B, C])
    warm.delete_many([A])
    with pytest.raises(MissingBlob):
        warm.get_many([A])
    warm.delete_job(JobId("j"))
    assert warm.kept_bytes() == len(C) * 100
    assert list(inner.blobs) == [C]
