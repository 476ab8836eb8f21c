"""The global order of samples: a seeded permutation of each epoch, computed index by index.

A Feistel network over the next power of four permutes 0..2^(2h)-1; walking its cycles until the value falls below
`count` permutes 0..count-1 (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
It needs no memory, and no library whose random streams may change between versions.
"""

import hashlib
from typing import Any

import numpy as np

__all__ = ["permute"]

ROUNDS = 6
Indices = np.ndarray[Any, np.dtype[np.uint64]]


def permute(positions: Indices, *, count: int, seed: int, epoch: int) -> Indices:
    """Return the sample at each position of this epoch; positions lie in 0..count-1."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = [_key(seed, epoch, turn) for turn in range(ROUNDS)]
    values = _feistel(np.asarray(positions, dtype=np.uint64), half, keys)
    # The domain is less than 4 * count (8 for tiny counts), so a walk leaves it after 4 turns on average.
    outside = values >= count
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= count
    return values


def _key(seed: int, epoch: int, turn: int) -> np.uint64:
    digest = hashlib.blake2b(f"order/{seed}/{epoch}/{turn}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "big"))


def _feistel(values: Indices, half: int, keys: list[np.uint64]) -> Indices:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: Indices) -> Indices:
    # The finaliser of splitmix64.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
