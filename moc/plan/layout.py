"""Where everything lies: units and slots of one rank, and the arena of a node.

A *unit* is what is saved or not saved together: the dense part with the state blob, or one expert. Each unit has one
slot per version; inside a slot every shard starts at a multiple of 4096 bytes and the gaps stay zero, so that a slot
can go to an object as it is.

Arena: prologue and descriptor (`descriptor_bytes`), then one page of words per rank, then each rank's seal records,
then slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from moc.format.object import align
from moc.state import Expert, RankCatalog

__all__ = ["ArenaLayout", "RankLayout", "Unit", "arrange_arena", "arrange_rank"]

RECORD_FIXED_BYTES = 256
WORDS_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The catalog's shards from `first` on, `count` of them; `positions` are in bytes from the slot's start.

    The state blob, where there is one, lies at `state_position`, after the last shard.
    """

    expert: Expert | None
    first: int
    count: int
    positions: tuple[int, ...]
    state_position: int | None
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """Units of one rank.

    `offsets[u]` is unit u's first slot in bytes from the rank's slot area, version v lies v * size further.
    """

    rank: int
    units: tuple[Unit, ...]
    offsets: tuple[int, ...]
    versions: int
    record_bytes: int
    slots_bytes: int

    def slot_offset(self, unit: int, version: int) -> int:
        return self.offsets[unit] + version * self.units[unit].size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaLayout:
    """The arena of one node; offsets in bytes from its start, one entry per rank in `ranks`."""

    descriptor_bytes: int
    ranks: tuple[RankLayout, ...]
    words: tuple[int, ...]
    records: tuple[int, ...]
    slots: tuple[int, ...]
    size_bytes: int

    def index_of(self, rank: int) -> int:
        return next(i for i, layout in enumerate(self.ranks) if layout.rank == rank)


def arrange_rank(catalog: RankCatalog, *, versions: int) -> RankLayout:
    """Return the units of a rank: the dense part first (it always exists and carries the state), then experts in
    catalog order.
    """
    numbered = list(enumerate(catalog.shards))
    groups = [(expert, [i for i, _ in members]) for expert, members in groupby(numbered, key=lambda row: row[1].expert)]
    if not groups or groups[0][0] is not None:
        groups.insert(0, (None, []))
    units = []
    for expert, indices in groups:
        positions, reached = [], 0
        for index in indices:
            positions.append(reached)
            reached = align(reached + catalog.shards[index].size_bytes)
        state_position = reached if expert is None else None
        size = reached + (align(catalog.state_capacity_bytes) if expert is None else 0)
        units.append(
            Unit(
                expert=expert,
                first=indices[0] if indices else 0,
                count=len(indices),
                positions=tuple(positions),
                state_position=state_position,
                size_bytes=size,
            )
        )
    offsets, reached = [], 0
    for unit in units:
        offsets.append(reached)
        reached += unit.size_bytes * versions
    return RankLayout(
        rank=catalog.rank,
        units=tuple(units),
        offsets=tuple(offsets),
        versions=versions,
        record_bytes=align(RECORD_FIXED_BYTES + 12 * len(units) + 4 * len(catalog.shards)),
        slots_bytes=reached,
    )


def arrange_arena(catalogs: tuple[RankCatalog, ...], *, versions: int, descriptor_bytes: int) -> ArenaLayout:
    """Return the arena for these ranks of one node; `descriptor_bytes` is the room for prologue and descriptor."""
    ranks = tuple(arrange_rank(c, versions=versions) for c in sorted(catalogs, key=lambda c: c.rank))
    reached = align(descriptor_bytes)
    words, records, slots = [], [], []
    for _ in ranks:
        words.append(reached)
        reached += WORDS_BYTES
    for rank in ranks:
        records.append(reached)
        reached += rank.record_bytes * versions
    for rank in ranks:
        slots.append(reached)
        reached += rank.slots_bytes
    return ArenaLayout(
        descriptor_bytes=align(descriptor_bytes),
        ranks=ranks,
        words=tuple(words),
        records=tuple(records),
        slots=tuple(slots),
        size_bytes=reached,
    )
