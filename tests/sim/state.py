"""A training state small enough for thousands of lives, whose value at any moment can be computed again.

A *whole* is the logical model: every tensor at one moment. A rank holds its share of it. Each step mixes the life into
the values, so a state that was resumed from the wrong branch of the lineage is a different state.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moc._native import copy_crc32c
from moc.format.tagged import ArrayValue
from moc.state import Expert, RankCatalog, shard_order
from tests.support.plain import ArrayState, split_tensor

if TYPE_CHECKING:
    from tests.sim.process import Process

__all__ = [
    "EXPERTS_PER_LAYER",
    "LAYERS",
    "PARTIAL_TENSORS",
    "Routes",
    "TinyState",
    "Whole",
    "advance",
    "first_whole",
    "noise_at",
    "routes_at",
]

TENSORS: tuple[tuple[str, int, Expert | None], ...] = (
    ("embed.weight", 37, None),
    ("layers.0.experts.0.w", 11, Expert(layer=0, index=0)),
    ("layers.0.experts.1.w", 11, Expert(layer=0, index=1)),
)
LAYERS, EXPERTS_PER_LAYER = 2, 3
PARTIAL_TENSORS = (
    TENSORS[0],
    *(
        (f"layers.{layer}.experts.{index}.w", 5 + 2 * index, Expert(layer=layer, index=index))
        for layer in range(LAYERS)
        for index in range(EXPERTS_PER_LAYER)
    ),
)
"""Of a simulation of partial checkpoints: two layers, and turns of three commits where each takes one expert."""
PARTS = ("exp_avg", "master")
MODULUS = 8191  # the values stay integers that a float32 holds exactly

Whole = dict[tuple[str, str], np.ndarray]
Routes = tuple[np.ndarray, np.ndarray]
"""By layer and expert: routed since the run began, and of these learned by the bytes that the expert has now."""


def first_whole(salt: int, *, is_partial: bool) -> Whole:
    """Return the state at step 0, or one that was loaded from elsewhere."""
    return {
        (name, part): (np.arange(count, dtype=np.float32) * 3 + salt + number + index) % MODULUS
        for number, (name, count, _) in enumerate(PARTIAL_TENSORS if is_partial else TENSORS)
        for index, part in enumerate(PARTS)
    }


def advance(values: np.ndarray, *, step: int, life: int) -> np.ndarray:
    """Return what one step in a life makes of some of a tensor's elements."""
    return (values * np.float32(5) + np.float32(step % 97 + 7 * (life % 1013))) % np.float32(MODULUS)


def routes_at(step: int, rank: int) -> np.ndarray:
    """Return what a rank routes to each expert in a step, by layer; some get nothing for a while."""
    layer, expert = np.indices((LAYERS, EXPERTS_PER_LAYER))
    return (step * 7 + rank * 3 + layer * 5 + expert * 11) % 9 * ((step + expert) % 4 > 0)


def noise_at(rank: int, step: int, life: int) -> np.ndarray:
    """Return the small state that each rank has for itself."""
    return np.array([rank, step, life], dtype=np.int64)


class TinyState(ArrayState):
    """TrainingState of one rank; `life` tells lives apart (a life's token)."""

    def __init__(self, rank: int, size: int, process: Process) -> None:
        self.rank, self.size, self._process = rank, size, process
        is_partial = process.sim.knobs.is_partial
        tensors = PARTIAL_TENSORS if is_partial else TENSORS
        shards = [
            split_tensor(name, part, count, rank, size, expert) for name, count, expert in tensors for part in PARTS
        ]
        self._shards = tuple(sorted((shard for shard in shards if shard.length), key=shard_order))
        self.values = [np.zeros(shard.length, dtype=np.float32) for shard in self._shards]
        self.take(first_whole(0, is_partial=is_partial))
        self.step, self.life = 0, 0
        self.noise = noise_at(rank, 0, 0)

    @property
    def catalog(self) -> RankCatalog:
        return RankCatalog(rank=self.rank, shards=self._shards, state_capacity_bytes=4096)

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {"model": "tiny"}

    def take(self, whole: Whole) -> None:
        """Replace the values by this rank's share."""
        for shard, value in zip(self._shards, self.values, strict=True):
            value[:] = whole[shard.tensor, shard.part][shard.offset : shard.offset + shard.length]

    def differs_from(self, whole: Whole) -> str | None:
        """Return the first shard whose bytes are not those of the whole's share."""
        for shard, value in zip(self._shards, self.values, strict=True):
            expected = whole[shard.tensor, shard.part][shard.offset : shard.offset + shard.length]
            if value.tobytes() != expected.tobytes():
                return shard.name
        return None

    def has(self, whole: Whole, expert: Expert) -> bool:
        """Return whether this rank's share of an expert is that of the whole."""
        return all(
            value.tobytes() == whole[shard.tensor, shard.part][shard.offset : shard.offset + shard.length].tobytes()
            for shard, value in zip(self._shards, self.values, strict=True)
            if shard.expert == expert
        )

    def advance(self) -> None:
        self.step += 1
        for value in self.values:
            value[:] = advance(value, step=self.step, life=self.life)
        self.noise = noise_at(self.rank, self.step, self.life)

    def copy_shards(self, targets: array[int], crcs: array[int]) -> None:
        """Copy in pieces, between which others may run and this process may die."""
        self._process.sim.auditor.note_copy(self._process, self.rank, targets)
        for index, value in enumerate(self.values):
            if not targets[index]:
                continue
            crc = array("I", [0])
            source, length = array("Q", [value.ctypes.data]), array("Q", [value.nbytes])
            copy_crc32c(source, array("Q", [targets[index]]), length, crc)
            crcs[index] = crc[0]
            self._process.enter()

    def capture(self) -> dict[str, object]:
        noise = ArrayValue(dtype="I64", shape=(3,), kind="numpy", data=memoryview(self.noise).cast("B"))
        return {"step": self.step, "noise": noise}
