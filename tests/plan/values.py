"""Small models, and catalogs of them as DeepSpeed's ranks would hold them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from moc.plan.ownership import Ownership
from moc.plan.shapes import ModelShape
from moc.state import Expert, RankCatalog, Shard, shard_order

PARTS = ("exp_avg", "exp_avg_sq", "master")


def tiny(
    *,
    layers: int = 2,
    experts: int = 4,
    hidden: int = 4,
    expert_ffn: int = 3,
    stacked: bool = False,
    biased: bool = False,
) -> ModelShape:
    """Return a model whose blocks all have experts."""
    return ModelShape(
        name="tiny",
        layers=layers,
        hidden=hidden,
        heads=1,
        vocabulary=5,
        ffn=0,
        moe_layers=layers,
        experts=experts,
        expert_ffn=expert_ffn,
        top_k=1,
        stacked=stacked,
        biased=biased,
    )


def wide(*, stacked: bool = False) -> ModelShape:
    """Return 24 MoE layers of 64 experts with the widths of GPT-350M."""
    return ModelShape(
        name="gpt-64e",
        layers=24,
        hidden=1024,
        heads=16,
        vocabulary=50304,
        positions=2048,
        ffn=0,
        moe_layers=24,
        experts=64,
        expert_ffn=4096,
        top_k=1,
        gated=False,
        biased=True,
        tied=True,
        stacked=stacked,
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ModelShape, int, int]:
    """Return a small model with numbers of data-parallel and expert-parallel ranks that fit it."""
    ep, columns, local = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = tiny(
        layers=draw(st.integers(1, 4)),
        experts=ep * local,
        hidden=draw(st.integers(1, 5)),
        expert_ffn=draw(st.integers(1, 5)),
        stacked=draw(st.booleans()),
        biased=draw(st.booleans()),
    )
    return shape, ep * columns, ep


def catalogs(
    ranks: int, *, replicated: Sequence[tuple[int, tuple[int, ...]]], owned: Sequence[tuple[int, int, Expert | None]]
) -> tuple[RankCatalog, ...]:
    """Return catalogs: `replicated` are (elements, holders) of weights, `owned` (rank, elements, expert) of masters."""
    held: list[list[Shard]] = [[] for _ in range(ranks)]
    for number, (elements, holders) in enumerate(replicated):
        for rank in holders:
            held[rank].append(whole(f"weight{number}", "weight", "BF16", elements))
    for number, (rank, elements, expert) in enumerate(owned):
        for part in PARTS:
            held[rank].append(whole(f"own{number}", part, "F32", elements, expert))
    return tuple(
        RankCatalog(rank=rank, shards=tuple(sorted(shards, key=shard_order)), state_capacity_bytes=7)
        for rank, shards in enumerate(held)
    )


def whole(tensor: str, part: str, dtype: str, elements: int, expert: Expert | None = None) -> Shard:
    return Shard(tensor=tensor, part=part, dtype=dtype, shape=(elements,), offset=0, length=elements, expert=expert)


def owned_catalogs(own: Ownership) -> tuple[RankCatalog, ...]:
    """Return catalogs of ranks that own what the map says; what a rank has of an expert is a tensor of its own."""
    owned = [
        (rank, int(own.slices[own.profile[rank // own.ep], layer, local]), Expert(layer=layer, index=first + local))
        for rank, first in ((rank, rank % own.ep * own.local_experts) for rank in range(own.dp))
        for layer in range(own.layers)
        for local in range(own.local_experts)
    ]
    return catalogs(own.dp, replicated=(), owned=[row for row in owned if row[1]])
