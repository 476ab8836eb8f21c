"""In which order each MoE layer visits its experts, so that the ranks stay even at every checkpoint.

A *rotation* gives each layer one cyclic order of its experts; a checkpoint takes the next K of each. Rank-first: the
order walks over the expert-parallel (EP) ranks before it comes to a second expert of a rank, and layers start at
different ranks.

- Where every rank owns whole experts, `even_rotation` is enough: at every checkpoint, for every K and after any change
  of K, two EP ranks differ by at most one expert.
- Where ZeRO cuts the experts of a rank into columns, the order must also keep the columns even, which depends on where
  the cuts lie: `balanced_rotation` searches for such an order and is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from moc.errors import InternalError
from moc.plan.bound import lower_bound
from moc.plan.ownership import Ints, Ownership
from moc.plan.spread import spread_phases

__all__ = ["Rotation", "balanced_rotation", "even_rotation", "windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The visiting order of each MoE layer: every expert's index once."""

    orders: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for layer, order in enumerate(self.orders):
            if sorted(order) != list(range(len(order))) or not order:
                raise InternalError(f"order is not a permutation of the experts: layer={layer} order={order}")


def even_rotation(layers: int, experts: int, ep: int) -> Rotation:
    """Return the rank-first rotation.

    Position p of a layer that starts at rank s is EP rank (p + s) % ep. Layers start at ranks 0, 1, 2, ... as in the
    paper; the last `layers % ep` layers start at evenly spaced ranks instead of neighbours, because then any window of
    consecutive ranks holds as many starts as any other of its length, give or take one. That is what makes every K
    even; the paper's own offsets are even for one K only.
    """
    local = experts // ep
    rest = layers % ep
    starts = [layer % ep for layer in range(layers - rest)] + [index * ep // rest for index in range(rest)]
    return Rotation(
        orders=tuple(
            tuple((position + start) % ep * local + position // ep for position in range(experts)) for start in starts
        )
    )


def balanced_rotation(ownership: Ownership, k: int) -> Rotation:
    """Return the rotation whose worst rank over all checkpoints of K experts per layer carries the fewest elements.

    Candidates are `even_rotation` and the results of a search that splits the experts evenly into blocks, of which a
    checkpoint takes one, or several neighbours if K does not divide the experts. The first candidate that reaches the
    lower bound is taken, else the best.
    """
    experts, layers = ownership.experts, ownership.layers
    best = even_rotation(layers, experts, ownership.ep)
    if len(ownership.slices) == 1 or k >= experts:
        return best
    goal, block = lower_bound(ownership, k), gcd(experts, k)
    worst = _worst(ownership, best, k)
    if worst <= goal:
        return best
    block_goal = goal if block == k else lower_bound(ownership, block)
    for phases in spread_phases(ownership.slices, ownership.ep, experts // block, goal=block_goal):
        candidate = _concatenated(phases)
        reached = _worst(ownership, candidate, k)
        if reached < worst:
            best, worst = candidate, reached
        if worst <= goal:
            break
    return best


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
