"""How many bytes each rank writes, for any number of ranks: `moc.plan.assign` in whole-model arithmetic.

Optimizer states lie where ZeRO put them. Weights that are stored beside masters are replicated and shared out: dense
ones over all ranks, experts over the columns that hold them. `is_cut` says whether tensors may be cut anywhere, as moc
does, or whole modules and whole experts are the smallest unit, as in the paper.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moc.plan.assign import fill_valleys
from moc.plan.balance import windows
from moc.plan.bound import lower_bound, turn_bound
from moc.plan.ownership import Ints, Ownership, even_cuts
from moc.plan.rotation import Rotation
from moc.plan.scope import Layout, Scope
from moc.plan.shapes import ModelShape

__all__ = ["Checkpoint", "Level", "all_experts", "bytes_bound", "least_k", "plan_level", "rank_bytes"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is planned: a model on its ranks, what is stored of it and what a partial checkpoint leaves out."""

    shape: ModelShape
    ownership: Ownership
    layout: Layout
    scope: Scope
    is_cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The checkpoints of one turn of the rotation with K experts per layer, in bytes.

    `bottleneck` is the fullest rank of the worst checkpoint, `rank` which one that is. `objects` is how many objects a
    manifest names: one of each rank, and one of each rank that has experts to write, of every checkpoint of a turn.
    """

    k: int
    checkpoints: int
    total: int
    bottleneck: int
    rank: int
    objects: int


def all_experts(ownership: Ownership) -> Mask:
    """Return the selection of everything, by layer and expert."""
    return np.ones((ownership.layers, ownership.experts), dtype=np.bool_)


def plan_level(job: Checkpoint, rotation: Rotation, k: int, rule: str) -> Level:
    """Return the bytes of one full turn under a rule."""
    best, rank, total, holders = 0, 0, 0, 0
    selections = windows(rotation, k)
    for selected in selections:
        holders += int(np.count_nonzero(job.ownership.selected_elements(selected)))
        load = rank_bytes(job, selected, rule)
        total = int(load.sum())
        fullest = int(load.argmax())
        if load[fullest] > best:
            best, rank = int(load[fullest]), fullest
    turn = -(-job.ownership.experts // k)
    objects = job.ownership.dp + -(-holders * turn // len(selections))
    return Level(k=k, checkpoints=len(selections), total=total, bottleneck=best, rank=rank, objects=objects)


def least_k(ownership: Ownership, objects: int) -> int:
    """Return the smallest K whose manifests certainly name at most so many objects; N if none does."""
    count = np.bincount(ownership.profile, minlength=len(ownership.slices))
    holders = int(((ownership.slices > 0) * count[:, None, None]).sum(axis=0).max())  # columns of the most cut expert
    for k in range(1, ownership.experts):
        written = min(ownership.dp, k * ownership.layers * holders)
        if ownership.dp + -(-ownership.experts // k) * written <= objects:
            return k
    return ownership.experts


def rank_bytes(job: Checkpoint, selected: Mask, rule: str) -> Ints:
    """Return what each global rank writes when these experts are selected, by layer and expert."""
    everything = all_experts(job.ownership)
    load = _owned_bytes(job, everything, job.layout.optimizer - job.scope.partial_optimizer(job.layout))
    load += job.ownership.dense * job.layout.optimizer
    load += _owned_bytes(job, selected, job.scope.partial_optimizer(job.layout))
    if job.layout.weight:
        load = _add_experts(job, load, selected if job.scope.covers("weight") else everything, rule)
        load = _add_dense(job, load, rule)
    return load


def bytes_bound(job: Checkpoint, k: int) -> int:
    """Return the least possible bytes of the fullest rank of the worst checkpoint, whatever the assignment and the
    selections, if nobody waits longer than ceil(experts / K) checkpoints.
    """
    own, layout, scope = job.ownership, job.layout, job.scope
    fixed = _owned_bytes(job, all_experts(own), layout.optimizer - scope.partial_optimizer(layout))
    fixed += own.dense * layout.optimizer
    least = np.full(len(own.slices), np.iinfo(np.int64).max)
    np.minimum.at(least, np.repeat(own.profile, own.ep), fixed)
    scaled = replace(own, slices=own.slices * scope.partial_optimizer(layout))
    elements = job.shape.expert_elements * own.layers
    kept_weight = scope.partial_weight(layout) * k + (layout.weight - scope.partial_weight(layout)) * own.experts
    weights = job.shape.dense_elements * layout.weight + elements * kept_weight
    total = int(fixed.sum()) + elements * k * scope.partial_optimizer(layout) + weights
    return max(lower_bound(scaled, k, base=least), turn_bound(scaled, k, base=least), -(-total // own.dp))


def _owned_bytes(job: Checkpoint, selected: Mask, bytes_each: int) -> Ints:
    if not bytes_each:
        return np.zeros(job.ownership.dp, dtype=np.int64)
    return job.ownership.selected_elements(selected) * bytes_each


def _add_experts(job: Checkpoint, load: Ints, selected: Mask, rule: str) -> Ints:
    """Return the load with the weights of the selected experts, each on columns of its EP rank."""
    own = job.ownership
    size = job.shape.expert_elements * job.layout.weight
    counts = selected.reshape(own.layers, own.ep, own.local_experts).sum(axis=(0, 2))
    grid = load.reshape(own.columns, own.ep)
    for rank in range(own.ep):
        column, count = grid[:, rank], int(counts[rank])
        if rule == "baseline":
            column[0] += size * count
        elif job.is_cut and rule == "equal":
            column += even_cuts(job.shape.expert_elements, own.columns) * (job.layout.weight * count)
        elif job.is_cut:
            column += fill_valleys(column, size * count)
        elif rule == "equal":
            column += even_cuts(count, own.columns) * size
        else:
            _add_largest_first(column, [size] * count)
    return load


def _add_dense(job: Checkpoint, load: Ints, rule: str) -> Ints:
    """Return the load with the dense weights, which every rank holds."""
    sizes = [module.elements * job.layout.weight for module in job.shape.dense_modules()]
    if rule == "baseline":
        load[0] += sum(sizes)
    elif job.is_cut and rule == "equal":
        load += even_cuts(job.shape.dense_elements, len(load)) * job.layout.weight
    elif job.is_cut:
        load += fill_valleys(load, sum(sizes))
    elif rule == "equal":
        _add_largest_first(load, sizes, without=load.copy())
    else:
        _add_largest_first(load, sizes)
    return load


def _add_largest_first(load: Ints, sizes: Sequence[int], *, without: Ints | None = None) -> None:
    """Add whole units in place, the largest first, each to the rank with the least load; `without` does not count."""
    ignored = np.zeros_like(load) if without is None else without
    heap = [(int(value), rank) for rank, value in enumerate(load - ignored)]
    heapq.heapify(heap)
    for size in sorted(sizes, reverse=True):
        value, rank = heap[0]
        heapq.heapreplace(heap, (value + size, rank))
        load[rank] += size
