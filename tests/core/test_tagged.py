"""State blobs: any tree of plain values comes back with its types, and hostile blobs raise one error."""

from __future__ import annotations

import contextlib
import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import ManifestCorruptError, UsageError
from moc.format.tagged import ArrayValue, decode_state, encode_state
from moc.state import DTYPE_BYTES

hashables = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.tuples(st.integers(), st.text(max_size=3))
)


@st.composite
def arrays(draw: st.DrawFn) -> ArrayValue:
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    return ArrayValue(
        dtype=dtype,
        shape=shape,
        kind=draw(st.sampled_from(("torch", "numpy"))),
        data=memoryview(draw(st.binary(min_size=size, max_size=size))),
    )


trees = st.recursive(
    hashables | arrays() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashables, inner, max_size=4)
    ),
    max_leaves=15,
)


def same(a: object, b: object) -> bool:
    """Compare with types, order of keys, sign of zero and kind of NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, ArrayValue) and isinstance(b, ArrayValue):
        return (a.dtype, a.shape, a.kind, bytes(a.data)) == (b.dtype, b.shape, b.kind, bytes(b.data))
    return a == b


@given(trees)
def test_every_tree_comes_back(tree: object) -> None:
    encoded = encode_state(tree)
    blob = encoded.to_bytes()
    assert len(blob) == encoded.size_bytes
    assert same(decode_state(blob), tree)
    assert encode_state(tree).to_bytes() == blob


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 2**70, True, {1: 2, "1": 3, (1,): 4, None: 5, b"": 6}]
)
def test_special_values(value: object) -> None:
    assert same(decode_state(encode_state(value).to_bytes()), value)


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"b": object()}},
        {"a": {"b": np.float32(1)}},
        {"a": {"b": {1, 2}}},
        {"a": {"b": 1j}},
        {"a": {"b": "\ud800"}},
        {"a": {"b": 10**5000}},
    ],
)
def test_what_cannot_be_stored_is_named_by_its_path(value: object) -> None:
    with pytest.raises(UsageError, match=r"\['a'\]\['b'\]"):
        encode_state(value)


def test_depth_is_limited_the_same_way_on_both_sides() -> None:
    tree: object = 0
    for _ in range(64):
        tree = [tree]
    assert same(decode_state(encode_state(tree).to_bytes()), tree)
    with pytest.raises(UsageError, match="deep"):
        encode_state([tree])


node = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(("f", "b", "t", "d", "a", "x")), inner, max_size=2)
        | st.builds(lambda rows: {"a": rows}, st.lists(inner, min_size=5, max_size=5))
        | st.builds(lambda k, v: {"d": [[k, v]]}, inner, inner)
    ),
    max_leaves=10,
)


@settings(max_examples=300)
@given(node | st.lists(node, min_size=5, max_size=5).map(lambda rows: {"a": rows}), st.binary(max_size=40))
def test_hostile_trees_raise_one_error(tree: object, tail: bytes) -> None:
    text = json.dumps(tree).encode()
    with contextlib.suppress(ManifestCorruptError):  # anything else would fly
        decode_state(struct.pack("<Q", len(text)) + text + tail)


@given(st.binary(max_size=60))
def test_hostile_bytes_raise_one_error(blob: bytes) -> None:
    with contextlib.suppress(ManifestCorruptError):
        decode_state(blob)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'{"t":' * 20_000,
        b'{"f":"0x1p99999"}',
        b'{"b":"*"}',
        b'{"d":[[[],1]]}',
        b'{"d":{"a":1}}',
        b'{"d":5}',
        b'{"d":[["a",1],["a",2]]}',
        b'{"f":"1.0"}',
        b'{"b":"AB=="}',
        b'{"f":"nan","f":"inf"}',
        b" 1",
        b'"\\u0041"',
        b"[" + b"0," * 1_000_000 + b"0]",
        b'{"a":["F32",[2],"numpy",0,8]}',
        b'{"a":["F32",[1000000000000,1000000000000],"numpy",0,0]}',
        b'{"a":["F32",[true],"numpy",0,4]}',
        b"1" * 5000,
        b"\xff",
    ],
)
def test_chosen_hostile_trees(text: bytes) -> None:
    with pytest.raises(ManifestCorruptError):
        decode_state(struct.pack("<Q", len(text)) + text)


@given(trees, st.data())
def test_every_cut_is_seen(tree: object, data: st.DataObject) -> None:
    blob = encode_state(tree).to_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    cut = data.draw(st.integers(0, 8 + length - 1))
    with pytest.raises(ManifestCorruptError):
        decode_state(blob[:cut])


def test_equal_trees_give_equal_bytes_whatever_was_in_their_place_before() -> None:
    arrays = [ArrayValue(dtype="U8", shape=(3,), kind="torch", data=memoryview(b"abc")) for _ in range(3)]
    encoded = encode_state({"arrays": arrays, "text": "x"})
    place = bytearray(b"\xaa" * encoded.size_bytes)

    encoded.write_into(memoryview(place))

    assert bytes(place) == encoded.to_bytes()
    assert b"\xaa" not in place
