"""Packs the experts of one rank into the checkpoints of a turn, column by column, and turns the result round the ranks.

Every expert-parallel (EP) rank has experts of the same sizes. So if slot s of rank 0 is in checkpoint b, let slot s of
rank r be in checkpoint (b + r) mod P: where P divides the number of ranks, every layer then has as many experts in one
checkpoint as in any other, whatever b is, and every rank carries what rank 0 carries, only later. What remains is to
pack the slots of one rank into P bins so that no column of a bin is above a size: slots with equal slices are of one
kind, of which there are few, so a search over how many of each kind a bin has finds what single swaps do not, such as
the four quarters that make a whole.

Pure and deterministic; bounded by the number of decisions that the search makes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moc.plan.ownership import Ints

__all__ = ["packed_phases"]

KIND_LIMIT = 16
PHASE_LIMIT = 512  # the search goes as deep
NODE_LIMIT = 20_000  # decisions on how many of a kind go into a bin, for one size: a fraction of a second
STEPS = (0, 256, 32, 8, 2)  # sizes tried: the goal, then a 256th of what the best so far is above it, and so on

Counts = tuple[int, ...]


def packed_phases(slices: Ints, ep: int, phases: int, *, goal: int, worst: int) -> Ints | None:
    """Return an assignment of every expert to one of `phases` whose fullest column carries less than `worst`.

    `slices` is by profile, layer and local expert, the result by layer and global expert. None if `phases` does not
    divide the ranks, there are too many of them or of kinds of experts, or nothing was found; tried are sizes from
    `goal` on.
    """
    profiles, layers, local = slices.shape
    flat = slices.reshape(profiles, layers * local).T
    kinds, kind_of_slot = np.unique(flat, axis=0, return_inverse=True)
    if ep % phases or phases > PHASE_LIMIT or len(kinds) > KIND_LIMIT:
        return None
    counts = np.bincount(kind_of_slot.ravel(), minlength=len(kinds))
    # What is cut comes first, because little else goes with it.
    order = sorted(range(len(kinds)), key=lambda kind: (-int((kinds[kind] > 0).sum()), int(counts[kind]), kind))
    for share in STEPS:
        size = goal + (worst - goal) // share if share else goal
        if size >= worst:
            continue
        bins = _Search(kinds[order], size).fill(tuple(int(counts[kind]) for kind in order), phases)
        if bins is not None:
            by_slot = _assigned(bins, order, kind_of_slot.ravel(), ep, phases).reshape(layers, local, ep)
            return np.asarray(by_slot.transpose(0, 2, 1).reshape(layers, ep * local), dtype=np.int64)
    return None


def _assigned(bins: list[Counts], order: list[int], kind_of_slot: Ints, ep: int, phases: int) -> Ints:
    """Return the phase of each slot on each rank: the slots of a kind go to the bins in turn."""
    first = np.zeros(len(kind_of_slot), dtype=np.int64)
    for row, kind in enumerate(order):
        first[np.flatnonzero(kind_of_slot == kind)] = np.repeat(np.arange(phases), [counts[row] for counts in bins])
    return np.asarray((first[:, None] + np.arange(ep)[None, :]) % phases, dtype=np.int64)


class _Search:
    """Fills bins one after the other, with what is left for the others in view."""

    def __init__(self, kinds: Ints, size: int) -> None:
        self._kinds = [tuple(int(n) for n in row) for row in kinds]
        self._columns = range(kinds.shape[1])
        self._size = size
        self._left = NODE_LIMIT

    def fill(self, counts: Counts, bins: int) -> list[Counts] | None:
        """Return what each bin has of each kind, None if nothing was found."""
        if not bins:
            return None if any(counts) else []
        totals = [sum(n * kind[c] for n, kind in zip(counts, self._kinds, strict=True)) for c in self._columns]
        least = [total - (bins - 1) * self._size for total in totals]
        for taken in self._bins(counts, (), [0 for _ in self._columns], least):
            rest = self.fill(tuple(n - m for n, m in zip(counts, taken, strict=True)), bins - 1)
            if rest is not None:
                return [taken, *rest]
        return None

    def _bins(self, counts: Counts, taken: Counts, sums: list[int], least: list[int]) -> Iterator[Counts]:
        """Yield the bins that keep to the size and leave no more than the others can hold, the fullest first."""
        number = len(taken)
        self._left -= 1
        if self._left < 0:
            return
        if number == len(counts):
            if all(have >= need for have, need in zip(sums, least, strict=True)):
                yield taken
            return
        kind = self._kinds[number]
        room = [(self._size - sums[c]) // kind[c] for c in self._columns if kind[c]]
        for count in range(min([counts[number], *room]), -1, -1):
            grown = [have + count * kind[c] for c, have in enumerate(sums)]
            if self._can_reach(counts, number + 1, grown, least):
                yield from self._bins(counts, (*taken, count), grown, least)

    def _can_reach(self, counts: Counts, number: int, sums: list[int], least: list[int]) -> bool:
        """Return whether the kinds from `number` on can still fill every column as far as is needed."""
        for column in self._columns:
            more = sum(n * kind[column] for n, kind in zip(counts[number:], self._kinds[number:], strict=True))
            if sums[column] + more < least[column]:
                return False
        return True
