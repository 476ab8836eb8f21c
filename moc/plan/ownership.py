"""Which rank owns how much of each expert: ZeRO-2's flat partitions, for any model and any number of ranks.

Global rank r has expert-parallel (EP) rank r % ep and, among the replicas of its experts, the *column* r // ep. All
experts of a rank are flattened in module order, chopped into optimizer groups, padded, and cut into one partition per
column. Every EP rank has experts of the same sizes, so the map is the same for all of them: `slices` says how many
elements of which local expert a column owns. Columns with equal content are stored once. All numbers are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from moc.errors import UsageError
from moc.plan.shapes import ModelShape
from moc.state import RankCatalog

__all__ = [
    "GROUP_LIMIT_ELEMENTS",
    "Ints",
    "Ownership",
    "catalog_ownership",
    "even_cuts",
    "even_ownership",
    "zero2_ownership",
]

Ints = npt.NDArray[np.int64]

GROUP_LIMIT_ELEMENTS = 178_956_971
"""Where DeepSpeed begins a new group of experts: `max_group_size` in deepspeed/moe/utils.py."""

ALIGNMENT_ELEMENTS = 2
"""A flat group is padded to a multiple of this per rank: `nccl_start_alignment_factor` in stage_1_and_2.py."""


RANK_LIMIT = 1 << 20
CELL_LIMIT = 100_000_000  # 800 MB of counters


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """Who owns which optimizer elements.

    `slices[p, l, i]` counts the elements of local expert i of MoE layer l in a column with profile p, `profile[c]` is
    column c's profile, `dense[r]` counts the dense elements of global rank r. Padding is not counted.
    """

    dp: int
    ep: int
    experts: int
    profile: Ints
    slices: Ints
    dense: Ints

    @property
    def columns(self) -> int:
        """How many ranks share an expert."""
        return self.dp // self.ep

    @property
    def layers(self) -> int:
        return int(self.slices.shape[1])

    @property
    def local_experts(self) -> int:
        """Experts per rank and layer; local expert i of EP rank e is expert e * local_experts + i of its layer."""
        return self.experts // self.ep

    def selected_elements(self, is_selected: npt.NDArray[np.bool_]) -> Ints:
        """Return each global rank's elements of the selected experts; `is_selected` is by layer and expert."""
        by_slot = is_selected.reshape(self.layers, self.ep, self.local_experts).transpose(0, 2, 1).astype(np.int64)
        flat = self.slices.reshape(len(self.slices), -1) @ by_slot.reshape(-1, self.ep)
        return np.asarray(flat[self.profile].reshape(self.dp), dtype=np.int64)


def zero2_ownership(shape: ModelShape, dp: int, ep: int) -> Ownership:
    """Return the ownership under DeepSpeed's ZeRO-1 and ZeRO-2, with one dense parameter group.

    Raises UsageError for ranks that cannot hold the model.
    """
    _check_ranks(shape, dp, ep)
    columns, local = dp // ep, shape.experts // ep
    sizes, slots = _local_parameters(shape, local)
    rows = np.zeros((columns, shape.moe_layers * local), dtype=np.int64)
    for first, last in _chop(sizes):
        column, index, elements = _cut(_expand(sizes[first:last]), columns)
        np.add.at(rows, (column, np.concatenate(slots[first:last])[index]), elements)
    kept, profile = _distinct(rows)
    total, length = shape.dense_elements, _partition(shape.dense_elements, dp)
    starts = np.arange(dp, dtype=np.int64) * length
    return Ownership(
        dp=dp,
        ep=ep,
        experts=shape.experts,
        profile=profile,
        slices=kept.reshape(-1, shape.moe_layers, local),
        dense=np.clip(total - starts, 0, length),
    )


def even_ownership(shape: ModelShape, dp: int, ep: int) -> Ownership:
    """Return the ownership of the paper's model: every expert is cut evenly, and so is the dense part."""
    _check_ranks(shape, dp, ep)
    columns, local = dp // ep, shape.experts // ep
    per_column = even_cuts(shape.expert_elements, columns)
    kept, profile = _distinct(np.repeat(per_column[:, None], shape.moe_layers * local, axis=1))
    return Ownership(
        dp=dp,
        ep=ep,
        experts=shape.experts,
        profile=profile,
        slices=kept.reshape(-1, shape.moe_layers, local),
        dense=even_cuts(shape.dense_elements, dp),
    )


