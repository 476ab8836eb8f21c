"""Splits the experts of a model into checkpoints in which no rank and no column stands out.

Experts are the edges between layers and ranks. To halve a set of them evenly, pair up edges that should part company:
at each layer any two, at each rank two with similar slices. Every edge then has at most two partners, so the pairs form
paths and even cycles, and colouring these alternately halves every layer exactly and every group of similar experts on
a rank up to one. Repeated halving gives any power of two; moves then repair what sizes leave uneven.

Everything is deterministic: ties go to the lower index, sizes are integers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moc.plan.ownership import Ints
from moc.plan.repair import repaired

__all__ = ["spread_phases"]

UNIT_BITS = 12  # slices are measured in 1/4096 of the largest, so that squares of sums stay exact integers


def spread_phases(slices: Ints, ep: int, phases: int, *, goal: int) -> Iterator[Ints]:
    """Yield better and better assignments of every expert to one of `phases`, equally many of each layer.

    `slices` is by profile, layer and local expert; results are by layer and global expert. `goal` is the size in
    elements below which nothing needs to be improved. The number of phases must divide the number of experts.
    """
    largest = max(1, int(slices.max()))
    units = (slices * (1 << UNIT_BITS) // largest).transpose(1, 2, 0)
    target = goal * (1 << UNIT_BITS) // largest
    phase = _halved(units, ep, phases)
    yield _global_order(phase)
    yield _global_order(repaired(units, phase, phases, target))


def _global_order(phase: Ints) -> Ints:
    """Return the phases by layer and global expert; given by layer, EP rank and local expert."""
    return np.asarray(phase.reshape(len(phase), -1))


def _halved(units: Ints, ep: int, phases: int) -> Ints:
    """Return the phase of each expert, by layer, EP rank and local expert, from repeated halving.

    An odd number of phases is dealt out in turn, which only the repair can improve.
    """
    layers, local, _ = units.shape
    edges = np.indices((layers, ep, local), dtype=np.int64).reshape(3, -1).T
    parts = [edges]
    while phases % 2 == 0:
        halves: list[Ints] = []
        for part in parts:
            is_second = _halve(units, part)
            first, second = part[~is_second], part[is_second]
            halves += [first, second]
        parts = halves
        phases //= 2
    phase = np.zeros((layers, ep, local), dtype=np.int64)
    for number, part in enumerate(parts):
        part = part[np.lexsort((part[:, 1], part[:, 2], part[:, 0]))]
        of_layer = np.arange(len(part)) % (len(part) // layers)
        phase[tuple(part.T)] = number * phases + of_layer * phases // (len(part) // layers)
    return phase


def _halve(units: Ints, edges: Ints) -> npt.NDArray[np.bool_]:
    """Return which edges belong to the second half."""
    layer, rank, local = edges.T
    kinds: dict[bytes, int] = {}
    kind_of_slot = np.array([[kinds.setdefault(v.tobytes(), len(kinds)) for v in row] for row in units])
    home = units.argmax(axis=2)[layer, local]
    kind = kind_of_slot[layer, local]
    by_rank = _partners([(rank, home, kind), (rank, home), (rank,)], (local, layer))
    by_layer = _partners([(layer,)], (local, rank))
    colour = np.full(len(edges), -1, dtype=np.int64).tolist()
    for start in range(len(edges)):
        front = [(start, 0)] if colour[start] < 0 else []
        while front:
            edge, value = front.pop()
            if colour[edge] < 0:
                colour[edge] = value
                front += [(other, 1 - value) for other in (by_rank[edge], by_layer[edge]) if other >= 0]
    return np.asarray(np.array(colour) == 1)


def _partners(groups: list[tuple[Ints, ...]], ties: tuple[Ints, ...]) -> list[int]:
    """Return each edge's partner or -1: neighbours within the finest group first, then what is left in coarser ones."""
    partner = np.full(len(ties[0]), -1, dtype=np.int64)
    rest = np.lexsort((*ties, *reversed(groups[0])))
    for keys in groups:
        changes = np.any([key[rest][1:] != key[rest][:-1] for key in keys], axis=0)
        starts = np.concatenate([[0], np.flatnonzero(changes) + 1]) if len(rest) else np.zeros(0, dtype=np.int64)
        place = np.arange(len(rest)) - np.repeat(starts, np.diff([*starts, len(rest)]))
        is_last = np.concatenate([changes, [True]]) if len(rest) else np.zeros(0, dtype=np.bool_)
        is_alone = is_last & (place % 2 == 0)
        firsts, seconds = rest[(place % 2 == 0) & ~is_alone], rest[place % 2 == 1]
        partner[firsts], partner[seconds] = seconds, firsts
        rest = rest[is_alone]
    return list(partner.tolist())
