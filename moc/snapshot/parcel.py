"""A rank's snapshot on its way from one arena to another of the same catalog: its seal, and the bytes of some units.

The bytes are those of the shards in catalog order, then the state blob, without the gaps of a slot, so that the gaps of
the receiving arena stay the zeros that an object needs. Units that the receiver holds already, of the same life, step
and checksums, do not travel.

A parcel becomes a snapshot by its seal, which is written last: after every checksum of the record, those of units that
did not travel included, was found right in the receiver's memory.
"""

from __future__ import annotations

import base64
import binascii
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from moc._native import crc32c
from moc.errors import IntegrityError, UsageError
from moc.format.object import align
from moc.plan.layout import Unit
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord, decode_seal, encode_seal

__all__ = [
    "CHUNK_BYTES",
    "Intake",
    "parcel_bytes",
    "parcel_chunks",
    "piece_range",
    "range_chunks",
    "read_seal",
    "seal_mark",
    "unit_ranges",
    "write_seal",
]

CHUNK_BYTES = 1 << 18  # a bound of what is copied at once, and of what a sender holds beside the arena


def parcel_bytes(arena: Arena, record: SealRecord, units: tuple[int, ...]) -> int:
    """Return how many bytes travel for these units."""
    return sum(length for _, length in unit_ranges(arena, record, units))


def parcel_chunks(arena: Arena, record: SealRecord, units: tuple[int, ...]) -> Iterator[memoryview]:
    """Yield the bytes of these units as `range_chunks`; the record must stay pinned meanwhile."""
    return range_chunks(arena, unit_ranges(arena, record, units))


def piece_range(arena: Arena, record: SealRecord, piece: str) -> tuple[int, int]:
    """Return (offset in the arena, length) of the shard of this number, or of the "state" blob.

    Raises: UsageError if there is none.
    """
    shards = arena.catalog(record.rank).shards
    if piece == "state":
        return arena.state_offset(record.rank, record.slots), record.state_bytes
    if not (piece.isascii() and piece.isdigit() and len(piece) < 10 and int(piece) < len(shards)):
        raise UsageError(f"there is no such piece: rank={record.rank} piece={piece[:20]!r} shards={len(shards)}")
    index, units = int(piece), arena.rank_layout(record.rank).units
    number = (
        bisect_right(units, index, key=lambda unit: unit.first) - 1
    )  # pieces are asked for one by one, of thousands
    base = arena.slot_offset(record.rank, number, record.slots[number])
    return base + units[number].positions[index - units[number].first], shards[index].size_bytes


