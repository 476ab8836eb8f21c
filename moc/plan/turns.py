"""Which experts a snapshot copies: a window of the rotation by the step's number, and whatever is owed besides.

A choice is a mask over the model's experts in the order of `Turns.experts`. It follows from the settings, the step and
what is owed; ranks that agree on these choose alike, without a message. Windows of neighbouring snapshots lie side by
side, so any ceil(N / K) of them hold every expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moc.errors import UsageError
from moc.plan.rotation import Rotation
from moc.state import Expert

__all__ = ["Chosen", "Turns", "check_k"]

Chosen = npt.NDArray[np.bool_]


def check_k(name: str, k: int | None, counts: Sequence[int]) -> None:
    """Raise UsageError unless every layer has that many experts."""
    if k is None:
        return
    if not counts:
        raise UsageError(f"setting does not fit the model: {name}={k} allowed=None, the model has no experts")
    if k > min(counts):
        raise UsageError(
            f"setting does not fit the model: {name}={k} allowed=1..{min(counts)}, the experts of a MoE layer"
        )


class Turns:
    """The choices of one life. Constant; everything it returns is the caller's own."""

    def __init__(self, rotation: Rotation, *, k: int | None, every: int) -> None:
        """Take `k` experts per layer (None: all of them) at every `every`-th step."""
        self._k, self.every = k, every
        self._starts = np.cumsum([0, *(len(order) for order in rotation.orders)], dtype=np.int64)
        # Each layer's places in the mask, twice over: a window that goes round the end is one slice.
        self._rows = [
            start + np.array(order * 2, dtype=np.int64)
            for start, order in zip(self._starts, rotation.orders, strict=False)
        ]

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of experts of each MoE layer."""
        return tuple(len(row) // 2 for row in self._rows)

    @property
    def is_whole(self) -> bool:
        """Return whether every snapshot holds all experts."""
        return self._k is None

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The model's experts, sorted; a choice has one place for each."""
        return tuple(
            Expert(layer=layer, index=index) for layer, row in enumerate(self._rows) for index in range(len(row) // 2)
        )

    def place(self, expert: Expert) -> int:
        """Return an expert's place in a choice."""
        return int(self._starts[expert.layer]) + expert.index

    def everything(self) -> Chosen:
        """Return the choice of all experts."""
        return np.ones(int(self._starts[-1]), dtype=np.bool_)

    def nothing(self) -> Chosen:
        """Return the choice of no expert."""
        return np.zeros(int(self._starts[-1]), dtype=np.bool_)

    def window(self, step: int) -> Chosen:
        """Return whose turn it is at a step's snapshot."""
        if self._k is None:
            return self.everything()
        chosen, first = self.nothing(), step // self.every * self._k
        for row in self._rows:
            begin = first % (len(row) // 2)
            chosen[row[begin : begin + self._k]] = True
        return chosen
