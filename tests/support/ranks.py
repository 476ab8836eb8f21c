"""How a rank that `zygote.py` has forked joins its world."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch

__all__ = ["join_world"]


def join_world(spec: Mapping[str, Any]) -> None:
    """Initialize the process group over the file that the specification names; one thread per rank. Collective."""
    torch.set_num_threads(1)
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{spec['rendezvous']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
