"""The objects that a manifest names: one row each in memory, one column per fact in the record.

A job of 16,384 ranks names a million objects in one manifest. Their keys differ by rank only, so a *block* says once
whose they are (attempt and piece) and for which ranks, as runs, and lists sizes and checksums rank by rank. Equal rows
make equal blocks. Manifests of version 1 have a row for every object, with its key spelt out. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from moc.errors import ManifestCorruptError, UsageError
from moc.format.canonical import Fields
from moc.format.keys import (
    ATTEMPT_PATTERN,
    INCARNATION_LIMIT,
    LAST_STEP,
    PIECE_PATTERN,
    RANK_LIMIT,
    CheckpointName,
    object_file,
    object_key,
    parse_object_keys,
)
from moc.format.object import ALIGNMENT, HEADER_LIMIT_BYTES

__all__ = ["OBJECT_LIMIT", "Block", "ObjectRow", "decode_blocks", "decode_rows", "encode_blocks", "objects_of"]

CRC_LIMIT = (1 << 32) - 1
OBJECT_LIMIT = 3_000_000  # of a manifest: with real sizes and checksums a record has no room for more


class ObjectRow(NamedTuple):
    """One object of a checkpoint: its key, sizes in bytes, and the crc32c of its header.

    A tuple, since there may be a million of them: it is made ten times as fast as other facts.
    """

    key: str
    size_bytes: int
    header_bytes: int
    header_crc32c: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The objects of one attempt and piece: their rows, in the order of their ranks."""

    owner: CheckpointName
    piece: str
    ranks: Sequence[int]
    rows: Sequence[ObjectRow]


def encode_blocks(rows: Sequence[ObjectRow]) -> list[dict[str, object]]:
    """Return a manifest's field `objects`; raises UsageError for more of them than a reader takes."""
    if len(rows) > OBJECT_LIMIT:
        raise UsageError(f"too many objects for a manifest: objects={len(rows)} allowed={OBJECT_LIMIT}")
    return [
        {
            "incarnation": block.owner.incarnation,
            "step": block.owner.step,
            "attempt": block.owner.attempt,
            "piece": block.piece,
            "ranks": _runs(block.ranks),
            "size": [row.size_bytes for row in block.rows],
            "header": [row.header_bytes for row in block.rows],
            "header_crc32c": [row.header_crc32c for row in block.rows],
        }
        for block in _blocks(rows)
    ]


def decode_blocks(fields: Fields, run: str) -> list[Block]:
    """Return the blocks of a manifest, sorted; raises ManifestCorruptError for what `encode_blocks` never makes."""
    entries = fields.objects("objects")
    count = sum(len(entry.rows("size")) for entry in entries)
    if count > OBJECT_LIMIT:  # before each becomes a row: short numbers fill a record with many times as much memory
        raise ManifestCorruptError(
            f"manifest names too many objects: name={fields.name} objects={count} allowed={OBJECT_LIMIT}"
        )
    blocks = [_block(entry, run) for entry in entries]
    for first, second in pairwise(blocks):
        if (first.owner, first.piece) >= (second.owner, second.piece):
            raise ManifestCorruptError(
                f"blocks of objects are not sorted, each once: name={fields.name} at={second.owner} {second.piece}"
            )
    return blocks


def decode_rows(fields: Fields) -> list[Block]:
    """Return the objects of a manifest of version 1, a row for each; raises ManifestCorruptError."""
    rows = [_row(row) for row in fields.objects("objects")]
    blocks = _blocks(rows)
    for first, second in pairwise(rows):
        if first.key >= second.key:
            what = "named twice" if first.key == second.key else "out of order"
            raise ManifestCorruptError(f"object is {what}: name={fields.name} object={second.key}")
    return blocks


def objects_of(blocks: Iterable[Block]) -> tuple[ObjectRow, ...]:
    """Return the rows of all blocks, sorted by key."""
    return tuple(sorted(row for block in blocks for row in block.rows))


