"""Who writes which bytes: everything once, and as level as the rule allows."""

from __future__ import annotations

import itertools
from collections import Counter
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import UsageError
from moc.plan.assign import RULES, assign, fill_valleys
from moc.plan.balance import balanced_rotation
from moc.plan.burden import Checkpoint, bytes_bound, plan_level, rank_bytes
from moc.plan.ownership import Ownership, even_ownership, zero2_ownership
from moc.plan.presets import PRESETS
from moc.plan.scope import MOC_LAYOUT, PAPER_LAYOUT, PARTS, SIZES, Layout, Scope
from moc.plan.select import Selection, Sequential, fresh_history, select
from moc.plan.shapes import ModelShape
from moc.state import DTYPE_BYTES, Expert, RankCatalog, Shard, check_coverage, shard_order
from tests.plan.values import catalogs, shapes, whole


def loads(written: tuple[RankCatalog, ...]) -> list[int]:
    return [sum(shard.size_bytes for shard in catalog.shards) for catalog in written]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[RankCatalog, ...]:
    """Return catalogs of 1 to 4 ranks: owned experts and dense shards, and tensors that groups of ranks replicate."""
    ranks = draw(st.integers(1, 4))
    columns = draw(st.sampled_from([c for c in (1, 2, 4) if ranks % c == 0]))
    ep = ranks // columns
    groups = [tuple(range(ranks)), *(tuple(range(e, ranks, ep)) for e in range(ep))]
    replicated = draw(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(groups)), max_size=4))
    experts = st.none() | st.builds(Expert, layer=st.just(0), index=st.integers(0, 2))
    owned = draw(st.lists(st.tuples(st.integers(0, ranks - 1), st.integers(0, 30), experts), max_size=5))
    return catalogs(ranks, replicated=replicated, owned=owned)


@settings(max_examples=40, deadline=None)
@given(worlds(), st.sampled_from(RULES))
def test_every_byte_is_written_exactly_once(held: tuple[RankCatalog, ...], rule: str) -> None:
    tensors = {(shard.tensor, shard.part) for catalog in held for shard in catalog.shards}

    written = assign(held, None, rule=rule)

    assert check_coverage(shard for catalog in written for shard in catalog.shards) == len(tensors)
    assert [catalog.rank for catalog in written] == [catalog.rank for catalog in held]
    assert [catalog.state_capacity_bytes for catalog in written] == [7] * len(held)
    for mine, had in zip(written, held, strict=True):
        ranges = {(s.tensor, s.part): (s.offset, s.offset + s.length) for s in had.shards}
        for shard in mine.shards:
            first, end = ranges[shard.tensor, shard.part]
            assert first <= shard.offset
            assert shard.offset + shard.length <= end


