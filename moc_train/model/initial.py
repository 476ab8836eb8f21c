"""Initial values that depend on names only: never on ranks, on call order or on the global generator."""

import hashlib

import torch
from torch import Tensor

__all__ = ["normal", "seed_of"]


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that is a stable function of `parts`."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def normal(shape: tuple[int, ...], std: float, *parts: int | str) -> Tensor:
    """Return fp32 normal values on the CPU, seeded by `parts`."""
    generator = torch.Generator(device="cpu").manual_seed(seed_of(*parts))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
