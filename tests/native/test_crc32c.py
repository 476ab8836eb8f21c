"""The checksum kernels agree with the standard's vectors, with the reference and with each other."""

import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc import _native
from tests.native import reference
from tests.native.memory import mapped, random_bytes, words

# RFC 3720, appendix B.4, and the customary check value.
VECTORS = [
    (b"", 0x00000000),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (
        bytes.fromhex(
            "01c000000000000000000000000000001400000000000400000000140000001828000000000000000200000000000000"
        ),
        0xD9963A56,
    ),
]

# Lengths on both sides of every block, stream and vector length in csrc/.
BORDERS = (8, 16, 64, 256, 512, 768, 4096, 8192, 12288, 65536)
LENGTHS = sorted({0, 1, *(border * n + d for border in BORDERS for n in (1, 3) for d in (-1, 0, 1))})

kernels = pytest.mark.parametrize("kernel", _native.KERNELS)
lengths = st.one_of(st.sampled_from(LENGTHS), st.integers(0, 3000))
seeds = st.integers(0, 2**32 - 1)


def test_portable_kernel_is_always_offered_and_last() -> None:
    assert _native.KERNELS[-1] == "portable"


@kernels
@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_kernel_gives_the_vectors_of_the_standard(kernel: str, data: bytes, expected: int) -> None:
    assert _native.crc32c(data, kernel=kernel) == expected
    assert reference.crc32c(data) == expected


@kernels
@given(length=st.integers(0, 3000), initial=seeds, seed=seeds)
def test_kernel_agrees_with_the_reference(kernel: str, length: int, initial: int, seed: int) -> None:
    data = random_bytes(length, seed)

    assert _native.crc32c(data, initial, kernel=kernel) == reference.crc32c(data, initial)


@given(length=lengths, offset=st.integers(0, 130), initial=seeds, seed=seeds)
def test_kernels_agree_at_any_alignment_and_length(length: int, offset: int, initial: int, seed: int) -> None:
    data = random_bytes(length, seed)
    with mapped(offset + length) as memory:
        memory.put(offset, data)

        found = {_native.crc32c_at(memory.address + offset, length, initial, kernel=name) for name in _native.KERNELS}

    assert found == {_native.crc32c(data, initial, kernel="portable")}


@given(first=lengths, second=lengths, seed=seeds)
def test_checksum_continues_and_combines(first: int, second: int, seed: int) -> None:
    data = random_bytes(first + second, seed)
    whole = _native.crc32c(data)
    head, tail = _native.crc32c(data[:first]), _native.crc32c(data[first:])

    assert _native.crc32c(data[first:], head) == whole
    assert _native.crc32c_combine(head, tail, second) == whole


def test_combine_is_associative_at_lengths_beyond_any_memory() -> None:
    first, second, third = 0x12345678, 0x9ABCDEF0, 0x0F1E2D3C
    length = 2**63 - 25

    left = _native.crc32c_combine(_native.crc32c_combine(first, second, length), third, length)
    right = _native.crc32c_combine(first, _native.crc32c_combine(second, third, length), 2 * length)

    assert left == right


@kernels
@given(pieces=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 2000)), max_size=30), seed=seeds)
def test_gather_agrees_with_the_reference(kernel: str, pieces: list[tuple[int, int]], seed: int) -> None:
    data = random_bytes(7000, seed)
    with mapped(len(data)) as memory:
        memory.put(0, data)
        crcs = np.zeros(len(pieces), dtype=np.uint32)

        addresses = words(memory.address + offset for offset, _ in pieces)
        _native.crc32c_gather(addresses, words(length for _, length in pieces), crcs, kernel=kernel)

    assert crcs.tolist() == [_native.crc32c(data[offset : offset + length]) for offset, length in pieces]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, dtype=np.float32)])
def test_any_contiguous_buffer_is_accepted(kind: type) -> None:
    data = random_bytes(400, seed=7)

    assert _native.crc32c(kind(data)) == reference.crc32c(data)


def test_strided_buffer_is_refused() -> None:
    with pytest.raises((BufferError, ValueError)):
        _native.crc32c(np.zeros(10, dtype=np.uint8)[::2])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"length is negative length=-1 allowed=0\.\.18446744073709551615"):
        _native.crc32c_at(4096, -1)
    with pytest.raises(OverflowError, match=r"initial is too large initial=4294967296 allowed=0\.\.4294967295"):
        _native.crc32c(b"", 2**32)
    with pytest.raises(OverflowError, match=r"address is too large address=18446744073709551616"):
        _native.crc32c_at(2**64, 0)
    with pytest.raises(OverflowError, match=r"address range wraps around address=18446744073709551615 length=2"):
        _native.crc32c_at(2**64 - 1, 2)
    with pytest.raises(ValueError, match=r"address is null address=0 length=8"):
        _native.crc32c_at(0, 8)
    with pytest.raises(ValueError, match=r"kernel is not supported here kernel=abacus allowed=.*portable"):
        _native.crc32c(b"", kernel="abacus")
    with pytest.raises(ValueError, match=r"addresses has the wrong number of items addresses=2 lengths=1"):
        _native.crc32c_gather(words([1, 2]), words([0]), np.zeros(1, dtype=np.uint32))
    with pytest.raises(ValueError, match=r"lengths has the wrong item type format=l item_bytes=8 allowed=uint64"):
        _native.crc32c_gather(words([1]), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.uint32))
    with pytest.raises(ValueError, match=r"crcs has the wrong item type format=L item_bytes=8 allowed=uint32"):
        _native.crc32c_gather(words([1]), words([0]), words([0]))
    with pytest.raises(TypeError):
        _native.crc32c_at(1.5, 1)  # type: ignore[arg-type]


def test_read_only_result_buffer_is_refused() -> None:
    with pytest.raises((BufferError, ValueError)):
        _native.crc32c_gather(array.array("Q", [1]), array.array("Q", [0]), memoryview(bytes(4)).cast("I"))
