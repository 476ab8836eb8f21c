"""A snapshot in memory as the source of a restore: what this node has of it, and what agents of other nodes have.

What is here is read in place; of the rest only those shards are asked for that some needed one is made of, and nothing
at all where this node has all it needs. Every byte is checked by who reads it (see `moc.recover`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from moc.errors import MocError, ShardCorruptError
from moc.plan.layout import Unit
from moc.plan.lineage import MEMORY
from moc.plan.read import Placed, find_pieces
from moc.plan.versions import Inventory, Version
from moc.recover import Placing, decode_checked, is_inside, split_tree
from moc.routing import Capture
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert, RankCatalog, Shard

__all__ = ["HeldPart", "MemorySource", "Part", "held_parts"]

log = logging.getLogger(__name__)


class Part(Protocol):
    """One rank's part of a snapshot, in somebody's memory. Thread: `read` from any thread, the rest from one.

    Raises: ShardCorruptError where it cannot be had, from every member.
    """

    @property
    def record(self) -> SealRecord:
        """Return the rank's seal."""

    @property
    def catalog(self) -> RankCatalog:
        """Return what the rank has sealed."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """Return how the catalog is divided."""

    @property
    def life(self) -> Mapping[str, object]:
        """Return the descriptor of the life that the rank was of: its topology, software and fingerprint."""

    @property
    def holder(self) -> str:
        """Return where it is, in words."""

    @property
    def lent_bytes(self) -> int:
        """Return how many bytes of it have come from other nodes so far."""

    def read(self, index: int) -> memoryview:
        """Return all bytes of a shard of the catalog."""

    def state(self) -> bytes:
        """Return the state blob."""


class HeldPart:
    """A part in this node's arena, which stays open longer."""

    lent_bytes = 0

    def __init__(self, arena: Arena, record: SealRecord) -> None:
        self._arena, self.record = arena, record
        self.catalog, self.units = arena.catalog(record.rank), arena.rank_layout(record.rank).units
        self.life: Mapping[str, object] = arena.descriptor
        self.holder = f"memory rank={record.rank}"
        self._offsets = arena.shard_offsets(record.rank, record.slots)

    def read(self, index: int) -> memoryview:
        return self._arena.view(self._offsets[index], self.catalog.shards[index].size_bytes)

    def state(self) -> bytes:
        view = self._arena.view(self._arena.state_offset(self.record.rank, self.record.slots), self.record.state_bytes)
        with view:
            return bytes(view)


def held_parts(arena: Arena, records: Mapping[int, SealRecord]) -> dict[int, HeldPart]:
    """Return the parts of a snapshot that these seals of an arena are, by rank."""
    return {rank: HeldPart(arena, record) for rank, record in sorted(records.items())}


