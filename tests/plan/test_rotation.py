"""Evenness over ranks and columns, and the bound it is measured with."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.plan.balance import balanced_rotation, job_rotations, windows
from moc.plan.bound import lower_bound, turn_bound
from moc.plan.burden import Checkpoint, bytes_bound, plan_level
from moc.plan.ownership import Ownership, catalog_ownership, zero2_ownership
from moc.plan.pack import packed_phases
from moc.plan.presets import PRESETS
from moc.plan.rotation import Rotation, even_rotation
from moc.plan.scope import MOC_LAYOUT, Scope
from moc.plan.shapes import ModelShape
from moc.state import Expert
from tests.plan.values import catalogs, owned_catalogs, shapes, tiny, wide

BAR = 1.01


def worst(own: Ownership, k: int) -> int:
    return worst_of(own, balanced_rotation(own, k), k)


def worst_of(own: Ownership, rotation: Rotation, k: int) -> int:
    return max(int(own.selected_elements(w).max()) for w in windows(rotation, k))


def over_bound(shape: ModelShape, dp: int, ep: int, k: int) -> float:
    """Return the fullest rank of a whole turn over the bound, in bytes."""
    own = zero2_ownership(shape, dp, ep)
    job = Checkpoint(shape=shape, ownership=own, layout=MOC_LAYOUT, scope=Scope(), is_cut=True)
    level = plan_level(job, balanced_rotation(own, k), k, "adaptive")
    return level.bottleneck / bytes_bound(job, k)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 32, 64])
def test_64_experts_on_16_ranks_reach_the_bound_at_every_checkpoint(k: int) -> None:
    assert over_bound(wide(), 16, 16, k) == 1.0


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("columns", [2, 4])
def test_columns_reach_the_bound_at_every_checkpoint(columns: int, k: int, stacked: bool) -> None:
    assert over_bound(wide(stacked=stacked), 16 * columns, 16, k) <= BAR


def test_four_replicas_cannot_have_the_mean_of_one_and_a_half_experts_in_every_checkpoint() -> None:
    """A quarter of four experts and 22 whole ones: 16 checkpoints, so one of them has two whole ones."""
    own = zero2_ownership(wide(), 64, 16)
    expert = wide().expert_elements

    assert lower_bound(own, 4) == expert * 3 // 2
    assert turn_bound(own, 4) == worst(own, 4) == 2 * expert


def test_671b_on_16384_ranks_reaches_the_bound_where_an_order_that_knows_no_columns_does_not() -> None:
    shape = PRESETS["deepseek-v3"]
    own = zero2_ownership(shape, 16_384, 64)

    plain = max(int(own.selected_elements(w).max()) for w in windows(even_rotation(58, 256, 64), 32))

    assert worst(own, 32) == lower_bound(own, 32) == 8 * int(own.slices.max())
    assert plain > 3 * lower_bound(own, 32)
    assert over_bound(shape, 16_384, 64, 32) <= BAR


def test_a_job_on_671b_finds_in_its_catalogs_the_rotation_of_the_plan() -> None:
    own = zero2_ownership(PRESETS["deepseek-v3"], 512, 64)

    assert job_rotations(owned_catalogs(own), (("ep", 64),), (8, 32, None)) == (
        balanced_rotation(own, 8),
        balanced_rotation(own, 32),
        even_rotation(58, 256, 64),
    )


@settings(max_examples=40, deadline=None)
@given(shapes(), st.data())
def test_catalogs_show_who_owns_what(drawn: tuple[ModelShape, int, int], data: st.DataObject) -> None:
    shape, dp, ep = drawn
    own, k = zero2_ownership(shape, dp, ep), data.draw(st.integers(1, shape.experts))
    catalogs = owned_catalogs(own)

    found = catalog_ownership(catalogs, range(shape.moe_layers), experts=shape.experts, ep=ep)

    assert found is not None
    everything = np.ones((own.layers, own.experts), dtype=np.bool_)
    assert (found.slices == own.slices * 12).all(), "three parts of four bytes"
    assert (found.profile == own.profile).all()
    assert (found.selected_elements(everything) == 12 * own.selected_elements(everything)).all()
    (rotation,) = job_rotations(catalogs, (("ep", ep),), (k,))
    assert worst_of(own, rotation, k) <= worst(own, k)


def test_ranks_that_hold_experts_in_another_way_take_turns_rank_first() -> None:
    """Experts that alternate over the ranks, and replicas of which one rank holds nothing."""
    alternate = [(index % 2, 10, Expert(layer=0, index=index)) for index in range(4)]
    lacking = [(rank, 10, Expert(layer=0, index=rank % 2 * 2 + n)) for rank in range(3) for n in range(2)]
    for ranks, owned in ((2, alternate), (4, lacking)):
        made = catalogs(ranks, replicated=(), owned=owned)
        assert catalog_ownership(made, (0,), experts=4, ep=2) is None
        assert job_rotations(made, (("ep", 2),), (1,)) == (even_rotation(1, 4, 2),)


@settings(max_examples=40, deadline=None)
@given(shapes(), st.data())
def test_a_rotation_visits_every_expert_once_and_is_never_worse_than_the_plain_one(
    drawn: tuple[ModelShape, int, int], data: st.DataObject
) -> None:
    shape, dp, ep = drawn
    own = zero2_ownership(shape, dp, ep)
    k = data.draw(st.integers(1, shape.experts))

    rotation = balanced_rotation(own, k)

    assert [sorted(order) for order in rotation.orders] == [list(range(shape.experts))] * own.layers
    plain = max(int(own.selected_elements(w).max()) for w in windows(even_rotation(own.layers, own.experts, ep), k))
    assert lower_bound(own, k) <= worst(own, k) <= plain


def least_possible(own: Ownership, k: int) -> int:
    """Return the fullest rank of the best of all selections."""
    choices = list(itertools.combinations(range(own.experts), k))
    best = None
    for selection in itertools.product(choices, repeat=own.layers):
        mask = np.zeros((own.layers, own.experts), dtype=np.bool_)
        for layer, experts in enumerate(selection):
            mask[layer, list(experts)] = True
        size = int(own.selected_elements(mask).max())
        best = size if best is None else min(best, size)
    assert best is not None
    return best


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("dp", "ep", "experts"), [(1, 1, 3), (2, 1, 3), (3, 3, 3), (4, 2, 2), (4, 1, 3), (4, 4, 4), (2, 2, 2)]
)
def test_the_bound_is_below_every_selection_of_small_worlds(dp: int, ep: int, experts: int, stacked: bool) -> None:
    for layers, hidden, width in itertools.product((1, 2, 3), (2, 5), (1, 4)):
        shape = tiny(layers=layers, experts=experts, hidden=hidden, expert_ffn=width, stacked=stacked)
        own = zero2_ownership(shape, dp, ep)
        for k in range(1, experts + 1):
            possible = least_possible(own, k)
            assert lower_bound(own, k) <= possible <= worst(own, k)
            if dp == ep:
                assert lower_bound(own, k) == possible  # whole experts: the bound is exact


@given(shapes(), st.data())
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_with_what_ranks_carry_anyway(drawn: tuple[ModelShape, int, int], data: st.DataObject) -> None:
    shape, dp, ep = drawn
    own = zero2_ownership(shape, dp, ep)
    k = data.draw(st.integers(1, shape.experts))
    base = np.array(data.draw(st.lists(st.integers(0, 50), min_size=len(own.slices), max_size=len(own.slices))))
    mask = np.zeros((own.layers, own.experts), dtype=np.bool_)
    for layer in range(own.layers):
        mask[layer, data.draw(st.permutations(range(own.experts)))[:k]] = True

    carried = own.selected_elements(mask) + np.repeat(base[own.profile], own.ep)

    assert lower_bound(own, k, base=base) <= int(carried.max())


@given(shapes(), st.data())
@settings(max_examples=40, deadline=None)
def test_no_order_in_which_nobody_waits_longer_than_a_turn_is_below_the_turns_bound(
    drawn: tuple[ModelShape, int, int], data: st.DataObject
) -> None:
    shape, dp, ep = drawn
    own = zero2_ownership(shape, dp, ep)
    k = data.draw(st.integers(1, shape.experts))
    base = np.array(data.draw(st.lists(st.integers(0, 50), min_size=len(own.slices), max_size=len(own.slices))))
    turn = -(-own.experts // k)
    at = np.array([data.draw(st.permutations([e // k for e in range(own.experts)])) for _ in range(own.layers)])

    carried = [own.selected_elements(at == number) + np.repeat(base[own.profile], ep) for number in range(turn)]

    assert turn_bound(own, k, base=base) <= max(int(load.max()) for load in carried)
    if dp == ep:  # whole experts: as many as there are, in equal shares
        assert turn_bound(own, k) == -(-own.layers * own.local_experts // turn) * int(own.slices.max())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_packed_blocks_hold_every_expert_once_and_keep_what_they_promise(data: st.DataObject) -> None:
    phases, times, local = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    ep, columns, layers = phases * times, data.draw(st.integers(2, 4)), data.draw(st.integers(1, 5))
    own = zero2_ownership(tiny(layers=layers, experts=ep * local, hidden=5, expert_ffn=3), ep * columns, ep)
    goal, limit = turn_bound(own, own.experts // phases), int(own.slices.sum(axis=(1, 2)).max()) + 1

    found = packed_phases(own.slices, ep, phases, goal=goal, worst=limit)

    assert found is not None  # everything in one block would do
    counts = [np.bincount(row, minlength=phases).tolist() for row in found]
    assert counts == [[own.experts // phases] * phases] * layers
    assert max(int(own.selected_elements(found == number).max()) for number in range(phases)) < limit


def test_packing_gives_up_where_it_would_take_long() -> None:
    chance = np.random.default_rng(3)
    alike = np.ones((2, 64, 16), dtype=np.int64)
    uneven = chance.integers(1, 1000, size=(2, 3, 5)).repeat(8, axis=2)

    assert packed_phases(alike, 1024, 1024, goal=1, worst=2) is None  # too many checkpoints in a turn
    assert packed_phases(chance.integers(1, 99, size=(2, 8, 8)), 8, 8, goal=1, worst=1000) is None  # too many kinds
    total = int(uneven.sum(axis=(1, 2)).max())
    assert packed_phases(uneven, 64, 64, goal=total // 64, worst=total // 64 + 1) is None  # nothing that even is there
