"""The ownership map: what DeepSpeed's partitions hold, element by element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from hypothesis import given, settings

from moc.errors import UsageError
from moc.plan import ownership as module
from moc.plan.ownership import Ownership, even_ownership, zero2_ownership
from moc.plan.presets import PRESETS
from moc.plan.shapes import ModelShape
from tests.plan.values import shapes, tiny, wide


def owners_one_by_one(shape: ModelShape, columns: int, local: int, limit: int) -> dict[tuple[int, int, int], int]:
    """Return the elements by (column, layer, local expert), counted along DeepSpeed's own groups and padding."""
    params = []
    for layer in range(shape.moe_layers):
        matrices = shape.expert_matrices
        if shape.stacked:
            params += [[(layer, i, m) for i in range(local)] for m in matrices]
        else:
            params += [[(layer, i, m)] for i in range(local) for m in matrices]
    content = {}
    tensors = []
    for number, pieces in enumerate(params):
        tensor = torch.nn.Parameter(torch.empty(sum(m for *_, m in pieces), device="meta"))
        tensor.allreduce, tensor.group_name, tensor.number = False, "ep", number  # type: ignore[attr-defined]
        content[number] = pieces
        tensors.append(tensor)
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": tensors, "name": "dense"}, max_group_size=limit
    )
    found: dict[tuple[int, int, int], int] = {}
    for group in groups:
        pieces = [piece for tensor in group["params"] for piece in content[tensor.number]]
        total = sum(m for *_, m in pieces)
        length = -(-total // (2 * columns)) * 2
        owners = itertools.chain.from_iterable([(layer, i)] * m for layer, i, m in pieces)
        for element, (layer, i) in enumerate(owners):
            key = (element // length, layer, i)
            found[key] = found.get(key, 0) + 1
    return found


def counts(own: Ownership) -> dict[tuple[int, int, int], int]:
    grid = own.slices[own.profile]
    return {(int(c), int(l), int(i)): int(grid[c, l, i]) for c, l, i in zip(*grid.nonzero(), strict=True)}


@settings(max_examples=50, deadline=None)
@given(shapes())
def test_the_map_is_that_of_deepspeeds_groups_and_partitions(drawn: tuple[ModelShape, int, int]) -> None:
    shape, dp, ep = drawn
    own = zero2_ownership(shape, dp, ep)

    assert counts(own) == owners_one_by_one(shape, dp // ep, shape.experts // ep, module.GROUP_LIMIT_ELEMENTS)


@pytest.mark.parametrize("stacked", [False, True])
def test_groups_are_chopped_where_deepspeed_chops_them(stacked: bool) -> None:
    shape, local = wide(stacked=stacked), 4
    sizes = [
        m * (local if stacked else 1) for _ in range(24 * (1 if stacked else local)) for m in shape.expert_matrices
    ]
    tensors = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    for tensor in tensors:
        tensor.allreduce, tensor.group_name = False, "ep"  # type: ignore[attr-defined]
    groups = split_params_into_different_moe_groups_for_optimizer({"params": tensors, "name": "dense"})
    totals = [sum(tensor.numel() for tensor in group["params"]) for group in groups if group.get("moe")]

    own = zero2_ownership(shape, 64, 16)

    lengths = [-(-total // 8) * 2 for total in totals]
    expected = [sum(max(0, min(t - c * n, n)) for t, n in zip(totals, lengths, strict=True)) for c in range(4)]
    assert len(totals) > 1
    assert own.slices[own.profile].sum(axis=(1, 2)).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(shapes())
def test_every_element_has_one_owner(drawn: tuple[ModelShape, int, int]) -> None:
    shape, dp, ep = drawn

    for own in (zero2_ownership(shape, dp, ep), even_ownership(shape, dp, ep)):
        assert int(own.dense.sum()) == shape.dense_elements
        assert (own.slices[own.profile].sum(axis=0) == shape.expert_elements).all()
        everything = np.ones((own.layers, own.experts), dtype=np.bool_)
        assert int(own.selected_elements(everything).sum()) == shape.all_expert_elements


def test_selected_elements_lie_on_the_ranks_of_their_expert() -> None:
    own = zero2_ownership(tiny(layers=1, experts=4), 4, 2)
    selected = np.array([[False, False, True, False]])  # expert 2 is the first of EP rank 1: global ranks 1 and 3

    elements = own.selected_elements(selected)

    assert elements[[0, 2]].tolist() == [0, 0]
    assert int(elements[[1, 3]].sum()) == tiny().expert_elements


def test_a_671b_expert_lies_on_a_quarter_of_its_replicas() -> None:
    own = zero2_ownership(PRESETS["deepseek-v3"], 16_384, 64)

    assert own.columns == 256
    assert own.slices.shape == (4, 58, 4)
    assert ((own.slices > 0).sum(axis=2) == 1).all()


@pytest.mark.parametrize(
    ("dp", "ep", "message"),
    [(0, 1, "dp=0"), (4, 3, "ep=3 dp=4"), (4, 0, "ep=0"), (3, 3, "divisors of 4"), (16, 8, "ep=8 experts=4")],
)
def test_ranks_that_cannot_hold_the_model_are_refused(dp: int, ep: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        zero2_ownership(tiny(experts=4), dp, ep)
