"""One view of the two ZeRO optimizers: flat groups, this rank's partition of each, and where parameters lie in it.

The map is built from the order in the flat buffer and checked against the parameters' addresses. DeepSpeed's own map
(`param._hp_mapping`) is not used: it is wrong with `round_robin_gradients`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from moc.errors import InternalError

__all__ = ["FlatGroup", "ZeroOptimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatGroup:
    """One flat group; `start` and `length` are this rank's partition in the group's flat buffer, in elements.

    `params` are (parameter, its first element in the flat buffer), ascending; `padding` counts the partition's elements
    behind the last parameter.
    """

    index: int
    name: str | None
    is_expert: bool
    params: tuple[tuple[nn.Parameter, int], ...]
    start: int
    length: int
    padding: int
    flat_length: int


class ZeroOptimizer:
    """Uniform access to `DeepSpeedZeroOptimizer` (stages 1 and 2) and `BF16_Optimizer`; any thread may read."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.is_bf16 = isinstance(optimizer, BF16_Optimizer)
        self.groups = tuple(self._group(i) for i in range(len(optimizer.optimizer.param_groups)))

    @property
    def base(self) -> Any:
        """Return the optimizer that updates the flat partitions."""
        return self.optimizer.optimizer

    def master(self, index: int) -> torch.Tensor:
        """Return this rank's partition of a group's master weights, as it is now."""
        partitions = (
            self.optimizer.fp32_groups_flat_partition
            if self.is_bf16
            else self.optimizer.single_partition_of_fp32_groups
        )
        partition: torch.Tensor = partitions[index]
        return partition

    def state(self, index: int) -> dict[str, Any]:
        """Return the base optimizer's state of a group, as it is now; empty before the first step."""
        state: dict[str, Any] = self.base.state.get(self.master(index), {})
        return state

    def moments(self, index: int) -> tuple[str, ...]:
        """Return the names of the state tensors that have an element for each of the master's, sorted."""
        shape = self.master(index).shape
        return tuple(
            sorted(k for k, v in self.state(index).items() if isinstance(v, torch.Tensor) and v.shape == shape)
        )

    def update_weights(self) -> None:
        """Cast the masters to the model's weights and gather them, as a training step does. Collective."""
        with torch.no_grad():
            self.optimizer.update_lp_params()

    def _group(self, index: int) -> FlatGroup:
        zero = self.optimizer
        if self.is_bf16:
            flat, params = zero.bf16_groups_flat[index], zero.bf16_groups[index]
            offsets: Sequence[int] = list(accumulate((p.numel() for p in params), initial=0))[:-1]
        else:
            flat, params = zero.bit16_groups_flat[index], zero.round_robin_bit16_groups[index]
            offsets = zero.round_robin_bit16_offsets[index]
        _check_addresses(index, flat, zip(params, offsets, strict=True))
        process_group = zero.real_dp_process_group[index]
        length = flat.numel() // dist.get_world_size(process_group)
        start = dist.get_rank(process_group) * length
        if self.master(index).numel() != length:
            raise InternalError(
                f"partition has an unexpected size: group={index} elements={self.master(index).numel()} "
                f"expected={length}"
            )
        options = self.base.param_groups[index]
        end = offsets[-1] + params[-1].numel() if params else 0
        return FlatGroup(
            index=index,
            name=options.get("name"),
            is_expert=bool(options.get("moe", False)),
            params=tuple(zip(params, offsets, strict=True)),
            start=start,
            length=length,
            padding=min(length, max(0, start + length - end)),
            flat_length=flat.numel(),
        )


def _check_addresses(index: int, flat: torch.Tensor, placed: Iterable[tuple[nn.Parameter, int]]) -> None:
    for parameter, offset in placed:
        expected = flat.data_ptr() + offset * flat.element_size()
        if parameter.data_ptr() != expected or offset + parameter.numel() > flat.numel():
            raise InternalError(
                f"parameter is not where the flat buffer should hold it: group={index} offset={offset} "
                f"shape={tuple(parameter.shape)} address={parameter.data_ptr():#x} expected={expected:#x}"
            )
