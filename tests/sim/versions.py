"""Which version of each expert a checkpoint says it has, and whether its objects hold that, from stored bytes alone.

And which version of each expert a snapshot in memory has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert
from tests.sim.model import StoredName, object_entries
from tests.sim.state import PARTIAL_TENSORS, Whole

__all__ = ["Contents", "Version", "consistent_steps", "stored_versions"]

EXPERT_OF = {name: expert for name, _, expert in PARTIAL_TENSORS}


@dataclass(frozen=True, slots=True)
class Version:
    """The step of an expert's bytes, and the attempt whose objects hold them."""

    step: int
    source: StoredName


def stored_versions(name: StoredName, body: Mapping[str, Any]) -> dict[Expert, Version]:
    """Return the experts of a manifest that it has a row for; the others are its own, of its step."""
    names = [StoredName(number, step, attempt, name.run) for number, step, attempt in body.get("sources", [])]
    return {
        Expert(layer=layer, index=index): Version(step, names[number])
        for layer, index, step, number, _ in body["stale_experts"]
    }


def consistent_steps(arenas: Mapping[int, Arena], records: Mapping[int, SealRecord]) -> dict[Expert, int]:
    """Return the step of each expert that is the same in the records of all ranks that hold a slice of it; by rank."""
    steps: dict[Expert, set[int]] = {}
    for rank, record in records.items():
        for unit, step in zip(arenas[rank].rank_layout(rank).units, record.steps, strict=True):
            if unit.expert is not None:
                steps.setdefault(unit.expert, set()).add(step)
    return {expert: min(found) for expert, found in steps.items() if len(found) == 1}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint must hold: of the whole at its step everything but the experts that have another version.

    `wholes` are by expert, None: the checkpoint's own step; of several any will do.
    """

    name: StoredName
    versions: Mapping[Expert, Version]
    wholes: Mapping[Expert | None, Sequence[Whole]]
    covered: dict[tuple[str, str], np.ndarray]

    def defects(self, owner: StoredName, content: bytes) -> Iterator[str]:
        """Yield what is wrong with an object of an attempt, and count what the checkpoint takes from it."""
        for tensor, part, begin, values in object_entries(content):
            expert = EXPERT_OF.get(tensor)
            version = None if expert is None else self.versions.get(expert)
            if owner != (self.name if version is None else version.source):
                continue  # superseded
            places = slice(begin, begin + len(values))
            wanted = [whole[tensor, part][places] for whole in self.wholes[None if version is None else expert]]
            if not any(values.tobytes() == other.tobytes() for other in wanted):
                expected = [other.tolist() for other in wanted]
                yield f"{part}/{tensor}@{begin} of {version or self.name}: {values.tolist()} instead of {expected}"
            self.covered[tensor, part][places] += 1
