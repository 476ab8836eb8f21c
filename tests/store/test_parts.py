"""An object that is sent in parts: every slice is right, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.store.s3 import PartedContent


@given(pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=12), size=st.integers(1, 50), data=st.data())
def test_every_slice_is_the_slice_of_the_whole(pieces: list[bytes], size: int, data: st.DataObject) -> None:
    whole = b"".join(pieces)
    content = PartedContent([memoryview(piece) for piece in pieces])
    begin, end = (data.draw(st.integers(0, len(whole) + 3)) for _ in range(2))

    assert len(content) == len(whole)
    assert content[begin:end] == whole[begin:end]
    assert content[:] == whole
    assert b"".join(content[at : at + size] for at in range(0, len(whole), size)) == whole


def test_what_was_released_is_not_sent_as_something_else() -> None:
    content = PartedContent([memoryview(b"abc")])

    content.release()

    with pytest.raises(ValueError, match="released"):
        content[0:1]
