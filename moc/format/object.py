"""Objects: valid safetensors files whose tensors start at 4096-byte boundaries and whose header carries every shard's
checksum.

Bytes: 8 bytes little-endian header length, header JSON padded with spaces so that the data starts at a multiple of
4096, then the data. Each tensor begins at the first multiple of 4096 after the one before it, and the data end at one.
The gaps are zero, and explicit U8 tensors named ``__pad__/<n>``, because safetensors readers refuse holes. The
reserved entry ``__metadata__`` holds one string ``moc``: JSON with run, incarnation, step, attempt, rank, piece and
one row per shard.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from moc.errors import ShardCorruptError
from moc.format.canonical import load_json
from moc.format.keys import CheckpointName
from moc.state import DTYPE_BYTES, Shard

__all__ = ["ALIGNMENT", "HEADER_LIMIT_BYTES", "ObjectHeader", "StoredShard", "align", "encode_header", "parse_header"]

ALIGNMENT = 4096  # direct I/O and page granularity
HEADER_LIMIT_BYTES = 1 << 28  # 256 MiB: some 800,000 shards; refuses hostile lengths
STATE_TENSOR = "__state__"
NUMBER_LIMIT = (1 << 63) - 1


def align(offset: int) -> int:
    """Round up to the alignment of objects and slots."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """A shard and where its bytes lie in the object's data area; `step` is the step of these bytes."""

    shard: Shard
    step: int
    position: int
    crc32c: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectHeader:
    """Everything about one object but its data.

    `state` is (position, length, crc32c) of the state blob, None in expert objects.
    """

    name: CheckpointName
    rank: int
    piece: str
    shards: tuple[StoredShard, ...]
    state: tuple[int, int, int] | None
    data_bytes: int

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Position and length of each gap between the tensors and after them, ascending."""
        found, reached = [], 0
        for _, _, _, position, length in (*_entries(self), ("", "", (), self.data_bytes, 0)):
            if position > reached:
                found.append((reached, position - reached))
            reached = position + length
        return tuple(found)


def encode_header(header: ObjectHeader) -> bytes:
    """Return the header bytes, length prefix and padding included; its size is a multiple of 4096."""
    rows = [(position, length, name, dtype, shape) for name, dtype, shape, position, length in _entries(header)]
    rows += [(position, length, f"__pad__/{position}", "U8", (length,)) for position, length in header.pads]
    tensors: dict[str, object] = {"__metadata__": {"moc": _metadata(header)}}
    for position, length, name, dtype, shape in sorted(rows, key=lambda row: row[:3]):
        tensors[name] = _entry(dtype, shape, position, position + length)
    text = json.dumps(tensors, separators=(",", ":"), ensure_ascii=True).encode()
    padded = text.ljust(align(8 + len(text)) - 8)
    return struct.pack("<Q", len(padded)) + padded


def header_length(prefix: bytes, *, key: str) -> int:
    """Return the size of the whole header from an object's first 8 bytes."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 0 < length <= HEADER_LIMIT_BYTES or (8 + length) % ALIGNMENT:
        raise ShardCorruptError(
            f"object header length is impossible: key={key} length={length} allowed=1..{HEADER_LIMIT_BYTES}"
        )
    return 8 + length


def parse_header(encoded: bytes, *, key: str) -> ObjectHeader:
    """Parse header bytes.

    Raises ShardCorruptError naming the key for anything a writer of this format cannot have written.
    """
    try:
        tensors = load_json(encoded[8:])
        body = load_json(tensors["__metadata__"]["moc"].encode())
        header = _from_body(body)
        is_canonical = encode_header(header) == encoded
    except Exception as error:  # hostile bytes can fail anywhere in the parser; each failure means the same
        raise ShardCorruptError(
            f"object header is malformed: key={key} reason={type(error).__name__}: {error!s:.300}"
        ) from error
    if not is_canonical:
        raise ShardCorruptError(f"object header is not what its metadata describe: key={key}")
    return header


def _metadata(header: ObjectHeader) -> str:
    body = {
        "run": header.name.run,
        "incarnation": header.name.incarnation,
        "step": header.name.step,
        "attempt": header.name.attempt,
        "rank": header.rank,
        "piece": header.piece,
        "data_bytes": header.data_bytes,
        "state": None if header.state is None else list(header.state),
        "shards": [[*s.shard.to_json(), s.step, s.position, s.crc32c] for s in header.shards],
    }
    return json.dumps(body, separators=(",", ":"), ensure_ascii=True, sort_keys=True)


def _entries(header: ObjectHeader) -> list[tuple[str, str, Sequence[int], int, int]]:
    rows: list[tuple[str, str, Sequence[int], int, int]] = []
    for stored in header.shards:
        shard = stored.shard
        shape = shard.shape if shard.length == prod(shard.shape) else (shard.length,)
        rows.append((shard.name, shard.dtype, shape, stored.position, shard.size_bytes))
    if header.state is not None:
        rows.append((STATE_TENSOR, "U8", (header.state[1],), header.state[0], header.state[1]))
    # An empty tensor lies before the one that begins at its place, whatever their names.
    return sorted(rows, key=lambda row: (row[3], row[4], row[0]))


def _entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _from_body(body: dict[str, object]) -> ObjectHeader:
    def integer(value: object) -> int:
        if type(value) is not int or not 0 <= value <= NUMBER_LIMIT:
            raise TypeError(f"expected an integer from 0 to {NUMBER_LIMIT}: value={value!r}")
        return value

    rows, state = body["shards"], body["state"]
    run, attempt, piece = body["run"], body["attempt"], body["piece"]
    if not (isinstance(rows, list) and isinstance(run, str) and isinstance(attempt, str) and isinstance(piece, str)):
        raise TypeError("metadata have a wrong type")
    stored = []
    for row in rows:
        *shard, step, position, crc = row
        stored.append(
            StoredShard(
                shard=Shard.from_json(shard), step=integer(step), position=integer(position), crc32c=integer(crc)
            )
        )
    header = ObjectHeader(
        name=CheckpointName(
            run=run, incarnation=integer(body["incarnation"]), step=integer(body["step"]), attempt=attempt
        ),
        rank=integer(body["rank"]),
        piece=piece,
        shards=tuple(stored),
        state=None if not isinstance(state, list) else (integer(state[0]), integer(state[1]), integer(state[2])),
        data_bytes=integer(body["data_bytes"]),
    )
    _check_positions(header)
    return header


def _check_positions(header: ObjectHeader) -> None:
    expected, names = 0, set()
    for name, dtype, shape, position, length in _entries(header):
        if position != expected or prod(shape) * DTYPE_BYTES[dtype] != length:
            raise ValueError(f"tensor is misplaced: name={name!r} {position=} {expected=} {length=}")
        if name in names:
            raise ValueError(f"tensor is named twice: name={name!r}")
        names.add(name)
        expected = align(position + length)
    if header.data_bytes != expected:
        raise ValueError(f"data end elsewhere: data_bytes={header.data_bytes} {expected=}")
