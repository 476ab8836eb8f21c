"""Build an engine for a scenario, train it, and look at its whole state."""

from __future__ import annotations

import hashlib
import random

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from tests.adapters.models import VOCABULARY, Net
from tests.adapters.scenarios import Scenario

SKIPPED_STEP = 2  # the update that a NaN loss makes DeepSpeed skip


class NumpySchedule(torch.optim.lr_scheduler.LambdaLR):
    """A scheduler that leaves numpy numbers in its state and in the parameter groups, as hand-written ones do."""

    def get_lr(self):
        return [np.float64(lr) for lr in super().get_lr()]


def build(scenario: Scenario, seed: int = 0):
    """Return a fresh engine; `seed` sets weights and generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    net = Net(scenario.model, scenario.ep_size)
    if scenario.model == "dense":
        groups = [
            {"params": [p for p in net.parameters() if p.dim() > 1], "name": "matrices", "weight_decay": 0.1},
            {"params": [p for p in net.parameters() if p.dim() <= 1], "name": "vectors", "betas": (0.8, 0.95)},
        ]
    else:
        groups = split_params_into_different_moe_groups_for_optimizer(
            [{"params": list(net.parameters()), "name": "all"}]
        )
    zero = {"stage": 1 if scenario.zero == "bf16" else scenario.zero}
    for option in scenario.options:
        zero |= {"offload_optimizer": {"device": "cpu"}} if option == "offload" else {option: True}
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": scenario.accumulation,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    if scenario.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32" if scenario.zero == "bf16" else "bf16"}
    if scenario.scheduler == "warmup":
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 6}}
    optimizer = _optimizer(scenario.base, groups)
    if optimizer is None:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    return deepspeed.initialize(
        model=net,
        optimizer=optimizer,
        model_parameters=None if optimizer else net.parameters(),
        lr_scheduler=_scheduler(scenario.scheduler),
        config=config,
    )[0]


def _optimizer(base: str, groups):
    match base:
        case "foreach":
            return torch.optim.AdamW(groups, lr=0.01, foreach=True)
        case "loop":
            return torch.optim.Adam(groups, lr=0.01, foreach=False, weight_decay=0.01)
        case "fused":
            return torch.optim.AdamW(groups, lr=torch.tensor(0.01), fused=True)
        case "amsgrad":
            return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)
        case "cpu_adam":
            return DeepSpeedCPUAdam(groups, lr=0.01)
        case "fused_adam":
            return FusedAdam(groups, lr=0.01)
        case _:
            return None


def _scheduler(kind: str):
    match kind:
        case "multistep":
            return lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 2, 5], gamma=0.5)
        case "numpy":
            return lambda optimizer: NumpySchedule(optimizer, lambda step: np.float64(1 / (1 + step)))
        case _:
            return None


def train(engine, scenario: Scenario, steps: int, after_step=lambda: None) -> list[float]:
    """Train `steps` optimizer steps on data that depends on rank and position only; return every micro-batch's loss."""
    losses = []
    for _ in range(steps):
        for _ in range(scenario.accumulation):
            position = 1000 * dist.get_rank() + engine.micro_steps
            tokens = torch.randint(0, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(position))
            logits = engine(tokens)
            loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY).float(), tokens.view(-1))
            loss = loss * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
            losses.append(loss.item())
            if scenario.is_skipping and engine.global_steps == SKIPPED_STEP and dist.get_rank() == 0:
                loss = loss * float("nan")
            engine.backward(loss)
            engine.step()
        after_step()
    return losses


def observe(engine) -> dict[str, object]:
    """Return everything that must be equal, bit for bit, after equal training; tensors are copies."""
    zero = engine.optimizer
    masters = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    seen: dict[str, object] = {
        "counters": (engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state(),
        "scheduler": str(engine.lr_scheduler.state_dict()) if engine.lr_scheduler else None,
        "overflow": zero.overflow,
    }
    for name, tensor in [*engine.module.named_parameters(), *engine.module.named_buffers()]:
        seen[f"module {name}"] = tensor.detach().clone()
    for i, (master, group) in enumerate(zip(masters, zero.optimizer.param_groups, strict=True)):
        seen[f"master {i}"] = master.detach().clone()
        seen[f"group {i}"] = str({k: float(v) if k == "lr" else v for k, v in group.items() if k != "params"})
        for key, value in zero.optimizer.state.get(master, {}).items():
            seen[f"{key} {i}"] = value.clone() if isinstance(value, torch.Tensor) else value
    return seen


def differences(expected: dict[str, object], actual: dict[str, object]) -> list[str]:
    """Return the names of what is not bitwise equal."""
    names = sorted(expected.keys() | actual.keys())
    return [name for name in names if _bits(expected.get(name)) != _bits(actual.get(name))]


def _bits(value: object) -> object:
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest())
    return value
