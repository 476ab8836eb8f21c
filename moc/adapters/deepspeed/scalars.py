"""What of an engine's state is not a shard: counters, groups, scheduler, scaler, buffers; applied in place.

engine         counters
zero           what DeepSpeed's `_load_global_state` restores
groups         per flat group: name, is_expert, hyper-parameters, scalar optimizer state, layout of its partition
lr_scheduler   its state_dict, or None
loss_scaler    plain attributes
buffers        every module buffer by name, persistent or not
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moc.adapters.deepspeed.names import NamedParameter
from moc.adapters.deepspeed.values import array_of, bytes_of, expect_array, live_of, plain_of, tensor_of
from moc.adapters.deepspeed.zero import FlatGroup, ZeroOptimizer
from moc.errors import MismatchError, UsageError
from moc.format.tagged import ArrayValue

__all__ = [
    "capture_buffers",
    "capture_engine",
    "capture_groups",
    "check_boundary",
    "check_scheduler",
    "restore_buffers",
    "restore_engine",
    "restore_groups",
]

COUNTERS = (
    "global_steps",
    "global_samples",
    "micro_steps",
    "skipped_steps",
    "gas_boundary_ctr",
    "_unmanaged_backward_count",
)
ZERO_ATTRIBUTES = ("overflow", "dynamic_loss_scale", "custom_loss_scaler", "external_loss_scale")
IMPLEMENTATION_OPTIONS = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options that choose how the optimizer computes; those of the running engine stay."""
EXPERT_INDEX = re.compile(r"deepspeed_experts\.\d+\.")


def capture_engine(engine: Any, zero: ZeroOptimizer) -> dict[str, object]:
    """Return the counters, scheduler, scaler and ZeRO attributes."""
    scheduler = engine.lr_scheduler
    return {
        "engine": {name: getattr(engine, name) for name in COUNTERS if hasattr(engine, name)},
        "zero": _plain_attributes(zero.optimizer, ZERO_ATTRIBUTES),
        "loss_scaler": _plain_attributes(*_scaler_of(zero)),
        "lr_scheduler": None
        if scheduler is None
        else plain_of(scheduler.state_dict(), "lr_scheduler", is_lenient=True),
    }


def restore_engine(engine: Any, zero: ZeroOptimizer, tree: Mapping[str, Any]) -> None:
    """Apply what `capture_engine` returned."""
    for name, value in tree["engine"].items():
        setattr(engine, name, value)
    for name, value in tree["zero"].items():
        setattr(zero.optimizer, name, value)
    scaler, names = _scaler_of(zero)
    for name in names:
        if name in tree["loss_scaler"]:
            setattr(scaler, name, tree["loss_scaler"][name])
    stored, scheduler = tree["lr_scheduler"], engine.lr_scheduler
    if (stored is None) != (scheduler is None):
        raise MismatchError(
            f"learning rate scheduler differs: stored={stored is not None} present={scheduler is not None}"
        )
    if scheduler is not None:
        scheduler.load_state_dict(live_of(stored, scheduler.state_dict()))


def capture_groups(zero: ZeroOptimizer, named: Iterable[NamedParameter]) -> list[object]:
    """Return one entry per flat group."""
    fqns = {id(entry.parameter): entry.fqn for entry in named}
    return [_capture_group(zero, group, fqns) for group in zero.groups]


def restore_groups(zero: ZeroOptimizer, named: Iterable[NamedParameter], stored: Iterable[Any]) -> None:
    """Apply hyper-parameters and scalar optimizer state in place; groups are matched by what they hold."""
    fqns = {id(entry.parameter): entry.fqn for entry in named}
    entries = list(stored)
    for group in zero.groups:
        entry = _matching(group, [fqns[id(parameter)] for parameter, _ in group.params], entries)
        options = zero.base.param_groups[group.index]
        for key, value in entry["hyper"].items():
            if key not in IMPLEMENTATION_OPTIONS:
                options[key] = _assigned(options.get(key), value)
        state = zero.state(group.index)
        for key, value in entry["state"].items():
            state[key] = _assigned(state.get(key), value)


def capture_buffers(module: torch.nn.Module) -> dict[str, object]:
    """Return every buffer of the module by name."""
    return {name: array_of(buffer, name) for name, buffer in module.named_buffers()}


