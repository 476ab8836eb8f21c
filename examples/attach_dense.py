"""Make a dense ZeRO-2 job survive failures, without touching its loop: `engine.step()` itself is the boundary.

deepspeed --num_accelerators 2 examples/attach_dense.py --storage checkpoints --steps 40
"""

from __future__ import annotations

import argparse

import deepspeed
import torch

from moc import CheckpointManager, Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", default="checkpoints")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 10))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    manager = CheckpointManager.attach(engine, options.storage, Config(persist_every=10))
    rank = torch.distributed.get_rank()
    for step in range(manager.resume_step, options.steps):
        data = torch.Generator().manual_seed(1000 * step + rank)
        x, y = torch.randn(8, 32, generator=data), torch.randint(0, 10, (8,), generator=data)
        loss = torch.nn.functional.cross_entropy(engine(x), y)
        engine.backward(loss)
        engine.step()
        print(f"rank {rank} step {step + 1} loss {loss.item().hex()}", flush=True)
    manager.detach()


if __name__ == "__main__":
    main()
