"""Values survive the wire without copies of arrays; what is damaged or forged is refused."""

import math
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wukong.errors import CorruptBlob, SecurityError, SerializationError
from wukong.executor.serialize import (
    ALIGNMENT_BYTES,
    Codec,
    checksum,
    derive_key,
    hkdf_sha256,
    size_of,
)

CODEC = Codec(derive_key(b"secret", "job"))
CONTEXT = b"job/attempt/1"
PAGE_BYTES = 4096


def round_trip(value: object) -> Any:
    encoded = CODEC.encode(value, CONTEXT)
    joined = bytearray(encoded.join())
    assert len(joined) == encoded.size_bytes
    return CODEC.decode(joined, CONTEXT)


# ---------------------------------------------------------------------------------------- keys


# RFC 5869, appendix A, test cases 1 to 3.
RFC_5869 = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
        "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
        "cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("secret", "salt", "info", "derived"), RFC_5869)
def test_keys_are_derived_as_the_rfc_says(secret: str, salt: str, info: str, derived: str) -> None:
    key = hkdf_sha256(*map(bytes.fromhex, (secret, salt, info)), len(derived) // 2)
    assert key.hex() == derived


def test_each_job_and_each_secret_has_its_own_key() -> None:
    keys = {derive_key(secret, job) for secret in (b"a", b"b") for job in ("1", "2")}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}


# -------------------------------------------------------------------------------------- values

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=3000)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(VALUES)
def test_any_plain_value_survives(value: object) -> None:
    assert round_trip(value) == value


DTYPES = ["?", "i1", "<i4", ">i4", "<u8", "f2", "f4", "f8", "c16", "M8[ns]", "S5", "U3", "O"]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 12), max_size=3),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations([0, 1, 2]),
    step=st.sampled_from([1, 2, -1]),
)
def test_any_array_survives_in_any_layout(
    shape: list[int], dtype: str, order: list[int], step: int
) -> None:
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    array = array.transpose([axis for axis in order if axis < array.ndim])
    if array.ndim:
        array = array[::step]
    back = round_trip([array, 1])[0]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    "scalar",
    [
        np.float64(0.1),
        np.float32(0.1),
        np.float16(0.1),
        np.longdouble(1) / 3,
        np.complex64(1 + 2j),
        np.int8(-3),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.datetime64("2020-01-01"),
    ],
)
def test_a_numpy_scalar_keeps_its_type(scalar: np.generic) -> None:
    back = round_trip(scalar)
    assert type(back) is type(scalar)
    assert back == scalar


def test_a_frame_survives_with_its_columns_out_of_band() -> None:
    frame = pd.DataFrame({"a": np.arange(2000.0), "b": ["x", "y"] * 1000})
    assert len(CODEC.encode(frame, CONTEXT).parts) > 2
    pd.testing.assert_frame_equal(round_trip(frame), frame)


def test_an_array_is_neither_copied_when_encoded_nor_when_decoded() -> None:
    array = np.arange(10_000.0)
    encoded = CODEC.encode({7: array}, CONTEXT)
    assert encoded.copied_bytes == 0
    assert np.shares_memory(np.asarray(encoded.parts[-1]), array)
    assert sum(part.nbytes for part in encoded.parts[:-1]) < 500
    buffer = bytearray(encoded.join())
    back = CODEC.decode(buffer, CONTEXT)[7]
    assert np.shares_memory(back, np.frombuffer(buffer, np.uint8))
    assert back.flags.writeable
    assert not CODEC.decode(bytes(buffer), CONTEXT)[7].flags.writeable


def test_arrays_start_at_multiples_of_64_bytes() -> None:
    arrays = [np.full(2001 + n, n, np.uint8) for n in range(5)]
    encoded = CODEC.encode(arrays, CONTEXT)
    joined = np.frombuffer(encoded.join(), np.uint8)
    for back, array in zip(CODEC.decode(joined.data, CONTEXT), arrays):
        offset = back.ctypes.data - joined.ctypes.data
        assert offset % ALIGNMENT_BYTES == 0
        np.testing.assert_array_equal(back, array)


def test_only_an_array_that_is_not_contiguous_is_copied_and_once() -> None:
    array = np.arange(20_000.0).reshape(100, 200)
    assert CODEC.encode(array.T, CONTEXT).copied_bytes == 0
    encoded = CODEC.encode([array[:, ::2], array], CONTEXT)
    assert encoded.copied_bytes == array.nbytes // 2
    assert encoded.size_bytes < 1.5 * array.nbytes + 500


def test_a_broadcast_array_is_sent_without_its_repetitions() -> None:
    array = np.broadcast_to(np.arange(10.0), (1000, 10))
    assert CODEC.encode(array, CONTEXT).size_bytes < 1000
    np.testing.assert_array_equal(round_trip(array), array)


def test_functions_and_classes_that_cannot_be_imported_go_by_value() -> None:
    module = types.ModuleType("__main__")
    exec("def double(x):\n    return 2 * x\nclass Box:\n    size = 3\n", module.__dict__)
    offset = 5
    decoded = round_trip([module.double, module.Box, lambda x: x + offset])
    assert decoded[0](4) == 8
    assert decoded[1]().size == 3
    assert decoded[2](4) == 9


