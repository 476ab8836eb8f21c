"""Tiny networks with everything the adapter must carry: odd sizes, tied and frozen parameters, dropout, buffers,
experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

WIDTH = 12
EXPERTS = 4
VOCABULARY = 29


def seeded(*shape: int, seed: int) -> torch.Tensor:
    """Return a reproducible random tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


class Native(nn.Module):
    """DeepSpeed's own MoE layer, each expert initialised by its global index."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Linear(10, WIDTH))
        self.moe = MoE(WIDTH, expert, num_experts=EXPERTS, ep_size=ep_size, k=2)
        first = dist.get_rank() % ep_size * (EXPERTS // ep_size)
        for local, module in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            for number, parameter in enumerate(module.parameters()):
                parameter.data.copy_(seeded(*parameter.shape, seed=100 * (first + local) + number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, aux, _ = self.moe(x)
        return y + 0.01 * aux.to(y.dtype)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.route = send, receive, group
        y = x.new_empty(sum(receive), x.size(1))
        dist.all_to_all_single(y, x.contiguous(), receive, send, group=group)
        return y

    @staticmethod
    def backward(ctx, grad):
        send, receive, group = ctx.route
        out = grad.new_empty(sum(send), grad.size(1))
        dist.all_to_all_single(out, grad.contiguous(), send, receive, group=group)
        return out, None, None, None


class Stacked(MoE):
    """A layer whose parameters run over the local experts, top-1, without capacity; `load` is mutated by every forward
    pass.
    """

    def __init__(self, ep_size: int, *, is_frozen: bool = False) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size, self.k = EXPERTS, ep_size, 1
        self.num_local_experts = EXPERTS // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.use_residual = self.enable_expert_tensor_parallelism = False
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.int64))
        self.register_buffer("recent", torch.zeros(EXPERTS), persistent=False)
        first = dist.get_rank() % ep_size * self.num_local_experts
        for number, (name, shape) in enumerate((("w1", (WIDTH, 7)), ("w2", (7, WIDTH)), ("scale", (3, WIDTH)))):
            rows = [seeded(*shape, seed=100 * (first + local) + number) for local in range(self.num_local_experts)]
            weight = nn.Parameter(torch.stack(rows), requires_grad=not (is_frozen and name == "scale"))
            weight.allreduce, weight.group_name = False, self.expert_group_name
            self.register_parameter(name, weight)
        self.group = None

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.group = groups._get_expert_parallel_group(self.expert_group_name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        weight, index = self.gate(tokens).softmax(-1).max(-1)
        count = torch.bincount(index, minlength=EXPERTS)
        if self.training:
            self.load += count
            self.recent.mul_(0.9).add_(count.to(self.recent.dtype))
        order = index.argsort(stable=True)
        sent = count.view(self.ep_size, -1).contiguous()
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived.view(-1), sent.view(-1), group=self.group)
        send, receive = sent.sum(1).tolist(), arrived.sum(1).tolist()
        rows = _AllToAll.apply(tokens[order], send, receive, self.group)
        expert = torch.arange(self.num_local_experts).repeat(self.ep_size).repeat_interleave(arrived.view(-1))
        one_hot = F.one_hot(expert, self.num_local_experts).to(rows.dtype)
        hidden = F.silu(torch.einsum("td,edh,te->th", rows, self.w1, one_hot))
        out = torch.einsum("th,ehd,te->td", hidden, self.w2, one_hot)
        out = out * (1 + torch.einsum("ekd,te->td", self.scale, one_hot))
        back = _AllToAll.apply(out, receive, send, self.group)
        return (torch.zeros_like(tokens).index_put((order,), back) * weight.unsqueeze(-1)).view_as(x)


class Net(nn.Module):
    """Tied embedding and head, a frozen projection, dropout, a layer by `kind` (dense, native, stacked), buffers of two
    kinds.
    """

    def __init__(self, kind: str, ep_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
        self.norm = nn.LayerNorm(WIDTH)
        match kind:
            case "native":
                self.middle: nn.Module = Native(ep_size)
            case "stacked":
                self.middle = Stacked(ep_size, is_frozen=True)
            case _:
                self.middle = nn.Sequential(nn.Linear(WIDTH, 17), nn.Tanh(), nn.Linear(17, WIDTH))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("positions", torch.arange(5).expand(3, -1), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.training:
            self.seen += tokens.numel()
            self.mean.lerp_(x.detach().mean((0, 1)).to(self.mean.dtype), 0.1)
        x = x + self.middle(self.norm(x + self.frozen(x)))
        return self.head(self.dropout(x))
