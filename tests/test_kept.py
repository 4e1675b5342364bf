"""What an executor keeps of blobs: nothing is mapped or checked twice, and memory is bounded."""

import numpy as np
import pytest

from wukong.errors import CorruptBlob
from wukong.executor.kept import Kept
from wukong.executor.messages import BlobId, ExportId, JobId, Located
from wukong.executor.serialize import Codec
from wukong.executor.wire import PutRequest, SignedWire, Traffic, UnreadableExports
from wukong.storage.blobfiles import BlobFiles

LIMIT_BYTES = 1 << 20
JOB, EXPORT = JobId("job"), ExportId("e")


class CountedBlobs(BlobFiles):
    """Counts the blobs that are mapped."""

    n_mapped = 0

    def get_many(self, blob_ids):
        self.n_mapped += len(blob_ids)
        return super().get_many(blob_ids)


@pytest.fixture
def blobs(tmp_path):
    files = CountedBlobs(tmp_path / "blobs", tmp_path / "spill", 1 << 24)
    yield files
    files.close()


def new_wire(blobs, limit_bytes=LIMIT_BYTES):
    """The wire of an executor of its own."""
    return SignedWire(JOB, Codec(b"k" * 32), blobs, Traffic(), Kept(limit_bytes))


def put(wire, value, number=0):
    return wire.put([PutRequest(EXPORT, (7,), [value], BlobId(f"job/attempt/{number}"))])[0][1]


def read(wire, entry):
    return wire.read([Located(EXPORT, (entry,))], lambda task: True)[7]


def test_who_has_put_a_blob_does_not_map_it(blobs):
    wire, value = new_wire(blobs), np.arange(1000)
    assert read(wire, put(wire, value)) is value
    assert blobs.n_mapped == 0


def test_a_second_read_of_a_blob_maps_nothing(blobs):
    entry = put(new_wire(blobs), np.arange(1000))
    reader = new_wire(blobs)
    first = read(reader, entry)
    assert read(reader, entry) is first
    assert (first == np.arange(1000)).all()
    assert blobs.n_mapped == 1
    assert reader._traffic.bytes_read == entry.size_bytes, "what is kept is not read"


def test_with_the_switch_off_every_read_maps(blobs):
    wire = new_wire(blobs, limit_bytes=0)
    entry = put(wire, np.arange(1000))
    read(wire, entry), read(wire, entry)
    assert blobs.n_mapped == 2


def test_the_first_read_by_another_process_is_checked(blobs, tmp_path):
    entry = put(new_wire(blobs), np.arange(1000))
    (path,) = (tmp_path / "blobs" / "job").iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    reader = new_wire(blobs)
    for _ in range(2):
        with pytest.raises(UnreadableExports):
            read(reader, entry)
    assert blobs.n_mapped == 2, "what is damaged is not kept"
    with pytest.raises(CorruptBlob):
        reader._codec.decode(bytes(damaged), b"job:job/attempt/0")


@pytest.mark.parametrize("value", [[1] * 500, {"a": np.arange(1000)}, np.array([[], {}], object)])
def test_what_tasks_may_alter_is_read_anew(blobs, value):
    wire = new_wire(blobs)
    entry = put(wire, value)
    read(wire, entry), read(wire, entry)
    assert blobs.n_mapped == 2


def test_what_was_used_longest_ago_goes_first_when_the_bound_is_reached():
    kept, value = Kept(100), np.zeros(1)
    for name in "abc":
        kept.add(BlobId(name), [value], 40)
        kept.get(BlobId("a"))
    assert [kept.get(BlobId(name)) is not None for name in "abc"] == [True, False, True]
    assert kept.n_bytes == 80


def test_what_is_larger_than_the_bound_pushes_nothing_out():
    kept, value = Kept(100), np.zeros(1)
    kept.add(BlobId("a"), [value], 40)
    kept.add(BlobId("b"), [value], 101)
    assert kept.get(BlobId("a")) is not None
    assert kept.get(BlobId("b")) is None


def test_deleted_blobs_are_dropped():
    kept = Kept(100)
    kept.add(BlobId("a"), [np.zeros(1)], 40)
    kept.drop([BlobId("a"), BlobId("b")])
    assert kept.get(BlobId("a")) is None
    assert kept.n_bytes == 0


def test_a_piece_of_a_larger_array_is_not_kept():
    kept, whole = Kept(1 << 20), np.zeros((100, 100))
    kept.add(BlobId("piece"), [whole[:50]], 40_000)
    kept.add(BlobId("turned"), [whole.T], 80_000)
    assert kept.get(BlobId("piece")) is None
    assert kept.get(BlobId("turned")) is not None
