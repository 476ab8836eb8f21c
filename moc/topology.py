"""The frozen description of the rank grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moc.errors import TopologyError

__all__ = ["Topology"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Who runs where, and how experts are spread.

    `node_of_rank[r]` is the node index of global rank r, nodes counted from 0 in the order of their lowest rank.
    `ep_sizes` maps each DeepSpeed expert group name to its expert-parallel size, sorted by name; empty for dense
    models.
    """

    world_size: int
    node_of_rank: tuple[int, ...]
    ep_sizes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.world_size < 1 or len(self.node_of_rank) != self.world_size:
            raise TopologyError(
                f"node_of_rank must name one node per rank: world_size={self.world_size} given={len(self.node_of_rank)}"
            )
        for name, size in self.ep_sizes:
            if size < 1 or self.world_size % size:
                raise TopologyError(
                    f"expert-parallel size must divide the world size: group={name} ep_size={size} "
                    f"world_size={self.world_size}"
                )

    @property
    def node_count(self) -> int:
        return max(self.node_of_rank) + 1

    def ranks_of(self, node: int) -> tuple[int, ...]:
        """Return the ranks on a node, ascending."""
        return tuple(rank for rank, of in enumerate(self.node_of_rank) if of == node)

    def to_json(self) -> dict[str, object]:
        return {
            "world_size": self.world_size,
            "node_of_rank": list(self.node_of_rank),
            "ep_sizes": [list(row) for row in self.ep_sizes],
        }

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Topology:
        """Build a topology from `to_json`'s value; raises TopologyError, LookupError, TypeError or ValueError."""
        sizes = tuple((name, size) for name, size in row["ep_sizes"])
        numbers = [row["world_size"], *row["node_of_rank"], *(size for _, size in sizes)]
        if not all(type(n) is int and n >= 0 for n in numbers) or not all(isinstance(name, str) for name, _ in sizes):
            raise TypeError("topology has a wrong type")
        return Topology(world_size=row["world_size"], node_of_rank=tuple(row["node_of_rank"]), ep_sizes=sizes)
