"""Read planning: whatever the old and the new ranks, each needed element is read once and from the right place."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import CoverageError, MismatchError
from moc.plan.read import Placed, plan_read
from moc.state import DTYPE_BYTES, RankCatalog, Shard
from tests.core.values import catalogs, models


def _filled(catalog: RankCatalog) -> list[bytearray]:
    """Give each element of each whole tensor its own bytes; return what the rank's shards hold of them."""
    return [_content(shard) for shard in catalog.shards]


def _content(shard: Shard) -> bytearray:
    width = DTYPE_BYTES[shard.dtype]
    return bytearray(
        b"".join(
            (hash((shard.tensor, shard.part)) * 1009 + element).to_bytes(16, "little", signed=True)[:width]
            for element in range(shard.offset, shard.offset + shard.length)
        )
    )


def _read(
    needed: Sequence[Shard], catalogs_held: Sequence[RankCatalog], held: Sequence[Sequence[bytearray]]
) -> list[bytearray]:
    placed = [
        Placed(shard=shard, holder=f"{catalog.rank}", position=index, crc32c=0)
        for catalog in catalogs_held
        for index, shard in enumerate(catalog.shards)
    ]
    targets = [bytearray(shard.size_bytes) for shard in needed]
    written = [bytearray(shard.size_bytes) for shard in needed]
    for piece in plan_read(needed, placed):
        source = held[int(placed[piece.source].holder)][placed[piece.source].position]
        begin = piece.target_offset * DTYPE_BYTES[needed[piece.target].dtype]
        end = begin + piece.length_bytes
        targets[piece.target][begin:end] = source[piece.source_offset : piece.source_offset + piece.length_bytes]
        for position in range(begin, end):
            written[piece.target][position] += 1
    assert all(set(counts) <= {1} for counts in written), "each byte is written exactly once"
    return targets


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_reshard_reads_each_element_once_and_back_again_is_the_identity(data: st.DataObject) -> None:
    model = data.draw(models())
    a = data.draw(catalogs(model, data.draw(st.integers(1, 3))))
    b = data.draw(catalogs(model, data.draw(st.integers(1, 4))))
    at_a = [_filled(catalog) for catalog in a]
    at_b = [_read(catalog.shards, a, at_a) for catalog in b]
    assert at_b == [_filled(catalog) for catalog in b]
    assert [_read(catalog.shards, b, at_b) for catalog in a] == at_a


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_copies_on_several_ranks_are_read_once(data: st.DataObject) -> None:
    model = data.draw(models())
    a = data.draw(catalogs(model, 2))
    b = data.draw(catalogs(model, 2))
    merged = tuple(RankCatalog(rank=i, shards=c.shards, state_capacity_bytes=0) for i, c in enumerate([*a, *b]))
    held = [_filled(catalog) for catalog in merged]
    whole = data.draw(catalogs(model, 1))[0]
    assert _read(whole.shards, merged, held) == _filled(whole)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_missing_shard_is_seen_before_anything_is_read(data: st.DataObject) -> None:
    held = data.draw(catalogs(data.draw(models()), 2))
    shards = [shard for catalog in held for shard in catalog.shards]
    filled = [index for index, shard in enumerate(shards) if shard.length]
    victim = data.draw(st.sampled_from(filled))
    placed = [Placed(shard=s, holder="h", position=0, crc32c=0) for i, s in enumerate(shards) if i != victim]
    with pytest.raises(CoverageError, match=f"tensor={shards[victim].tensor}"):
        plan_read(shards, placed)


@pytest.mark.parametrize("change", [{"dtype": "I32"}, {"shape": (2, 4)}])
def test_another_tensor_of_the_same_name_is_refused(change: dict[str, object]) -> None:
    fields = {"tensor": "t", "part": "p", "dtype": "F32", "shape": (8,), "offset": 0, "length": 8}
    needed = Shard(**fields)  # type: ignore[arg-type]
    stored = Shard(**(fields | change))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="stored tensor differs"):
        plan_read([needed], [Placed(shard=stored, holder="h", position=0, crc32c=0)])
