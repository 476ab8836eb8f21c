"""Where a rank's units and shards lie in its arena, as arrays, so that many experts cost no loop at a boundary."""

from __future__ import annotations

from array import array

import numpy as np

from moc.plan.slots import Slots
from moc.plan.turns import Chosen, Turns
from moc.snapshot.arena import Arena

__all__ = ["Places"]


class Places:
    """The places of one rank; constant. Thread: any."""

    def __init__(self, arena: Arena, rank: int, turns: Turns) -> None:
        layout = arena.rank_layout(rank)
        self._address, self._state_position = arena.address, layout.units[0].state_position
        self._first_slots = np.array([arena.slot_offset(rank, u, 0) for u in range(len(layout.units))], dtype=np.int64)
        self._sizes = np.array([unit.size_bytes for unit in layout.units], dtype=np.int64)
        self._unit_of_shard = np.repeat(np.arange(len(layout.units)), [unit.count for unit in layout.units])
        self._positions = np.array([p for unit in layout.units for p in unit.positions], dtype=np.int64)
        self._lengths = np.array([shard.size_bytes for shard in arena.catalog(rank).shards], dtype=np.int64)
        experts = [unit.expert for unit in layout.units if unit.expert is not None]
        self._experts = np.array([turns.place(expert) for expert in experts], dtype=np.int64)

    @property
    def shard_count(self) -> int:
        return len(self._positions)

    def bytes_of(self, units: Chosen) -> int:
        """Return how many bytes a copy of these units takes."""
        return int(self._lengths[units[self._unit_of_shard]].sum())

    def units_of(self, experts: Chosen | None) -> Chosen:
        """Return by unit what a choice of experts (None: all) copies; the dense part, unit 0, always."""
        units = np.ones(len(self._sizes), dtype=np.bool_)
        if experts is not None:
            units[1:] = experts[self._experts]
        return units

    def state_offset(self, slots: Slots) -> int:
        """Return where the state blob lies, in bytes from the arena's start."""
        assert self._state_position is not None, "the dense unit carries the state"
        return int(self._first_slots[0] + slots[0] * self._sizes[0]) + self._state_position

    def targets(self, slots: Slots, units: Chosen) -> array[int]:
        """Return every shard's address for these slots, 0 for those of units that are left out."""
        offsets = (self._first_slots + slots * self._sizes)[self._unit_of_shard] + self._positions
        addresses = np.where(units[self._unit_of_shard], self._address + offsets, 0)
        return array("Q", addresses.astype(np.uint64).tobytes())
