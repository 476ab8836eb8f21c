"""The base optimizers' state that torch and DeepSpeed create late or keep out of sight."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from moc.adapters.deepspeed.allow import keeps_running_powers
from moc.adapters.deepspeed.zero import ZeroOptimizer

__all__ = ["materialise_moments", "rebuild_running_powers"]


def materialise_moments(zero: ZeroOptimizer) -> bool:
    """Create the state that the first step would create, with the same values; return whether any was missing."""
    is_created = False
    for group in zero.groups:
        if not zero.state(group.index):
            master = zero.master(group.index)
            zero.base.state[master] = _first_state(zero.base, zero.base.param_groups[group.index], master)
            is_created = True
    return is_created


def rebuild_running_powers(zero: ZeroOptimizer) -> None:
    """Bring the powers of beta that DeepSpeed's CPU kernels keep to where training had them.

    The kernels multiply by beta at each step, which rounds differently from `pow(beta, step)`; so every step is
    replayed on dummies of one element, 1-2 microseconds each. A kernel keeps one pair of powers for all groups, so the
    groups are replayed in turn.
    """
    if not keeps_running_powers(zero.base):
        return
    rows = [(int(zero.state(group.index)["step"]), zero.base.param_groups[group.index]) for group in zero.groups]
    dummies = [torch.zeros(1) for _ in range(4)]
    for step in range(1, max((last for last, _ in rows), default=0) + 1):
        previous = None
        for last, options in rows:
            # Equal betas at the same step leave the kernel as it is.
            if step <= last and options["betas"] != previous:
                previous = options["betas"]
                _replay_step(zero.base, step, options, dummies)


def _first_state(optimizer: Any, options: dict[str, Any], master: torch.Tensor) -> dict[str, Any]:
    if type(optimizer) is DeepSpeedCPUAdam:
        dtype = torch.float32 if optimizer.fp32_optimizer_states else master.dtype
        moments = {key: torch.zeros_like(master.data, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": 0, **moments}
    if type(optimizer) is FusedAdam:
        moments = {key: torch.zeros_like(master.data) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": options.get("step", 0), **moments}
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if options["amsgrad"] else ("exp_avg", "exp_avg_sq")
    is_double = torch.get_default_dtype() == torch.float64 and not options["fused"]
    device = master.device if options["capturable"] or options["fused"] else torch.device("cpu")
    step = torch.zeros((), dtype=torch.float64 if is_double else torch.float32, device=device)
    return {"step": step, **{key: torch.zeros_like(master.data) for key in keys}}


def _replay_step(optimizer: Any, step: int, options: dict[str, Any], dummies: list[torch.Tensor]) -> None:
    beta1, beta2 = options["betas"]
    if type(optimizer) is DeepSpeedCPUAdam:
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *dummies)
        return
    parameter, gradient, moment, square = dummies
    optimizer.multi_tensor_adam(
        2048 * 32,
        optimizer._dummy_overflow_buf,
        [[gradient], [parameter], [moment], [square]],
        0.0,
        beta1,
        beta2,
        1.0,
        step,
        optimizer.adam_w_mode,
        1,
        0.0,
    )
