"""What can be resumed bit-exactly: a list of exact types and options; all else is refused before anything is touched.

Exact types, because a subclass may keep state that nobody here knows of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from moc.errors import UsageError

__all__ = ["check_engine", "keeps_running_powers"]

ENGINES: tuple[type, ...] = (DeepSpeedEngine,)
ZERO_OPTIMIZERS: tuple[type, ...] = (DeepSpeedZeroOptimizer, BF16_Optimizer)
BASE_OPTIMIZERS: tuple[type, ...] = (torch.optim.AdamW, torch.optim.Adam, DeepSpeedCPUAdam, FusedAdam)
REFUSED_SECTIONS = (
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "eigenvalue",
    "progressive_layer_drop",
    "quantize_training",
)
"""Sections of DeepSpeed's configuration that, when enabled, keep state which DeepSpeed alone can capture."""


def check_engine(engine: object) -> None:
    """Raise UsageError, naming what was found and what is allowed, unless the engine's whole state can be captured."""
    _require_type("engine", engine, ENGINES)
    assert isinstance(engine, DeepSpeedEngine)
    _require_type("zero optimizer", engine.optimizer, ZERO_OPTIMIZERS)
    _require("zero_optimization.stage", engine.zero_optimization_stage(), (1, 2))
    zero = engine.optimizer
    _require_type("base optimizer", zero.optimizer, BASE_OPTIMIZERS)
    _require("zenflow", bool(engine.zenflow), (False,))
    _require("torch_autocast grad scaler", _has_grad_scaler(engine), (False,))
    _require("tensor parallel size", max(engine.mp_world_size, engine.autotp_size()), (0, 1))
    _require("sequence parallel size", engine.sequence_parallel_size, (1,))
    _require("offloaded states", sorted(str(kind) for kind in getattr(zero, "offloaded_states", ())), ([],))
    _require("offload_optimizer.device", _offload_device(engine), ("none", "cpu"))
    _require("optimized linear with sharded base weights", bool(engine.optimized_linear_base_weight_sharding), (False,))
    _require("deepcompile", bool(engine.is_deepcompile_active()), (False,))
    _check_sections(engine._config._param_dict)
    _check_momentum_cycle(engine)


def keeps_running_powers(optimizer: object) -> bool:
    """Return whether a base optimizer keeps the powers of its betas as a product that C++ extends every step."""
    if type(optimizer) is FusedAdam:
        return bool(get_accelerator().device_name() == "cpu")
    return type(optimizer) is DeepSpeedCPUAdam


def _require_type(what: str, value: object, allowed: tuple[type, ...]) -> None:
    if type(value) not in allowed:
        found = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UsageError(f"unsupported {what}: type={found} allowed={','.join(kind.__qualname__ for kind in allowed)}")


def _require(what: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"unsupported option: {what}={value} allowed={','.join(str(item) for item in allowed)}")


def _has_grad_scaler(engine: Any) -> bool:
    return bool(engine.torch_autocast_z0_gradscaler or engine.optimizer.torch_autocast_gradscaler)


def _offload_device(engine: Any) -> str:
    offload = engine.zero_offload_optimizer()
    if offload is None:
        return "none"
    return str(getattr(offload.device, "value", offload.device))  # an enumeration or, from a plain default, its text


def _check_sections(config: Mapping[str, object]) -> None:
    for section in REFUSED_SECTIONS:
        if _is_enabled(config.get(section)):
            raise UsageError(f"unsupported option: {section}=enabled allowed=disabled")


def _is_enabled(section: object) -> bool:
    if not isinstance(section, Mapping):
        return False
    return any((key == "enabled" and value is True) or _is_enabled(value) for key, value in section.items())


def _check_momentum_cycle(engine: Any) -> None:
    # Powers are rebuilt from the present betas; a history of other betas would round differently.
    cycles = bool(getattr(engine.lr_scheduler, "cycle_momentum", False))
    if cycles and keeps_running_powers(engine.optimizer.optimizer):
        raise UsageError(
            f"unsupported option: cycle_momentum=True base_optimizer={type(engine.optimizer.optimizer).__qualname__} "
            "allowed=cycle_momentum=False, or torch.optim.AdamW"
        )
