"""A state tree as JSON that keeps types, order and every bit: how golden tests write and compare expected values."""

from __future__ import annotations

import hashlib
import struct

__all__ = ["describe"]


def describe(value: object) -> object:
    """Return a JSON value that is equal for equal trees only; arrays are anything with dtype, shape, kind and data."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return ["int", str(value)]
    if isinstance(value, float):
        return ["float", "nan" if value != value else struct.pack("<d", value).hex()]  # NaN
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(describe, value)]
    if isinstance(value, dict):
        return ["dict", *([describe(key), describe(item)] for key, item in value.items())]
    digest = hashlib.sha256(bytes(value.data)).hexdigest()  # type: ignore[attr-defined]
    return ["array", value.kind, value.dtype, list(value.shape), digest]  # type: ignore[attr-defined]
