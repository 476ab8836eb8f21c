"""Names of parameters as an engine with expert-parallel size 1 would use them: alike on every rank.

DeepSpeed's own MoE layer names the experts of a rank from 0; here the index is the global one. A stacked parameter (one
parameter whose first dimension runs over the local experts) becomes one tensor per global expert, named as if it lived
in DeepSpeed's layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import nn

from moc.errors import UsageError
from moc.state import Expert

__all__ = ["Extent", "NamedParameter", "moe_layers", "name_parameters", "name_state", "require_contiguous"]

EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
LOCAL_INDEX = re.compile(re.escape(EXPERTS) + r"(\d+)\.(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The range of a local parameter, from element `start` on, that is one whole logical tensor."""

    tensor: str
    shape: tuple[int, ...]
    start: int
    expert: Expert | None = None

    @property
    def length(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedParameter:
    """One parameter of the module with its logical tensors.

    `fqn` is the module's own name for it; `general_name` and `general_shape` do not depend on the rank: an expert's
    index is replaced by `*` and the number of experts stands in front of its shape. `group_name` is DeepSpeed's expert
    group, None for dense parameters.
    """

    fqn: str
    parameter: nn.Parameter
    extents: tuple[Extent, ...]
    general_name: str
    general_shape: tuple[int, ...]
    group_name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _MoELayer:
    """Where an MoE layer is, and which experts of it live here."""

    prefix: str
    ordinal: int
    expert_count: int
    local_count: int


def name_parameters(module: nn.Module) -> tuple[NamedParameter, ...]:
    """Return every non-empty parameter once, in module order; raises UsageError naming one without a global name."""
    layers = _moe_layers(module)
    named = []
    seen: dict[str, str] = {}
    for fqn, parameter in module.named_parameters():
        if not parameter.numel():
            continue
        entry = _name_expert(fqn, parameter, layers) if is_moe_param(parameter) else _name_dense(fqn, parameter)
        for extent in entry.extents:
            if extent.tensor in seen:
                raise UsageError(
                    f"two parameters have one name: tensor={extent.tensor} parameters={seen[extent.tensor]},{fqn}"
                )
            seen[extent.tensor] = fqn
        named.append(entry)
    return tuple(named)


def moe_layers(module: nn.Module) -> tuple[Any, ...]:
    """Return the MoE layers in the order in which experts are numbered."""
    return tuple(layer for _, layer in _named_layers(module))


def _named_layers(module: nn.Module) -> list[tuple[str, Any]]:
    kinds: tuple[Any, ...] = (MoE, *_autoep_layer())
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, kinds)]


def _moe_layers(module: nn.Module) -> tuple[_MoELayer, ...]:
    return tuple(
        _MoELayer(
            prefix=f"{name}." if name else "",
            ordinal=ordinal,
            expert_count=layer.num_experts,
            local_count=layer.num_local_experts,
        )
        for ordinal, (name, layer) in enumerate(_named_layers(module))
    )


def _autoep_layer() -> tuple[type, ...]:
    try:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    except ImportError:  # the engine itself treats AutoEP as optional
        return ()
    return (AutoEPMoELayer,)


def _name_dense(fqn: str, parameter: nn.Parameter) -> NamedParameter:
    shape = tuple(parameter.shape)
    return NamedParameter(
        fqn=fqn,
        parameter=parameter,
        extents=(Extent(tensor=fqn, shape=shape, start=0),),
        general_name=fqn,
        general_shape=shape,
        group_name=None,
    )


def _name_expert(fqn: str, parameter: nn.Parameter, layers: tuple[_MoELayer, ...]) -> NamedParameter:
    group_name: str = parameter.group_name  # type: ignore[attr-defined]
    owners = [layer for layer in layers if fqn.startswith(layer.prefix)]
    if not owners:
        raise UsageError(
            f"expert parameter outside an MoE layer: parameter={fqn} allowed=deepspeed.moe.layer.MoE,AutoEPMoELayer"
        )
    layer = max(owners, key=lambda owner: len(owner.prefix))
    ranks = groups._get_expert_parallel_world_size(group_name)
    if layer.local_count * ranks != layer.expert_count:
        raise UsageError(
            f"experts are not spread evenly: parameter={fqn} experts={layer.expert_count} "
            f"local={layer.local_count} ep_size={ranks}"
        )
    first = groups._get_expert_parallel_rank(group_name) * layer.local_count
    relative = fqn[len(layer.prefix) :]
    native = LOCAL_INDEX.fullmatch(relative)
    if native:
        name, shape, indices = native[2], tuple(parameter.shape), [first + int(native[1])]
    elif parameter.dim() > 1 and parameter.shape[0] == layer.local_count:
        name, shape = relative.removeprefix("experts."), tuple(parameter.shape[1:])
        indices = [first + local for local in range(layer.local_count)]
    else:
        raise UsageError(
            f"cannot tell the experts of a parameter apart: parameter={fqn} shape={tuple(parameter.shape)} "
            f"allowed={EXPERTS}<i>.<name>, or a first dimension of local_experts={layer.local_count}"
        )
    return NamedParameter(
        fqn=fqn,
        parameter=parameter,
        extents=tuple(
            Extent(
                tensor=f"{layer.prefix}{EXPERTS}{index}.{name}",
                shape=shape,
                start=position * prod(shape),
                expert=Expert(layer=layer.ordinal, index=index),
            )
            for position, index in enumerate(indices)
        ),
        general_name=f"{layer.prefix}{EXPERTS}*.{name}",
        general_shape=(layer.expert_count, *shape),
        group_name=group_name,
    )


def require_contiguous(named: NamedParameter) -> torch.Tensor:
    """Return a parameter's memory, or raise UsageError: only contiguous memory can be copied in flat ranges."""
    if not named.parameter.data.is_contiguous():
        raise UsageError(f"parameter is not contiguous in memory: parameter={named.fqn} allowed=contiguous")
    return named.parameter.data


def name_state(module: nn.Module) -> dict[str, object]:
    """Return what an export needs beside tensors: which buffers persist, and which parameters are tied to which."""
    keys = module.state_dict().keys()
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    again = module.named_parameters(remove_duplicate=False)
    return {
        "persistent_buffers": sorted({name for name, _ in module.named_buffers()} & keys),
        "tied": {name: first[id(parameter)] for name, parameter in again if first[id(parameter)] != name},
    }
