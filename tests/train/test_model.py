"""Router, rotary positions and initial values, against what their definitions say."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moc_train.model.attention import rotary_table, rotate
from moc_train.model.dispatch import collect, distribute, plan_route
from moc_train.model.initial import normal
from moc_train.model.moe import is_repeated
from moc_train.model.router import Router


def router(tokens: int = 40, width: int = 8, experts: int = 6, top_k: int = 2) -> tuple[Router, torch.Tensor]:
    weight = normal((experts, width), 1.0, "router")
    return Router(weight, top_k=top_k), normal((tokens, width), 1.0, "tokens")


def test_rotation_keeps_lengths_and_turns_by_the_position() -> None:
    x = normal((1, 2, 7, 8), 1.0, "x")
    table = rotary_table(7, 8, 10000.0, torch.device("cpu"))

    y = rotate(x, table)

    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    angle = 3 * 10000.0 ** (-2 / 8)  # position 3, second frequency
    first, second = x[0, 0, 3, 1], x[0, 0, 3, 5]
    torch.testing.assert_close(y[0, 0, 3, 1], first * math.cos(angle) - second * math.sin(angle))


def test_rotated_products_depend_on_the_distance_only() -> None:
    query, key = normal((8,), 1.0, "q"), normal((8,), 1.0, "k")
    table = rotary_table(20, 8, 10000.0, torch.device("cpu"))
    queries = rotate(query.expand(1, 1, 20, 8), table)[0, 0]
    keys = rotate(key.expand(1, 1, 20, 8), table)[0, 0]

    near, far = queries[5] @ keys[2], queries[17] @ keys[14]

    torch.testing.assert_close(near, far)


def test_weights_are_the_largest_probabilities_normalised() -> None:
    module, tokens = router()

    routing = module(tokens)

    probability = (tokens @ module.weight.t()).softmax(-1)
    best = probability.sort(-1, descending=True)
    assert torch.equal(routing.index_Tk, best.indices[:, :2])
    expected = best.values[:, :2] / best.values[:, :2].sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weight_Tk, expected)
    assert routing.count_E.tolist() == [int((routing.index_Tk == e).sum()) for e in range(6)]


def test_router_losses_follow_their_formulas() -> None:
    module, tokens = router()

    routing = module(tokens)

    logits = tokens @ module.weight.t()
    share = routing.count_E / routing.count_E.sum()
    torch.testing.assert_close(routing.balance_loss, 6 * (share * logits.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(routing.z_loss, logits.exp().sum(-1).log().square().mean())


def test_the_balance_loss_is_one_for_uniform_routing_and_pushes_towards_it() -> None:
    module, tokens = router()
    with torch.no_grad():
        module.weight.zero_()

    assert module(tokens).balance_loss.item() == pytest.approx(1.0)

    skewed, _ = router()
    before = skewed(tokens).balance_loss
    before.backward()
    with torch.no_grad():
        skewed.weight -= 0.05 * skewed.weight.grad
    assert skewed(tokens).balance_loss.item() < before.item()


def test_the_router_computes_in_fp32_under_bf16() -> None:
    module, tokens = router()

    routing = module.to(torch.bfloat16)(tokens.to(torch.bfloat16))

    assert routing.weight_Tk.dtype == routing.z_loss.dtype == torch.float32


def test_every_row_goes_to_its_expert_and_returns_to_its_token() -> None:
    module, tokens = router()
    routing = module(tokens)
    route = plan_route(routing.index_Tk, routing.count_E, ep_size=1, group=None)

    rows = distribute(tokens, route)
    expert_of_row = torch.arange(6).repeat_interleave(route.batch_sizes)
    back = collect(rows * expert_of_row.unsqueeze(-1), route)

    torch.testing.assert_close(back, tokens.unsqueeze(1) * routing.index_Tk.unsqueeze(-1))


def test_dispatch_passes_a_numerical_gradient_check() -> None:
    module, tokens = router(tokens=5)
    routing = module(tokens)
    route = plan_route(routing.index_Tk, routing.count_E, ep_size=1, group=None)
    x = tokens.double().requires_grad_()

    assert torch.autograd.gradcheck(lambda x: collect(distribute(x, route).square(), route), (x,))


def test_initial_values_depend_on_names_only() -> None:
    first = normal((3, 4), 0.5, 7, "w1", 2)
    torch.randn(5)

    assert torch.equal(first, normal((3, 4), 0.5, 7, "w1", 2))
    assert not torch.equal(first, normal((3, 4), 0.5, 7, "w1", 3))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_pass_that_is_run_again_is_told_apart(use_reentrant: bool) -> None:
    seen: list[bool] = []

    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(is_repeated())
            return super().forward(x).sin()

    layer = Layer(3, 3)
    x = checkpoint(layer, torch.ones(2, 3, requires_grad=True), use_reentrant=use_reentrant)
    x.sum().backward()
    layer(torch.ones(2, 3))

    assert seen == [False, True, False]
