"""Every parser of stored or received bytes, fed with valid inputs that were changed: see `tests.fuzz.targets`."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.changes import HOSTILE_TEXTS, changed_text
from tests.fuzz.targets import TARGETS, Target

EXAMPLES = 300


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
    return changed_text(lambda options: draw(st.sampled_from(options)), draw(st.sampled_from(valid)))


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
