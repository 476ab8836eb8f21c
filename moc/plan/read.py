"""Which stored bytes fill which needed shards; works across any change of the rank grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moc.errors import CoverageError, MismatchError
from moc.state import DTYPE_BYTES, Shard

__all__ = ["Piece", "Placed", "find_pieces", "plan_read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A shard that exists somewhere: `holder` names the object or rank, `position` its first byte there."""

    shard: Shard
    holder: str
    position: int
    crc32c: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Copy `length_bytes` from byte `source_offset` of placed shard `source` to element `target_offset` of needed shard
    `target`.
    """

    source: int
    source_offset: int
    target: int
    target_offset: int
    length_bytes: int


def plan_read(needed: Sequence[Shard], placed: Sequence[Placed]) -> tuple[Piece, ...]:
    """Return the pieces that fill every element of every needed shard exactly once, in the order of `placed`.

    Raises MismatchError where stored and needed tensor differ in shape or dtype, CoverageError where elements are
    missing.
    """
    pieces, gaps = find_pieces(needed, placed)
    for _, gap in sorted(gaps.items()):
        raise gap
    return pieces


def find_pieces(
    needed: Sequence[Shard], placed: Sequence[Placed]
) -> tuple[tuple[Piece, ...], dict[int, CoverageError]]:
    """Return the pieces as `plan_read`, and by target the needed shards of which elements are missing.

    A target with a gap has pieces of what is there.
    """
    by_tensor: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(placed):
        by_tensor.setdefault((row.shard.tensor, row.shard.part), []).append(index)
    pieces: list[Piece] = []
    gaps: dict[int, CoverageError] = {}
    for target, shard in enumerate(needed):
        reached = shard.offset
        sources = sorted(by_tensor.get((shard.tensor, shard.part), ()), key=lambda i: placed[i].shard.offset)
        for source in sources:
            stored = placed[source].shard
            if (stored.shape, stored.dtype) != (shard.shape, shard.dtype):
                raise MismatchError(
                    f"stored tensor differs: tensor={shard.tensor} part={shard.part} "
                    f"stored={stored.dtype}{list(stored.shape)} "
                    f"needed={shard.dtype}{list(shard.shape)}"
                )
            first = max(reached, stored.offset)
            last = min(shard.offset + shard.length, stored.offset + stored.length)
            if first != reached or last <= first:
                continue
            width = DTYPE_BYTES[shard.dtype]
            pieces.append(
                Piece(
                    source=source,
                    source_offset=(first - stored.offset) * width,
                    target=target,
                    target_offset=first - shard.offset,
                    length_bytes=(last - first) * width,
                )
            )
            reached = last
        if reached != shard.offset + shard.length:
            gaps[target] = CoverageError(
                f"elements are missing: tensor={shard.tensor} part={shard.part} offset={reached} needed={shard}"
            )
    return tuple(sorted(pieces, key=lambda p: (p.source, p.source_offset, p.target))), gaps