class MemorySource:
    """A snapshot in memory. A rank's part that is here is never asked for elsewhere."""

    def __init__(self, own: Mapping[int, Part], lent: Mapping[int, Part] | None = None) -> None:
        """`own` are the parts on this node, by rank of the life that took the snapshot, `lent` those of other nodes."""
        self._own = dict(sorted(own.items()))
        self._lent = {rank: part for rank, part in sorted((lent or {}).items()) if rank not in own}
        assert self._own or self._lent, "a snapshot of which there is nothing"
        self._rows: dict[tuple[str, int], tuple[Part, int]] = {}
        self._lent_experts: set[Expert] = set()

    @property
    def world_size(self) -> int:
        topology = self._life["topology"]
        assert isinstance(topology, dict), "the descriptor was written by describe_life"
        return int(topology["world_size"])

    @property
    def software(self) -> Mapping[str, object]:
        software = self._life["software"]
        assert isinstance(software, dict), "the descriptor was written by describe_life"
        return software

    @property
    def fingerprint(self) -> Mapping[str, object]:
        fingerprint = self._life["fingerprint"]
        assert isinstance(fingerprint, dict), "the descriptor was written by describe_life"
        return fingerprint

    @property
    def _life(self) -> Mapping[str, object]:
        for part in self._own.values():
            return part.life
        *others, last = self._lent.values()
        for part in others:
            with contextlib.suppress(ShardCorruptError):
                return part.life
        return last.life

    @property
    def lent_bytes(self) -> int:
        """Return how many bytes have come from other nodes so far."""
        return sum(part.lent_bytes for part in self._lent.values())

    @property
    def lent_experts(self) -> frozenset[Expert]:
        """Return the experts of which something has come from other nodes so far."""
        return frozenset(self._lent_experts)

    def slices(self, experts: Sequence[Expert], rank: int, size: int, *, step: int) -> list[Inventory]:
        told = [_versions(part, step) for holder, part in self._own.items() if holder % size == rank]
        for holder, part in self._lent.items():
            if holder % size == rank:
                try:
                    told.append(_versions(part, step))
                except ShardCorruptError as error:  # its experts are not whole then, for nobody
                    log.warning("part of a snapshot cannot be had: rank=%d step=%d reason=%s", holder, step, error)
        return told

    def placed(self, needed: Sequence[Shard]) -> Placing:
        rows, failures = self._place(self._own, needed)
        if self._lent and find_pieces(needed, rows)[1]:
            lent, failures = self._place(self._lent, needed)
            rows += lent
        return Placing(rows=tuple(rows), failures=tuple(failures))

    def read(self, row: Placed) -> memoryview:
        part, index = self._rows[row.holder, row.position]
        if row.shard.expert is not None and part.record.rank in self._lent:
            self._lent_experts.add(row.shard.expert)
        return part.read(index)

    def state(self, rank: int) -> tuple[object, bool]:
        parts = self._own if rank in self._own else self._lent if rank in self._lent else self._own or self._lent
        holder = rank if rank in parts else list(parts)[rank % len(parts)]
        part = parts[holder]
        return _tree(part), holder == rank

    def _place(self, parts: Mapping[int, Part], needed: Sequence[Shard]) -> tuple[list[Placed], list[MocError]]:
        wanted = {(shard.tensor, shard.part) for shard in needed}
        rows: list[Placed] = []
        failures: list[MocError] = []
        for part in parts.values():
            try:
                shards = part.catalog.shards
            except ShardCorruptError as error:
                failures.append(error)
                continue
            positions = accumulate((shard.size_bytes for shard in shards), initial=0)
            for index, (shard, position, crc) in enumerate(zip(shards, positions, part.record.crcs, strict=False)):
                if (shard.tensor, shard.part) in wanted:
                    rows.append(Placed(shard=shard, holder=part.holder, position=position, crc32c=crc))
                    self._rows[part.holder, position] = (part, index)
        return rows, failures


def _versions(part: Part, step: int) -> Inventory:
    record, shards = part.record, part.catalog.shards
    name = f"{MEMORY} step={record.step} incarnation={record.incarnation} attempt={record.attempt}"
    own = [(unit.expert, record.steps[n], unit) for n, unit in enumerate(part.units) if unit.expert is not None]
    capture = split_tree(_tree(part), True)[2] if any(held < step for _, held, _ in own) else None
    return {
        expert: Version(
            step=held,
            learned=_learned_by(capture, expert, held),
            holder=name,
            elements=sum(shard.length for shard in shards[unit.first : unit.first + unit.count]),
        )
        for expert, held, unit in own
    }


def _tree(part: Part) -> object:
    record = part.record
    return decode_checked(part.state(), record.state_crc32c, f"source={part.holder} step={record.step}")


def _learned_by(capture: Capture | None, expert: Expert, step: int) -> int:
    if capture is None or not is_inside(capture.routing.routed, expert):
        return 0
    # A rank knows what its own versions have learned; should it not, all their routes count as lost.
    return capture.learned_by(expert, step) or 0
