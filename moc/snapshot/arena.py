"""The arena: one memfd per node that the agent owns and every trainer of the node maps.

Layout (see `moc.plan.layout`): a prologue page, two descriptor areas used in turn, one page of words per rank, seal
records, slots. The descriptor makes the arena self-describing: a new agent that receives only the descriptor can go on.
Multi-byte values are little-endian; a word is 64 bits, loaded with acquire and stored with release order.

Who writes what: the agent writes prologue and descriptors, and turns a record's state word to FREE; a trainer writes
its rank's words, slots and records, and turns a state word from FREE to SEALED. Nobody else writes anything.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moc._native import advise_dontfork, crc32c, crc32c_gather, load_acquire_u64, populate, store_release_u64
from moc.errors import IntegrityError, InternalError, ShardCorruptError
from moc.format.object import align
from moc.plan.layout import ArenaLayout, RankLayout, arrange_arena
from moc.snapshot.seal import FREE, SEALED, SealRecord, decode_seal, encode_seal
from moc.state import RankCatalog, catalogs_from_json

__all__ = ["Arena", "CorruptSeal", "RankWords", "Timings", "descriptor_room"]

_MAGIC = b"mocarena"
_VERSION = 1
_PROLOGUE = struct.Struct("<8sQQQ")  # magic, version, room of one descriptor area, arena size
_SELECTOR = 64  # offset of the word that names the valid descriptor area
_GLOBAL_STEP, _COMMITTED_STEP, _SETTLED_STEP = 128, 192, 256  # offsets of the agent's words; 0: none, else step + 1
_AREA = struct.Struct("<QI")  # length, crc32c; in front of each descriptor
_SEALED_STEP, _BEAT_STEP, _BEAT_NS, _BEAT_INTERVAL_NS, _BEAT_INCARNATION, _SKIPPED, _COPY_RATE, _PASS_NS = range(8)
_WORDS = 8
WORD_BYTES = 64  # one cache line per word


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptSeal:
    """A record whose state word says SEALED but whose bytes do not match its checksum."""

    rank: int
    record: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWords:
    """A rank's words: newest sealed step (None before the first) and its heartbeat; times are CLOCK_MONOTONIC
    nanoseconds.
    """

    sealed_step: int | None
    beat_step: int
    beat_ns: int
    beat_interval_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What a rank has measured last, 0 before: bytes copied per second, nanoseconds of forward and backward pass."""

    copy_rate: int
    pass_ns: int


