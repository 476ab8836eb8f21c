"""Write one rank's sealed snapshot, or the chosen experts of it, to a repository, straight from its slots.

A crash anywhere here leaves objects that no manifest references; `moc.gc` collects them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moc._native import all_finite, crc32c
from moc.errors import ShardCorruptError
from moc.format.keys import CheckpointName, object_key
from moc.format.manifest import ObjectRow
from moc.format.object import ObjectHeader, StoredShard, align, encode_header
from moc.format.relative import StateBase, outline_of, relative_state
from moc.format.tagged import decode_state
from moc.repository import Repository
from moc.routing import ROUTING_KEY, Capture
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert
from moc.trace import Trace

__all__ = ["Receipt", "checkpoint_name", "persist_rank", "read_base", "read_capture"]

_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof of what one rank's snapshot became in the store; `digest` is the plan digest of its seal."""

    rank: int
    digest: str
    rows: tuple[ObjectRow, ...]
    is_finite: bool


def checkpoint_name(record: SealRecord) -> CheckpointName:
    """Return the name of the attempt a seal belongs to."""
    return CheckpointName(run=record.run, incarnation=record.incarnation, step=record.step, attempt=record.attempt)


def read_capture(arena: Arena, record: SealRecord) -> Capture | None:
    """Return what a rank's state says about routes, None where nothing counts them.

    Raises: ShardCorruptError where memory has changed since the seal, or nobody can have meant what it says.
    """
    tree = decode_state(_read_state(arena, record))
    if not isinstance(tree, Mapping) or ROUTING_KEY not in tree:
        return None
    try:
        return Capture.from_tree(tree[ROUTING_KEY])
    except (TypeError, ValueError) as error:
        raise ShardCorruptError(
            f"captured routes are malformed: rank={record.rank} step={record.step} {error}"
        ) from error


def read_base(arena: Arena, record: SealRecord) -> StateBase:
    """Return what other ranks' states may be stored relative to, if this rank's is stored whole.

    Raises: ShardCorruptError where memory has changed since the seal.
    """
    return StateBase(rank=record.rank, outline=outline_of(decode_state(_read_state(arena, record))))


def persist_rank(
    arena: Arena,
    record: SealRecord,
    repository: Repository,
    *,
    experts: Collection[Expert] | None = None,
    base: StateBase | None = None,
    trace: Trace,
) -> Receipt:
    """Check the dense part and these experts (None: all) against the seal, then put their objects.

    The small state is stored relative to that of the `base`, if that is another rank of the same snapshot.

    Thread: any. Blocks: until durable. Raises: ShardCorruptError where memory has changed since the seal, StorageError.
    """
    layout = arena.rank_layout(record.rank)
    chosen = tuple(
        number
        for number, unit in enumerate(layout.units)
        if unit.expert is not None and (experts is None or unit.expert in experts)
    )
    units = (0, *chosen)
    with trace.span("persist.check", rank=record.rank, step=record.step):
        arena.check(record, units)
        is_finite = _is_finite(arena, record, units)
        state = _read_state(arena, record)
        if base is not None and base.rank != record.rank:
            state = relative_state(state, base) or state
    rows = []
    pieces = {"d": (0,)} | ({"e00": chosen} if chosen else {})
    for piece, numbers in pieces.items():
        header, segments = _compose(arena, record, piece, numbers, state)
        encoded = encode_header(header)
        key = object_key(header.name, record.rank, piece)
        try:
            with trace.span("persist.put", key=key, bytes=len(encoded) + header.data_bytes):
                repository.put_object(key, [memoryview(encoded), *segments])
        finally:
            for segment in segments:  # an error that somebody keeps must not keep the arena open
                segment.release()
        rows.append(
            ObjectRow(
                key=key,
                size_bytes=len(encoded) + header.data_bytes,
                header_bytes=len(encoded),
                header_crc32c=crc32c(encoded),
            )
        )
    return Receipt(rank=record.rank, digest=record.digest, rows=tuple(rows), is_finite=is_finite)


def _read_state(arena: Arena, record: SealRecord) -> bytes:
    """Return a copy of a rank's state blob: arrays of its tree must not keep the arena open."""
    arena.check_state(record)
    with arena.view(arena.state_offset(record.rank, record.slots), record.state_bytes) as view:
        return bytes(view)


def _compose(
    arena: Arena, record: SealRecord, piece: str, units: tuple[int, ...], blob: bytes
) -> tuple[ObjectHeader, list[memoryview]]:
    """Return the header and the data segments of one object made of these units' slots and the state blob."""
    layout, shards = arena.rank_layout(record.rank), arena.catalog(record.rank).shards
    stored: list[StoredShard] = []
    segments: list[memoryview] = []
    state: tuple[int, int, int] | None = None
    reached = 0
    for number in units:
        unit = layout.units[number]
        for index, position in enumerate(unit.positions, start=unit.first):
            stored.append(
                StoredShard(
                    shard=shards[index],
                    step=record.steps[number],
                    position=reached + position,
                    crc32c=record.crcs[index],
                )
            )
        length = unit.size_bytes if unit.state_position is None else unit.state_position
        if length:
            segments.append(arena.view(arena.slot_offset(record.rank, number, record.slots[number]), length))
        reached += length
        if unit.state_position is not None:
            state = (reached, len(blob), crc32c(blob))
            segments.append(memoryview(blob.ljust(align(len(blob)), b"\0")))
            reached += align(len(blob))
    header = ObjectHeader(
        name=checkpoint_name(record),
        rank=record.rank,
        piece=piece,
        shards=tuple(stored),
        state=state,
        data_bytes=reached,
    )
    return header, segments


def _is_finite(arena: Arena, record: SealRecord, units: Sequence[int]) -> bool:
    """Return whether every floating-point value of these units is finite."""
    shards, offsets = arena.catalog(record.rank).shards, arena.shard_offsets(record.rank, record.slots)
    return all(
        all_finite(arena.address + offsets[index], shards[index].length, shards[index].dtype)  # type: ignore[arg-type]  # membership tested below
        for index in arena.shards_of(record.rank, units)
        if shards[index].dtype in _FLOATS
    )
