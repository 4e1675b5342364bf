"""Frames of leased executors, and the arenas in which their buffers lie."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wukong.errors import FrameError
from wukong.rdma.arena import ALIGNMENT_BYTES, Arena
from wukong.rdma.frames import HEAD, HEAD_BYTES, LENT, Frame, Kind, pack_frame, parse_frame

ARENA_BYTES = 1 << 20


def test_a_frame_comes_back_as_it_was_packed() -> None:
    extents, releases = ((64, 100), (4096, ARENA_BYTES - 4096)), (128, 192)
    data = pack_frame(Kind.CALL, 7, 3, 42, b"stream", 5, 0.5, extents, releases, 1)
    assert parse_frame(data, 7, 3, ARENA_BYTES) == Frame(
        Kind.CALL, 1, 42, 5, 0.5, extents, releases, b"stream"
    )


def test_a_frame_without_tables_is_its_head_and_its_stream() -> None:
    data = pack_frame(Kind.RESULT, 1, 0, 9, b"x" * 1024)
    assert len(data) == HEAD_BYTES + 1024
    assert parse_frame(data, 1, 0, 0).stream == b"x" * 1024


@pytest.mark.parametrize(
    ("epoch", "serial"), [(2, 0), (1, 1), (0, 0)], ids=["newer lease", "later frame", "no lease"]
)
def test_a_stale_or_repeated_frame_is_refused(epoch: int, serial: int) -> None:
    data = pack_frame(Kind.CALL, 1, 0, 9, b"")
    with pytest.raises(FrameError, match="forged, stale or repeated"):
        parse_frame(data, epoch, serial, 0)


def test_lies_about_sizes_and_addresses_are_refused() -> None:
    inside = pack_frame(Kind.CALL, 1, 0, 9, b"abc", extents=((0, 64),))
    lies = [
        b"",
        inside[: HEAD_BYTES - 1],
        inside[:-1],
        inside + b"x",
        pack_frame(Kind.CALL, 1, 0, 9, b"", extents=((0, ARENA_BYTES + 1),)),
        pack_frame(Kind.CALL, 1, 0, 9, b"", extents=((ARENA_BYTES, 1),)),
        pack_frame(Kind.CALL, 1, 0, 9, b"", extents=((2**64 - 1, 2**64 - 1),)),
        HEAD.pack(0x574B, 1, 0, 1, 0, 9, 0, 0, 0.0, 0xFFFF, 0xFFFF) + b"x" * 100,
        HEAD.pack(0x574B, 1, 0, 1, 0, 9, 0, 2**32 - 1, 0.0, 0, 0),
        HEAD.pack(0x1234, 1, 0, 1, 0, 9, 0, 0, 0.0, 0, 0),
    ]
    for lie in lies:
        with pytest.raises(FrameError):
            parse_frame(lie, 1, 0, ARENA_BYTES)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_refused(data: bytes) -> None:
    head = struct.pack("<HBBIQ", 0x574B, 1, 0, 1, 0)
    for candidate in (data, head + data):
        try:
            frame = parse_frame(candidate, 1, 0, ARENA_BYTES)
        except FrameError:
            continue
        assert all(offset + (size & ~LENT) <= ARENA_BYTES for offset, size in frame.extents)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40_000)), max_size=60))
def test_an_arena_gives_no_byte_twice(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(100 * 1024)
    held: list[int] = []
    for is_taking, number in steps:
        if is_taking:
            offset = arena.allocate(number)
            if offset is not None:
                assert offset % ALIGNMENT_BYTES == 0
                assert arena.start_of(offset, max(1, number)) == offset
                held.append(offset)
        elif held:
            arena.free(held.pop(number % len(held)))
        arena.check()
        assert arena.n_used == len(held)
    for offset in held:
        arena.free(offset)
    arena.check()
    assert arena.allocate(100 * 1024) == 0


def test_an_extent_is_free_when_its_last_user_has_freed_it() -> None:
    arena = Arena(1024)
    assert arena.allocate(1000) == 0
    arena.share(0)
    arena.free(0)
    assert arena.allocate(1) is None
    arena.free(0)
    assert arena.allocate(1) == 0


def test_freeing_what_is_not_allocated_is_refused() -> None:
    arena = Arena(1024)
    with pytest.raises(FrameError):
        arena.free(64)