def catalog_ownership(
    catalogs: Sequence[RankCatalog], layers: Sequence[int], *, experts: int, ep: int
) -> Ownership | None:
    """Return what the catalogs of all ranks say of these layers, which have so many experts each, in bytes.

    None where they are not such a map: a rank holds other experts than its EP rank says, or EP ranks are cut unequally.
    """
    dp = len(catalogs)
    if dp % ep or experts % ep or dp // ep * len(layers) * experts // ep > CELL_LIMIT:
        return None
    columns, local = dp // ep, experts // ep
    place = {layer: number for number, layer in enumerate(layers)}
    held = np.zeros((dp, len(layers), local), dtype=np.int64)
    dense = np.zeros(dp, dtype=np.int64)
    for rank, catalog in enumerate(catalogs):
        first = rank % ep * local
        for shard in catalog.shards:
            if shard.expert is None:
                dense[rank] += shard.size_bytes
            elif shard.expert.layer in place:
                if not first <= shard.expert.index < first + local:
                    return None
                held[rank, place[shard.expert.layer], shard.expert.index - first] += shard.size_bytes
    by_column = held.reshape(columns, ep, -1)
    if (by_column != by_column[:, :1]).any():
        return None
    kept, profile = _distinct(by_column[:, 0])
    return Ownership(
        dp=dp,
        ep=ep,
        experts=experts,
        profile=profile,
        slices=kept.reshape(-1, len(layers), local),
        dense=dense,
    )


def even_cuts(size: int, count: int) -> Ints:
    """Return the sizes of `count` contiguous pieces that differ by at most one."""
    borders = np.arange(count + 1, dtype=np.int64) * size // count
    return np.diff(borders)


def _check_ranks(shape: ModelShape, dp: int, ep: int) -> None:
    """Raise UsageError unless the experts can be spread over `ep` ranks and these over `dp`."""
    if not 1 <= dp <= RANK_LIMIT:
        raise UsageError(f"number of data-parallel ranks is out of range: dp={dp} allowed=1..{RANK_LIMIT}")
    if ep < 1 or dp % ep:
        raise UsageError(f"expert-parallel size must divide the data-parallel size: ep={ep} dp={dp} allowed=divisors")
    if shape.experts % ep:
        raise UsageError(
            f"expert-parallel size must divide the number of experts: ep={ep} experts={shape.experts} "
            f"allowed=divisors of {shape.experts}"
        )
    cells = dp // ep * shape.moe_layers * shape.experts // ep
    if cells > CELL_LIMIT:
        raise UsageError(
            f"map is too large: replicas x layers x experts per rank = {cells} allowed=up to {CELL_LIMIT}, "
            "with a larger expert-parallel size"
        )


Pieces = tuple[tuple[int, ...], ...]


def _local_parameters(shape: ModelShape, local: int) -> tuple[Pieces, list[Ints]]:
    """Return the expert parameters of one rank in flat order: the pieces of each and the slots of the pieces.

    A piece belongs to one expert; its slot is layer * local + local index. Only stacked parameters have several.
    """
    sizes: list[tuple[int, ...]] = []
    slots: list[Ints] = []
    for layer in range(shape.moe_layers):
        own = range(layer * local, (layer + 1) * local)
        if shape.stacked:
            for matrix in shape.expert_matrices:
                sizes.append((matrix,) * local)
                slots.append(np.array(own, dtype=np.int64))
        else:
            for slot in own:
                sizes += [(matrix,) for matrix in shape.expert_matrices]
                slots += [np.array([slot], dtype=np.int64)] * len(shape.expert_matrices)
    return tuple(sizes), slots


def _chop(sizes: Pieces) -> list[tuple[int, int]]:
    """Return the ranges of parameters that form a group, as DeepSpeed chops them: greedily, whole parameters."""
    groups: list[tuple[int, int]] = []
    first, reached = 0, 0
    for index, pieces in enumerate(sizes):
        size = sum(pieces)
        if reached + size > GROUP_LIMIT_ELEMENTS and index > first:
            groups.append((first, index))
            first, reached = index, 0
        reached += size
    return [*groups, (first, len(sizes))]


def _expand(sizes: Pieces) -> Ints:
    """Return the ends of all pieces in the flat buffer."""
    return np.array(list(accumulate(size for pieces in sizes for size in pieces)), dtype=np.int64)


def _partition(size: int, ranks: int) -> int:
    """Return the elements of one partition of a flat group, padding included."""
    alignment = ALIGNMENT_ELEMENTS * ranks
    return -(-size // alignment) * ALIGNMENT_ELEMENTS


def _cut(ends: Ints, columns: int) -> tuple[Ints, Ints, Ints]:
    """Cut a flat group at the borders of pieces and partitions; return column, piece and size of what results."""
    length = _partition(int(ends[-1]), columns)
    borders = np.arange(1, columns, dtype=np.int64) * length
    cuts = np.union1d(ends, borders[borders < ends[-1]])
    starts = np.concatenate([np.zeros(1, dtype=np.int64), cuts[:-1]])
    return starts // length, np.searchsorted(ends, starts, side="right"), cuts - starts


def _distinct(rows: Sequence[Ints] | Ints) -> tuple[Ints, Ints]:
    """Return the distinct rows in the order of their first appearance, and each row's index among them."""
    seen: dict[bytes, int] = {}
    kept: list[Ints] = []
    index: list[int] = []
    for row in rows:
        number = seen.setdefault(row.tobytes(), len(seen))
        if number == len(kept):
            kept.append(row)
        index.append(number)
    return np.array(kept, dtype=np.int64), np.array(index, dtype=np.int64)
