"""Values, programs and exceptions <-> buffers: pickling, sizes, checksums, signatures.

What a wire value looks like (little-endian; offsets from its first byte):

    0   magic "WKV1" | n buffers (u32) | stream bytes (u64) | crc (u64) | MAC (32)      56 bytes
    56  n times: buffer length (u64), buffer checksum (u64)
    ..  the pickle stream, protocol 5
    ..  each out-of-band buffer, at the next multiple of 64 bytes

The MAC covers the caller's context, the stream and the table of buffers, and is checked before
anything is unpickled. Buffers are data that cannot run: they carry a checksum only, because a MAC
over them would cost more than copying them. The crc, over MAC, table and stream but without a key,
tells damage (`CorruptBlob`, the value can be computed again) from forgery (`SecurityError`).

This module does no I/O and knows no store; it alone imports cloudpickle.
"""

from __future__ import annotations

import copyreg
import hashlib
import hmac
import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt

from wukong.errors import CorruptBlob, SecurityError, SerializationError

Buffer = bytes | bytearray | memoryview

_HEAD = struct.Struct("<4sIQQ32s")
_MAGIC = b"WKV1"
_MAC_BYTES = 32
# A cache line, and the widest vector register: arrays start on it, as numpy's own large ones do.
ALIGNMENT_BYTES = 64
_PADDING = memoryview(bytes(ALIGNMENT_BYTES))
# Below this a buffer's table entry and checksum cost more than the MAC over its bytes.
_IN_BAND_BYTES = 1024
# A page sum is one uint64; 4 KB is what a file system loses, swaps or zeroes at once.
_PAGE_BYTES = 4096
# Below this zlib.crc32 alone is faster than numpy's fixed cost.
_CRC_BYTES = 16384
# Types whose C pickle is always right and needs none of cloudpickle's rules.
_PLAIN = frozenset({int, float, complex, bool, str, bytes, bytearray, type(None)})
# numpy pickles a scalar through a dtype and a byte string, in twice the time of type(item).
_SCALARS = frozenset(
    np.dtype(code).type for code in ("?", "b", "h", "i", "l", "q", "B", "H", "I", "L", "Q")
) | {np.float16, np.float32, np.float64, np.complex64, np.complex128}


# ---------------------------------------------------------------------------------------- keys


