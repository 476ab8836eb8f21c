"""Page-aligned memory with a known address, and random contents that are cheap to make."""

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAGE_BYTES = mmap.PAGESIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    view: npt.NDArray[np.uint8]
    address: int

    def put(self, offset: int, data: bytes) -> None:
        self.view[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def get(self, offset: int, length: int) -> bytes:
        return self.view[offset : offset + length].tobytes()


@contextmanager
def mapped(length: int) -> Iterator[Memory]:
    """Map anonymous pages for the duration of the block; they are unmapped with the last view of them."""
    region = mmap.mmap(-1, max(length, 1))
    view = np.frombuffer(region, dtype=np.uint8)
    yield Memory(view=view, address=ctypes.addressof(ctypes.c_char.from_buffer(region)))


def words(values: Iterable[int]) -> npt.NDArray[np.uint64]:
    return np.array(list(values), dtype=np.uint64)


def random_bytes(length: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)
