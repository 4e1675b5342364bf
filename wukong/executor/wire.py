"""How programs, values and errors of one job cross a store: as signed bytes, or as the objects.

An `Entry` of a store with blobs holds bytes that were signed with the job's key (`SignedWire`). In
`memory://` it holds the objects themselves (`ObjectWire`): nothing is encoded, copied or measured.
Executors and clients read and write entries through these two classes only.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, Protocol

from wukong.errors import CorruptBlob, MissingBlob, SecurityError, SerializationError
from wukong.executor.kept import Kept
from wukong.executor.messages import BlobId, Entry, ExportId, JobId, Located, Part
from wukong.executor.serialize import Codec, Encoded, derive_key
from wukong.executor.serialize_failures import (
    Failure,
    Raised,
    decode_error,
    encode_error,
    note_key,
)
from wukong.executor.serialize_programs import Program, decode_part, decode_program, encode_program
from wukong.storage import Store
from wukong.storage.contract import BlobStore, sized_id, stem_of

PROGRAM_INLINE_BYTES = 64 * 1024
"""Programs up to this size are rows of the job; larger ones are blobs."""
OWNERS_KEPT = 100
"""Values of one job, that own something, which an executor keeps while it knows the job."""
OBJECTS_LOOKED_AT = 64
"""How far a value is searched for what it owns."""
_PLAIN_PACKAGES = frozenset({"builtins", "datetime", "numpy", "pandas", "pyarrow", "scipy"})
"""Values of their types own memory only."""

Error = Failure | Raised
"""A task's exception as a value."""


@dataclass(slots=True)
class Traffic:
    """Exact counters of what one side has moved; read and reset with each record."""

    bytes_read: int = 0
    bytes_written: int = 0
    blob_bytes_written: int = 0
    n_blobs_read: int = 0
    n_blobs_written: int = 0
    n_round_trips: int = 0
    copied_bytes: int = 0

    def reset(self) -> None:
        """Start again from zero."""
        self.bytes_read = self.bytes_written = self.blob_bytes_written = 0
        self.n_blobs_read = self.n_blobs_written = self.n_round_trips = self.copied_bytes = 0


class UnreadableExports(Exception):
    """Blobs of these exports are gone or damaged. Internal: a driver turns it into an event."""

    def __init__(self, exports: tuple[ExportId, ...], cause: str) -> None:
        super().__init__(cause)
        self.exports = exports


@dataclass(frozen=True, slots=True)
class PutRequest:
    """One entry to be made: values (n) of the tasks (n), inline or as a blob."""

    export: ExportId
    tasks: tuple[int, ...]
    values: list[object]
    blob: BlobId | None
    """The stem of the blob's id; the entry has the id. None: inline."""


class Wire(Protocol):
    """What executors and clients need of either kind."""

    is_measured: bool
    """Sizes matter: large values become blobs."""

    def put(self, requests: Sequence[PutRequest]) -> list[tuple[ExportId, Entry]]:
        """Make entries; on return their blobs are durable.

        Raises:
            SerializationError: its `task` names the value that cannot be pickled.
            StoreUnavailable: nothing of it is named anywhere; put again.
        """
        ...

    def read(
        self, located: Iterable[Located], is_wanted: Callable[[int], bool]
    ) -> dict[int, object]:
        """Values of recorded exports, by task; entries without a wanted value are not touched.

        Raises:
            UnreadableExports: blobs are gone or damaged.
            SecurityError, SerializationError: a value may not, or cannot, be unpickled here.
        """
        ...

    def free(self, located: Iterable[Located], values: Set[int]) -> None:
        """Give back the memory of values that nobody will read, where that is possible alone."""
        ...

    def put_program(self, program: Program, blob: BlobId) -> Entry:
        """Make the entry of a strand's program: inline if it is small, else a blob of that stem."""
        ...

    def read_program(self, entry: Entry) -> Program:
        """The program of a strand; raises as `read`."""
        ...

    def read_part(self, entry: Entry) -> Part | None:
        """The part of a strand whose program may be unreadable; None if it is unreadable too."""
        ...

    def put_manifest(self, manifest: object) -> bytes | object:
        """Make the payload from which a later client gathers the job."""
        ...

    def read_manifest(self, payload: bytes | object) -> Any:
        """What `put_manifest` was given."""
        ...

    def failure(self, error: BaseException, task: int) -> Error:
        """Make a value of a task's exception; of no task in particular if it is negative."""
        ...

    def put_error(self, error: Error) -> bytes | object:
        """Make the payload that ends a fail-fast job."""
        ...

    def read_error(self, payload: bytes | object) -> Error:
        """What `put_error` encoded."""
        ...


