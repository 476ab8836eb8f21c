"""The finite check agrees with the meaning of the floating-point formats."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc import _native
from tests.native import reference
from tests.native.memory import mapped

WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}

# exponent all ones: infinities and quiet and signalling NaNs of both signs, as the upper 16 bits or all bits
NOT_FINITE = {
    "F16": [0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01],
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81],
    "F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001],
    "F64": [0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x7FF0000000000001],
}
LARGEST = {"F16": 0x7BFF, "BF16": 0x7F7F, "F32": 0x7F7FFFFF, "F64": 0x7FEFFFFFFFFFFFFF}

kinds = pytest.mark.parametrize("kind", sorted(WIDTHS))


def native(data: bytes, kind: str, offset: int = 0) -> bool:
    with mapped(offset + len(data)) as memory:
        memory.put(offset, data)
        return _native.all_finite(memory.address + offset, len(data) // WIDTHS[kind], kind)  # type: ignore[arg-type]


@kinds
@given(data=st.binary(max_size=200), offset=st.integers(0, 17))
def test_any_bit_pattern_agrees_with_the_reference(kind: str, data: bytes, offset: int) -> None:
    whole = data[: len(data) // WIDTHS[kind] * WIDTHS[kind]]

    assert native(whole, kind, offset) == reference.all_finite(whole, kind)


@kinds
@given(count=st.sampled_from([1, 31, 32, 33, 4095, 4096, 4097, 9000]), where=st.floats(0, 1), choice=st.integers(0, 3))
def test_one_bad_value_is_found_wherever_it_stands(kind: str, count: int, where: float, choice: int) -> None:
    width = WIDTHS[kind]
    values = np.full(count, LARGEST[kind], dtype=f"<u{width}")
    assert native(values.tobytes(), kind)

    values[min(count - 1, math.floor(where * count))] = NOT_FINITE[kind][choice]

    assert not native(values.tobytes(), kind)


@kinds
def test_every_value_of_the_narrow_formats_agrees(kind: str) -> None:
    if WIDTHS[kind] == 2:
        found = [native(struct.pack("<H", word), kind) for word in range(0, 1 << 16, 7)]
        assert found == [reference.all_finite(struct.pack("<H", word), kind) for word in range(0, 1 << 16, 7)]
    for word in NOT_FINITE[kind]:
        assert not native(word.to_bytes(WIDTHS[kind], "little"), kind)


@kinds
def test_no_value_at_all_is_finite(kind: str) -> None:
    assert native(b"", kind)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"kind is unknown kind=F8 allowed=F16,BF16,F32,F64"):
        _native.all_finite(64, 1, "F8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"count is negative count=-1"):
        _native.all_finite(64, -1, "F32")
    with pytest.raises(OverflowError, match=r"count is too large count=4611686018427387904"):
        _native.all_finite(64, 2**62, "F32")
