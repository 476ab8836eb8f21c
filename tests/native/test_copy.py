"""The copy with a checksum writes the right bytes, and no others."""

import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc import _native
from tests.native import reference
from tests.native.memory import mapped, random_bytes, words

FILL = 0xA5  # what the target holds before: every byte outside the pieces must still hold it

kernels = pytest.mark.parametrize("kernel", _native.KERNELS)
seeds = st.integers(0, 2**32 - 1)
piece_lengths = st.one_of(st.sampled_from([0, 1, 63, 64, 255, 256, 257, 511, 512, 513, 4096]), st.integers(0, 1500))
# (source offset, gap before the target, length): targets never overlap, sources may.
piece_lists = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 130), piece_lengths), max_size=12)


def laid_out(pieces: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int, int]], int]:
    end = 0
    placed = []
    for source, gap, length in pieces:
        placed.append((source, end + gap, length))
        end += gap + length
    return placed, end + 64


@kernels
@given(pieces=piece_lists, seed=seeds)
def test_copy_agrees_with_the_reference(kernel: str, pieces: list[tuple[int, int, int]], seed: int) -> None:
    data = random_bytes(8192, seed)
    placed, target_bytes = laid_out(pieces)
    expected, expected_crcs = reference.copy_crc32c(data, placed, target_bytes, FILL)

    with mapped(len(data)) as source, mapped(target_bytes) as target:
        source.put(0, data)
        target.view[:] = FILL
        crcs = np.zeros(len(placed), dtype=np.uint32)
        _native.copy_crc32c(
            words(source.address + offset for offset, _, _ in placed),
            words(target.address + offset for _, offset, _ in placed),
            words(length for _, _, length in placed),
            crcs,
            kernel=kernel,
        )

        assert target.get(0, target_bytes) == expected
        assert crcs.tolist() == expected_crcs


@kernels
@pytest.mark.parametrize("source_offset", [0, 3])
@pytest.mark.parametrize("target_offset", [0, 1, 63, 64])
@pytest.mark.parametrize("length", [(1 << 20) - 1, 1 << 20, (1 << 20) + 777])
def test_large_copy_that_streams_is_exact(kernel: str, source_offset: int, target_offset: int, length: int) -> None:
    data = random_bytes(length, seed=length)
    with mapped(length + 64) as source, mapped(length + 128) as target:
        source.put(source_offset, data)
        target.view[:] = FILL
        crcs = np.zeros(1, dtype=np.uint32)
        _native.copy_crc32c(
            words([source.address + source_offset]),
            words([target.address + target_offset]),
            words([length]),
            crcs,
            kernel=kernel,
        )

        assert target.get(target_offset, length) == data
        assert set(target.get(0, target_offset) + target.get(target_offset + length, 64)) <= {FILL}
        assert crcs[0] == _native.crc32c(data, kernel="portable")


@kernels
def test_many_small_pieces_that_stream_together_are_exact(kernel: str) -> None:
    rng = np.random.default_rng(11)
    lengths = rng.integers(0, 2000, size=2000, dtype=np.uint64)
    offsets = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(lengths)[:-1]])
    total = int(lengths.sum())
    assert total > 1 << 20, "the call must be long enough to stream"

    data = random_bytes(total, seed=12)
    with mapped(total) as source, mapped(total) as target:
        source.put(0, data)
        crcs = np.zeros(len(lengths), dtype=np.uint32)
        base, goal = np.uint64(source.address), np.uint64(target.address)
        _native.copy_crc32c(offsets + base, offsets + goal, lengths, crcs, kernel=kernel)

        assert target.get(0, total) == data
    pieces = zip(offsets.tolist(), lengths.tolist(), strict=True)
    assert crcs.tolist() == [_native.crc32c(data[offset : offset + length]) for offset, length in pieces]


def test_nothing_to_copy_is_fine() -> None:
    empty = array.array("Q")

    _native.copy_crc32c(empty, empty, empty, array.array("I"))


def test_arrays_of_the_standard_library_are_accepted() -> None:
    with mapped(64) as source, mapped(64) as target:
        source.put(0, b"123456789")
        crcs = array.array("I", [0])
        _native.copy_crc32c(
            array.array("Q", [source.address]), array.array("Q", [target.address]), array.array("Q", [9]), crcs
        )

        assert target.get(0, 9) == b"123456789"
        assert crcs[0] == 0xE3069283


def test_bad_arguments_are_named_and_nothing_is_copied() -> None:
    crcs = np.zeros(2, dtype=np.uint32)
    with mapped(64) as source, mapped(64) as target:
        source.put(0, b"\x01" * 64)
        good, goal = source.address, target.address

        with pytest.raises(ValueError, match=r"targets has the wrong number of items targets=1 lengths=2"):
            _native.copy_crc32c(words([good, good]), words([goal]), words([8, 8]), crcs)
        with pytest.raises(ValueError, match=r"crcs has the wrong number of items crcs=2 lengths=1"):
            _native.copy_crc32c(words([good]), words([goal]), words([8]), crcs)
        with pytest.raises(ValueError, match=r"target is null address=0 length=8"):
            _native.copy_crc32c(words([good, good]), words([goal, 0]), words([8, 8]), crcs)
        with pytest.raises(OverflowError, match=r"source range wraps around"):
            _native.copy_crc32c(words([good, 2**64 - 1]), words([goal, goal]), words([8, 8]), crcs)

        assert target.get(0, 64) == bytes(64)
