"""From which layer each expert of a recovered state comes.

A *layer* is a snapshot in memory or a checkpoint: the candidate itself first, then older ones of the same lineage. An
*inventory* says which experts a layer has whole, and in which version. A version that was found bad is never chosen
again, in whatever layer it shows up. Equal inventories and bad versions give equal choices on every rank.

A snapshot of which some ranks' parts are lost, with their node or by a record that has rotted, is no candidate but may
be a layer. An expert is whole in it only if what its ranks tell of it comes to all of the expert, so that no slice is
ever taken for there because nobody was left to miss it. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moc.plan.lineage import MEMORY, PEERS, STORAGE, Candidate
from moc.state import Expert, RankCatalog

__all__ = ["Choice", "Inventory", "Sizes", "Version", "choose", "consistent", "expert_sizes", "older_layers"]

STORED_LAYERS = 64  # an expert that is bad in as many checkpoints is not looked for in more; each costs one small read


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """An expert's bytes as one layer has them.

    `step` is that of the bytes, `learned` the routes they have learned from (0 if nothing counts them), `holder` the
    snapshot or attempt that has them: layers with the same holder of an expert have the same bytes. `elements` are how
    many of the expert's these are, None where it is known that they are all of them.
    """

    step: int
    learned: int
    holder: str
    elements: int | None = None


Inventory = Mapping[Expert, Version]
Sizes = Mapping[Expert, int]
"""By expert, the elements of all its tensors' parts together."""


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


def expert_sizes(catalogs: Iterable[RankCatalog]) -> Sizes:
    """Return how large every expert is; `catalogs` are those of all ranks, which hold every element once."""
    sizes: dict[Expert, int] = {}
    for catalog in catalogs:
        for shard in catalog.shards:
            if shard.expert is not None:
                sizes[shard.expert] = sizes.get(shard.expert, 0) + shard.length
    return dict(sorted(sizes.items()))


def consistent(slices: Iterable[Inventory], sizes: Sizes | None = None) -> dict[Expert, Version]:
    """Return the experts of a layer that are whole: all its slices are there, and of one step.

    `slices` has one inventory for every rank of the layer that has told one; their order does not matter. Without
    `sizes` all ranks have.
    """
    found: dict[Expert, list[Version]] = {}
    for held in slices:
        for expert, version in held.items():
            found.setdefault(expert, []).append(version)
    return {
        expert: replace(max(versions, key=lambda version: (version.learned, version.holder)), elements=None)
        for expert, versions in sorted(found.items())
        if len({version.step for version in versions}) == 1
        and (sizes is None or _is_all(versions, sizes.get(expert, 0)))
    }


def _is_all(slices: Sequence[Version], size: int) -> bool:
    told = [version.elements for version in slices if version.elements is not None]
    return len(told) < len(slices) or sum(told) == size


def older_layers(candidate: Candidate, known: Sequence[Candidate], *, snapshots: int) -> tuple[Candidate, ...]:
    """Return the layers below a candidate, in the order in which they are opened.

    `known` is the lineage in the order of preference; what is after the candidate's step, or of a life that grew from
    it, is no layer of it: such a life may have lost what the candidate has not. Snapshots come first, because they cost
    no read, and at most `snapshots` of them: they stay in memory until the new life has a snapshot of its own, which
    needs room.
    """
    older = [
        other
        for other in known
        if other != candidate and other.step <= candidate.step and other.incarnation <= candidate.incarnation
    ]
    in_memory = [other for other in older if other.source == MEMORY and not _is_same(other, candidate)]
    stored = [other for other in older if other.source == STORAGE]
    return (*in_memory[:snapshots], *stored[:STORED_LAYERS])


def _is_same(other: Candidate, candidate: Candidate) -> bool:
    """Return whether both are one snapshot, of which parts of the candidate come from other nodes."""
    return (
        candidate.source == PEERS and other.as_parent() == candidate.as_parent() and other.attempt == candidate.attempt
    )
