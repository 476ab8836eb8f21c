"""Which shards a rank holds, and where each lies in its memory.

A shard is the overlap of one logical tensor with this rank's partition of a flat group, for each part (`master` and the
moments). Frozen parameters are replicated: every rank needs the whole, and catalogs a share of it. The ranks that hold
the same replicas take equal ranges of all of them one after the other, so that few are cut and small ones stay whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from moc.adapters.deepspeed.names import Extent, NamedParameter, require_contiguous
from moc.adapters.deepspeed.values import dtype_name
from moc.adapters.deepspeed.zero import ZeroOptimizer
from moc.errors import InternalError, UsageError
from moc.plan.assign import pour
from moc.plan.ownership import even_cuts
from moc.state import Shard, shard_order

__all__ = ["WEIGHT", "Layout", "Piece", "build_layout"]

MASTER = "master"
WEIGHT = "weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A shard and its place: element `start` of the flat memory of `buffers[buffer]`."""

    shard: Shard
    buffer: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The pieces a rank catalogs and those it needs, in catalog order; `buffers` return the tensors as they are now."""

    buffers: tuple[Callable[[], torch.Tensor], ...]
    held: tuple[Piece, ...]
    needed: tuple[Piece, ...]


def build_layout(zero: ZeroOptimizer, named: tuple[NamedParameter, ...]) -> Layout:
    """Lay out every parameter; raises UsageError naming trainable parameters that no optimizer group holds."""
    builder = _Builder(zero)
    by_id = {id(entry.parameter): entry for entry in named}
    optimized = builder.add_groups(by_id)
    left_out = [entry for entry in named if id(entry.parameter) not in optimized]
    trainable = [entry.fqn for entry in left_out if entry.parameter.requires_grad]
    if trainable:
        raise UsageError(
            f"trainable parameters are in no optimizer group: parameters={','.join(trainable[:8])} "
            f"count={len(trainable)} allowed=give them to the optimizer, or requires_grad=False"
        )
    builder.add_frozen(left_out)
    return builder.layout()


class _Builder:
    """Collects buffers and pieces; one use per instance."""

    def __init__(self, zero: ZeroOptimizer) -> None:
        self._zero = zero
        self._buffers: list[Callable[[], torch.Tensor]] = []
        self._held: list[Piece] = []
        self._needed: list[Piece] = []

    def layout(self) -> Layout:
        """Return what was collected."""
        return Layout(
            buffers=tuple(self._buffers),
            held=tuple(sorted(self._held, key=_by_shard)),
            needed=tuple(sorted(self._needed, key=_by_shard)),
        )

    def add_groups(self, by_id: dict[int, NamedParameter]) -> set[int]:
        """Add the partitions of all groups; return the ids of the parameters in them."""
        optimized: set[int] = set()
        for group in self._zero.groups:
            parts = {MASTER: self._add_buffer(_master_of(self._zero, group.index))}
            for key in self._zero.moments(group.index):
                parts[key] = self._add_buffer(_moment_of(self._zero, group.index, key))
            for parameter, offset in group.params:
                if id(parameter) not in by_id:
                    raise UsageError(
                        "the optimizer holds a parameter that the module does not: "
                        f"group={group.name} shape={tuple(parameter.shape)}"
                    )
                optimized.add(id(parameter))
                for extent in by_id[id(parameter)].extents:
                    self._add_overlap(parts, extent, offset + extent.start, group.start, group.length)
        return optimized

    def add_frozen(self, entries: list[NamedParameter]) -> None:
        """Add replicated parameters: the whole to what is needed, this rank's share to what is held."""
        for name in sorted({entry.group_name or "" for entry in entries}):
            alike = [entry for entry in entries if (entry.group_name or "") == name]
            wholes = {piece.shard: piece for entry in alike for piece in self._wholes(entry)}
            self._needed += wholes.values()
            shards = sorted(wholes, key=shard_order)
            rank, size = _replica(self._zero, name)
            room = even_cuts(sum(shard.size_bytes for shard in shards), size)
            origins = {(shard.tensor, shard.part): piece for shard, piece in wholes.items()}
            for taker, shard in pour(range(size), shards, room):
                if taker == rank and shard.length:
                    whole = origins[shard.tensor, shard.part]
                    self._held.append(replace(whole, shard=shard, start=whole.start + shard.offset))

    def _wholes(self, entry: NamedParameter) -> list[Piece]:
        data = require_contiguous(entry)
        dtype, buffer = dtype_name(data.dtype, entry.fqn), self._add_buffer(_data_of(entry))
        return [_piece(extent, WEIGHT, dtype, buffer, extent.start, 0, extent.length) for extent in entry.extents]

    def _add_buffer(self, read: Callable[[], torch.Tensor]) -> int:
        self._buffers.append(read)
        return len(self._buffers) - 1

    def _add_overlap(self, parts: dict[str, int], extent: Extent, offset: int, start: int, length: int) -> None:
        """Add the elements of an extent at `offset` of the flat buffer that lie in the partition at `start`."""
        first, end = max(offset, start), min(offset + extent.length, start + length)
        if first >= end:
            return
        for part, buffer in parts.items():
            dtype = dtype_name(self._buffers[buffer]().dtype, f"{part}/{extent.tensor}")
            piece = _piece(extent, part, dtype, buffer, offset - start, first - offset, end - offset)
            self._held.append(piece)
            self._needed.append(piece)


def _piece(extent: Extent, part: str, dtype: str, buffer: int, origin: int, first: int, end: int) -> Piece:
    """Return the piece [first, end) of an extent whose element 0 would be at `origin` of the buffer."""
    if origin + first < 0:
        raise InternalError(f"piece lies before its memory: tensor={extent.tensor} part={part} start={origin + first}")
    shard = Shard(
        tensor=extent.tensor,
        part=part,
        dtype=dtype,
        shape=extent.shape,
        offset=first,
        length=end - first,
        expert=extent.expert,
    )
    return Piece(shard=shard, buffer=buffer, start=origin + first)


def _by_shard(piece: Piece) -> Any:
    return shard_order(piece.shard)


def _replica(zero: ZeroOptimizer, group_name: str) -> tuple[int, int]:
    """Return this rank's position among the ranks that hold the same replicas, and their number; experts have a group
    name, dense parameters an empty one.
    """
    group = zero.optimizer.dp_process_group
    if group_name:
        group = groups._get_expert_data_parallel_group(group_name)
    return dist.get_rank(group), dist.get_world_size(group)


def _master_of(zero: ZeroOptimizer, index: int) -> Callable[[], torch.Tensor]:
    return lambda: zero.master(index)


def _moment_of(zero: ZeroOptimizer, index: int, key: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        state = zero.state(index)
        if key not in state:
            raise UsageError(f"the optimizer has lost its state: group={index} key={key} present={sorted(state)}")
        moment: torch.Tensor = state[key]
        return moment

    return read


def _data_of(entry: NamedParameter) -> Callable[[], torch.Tensor]:
    return lambda: entry.parameter.data
