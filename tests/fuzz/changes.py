"""Changes of valid JSON values that a hostile or damaged source could make."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["HOSTILE_TEXTS", "HOSTILE_VALUES", "Pick", "changed_at", "changed_text"]

Pick = Callable[[Sequence[Any]], Any]
"""Chooses one of several: by Hypothesis, or by a random generator."""

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


def changed_text(pick: Pick, text: bytes) -> bytes:
    """Return a JSON text with one or two values replaced, removed, repeated or added; raises ValueError for others."""
    value = json.loads(text)
    for _ in range(pick((1, 2))):
        value = changed_at(pick, copy.deepcopy(value))
    changed = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return changed.encode("utf-8", "surrogatepass")


def changed_at(pick: Pick, value: Any) -> Any:
    """Go down to a random place and change it."""
    hostile = copy.deepcopy(pick(HOSTILE_VALUES))  # what was put in may be changed again
    if not isinstance(value, dict | list) or not value or pick(range(10)) == 0:
        return hostile
    places: list[Any] = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    place = pick(places)
    match pick(range(8)):
        case 0:
            del value[place]
        case 1 if isinstance(value, list):
            value.insert(place, copy.deepcopy(value[place]))
        case 1:
            value[pick(("added", "", "\ud800"))] = hostile
        case _:
            value[place] = changed_at(pick, value[place])
    return value