class ObjectWire:
    """Hands the objects over: for stores inside one process."""

    is_measured = False

    def put(self, requests: Sequence[PutRequest]) -> list[tuple[ExportId, Entry]]:
        """See `Wire.put`."""
        return [(r.export, Entry(r.tasks, None, r.values, 0, _count(r.values))) for r in requests]

    def read(
        self, located: Iterable[Located], is_wanted: Callable[[int], bool]
    ) -> dict[int, object]:
        """See `Wire.read`."""
        values: dict[int, object] = {}
        for _, entries in located:
            for entry in entries:
                values.update(zip(entry.tasks, entry.payload))  # type: ignore[call-overload]  # the list that put() was given
        return values

    def free(self, located: Iterable[Located], values: Set[int]) -> None:
        """See `Wire.free`: the store holds the very lists that `put` has made entries of."""
        for _, entries in located:
            for entry in entries:
                assert isinstance(entry.payload, list)
                for i, task in enumerate(entry.tasks):
                    if task in values:
                        entry.payload[i] = None

    def put_program(self, program: Program, blob: BlobId) -> Entry:
        """See `Wire.put_program`."""
        return Entry((), None, program, 0, 0)

    def read_program(self, entry: Entry) -> Program:
        """See `Wire.read_program`."""
        assert isinstance(entry.payload, Program)
        return entry.payload

    def read_part(self, entry: Entry) -> Part | None:
        """See `Wire.read_part`."""
        return self.read_program(entry).part

    def put_manifest(self, manifest: object) -> bytes | object:
        """See `Wire.put_manifest`."""
        return manifest

    def read_manifest(self, payload: bytes | object) -> Any:
        """See `Wire.read_manifest`."""
        return payload

    def failure(self, error: BaseException, task: int) -> Error:
        """See `Wire.failure`."""
        return Raised(error, None if task < 0 else task)

    def put_error(self, error: Error) -> bytes | object:
        """See `Wire.put_error`."""
        return error

    def read_error(self, payload: bytes | object) -> Error:
        """See `Wire.read_error`."""
        assert isinstance(payload, Failure | Raised)
        return payload


