"""Frozen parameters that are not as still as they should be: a teacher that follows with momentum in the forward pass.

Snapshots are copied behind the next forward pass, which is right for what nothing writes until the next update. Whether
nothing writes a frozen piece is seen by its checksum, whoever writes and by whatever way. As long as it is that of the
first boundary, every copy holds the boundary's bytes. A copy with another one may be torn: it fails, and from the next
boundary on the piece is copied there, on the training thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from moc._native import crc32c
from moc.adapters.deepspeed.layout import WEIGHT, Piece
from moc.adapters.deepspeed.values import bytes_of
from moc.errors import SaveFailedError
from moc.state import DTYPE_BYTES

__all__ = ["FrozenPieces", "bytes_of_piece"]

SHOWN = 8


class FrozenPieces:
    """The frozen ones of a rank's pieces. Thread: `mark` on the training thread, `check` on that of the copy."""

    def __init__(self, pieces: Sequence[Piece], read: Callable[[int], torch.Tensor]) -> None:
        """`read` returns the present tensor of a buffer."""
        self._pieces, self._read = pieces, read
        self._expected: dict[int, int] | None = None
        self.staged: Mapping[int, torch.Tensor] = {}
        """Boundary copies of the pieces that move, by index."""

    def forget(self) -> None:
        """Take the values at the next boundary for the ones that stand still: they were replaced from elsewhere."""
        self._expected = None

    def mark(self) -> None:
        """Stage what moves; at the first boundary, learn how the others look. Blocks: for one pass over these bytes."""
        for index, staged in self.staged.items():
            staged.copy_(self._bytes(index))
        if self._expected is None:
            frozen = [i for i, piece in enumerate(self._pieces) if piece.shard.part == WEIGHT and i not in self.staged]
            self._expected = {index: crc32c(self._bytes(index).cpu().numpy()) for index in frozen}

    def check(self, crcs: Sequence[int], *, left_out: Collection[int]) -> None:
        """Raise SaveFailedError if a copied piece was written since the first boundary; later copies will be sound."""
        expected = self._expected or {}
        moved = [index for index, crc in expected.items() if index not in left_out and crcs[index] != crc]
        if not moved:
            return
        self.staged = {**self.staged, **{index: torch.empty_like(self._bytes(index)) for index in moved}}
        self._expected = {index: crc for index, crc in expected.items() if index not in moved}
        names = sorted({self._pieces[index].shard.tensor for index in moved})
        raise SaveFailedError(
            f"frozen parameters are written while they are copied, and will be copied at the boundary from now on: "
            f"parameters={','.join(names[:SHOWN])} count={len(names)}"
        )

    def _bytes(self, index: int) -> torch.Tensor:
        piece = self._pieces[index]
        return bytes_of_piece(self._read(piece.buffer), piece)


def bytes_of_piece(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Return a piece of its buffer's tensor as bytes, without a copy."""
    first = piece.start * DTYPE_BYTES[piece.shard.dtype]
    return bytes_of(tensor)[first : first + piece.shard.size_bytes]
