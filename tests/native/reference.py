"""What every function of moc._native must do, in plain Python: slow, short, and by another road than the C++ code."""

import math
import os
import struct
from collections.abc import Sequence

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected

_FLOAT_FORMATS = {"F16": "e", "F32": "f", "F64": "d"}


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE = tuple(_table_entry(value) for value in range(256))


def crc32c(data: bytes, initial: int = 0) -> int:
    """Return the CRC-32C of `data`, one byte at a time."""
    state = initial ^ 0xFFFFFFFF
    for byte in data:
        state = _TABLE[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def copy_crc32c(
    memory: bytes, pieces: Sequence[tuple[int, int, int]], target_bytes: int, fill: int
) -> tuple[bytes, list[int]]:
    """Copy (source offset, target offset, length) pieces out of `memory` into a fresh target of one repeated byte."""
    target = bytearray([fill]) * target_bytes
    for source, offset, length in pieces:
        target[offset : offset + length] = memory[source : source + length]
    return bytes(target), [crc32c(memory[source : source + length]) for source, _, length in pieces]


def all_finite(data: bytes, kind: str) -> bool:
    """Return whether all values are finite; a bf16 is the upper half of an f32."""
    if kind == "BF16":
        words = struct.unpack(f"<{len(data) // 2}H", data)
        values = struct.unpack(f"<{len(words)}f", struct.pack(f"<{len(words)}I", *(word << 16 for word in words)))
    else:
        code = _FLOAT_FORMATS[kind]
        values = struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)
    return all(math.isfinite(value) for value in values)


def write_segments(fd: int, file_offset: int, segments: Sequence[bytes]) -> int:
    """Write the segments one after the other with one system call each."""
    done = 0
    for segment in segments:
        done += os.pwrite(fd, segment, file_offset + done)
    return done
