"""Hypothesis strategies for the core's values."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from moc.format.keys import CheckpointName, object_key
from moc.format.manifest import Incarnation, Manifest, ObjectRow, Parent
from moc.format.stale import StaleExpert, sources
from moc.routing import BASES, COUNT_LIMIT, Capture, Routing
from moc.state import DTYPE_BYTES, Expert, RankCatalog, Shard, shard_order

runs = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)
attempts = st.from_regex(r"[0-9a-f]{8}", fullmatch=True)
numbers = st.integers(1, 999_999)
steps = st.integers(0, 10**12 - 1)
names = st.builds(CheckpointName, run=runs, incarnation=numbers, step=steps, attempt=attempts)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.text(max_size=6), plain, max_size=3)


def _parents(number: int) -> st.SearchStrategy[Parent | None]:
    """Return what a life may have grown from: something of an earlier one."""
    if number == 1:
        return st.none()
    return st.none() | st.builds(
        Parent, incarnation=st.integers(1, number - 1), step=steps, attempt=st.none() | attempts
    )


incarnations = numbers.flatmap(
    lambda number: st.builds(
        Incarnation,
        run=runs,
        number=st.just(number),
        token=attempts,
        parent=_parents(number),
        reason=st.sampled_from(Incarnation.REASONS),
        fingerprint=mappings,
    )
)


@st.composite
def stale_experts(draw: st.DrawFn, name: CheckpointName) -> tuple[StaleExpert, ...]:
    """Return rows that a manifest of this checkpoint may have, sorted."""
    if name.step == 0:
        return ()
    earlier = st.builds(
        lambda *moment: min(
            name, CheckpointName(run=name.run, incarnation=moment[0], step=moment[1], attempt=moment[2])
        ),
        st.integers(1, name.incarnation),
        st.integers(0, name.step),
        attempts,
    )
    names = draw(st.lists(st.just(name) | earlier, min_size=1, max_size=3))
    count = st.integers(0, 2**40)
    experts = draw(st.sets(st.builds(Expert, layer=count, index=count), max_size=4))
    rows = []
    for expert in sorted(experts):
        source = draw(st.sampled_from(names))
        step = draw(st.integers(0, min(source.step, name.step - 1)))
        rows.append(StaleExpert(expert=expert, step=step, source=source, routed=draw(count)))
    return tuple(rows)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Return the routes of a few layers, which need not have the same number of experts."""
    count = st.integers(0, COUNT_LIMIT)
    routed = tuple(
        tuple(row) for row in draw(st.lists(st.lists(count, min_size=1, max_size=4), min_size=1, max_size=3))
    )
    return Routing(basis=draw(st.sampled_from(BASES)), routed=routed, learned=_below(draw, routed))


@st.composite
def captures(draw: st.DrawFn) -> Capture:
    routing = draw(routings())
    at = tuple(tuple(draw(steps) for _ in row) for row in routing.routed)
    return Capture(routing=routing, captured=_below(draw, routing.learned), steps=at)


def _below(draw: st.DrawFn, counts: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(draw(st.integers(0, count)) for count in row) for row in counts)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    name = draw(names)
    size = draw(st.integers(1, 2))
    stale = draw(stale_experts(name))
    own = [object_key(name, rank, piece) for rank in range(size) for piece in ("d", "e00")]
    others = [object_key(source, draw(st.integers(0, 3)), "e00") for source in sources(stale) if source != name]
    rows = [
        ObjectRow(
            key=key,
            size_bytes=draw(st.integers(2**28, 2**50)),
            header_bytes=draw(st.integers(1, 2**16)) * 4096,
            header_crc32c=draw(st.integers(0, 2**32 - 1)),
        )
        for key in sorted([*own, *others])
    ]
    return Manifest(
        name=name,
        parent=draw(_parents(name.incarnation)),
        topology={
            "world_size": size,
            "node_of_rank": [0] * size,
            "ep_sizes": draw(st.just([]) | st.just([["e", size]])),
        },
        catalog_digest=draw(st.from_regex("[0-9a-f]{16}", fullmatch=True)),
        tensors=draw(st.integers(0, 10**6)),
        objects=tuple(rows),
        fingerprint=draw(mappings),
        versions=draw(mappings),
        is_finite=draw(st.booleans()),
        stale_experts=stale,
        routing=draw(st.none() | routings()),
    )


@st.composite
def splits(draw: st.DrawFn, elements: int, ranks: int) -> list[tuple[int, int]]:
    """Return one (offset, length) per rank; together they cover 0..elements once."""
    cuts = sorted(draw(st.lists(st.integers(0, elements), min_size=ranks - 1, max_size=ranks - 1)))
    bounds = [0, *cuts, elements]
    return [(first, last - first) for first, last in pairwise(bounds)]


@st.composite
def models(draw: st.DrawFn) -> list[tuple[str, str, str, tuple[int, ...], Expert | None]]:
    """Return whole tensors: (tensor, part, dtype, shape, expert)."""
    rows = []
    for index in range(draw(st.integers(1, 4))):
        expert = draw(st.none() | st.builds(Expert, layer=st.integers(0, 1), index=st.integers(0, 2)))
        shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=2)))
        parts = draw(st.sets(st.sampled_from(("master", "exp_avg")), min_size=1))
        rows += [
            (f"t{index}", part, draw(st.sampled_from(sorted(DTYPE_BYTES))), shape, expert) for part in sorted(parts)
        ]
    return sorted(rows, key=lambda row: row[:2])


@st.composite
def catalogs(
    draw: st.DrawFn, model: list[tuple[str, str, str, tuple[int, ...], Expert | None]], ranks: int
) -> tuple[RankCatalog, ...]:
    """Return who holds what of a model on so many ranks: every tensor cut anywhere."""
    held: list[list[Shard]] = [[] for _ in range(ranks)]
    for tensor, part, dtype, shape, expert in model:
        elements = 1
        for extent in shape:
            elements *= extent
        for rank, (offset, length) in enumerate(draw(splits(elements, ranks))):
            shard = Shard(
                tensor=tensor, part=part, dtype=dtype, shape=shape, offset=offset, length=length, expert=expert
            )
            if length or draw(st.booleans()):
                held[rank].append(shard)
    return tuple(
        RankCatalog(
            rank=rank, shards=tuple(sorted(shards, key=shard_order)), state_capacity_bytes=draw(st.integers(0, 9000))
        )
        for rank, shards in enumerate(held)
    )
