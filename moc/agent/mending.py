"""A snapshot whose experts in pieces are mended with older ones of the same memory, for the last save of an agent.

An expert is in pieces where ranks hold its slices at different steps. Memory may have it whole in an older snapshot,
and storage only in a still older version, so whoever gives the memory up stores that one: what a recovery from memory
would have taken. Nothing is read here but seals.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moc.agent.life import Life
from moc.plan.freeing import Moment
from moc.plan.versions import Inventory, Version, choose, consistent
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert

if TYPE_CHECKING:
    from moc.agent.custody import Custody

__all__ = ["Mended", "Pieces", "in_pieces", "mend", "stack_of"]

PIECES_LIMIT = 16  # snapshots looked at: more than an arena of any settings holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """The seals of a snapshot by rank; the `lenders` are those of older ones in whose slots some of its experts are."""

    records: Mapping[int, SealRecord]
    lenders: tuple[SealRecord, ...] = ()


class Pieces:
    """Which experts of an arena's snapshots are in pieces. Each is looked at once: what is sealed never changes."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._known: dict[tuple[int, Moment], tuple[Mapping[int, SealRecord], frozenset[Expert]]] = {}

    def of(self, key: tuple[int, Moment], records: Mapping[int, SealRecord]) -> frozenset[Expert]:
        """Return the experts of which ranks hold different steps in a snapshot that has these seals."""
        looked_at, found = self._known.get(key, ({}, frozenset()))
        if records.keys() != looked_at.keys() or any(looked_at[rank] is not r for rank, r in records.items()):
            found = in_pieces(self._arena, records)
            self._known[key] = (dict(records), found)
            while len(self._known) > PIECES_LIMIT:
                del self._known[next(iter(self._known))]
        return found


def in_pieces(arena: Arena, records: Mapping[int, SealRecord]) -> frozenset[Expert]:
    """Return the experts of which ranks hold different steps in a snapshot."""
    if all(step == record.step for record in records.values() for step in record.steps):
        return frozenset()
    steps: dict[Expert, int] = {}
    slices = (
        (unit.expert, step)
        for record in records.values()
        for unit, step in zip(arena.rank_layout(record.rank).units, record.steps, strict=True)
        if unit.expert is not None
    )
    return frozenset(expert for expert, step in slices if steps.setdefault(expert, step) != step)


def stack_of(custody: Custody, life: Life, first: tuple[int, Moment]) -> list[Mapping[int, SealRecord]]:
    """Return the seals of a snapshot, then those of older ones that led to it and are whole here, newest first.

    `life` is the present one, of which the custody may be an earlier one's.
    """
    is_own, source = custody.life.record.number == life.record.number, custody.recovery_source(life)
    known = {(record.incarnation, (record.step, record.attempt)) for record in source.values()} | life.layers
    known |= {life.base} if life.base is not None else set()
    known |= {(life.record.number, moment) for moment in custody.complete if is_own}
    older = (custody.records_of(*key) for key in sorted(known, reverse=True) if key < first)
    return [custody.records_of(*first), *(records for records in older if set(records) == set(custody.life.ranks))]


def mend(arena: Arena, stack: Sequence[Mapping[int, SealRecord]]) -> Mended:
    """Return the first snapshot of a stack with every expert as the newest one has it that has it whole.

    All have the same ranks, and follow each other from the newest to the oldest.
    """
    newest, broken = stack[0], in_pieces(arena, stack[0])
    if not broken:
        return Mended(records=newest)
    held = [consistent(_held(arena, record) for record in records.values()) for records in stack]
    lent = {expert: stack[layer] for expert, layer in choose(broken, held, bad=()).layers.items()}
    records = {rank: _patched(arena, record, lent) for rank, record in newest.items()}
    used = [snapshot for snapshot in stack[1:] if snapshot in lent.values()]
    return Mended(records=records, lenders=tuple(record for snapshot in used for record in snapshot.values()))


def _held(arena: Arena, record: SealRecord) -> Inventory:
    units: Iterable[tuple[int, Expert | None]] = (
        (number, unit.expert) for number, unit in enumerate(arena.rank_layout(record.rank).units)
    )
    return {
        expert: Version(step=record.steps[number], learned=0, holder="")
        for number, expert in units
        if expert is not None
    }


def _patched(arena: Arena, record: SealRecord, lent: Mapping[Expert, Mapping[int, SealRecord]]) -> SealRecord:
    """Return the seal with the slots, steps and checksums that these snapshots have for these experts."""
    slots, steps, crcs = array("I", record.slots), array("Q", record.steps), array("I", record.crcs)
    for number, unit in enumerate(arena.rank_layout(record.rank).units):
        if unit.expert is not None and unit.expert in lent:
            lender = lent[unit.expert][record.rank]
            slots[number], steps[number] = lender.slots[number], lender.steps[number]
            crcs[unit.first : unit.first + unit.count] = lender.crcs[unit.first : unit.first + unit.count]
    return replace(record, slots=slots, steps=steps, crcs=crcs)