def range_chunks(arena: Arena, ranges: Iterable[tuple[int, int]]) -> Iterator[memoryview]:
    """Yield the bytes of such ranges, copied once; a chunk is valid until the next one is asked for."""
    buffer, filled = memoryview(bytearray(CHUNK_BYTES)), 0
    for offset, length in ranges:
        reached = 0
        while reached < length:
            taken = min(CHUNK_BYTES - filled, length - reached)
            with arena.view(offset + reached, taken) as view:
                buffer[filled : filled + taken] = view
            reached, filled = reached + taken, filled + taken
            if filled == CHUNK_BYTES:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def unit_ranges(arena: Arena, record: SealRecord, units: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (offset in the arena, length) of every shard of these units, and of the state blob after the dense part."""
    layout, shards = arena.rank_layout(record.rank), arena.catalog(record.rank).shards
    for number in units:
        unit = layout.units[number]
        base = arena.slot_offset(record.rank, number, record.slots[number])
        for index, position in enumerate(unit.positions, start=unit.first):
            yield base + position, shards[index].size_bytes
        if unit.state_position is not None:
            yield base + unit.state_position, record.state_bytes


def write_seal(record: SealRecord) -> str:
    """Return a seal as a text."""
    return base64.b64encode(encode_seal(record)).decode()


def read_seal(text: object) -> SealRecord:
    """Return the seal of such a text; raises UsageError if it is none, or not as it was written."""
    try:
        record = decode_seal(memoryview(base64.b64decode(str(text), validate=True)))
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"not a seal: reason={error}") from error
    if record is None:
        raise UsageError("not a seal: checksum or length is wrong")
    return record


def seal_mark(record: SealRecord) -> int:
    """Return a checksum of all that two arenas have in common of a snapshot: everything but its slots."""
    return crc32c(encode_seal(replace(record, slots=array("I", bytes(4 * len(record.slots))))))


class Intake:
    """One parcel that arrives: a free record and free slots, until `publish`. Thread: one at a time.

    It writes only where no sealed record of the rank points to, so an intake that ends early leaves nothing behind.
    """

    def __init__(self, arena: Arena, record: SealRecord, *, may_share: bool = True) -> None:
        """Find room for the snapshot that `record` seals elsewhere; `may_share` units that are here already.

        Raises: UsageError if there is none, or if the record is not of this arena's catalog.
        """
        rank = record.rank
        if all(catalog.rank != rank for catalog in arena.catalogs):
            raise UsageError(f"no room was declared for this rank: rank={rank}")
        layout, catalog = arena.rank_layout(rank), arena.catalog(rank)
        if (
            len(record.slots) != len(layout.units)
            or len(record.crcs) != len(catalog.shards)
            or record.state_bytes > catalog.state_capacity_bytes
        ):
            raise UsageError(f"the seal is of another catalog: rank={rank} step={record.step}")
        free = [index for index in range(layout.versions) if arena.is_free(rank, index)]
        if not free:
            raise UsageError(f"no room for another snapshot: rank={rank} step={record.step} held={layout.versions}")
        self._arena, self._index = arena, free[0]
        held = arena.seals(rank)
        if len(held) + len(free) < layout.versions:
            raise IntegrityError(f"a seal record is corrupt, and its slots are unknown: rank={rank}")
        slots, self.units = _claim(arena, record, held, may_share=may_share)
        self.record = replace(record, slots=slots)
        self.size_bytes = parcel_bytes(arena, self.record, self.units)
        self._ranges = unit_ranges(arena, self.record, self.units)
        self._offset = self._room = 0
        self.missing_bytes = self.size_bytes
        blob_end = arena.state_offset(rank, slots) + record.state_bytes
        with arena.view(blob_end, align(record.state_bytes) - record.state_bytes) as rest:
            rest[:] = bytes(rest.nbytes)  # the tail of an earlier, longer blob: an object stores zeros there

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes. Raises: UsageError if there are more than were announced."""
        if len(data) > self.missing_bytes:
            raise UsageError(f"more bytes than announced: rank={self.record.rank} bytes={self.size_bytes}")
        source, reached = memoryview(data), 0
        while reached < len(data):
            while not self._room:
                self._offset, self._room = next(self._ranges)
            taken = min(self._room, len(data) - reached)
            with self._arena.view(self._offset, taken) as view:
                view[:] = source[reached : reached + taken]
            self._offset, self._room, reached = self._offset + taken, self._room - taken, reached + taken
        self.missing_bytes -= len(data)

    def check(self) -> None:
        """Raise ShardCorruptError unless all bytes that the record speaks of are here. Blocks: reads all of them."""
        if self.missing_bytes:
            raise UsageError(f"bytes are missing: rank={self.record.rank} missing={self.missing_bytes}")
        self._arena.check(self.record)

    def publish(self) -> None:
        """Make it a snapshot. Only after `check`."""
        self._arena.seal(self._index, self.record)


def _claim(
    arena: Arena, record: SealRecord, held: Mapping[int, SealRecord], *, may_share: bool
) -> tuple[array[int], tuple[int, ...]]:
    """Return a slot per unit, and the units whose bytes must travel."""
    layout = arena.rank_layout(record.rank)
    slots, wanted = array("I"), []
    for number, unit in enumerate(layout.units):
        same = [other for other in held.values() if unit.expert is not None and _has_same(record, other, number, unit)]
        if may_share and same:
            slots.append(same[0].slots[number])
            continue
        taken = {other.slots[number] for other in held.values()}
        # A record less than versions leaves at least one slot of every unit.
        slots.append(next(version for version in range(layout.versions) if version not in taken))
        wanted.append(number)
    return slots, tuple(wanted)


def _has_same(record: SealRecord, other: SealRecord, number: int, unit: Unit) -> bool:
    """Return whether both snapshots hold the same bytes of this unit: of one life and step, with equal checksums."""
    shards = slice(unit.first, unit.first + unit.count)
    return (
        (other.run, other.incarnation) == (record.run, record.incarnation)
        and other.steps[number] == record.steps[number]
        and other.crcs[shards] == record.crcs[shards]
    )
