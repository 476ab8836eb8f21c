"""Which bytes of an object can bypass the page cache: pure functions over lengths and addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENT_BYTES", "BATCH_BYTES", "BATCH_VIEWS", "Piece", "batch_pieces", "split_pieces"]

ALIGNMENT_BYTES = 4096  # a multiple of the logical block size of every disk in use
BATCH_BYTES = 64 * 2**20  # one call stays below a second on a slow disk
BATCH_VIEWS = 1024  # IOV_MAX on Linux


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of one segment that are written in one way, at their place in the object."""

    offset: int
    view: memoryview
    is_direct: bool


def split_pieces(views: Sequence[memoryview], addresses: Sequence[int]) -> list[Piece]:
    """Return the bytes in order, at most `BATCH_BYTES` each, direct where place, address and length are aligned."""
    pieces = []
    offset = 0
    for view, address in zip(views, addresses, strict=True):
        is_aligned = offset % ALIGNMENT_BYTES == 0 and address % ALIGNMENT_BYTES == 0
        direct_length = view.nbytes - view.nbytes % ALIGNMENT_BYTES if is_aligned else 0
        for start, stop, is_direct in ((0, direct_length, True), (direct_length, view.nbytes, False)):
            for begin in range(start, stop, BATCH_BYTES):
                end = min(begin + BATCH_BYTES, stop)
                pieces.append(Piece(offset=offset + begin, view=view[begin:end], is_direct=is_direct))
        offset += view.nbytes
    return pieces


def batch_pieces(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield runs of adjacent pieces that one call can write: all in the same way, within the limits of a batch."""
    batch: list[Piece] = []
    batch_bytes = 0
    for piece in pieces:
        is_full = len(batch) == BATCH_VIEWS or batch_bytes + piece.view.nbytes > BATCH_BYTES
        if batch and (is_full or piece.is_direct != batch[0].is_direct):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(piece)
        batch_bytes += piece.view.nbytes
    if batch:
        yield batch
