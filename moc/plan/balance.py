"""A rotation that keeps ranks even where ZeRO cuts experts into columns, and the selections of one turn of a rotation.

The search is deterministic: equal ownership gives the same rotation on every rank and hash seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd

import numpy as np
import numpy.typing as npt

from moc.plan.bound import lower_bound, turn_bound
from moc.plan.ownership import Ints, Ownership, catalog_ownership
from moc.plan.pack import packed_phases
from moc.plan.rotation import Rotation, alike_layers, even_rotation, expert_counts, rotation_of
from moc.plan.spread import spread_phases
from moc.state import RankCatalog

__all__ = ["balanced_rotation", "job_rotations", "windows"]


def balanced_rotation(ownership: Ownership, k: int) -> Rotation:
    """Return the rotation whose worst rank over all checkpoints of K experts per layer carries the fewest elements.

    Candidates are `even_rotation` and the results of searches that split the experts evenly into blocks, of which a
    checkpoint takes one, or several neighbours if K does not divide the experts. The first candidate that reaches the
    lower bound is taken, else the best.
    """
    experts, layers = ownership.experts, ownership.layers
    best = even_rotation(layers, experts, ownership.ep)
    if len(ownership.slices) == 1 or k >= experts:
        return best
    goal, block = _goal(ownership, k), gcd(experts, k)
    worst = _worst(ownership, best, k)
    if worst <= goal:
        return best
    # What one block cannot do alone, several neighbours may do together: their goal is the mean.
    for phases in _blocks(ownership, block, goal=goal if block == k else lower_bound(ownership, block)):
        candidate = _concatenated(phases)
        reached = _worst(ownership, candidate, k)
        if reached < worst:
            best, worst = candidate, reached
        if worst <= goal:
            break
    return best


def job_rotations(
    catalogs: Sequence[RankCatalog], ep_sizes: Sequence[tuple[str, int]], ks: Sequence[int | None]
) -> tuple[Rotation, ...]:
    """Return the rotation of a job whose ranks hold these catalogs for each K experts per layer (None: all).

    It is what `balanced_rotation` finds for the ownership that they show: the one that `moc plan` reports. Layers with
    equally many experts are balanced together. Where catalogs show no such ownership the order is rank-first.
    """
    counts = expert_counts(shard.expert for c in catalogs for shard in c.shards if shard.expert is not None)
    orders = [list(rotation_of(counts, ep_sizes).orders) for _ in ks]
    for experts, layers, ep in alike_layers(counts, ep_sizes):
        if all(k is None or k >= experts for k in ks):
            continue
        own = catalog_ownership(catalogs, layers, experts=experts, ep=ep)
        if own is None:
            continue
        for k, order in zip(ks, orders, strict=True):
            if k is not None:
                for layer, row in zip(layers, balanced_rotation(own, k).orders, strict=True):
                    order[layer] = row
    return tuple(Rotation(orders=tuple(order)) for order in orders)


def _goal(ownership: Ownership, k: int) -> int:
    return max(lower_bound(ownership, k), turn_bound(ownership, k))


def _blocks(ownership: Ownership, k: int, *, goal: int) -> Iterator[Ints]:
    """Yield assignments of the experts to blocks of K per layer; a later one may be better."""
    slices, ep, phases = ownership.slices, ownership.ep, ownership.experts // k
    found = spread_phases(slices, ep, phases, goal=goal)
    first = next(found)
    yield first
    packed = packed_phases(slices, ep, phases, goal=goal, worst=_worst(ownership, _concatenated(first), k))
    if packed is not None:
        yield packed
    yield from found


def windows(rotation: Rotation, k: int) -> list[npt.NDArray[np.bool_]]:
    """Return what each checkpoint of one full turn with constant K selects, by layer and expert."""
    orders = np.array(rotation.orders, dtype=np.int64)
    layers, experts = orders.shape
    rows = np.arange(layers)[:, None]
    found = []
    for checkpoint in range(experts // gcd(experts, k)):
        positions = (checkpoint * k + np.arange(k)) % experts
        selected = np.zeros((layers, experts), dtype=np.bool_)
        selected[rows, orders[:, positions]] = True
        found.append(selected)
    return found


def _worst(ownership: Ownership, rotation: Rotation, k: int) -> int:
    return max(int(ownership.selected_elements(selected).max()) for selected in windows(rotation, k))


def _concatenated(phase: Ints) -> Rotation:
    """Return the rotation that visits phase 0 first; `phase` is by layer and expert."""
    return Rotation(orders=tuple(tuple(np.argsort(row, kind="stable").tolist()) for row in phase))
