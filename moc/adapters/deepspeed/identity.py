"""What must be equal for a stored state to belong to an engine, on every rank and for every number of ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moc.adapters.deepspeed.names import NamedParameter
from moc.adapters.deepspeed.zero import ZeroOptimizer
from moc.errors import UsageError

__all__ = ["build_fingerprint", "plain_json"]

MATCHED_OPTIONS = (
    "amsgrad",
    "betas",
    "bias_correction",
    "decoupled_weight_decay",
    "eps",
    "foreach",
    "fused",
    "maximize",
    "weight_decay",
)
"""Hyper-parameters that must match; the learning rate is left out because schedulers change it."""


def build_fingerprint(
    engine: Any, zero: ZeroOptimizer, named: Iterable[NamedParameter], extra: Mapping[str, object]
) -> dict[str, object]:
    """Return the fingerprint as plain JSON; raises UsageError if `extra` holds anything else or a name in use."""
    entries = sorted(named, key=lambda entry: entry.general_name)
    rows = {entry.general_name: [*entry.general_shape] for entry in entries}
    # A set: how many experts of one name are local depends on the rank grid.
    typed = sorted(
        {(e.general_name, e.general_shape, str(e.parameter.dtype), e.parameter.requires_grad) for e in entries}
    )
    own: dict[str, object] = {
        "parameters": rows,
        "parameters_digest": hashlib.sha256(json.dumps(typed, separators=(",", ":")).encode()).hexdigest()[:16],
        "optimizer": type(zero.base).__qualname__,
        "hyper_parameters": _hyper_parameters(zero),
        "zero_optimizer": type(zero.optimizer).__qualname__,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": [str(dtype).removeprefix("torch.") for dtype in engine.get_data_types()],
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": float(engine.gradient_clipping()),
    }
    clash = sorted(own.keys() & extra.keys())
    if clash:
        raise UsageError(f"fingerprint names are in use: names={','.join(clash)}")
    merged = own | dict(extra)
    try:
        restored: dict[str, object] = json.loads(json.dumps(merged, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"fingerprint values must be plain JSON: {error}") from error
    return restored


def plain_json(value: Any) -> Any:
    """Return a JSON value without floats, whose text would not be canonical: a float becomes its repr."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return repr(value)


def _hyper_parameters(zero: ZeroOptimizer) -> list[object]:
    """Return the distinct rows over all groups, sorted: the rank grid decides into how many experts are cut."""
    rows = set()
    for group in zero.groups:
        options = zero.base.param_groups[group.index]
        row = {key: _plain(options[key]) for key in MATCHED_OPTIONS if key in options}
        # DeepSpeed names the groups of experts by the expert-parallel size, which may change.
        name = None if group.is_expert else group.name
        rows.add(json.dumps(row | {"name": name, "is_expert": group.is_expert}, sort_keys=True))
    return [json.loads(row) for row in sorted(rows)]


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
