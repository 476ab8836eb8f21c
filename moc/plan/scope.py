"""Which bytes of a parameter are stored, and which of them a partial checkpoint leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from moc.errors import UsageError

__all__ = ["LAYOUTS", "MOC_LAYOUT", "PAPER_LAYOUT", "PARTS", "SIZES", "Layout", "Scope"]

PARTS = ("w", "o", "wo")
SIZES = ("strict", "master_full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Bytes stored per parameter: weights in the precision of training, masters, moments."""

    name: str
    weight: int
    master: int
    moments: int

    @property
    def optimizer(self) -> int:
        """What ZeRO partitions."""
        return self.master + self.moments

    @property
    def total(self) -> int:
        return self.weight + self.optimizer


MOC_LAYOUT = Layout(name="moc", weight=0, master=4, moments=8)  # bf16 weights are the cast of the masters
PAPER_LAYOUT = Layout(name="paper", weight=2, master=4, moments=8)
LAYOUTS = {"moc": MOC_LAYOUT, "paper": PAPER_LAYOUT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """To which parts of an expert a selection applies: `parts` are weights, optimizer states or both.

    With size `master_full` the master weights of every expert are saved each time, with `strict` they follow `parts`.
    """

    parts: str = "wo"
    size: str = "strict"

    def __post_init__(self) -> None:
        for name, value, allowed in (("parts", self.parts, PARTS), ("size", self.size, SIZES)):
            if value not in allowed:
                raise UsageError(f"scope of a partial checkpoint is wrong: {name}={value} allowed={','.join(allowed)}")

    def covers(self, part: str) -> bool:
        """Return whether a part of an expert is left out when the expert is not selected.

        `weight` and `master` are known by name, every other part is a moment.
        """
        if part == "weight":
            return "w" in self.parts
        return "o" in self.parts and (part != "master" or self.size == "strict")

    def partial_optimizer(self, layout: Layout) -> int:
        """Return the optimizer bytes per expert parameter that follow the selection."""
        return layout.master * self.covers("master") + layout.moments * self.covers("moment")

    def partial_weight(self, layout: Layout) -> int:
        """Return the weight bytes per expert parameter that follow the selection."""
        return layout.weight * self.covers("weight")