@settings(max_examples=40, deadline=None)
@given(worlds(), st.permutations(range(4)))
def test_the_order_of_catalogs_does_not_matter(held: tuple[RankCatalog, ...], order: list[int]) -> None:
    shuffled = [held[i] for i in order if i < len(held)]

    for rule in RULES:
        assert assign(shuffled, None, rule=rule) == assign(held, None, rule=rule)


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_adaptive_is_level_where_bytes_can_go_anywhere(held: tuple[RankCatalog, ...]) -> None:
    holders = Counter(shard for catalog in held for shard in catalog.shards)
    owned = [sum(s.size_bytes for s in c.shards if holders[s] == 1) for c in held]
    total = sum(shard.size_bytes for shard in holders)
    rounding = 2 * DTYPE_BYTES["BF16"]  # an element for each of two nested groups

    reached = max(loads(assign(held, None, rule="adaptive")))

    if all(count in (1, len(held)) for count in holders.values()):
        assert reached <= max(*owned, 0, -(-total // len(held))) + rounding
    for rule in ("baseline", "equal"):
        assert reached <= max(loads(assign(held, None, rule=rule))) + rounding


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_all_small_worlds_are_covered_under_every_rule_and_selection(ranks: int) -> None:
    """Exhaustive: up to 4 ranks and 3 experts, each expert on any rank, any set of them selected."""
    for experts in (1, 2, 3):
        for homes in itertools.product(range(ranks), repeat=experts):
            owned = [(rank, 3 + i, Expert(layer=0, index=i)) for i, rank in enumerate(homes)]
            held = catalogs(ranks, replicated=[(5, tuple(range(ranks)))], owned=owned)
            for size in range(1, experts + 1):
                for chosen in itertools.combinations(range(experts), size):
                    selection = Selection(experts=tuple(Expert(layer=0, index=i) for i in chosen), k=size)
                    check_small_world(held, selection, owned)


def check_small_world(
    held: tuple[RankCatalog, ...], selection: Selection, owned: list[tuple[int, int, Expert]]
) -> None:
    expected = sum(12 * elements for _, elements, expert in owned if expert in selection.experts)
    for rule in RULES:
        written = assign(held, selection, rule=rule)
        shards = [shard for catalog in written for shard in catalog.shards]
        assert sum(s.size_bytes for s in shards if s.expert is not None) == expected
        assert sum(s.size_bytes for s in shards if s.expert is None) == 10
        check_coverage(shards)


def test_the_baseline_is_what_deepspeed_does() -> None:
    held = catalogs(4, replicated=[(8, (0, 1, 2, 3)), (6, (1, 3))], owned=[])

    written = assign(held, None, rule="baseline")

    assert loads(written) == [16, 12, 0, 0]


def test_equal_gives_every_holder_a_range_of_every_tensor() -> None:
    held = catalogs(2, replicated=[(9, (0, 1)), (4, (0, 1))], owned=[(0, 100, None)])

    written = assign(held, None, rule="equal")

    ranges = [[(s.tensor, s.offset, s.length) for s in c.shards if s.part == "weight"] for c in written]
    assert ranges == [[("weight0", 0, 4), ("weight1", 0, 2)], [("weight0", 4, 5), ("weight1", 2, 2)]]


def test_adaptive_fills_valleys() -> None:
    held = catalogs(3, replicated=[(60, (0, 1, 2))], owned=[(0, 8, None), (1, 2, None)])

    written = assign(held, None, rule="adaptive")

    assert loads(written) == [96, 72, 72]


@pytest.mark.parametrize(
    ("parts", "size", "kept"),
    [("w", "strict", 3), ("o", "strict", 1), ("o", "master_full", 2), ("wo", "master_full", 1), ("wo", "strict", 0)],
)
def test_the_scope_says_which_parts_of_an_unselected_expert_are_kept(parts: str, size: str, kept: int) -> None:
    expert = Expert(layer=0, index=1)
    shards = [whole("e", part, "F32", 2, expert) for part in ("exp_avg", "master", "weight")]
    shards.append(whole("e", "exp_avg_sq", "F32", 2, expert))
    catalog = RankCatalog(rank=0, shards=tuple(sorted(shards, key=shard_order)), state_capacity_bytes=0)

    (written,) = assign([catalog], Selection(experts=(), k=0), rule="equal", scope=Scope(parts=parts, size=size))

    assert len(written.shards) == kept


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UsageError, match="rule=fair allowed=baseline,equal,adaptive"):
        assign([], None, rule="fair")


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 300))
def test_filling_is_exact_and_as_level_as_integers_allow(load: list[int], total: int) -> None:
    taken = fill_valleys(np.array(load, dtype=np.int64), total)

    after = np.array(load) + taken
    assert int(taken.sum()) == total
    assert taken.min() >= 0
    assert after.max() == max(level_by_hand(load, total))


def level_by_hand(load: list[int], total: int) -> list[int]:
    """Return the loads after giving unit by unit to the lowest rank."""
    after = list(load)
    for _ in range(total):
        after[after.index(min(after))] += 1
    return after


