"""Networks and engines for the export tests. Imports nothing of moc: the plain DeepSpeed job uses it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from moc_train.model.moe import GroupedMoE

WIDTH, EXPERTS, VOCABULARY = 12, 4, 29
MICRO_BATCH, POSITIONS = 3, 5
DATA_SEED = 7_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One engine: `layer` is dense, native or stacked; `zero` is 1, 2 or "bf16" for BF16_Optimizer."""

    layer: str
    zero: int | str
    dtype: str
    ep_size: int = 2
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.layer, f"zero_{self.zero}", self.dtype, *(name for name, _ in self.options)])


class Native(nn.Module):
    """DeepSpeed's own layer; experts differ, and each has a buffer that changes."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.moe = MoE(WIDTH, Expert(), num_experts=EXPERTS, ep_size=ep_size, k=2)
        first = dist.get_rank() % ep_size * (EXPERTS // ep_size)
        for local, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            generator = torch.Generator().manual_seed(first + local)
            for parameter in expert.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, balance, _ = self.moe(x)
        return y, balance


class Expert(nn.Module):
    """An expert with a buffer that every pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.add_(0.01)
        return self.down(torch.nn.functional.gelu(self.up(x - self.mean.to(x.dtype))))


class Stacked(nn.Module):
    """The trainer's layer: stacked weights, state-dict hooks, and a buffer that is not persistent."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.moe = GroupedMoE(
            layer=1, width=WIDTH, hidden=8, experts=EXPERTS, top_k=2, ep_size=ep_size, seed=5, std=0.2, out_std=0.2
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, losses = self.moe(x)
        return y, losses.balance


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 17), nn.Linear(17, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.down(torch.tanh(self.up(x))), x.new_zeros(())


class Net(nn.Module):
    """Two layers of a kind between a tied embedding and head; a frozen projection; buffers of both kinds."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        kinds = {
            "dense": Dense,
            "native": lambda: Native(scenario.ep_size),
            "stacked": lambda: Stacked(scenario.ep_size),
        }
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
        self.layers = nn.ModuleList(kinds[scenario.layer]() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(tokens)
        if self.training:
            self.seen += tokens.numel()
            self.shift.add_(0.01)  # alike on all ranks: DeepSpeed keeps the buffers of rank 0 only
        x = self.norm(x - self.shift.to(x.dtype) + self.frozen(x))
        total = x.new_zeros(())
        for layer in self.layers:
            y, balance = layer(x)
            x, total = x + y, total + balance
        return self.head(x), total


def build(scenario: Scenario, *, seed: int) -> Any:
    """Return a fresh engine; only `seed` decides its dense weights."""
    torch.manual_seed(seed)
    net = Net(scenario)
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    groups: Any = [
        {"params": [p for _, p in trained if p.dim() > 1], "name": "matrices", "weight_decay": 0.1},
        {"params": [p for _, p in trained if p.dim() <= 1], "name": "vectors", "betas": (0.8, 0.95)},
    ]
    if scenario.layer != "dense":
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 0.5,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 6}},
        "steps_per_print": 1 << 30,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1 if scenario.zero == "bf16" else scenario.zero, **dict(scenario.options)},
    }
    if scenario.dtype != "fp32":
        config[scenario.dtype] = {"enabled": True}
    if scenario.zero == "bf16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config)[0]


def train(engine: Any, steps: int) -> list[float]:
    """Train; data and chance follow from rank and step alone, since DeepSpeed's format keeps no generator's state."""
    losses = []
    engine.train()
    for _ in range(steps):
        seed = DATA_SEED + 100 * engine.global_steps + dist.get_rank()
        torch.manual_seed(seed)
        tokens = torch.randint(0, VOCABULARY, (MICRO_BATCH, POSITIONS), generator=torch.Generator().manual_seed(seed))
        logits, balance = engine(tokens)
        loss = nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY).float(), tokens.reshape(-1))
        loss = loss + 0.01 * balance.float()
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return losses


def logits_of(engine: Any) -> torch.Tensor:
    """Return the logits of a fixed batch, the same on every rank."""
    engine.eval()
    torch.manual_seed(DATA_SEED)
    tokens = torch.arange(MICRO_BATCH * POSITIONS).reshape(MICRO_BATCH, POSITIONS) % VOCABULARY
    with torch.no_grad():
        logits = engine(tokens)[0]
    engine.train()
    return logits.detach().clone()


def masters_of(engine: Any) -> list[torch.Tensor]:
    """Return this rank's partitions of the master weights."""
    zero = engine.optimizer
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    return [flat.detach().clone() for flat in flats]


def moments_of(engine: Any) -> list[dict[str, Any]]:
    """Return this rank's optimizer state of each partition."""
    zero = engine.optimizer
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    states = [zero.optimizer.state[flat] for flat in flats]
    return [{k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()} for state in states]


def persistent_buffers_of(engine: Any) -> dict[str, torch.Tensor]:
    """Return the buffers that a state dict keeps."""
    buffers, kept = dict(engine.module.named_buffers()), engine.module.state_dict().keys()
    return {name: buffer.clone() for name, buffer in buffers.items() if name in kept}


def observe(engine: Any) -> dict[str, Any]:
    """Return what must be equal after equal training."""
    return {
        "masters": masters_of(engine),
        "moments": moments_of(engine),
        "weights": {name: p.detach().clone() for name, p in engine.module.named_parameters()},
        "buffers": persistent_buffers_of(engine),
        "counters": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        "scheduler": engine.lr_scheduler.state_dict(),
        "rates": [group["lr"] for group in engine.optimizer.param_groups],
    }
