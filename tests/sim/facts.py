"""What the auditor remembers of lives, launches, snapshots and processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.sim.model import Record, StoredName

if TYPE_CHECKING:
    from tests.sim.process import Process

__all__ = ["Held", "Knowledge", "LifeFact", "Survey"]


@dataclass(slots=True)
class LifeFact:
    """A life that has begun, and whether its record was written then."""

    record: Record
    is_stored: bool


@dataclass(slots=True)
class Survey:
    """What was stored when a launch looked: checkpoints when it first did, lives when it last did."""

    records: dict[int, Record]
    manifests: set[StoredName]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """The life that a process committed for last, and the records it saw when it last listed them."""

    life: int | None
    seen: dict[int, Record]


@dataclass(frozen=True, slots=True)
class Held:
    """A global snapshot that was announced while agents held it.

    `keepers` are by node the agents that had its part: its own, others with replicas.
    """

    number: int
    token: str
    step: int
    keepers: tuple[tuple[Process, ...], ...]
    since_s: float