def materialised(shape: ModelShape, own: Ownership, layout: Layout) -> tuple[RankCatalog, ...]:
    """Return catalogs with the sizes of an ownership map: what real ranks would hold."""
    held: list[list[Shard]] = [[] for _ in range(own.dp)]
    grid = own.slices[own.profile]
    parts = (("exp_avg", "F32"), ("exp_avg_sq", "F32"), ("master", "F32"))
    for rank in range(own.dp):
        column, e = divmod(rank, own.ep)
        for part, dtype in parts:
            start = int(own.dense[:rank].sum())
            held[rank].append(piece("dense", part, dtype, shape.dense_elements, start, int(own.dense[rank])))
        for layer, local in itertools.product(range(own.layers), range(own.local_experts)):
            expert = Expert(layer=layer, index=e * own.local_experts + local)
            name = f"experts.{layer}.{expert.index}"
            start, length = int(grid[:column, layer, local].sum()), int(grid[column, layer, local])
            for part, dtype in parts:
                held[rank].append(piece(name, part, dtype, shape.expert_elements, start, length, expert))
            if layout.weight:
                held[rank].append(whole(name, "weight", "BF16", shape.expert_elements, expert))
        if layout.weight:
            held[rank].append(whole("dense", "weight", "BF16", shape.dense_elements))
    return tuple(
        RankCatalog(
            rank=rank,
            shards=tuple(sorted((s for s in shards if s.length), key=shard_order)),
            state_capacity_bytes=0,
        )
        for rank, shards in enumerate(held)
    )


def piece(
    tensor: str, part: str, dtype: str, elements: int, offset: int, length: int, expert: Expert | None = None
) -> Shard:
    return Shard(tensor=tensor, part=part, dtype=dtype, shape=(elements,), offset=offset, length=length, expert=expert)


@settings(max_examples=40, deadline=None)
@given(shapes(), st.sampled_from(PARTS), st.sampled_from(SIZES), st.sampled_from(RULES), st.booleans(), st.data())
def test_whole_model_arithmetic_agrees_with_the_assignment_of_shards(
    drawn: tuple[ModelShape, int, int], parts: str, size: str, rule: str, has_weights: bool, data: st.DataObject
) -> None:
    shape, dp, ep = drawn
    layout = PAPER_LAYOUT if has_weights else MOC_LAYOUT
    own = zero2_ownership(shape, dp, ep)
    scope = Scope(parts=parts, size=size)
    job = Checkpoint(shape=shape, ownership=own, layout=layout, scope=scope, is_cut=True)
    k = data.draw(st.integers(1, shape.experts))
    history = fresh_history(own.layers, own.experts)
    selection = select(Sequential(k), history, balanced_rotation(own, k))
    selected = np.zeros((own.layers, own.experts), dtype=np.bool_)
    for expert in selection.experts:
        selected[expert.layer, expert.index] = True

    real = np.array(loads(assign(materialised(shape, own, layout), selection, rule=rule, scope=scope)))

    planned = rank_bytes(job, selected, rule)
    assert real.sum() == planned.sum()
    # Cuts fall between elements, and shards of one expert are cut one by one.
    slack = 2 * (1 + own.layers * own.experts) if has_weights else 0
    assert np.abs(real - planned).max() <= slack


@pytest.mark.parametrize(("dp", "ep"), [(8, 8), (16, 16), (16, 8)])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_papers_cases_get_lighter_from_baseline_to_equal_to_adaptive(dp: int, ep: int, k: int) -> None:
    shape = PRESETS["gpt-350m-16e"]
    own = even_ownership(shape, dp, ep)
    job = Checkpoint(shape=shape, ownership=own, layout=PAPER_LAYOUT, scope=Scope(size="master_full"), is_cut=False)
    rotation = balanced_rotation(own, k)

    plans = [plan_level(job, rotation, k, rule) for rule in RULES]

    sizes = [plan.bottleneck for plan in plans]
    assert sizes[0] > sizes[1] >= sizes[2] >= bytes_bound(job, k)
    assert len({plan.total for plan in plans}) == 1


def test_written_shards_are_counted_once_by_name() -> None:
    held = catalogs(4, replicated=[(7, (0, 1, 2, 3)), (13, (0, 2))], owned=[(3, 4, Expert(layer=0, index=0))])

    names = Counter(s.name for c in assign(held, None, rule="adaptive") for s in c.shards)

    assert max(names.values()) == 1
    assert prod(names.values()) == 1
