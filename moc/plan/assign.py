"""Who copies and writes which bytes: every byte of a checkpoint exactly once, however many ranks hold it.

What one rank alone holds (ZeRO's partitions) it writes. What several ranks hold alike is shared out by a rule:

- `baseline`: the lowest holder writes all of it, as DeepSpeed and Megatron do: dense weights on rank 0, experts on the
  first of their replicas.
- `equal`: every holder writes an equal range of every tensor.
- `adaptive`: ranges fill the valleys: ranks that own little write more, until all are level. Tensors with few holders
  go first, because others can go anywhere.

The result is a pure function of catalogs and selection, equal on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from moc.errors import InternalError, UsageError
from moc.plan.ownership import Ints, even_cuts
from moc.plan.scope import Scope
from moc.plan.select import Selection
from moc.state import DTYPE_BYTES, Expert, RankCatalog, Shard, shard_order

__all__ = ["RULES", "assign", "fill_valleys", "pour"]

RULES = ("baseline", "equal", "adaptive")

Share = tuple[int, Shard]
Holders = tuple[int, ...]


def assign(
    catalogs: Sequence[RankCatalog], selection: Selection | None, *, rule: str, scope: Scope | None = None
) -> tuple[RankCatalog, ...]:
    """Return what each rank writes.

    A catalog lists all that its rank holds; a range that several ranks hold must be the same in all of them. Experts
    outside the selection are left out as far as the scope (default: everything) covers them; None selects all.
    """
    if rule not in RULES:
        raise UsageError(f"unknown rule of assignment: rule={rule} allowed={','.join(RULES)}")
    holders = _holders(catalogs, selection, scope or Scope())
    load = {catalog.rank: 0 for catalog in catalogs}
    shares: list[Share] = []
    replicated: dict[Holders, list[Shard]] = {}
    for shard, ranks in holders.items():
        if len(ranks) == 1:
            shares.append((ranks[0], shard))
            load[ranks[0]] += shard.size_bytes
        else:
            replicated.setdefault(ranks, []).append(shard)
    for ranks, shards in sorted(replicated.items(), key=lambda row: (len(row[0]), row[0])):
        for rank, shard in _share_out(ranks, sorted(shards, key=shard_order), load, rule):
            shares.append((rank, shard))
            load[rank] += shard.size_bytes
    return _collect(catalogs, shares)


def fill_valleys(load: Ints, total: int) -> Ints:
    """Return how much of `total` each rank takes so that the highest load stays as low as it can.

    Ranks that take anything end level, up to one unit; the lowest ranks take the units that do not divide.
    """
    order = np.argsort(load, kind="stable")
    ascending = load[order]
    below = np.concatenate([[0], np.cumsum(ascending)[:-1]])
    # Raising the first n ranks to the level of rank n takes this much.
    needed = ascending * np.arange(len(load)) - below
    count = int(np.searchsorted(needed, total, side="right"))
    level, rest = divmod(total + int(ascending[:count].sum()), count)
    taken = np.zeros(len(load), dtype=np.int64)
    taken[order[:count]] = level - ascending[:count]
    taken[order[:rest]] += 1
    return taken


def pour(ranks: Sequence[int], shards: Sequence[Shard], room: Ints) -> list[Share]:
    """Return contiguous ranges that fill each rank's room in turn.

    Ranges end between elements: what of a rank's room is less than an element goes to the next rank.
    """
    shares: list[Share] = []
    left = room.tolist()
    index = 0
    for shard in shards:
        size, offset, rest = DTYPE_BYTES[shard.dtype], shard.offset, shard.length
        if not rest:
            shares.append((ranks[index], shard))
        while rest:
            is_last = index + 1 == len(ranks)
            length = rest if is_last else min(rest, left[index] // size)
            if length:
                shares.append((ranks[index], replace(shard, offset=offset, length=length)))
            left[index] -= length * size
            offset, rest = offset + length, rest - length
            if rest:
                left[index + 1] += left[index]
                index += 1
    return shares


def _holders(catalogs: Sequence[RankCatalog], selection: Selection | None, scope: Scope) -> dict[Shard, Holders]:
    """Return the ranks that hold each shard that is to be written, ascending."""
    chosen: frozenset[Expert] | None = None if selection is None else frozenset(selection.experts)
    found: dict[Shard, list[int]] = {}
    for catalog in sorted(catalogs, key=lambda catalog: catalog.rank):
        for shard in catalog.shards:
            is_left_out = chosen is not None and shard.expert is not None and shard.expert not in chosen
            if not (is_left_out and scope.covers(shard.part)):
                found.setdefault(shard, []).append(catalog.rank)
    return {shard: tuple(ranks) for shard, ranks in found.items()}


def _share_out(ranks: Holders, shards: Sequence[Shard], load: dict[int, int], rule: str) -> Iterable[Share]:
    if rule == "baseline":
        return [(ranks[0], shard) for shard in shards]
    if rule == "equal":
        return [share for shard in shards for share in _cut(shard, ranks, even_cuts(shard.length, len(ranks)))]
    loads = np.array([load[rank] for rank in ranks], dtype=np.int64)
    return pour(ranks, shards, fill_valleys(loads, sum(shard.size_bytes for shard in shards)))


def _cut(shard: Shard, ranks: Holders, lengths: Ints) -> list[Share]:
    """Return the ranges of one shard, in order; ranks of length 0 get nothing, an empty shard stays on the first."""
    shares, offset = [], shard.offset
    for rank, length in zip(ranks, lengths.tolist(), strict=True):
        if length:
            shares.append((rank, replace(shard, offset=offset, length=length)))
            offset += length
    return shares or [(ranks[0], shard)]


def _collect(catalogs: Sequence[RankCatalog], shares: Iterable[Share]) -> tuple[RankCatalog, ...]:
    by_rank: dict[int, list[Shard]] = {catalog.rank: [] for catalog in catalogs}
    if len(by_rank) != len(catalogs):
        raise InternalError(f"two catalogs are of one rank: ranks={sorted(catalog.rank for catalog in catalogs)}")
    for rank, shard in shares:
        by_rank[rank].append(shard)
    return tuple(
        replace(catalog, shards=tuple(sorted(by_rank[catalog.rank], key=shard_order)))
        for catalog in sorted(catalogs, key=lambda catalog: catalog.rank)
    )
