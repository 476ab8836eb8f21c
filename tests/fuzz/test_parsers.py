"""Every parser of stored or received bytes, fed with valid inputs that were changed: see `tests.fuzz.targets`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target

EXAMPLES = 300
HOSTILE_TEXTS = (
    b"1" * 5000,
    b"1e400",
    b"-1",
    b"NaN",
    b"Infinity",
    b'"\\ud800"',
    b"[" * 3000,
    b'{"a":' * 3000,
    b"18446744073709551616",
    b"\0",
    b"\xff\xfe",
    b"../",
    b"{}",
    b",",
)
HOSTILE_VALUES = (
    None, True, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, 1e308, "", "\ud800", "..", "../../FORMAT",
    "objects/000001-golden-1/000000000003-01010003/r00099-d.safetensors", "a\0b", "x" * 5000, [], [[]], [None] * 9,
    {}, {"a": {}}, [0] * 100, [2**62] * 70, "FORMAT", "４", "nan", "0x1p99999",
)  # fmt: skip


@st.composite
def changed_bytes(draw: st.DrawFn, valid: tuple[bytes, ...]) -> bytes:
    """Return a valid input with a few changes of its bytes."""
    content = bytearray(draw(st.sampled_from(valid)))
    used = len(content.rstrip(b" \0"))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(used - 1, 0)))
        match draw(st.integers(0, 5)):
            case 0:
                content[at : at + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in content[at : at + 1])
            case 1:
                del content[at : at + draw(st.integers(1, 64))]
            case 2:
                content[at:at] = draw(st.sampled_from(HOSTILE_TEXTS))
            case 3:
                piece = draw(st.binary(min_size=1, max_size=12))
                content[at : at + len(piece)] = piece
            case 4:
                content[at:at] = content[at : at + draw(st.integers(1, 200))]
            case _:
                del content[at:]
    return bytes(content)


@st.composite
def changed_json(draw: st.DrawFn, valid: tuple[bytes, ...]) -> bytes:
    """Return a valid JSON text with one or two values replaced, removed, repeated or added."""
    value = json.loads(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 2))):
        value = changed_at(draw, copy.deepcopy(value))
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def changed_at(draw: Callable[..., Any], value: Any) -> Any:
    """Go down to a random place and change it."""
    hostile = copy.deepcopy(draw(st.sampled_from(HOSTILE_VALUES)))  # what was put in may be changed again
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return hostile
    places: list[Any] = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    place = draw(st.sampled_from(places))
    match draw(st.integers(0, 7)):
        case 0:
            del value[place]
        case 1 if isinstance(value, list):
            value.insert(place, copy.deepcopy(value[place]))
        case 1:
            value[draw(st.sampled_from(("added", "", "\ud800")))] = hostile
        case _:
            value[place] = changed_at(draw, value[place])
    return value


@pytest.mark.parametrize("name", TARGETS)
def test_a_valid_input_is_accepted_and_a_changed_one_raises_its_one_error_or_comes_back(name: str) -> None:
    target = TARGETS[name]
    for valid in target.seeds():
        target.check(valid)
    _search(target)


def _search(target: Target) -> None:
    inputs = changed_bytes(target.seeds()) | st.binary(max_size=80)
    if target.is_json:
        inputs = changed_json(target.seeds()) | inputs

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(inputs)
    def search(content: bytes) -> None:
        target.check(content)

    search()