def _blocks(rows: Iterable[ObjectRow]) -> list[Block]:
    """Return rows by attempt and piece, sorted; raises ManifestCorruptError for a key that is none."""
    rows = list(rows)
    found: dict[tuple[CheckpointName, str], list[tuple[int, ObjectRow]]] = {}
    last: tuple[CheckpointName | None, str] = (None, "")
    pairs: list[tuple[int, ObjectRow]] = []
    for row, (owner, rank, piece) in zip(rows, parse_object_keys(row.key for row in rows), strict=True):
        if owner is not last[0] or piece != last[1]:  # rows of a block mostly follow each other
            last, pairs = (owner, piece), found.setdefault((owner, piece), [])
        pairs.append((rank, row))
    blocks = []
    for (owner, piece), pairs in sorted(found.items(), key=itemgetter(0)):
        pairs.sort(key=itemgetter(0))  # by number: keys of ranks with six digits sort among those with five
        ranks, held = zip(*pairs, strict=True)
        blocks.append(Block(owner=owner, piece=piece, ranks=ranks, rows=held))
    return blocks


def _runs(ranks: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as [first, count], the longest there are."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([rank, 1])
    return runs


def _block(fields: Fields, run: str) -> Block:
    owner = CheckpointName(
        run=run,
        incarnation=fields.integer("incarnation", minimum=1, maximum=INCARNATION_LIMIT),
        step=fields.integer("step", maximum=LAST_STEP),
        attempt=fields.text("attempt", ATTEMPT_PATTERN),
    )
    piece = fields.text("piece", PIECE_PATTERN)
    headers = fields.integers("header", minimum=ALIGNMENT, maximum=HEADER_LIMIT_BYTES)
    sizes = fields.integers("size", minimum=ALIGNMENT)
    crcs = fields.integers("header_crc32c", maximum=CRC_LIMIT)
    ranks = _ranks(fields, count=len(sizes))
    if not len(sizes) == len(headers) == len(crcs):
        raise fields.wrong("header_crc32c", f"as many as sizes and headers, {len(sizes)} and {len(headers)}")
    if any(header % ALIGNMENT for header in headers):
        raise fields.wrong("header", f"multiples of {ALIGNMENT}")
    if any(size < header for size, header in zip(sizes, headers, strict=True)):
        raise fields.wrong("size", "no size below its header's")
    folder = object_key(owner, 0, piece).rpartition("/")[0]
    keys = [f"{folder}/{object_file(rank, piece)}" for rank in ranks]
    rows = list(map(ObjectRow._make, zip(keys, sizes, headers, crcs, strict=True)))
    return Block(owner=owner, piece=piece, ranks=ranks, rows=rows)


def _ranks(fields: Fields, *, count: int) -> list[int]:
    """Return the ranks of the runs, `count` of them: so a hostile run takes no memory."""
    ranks: list[int] = []
    expected = f"runs of [first, count], apart, ascending, each rank once, {count} below {RANK_LIMIT} together"
    for run in fields.rows("ranks"):
        if not isinstance(run, list) or len(run) != 2 or not all(type(number) is int for number in run):
            raise fields.wrong("ranks", expected)
        first, length = run
        if first < 0 or length < 1 or (ranks and first <= ranks[-1] + 1) or first + length > RANK_LIMIT:
            raise fields.wrong("ranks", expected)
        if length > count - len(ranks):
            raise fields.wrong("ranks", expected)
        ranks.extend(range(first, first + length))
    if len(ranks) != count or not ranks:
        raise fields.wrong("ranks", expected)
    return ranks


def _row(row: Fields) -> ObjectRow:
    header_bytes = row.integer("header", minimum=ALIGNMENT, maximum=HEADER_LIMIT_BYTES)
    if header_bytes % ALIGNMENT:
        raise row.wrong("header", f"a multiple of {ALIGNMENT}")
    return ObjectRow(
        key=row.text("key"),  # parsed by `_blocks`
        size_bytes=row.integer("size", minimum=header_bytes),
        header_bytes=header_bytes,
        header_crc32c=row.integer("header_crc32c", maximum=CRC_LIMIT),
    )
