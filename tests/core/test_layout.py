"""The arena's layout: everything has its own place, at the right alignment, whatever the catalogs."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from moc.format.object import ALIGNMENT
from moc.plan.layout import RECORD_FIXED_BYTES, WORDS_BYTES, arrange_arena
from tests.core.values import catalogs, models


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_overlaps_and_all_is_inside(data: st.DataObject) -> None:
    held = data.draw(catalogs(data.draw(models()), data.draw(st.integers(1, 3))))
    versions = data.draw(st.integers(2, 8))
    layout = arrange_arena(held, versions=versions, descriptor_bytes=data.draw(st.integers(1, 20_000)))

    taken = [(0, layout.descriptor_bytes)]
    for index, catalog in enumerate(held):
        rank = layout.ranks[index]
        assert rank.rank == catalog.rank
        taken.append((layout.words[index], WORDS_BYTES))
        assert rank.record_bytes >= RECORD_FIXED_BYTES + 12 * len(rank.units) + 4 * len(catalog.shards)
        taken += [
            (layout.records[index] + version * rank.record_bytes, rank.record_bytes) for version in range(versions)
        ]
        for number, unit in enumerate(rank.units):
            for version in range(versions):
                slot = layout.slots[index] + rank.slot_offset(number, version)
                assert slot % ALIGNMENT == 0
                shards = catalog.shards[unit.first : unit.first + unit.count]
                assert all(shard.expert == unit.expert for shard in shards)
                ranges = [(slot + p, s.size_bytes) for p, s in zip(unit.positions, shards, strict=True)]
                if unit.state_position is not None:
                    ranges.append((slot + unit.state_position, catalog.state_capacity_bytes))
                assert all(begin % ALIGNMENT == 0 for begin, _ in ranges)
                assert all(begin + length <= slot + unit.size_bytes for begin, length in ranges)
                taken += ranges
        assert [unit.state_position is not None for unit in rank.units] == [True] + [False] * (len(rank.units) - 1)
        assert sum(unit.count for unit in rank.units) == len(catalog.shards)
        assert len({unit.expert for unit in rank.units}) == len(rank.units)
    filled = sorted(row for row in taken if row[1])
    for (begin, length), (following, _) in pairwise(filled):
        assert begin + length <= following
    assert sum(filled[-1]) <= layout.size_bytes
    assert layout.size_bytes % ALIGNMENT == 0
