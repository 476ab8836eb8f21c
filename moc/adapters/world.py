"""`TorchWorld`: the collectives of `moc.training.World` on a gloo group of their own, apart from the engine's."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from moc.errors import ClosedError, CoordinationError, InternalError, WaitTimeoutError

__all__ = ["TorchWorld"]

MAX_VALUES = 8
T = TypeVar("T")


class TorchWorld:
    """A side channel between all ranks of `torch.distributed`; construction is collective."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._rank = dist.get_rank()
        self._size = dist.get_world_size()
        self._pending: tuple[dist.Work, torch.Tensor, int] | None = None

    @property
    def rank(self) -> int:
        """Return this process's rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's payload, by rank. Blocks: until all ranks have called, at most the timeout."""
        group = self._open_group()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self._size)]
        own_length = torch.tensor([len(payload)], dtype=torch.int64)
        self._translated("all_gather", lambda: dist.all_gather(lengths, own_length, group=group))
        width = max(1, *(int(length) for length in lengths))
        own = _tensor_of(payload, width)
        rows = [torch.zeros(width, dtype=torch.uint8) for _ in range(self._size)]
        self._translated("all_gather", lambda: dist.all_gather(rows, own, group=group))
        return [row[: int(length)].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def broadcast(self, payload: bytes | None) -> bytes:
        """Return rank 0's payload. Blocks: until it is here, at most the timeout."""
        group = self._open_group()
        if (payload is not None) != (self._rank == 0):
            raise InternalError(f"rank 0 alone has a payload: rank={self._rank} payload={payload is not None}")
        length = torch.tensor([len(payload or b"")], dtype=torch.int64)
        self._translated("broadcast", lambda: dist.broadcast(length, src=0, group=group))
        body = _tensor_of(payload or b"", max(1, int(length)))
        self._translated("broadcast", lambda: dist.broadcast(body, src=0, group=group))
        return body[: int(length)].numpy().tobytes()

    def start_max(self, values: Sequence[int]) -> None:
        """Begin an element-wise maximum over the ranks; at most one may be under way."""
        group = self._open_group()
        if self._pending is not None or len(values) > MAX_VALUES:
            raise InternalError(
                f"cannot begin a maximum: pending={self._pending is not None} values={len(values)} allowed={MAX_VALUES}"
            )
        sent = torch.zeros(MAX_VALUES, dtype=torch.int64)
        sent[: len(values)] = torch.tensor(list(values), dtype=torch.int64)
        work = self._translated(
            "all_reduce", lambda: dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=group, async_op=True)
        )
        if work is None:
            raise InternalError(f"rank is outside the group: rank={self._rank}")
        self._pending = (work, sent, len(values))

    def finish_max(self) -> tuple[int, ...] | None:
        """Return the result of the pending `start_max`, or None if there is none. Blocks: at most the timeout."""
        if self._pending is None:
            return None
        work, received, count = self._pending
        self._pending = None
        self._translated("all_reduce", work.wait)
        return tuple(int(value) for value in received[:count])

    def sum_up(self, values: array[int]) -> array[int]:
        """Return the element-wise sum over the ranks. Blocks: until all ranks have called, at most the timeout."""
        group = self._open_group()
        total = torch.frombuffer(values, dtype=torch.int64).clone()
        self._translated("all_reduce", lambda: dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group))
        return array("q", total.numpy().tobytes())

    def close(self) -> None:
        """Wait for a pending maximum and destroy the group; again is harmless."""
        if self._group is None:
            return
        try:
            self.finish_max()
        finally:
            group, self._group = self._group, None
            if dist.is_initialized():
                dist.destroy_process_group(group)

    def _open_group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise ClosedError("the world is closed")
        return self._group

    def _translated(self, what: str, call: Callable[[], T]) -> T:
        """Return `call()`, with gloo's errors as moc's."""
        try:
            return call()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            if "imed out" in str(error) or "imeout" in str(error):
                raise WaitTimeoutError(
                    f"{what} timed out: rank={self._rank} timeout_s={self._timeout_s:g} reason={reason}"
                ) from error
            raise CoordinationError(f"{what} failed: rank={self._rank} reason={reason}") from error


def _tensor_of(payload: bytes, width: int) -> torch.Tensor:
    padded = bytearray(payload)
    padded.extend(bytes(width - len(payload)))
    return torch.frombuffer(padded, dtype=torch.uint8)
