"""A rank's ZeRO optimizer state as DeepSpeed's own `state_dict()` would return it, rebuilt from whole tensors and the
recorded layout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from deepspeed import __version__ as deepspeed_version
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    CLIP_GRAD,
    DS_VERSION,
    GROUP_PADDINGS,
    LOSS_SCALER,
    PARAM_ALIGNMENT_PADDINGS,
    PARAM_SLICE_MAPPINGS,
    PARTITION_COUNT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_STAGE,
)
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from moc.adapters.deepspeed.values import TORCH_DTYPES, bytes_of, live_of
from moc.adapters.export.placement import Placement
from moc.adapters.export.source import MASTER, WEIGHT, CheckpointSource
from moc.adapters.export.weights import FLOAT_DTYPES, number_of
from moc.errors import MismatchError

__all__ = ["optimizer_state"]


def optimizer_state(
    source: CheckpointSource, placement: Placement, rank: int, tree: Mapping[str, Any], *, model: str
) -> dict[str, Any]:
    """Return what a rank's `engine.optimizer.state_dict()` held. Memory: its partition.

    `model` is the dtype of the model's weights.
    """
    groups: Sequence[Mapping[str, Any]] = tree["groups"]
    fingerprint = source.manifest.fingerprint
    partitions = [_partition(source, placement, rank, group) for group in groups]
    moments = [{part: flat for part, flat in flats.items() if part != MASTER} for flats in partitions]
    base = {
        "state": {i: _live(group["state"]) | moments[i] for i, group in enumerate(groups)},
        "param_groups": [_live(group["hyper"]) | {"params": [i]} for i, group in enumerate(groups)],
    }
    layouts = [group["layout"] for group in groups]
    masters = [flats[MASTER] for flats in partitions]
    common = {
        CLIP_GRAD: number_of(fingerprint.get("gradient_clipping", 0.0)),
        BASE_OPTIMIZER_STATE: base,
        PARTITION_COUNT: [layout["flat_length"] // layout["length"] for layout in layouts],
        DS_VERSION: deepspeed_version,
        PARAM_SLICE_MAPPINGS: [_slices(layout) for layout in layouts],
    }
    if fingerprint.get("zero_optimizer") == "BF16_Optimizer":
        return common | {
            SINGLE_PARTITION_OF_FP32_GROUPS: masters,
            GROUP_PADDINGS: [_tail_padding(layout) for layout in layouts],
        }
    paddings = [int(layout["padding"]) for layout in layouts]
    return common | {
        LOSS_SCALER: _loss_scaler(tree["loss_scaler"], model),
        "dynamic_loss_scale": bool(tree["zero"].get("dynamic_loss_scale", False)),
        "overflow": bool(tree["zero"].get("overflow", False)),
        SINGLE_PARTITION_OF_FP32_GROUPS: [
            # A copy: torch.save writes the whole storage behind a view.
            flat[: flat.numel() - padding].clone()
            for flat, padding in zip(masters, paddings, strict=True)
        ],
        ZERO_STAGE: ZeroStageEnum(fingerprint.get("zero_stage", 2)),
        GROUP_PADDINGS: paddings,
        PARAM_ALIGNMENT_PADDINGS: [_paddings_between(layout) for layout in layouts],
    }


def _live(tree: object) -> dict[str, Any]:
    return cast("dict[str, Any]", live_of(tree))


def _partition(
    source: CheckpointSource, placement: Placement, rank: int, group: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the rank's flat range of a group, by part; what belongs to no parameter is zero, as DeepSpeed pads."""
    layout = group["layout"]
    start, length = int(layout["start"]), int(layout["length"])
    rows = [
        (offset + extent.start, extent)
        for fqn, numel, offset in layout["params"]
        for extent in placement.extents(rank, fqn, numel, is_expert=group["is_expert"])
    ]
    if not rows:
        raise MismatchError(f"recorded parameter group is empty: rank={rank} group={group['name']}")
    dtypes = {part: dtype for part, dtype in source.parts(rows[0][1].tensor.tensor).items() if part != WEIGHT}
    flats = {part: torch.zeros(length, dtype=TORCH_DTYPES[dtype]) for part, dtype in dtypes.items()}
    for offset, extent in rows:
        first, end = max(offset, start), min(offset + extent.length, start + length)
        if first >= end:
            continue
        for flat in flats.values():
            if flat.numel() != length:
                raise MismatchError(
                    f"partition has another size: rank={rank} group={group['name']} elements={flat.numel()}"
                )
        for part, flat in flats.items():
            view = memoryview(bytes_of(flat[first - start : end - start]).numpy())  # type: ignore[arg-type]
            source.read_into(extent.tensor.tensor, part, first - offset, view)
    return flats


def _slices(layout: Mapping[str, Any]) -> OrderedDict[str, fragment_address]:
    """Return where each parameter lies in the partition; parameters without an element in it are left out."""
    start, length = layout["start"], layout["length"]
    found: OrderedDict[str, fragment_address] = OrderedDict()
    for fqn, numel, offset in layout["params"]:
        first, end = max(offset, start), min(offset + numel, start + length)
        if first < end:
            found[fqn] = fragment_address(numel=end - first, start=first - start)
    return found


def _paddings_between(layout: Mapping[str, Any]) -> list[int]:
    """Return the gap behind each parameter; the last one's belongs to the partition's padding."""
    rows = layout["params"]
    return [after[2] - before[2] - before[1] for before, after in pairwise(rows)] + [0] * bool(rows)


def _tail_padding(layout: Mapping[str, Any]) -> int:
    """Return the group's padding, which `BF16_Optimizer` accounts to the last partition whatever its size."""
    is_last = layout["start"] + layout["length"] == layout["flat_length"]
    return int(layout["flat_length"] - sum(numel for _, numel, _ in layout["params"])) if is_last else 0


def _loss_scaler(attributes: Mapping[str, Any], model: str) -> LossScaler | DynamicLossScaler:
    """Return DeepSpeed's scaler with the recorded attributes; its dtype, not one of them, only words its messages."""
    scaler: LossScaler | DynamicLossScaler
    if attributes.get("dynamic"):
        scaler = DynamicLossScaler(
            init_scale=attributes["cur_scale"],
            scale_window=attributes.get("scale_window", 1000),
            min_scale=attributes.get("min_scale", 1),
            delayed_shift=attributes.get("delayed_shift", 1),
            consecutive_hysteresis=attributes.get("consecutive_hysteresis", False),
            dtype=FLOAT_DTYPES[model],
        )
    else:
        scaler = LossScaler(scale=attributes.get("cur_scale", 1.0))
    for name, value in attributes.items():
        setattr(scaler, name, live_of(value))
    return scaler
