"""The training state as values: tensors, experts, shards, and which rank holds what.

A *tensor* is logical and whole, named by parameter name and part (`master`, `exp_avg`, `exp_avg_sq`, `weight`, ...). An
expert's parameters are named with the expert's *global* index, as an engine with expert-parallel size 1 would name
them. A *shard* is a contiguous flat range of one tensor: the unit of planning, I/O and checksum. Everything here is
pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

from moc.errors import CoverageError, InternalError

__all__ = [
    "DTYPE_BYTES",
    "Expert",
    "RankCatalog",
    "Shard",
    "catalog_digest",
    "catalogs_from_json",
    "check_coverage",
    "is_shape",
]

DIMENSION_LIMIT = 64  # torch has no tensors with more
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Element sizes in bytes by safetensors dtype name."""
EXTENT_LIMIT = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Expert:
    """One expert of one MoE layer; `layer` counts MoE layers in module order, `index` is global in the layer."""

    layer: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A contiguous flat range of one logical tensor.

    `offset` and `length` count elements, `shape` is the whole tensor's.
    """

    tensor: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    expert: Expert | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise InternalError(f"unknown dtype: tensor={self.tensor} dtype={self.dtype} allowed={sorted(DTYPE_BYTES)}")
        if self.offset < 0 or self.length < 0 or self.offset + self.length > prod(self.shape):
            raise InternalError(
                f"shard outside its tensor: tensor={self.tensor} part={self.part} offset={self.offset} "
                f"length={self.length} shape={self.shape}"
            )

    @property
    def size_bytes(self) -> int:
        return self.length * DTYPE_BYTES[self.dtype]

    @property
    def name(self) -> str:
        """The shard's unique name, also its entry in an object: part, tensor and element offset."""
        return f"{self.part}/{self.tensor}@{self.offset}"

    def to_json(self) -> list[object]:
        expert = None if self.expert is None else [self.expert.layer, self.expert.index]
        return [self.tensor, self.part, self.dtype, list(self.shape), self.offset, self.length, expert]

    @staticmethod
    def from_json(row: Sequence[object]) -> Shard:
        """Build a shard from `to_json`'s row; raises InternalError, TypeError or ValueError on anything else."""
        tensor, part, dtype, shape, offset, length, expert = row
        if not (isinstance(tensor, str) and isinstance(part, str) and isinstance(dtype, str)):
            raise TypeError(f"shard row has a wrong type: tensor={tensor!r} part={part!r} dtype={dtype!r}")
        tensor.encode(), part.encode()  # no lone surrogates: other readers of JSON refuse them
        if not is_shape(shape):
            raise TypeError(f"shard row has a wrong shape: tensor={tensor} allowed=up to {DIMENSION_LIMIT} dimensions")
        if type(offset) is not int or type(length) is not int:
            raise TypeError(f"shard row has a wrong range: tensor={tensor} offset={offset!r} length={length!r}")
        owner = None
        if expert is not None:
            if not (isinstance(expert, list) and len(expert) == 2 and all(type(n) is int and n >= 0 for n in expert)):
                raise TypeError(f"shard row has a wrong expert: tensor={tensor} expert={expert!r}")
            owner = Expert(layer=expert[0], index=expert[1])
        return Shard(
            tensor=tensor,
            part=part,
            dtype=dtype,
            shape=tuple(shape),
            offset=offset,
            length=length,
            expert=owner,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCatalog:
    """All shards one rank holds, sorted by `shard_order`, and the bytes reserved for its scalars and small state."""

    rank: int
    shards: tuple[Shard, ...]
    state_capacity_bytes: int

    def __post_init__(self) -> None:
        if list(self.shards) != sorted(self.shards, key=shard_order):
            raise InternalError(f"shards are not in catalog order: rank={self.rank}")

    def to_json(self) -> dict[str, object]:
        return {
            "rank": self.rank,
            "state_capacity_bytes": self.state_capacity_bytes,
            "shards": [shard.to_json() for shard in self.shards],
        }

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> RankCatalog:
        """Build a catalog from `to_json`'s value; raises InternalError, LookupError, TypeError or ValueError."""
        numbers = (row["rank"], row["state_capacity_bytes"])
        if not all(type(n) is int and 0 <= n <= EXTENT_LIMIT for n in numbers):
            raise TypeError(f"catalog row has a wrong number: {numbers=}")
        return RankCatalog(
            rank=row["rank"],
            shards=tuple(Shard.from_json(shard) for shard in row["shards"]),
            state_capacity_bytes=row["state_capacity_bytes"],
        )


def catalogs_from_json(rows: object) -> tuple[RankCatalog, ...]:
    """Build the catalogs of a node, by rank; raises InternalError, LookupError, TypeError or ValueError."""
    if not isinstance(rows, list):
        raise TypeError(f"catalogs are not a list: type={type(rows).__name__}")
    catalogs = tuple(RankCatalog.from_json(row) for row in rows)
    ranks = [catalog.rank for catalog in catalogs]
    if not ranks or ranks != sorted(set(ranks)):
        raise ValueError(f"catalogs are not one per rank, ascending: {ranks=}")
    return catalogs


def shard_order(shard: Shard) -> tuple[bool, tuple[int, int], str, str, int]:
    """Sort dense shards first, then experts by layer and index, then by tensor, part and offset."""
    expert = (-1, -1) if shard.expert is None else (shard.expert.layer, shard.expert.index)
    return (shard.expert is not None, expert, shard.tensor, shard.part, shard.offset)


def catalog_digest(catalogs: Iterable[RankCatalog]) -> str:
    """Return 16 hex digits over who holds which shard.

    Equal catalogs give equal digests on every rank and hash seed.
    """
    rows = [[c.rank, [s.to_json() for s in c.shards]] for c in sorted(catalogs, key=lambda c: c.rank)]
    encoded = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]


def is_shape(value: object) -> TypeGuard[list[int]]:
    """Return whether a value from storage is a list of dimensions whose product is quickly computed."""
    if not isinstance(value, list) or len(value) > DIMENSION_LIMIT:
        return False
    return all(type(length) is int and 0 <= length <= EXTENT_LIMIT for length in value)


def check_coverage(shards: Iterable[Shard]) -> int:
    """Raise CoverageError unless the shards cover every element of every tensor exactly once.

    Return the number of tensors.
    """
    by_tensor: dict[tuple[str, str], list[Shard]] = {}
    for shard in shards:
        by_tensor.setdefault((shard.tensor, shard.part), []).append(shard)
    for (tensor, part), pieces in sorted(by_tensor.items()):
        first = pieces[0]
        reached = 0
        for piece in sorted((p for p in pieces if p.length), key=lambda p: p.offset):
            if (piece.shape, piece.dtype, piece.expert) != (first.shape, first.dtype, first.expert):
                raise CoverageError(f"shards of one tensor disagree: tensor={tensor} part={part} {first} {piece}")
            if piece.offset != reached:
                what = "gap" if piece.offset > reached else "overlap"
                raise CoverageError(
                    f"{what} in tensor={tensor} part={part} expected_offset={reached} offset={piece.offset}"
                )
            reached += piece.length
        if reached != prod(first.shape):
            raise CoverageError(f"gap in tensor={tensor} part={part} covered={reached} elements={prod(first.shape)}")
    return len(by_tensor)