class SignedWire:
    """Encodes with the job's key: for stores that other processes can read and write.

    Args:
        job: the job, which every signature binds.
        codec: has the job's key.
        blobs: where what is not inline goes.
        traffic: is counted up; shared by all jobs of an executor or client.
        kept: values of blobs that need not be read; shared likewise.
    """

    is_measured = True

    def __init__(
        self, job: JobId, codec: Codec, blobs: BlobStore, traffic: Traffic, kept: Kept
    ) -> None:
        self._job = job
        self._codec = codec
        self._blobs = blobs
        self._traffic = traffic
        self._kept = kept
        self._owners: list[object] = []
        """Values that were put, and whose end would undo what their copies rely on."""

    def put(self, requests: Sequence[PutRequest]) -> list[tuple[ExportId, Entry]]:
        """See `Wire.put`."""
        made: list[tuple[ExportId, Entry]] = []
        blobs: list[tuple[BlobId, Encoded]] = []
        for request in requests:
            encoded = self._encode(request)
            payload = blob = None
            if request.blob is None:
                payload = encoded.join()
            else:
                blob = sized_id(request.blob, encoded.size_bytes)
                blobs.append((blob, encoded))
            n_errors = _count(request.values)
            entry = Entry(request.tasks, blob, payload, encoded.size_bytes, n_errors)
            made.append((request.export, entry))
            for value in request.values:
                if len(self._owners) < OWNERS_KEPT and owns_something(value):
                    self._owners.append(value)
        self._put_blobs(blobs)
        for request, (_, entry) in zip(requests, made):
            if entry.blob is not None:
                self._kept.add(entry.blob, request.values, entry.size_bytes)
        return made

    def _encode(self, request: PutRequest) -> Encoded:
        context = self._context(request.blob or request.export)
        try:
            encoded = self._codec.encode(request.values, context)
        except SerializationError as error:
            for task, value in zip(request.tasks, request.values, strict=True):
                try:
                    self._codec.encode(value, context)
                except SerializationError as found:
                    raise SerializationError(str(found), task) from error
            raise
        self._traffic.bytes_written += encoded.size_bytes
        self._traffic.copied_bytes += encoded.copied_bytes
        return encoded

    def _put_blobs(self, blobs: list[tuple[BlobId, Encoded]]) -> None:
        if not blobs:
            return
        self._blobs.put_many([(blob, encoded.parts) for blob, encoded in blobs])
        n_bytes = sum(encoded.size_bytes for _, encoded in blobs)
        self._traffic.blob_bytes_written += n_bytes
        self._traffic.copied_bytes += n_bytes
        self._traffic.n_blobs_written += len(blobs)
        self._traffic.n_round_trips += 1

    def read(
        self, located: Iterable[Located], is_wanted: Callable[[int], bool]
    ) -> dict[int, object]:
        """See `Wire.read`."""
        values: dict[int, object] = {}
        wanted = [
            (export, entry)
            for export, entries in located
            for entry in entries
            if any(map(is_wanted, entry.tasks))
        ]
        ids: list[tuple[ExportId, BlobId]] = []
        rest: list[tuple[ExportId, Entry]] = []
        for export, entry in wanted:
            if entry.blob is not None:
                if (kept := self._kept.get(entry.blob)) is not None:
                    values.update(zip(entry.tasks, kept, strict=True))
                    continue
                ids.append((export, entry.blob))
            rest.append((export, entry))
        views = dict(zip((blob for _, blob in ids), self._get(ids), strict=True))
        lost: list[tuple[ExportId, str]] = []
        for export, entry in rest:
            if entry.blob is None:
                # A copy that can be written to: tasks expect to own small arrays.
                buffer, context = bytearray(entry.payload), self._context(export)  # type: ignore[call-overload]  # bytes, since put() encoded it
            else:
                buffer, context = views[entry.blob], self._context(stem_of(entry.blob))
            try:
                decoded = self._codec.decode(buffer, context)
            except CorruptBlob as error:
                lost.append((export, str(error)))
                continue
            values.update(zip(entry.tasks, decoded, strict=True))
            if entry.blob is not None:
                self._kept.add(entry.blob, decoded, entry.size_bytes)
            self._traffic.bytes_read += entry.size_bytes
        if lost:
            raise UnreadableExports(tuple(sorted({e for e, _ in lost})), lost[0][1])
        return values

    def _get(self, ids: list[tuple[ExportId, BlobId]]) -> list[memoryview]:
        if not ids:
            return []
        self._traffic.n_round_trips += 1
        self._traffic.n_blobs_read += len(ids)
        try:
            return self._blobs.get_many([blob for _, blob in ids])
        except MissingBlob as error:
            cause = str(error)
        lost = []
        for export, blob in ids:  # find them all, so that one new generation repairs them all
            try:
                self._blobs.get_many([blob])
            except MissingBlob:
                lost.append(export)
        raise UnreadableExports(tuple(sorted(set(lost))), cause)

    def free(self, located: Iterable[Located], values: Set[int]) -> None:
        """See `Wire.free`."""
        entries = [entry for _, entries in located for entry in entries]
        blobs = [e.blob for e in entries if e.blob is not None and values >= set(e.tasks)]
        if blobs:
            self._blobs.delete_many(blobs)

    def put_program(self, program: Program, blob: BlobId) -> Entry:
        """See `Wire.put_program`."""
        encoded = encode_program(self._codec, self._context("program"), program)
        self._traffic.bytes_written += encoded.size_bytes
        self._traffic.copied_bytes += encoded.copied_bytes
        if encoded.size_bytes <= PROGRAM_INLINE_BYTES:
            return Entry((), None, encoded.join(), encoded.size_bytes, 0)
        blob = sized_id(blob, encoded.size_bytes)
        self._put_blobs([(blob, encoded)])
        return Entry((), blob, None, encoded.size_bytes, 0)

    def read_program(self, entry: Entry) -> Program:
        """See `Wire.read_program`."""
        buffer = self._program_buffer(entry)
        return decode_program(self._codec, self._context("program"), buffer)  # type: ignore[arg-type]  # bytes

    def read_part(self, entry: Entry) -> Part | None:
        """See `Wire.read_part`."""
        try:
            buffer = self._program_buffer(entry)
            return decode_part(self._codec, self._context("program"), buffer)  # type: ignore[arg-type]  # bytes
        except (MissingBlob, CorruptBlob, SecurityError):
            return None

    def _program_buffer(self, entry: Entry) -> object:
        buffer = entry.payload
        if entry.blob is not None:
            self._traffic.n_round_trips += 1
            buffer = self._blobs.get_many([entry.blob])[0]
        self._traffic.bytes_read += entry.size_bytes
        return buffer

    def put_manifest(self, manifest: object) -> bytes | object:
        """See `Wire.put_manifest`."""
        return self._codec.encode(manifest, self._context("manifest"), is_plain=True).join()

    def read_manifest(self, payload: bytes | object) -> Any:
        """See `Wire.read_manifest`."""
        return self._codec.decode(payload, self._context("manifest"))  # type: ignore[arg-type]  # bytes

    def failure(self, error: BaseException, task: int) -> Error:
        """See `Wire.failure`."""
        return encode_error(error, None if task < 0 else task)

    def put_error(self, error: Error) -> bytes | object:
        """See `Wire.put_error`."""
        return self._codec.encode(error, self._context("error")).join()

    def read_error(self, payload: bytes | object) -> Error:
        """See `Wire.read_error`."""
        error = self._codec.decode(payload, self._context("error"))  # type: ignore[arg-type]  # bytes
        assert isinstance(error, Failure)
        return error

    def _context(self, name: str) -> bytes:
        return f"{self._job}:{name}".encode()


