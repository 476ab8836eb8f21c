"""Copies between the pieces of a rank and plain host memory.

CPU memory goes through one native pass that copies and checksums. Device memory is copied by torch on a side stream and
checksummed in a second pass; that path uses torch's accelerator interface only and **has not been run on a GPU yet**.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from deepspeed.accelerator import get_accelerator

from moc import _native
from moc.adapters.deepspeed.layout import Piece
from moc.adapters.deepspeed.still import FrozenPieces, bytes_of_piece
from moc.adapters.deepspeed.values import bytes_of
from moc.errors import InternalError, UsageError
from moc.state import DTYPE_BYTES

__all__ = ["ShardMemory"]


class ShardMemory:
    """The memory of a fixed list of pieces. Addresses are looked up again whenever a tensor has moved.

    From `mark_boundary` to the end of the next `copy_to` the tensors are held: what the loop replaces meanwhile is read
    as it was.
    """

    def __init__(self, buffers: Sequence[Callable[[], torch.Tensor]], pieces: Sequence[Piece]) -> None:
        self._pieces = tuple(pieces)
        self._buffers = tuple(buffers)
        self._sizes = tuple((read().numel(), read().dtype) for read in self._buffers)
        self._lengths = np.array([piece.shard.size_bytes for piece in self._pieces], dtype=np.uint64)
        self._found: tuple[tuple[int, str], ...] = ()
        self._sources: npt.NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._on_device: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._accelerator = get_accelerator()
        self._device_index = None if self._accelerator.device_name() == "cpu" else self._accelerator.current_device()
        self._boundary: object = None
        self._tensors: list[torch.Tensor] = []
        self._frozen = FrozenPieces(self._pieces, lambda buffer: self._tensors[buffer])

    def forget_frozen(self) -> None:
        """Say that frozen parameters have got other values, from a checkpoint."""
        self._frozen.forget()

    def mark_boundary(self) -> None:
        """Hold the tensors, and remember the point of the current stream after which they have their values."""
        self._locate()
        self._frozen.mark()
        if self._device_index is not None:
            self._boundary = self._accelerator.Event()
            self._boundary.record()  # type: ignore[attr-defined]

    def copy_to(self, targets: array[int], crcs: array[int]) -> None:
        """Copy piece i to address `targets[i]` and put its crc32c into `crcs[i]`; return when all is in place.

        Pieces whose target is 0 are left out, and so are their places in `crcs`.
        """
        if len(targets) != len(self._pieces) or len(crcs) != len(self._pieces):
            raise InternalError(
                f"one target and crc per shard: shards={len(self._pieces)} targets={len(targets)} crcs={len(crcs)}"
            )
        if not self._tensors:
            self._locate()
        goals = np.frombuffer(targets, dtype=np.uint64)
        self._copy(goals, np.frombuffer(crcs, dtype=np.uint32))
        try:
            self._frozen.check(crcs, left_out=set(np.flatnonzero(goals == 0).tolist()))
        finally:
            self._tensors = []

    def _copy(self, goals: npt.NDArray[np.uint64], sums: npt.NDArray[np.uint32]) -> None:
        sources = self._sources.copy()
        for index, staged in self._frozen.staged.items():
            sources[index] = staged.data_ptr()
        wanted = np.flatnonzero(goals)
        on_device = np.intersect1d(wanted, self._on_device)
        on_host = np.setdiff1d(wanted, on_device)
        if on_device.size:
            self._copy_from_device(goals, on_device.tolist())
            partial = np.zeros(len(on_device), dtype=np.uint32)
            _native.crc32c_gather(goals[on_device], self._lengths[on_device], partial)
            sums[on_device] = partial
        partial = np.zeros(len(on_host), dtype=np.uint32)
        _native.copy_crc32c(sources[on_host], goals[on_host], self._lengths[on_host], partial)
        sums[on_host] = partial

    def write(self, index: int, offset: int, view: memoryview) -> None:
        """Copy `view` into piece `index` from its element `offset` on, in place. Thread: any, on distinct ranges."""
        piece = self._pieces[index]
        width = DTYPE_BYTES[piece.shard.dtype]
        source = np.frombuffer(view, dtype=np.uint8)
        if offset < 0 or source.nbytes % width or offset * width + source.nbytes > piece.shard.size_bytes:
            raise InternalError(
                f"write outside its shard: shard={piece.shard.name} offset={offset} bytes={source.nbytes}"
            )
        first = (piece.start + offset) * width
        target = bytes_of(self._buffers[piece.buffer]())[first : first + source.nbytes]
        if target.device.type == "cpu":
            target.numpy()[:] = source
        else:
            target.copy_(torch.from_numpy(source.copy()))

    def _locate(self) -> None:
        """Refresh the source addresses if any buffer was replaced: `offload_states` and `load_state_dict` do that."""
        self._tensors = tensors = [read() for read in self._buffers]
        found = tuple((tensor.data_ptr(), tensor.device.type) for tensor in tensors)
        if found == self._found:
            return
        for tensor, (numel, dtype), piece in zip(tensors, self._sizes, self._first_pieces(), strict=True):
            if (tensor.numel(), tensor.dtype) != (numel, dtype) or not tensor.is_contiguous():
                raise UsageError(
                    f"the memory of a tensor has changed its form: shard={piece} elements={tensor.numel()} "
                    f"dtype={tensor.dtype} allowed={numel} {dtype}, contiguous"
                )
        self._sources = np.array(
            [found[p.buffer][0] + p.start * DTYPE_BYTES[p.shard.dtype] for p in self._pieces], dtype=np.uint64
        )
        on_device = [i for i, p in enumerate(self._pieces) if found[p.buffer][1] != "cpu"]
        self._on_device = np.array(on_device, dtype=np.int64)
        self._found = found

    def _first_pieces(self) -> list[str]:
        names = {piece.buffer: piece.shard.name for piece in reversed(self._pieces)}
        return [names.get(buffer, "none") for buffer in range(len(self._buffers))]

    def _copy_from_device(self, targets: npt.NDArray[np.uint64], indices: Sequence[int]) -> None:
        self._accelerator.set_device(self._device_index)  # the snapshot thread starts on device 0
        side = self._accelerator.Stream()
        with self._accelerator.stream(side):
            if self._boundary is None:
                self._accelerator.synchronize()
            else:
                side.wait_event(self._boundary)
            for i in indices:
                piece, size = self._pieces[i], int(self._lengths[i])
                memory = (ctypes.c_char * size).from_address(int(targets[i]))
                source = self._frozen.staged.get(i)
                if source is None:
                    source = bytes_of_piece(self._tensors[piece.buffer], piece)
                torch.frombuffer(memory, dtype=torch.uint8).copy_(source, non_blocking=True)
            done = self._accelerator.Event()
            done.record(side)
        done.synchronize()
