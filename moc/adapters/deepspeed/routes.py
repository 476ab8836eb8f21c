"""Counts routes in DeepSpeed's own MoE layers, and adds up on the device what is counted there.

The counts of a layer are read by a forward hook, because each forward overwrites them: in training mode only, and not
where activation checkpointing runs a forward again for the backward pass. They are the routes of this rank's tokens as
the gate has chosen them; where a layer drops tokens beyond its capacity, fewer are kept. A model in which other MoE
layers stand beside DeepSpeed's is not counted: two bases in one total would mean nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from moc.adapters.deepspeed.names import moe_layers
from moc.errors import UsageError
from moc.routing import BEFORE_DROPS, KEPT

__all__ = ["RouteCounter"]

log = logging.getLogger(__name__)

MIXED = "the model has DeepSpeed's MoE layers beside others, and no basis of counting serves both"


class RouteCounter:
    """Counts the routes of one engine's module, until `remove`. Thread: the training thread, but
    for the hooks, which run where the forward pass does.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = moe_layers(module)
        self._experts = tuple(int(layer.num_experts) for layer in layers)
        self._own = [layer.deepspeed_moe for layer in layers if _is_own(layer)]
        self._is_mixed = 0 < len(self._own) < len(layers)
        self._hooked: list[MOELayer] = []
        self._register: Callable[[int, object], None] | None = None
        self._handles: list[RemovableHandle] = []
        self._sums: dict[int, torch.Tensor] = {}

    def begin(self, *, with_hooks: bool) -> None:
        """Say, before the life begins, whether DeepSpeed's own layers are counted; else all is left to the user."""
        self._hooked = self._own if with_hooks and not self._is_mixed else []
        if with_hooks and self._is_mixed and dist.get_rank() == 0:
            log.warning("lost tokens are not counted: %s", MIXED)

    @property
    def basis(self) -> str:
        """Return what is counted; constant once the life has begun."""
        return BEFORE_DROPS if any(layer.gate.drop_tokens for layer in self._hooked) else KEPT

    def install(self, register: Callable[[int, object], None]) -> None:
        """Begin to count; `register(layer, counts)` takes what is in host memory."""
        self._register = register
        for layer, module in enumerate(self._hooked):
            self._handles.append(module.register_forward_hook(self._hook(layer)))

    def remove(self) -> None:
        """Take the hooks away; again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def register(self, layer: int, counts: object) -> None:
        """Count what the user has counted. Raises: UsageError, also where the hooks count, or cannot."""
        if self._is_mixed:
            raise UsageError(f"routes cannot be registered: {layer=} reason={MIXED}")
        if self._hooked:
            raise UsageError(f"moc counts the routes of this model by itself: layer={layer!r:.80} basis={self.basis!r}")
        self._add(layer, counts)

    def take(self) -> Sequence[tuple[int, object]]:
        """Return and forget the sums on the device. Blocks: until it has made them."""
        sums, self._sums = self._sums, {}
        return [(layer, counts.cpu().numpy()) for layer, counts in sorted(sums.items())]

    def _hook(self, layer: int) -> Callable[..., None]:
        def count(module: Any, *_: object) -> None:
            if module.training and not _is_recomputed():
                self._add(layer, module.exp_counts)

        return count

    def _add(self, layer: int, counts: object) -> None:
        assert self._register is not None, "installed before anything is counted"
        if not isinstance(counts, torch.Tensor):
            self._register(layer, counts)
        elif counts.device.type == "cpu":
            self._register(layer, counts.detach().numpy())
        else:
            self.add_on_device(layer, counts)

    def add_on_device(self, layer: int, counts: torch.Tensor) -> None:
        """Add counts where they are, without waiting for the device; values are looked at when they are taken."""
        if type(layer) is not int or not 0 <= layer < len(self._experts):
            raise UsageError(
                f"no such MoE layer: layer={layer!r:.80} layers={len(self._experts)} allowed=counted from 0"
            )
        shape, allowed = tuple(counts.shape), (self._experts[layer],)
        if shape != allowed:
            raise UsageError(f"counts have a wrong shape: {layer=} shape={shape} allowed={allowed}")
        if counts.dtype.is_floating_point or counts.dtype.is_complex or counts.dtype == torch.bool:
            raise UsageError(f"counts have a wrong type: {layer=} dtype={counts.dtype} allowed=integers")
        known = self._sums.get(layer)
        if known is None:
            known = self._sums[layer] = counts.new_zeros(shape, dtype=torch.int64)
        known += counts.detach()


def _is_recomputed() -> bool:
    """Return whether this forward is run again by a backward pass, as activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def _is_own(layer: Any) -> bool:
    return isinstance(layer, MoE) and isinstance(getattr(layer, "deepspeed_moe", None), MOELayer)