def descriptor_room(descriptor: Mapping[str, object]) -> int:
    """Return the bytes to reserve for prologue and two descriptor areas, with room for the descriptor to grow."""
    length = len(json.dumps(descriptor).encode())
    return mmap.PAGESIZE + 2 * align(length + length // 4 + 65536)


class Arena:
    """A mapping of an arena. Thread: methods are independent; one writer per record and word, as the module says."""

    def __init__(self, fd: int, *, size_bytes: int) -> None:
        """Map `fd`, which stays owned by the arena and is closed with it."""
        self.fd = fd
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes)
        self._pin = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._pin)
        self._view = memoryview(self._map)
        advise_dontfork(self.address, size_bytes)
        self._map.madvise(mmap.MADV_DONTDUMP)  # a core dump is no place for weights, and need not be that large
        self.descriptor: dict[str, object] = {}
        self.layout: ArenaLayout
        self.catalogs: tuple[RankCatalog, ...] = ()

    @classmethod
    def create(cls, descriptor: Mapping[str, object], layout: ArenaLayout, *, name: str) -> Arena:
        """Create, populate and describe an arena. Blocks: about 0.7 s per GB. Raises: OSError with ENOMEM."""
        fd = os.memfd_create(f"moc-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)  # a memfd begins with rights for everybody
            os.posix_fallocate(fd, 0, layout.size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            arena = cls(fd, size_bytes=layout.size_bytes)
        except BaseException:
            os.close(fd)
            raise
        try:
            populate(arena.address, layout.size_bytes)
            room = (layout.descriptor_bytes - mmap.PAGESIZE) // 2
            _PROLOGUE.pack_into(arena._view, 0, _MAGIC, _VERSION, room, layout.size_bytes)
            arena.describe(descriptor)
        except BaseException:
            arena.close()
            raise
        return arena

    @classmethod
    def attach(cls, fd: int) -> Arena:
        """Map an existing arena and read its descriptor.

        Raises IntegrityError if it is not one. Owns `fd`, also when it raises.
        """
        try:
            size = os.fstat(fd).st_size
            # Without the seal its owner could cut it short, and whoever reads it would die of SIGBUS.
            if size < 2 * mmap.PAGESIZE or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise IntegrityError(f"not an arena: bytes={size}")
            arena = cls(fd, size_bytes=size)
        except OSError as error:
            os.close(fd)
            raise IntegrityError(f"not an arena: reason={error}") from error
        except BaseException:
            os.close(fd)
            raise
        try:
            magic, version, _, stated = _PROLOGUE.unpack_from(arena._view, 0)
            if magic != _MAGIC or version != _VERSION or stated != size:
                raise IntegrityError(
                    f"not an arena of this version: magic={magic!r} version={version} allowed={_VERSION} bytes={stated}"
                )
            arena.reload()
        except BaseException:
            arena.close()
            raise
        return arena

    # Descriptor

    def has_room(self, descriptor: Mapping[str, object]) -> bool:
        """Return whether the descriptor fits into its area."""
        return _AREA.size + len(json.dumps(descriptor, separators=(",", ":")).encode()) <= self._room()

    def describe(self, descriptor: Mapping[str, object]) -> None:
        """Replace the descriptor; a crash here leaves the old or the new one. Agent only."""
        text = json.dumps(descriptor, separators=(",", ":")).encode()
        room = self._room()
        if _AREA.size + len(text) > room:
            raise InternalError(f"descriptor does not fit: bytes={len(text)} allowed={room - _AREA.size}")
        area = 1 - load_acquire_u64(self.address + _SELECTOR) % 2
        begin = mmap.PAGESIZE + area * room
        self._view[begin + _AREA.size : begin + _AREA.size + len(text)] = text
        _AREA.pack_into(self._view, begin, len(text), crc32c(text))
        store_release_u64(self.address + _SELECTOR, area)
        self.reload()

    def reload(self) -> None:
        """Read the valid descriptor and derive the layout from it; raises IntegrityError."""
        room = self._room()
        if mmap.PAGESIZE + 2 * room > self.size_bytes or room < _AREA.size:
            raise IntegrityError(f"arena has no room for its descriptors: room={room} bytes={self.size_bytes}")
        begin = mmap.PAGESIZE + load_acquire_u64(self.address + _SELECTOR) % 2 * room
        length, expected = _AREA.unpack_from(self._view, begin)
        text = bytes(self._view[begin + _AREA.size : begin + _AREA.size + min(length, room - _AREA.size)])
        if crc32c(text) != expected:
            raise IntegrityError(f"arena descriptor checksum mismatch: expected={expected} actual={crc32c(text)}")
        try:
            descriptor = json.loads(text)
            catalogs, versions = catalogs_from_json(descriptor["catalogs"]), descriptor["versions"]
            if type(versions) is not int or versions < 1:
                raise ValueError(f"wrong number of versions: {versions=}")
        except (InternalError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise IntegrityError(f"arena descriptor is not readable: reason={type(error).__name__}: {error}") from error
        layout = arrange_arena(catalogs, versions=versions, descriptor_bytes=mmap.PAGESIZE + 2 * room)
        if layout.size_bytes != self.size_bytes:
            raise IntegrityError(
                f"arena size does not fit its descriptor: expected={layout.size_bytes} actual={self.size_bytes}"
            )
        self.descriptor, self.layout, self.catalogs = descriptor, layout, catalogs

    def _room(self) -> int:
        return int(_PROLOGUE.unpack_from(self._view, 0)[2])

    # Words

    def publish(self, *, global_step: int | None, committed_step: int | None) -> None:
        """Tell the trainers what is global and what is committed. Agent only."""
        for offset, step in ((_GLOBAL_STEP, global_step), (_COMMITTED_STEP, committed_step)):
            store_release_u64(self.address + offset, 0 if step is None else step + 1)

    def published(self) -> tuple[int | None, int | None]:
        """Return the newest global and the newest committed step of this life."""
        raw = [load_acquire_u64(self.address + offset) for offset in (_GLOBAL_STEP, _COMMITTED_STEP)]
        return (raw[0] - 1 if raw[0] else None, raw[1] - 1 if raw[1] else None)

    def publish_settled(self, step: int | None) -> None:
        """Tell the trainers up to which step nothing is left to replicate. Agent only."""
        store_release_u64(self.address + _SETTLED_STEP, 0 if step is None else step + 1)

    def settled_step(self) -> int | None:
        """Return the step up to which this node has nothing left to replicate."""
        raw = load_acquire_u64(self.address + _SETTLED_STEP)
        return raw - 1 if raw else None

    def words(self, rank: int) -> RankWords:
        """Return a rank's words."""
        raw = [self._load_word(rank, word) for word in range(_WORDS)]
        return RankWords(
            sealed_step=raw[_SEALED_STEP] - 1 if raw[_SEALED_STEP] else None,
            beat_step=raw[_BEAT_STEP],
            beat_ns=raw[_BEAT_NS],
            beat_interval_ns=raw[_BEAT_INTERVAL_NS],
        )

    def beat(self, rank: int, *, incarnation: int, step: int, now_ns: int) -> None:
        """Publish a heartbeat. Trainer of this rank only."""
        last = self._load_word(rank, _BEAT_NS)
        if last and self._load_word(rank, _BEAT_INCARNATION) == incarnation:
            self._store_word(rank, _BEAT_INTERVAL_NS, now_ns - last)
        self._store_word(rank, _BEAT_INCARNATION, incarnation)
        self._store_word(rank, _BEAT_STEP, step)
        self._store_word(rank, _BEAT_NS, now_ns)

    def note_skip(self, rank: int, step: int, ordinal: int) -> None:
        """Publish that this rank will seal neither this snapshot of a step nor an earlier one. Its trainer only."""
        self._store_word(rank, _SKIPPED, (step << 8 | ordinal) + 1)

    def skipped(self, rank: int) -> tuple[int, int] | None:
        """Return step and ordinal of the newest `note_skip`, None before the first."""
        raw = self._load_word(rank, _SKIPPED)
        return ((raw - 1) >> 8, (raw - 1) & 0xFF) if raw else None

    def note_copy(self, rank: int, rate: int) -> None:
        """Publish how many bytes per second the last copy took. Its trainer only."""
        self._store_word(rank, _COPY_RATE, rate)

    def note_pass(self, rank: int, pass_ns: int) -> None:
        """Publish how long the last forward and backward pass took. Its trainer only."""
        self._store_word(rank, _PASS_NS, pass_ns)

    def timings(self, rank: int) -> Timings:
        """Return what a rank has measured."""
        return Timings(copy_rate=self._load_word(rank, _COPY_RATE), pass_ns=self._load_word(rank, _PASS_NS))

    def clear_words(self, rank: int) -> None:
        """Forget sealed step, heartbeat and timings. Agent only, when no trainer of the rank lives."""
        for word in range(_WORDS):
            self._store_word(rank, word, 0)

    def _load_word(self, rank: int, word: int) -> int:
        return load_acquire_u64(self.address + self.layout.words[self.layout.index_of(rank)] + word * WORD_BYTES)

    def _store_word(self, rank: int, word: int, value: int) -> None:
        store_release_u64(self.address + self.layout.words[self.layout.index_of(rank)] + word * WORD_BYTES, value)

    # Seals

    def seal(self, record_index: int, record: SealRecord) -> None:
        """Write a record and publish it. Trainer of this rank only; the record must be FREE and its slots filled."""
        offset = self._record_offset(record.rank, record_index)
        encoded = encode_seal(record)
        if len(encoded) > self.rank_layout(record.rank).record_bytes:
            raise InternalError(f"seal record does not fit: rank={record.rank} bytes={len(encoded)}")
        self._view[offset + 8 : offset + len(encoded)] = encoded[8:]
        store_release_u64(self.address + offset, SEALED)
        self._store_word(record.rank, _SEALED_STEP, record.step + 1)

    def read_seal(self, rank: int, record_index: int) -> SealRecord | CorruptSeal | None:
        """Return a rank's record, None if it is free."""
        offset = self._record_offset(rank, record_index)
        if load_acquire_u64(self.address + offset) == FREE:
            return None
        record = decode_seal(self._view[offset : offset + self.rank_layout(rank).record_bytes])
        layout = self.rank_layout(rank)
        catalog = self.catalogs[self.layout.index_of(rank)]
        fits = (
            record is not None
            and record.rank == rank
            and len(record.slots) == len(layout.units)
            and len(record.crcs) == len(catalog.shards)
            and max(record.slots) < layout.versions
            and record.state_bytes <= catalog.state_capacity_bytes
        )
        return record if record is not None and fits else CorruptSeal(rank=rank, record=record_index)

    def is_free(self, rank: int, record_index: int) -> bool:
        return load_acquire_u64(self.address + self._record_offset(rank, record_index)) == FREE

    def free(self, rank: int, record_index: int) -> None:
        """Give a record and the slots only it used back to the trainer. Agent only."""
        store_release_u64(self.address + self._record_offset(rank, record_index), FREE)

    def seals(self, rank: int) -> dict[int, SealRecord]:
        """Return a rank's valid records by index."""
        found = {i: self.read_seal(rank, i) for i in range(self.layout.ranks[0].versions)}
        return {i: record for i, record in found.items() if isinstance(record, SealRecord)}

    def corrupt_seals(self, rank: int) -> list[CorruptSeal]:
        found = [self.read_seal(rank, i) for i in range(self.layout.ranks[0].versions)]
        return [record for record in found if isinstance(record, CorruptSeal)]

    def _record_offset(self, rank: int, record_index: int) -> int:
        index = self.layout.index_of(rank)
        layout = self.layout.ranks[index]
        if not 0 <= record_index < layout.versions:
            raise InternalError(f"record index out of range: record={record_index} allowed=0..{layout.versions - 1}")
        return self.layout.records[index] + record_index * layout.record_bytes

    # Slots

    def rank_layout(self, rank: int) -> RankLayout:
        return self.layout.ranks[self.layout.index_of(rank)]

    def catalog(self, rank: int) -> RankCatalog:
        return self.catalogs[self.layout.index_of(rank)]

    def slot_offset(self, rank: int, unit: int, version: int) -> int:
        """Return where a slot begins, in bytes from the arena's start."""
        index = self.layout.index_of(rank)
        return self.layout.slots[index] + self.layout.ranks[index].slot_offset(unit, version)

    def shard_offsets(self, rank: int, slots: array[int]) -> array[int]:
        """Return where every shard of the rank lies for these slots, in bytes from its start, in catalog order."""
        offsets = array("Q")
        for number, unit in enumerate(self.rank_layout(rank).units):
            base = self.slot_offset(rank, number, slots[number])
            offsets.extend(base + position for position in unit.positions)
        return offsets

    def state_offset(self, rank: int, slots: array[int]) -> int:
        """Return where the state blob lies for these slots."""
        unit = self.rank_layout(rank).units[0]
        if unit.state_position is None:
            raise InternalError(f"first unit carries no state: rank={rank}")
        return self.slot_offset(rank, 0, slots[0]) + unit.state_position

    def view(self, offset: int, length: int) -> memoryview:
        """Return a view of the arena; release it before `close`."""
        return self._view[offset : offset + length]

    def check(self, record: SealRecord, units: Sequence[int] | None = None) -> None:
        """Raise ShardCorruptError naming the first shard (or the state) whose bytes do not match the seal.

        Looks at these units only, where given. Blocks: reads all of them.
        """
        catalog, offsets = self.catalog(record.rank).shards, self.shard_offsets(record.rank, record.slots)
        chosen = self.shards_of(record.rank, units)
        addresses = array("Q", (self.address + offsets[index] for index in chosen))
        lengths = array("Q", (catalog[index].size_bytes for index in chosen))
        actual = array("I", bytes(4 * len(chosen)))
        crc32c_gather(addresses, lengths, actual)
        where = f"source=memory rank={record.rank} step={record.step} incarnation={record.incarnation}"
        for index, found in zip(chosen, actual, strict=True):
            if record.crcs[index] != found:
                raise ShardCorruptError(
                    f"shard checksum mismatch: shard={catalog[index].name} {where} expected={record.crcs[index]} "
                    f"actual={found}"
                )
        self.check_state(record)

    def check_state(self, record: SealRecord) -> None:
        """Raise ShardCorruptError if the state blob does not match the seal."""
        state = crc32c(self.view(self.state_offset(record.rank, record.slots), record.state_bytes))
        if state != record.state_crc32c:
            raise ShardCorruptError(
                f"state checksum mismatch: source=memory rank={record.rank} step={record.step} "
                f"incarnation={record.incarnation} expected={record.state_crc32c} actual={state}"
            )

    def shards_of(self, rank: int, units: Sequence[int] | None = None) -> list[int]:
        """Return the places in the catalog of these units' shards (None: of all units)."""
        layout = self.rank_layout(rank).units
        numbers = range(len(layout)) if units is None else units
        return [index for n in numbers for index in range(layout[n].first, layout[n].first + layout[n].count)]

    def populate_rank(self, rank: int) -> None:
        """Make this process's mapping of one rank's slots present and writable. Blocks: about 0.7 s per GB."""
        index = self.layout.index_of(rank)
        populate(self.address + self.layout.slots[index], self.layout.ranks[index].slots_bytes)

    def close(self) -> None:
        """Unmap and close; views must have been released."""
        self._view.release()
        del self._pin
        self._map.close()
        os.close(self.fd)
