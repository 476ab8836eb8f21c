"""In which order each MoE layer visits its experts, so that the ranks stay even at every checkpoint.

A *rotation* gives each layer one cyclic order of its experts; a checkpoint takes the next K of each. Rank-first: the
order walks over the expert-parallel (EP) ranks before it comes to a second expert of a rank, and layers start at
different ranks.

Where every rank owns whole experts, `even_rotation` is enough: at every checkpoint, for every K and after any change of
K, two EP ranks differ by at most one expert. Where ZeRO cuts the experts of a rank into columns, the order must also
keep the columns even: `moc.plan.balance` searches for such an order, once in a life, and the arena's descriptor has it.

Without arrays, so that an agent that turns its experts starts as fast as one that does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moc.errors import InternalError
from moc.state import Expert

__all__ = ["Rotation", "alike_layers", "even_rotation", "expert_counts", "rotation_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The visiting order of each MoE layer: every expert's index once."""

    orders: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for layer, order in enumerate(self.orders):
            if sorted(order) != list(range(len(order))) or not order:
                raise InternalError(f"order is not a permutation of the experts: layer={layer} order={order}")


def even_rotation(layers: int, experts: int, ep: int) -> Rotation:
    """Return the rank-first rotation.

    Position p of a layer that starts at rank s is EP rank (p + s) % ep. Layers start at ranks 0, 1, 2, ... as in the
    paper; the last `layers % ep` layers start at evenly spaced ranks instead of neighbours, because then any window of
    consecutive ranks holds as many starts as any other of its length, give or take one. That is what makes every K
    even; the paper's own offsets are even for one K only.
    """
    local = experts // ep
    rest = layers % ep
    starts = [layer % ep for layer in range(layers - rest)] + [index * ep // rest for index in range(rest)]
    return Rotation(
        orders=tuple(
            tuple((position + start) % ep * local + position // ep for position in range(experts)) for start in starts
        )
    )


def expert_counts(experts: Iterable[Expert]) -> tuple[int, ...]:
    """Return the number of experts of each MoE layer; raises InternalError unless their indices are 0, 1, 2, ..."""
    rows: dict[int, set[int]] = {}
    for expert in experts:
        rows.setdefault(expert.layer, set()).add(expert.index)
    counts = tuple(len(rows.get(layer, ())) for layer in range(max(rows, default=-1) + 1))
    for layer, count in enumerate(counts):
        if rows.get(layer) != set(range(count)):
            raise InternalError(f"experts of a layer have gaps: layer={layer} indices={sorted(rows.get(layer, ()))}")
    return counts


def rotation_of(counts: Sequence[int], ep_sizes: Sequence[tuple[str, int]]) -> Rotation:
    """Return a rotation for layers with so many experts each, on expert-parallel groups of these sizes.

    Layers with equally many experts are one `even_rotation`, whatever lies between them. Of several sizes the largest
    that divides a layer's experts counts: a wrong guess makes ranks less even, nothing else.
    """
    orders: list[tuple[int, ...]] = [()] * len(counts)
    for experts, layers, ep in alike_layers(counts, ep_sizes):
        for layer, order in zip(layers, even_rotation(len(layers), experts, ep).orders, strict=True):
            orders[layer] = order
    return Rotation(orders=tuple(orders))


def alike_layers(
    counts: Sequence[int], ep_sizes: Sequence[tuple[str, int]]
) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Yield the layers with equally many experts: the number of experts, the layers, and their EP size."""
    for experts in sorted(set(counts)):
        layers = tuple(layer for layer, count in enumerate(counts) if count == experts)
        yield experts, layers, max((size for _, size in ep_sizes if experts % size == 0), default=1)
