"""Dropless exchange of tokens between the ranks of an expert-parallel group.

Counts travel first, so that every rank knows how many rows it receives; then the rows; results go back the same way.
Rows are only moved by permutations whose inverse is at hand: no backward pass adds rows in an undefined order, so
results are the same bits every time.

Legend: T tokens, k experts per token, A = T * k assignments, R rows received, D model width.
"""

from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

__all__ = ["Route", "collect", "distribute", "plan_route"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where the assignments of one forward pass go and come back from."""

    top_k: int
    order_A: Tensor
    inverse_A: Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]
    by_expert_R: Tensor | None  # None: rows arrive sorted by expert already
    by_source_R: Tensor | None
    batch_sizes: Tensor  # int64, host: rows per local expert
    group: Any


def plan_route(index_Tk: Tensor, count_E: Tensor, *, ep_size: int, group: Any) -> Route:
    """Return the route of these assignments, after the ranks of `group` have exchanged their counts."""
    order_A = index_Tk.reshape(-1).argsort(stable=True)
    top_k = index_Tk.size(1)
    if ep_size == 1:
        return Route(
            top_k=top_k,
            order_A=order_A,
            inverse_A=_inverse(order_A),
            send=(),
            receive=(),
            by_expert_R=None,
            by_source_R=None,
            batch_sizes=count_E.cpu(),
            group=group,
        )
    outgoing = count_E.view(ep_size, -1).contiguous()
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming.view(-1), outgoing.view(-1), group=group)
    sizes = torch.stack((outgoing, incoming)).cpu()  # one wait for the device instead of two
    # Rows arrive as (source rank, local expert); the experts want them as (local expert, source rank).
    local = torch.arange(sizes.size(2)).repeat(ep_size).repeat_interleave(sizes[1].reshape(-1))
    by_expert_R = local.argsort(stable=True).to(index_Tk.device)
    return Route(
        top_k=top_k,
        order_A=order_A,
        inverse_A=_inverse(order_A),
        send=tuple(sizes[0].sum(1).tolist()),
        receive=tuple(sizes[1].sum(1).tolist()),
        by_expert_R=by_expert_R,
        by_source_R=_inverse(by_expert_R),
        batch_sizes=sizes[1].sum(0),
        group=group,
    )


def distribute(tokens_TD: Tensor, route: Route) -> Tensor:
    """Return the rows (R, D) for this rank's experts, sorted by local expert."""
    rows_AD = _Replicate.apply(tokens_TD, route.order_A, route.inverse_A, route.top_k)
    if route.by_expert_R is None:
        return rows_AD
    received_RD = _AllToAll.apply(rows_AD, route.send, route.receive, route.group)
    return _Permute.apply(received_RD, route.by_expert_R, route.by_source_R)


def collect(rows_RD: Tensor, route: Route) -> Tensor:
    """Return the experts' results (T, k, D) on the rank of each token, in the order of its routing."""
    if route.by_source_R is not None:
        rows_RD = _Permute.apply(rows_RD, route.by_source_R, route.by_expert_R)
        rows_RD = _AllToAll.apply(rows_RD, route.receive, route.send, route.group)
    return _Permute.apply(rows_RD, route.inverse_A, route.order_A).view(-1, route.top_k, rows_RD.size(1))


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Any) -> Tensor:
    # A rank without rows still takes part: the others wait for it.
    out = rows.new_empty(sum(receive), rows.size(1))
    dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), group=group)
    return out


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows = grads[0].index_select(0, ctx.saved_tensors[0])
        return rows.view(-1, ctx.top_k, rows.size(1)).sum(1), None, None, None
