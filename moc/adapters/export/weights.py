"""Which names a model's state dict has, where each value comes from, and in which precision the model holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moc.adapters.export.source import MASTER, WEIGHT, CheckpointSource
from moc.errors import MismatchError
from moc.format.tagged import ArrayValue
from moc.state import Expert, Shard

__all__ = [
    "EXPERTS",
    "FLOAT_DTYPES",
    "StoredBuffer",
    "cast_bytes",
    "model_dtype",
    "moe_prefixes",
    "number_of",
    "persistent_buffers",
    "weights_of",
]

EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
LOCAL_EXPERT = re.compile(rf"(?P<prefix>.*?){re.escape(EXPERTS)}(?P<index>\d+)\.(?P<name>.+)")
FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
MODEL_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBuffer:
    """A module buffer under the name that the model's state dict has for it; `expert` is set for a buffer inside an
    expert.
    """

    name: str
    value: ArrayValue
    expert: Expert | None


def model_dtype(source: CheckpointSource) -> str:
    """Return the precision of the model's weights as recorded by the engine, F32 where nothing is recorded."""
    recorded = source.manifest.fingerprint.get("dtype")
    name = recorded[0] if isinstance(recorded, list) and recorded else recorded
    return MODEL_DTYPES.get(str(name), "F32")


def weights_of(source: CheckpointSource) -> tuple[Shard, ...]:
    """Return the whole tensors that make up the weights: masters of what is trained, weights of what is frozen."""
    return source.tensors(MASTER) + source.tensors(WEIGHT)


def cast_bytes(data: bytearray, stored: str, wanted: str) -> memoryview:
    """Return a tensor's bytes in another floating dtype, rounded as training rounds a master to a weight."""
    if stored == wanted or not data:
        return memoryview(data)
    if stored not in FLOAT_DTYPES or wanted not in FLOAT_DTYPES:
        raise MismatchError(f"cannot cast: stored={stored} wanted={wanted} allowed={','.join(FLOAT_DTYPES)}")
    values = torch.frombuffer(data, dtype=FLOAT_DTYPES[stored]).to(FLOAT_DTYPES[wanted])
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]  # before 3.12, Buffer is not for ndarray


def number_of(recorded: object) -> float:
    """Return a number of the fingerprint; a canonical record holds no floats, so it may stand there as text."""
    try:
        return float(recorded)  # type: ignore[arg-type]  # what cannot be a number is the error below
    except (TypeError, ValueError):
        raise MismatchError(f"fingerprint has no number where one is expected: given={recorded!r}") from None


def moe_prefixes(source: CheckpointSource) -> dict[str, int]:
    """Return the name prefix of every MoE layer with its ordinal."""
    found: dict[str, int] = {}
    for shard in weights_of(source):
        match = LOCAL_EXPERT.fullmatch(shard.tensor)
        if shard.expert is not None and match is not None:
            found[match["prefix"]] = shard.expert.layer
    return dict(sorted(found.items()))


def persistent_buffers(
    tree: Mapping[str, Any], prefixes: Mapping[str, int], first_experts: Mapping[int, int]
) -> list[StoredBuffer]:
    """Return the buffers of a rank's tree that belong to a state dict; `first_experts` maps MoE layer to this rank's
    first expert.

    The tree's "persistent_buffers" decides. A tree without it counts all as persistent but those that DeepSpeed would
    not save either:
    buffers of an MoE layer, outside its experts, with "expert" in their names.
    """
    recorded = tree.get("persistent_buffers")
    found = []
    for name, value in tree["buffers"].items():
        if recorded is not None and name not in recorded:
            continue
        prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        match = LOCAL_EXPERT.fullmatch(name) if prefix is not None else None
        if match is not None and match["prefix"] in prefixes:
            layer = prefixes[match["prefix"]]
            index = first_experts.get(layer, 0) + int(match["index"])
            name = f"{match['prefix']}{EXPERTS}{index}.{match['name']}"
            found.append(StoredBuffer(name=name, value=value, expert=Expert(layer=layer, index=index)))
        elif recorded is not None or prefix is None or "expert" not in name[len(prefix) :]:
            found.append(StoredBuffer(name=name, value=value, expert=None))
    return found
