"""Make a native `deepspeed.moe` job survive failures: the three lines with `manager` are all that moc needs.

    deepspeed --num_accelerators 2 examples/attach_moe.py --storage checkpoints --steps 40

Kill it whenever you like and start it again: it goes on from the step it had reached.
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from moc import CheckpointManager, Config


class Model(torch.nn.Module):
    """A classifier with one MoE layer: half of the experts on each of two ranks."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        expert = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width)
        )
        self.first = torch.nn.Linear(32, width)
        self.moe = MoE(width, expert, num_experts=4, ep_size=2, k=2)
        self.last = torch.nn.Linear(width, classes)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        routed, balance, _ = self.moe(hidden)
        return torch.nn.functional.cross_entropy(self.last(hidden + routed), y) + 0.01 * balance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", default="checkpoints")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = Model()
    groups = split_params_into_different_moe_groups_for_optimizer([{"params": list(model.parameters()), "name": "all"}])
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=config)

    manager = CheckpointManager.attach(engine, options.storage, Config(persist_every=10))
    rank = torch.distributed.get_rank()
    for step in range(manager.resume_step, options.steps):
        data = torch.Generator().manual_seed(1000 * step + rank)  # a function of the step: nothing to restore
        x, y = torch.randn(8, 32, generator=data), torch.randint(0, 10, (8,), generator=data)
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        manager.step()
        print(f"rank {rank} step {step + 1} loss {loss.item().hex()}", flush=True)
    manager.detach()


if __name__ == "__main__":
    main()