def open_wire(store: Store, job: JobId, traffic: Traffic, kept: Kept | None = None) -> Wire:
    """The wire of one job on a store; counts in `traffic`, and keeps no values without `kept`."""
    if store.blobs is None:
        return ObjectWire()
    codec = Codec(derive_key(store.secret, job))
    return SignedWire(job, codec, store.blobs, traffic, Kept(0) if kept is None else kept)


def owns_something(value: object) -> bool:
    """Does the value's end undo something outside of it, as partd's files remove their folder?

    Cost: 0.1 us for plain data, some 10 us for an object of a user's class.
    """
    if type(value).__module__.partition(".")[0] in _PLAIN_PACKAGES:
        return False
    seen: set[int] = set()
    stack = [value]
    while stack and len(seen) < OBJECTS_LOOKED_AT:
        found = stack.pop()
        if hasattr(type(found), "__del__") or isinstance(found, weakref.finalize):
            return True
        if id(found) not in seen and not isinstance(found, type | ModuleType | FunctionType):
            seen.add(id(found))
            stack.extend(gc.get_referents(found))
    return False


def raise_error(error: Error, key: object) -> BaseException:
    """The exception to raise in the client for an error value; `key` is the task's, in Dask."""
    if isinstance(error, Raised):
        note_key(error.error, key)
        return error.error
    return decode_error(error, key)


def _count(values: list[object]) -> int:
    return sum(isinstance(value, Failure | Raised) for value in values)