def hkdf_sha256(secret: bytes, salt: bytes, info: bytes, size_bytes: int) -> bytes:
    """Derive a key from a secret.

    Source: RFC 5869, with SHA-256.
    """
    extracted = _hkdf_extract(salt, secret)
    block, derived = b"", b""
    for counter in range(1, -(-size_bytes // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        derived += block
    return derived[:size_bytes]


@lru_cache(maxsize=16)
def _hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    """The first half of RFC 5869, which is the same for all jobs of a deployment."""
    return hmac.digest(salt or bytes(32), secret, "sha256")


def derive_key(secret: bytes, job_id: str) -> bytes:
    """Return the key (32 bytes) that signs everything of one job."""
    return hkdf_sha256(secret, b"", b"wukong job v1 " + job_id.encode(), 32)


def checksum(buffer: Buffer) -> int:
    """Return a 32-bit checksum of bytes, at the memory's own speed for large buffers.

    Large buffers are summed as uint64 for each page of 4 KB, and the crc32 of the sums is taken:
    any flipped bit, and any page swapped, lost or zeroed, changes it. It is no defence against
    intent.
    """
    view = memoryview(buffer)
    if view.nbytes < _CRC_BYTES:
        return zlib.crc32(view)
    paged_bytes = view.nbytes // _PAGE_BYTES * _PAGE_BYTES
    words = np.frombuffer(view[:paged_bytes], "<u8").reshape(-1, _PAGE_BYTES // 8)
    return zlib.crc32(view[paged_bytes:], zlib.crc32(np.add.reduce(words, axis=1)))


# -------------------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as bytes, not yet joined, so that a writer can gather them without a copy."""

    parts: list[memoryview]
    """In the order in which they are written; large arrays are views of the value's own memory."""
    size_bytes: int
    """Sum of the parts."""
    copied_bytes: int
    """Array memory that had to be copied first, because it was not contiguous."""

    def join(self) -> bytes:
        """Return everything as one byte string: for small values."""
        return b"".join(self.parts)


def _load(stream: memoryview, buffers: list[memoryview]) -> Any:
    try:
        return pickle.loads(stream, buffers=buffers)
    except MemoryError:
        raise
    except Exception as error:
        raise SerializationError(
            f"a value cannot be unpickled here: {type(error).__name__}: {error}"
        ) from error


class Codec:
    """Turns values into signed buffers and back, with the key of one job.

    `context` says what the bytes are (job, token, blob id) and is bound by the signature: bytes
    that were signed as one thing are refused as another. Thread-safe.
    """

    __slots__ = ("_keyed",)

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=_MAC_BYTES)

    def encode(
        self, value: object, context: bytes, *, is_plain: bool = False, lead: bytes = b""
    ) -> Encoded:
        """Pickle and sign a value; its arrays stay where they are, out of band.

        The parts view the value's memory: it must not change until they are written.

        Args:
            is_plain: the value holds nothing but plain data, and functions and classes, which are
                importable for the most part: then C pickle is tried first, without our rules.
            lead: sealed bytes that can be read even if the value cannot; see `decode_led`.
        Raises:
            SerializationError: the value, or a part of it, cannot be pickled.
        Cost: one read of the arrays for their checksums; copies only what is not contiguous.
        """
        stream, buffers, copied_bytes = pickle_plain(value) if is_plain else pickle_value(value)
        views = [buffer.raw() for buffer in buffers]
        if lead:
            views.insert(0, memoryview(lead))
        table = struct.pack(
            f"<{2 * len(views)}Q", *chain.from_iterable((v.nbytes, checksum(v)) for v in views)
        )
        mac = self._sign(context, table, stream)
        head = _HEAD.pack(_MAGIC, len(views), len(stream), _crc(mac, table, stream), mac)
        parts = [memoryview(head + table), memoryview(stream)]
        size_bytes = len(head) + len(table) + len(stream)
        for view in views:
            padding_bytes = -size_bytes % ALIGNMENT_BYTES
            parts += (_PADDING[:padding_bytes], view)
            size_bytes += padding_bytes + view.nbytes
        return Encoded(parts, size_bytes, copied_bytes)

    def decode(self, buffer: Buffer, context: bytes) -> Any:
        """Check and unpickle a value; its arrays view `buffer`, and are writable if that is.

        Raises:
            SecurityError: not signed with this key for this context; nothing was unpickled.
            CorruptBlob: truncated or damaged.
            SerializationError: what was pickled cannot be rebuilt here (a module is missing, ...).
        Cost: one read of the buffer, no copy of its arrays.
        """
        return _load(*self._open(memoryview(buffer).cast("B"), context))

    def decode_led(self, buffer: Buffer, context: bytes) -> tuple[memoryview, Callable[[], Any]]:
        """The lead of a value that has one, and what unpickles the value; raises as `decode`."""
        stream, buffers = self._open(memoryview(buffer).cast("B"), context)
        return self.unseal(buffers[0], context), partial(_load, stream, buffers[1:])

    def seal(self, stream: bytes, context: bytes) -> bytes:
        """Sign bytes that lead a value and are to be unpickled, as buffers are not signed."""
        return self._sign(context + b":sealed", b"", stream) + stream

    def unseal(self, sealed: Buffer, context: bytes) -> memoryview:
        """The bytes that `seal` has signed.

        Raises:
            SecurityError: they were not signed with this key for this context.
        """
        view = memoryview(sealed).cast("B")
        mac, stream = view[:_MAC_BYTES], view[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._sign(context + b":sealed", b"", stream)):
            raise SecurityError("the signature does not match the job's key and the context")
        return stream

    def _open(self, view: memoryview, context: bytes) -> tuple[memoryview, list[memoryview]]:
        """Split signed bytes into the stream and its buffers, all of them checked."""
        if view.nbytes < _HEAD.size:
            raise CorruptBlob(f"truncated: {view.nbytes} bytes do not hold a header")
        magic, n_buffers, stream_bytes, crc, mac = _HEAD.unpack_from(view)
        table_at, stream_at = _HEAD.size, _HEAD.size + 16 * n_buffers
        end_at = stream_at + stream_bytes
        if magic != _MAGIC or end_at > view.nbytes:
            raise CorruptBlob(f"damaged or truncated header of {view.nbytes} bytes")
        table, stream = view[table_at:stream_at], view[stream_at:end_at]
        if not hmac.compare_digest(mac, self._sign(context, table, stream)):
            if crc != _crc(mac, table, stream):
                raise CorruptBlob(f"damaged: the checksum of {stream_bytes} pickled bytes differs")
            raise SecurityError("the signature does not match the job's key and the context")
        entries = struct.unpack(f"<{2 * n_buffers}Q", table)
        spans = []
        for size_bytes in entries[::2]:
            start_at = end_at + -end_at % ALIGNMENT_BYTES
            end_at = start_at + size_bytes
            spans.append((start_at, end_at))
        if end_at != view.nbytes:
            raise CorruptBlob(f"truncated: {view.nbytes} of {end_at} bytes")
        buffers = [view[start_at:end_at] for start_at, end_at in spans]
        for number, (part, expected) in enumerate(zip(buffers, entries[1::2])):
            if checksum(part) != expected:
                raise CorruptBlob(
                    f"damaged: the checksum of buffer {number} ({part.nbytes} bytes) differs"
                )
        return stream, buffers

    def _sign(self, context: bytes, table: Buffer, stream: Buffer) -> bytes:
        # The lengths in front keep one field from passing as the end of another.
        mac = self._keyed.copy()
        mac.update(struct.pack("<QQQ", len(context), len(table), len(stream)) + context)
        mac.update(table)
        mac.update(stream)
        return mac.digest()


def _crc(mac: bytes, table: Buffer, stream: Buffer) -> int:
    return zlib.crc32(table, zlib.crc32(mac)) << 32 | checksum(stream)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """cloudpickle's rules at C speed for what numeric programs consist of.

    Functions and classes that cannot be imported elsewhere go by value, as cloudpickle does it.
    Its table is a ChainMap, whose look-ups in Python dominate; a plain dict is equivalent.
    """

    def __init__(self, file: io.BytesIO, keep: Callable[[pickle.PickleBuffer], bool]) -> None:
        table = cloudpickle.Pickler.dispatch_table.maps[0]
        self.dispatch_table = {**copyreg.dispatch_table, **table}
        self.copied_bytes = 0
        super().__init__(file, protocol=5, buffer_callback=keep)

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind in _SCALARS:
            return kind, (obj.item(),)
        if kind is type and (obj in _SCALARS or obj.__module__.startswith("wukong.")):
            return NotImplemented  # importable, which cloudpickle takes several us to find out
        if kind is not np.ndarray:
            return super().reducer_override(obj)
        if obj.flags.forc or obj.dtype.hasobject:
            return NotImplemented
        if 0 in obj.strides and not obj.flags.writeable:
            # np.broadcast_to (dask's ones, zeros and full) repeats few bytes: send only these.
            once = obj[tuple(slice(0, 1) if s == 0 else slice(None) for s in obj.strides)]
            return np.broadcast_to, (once, obj.shape)
        # numpy would put it into the stream as a byte string, which copies it twice.
        self.copied_bytes += obj.nbytes
        return obj.copy(order="C").__reduce_ex__(5)


def pickle_value(
    value: object, in_band_bytes: int = _IN_BAND_BYTES
) -> tuple[bytes, list[pickle.PickleBuffer], int]:
    """Pickle a value by the rules of this module; smaller buffers than given stay in the stream.

    Returns:
        The stream, the buffers that stay out of band (views of the value's arrays), and the bytes
        of arrays that had to be copied.
    Raises:
        SerializationError: names the type of the part that cannot be pickled, and the path to it.
    """
    if is_plain(value):
        return pickle.dumps(value, 5), [], 0
    buffers: list[pickle.PickleBuffer] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Say whether the pickler shall keep a buffer in its stream."""
        if buffer.raw().nbytes < in_band_bytes:
            return True
        buffers.append(buffer)
        return False

    file = io.BytesIO()
    pickler = _Pickler(file, keep)
    try:
        pickler.dump(value)
    except MemoryError:
        raise
    except Exception as error:
        raise SerializationError(_explain(value, error)) from error
    return file.getvalue(), buffers, pickler.copied_bytes


def pickle_plain(value: object) -> tuple[bytes, list[pickle.PickleBuffer], int]:
    """As `pickle_value`, for plain data with functions and classes: several times faster.

    What is not importable, or is of __main__, fails or shows, and goes by the rules instead.
    """
    if not cloudpickle.list_registry_pickle_by_value():
        try:
            stream = pickle.dumps(value, 5)
        except MemoryError:
            raise
        except Exception:
            stream = b"__main__"
        if b"__main__" not in stream and b"__mp_main__" not in stream:
            return stream, [], 0
    return pickle_value(value)


def is_plain(value: object) -> bool:
    """Whether C pickle is right for a value for sure, and a look at it tells."""
    kind = type(value)
    if kind is list or kind is tuple:
        return _PLAIN.issuperset(map(type, value))  # type: ignore[call-overload]  # a list
    return kind in _PLAIN


def pickle_in_band(value: object) -> bytes:
    """Return one byte string, arrays included, by the same rules; for small values.

    Raises: whatever pickling raises.
    """
    file = io.BytesIO()
    _Pickler(file, lambda buffer: True).dump(value)
    return file.getvalue()


def is_picklable(value: object) -> bool:
    """Try it: also false where a user's code fails while it is pickled."""
    try:
        _Pickler(io.BytesIO(), lambda buffer: False).dump(value)
    except Exception:
        return False
    return True


def _children(value: object) -> Iterator[tuple[str, object]]:
    """Yield the parts of a container or of an object's state, with the path to each."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield ".keys()", key
            yield f"[{key!r:.40}]", item
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from (("{...}", item) for item in value)
    elif isinstance(value, BaseException):
        yield from ((f".args[{number}]", item) for number, item in enumerate(value.args))
    if isinstance(closure := getattr(value, "__closure__", None), tuple):
        names = getattr(value, "__code__").co_freevars  # noqa: B009  # object has none for mypy
        yield from ((f"<{n}>", c.cell_contents) for n, c in zip(names, closure))
    if not isinstance(value, type) and hasattr(value, "__dict__"):
        yield from ((f".{name}", item) for name, item in vars(value).items())


def _explain(value: object, error: Exception) -> str:
    """Say which part of a value cannot be pickled: the path to it and its type.

    Cost: pickles parts again, at most 1,000 on each of ten levels; only for a failure.
    """
    path = ""
    for _ in range(10):
        for step, child in islice(_children(value), 1000):
            if not is_picklable(child):
                path, value = path + step, child
                break
        else:
            break
    where = f" (at value{path})" if path else ""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"an object of type {kind}{where} cannot be pickled: {type(error).__name__}: {error}"


# --------------------------------------------------------------------------------------- sizes

# How many children are looked at on each level: at most some thousands in all.
_SAMPLES = (16, 8, 4)
_OBJECT_BYTES = 32
_SMALL = _SCALARS | {int, float, complex, bool, type(None)}


def size_of(value: object) -> int:
    """Estimate the bytes of a value, to decide where it is stored; never raises.

    Exact for arrays and strings; containers and objects are sampled.
    Cost: O(1) but for a frame's columns: 0.1 us for a number, 1 us for an array, up to some 100 us
        for nested containers and 500 us for a small frame.
    """
    if type(value) in _SMALL:
        return _OBJECT_BYTES
    try:
        return max(_OBJECT_BYTES, int(_estimate(value, 0)))
    except Exception:
        # A user's property or __len__ may do anything; such a value counts as small.
        return _OBJECT_BYTES


def _estimate(value: Any, level: int) -> float:
    kind = type(value)
    if kind in _SMALL:
        return _OBJECT_BYTES
    if kind is str or kind is bytes or kind is bytearray:
        return _OBJECT_BYTES + len(value)
    if kind is np.ndarray:
        return _estimate_array(value, level)
    n_samples = _SAMPLES[min(level, len(_SAMPLES) - 1)]
    if isinstance(value, dict):
        # Both ends, since one end is often unlike the rest.
        ends = [*islice(value.items(), n_samples), *islice(reversed(value.items()), n_samples)]
        return _OBJECT_BYTES + 2 * len(value) * _mean(chain.from_iterable(ends), level)
    if isinstance(value, (list, tuple)):
        step = max(1, -(-len(value) // n_samples))
        return _OBJECT_BYTES + len(value) * _mean(value[::step], level)
    if isinstance(value, (set, frozenset)):
        return _OBJECT_BYTES + len(value) * _mean(islice(value, n_samples), level)
    # Looked up on the type: an instance's __getattr__ may be a proxy that computes.
    if getattr(kind, "nbytes", None) is not None:
        return float(value.nbytes)
    if getattr(kind, "memory_usage", None) is not None:
        return float(np.sum(value.memory_usage()))
    if isinstance(value, type) or getattr(value, "__dict__", None) is None:
        return _OBJECT_BYTES
    return _OBJECT_BYTES + _estimate(vars(value), level)


def _estimate_array(array: npt.NDArray[Any], level: int) -> float:
    if array.dtype.hasobject:
        return array.size * (array.itemsize + _mean(array.flat[: _SAMPLES[-1]].tolist(), level))
    if 0 in array.strides:
        # As it is sent: without what np.broadcast_to repeats.
        kept = [n for n, stride in zip(array.shape, array.strides) if stride]
        return array.itemsize * float(math.prod(kept))
    return float(array.nbytes)


def _mean(sample: Iterable[object], level: int) -> float:
    """Return the mean estimate of some children; those below the last level count as small."""
    if level == len(_SAMPLES):
        return _OBJECT_BYTES
    sizes = [_estimate(child, level + 1) for child in sample]
    return sum(sizes) / len(sizes) if sizes else 0
