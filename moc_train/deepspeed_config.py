"""The DeepSpeed configuration and the learning-rate schedule that follow from a `TrainConfig`: pure."""

import math
from pathlib import Path
from typing import Any

from moc_train.config import Resolved, TrainConfig

__all__ = ["derive_deepspeed_config", "learning_rate_ratio"]

NEVER = 1 << 30  # steps between DeepSpeed's own progress lines: the trainer prints its own


def derive_deepspeed_config(config: TrainConfig, sizes: Resolved) -> dict[str, Any]:
    """Return the dictionary that `deepspeed.initialize` is given."""
    training, optimizer = config.training, config.optimizer
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "contiguous_gradients": True,  # MoE with ZeRO needs both of these
        "reduce_scatter": True,
        "overlap_comm": False,
    }
    if optimizer.kind == "cpu_adam":
        zero["offload_optimizer"] = {"device": "cpu"}
    parameters: dict[str, Any] = {
        "lr": optimizer.lr,
        "betas": [optimizer.beta1, optimizer.beta2],
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if optimizer.kind == "adamw":
        parameters["torch_adam"] = True
    derived: dict[str, Any] = {
        "train_batch_size": sizes.global_batch,
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": training.gradient_clipping,
        "steps_per_print": NEVER,
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": parameters},
    }
    if training.precision == "bf16":
        derived["bf16"] = {"enabled": True}
    if training.gradient_dtype is not None:
        derived["data_types"] = {"grad_accum_dtype": training.gradient_dtype}
    if config.logging.tensorboard:
        folder = Path(config.logging.folder)
        derived["tensorboard"] = {"enabled": True, "output_path": str(folder), "job_name": "tensorboard"}
    return derived


def learning_rate_ratio(updates: int, *, warmup_steps: int, decay_steps: int, min_ratio: float) -> float:
    """Return the share of the peak learning rate after this many updates: linear warm-up, then a cosine."""
    if updates < warmup_steps:
        return (updates + 1) / warmup_steps
    progress = min(1.0, (updates - warmup_steps) / (decay_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2
