"""Memory that rots, and what is left of it for a recovery: which experts each snapshot has whole and right.

A bit flips in the newest snapshot alone, in an expert that the snapshots before it have in other slots: whoever
recovers must find it, and take that expert from an older layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moc.agent.custody import Custody
from moc.errors import ShardCorruptError
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert
from tests.sim.versions import consistent_steps

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

__all__ = ["Layer", "Remains", "remains_of", "rot"]

Layer = tuple[int, int, str]  # life, step, attempt
Remains = Mapping[Layer, Mapping[Expert, int]]
"""By snapshot the step of each expert that is whole and right; nothing is, where some rank has not sealed it."""


def rot(sim: Simulation) -> None:
    """Flip a bit in the newest snapshot of every agent that saves nothing now."""
    for agent in sim.agents:
        custody = agent.server._custody if agent.process.is_alive and agent.server is not None else None
        if custody is not None and not custody.pinned():
            _flip(sim, custody.source())


def remains_of(custody: Custody) -> Remains:
    """Return what each snapshot in an arena, of whatever life, still has."""
    source = custody.source()
    ranks = source.life.ranks
    found: dict[Layer, dict[Expert, int]] = {}
    for layer, records in _snapshots(source.arena, ranks).items():
        found[layer] = {}
        if set(records) == set(ranks):
            rotten = {expert for record in records.values() for expert in _rotten(source.arena, record)}
            steps = consistent_steps(dict.fromkeys(ranks, source.arena), records)
            found[layer] = {expert: step for expert, step in steps.items() if expert not in rotten}
    return found


def _snapshots(arena: Arena, ranks: tuple[int, ...]) -> dict[Layer, dict[int, SealRecord]]:
    found: dict[Layer, dict[int, SealRecord]] = {}
    for rank in ranks:
        for record in arena.seals(rank).values():
            found.setdefault((record.incarnation, record.step, record.attempt), {})[rank] = record
    return found


def _rotten(arena: Arena, record: SealRecord) -> list[Expert]:
    found = []
    for number, unit in enumerate(arena.rank_layout(record.rank).units):
        if unit.expert is None:
            continue
        try:
            arena.check(record, [number])
        except ShardCorruptError:
            found.append(unit.expert)
    return found


def _flip(sim: Simulation, custody: Custody) -> None:
    arena, ranks = custody.arena, custody.life.ranks
    snapshots = _snapshots(arena, ranks)
    complete = [layer for layer, records in snapshots.items() if set(records) == set(ranks)]
    if not complete:
        return
    newest = max(complete)
    rank = sim.chance.choice(ranks)
    record = snapshots[newest][rank]
    others = [other for other in arena.seals(rank).values() if other != record]
    units = arena.rank_layout(rank).units
    own = [
        number
        for number, unit in enumerate(units)
        if unit.expert is not None and all(other.slots[number] != record.slots[number] for other in others)
    ]
    if not own:
        return
    number = sim.chance.choice(own)
    place = arena.slot_offset(rank, number, record.slots[number]) + units[number].positions[0]
    view = arena.view(place, 1)
    view[0] ^= 1 << sim.chance.randrange(8)
    view.release()
    sim.auditor.note_rot(newest, rank, units[number].expert)