class Holder:
    def __init__(self) -> None:
        self.fine = 1
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"x": [1, threading.Lock()]}, "value['x'][1]"),
        ((Holder(), 2), "value[0].lock"),
        ([lambda lock=threading.Lock(): lock], "value[0]"),
        (threading.Lock(), ""),
    ],
)
def test_what_cannot_be_pickled_is_named_with_its_path(value: object, path: str) -> None:
    with pytest.raises(SerializationError, match="lock") as caught:
        CODEC.encode(value, CONTEXT)
    assert path in str(caught.value)


def test_a_value_whose_code_is_missing_here_says_so() -> None:
    module = types.ModuleType("gone_module")
    exec("class Gone:\n    pass", module.__dict__)
    sys.modules["gone_module"] = module
    encoded = CODEC.encode(module.Gone(), CONTEXT).join()
    del sys.modules["gone_module"]
    with pytest.raises(SerializationError, match="gone_module"):
        CODEC.decode(encoded, CONTEXT)


class Bomb:
    """Notes when it is unpickled."""

    exploded: list[int] = []

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        return Bomb.exploded.append, (1,)


@pytest.mark.parametrize(
    ("key", "context"), [(derive_key(b"other", "job"), CONTEXT), (None, b"job/attempt/2")]
)
def test_what_was_signed_otherwise_is_not_even_unpickled(key: bytes | None, context: bytes) -> None:
    joined = CODEC.encode(Bomb(), CONTEXT).join()
    with pytest.raises(SecurityError):
        (Codec(key) if key else CODEC).decode(joined, context)
    assert Bomb.exploded == []


def test_a_replaced_stream_with_a_right_crc_is_a_forgery() -> None:
    joined = bytearray(CODEC.encode(Bomb(), CONTEXT).join())
    forged = bytearray(Codec(b"guess").encode(Bomb(), CONTEXT).join())
    with pytest.raises(SecurityError):
        CODEC.decode(forged, CONTEXT)
    forged[24:56] = joined[24:56]
    assert CODEC.decode(forged, CONTEXT) is None, "the same bytes have the same signature"
    Bomb.exploded.clear()


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_every_flipped_bit_and_every_truncation_is_noticed(choices: st.DataObject) -> None:
    value = [1, "text", np.arange(3000), np.zeros(700)]
    joined = bytearray(CODEC.encode(value, CONTEXT).join())
    if choices.draw(st.booleans()):
        del joined[choices.draw(st.integers(0, len(joined) - 1)) :]
    else:
        parts = CODEC.encode(value, CONTEXT).parts
        at = choices.draw(st.integers(0, len(joined) - 1))
        starts = np.cumsum([0] + [part.nbytes for part in parts])
        if any(starts[n] <= at < starts[n + 1] for n in range(2, len(parts), 2)):
            return  # padding: nobody reads it
        joined[at] ^= 1 << choices.draw(st.integers(0, 7))
        if 16 <= at < 24:
            return  # the crc: nobody reads it while the signature is right
    with pytest.raises(CorruptBlob):
        CODEC.decode(joined, CONTEXT)


def test_bytes_behind_the_end_are_noticed() -> None:
    with pytest.raises(CorruptBlob):
        CODEC.decode(CODEC.encode(np.ones(1000), CONTEXT).join() + b"x", CONTEXT)


@pytest.mark.parametrize("size_bytes", [100, 16_384, 100_000, 1_000_003])
def test_the_checksum_notices_what_happens_to_files(size_bytes: int) -> None:
    original = np.random.default_rng(0).integers(0, 256, size_bytes, np.uint8)
    seen = {checksum(original.data)}
    for at in (0, size_bytes // 2, size_bytes - 1):
        changed = original.copy()
        changed[at] ^= 128
        seen.add(checksum(changed.data))
    seen.add(checksum(original[:-1].data))
    seen.add(checksum(bytes(size_bytes)))
    if size_bytes > 3 * PAGE_BYTES:
        swapped = original.copy()
        swapped[:PAGE_BYTES] = original[PAGE_BYTES : 2 * PAGE_BYTES]
        swapped[PAGE_BYTES : 2 * PAGE_BYTES] = original[:PAGE_BYTES]
        zeroed = original.copy()
        zeroed[-PAGE_BYTES:] = 0
        seen |= {checksum(swapped.data), checksum(zeroed.data)}
        assert len(seen) == 8
    else:
        assert len(seen) == 6
    assert checksum(original.tobytes()) in seen


# --------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        (3, 1, 100),
        (np.ones(1000), 8000, 8100),
        (np.broadcast_to(np.ones(1), (10_000, 100)), 1, 100),
        (b"x" * 5000, 5000, 5100),
        ("x" * 5000, 5000, 5100),
        ([np.ones(1000)] * 500, 4_000_000, 4_100_000),
        ({n: np.ones(1000) for n in range(50)}, 400_000, 420_000),
        (pd.DataFrame({"a": np.ones(1000), "b": np.ones(1000)}), 16_000, 17_000),
        (types.SimpleNamespace(a=np.ones(1000)), 8000, 20_000),
        (np.array(["x" * 1000] * 100, dtype=object), 100_000, 120_000),
    ],
)
def test_sizes_are_estimated(value: object, low: int, high: int) -> None:
    assert low <= size_of(value) <= high


def test_a_size_is_always_given() -> None:
    class Hostile:
        @property
        def nbytes(self) -> int:
            raise RuntimeError

    cycle: list[object] = []
    cycle.append(cycle)
    for value in (Hostile(), cycle, object(), Hostile, pd, lambda: 1, {1: {2: {3: {4: {5: 6}}}}}):
        assert size_of(value) >= 1
