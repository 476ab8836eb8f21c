"""The present life of an agent, read from the descriptor that its arena carries. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moc.agent import wire
from moc.errors import UsageError
from moc.format.manifest import Incarnation, decode_lineage
from moc.plan.freeing import Moment
from moc.topology import Topology

__all__ = ["Life", "layers_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """The present life, as the arena's descriptor tells it; `ranks` are those of this node, `world` those of all."""

    record: Incarnation
    lineage: tuple[Incarnation, ...]
    ranks: tuple[int, ...]
    world: tuple[int, ...]
    node: int
    nodes: int
    hosts: tuple[int, ...]
    descriptor: Mapping[str, Any]
    experts: tuple[int, ...] = ()
    """By MoE layer how many the model has; empty where an earlier version tells nothing."""
    layers: frozenset[tuple[int, Moment]] = frozenset()
    """Snapshots of earlier lives in memory that this one was recovered from: its parent's, and older ones."""
    base: tuple[int, Moment] | None = None
    """The newest checkpoint that the life grew from."""

    @staticmethod
    def of(descriptor: Mapping[str, Any]) -> Life:
        """Return the life; raises UsageError, IntegrityError or TypeError for what no trainer has described."""
        for field in ("run", "storage", "digest"):
            wire.text(descriptor, field)
        for field in ("tensors", "keep_last", "keep_every"):
            wire.integer(descriptor, field)
        for field in ("topology", "fingerprint", "software"):
            wire.mapping(descriptor, field)
        wire.number(descriptor, "timeout_s")
        config = wire.mapping(descriptor, "config")
        wire.text(config, "mode"), wire.integer(config, "persist_every"), wire.number(config, "plt_limit")
        wire.integer(config, "snapshot_every")
        for field in ("k_snapshot", "k_persist"):
            if config.get(field) is not None:
                wire.integer(config, field)
        records = decode_lineage(descriptor["lineage"], fingerprint=descriptor["fingerprint"])
        if not records:
            raise UsageError("the descriptor names no life")
        ranks = tuple(sorted(row["rank"] for row in descriptor["catalogs"]))
        is_alone = "fellows" not in descriptor
        topology = None if is_alone else Topology.from_json(descriptor["topology"])
        return Life(
            record=records[-1],
            lineage=tuple(records),
            ranks=ranks,
            world=ranks if topology is None else tuple(range(topology.world_size)),
            node=0 if topology is None else wire.integer(wire.mapping(descriptor, "fellows"), "node"),
            nodes=1 if topology is None else topology.node_count,
            hosts=tuple(wire.integers(descriptor, "hosts")) if "hosts" in descriptor else (),
            experts=tuple(wire.integers(descriptor, "experts")) if "experts" in descriptor else (),
            descriptor=descriptor,
            layers=layers_of(descriptor),
            base=next(iter(_moments(descriptor, "base")), None),
        )


def layers_of(descriptor: Mapping[str, Any]) -> frozenset[tuple[int, Moment]]:
    """Return the moments of a descriptor's layers; raises UsageError for what no trainer has described."""
    return frozenset(_moments(descriptor, "layers"))


def _moments(descriptor: Mapping[str, Any], field: str) -> list[tuple[int, Moment]]:
    rows = descriptor.get(field, [])
    if not isinstance(rows, list):
        raise UsageError(f"{field} of a descriptor is wrong: type={type(rows).__name__} allowed=a list")
    for row in rows:
        if not isinstance(row, list) or [type(cell) for cell in row] != [int, int, str]:
            raise UsageError(f"{field} of a descriptor is wrong: {repr(row)[:80]} allowed=incarnation, step, attempt")
    return [(incarnation, (step, attempt)) for incarnation, step, attempt in rows]
