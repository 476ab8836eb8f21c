"""The global order of samples: a seeded permutation of each epoch, computed index by index.

A Feistel network over the next power of four permutes 0..2^(2h)-1; walking its cycles until the value falls below
`count` permutes 0..count-1 (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
It needs no memory, and no library whose random streams may change between versions.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["digest_ids", "permute", "sample_ids"]

ROUNDS = 6
Indices = np.ndarray[Any, np.dtype[np.uint64]]


def sample_ids(first: int, size: int, *, count: int, seed: int) -> tuple[int, ...]:
    """Return the ids at stream positions first..first+size-1; each epoch of `count` has every id once."""
    ids: list[int] = []
    position, stop = first, first + size
    while position < stop:
        epoch, offset = divmod(position, count)
        length = min(stop - position, count - offset)
        positions = np.arange(offset, offset + length, dtype=np.uint64)
        ids.extend(permute(positions, count=count, seed=seed, epoch=epoch).tolist())
        position += length
    return tuple(ids)


def digest_ids(ids: Sequence[int]) -> str:
    """Return a hash of sample ids in their order."""
    return hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=8).hexdigest()


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
