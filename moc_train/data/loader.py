"""The samples of each step, in one global order that does not depend on the number of ranks.

The stream of positions 0, 1, 2, ... runs through epoch after epoch; step s takes the next `global_batch` of them.
Within a step, position a * ranks * micro_batch + rank * micro_batch + i goes to this rank's micro-batch a, row i.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moc_train.data.order import digest_ids, sample_ids
from moc_train.data.tokens import TokenFile

__all__ = ["SampleLoader", "StepSamples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSamples:
    """The samples of one step: this rank's micro-batches, and what the whole step consists of."""

    first: int  # position in the stream of all epochs
    epoch: int  # of the first position
    epoch_size: int
    ids: tuple[int, ...]  # sample ids of the whole step, in the global order
    rank_ids: tuple[tuple[int, ...], ...]  # of this rank's micro-batches
    micro_batches: tuple[tuple[Tensor, Tensor], ...]  # tokens and targets, (micro_batch, sequence_length) int64

    def digest(self) -> str:
        """Return a hash of the step's sample ids in their order."""
        return digest_ids(self.ids)


class SampleLoader:
    """Hands out one step after another; its state is the samples consumed, the same on every rank."""

    def __init__(
        self, tokens: TokenFile, *, seed: int, rank: int, world_size: int, micro_batch: int, accumulation: int
    ) -> None:
        self._tokens = tokens
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._consumed = 0

    @property
    def global_batch(self) -> int:
        return self._micro_batch * self._accumulation * self._world_size

    @property
    def consumed(self) -> int:
        """Samples handed out since the first step, over all ranks and epochs."""
        return self._consumed

    def next_step(self) -> StepSamples:
        """Return the next step's samples and count them as consumed."""
        count, first = len(self._tokens), self._consumed
        ids = sample_ids(first, self.global_batch, count=count, seed=self._seed)
        rank_ids = []
        micro_batches = []
        for turn in range(self._accumulation):
            start = (turn * self._world_size + self._rank) * self._micro_batch
            own = ids[start : start + self._micro_batch]
            rows = torch.from_numpy(np.stack([self._tokens.sample(index) for index in own]).astype(np.int64))
            micro_batches.append((rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
            rank_ids.append(own)
        self._consumed += self.global_batch
        return StepSamples(
            first=first,
            epoch=first // count,
            epoch_size=count,
            ids=ids,
            rank_ids=tuple(rank_ids),
            micro_batches=tuple(micro_batches),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain integers and strings."""
        return {
            "consumed": self._consumed,
            "epoch": self._consumed // len(self._tokens),
            "seed": self._seed,
            "samples": len(self._tokens),
            "sequence_length": self._tokens.sequence_length,
            "data": self._tokens.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from this state; raise ValueError when it belongs to other data or another order."""
        own = self.state_dict()
        different = [key for key in sorted(own) if key not in ("consumed", "epoch") and state.get(key) != own[key]]
        if different:
            facts = ", ".join(f"{key}: saved {state.get(key)}, now {own[key]}" for key in different)
            raise ValueError(f"loader state belongs to other data: {facts}")
        self._consumed = int(state["consumed"])
