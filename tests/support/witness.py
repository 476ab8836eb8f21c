"""A training state whose experts say themselves what they have learned: each of their values is the number of routes.

So what a version of an expert has learned is told by its bytes, whoever claims what about them. Routes follow from
life, step and rank, and no two steps, ranks or lives have the same.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np

from moc.state import Expert
from tests.support.plain import EXPERTS, LAYERS, PlainState

__all__ = ["MICRO_BATCHES", "WitnessState", "routes_of"]

MICRO_BATCHES = 2

Routes = tuple[tuple[int, ...], ...]


@cache
def routes_of(life: int, step: int, rank: int, turn: int) -> Routes:
    """Return what a rank routes to every expert of every layer in one micro-batch."""
    chance = random.Random(f"{life} {step} {rank} {turn}")
    return tuple(tuple(chance.choice((0, 1, 5, 40)) for _ in range(EXPERTS)) for _ in range(LAYERS))


class WitnessState(PlainState):
    """`life` is the number of the present life, once it has begun."""

    life = 0

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        for shard, value in zip(self._shards, self.values, strict=True):
            if shard.expert is not None:
                value[:] = 0

    def advance(self) -> None:
        before = [value.copy() for value in self.values]
        super().advance()
        for shard, value, learned in zip(self._shards, self.values, before, strict=True):
            if shard.expert is not None:
                value[:] = learned + np.float32(self._routed(shard.expert))

    def learned(self) -> dict[str, int]:
        """Return what this rank's experts have learned, by "layer.index", as all their bytes say alike."""
        found: dict[str, int] = {}
        for shard, value in zip(self._shards, self.values, strict=True):
            if shard.expert is not None:
                name, count = f"{shard.expert.layer}.{shard.expert.index}", int(value[0])
                assert (value == count).all(), f"an expert is torn: {shard.name}"
                assert found.setdefault(name, count) == count, f"parts of an expert differ: {shard.name}"
        return found

    def _routed(self, expert: Expert) -> int:
        return sum(
            routes_of(self.life, self.step, rank, turn)[expert.layer][expert.index]
            for rank in range(self.size)
            for turn in range(MICRO_BATCHES)
        )
