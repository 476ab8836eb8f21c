"""Where the experts of a rank are: from the names and flat layouts that a rank recorded to global tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moc.adapters.export.source import MASTER, CheckpointSource
from moc.adapters.export.weights import EXPERTS, LOCAL_EXPERT, moe_prefixes, weights_of
from moc.errors import MismatchError
from moc.state import Shard

__all__ = ["Extent", "Placement"]

Order = Callable[[int, int, int], int]
"""From a rank, the expert-parallel size and the number of ranks to an expert-parallel rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A whole logical tensor that begins at element `start` of a rank's own parameter."""

    tensor: Shard
    start: int

    @property
    def length(self) -> int:
        return self.tensor.length


class Placement:
    """How the experts of a checkpoint are spread over its ranks.

    Which expert-parallel rank a rank had is read from the experts it wrote in this life. A rank that wrote none because
    all of its share is padding is taken to follow DeepSpeed's default order, in which neighbouring ranks hold different
    experts. One that wrote none because others' turn had come follows the order that the others are seen to follow: the
    default one, or the one in which neighbouring ranks hold the same experts.
    """

    def __init__(self, source: CheckpointSource, groups: Sequence[Mapping[str, Any]]) -> None:
        """`groups` are the parameter groups of any rank's tree: the same on all but for experts' indices."""
        self.prefixes = moe_prefixes(source)
        self._source = source
        self._masters = {shard.tensor: shard for shard in source.tensors(MASTER)}
        self._counts: dict[int, int] = {}
        for shard in weights_of(source):
            if shard.expert is not None:
                layer, index = shard.expert.layer, shard.expert.index
                self._counts[layer] = max(self._counts.get(layer, 0), index + 1)
        self._ep_sizes = self._sizes_of_layers(groups)
        self._orders = {size: self._orders_of(size) for size in sorted(set(self._ep_sizes.values()))}

    @property
    def expert_counts(self) -> list[int]:
        """Return the number of experts of each MoE layer, in module order."""
        return [count for _, count in sorted(self._counts.items())]

    @property
    def is_default_order(self) -> bool:
        """Return whether neighbouring ranks hold different experts, as DeepSpeed places them unless told otherwise."""
        return all(
            self._ep_rank(rank, layer) == rank % size
            for rank in self._source.ranks
            for layer, size in self._ep_sizes.items()
        )

    def local_count(self, layer: int) -> int:
        return self._counts[layer] // self._ep_sizes[layer]

    def first_experts(self, rank: int) -> dict[int, int]:
        """Return the global index of a rank's first expert, by MoE layer."""
        return {layer: self._ep_rank(rank, layer) * self.local_count(layer) for layer in self._ep_sizes}

    def extents(self, rank: int, fqn: str, numel: int, *, is_expert: bool) -> tuple[Extent, ...]:
        """Return the logical tensors inside a parameter of a rank; raises MismatchError where the checkpoint does not
        hold them.
        """
        names = self._expert_tensors(rank, fqn) if is_expert else [fqn]
        extents, reached = [], 0
        for name in names:
            if name not in self._masters:
                raise MismatchError(f"recorded parameter is not stored: rank={rank} parameter={fqn} tensor={name}")
            extents.append(Extent(tensor=self._masters[name], start=reached))
            reached += self._masters[name].length
        if reached != numel:
            raise MismatchError(
                f"recorded parameter has another size: rank={rank} parameter={fqn} recorded={numel} stored={reached}"
            )
        return tuple(extents)

    def local_shape(self, rank: int, fqn: str, *, is_expert: bool) -> tuple[int, ...]:
        """Return the shape of a rank's own parameter: experts stacked in one parameter are its first dimension."""
        if not is_expert:
            return self._masters[fqn].shape
        names = self._expert_tensors(rank, fqn)
        shape = self._masters[names[0]].shape
        return shape if LOCAL_EXPERT.fullmatch(fqn) else (len(names), *shape)

    def _expert_tensors(self, rank: int, fqn: str) -> list[str]:
        prefix = self._prefix_of(fqn)
        layer = self.prefixes[prefix]
        first = self._ep_rank(rank, layer) * self.local_count(layer)
        native = LOCAL_EXPERT.fullmatch(fqn)
        if native:
            return [f"{prefix}{EXPERTS}{first + int(native['index'])}.{native['name']}"]
        name = fqn[len(prefix) :].removeprefix("experts.")
        return [f"{prefix}{EXPERTS}{index}.{name}" for index in range(first, first + self.local_count(layer))]

    def _prefix_of(self, fqn: str) -> str:
        prefixes = [prefix for prefix in self.prefixes if fqn.startswith(prefix)]
        if not prefixes:
            raise MismatchError(
                f"recorded expert parameter is in no MoE layer: parameter={fqn} layers={','.join(self.prefixes)}"
            )
        return max(prefixes, key=len)

    def _sizes_of_layers(self, groups: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        rows = self._source.manifest.topology.get("ep_sizes")
        sizes = {str(name): int(size) for name, size in rows} if isinstance(rows, list) else {}
        only = next(iter(sizes.values())) if len(sizes) == 1 else 1
        found = dict.fromkeys(sorted(self._counts), only)
        for group in groups:
            if not group["is_expert"]:
                continue
            if group["name"] not in sizes:
                raise MismatchError(
                    f"expert group is not in the topology: group={group['name']} allowed={','.join(sorted(sizes))}"
                )
            for fqn, _, _ in group["layout"]["params"]:
                found[self.prefixes[self._prefix_of(fqn)]] = sizes[group["name"]]
        for layer, size in found.items():
            if self._counts[layer] % size:
                raise MismatchError(
                    f"experts are not spread evenly: layer={layer} experts={self._counts[layer]} ep_size={size}"
                )
        return found

    def _ep_rank(self, rank: int, layer: int) -> int:
        size, world = self._ep_sizes[layer], len(self._source.ranks)
        seen = self._seen(rank, size)
        if len(seen) == 1:
            return seen.pop()
        if not self._source.is_partial:
            return _neighbours_differ(rank, size, world)
        answers = {order(rank, size, world) for order in self._orders[size]}
        if len(answers) == 1:
            return answers.pop()
        raise MismatchError(
            f"a rank's experts are not known, as it has written none in this life: rank={rank} layer={layer} "
            "allowed=a checkpoint that includes every expert"
        )

    def _orders_of(self, size: int) -> tuple[Order, ...]:
        """Return the orders of ranks that agree with what every rank is seen to have written."""
        ranks = self._source.ranks
        return tuple(
            order
            for order in (_neighbours_differ, _neighbours_agree)
            if all(self._seen(rank, size) <= {order(rank, size, len(ranks))} for rank in ranks)
        )

    def _seen(self, rank: int, size: int) -> set[int]:
        """Return the expert-parallel ranks whose experts a rank is seen to have written, in all layers of a size."""
        return {
            expert.index // self.local_count(expert.layer)
            for expert in self._source.experts_of(rank)
            if self._ep_sizes[expert.layer] == size
        }


def _neighbours_differ(rank: int, size: int, _: int) -> int:
    """Return a rank's expert-parallel rank in DeepSpeed's default order."""
    return rank % size


def _neighbours_agree(rank: int, size: int, world: int) -> int:
    """Return it where data parallelism comes before expert parallelism."""
    return rank // (world // size)