def restore_buffers(module: torch.nn.Module, stored: Mapping[str, object]) -> None:
    """Put every buffer's values back, in place; raises MismatchError if names or shapes of persistent ones differ.

    A buffer that no state dict has may be made or replaced by a forward pass (a mask, a cache): where it does not fit,
    the next forward pass makes it again.
    """
    present = dict(module.named_buffers())
    persistent = present.keys() & module.state_dict().keys()
    if not persistent <= stored.keys():
        differing = ",".join(sorted(persistent - stored.keys())[:8])
        raise MismatchError(f"buffers differ: names={differing} stored={len(stored)} present={len(present)}")
    for name, buffer in present.items():
        if name not in stored:
            continue
        value = tensor_of(expect_array(stored[name], name)).to(buffer.device)
        if (value.shape, value.dtype) != (buffer.shape, buffer.dtype):
            if name not in persistent:
                continue
            raise MismatchError(
                f"buffer differs: name={name} stored={tuple(value.shape)} {value.dtype} "
                f"present={tuple(buffer.shape)} {buffer.dtype}"
            )
        # An expanded buffer cannot be written element by element, and such buffers are constants.
        if value.numel() and not torch.equal(bytes_of(value), bytes_of(buffer.contiguous())):
            with torch.no_grad():
                buffer.copy_(value)


def _capture_group(zero: ZeroOptimizer, group: FlatGroup, fqns: Mapping[int, str]) -> dict[str, object]:
    path = f"optimizer.param_groups[{group.index}]"
    options = {key: value for key, value in zero.base.param_groups[group.index].items() if key != "params"}
    moments = zero.moments(group.index)
    scalars = {key: value for key, value in zero.state(group.index).items() if key not in moments}
    return {
        "name": group.name,
        "is_expert": group.is_expert,
        "hyper": plain_of(options, path, is_lenient=True),
        "state": plain_of(scalars, f"optimizer.state[{group.index}]", is_lenient=True),
        "layout": {
            "start": group.start,
            "length": group.length,
            "padding": group.padding,
            "flat_length": group.flat_length,
            "params": [(fqns[id(parameter)], parameter.numel(), offset) for parameter, offset in group.params],
        },
    }


def _matching(group: FlatGroup, fqns: list[str], entries: list[Any]) -> Any:
    """Return a group's stored entry: that with the same parameters, else the first of its kind and, if dense, name."""
    own = {EXPERT_INDEX.sub("deepspeed_experts.*.", fqn) for fqn in fqns}
    alike = [e for e in entries if e["is_expert"] == group.is_expert and (group.is_expert or e["name"] == group.name)]
    exact = [e for e in alike if [row[0] for row in e["layout"]["params"]] == fqns]
    general = [
        e for e in alike if {EXPERT_INDEX.sub("deepspeed_experts.*.", row[0]) for row in e["layout"]["params"]} == own
    ]
    for found in (exact, general, alike):
        if found:
            return found[0]
    known = sorted({str((e["name"], e["is_expert"])) for e in entries})
    raise MismatchError(
        f"no stored parameter group matches: name={group.name} is_expert={group.is_expert} stored={known}"
    )


def _assigned(present: object, value: object) -> object:
    """Return what to assign: a present tensor with the new values written into it, else the new value."""
    if isinstance(present, torch.Tensor) and isinstance(value, ArrayValue):
        with torch.no_grad():
            present.copy_(tensor_of(value))
        return present
    return live_of(value)


def _scaler_of(zero: ZeroOptimizer) -> tuple[Any, tuple[str, ...]]:
    """Return the loss scaler and the names of its plain attributes; `BF16_Optimizer` has none."""
    scaler = getattr(zero.optimizer, "loss_scaler", None)
    names = () if scaler is None else tuple(sorted(vars(scaler)))
    return scaler, names


def _plain_attributes(owner: Any, names: Iterable[str]) -> dict[str, object]:
    values = {name: plain_of(getattr(owner, name), name, is_lenient=True) for name in names if hasattr(owner, name)}
    return {name: value for name, value in values.items() if value is None or type(value) in (bool, int, float)}


def check_boundary(engine: Any, *, updated_at: int) -> None:
    """Raise UsageError unless the engine holds no accumulated gradients; `updated_at` is the engine's count of
    micro-batches after its last update.
    """
    if not engine.managed_gradient_accumulation():
        pending = engine._unmanaged_backward_count
    elif engine._is_gradient_accumulation_boundary is None:
        pending = engine.micro_steps % engine.gradient_accumulation_steps()
    else:  # the caller tells the engine where its boundaries are
        pending = engine.micro_steps - updated_at
    if pending:
        raise UsageError(f"not at the boundary of a step: accumulated_micro_batches={pending} allowed=0")


def check_scheduler(engine: Any) -> None:
    """Raise UsageError unless the scheduler can be captured and restored."""
    scheduler = engine.lr_scheduler
    if scheduler is not None and not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise UsageError(
            f"scheduler cannot be saved: type={type(scheduler).__qualname__} allowed=state_dict() and load_state_dict()"
        )
