"""From which layer each expert of a recovered state comes.

A *layer* is a snapshot in memory or a checkpoint: the candidate itself first, then older ones of the same lineage. An
*inventory* says which experts a layer has whole, and in which version. A version that was found bad is never chosen
again, in whatever layer it shows up. Equal inventories and bad versions give equal choices on every rank. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moc.plan.lineage import MEMORY, PEERS, STORAGE, Candidate
from moc.state import Expert

__all__ = ["Choice", "Inventory", "Version", "choose", "consistent", "older_layers"]

STORED_LAYERS = 64  # an expert that is bad in as many checkpoints is not looked for in more; each costs one small read


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """An expert's bytes as one layer has them.

    `step` is that of the bytes, `learned` the routes they have learned from (0 if nothing counts them), `holder` the
    snapshot or attempt that has them: layers with the same holder of an expert have the same bytes.
    """

    step: int
    learned: int
    holder: str


Inventory = Mapping[Expert, Version]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """By expert the number of the layer it comes from; `missing` are those that no layer has, sorted."""

    layers: Mapping[Expert, int]
    missing: tuple[Expert, ...]


def choose(experts: Iterable[Expert], layers: Sequence[Inventory], bad: Collection[tuple[Expert, str]]) -> Choice:
    """Return the newest version of every expert that is not bad; of equally new ones that of the first layer.

    `bad` are pairs of expert and holder.
    """
    chosen: dict[Expert, int] = {}
    missing = []
    for expert in sorted(experts):
        usable = [
            (-layer[expert].step, number)
            for number, layer in enumerate(layers)
            if expert in layer and (expert, layer[expert].holder) not in bad
        ]
        if usable:
            chosen[expert] = min(usable)[1]
        else:
            missing.append(expert)
    return Choice(layers=chosen, missing=tuple(missing))


def consistent(slices: Iterable[Inventory]) -> dict[Expert, Version]:
    """Return the experts of a snapshot that are whole: all ranks that hold a slice of one hold it at the same step.

    `slices` has one inventory for every rank of the snapshot; their order does not matter.
    """
    found: dict[Expert, list[Version]] = {}
    for held in slices:
        for expert, version in held.items():
            found.setdefault(expert, []).append(version)
    return {
        expert: max(versions, key=lambda version: (version.learned, version.holder))
        for expert, versions in sorted(found.items())
        if len({version.step for version in versions}) == 1
    }


def older_layers(candidate: Candidate, known: Sequence[Candidate], *, snapshots: int) -> tuple[Candidate, ...]:
    """Return the layers below a candidate, in the order in which they are opened.

    `known` is the lineage in the order of preference; what is after the candidate's step is no layer of it. Snapshots
    come first, because they cost no read, and at most `snapshots` of them: they stay in memory until the new life has
    a snapshot of its own, which needs room.
    """
    older = [other for other in known if other != candidate and other.step <= candidate.step]
    in_memory = [other for other in older if other.source == MEMORY and not _is_same(other, candidate)]
    stored = [other for other in older if other.source == STORAGE]
    return (*in_memory[:snapshots], *stored[:STORED_LAYERS])


def _is_same(other: Candidate, candidate: Candidate) -> bool:
    """Return whether both are one snapshot, of which parts of the candidate come from other nodes."""
    return (
        candidate.source == PEERS and other.as_parent() == candidate.as_parent() and other.attempt == candidate.attempt
    )
