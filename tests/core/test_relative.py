"""State blobs that hold only what differs from another rank's: nothing is lost, and nothing else is made of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import ManifestCorruptError
from moc.format.relative import StateBase, outline_of, relative_state, whole_state
from moc.format.tagged import ArrayValue, decode_state, encode_state

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from((0.0, -0.0, 1.0, float("nan")))
    | st.text(max_size=3)
    | st.binary(max_size=40)
    | st.builds(
        lambda data: ArrayValue(dtype="U8", shape=(len(data),), kind="torch", data=memoryview(data)),
        st.binary(max_size=90),
    )
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("a", "b", "c")) | st.integers(0, 2), inner, max_size=3)
    ),
    max_leaves=8,
)
trees = st.dictionaries(st.sampled_from(("engine", "buffers", "rng", "routing", "stateful")), values)
NOISE = bytes(range(256)) * 4


def _blob(tree: object) -> bytes:
    return encode_state(tree).to_bytes()


def _stored(own: bytes, base: bytes) -> bytes:
    return relative_state(own, StateBase(rank=0, outline=outline_of(decode_state(base)))) or own


def _read(blobs: Mapping[int, bytes], rank: int) -> bytes:
    return _blob(whole_state(rank, blobs, blobs.__getitem__))


@settings(max_examples=300, deadline=None)
@given(trees, trees, st.data())
def test_what_a_rank_captured_comes_back_bit_for_bit(first: dict[str, Any], other: dict[str, Any], data: Any) -> None:
    """Of trees that have little in common, and of ones that differ in one entry."""
    near = copy.copy(first)
    if near:
        near[data.draw(st.sampled_from(sorted(near)))] = data.draw(values)
    base = _blob(first)
    for tree in (other, near, first):
        own = _blob(tree)

        stored = _stored(own, base)

        assert len(stored) <= len(own)
        assert _read({0: base, 1: stored}, 1) == own
        assert _read({0: base}, 0) == base


def test_only_what_differs_is_stored() -> None:
    def tree(rank: int) -> dict[str, object]:
        buffers: dict[str, object] = {name: _array(NOISE, rank * (name == "mean")) for name in ("mean", "mask")}
        return {"engine": {"steps": 7}, "buffers": buffers, "rng": [rank] * 5, "routing": {"routed": NOISE * 9}}

    base, own = _blob(tree(0)), _blob(tree(1))

    stored = _stored(own, base)

    changes = decode_state(stored)["changes"]  # type: ignore[index]
    assert [path for path, _ in changes] == [["buffers", "mean"], ["rng"]]
    assert len(stored) < len(own) / 5
    assert _read({0: base, 1: stored}, 1) == own


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": 0.0}, {"a": -0.0}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}),
        ({"a": (1, 2)}, {"a": [1, 2]}),
        ({"a": {}}, {"a": []}),
        ({"a": {"x": 1}}, {"a": {"x": 1, "y": 1}}),
        ({"a": {0: 1}}, {"a": {"0": 1}}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}),
    ],
)
def test_values_that_are_nearly_equal_are_not_taken_for_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    one["ballast"] = two["ballast"] = NOISE
    blobs = {0: _blob(one), 1: _stored(_blob(two), _blob(one))}

    assert len(blobs[1]) < len(NOISE), "the ballast is not stored twice"
    assert _read(blobs, 1) == _blob(two)


FIRST, OWN = {"a": {"x": 1}, "ballast": NOISE}, {"a": {"x": 2}, "ballast": NOISE}
GOOD = decode_state(_stored(_blob(OWN), _blob(FIRST)))
assert isinstance(GOOD, dict)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"relative_to": 1}, "no other rank"),
        ({"relative_to": 7}, "no other rank"),
        ({"relative_to": "0"}, "no other rank"),
        ({"relative_to": False}, "no other rank"),
        ({"relative_to": 2}, "relative itself"),
        ({"size": 1}, "does not follow"),
        ({"crc32c": 5}, "does not follow"),
        ({"crc32c": None}, "does not follow"),
        ({"changes": []}, "does not follow"),
        ({"changes": [[["a", "x"], 3]]}, "does not follow"),
        ({"changes": 5}, "malformed"),
        ({"changes": [["a"]]}, "malformed"),
        ({"changes": ["ab"]}, "malformed"),
        ({"changes": [["ax", 2]]}, "malformed"),
        ({"changes": [[["a"] * 3, 2]]}, "malformed"),
        ({"changes": [[["b"], 2]]}, "the other has nothing"),
        ({"changes": [[["a", "y"], 2]]}, "the other has nothing"),
        ({"changes": [[["ballast", "x"], 2]]}, "the other has nothing"),
        ({"changes": [[[["a"]], 2]]}, "malformed"),
    ],
)
def test_a_relative_blob_that_nobody_wrote_is_refused(changes: dict[str, object], words: str) -> None:
    blobs = {0: _blob(FIRST), 1: _blob(GOOD), 2: _blob(GOOD)}
    assert _read(blobs, 1) == _blob(OWN)

    blobs[1] = _blob(GOOD | changes)

    with pytest.raises(ManifestCorruptError, match=words):
        _read(blobs, 1)


def test_another_base_than_the_one_it_was_made_with_is_seen() -> None:
    blobs = {0: _blob(FIRST | {"ballast": NOISE[1:]}), 1: _blob(GOOD)}

    with pytest.raises(ManifestCorruptError, match="not follow from the one that it is relative to: rank=1"):
        _read(blobs, 1)


def test_a_tree_at_the_limits_is_stored_whole() -> None:
    deep: object = 0
    for _ in range(61):
        deep = [deep]
    base, own = _blob({"a": {"x": deep}, "ballast": NOISE}), _blob({"a": {"x": [deep]}, "ballast": NOISE})

    assert _stored(own, base) == own
    assert _read({0: own, 1: _stored(base, own)}, 1) == base


def test_a_dict_that_no_writer_looks_into_is_not_copied_for_every_change() -> None:
    large = {f"{key:04}": key for key in range(257)}
    blobs = {0: _blob(large), 1: _blob(GOOD | {"changes": [[["0000"], 1]]})}

    with pytest.raises(ManifestCorruptError, match="the other has nothing"):
        _read(blobs, 1)


@pytest.mark.slow  # a million values
def test_two_trees_that_are_within_the_limits_and_together_are_not_are_refused() -> None:
    blobs = {0: _blob(FIRST | {"ballast": [0] * 999_900}), 1: _blob(GOOD | {"changes": [[["a", "x"], [0] * 900]]})}

    with pytest.raises(ManifestCorruptError, match="too many values"):
        _read(blobs, 1)


def _array(noise: bytes, first: int) -> ArrayValue:
    data = bytes([first]) + noise[1:]
    return ArrayValue(dtype="U8", shape=(len(data),), kind="torch", data=memoryview(data))
