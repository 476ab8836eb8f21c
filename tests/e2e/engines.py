"""Engines of the end-to-end tests: tiny networks in which every kind of state matters for the next loss."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

from moc_train.model.moe import GroupedMoE
from tests.adapters.engines import observe
from tests.e2e.matrix import Case

__all__ = ["Average", "Loader", "build", "digests"]

WIDTH, EXPERTS, VOCABULARY, POSITIONS, MICRO_BATCH = 16, 4, 31, 6, 2
SAMPLES = 4096  # more than any run consumes, so that each sample is used once


class Native(nn.Module):
    """DeepSpeed's own layer, with jitter and random token selection: both draw numbers in every forward pass."""

    def __init__(self, ep_size: int, seed: int) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))
        self.moe = MoE(
            WIDTH, expert, num_experts=EXPERTS, ep_size=ep_size, k=1, min_capacity=2, noisy_gate_policy="Jitter"
        )
        first = dist.get_rank() % ep_size * (EXPERTS // ep_size)
        for local, module in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            generator = torch.Generator().manual_seed(100 * seed + first + local)
            for parameter in module.parameters():
                parameter.data.normal_(0, 0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        y, balance, _ = self.moe(x)
        return y + 0.01 * balance.to(y.dtype)


class Grouped(nn.Module):
    """The trainer's layer."""

    def __init__(self, ep_size: int, seed: int) -> None:
        super().__init__()
        self.moe = GroupedMoE(
            layer=0, width=WIDTH, hidden=16, experts=EXPERTS, top_k=2, ep_size=ep_size, seed=seed, std=0.2, out_std=0.2
        )

    def forward(self, x: Tensor) -> Tensor:
        y, losses = self.moe(x)
        return y + (0.01 * losses.balance + 0.001 * losses.z).to(y.dtype)


class Net(nn.Module):
    """Tied embedding and head, a frozen projection, dropout, buffers of both kinds that the next forward pass reads."""

    def __init__(self, model: str, ep_size: int, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
        self.norm = nn.LayerNorm(WIDTH)
        match model:
            case "native":
                self.middle: nn.Module = Native(ep_size, seed)
            case "grouped":
                self.middle = Grouped(ep_size, seed)
            case _:
                self.middle = nn.Sequential(nn.Linear(WIDTH, 19), nn.Tanh(), nn.Linear(19, WIDTH))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.training:
            self.seen += tokens.numel()
            self.mean.lerp_(x.detach().mean((0, 1)).to(self.mean.dtype), 0.1)
        x = x + self.mean.to(x.dtype)
        x = x + self.middle(self.norm(x + self.frozen(x)))
        return self.head(self.dropout(x))


def build(case: Case, seed: int) -> Any:
    """Return a fresh engine; `seed` sets its weights and all generators. Collective."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    net = Net(case.model, 2, seed)
    if case.model == "dense":
        groups = [
            {"params": [p for p in net.parameters() if p.dim() > 1], "name": "matrices", "weight_decay": 0.1},
            {"params": [p for p in net.parameters() if p.dim() <= 1], "name": "vectors", "weight_decay": 0.0},
        ]
    else:
        groups = split_params_into_different_moe_groups_for_optimizer(
            [{"params": list(net.parameters()), "name": "all"}]
        )
    zero: dict[str, Any] = {"stage": 2 if case.zero == "2" else 1}
    if case.optimizer == "cpu_adam" and case.zero != "bf16":
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32" if case.zero == "bf16" else "bf16"}
    schedule = None
    if case.accumulation == 1:
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 40}}
    else:

        def schedule(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[5, 40, 60], gamma=0.7)

    if case.optimizer == "cpu_adam":
        optimizer: Any = DeepSpeedCPUAdam(groups, lr=0.01)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=case.zero != "2", fused=case.zero == "2")
    return deepspeed.initialize(model=net, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


class Loader:
    """Samples of a fixed random order, each used once; the state is how many were used, by all ranks together."""

    def __init__(self, accumulation: int) -> None:
        self._accumulation = accumulation
        self._order = np.random.Generator(np.random.PCG64(5)).permutation(SAMPLES).tolist()
        self.used = 0

    def next_step(self) -> tuple[list[int], list[Tensor]]:
        """Return the sample ids of the whole step and this rank's micro-batches."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        count = self._accumulation * ranks * MICRO_BATCH
        ids = [self._order[position % SAMPLES] for position in range(self.used, self.used + count)]
        batches = []
        for turn in range(self._accumulation):
            first = (turn * ranks + rank) * MICRO_BATCH
            batches.append(torch.stack([_sample(index) for index in ids[first : first + MICRO_BATCH]]))
        self.used += count
        return ids, batches

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.used = state["used"]


def _sample(index: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(index))


class Average:
    """Moving averages of the weights, updated after `engine.step()`: state of the step that only the loop knows."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.values = {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}

    def update(self) -> None:
        for name, parameter in self._engine.module.named_parameters():
            self.values[name].lerp_(parameter.detach().float(), 0.05)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(state)


def digests(engine: Any, loader: Loader, average: Average | None) -> dict[str, str]:
    """Return a digest or text of everything in the final state by name, equal if and only if all bits are."""
    seen = {**observe(engine), "loader": loader.used}
    if average is not None:
        seen |= {f"average {name}": value for name, value in average.values.items()}
    return {name: _digest(value) for name, value in sorted(seen.items())}


def _digest(value: object) -> str:
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{list(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    text = repr(value)
    return text if len(text) < 200 else hashlib.sha256(text.encode()).hexdigest()
