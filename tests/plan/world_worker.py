"""One rank of a DeepSpeed world: writes which elements of which expert its ZeRO partitions hold, as JSON.

torchrun ... -m tests.plan.world_worker FOLDER: file `<kind>-<rank>.json` maps "layer.expert" and "dense" to elements.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from moc.adapters.deepspeed.layout import build_layout
from moc.adapters.deepspeed.names import name_parameters
from moc.adapters.deepspeed.zero import ZeroOptimizer
from tests.adapters.models import Stacked
from tests.plan.test_world import EXPERTS, FFN, HIDDEN, LAYERS


class Net(nn.Module):
    """Layers of experts behind a dense layer."""

    def __init__(self, kind: str, ep_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        if kind == "stacked":
            layers: list[nn.Module] = [Stacked(ep_size) for _ in range(LAYERS)]
        else:
            expert = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
            layers = [MoE(HIDDEN, expert, num_experts=EXPERTS, ep_size=ep_size) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(layers)


def held(kind: str, ep_size: int) -> Counter[str]:
    """Return the elements of the masters on this rank, by expert."""
    net = Net(kind, ep_size)
    groups = split_params_into_different_moe_groups_for_optimizer([{"params": list(net.parameters()), "name": "all"}])
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    config |= {"zero_allow_untested_optimizer": True, "steps_per_print": 1 << 30}
    engine = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups), config=config)[0]
    layout = build_layout(ZeroOptimizer(engine.optimizer), name_parameters(engine.module))
    found: Counter[str] = Counter()
    for shard in (piece.shard for piece in layout.held if piece.shard.part == "master"):
        found["dense" if shard.expert is None else f"{shard.expert.layer}.{shard.expert.index}"] += shard.length
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for kind in ("separate", "stacked"):
        (folder / f"{kind}-{dist.get_rank()}.json").write_text(json.dumps(held(kind, 2)))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # engines and groups need no orderly end, which takes seconds
