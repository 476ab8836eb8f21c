"""Tagged JSON for state that is not a shard: any tree of plain values and arrays, without pickle.

A *state blob* is the encoding of one tree: 8 bytes little-endian length of the JSON text, the JSON text, then each
array's bytes at the next multiple of 64. JSON null, true, false, strings and lists stand for themselves, as do
integers; every other value is an object with a single tag:

    {"f": "0x1.8p+1"}              float, by `float.hex` ("nan", "inf" and "-inf" included)
    {"b": "<base64>"}              bytes
    {"t": [...]}                   tuple
    {"d": [[key, value], ...]}     dict, in insertion order
    {"a": [dtype, [shape], kind, offset, length]}
                                   array; offset and length in bytes from the start of the array area

Limits: 64 levels, 1,000,000 values, integers of 4096 bits, 1 GiB of JSON text. The gaps between text and arrays are
zero. One tree has one text: the reader takes no other.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moc.errors import ManifestCorruptError, UsageError
from moc.format.canonical import STRUCTURE_LIMIT, load_json
from moc.state import DTYPE_BYTES, is_shape

__all__ = ["ArrayValue", "EncodedState", "decode_state", "encode_state"]

ARRAY_ALIGNMENT = 64
DEPTH_LIMIT = 64
VALUE_LIMIT = 1_000_000
INTEGER_LIMIT_BITS = 4096  # Python reads no decimal number of more than 4300 digits
TEXT_LIMIT_BYTES = 1 << 30
KINDS = ("torch", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayValue:
    """An array inside a state tree; `kind` says what it was (`torch` or `numpy`), `data` is its C-contiguous bytes."""

    dtype: str
    shape: tuple[int, ...]
    kind: str
    data: memoryview

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES or self.kind not in KINDS:
            raise UsageError(f"unsupported array: dtype={self.dtype} kind={self.kind}")
        if self.data.nbytes != prod(self.shape) * DTYPE_BYTES[self.dtype]:
            raise UsageError(f"array size does not fit: dtype={self.dtype} shape={self.shape} bytes={self.data.nbytes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedState:
    """A state blob in pieces that still alias the arrays; `write_into` makes the one copy."""

    text: bytes
    arrays: tuple[tuple[int, memoryview], ...]
    size_bytes: int

    def write_into(self, target: memoryview) -> None:
        """Write the blob to the first `size_bytes` of a writable byte view."""
        base, reached = _array_base(len(self.text)), 8 + len(self.text)
        target[:8] = struct.pack("<Q", len(self.text))
        target[8:reached] = self.text
        for offset, data in self.arrays:
            begin = base + offset
            target[reached:begin] = bytes(begin - reached)  # what an earlier blob left there is no part of this one
            reached = begin + data.nbytes
            target[begin:reached] = data.cast("B")
        target[reached : self.size_bytes] = bytes(self.size_bytes - reached)

    def to_bytes(self) -> bytes:
        blob = bytearray(self.size_bytes)
        self.write_into(memoryview(blob))
        return bytes(blob)


def encode_state(tree: object) -> EncodedState:
    """Encode a tree; raises UsageError that names the path of a value it cannot store."""
    encoder = _Encoder()
    text = json.dumps(
        encoder.encode(tree, "state", 0), separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
    marks = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if len(text) > TEXT_LIMIT_BYTES or marks > STRUCTURE_LIMIT:
        raise UsageError(
            f"state is too large: json_bytes={len(text)} allowed={TEXT_LIMIT_BYTES} commas_and_brackets={marks} "
            f"allowed={STRUCTURE_LIMIT}"
        )
    size = _array_base(len(text)) + encoder.array_bytes
    return EncodedState(text=text, arrays=tuple(encoder.arrays), size_bytes=size)


def decode_state(blob: memoryview | bytes) -> object:
    """Decode a blob; arrays are read-only views of it. Raises ManifestCorruptError on anything malformed."""
    view = memoryview(blob).cast("B").toreadonly()
    if view.nbytes < 8:
        raise ManifestCorruptError(f"state blob is too short: bytes={view.nbytes}")
    (length,) = struct.unpack("<Q", view[:8])
    if length > min(view.nbytes - 8, TEXT_LIMIT_BYTES):
        raise ManifestCorruptError(f"state blob is truncated: json_bytes={length} bytes={view.nbytes}")
    try:
        tree = _Decoder(view[_array_base(length) :]).decode(load_json(bytes(view[8 : 8 + length])), 0)
        again = encode_state(tree)
        if again.text != view[8 : 8 + length] or again.size_bytes != view.nbytes:
            raise ValueError("not what a writer makes of these values")
        return tree
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, UsageError) as error:
        raise ManifestCorruptError(f"state blob is malformed: {error!s:.300}") from error


def _array_base(text_length: int) -> int:
    return _align(8 + text_length)


def _align(offset: int) -> int:
    return -(-offset // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT


class _Encoder:
    """Collects arrays while it walks the tree; one use per instance."""

    def __init__(self) -> None:
        self.arrays: list[tuple[int, memoryview]] = []
        self.array_bytes = 0
        self._values = 0

    def encode(self, value: object, path: str, depth: int) -> object:
        self._values += 1
        if depth > DEPTH_LIMIT or self._values > VALUE_LIMIT:
            raise UsageError(f"state is nested too deep or has too many values: path={path}")
        # Exact types: a subclass (an enum, a numpy scalar, a namedtuple) would come back as something else.
        if value is None or type(value) is bool:
            return value
        if type(value) is int:
            if value.bit_length() > INTEGER_LIMIT_BITS:
                raise UsageError(
                    f"integer is too large: path={path} bits={value.bit_length()} allowed={INTEGER_LIMIT_BITS}"
                )
            return value
        if type(value) is str:
            # Quick for what names and settings are made of: this runs at every snapshot, on the training thread.
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise UsageError(f"text is not unicode: path={path} text={value[:40]!r} allowed=no lone surrogates")
            return value
        if type(value) is float:
            return {"f": value.hex()}
        if type(value) is bytes:
            return {"b": base64.b64encode(value).decode()}
        if type(value) is list:
            return [self.encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        if type(value) is tuple:
            return {"t": [self.encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]}
        if type(value) is dict:
            return {
                "d": [
                    [
                        self.encode(key, f"{path} key {key!r}", depth + 1),
                        self.encode(item, f"{path}[{key!r}]", depth + 1),
                    ]
                    for key, item in value.items()
                ]
            }
        if isinstance(value, ArrayValue):
            offset = _align(self.array_bytes)
            self.arrays.append((offset, value.data))
            self.array_bytes = offset + value.data.nbytes
            return {"a": [value.dtype, list(value.shape), value.kind, offset, value.data.nbytes]}
        raise UsageError(
            f"cannot store a value of this type: path={path} type={type(value).__module__}.{type(value).__qualname__} "
            "allowed=None,bool,int,float,str,bytes,list,tuple,dict,tensor,array"
        )


class _Decoder:
    """Rebuilds values; `area` is the array area of the blob."""

    def __init__(self, area: memoryview) -> None:
        self._area = area
        self._values = 0

    def decode(self, node: object, depth: int) -> object:
        self._values += 1
        if depth > DEPTH_LIMIT or self._values > VALUE_LIMIT:
            raise ValueError("nested too deep or too many values")
        if node is None or isinstance(node, bool | int | str):
            return node
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not isinstance(node, dict) or len(node) != 1:
            raise ValueError(f"not a tagged value: {str(node)[:60]}")
        ((tag, body),) = node.items()
        match tag:
            case "f":
                return float.fromhex(body)
            case "b":
                return base64.b64decode(body, validate=True)
            case "t":
                return tuple(self.decode(item, depth + 1) for item in body)
            case "d":
                return {self.decode(key, depth + 1): self.decode(item, depth + 1) for key, item in body}
            case "a":
                return self._array(body)
            case _:
                raise ValueError(f"unknown tag: {tag}")

    def _array(self, body: list[object]) -> ArrayValue:
        dtype, shape, kind, offset, length = body
        if not (isinstance(dtype, str) and isinstance(kind, str) and is_shape(shape)):
            raise TypeError("array entry has a wrong type")
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise TypeError("array entry has a wrong range")
        if offset + length > self._area.nbytes:
            raise ValueError(f"array is outside the blob: offset={offset} length={length} area={self._area.nbytes}")
        return ArrayValue(dtype=dtype, shape=tuple(shape), kind=kind, data=self._area[offset : offset + length])


def expect_mapping(value: object, name: str) -> Mapping[str, object]:
    """Return `value` as a mapping with string keys, or raise ManifestCorruptError naming what it should have been."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ManifestCorruptError(f"expected a mapping: name={name} type={type(value).__name__}")
    return value
