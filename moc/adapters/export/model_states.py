"""The contents of DeepSpeed's model files: one for the dense part and the counters, one for each expert of each MoE
layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed import __version__ as deepspeed_version

from moc.adapters.deepspeed.values import TORCH_DTYPES, live_of, tensor_of
from moc.adapters.export.placement import Placement
from moc.adapters.export.source import MASTER, WEIGHT, CheckpointSource
from moc.adapters.export.weights import FLOAT_DTYPES, StoredBuffer, cast_bytes, number_of, weights_of
from moc.state import Expert, Shard

__all__ = ["config_of", "expert_states", "model_state"]


def model_state(
    source: CheckpointSource,
    placement: Placement,
    tree: Mapping[str, Any],
    buffers: Sequence[StoredBuffer],
    *,
    model: str,
) -> dict[str, Any]:
    """Return the content of `mp_rank_00_model_states.pt`; `tree` is rank 0's. Memory: the dense weights."""
    frozen = [shard for shard in source.tensors(WEIGHT) if shard.part == WEIGHT]
    module = OrderedDict((s.tensor, _load(source, s, model)) for s in weights_of(source) if s.expert is None)
    module |= {buffer.name: tensor_of(buffer.value) for buffer in buffers if buffer.expert is None}
    tied = dict(tree.get("tied", {}))
    module |= {alias: module[name] for alias, name in tied.items() if name in module}
    is_stage_two = source.manifest.fingerprint.get("zero_stage") == 2
    # DeepSpeed would put rank 0's frozen experts into every rank's: with such, the module's own entries must do.
    has_fragments = is_stage_two and not any(shard.expert is not None for shard in frozen)
    engine = tree["engine"]
    state: dict[str, Any] = {
        "module": module,
        "buffer_names": [buffer.name for buffer in buffers if buffer.expert is None],
        "optimizer": None,
        "param_shapes": _param_shapes(placement, tree),
        "frozen_param_shapes": {s.tensor: torch.Size(s.shape) for s in frozen} if has_fragments else None,
        "shared_params": tied,
        "frozen_param_fragments": {s.tensor: module[s.tensor] for s in frozen} if has_fragments else None,
        "lr_scheduler": live_of(tree["lr_scheduler"]),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": engine["skipped_steps"],
        "global_steps": engine["global_steps"],
        "global_samples": engine["global_samples"],
        "dp_world_size": len(source.ranks),
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": config_of(source, placement, model=model),
        "ds_version": deepspeed_version,
    }
    if placement.expert_counts:
        state |= {"num_experts": placement.expert_counts, "ds_autoep_layers": None}
    return state


def expert_states(
    source: CheckpointSource, buffers: Sequence[StoredBuffer], *, model: str
) -> Iterator[tuple[Expert, dict[str, torch.Tensor]]]:
    """Yield the content of each expert's file, by layer and index. Memory: one expert."""
    tensors: dict[Expert, list[Shard]] = {}
    for shard in weights_of(source):
        if shard.expert is not None:
            tensors.setdefault(shard.expert, []).append(shard)
    for expert, shards in sorted(tensors.items()):
        state = {shard.tensor: _load(source, shard, model) for shard in shards}
        state |= {buffer.name: tensor_of(buffer.value) for buffer in buffers if buffer.expert == expert}
        yield expert, state


def config_of(source: CheckpointSource, placement: Placement, *, model: str) -> dict[str, Any]:
    """Return the part of the DeepSpeed configuration that a checkpoint's readers look at, as far as it is recorded."""
    fingerprint = source.manifest.fingerprint
    names = {
        "micro_batch_size": "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
    }
    config: dict[str, Any] = {key: fingerprint[name] for name, key in names.items() if name in fingerprint}
    config["gradient_clipping"] = number_of(fingerprint.get("gradient_clipping", 0.0))
    config["zero_optimization"] = {"stage": fingerprint.get("zero_stage", 2)}
    config["use_data_before_expert_parallelism"] = not placement.is_default_order
    half = {"BF16": "bf16", "F16": "fp16"}.get(model)
    return config if half is None else config | {half: {"enabled": True}}


def _load(source: CheckpointSource, shard: Shard, model: str) -> torch.Tensor:
    # Frozen weights never had a master: they are in the precision that the model holds them in.
    dtype = model if shard.part == MASTER and shard.dtype in FLOAT_DTYPES else shard.dtype
    data = cast_bytes(source.read(shard), shard.dtype, dtype)
    if not data.nbytes:
        return torch.empty(shard.shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).reshape(shard.shape)


def _param_shapes(placement: Placement, tree: Mapping[str, Any]) -> list[OrderedDict[str, torch.Size]]:
    """Return the shapes of rank 0's parameters in the order of its flat groups."""
    return [
        OrderedDict(
            (fqn, torch.Size(placement.local_shape(0, fqn, is_expert=group["is_expert"])))
            for fqn, _, _ in group["layout"]["params"]
        )
        for group in tree["groups"]
    ]
