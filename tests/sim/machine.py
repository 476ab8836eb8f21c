"""One machine: what dies together when it is lost. The nodes of a job are machines, replaced by others when lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine"]


@dataclass(slots=True, eq=False)
class Machine:
    """`root` is its runtime root, `address` where others reach it; of a lost one nothing is heard any more."""

    number: int
    root: Path
    is_lost: bool = False

    @property
    def address(self) -> str:
        return f"machine{self.number}"
