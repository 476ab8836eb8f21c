"""The ranks of one life and what they agree on: `moc.training.World` over the scheduler.

A rank that ends breaks the group: who waits for it, or comes later, gets an error. A rank that is stopped lets the
others wait until their time is over.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moc.errors import CoordinationError, WaitTimeoutError
from tests.sim.scheduler import Fiber

if TYPE_CHECKING:
    from tests.sim.process import Process

__all__ = ["Group", "SimWorld"]


class Group:
    """What the ranks have sent, by the number of the collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.is_broken = False
        self.sent: dict[int, dict[int, bytes]] = {}
        self.kinds: dict[int, str] = {}
        self.waiters: list[Fiber] = []


class SimWorld:
    """One rank's end of a group."""

    def __init__(self, group: Group, rank: int, process: Process, *, timeout_s: float) -> None:
        self._group, self._rank, self._process, self._timeout_s = group, rank, process, timeout_s
        self._count = 0
        self._pending: int | None = None
        process.on_end.append(self._break)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._group.size

    def all_gather(self, payload: bytes) -> list[bytes]:
        return self._receive(self._send("gather", payload))

    def broadcast(self, payload: bytes | None) -> bytes:
        assert (payload is not None) == (self._rank == 0), "rank 0 alone has a payload"
        return self._receive(self._send("broadcast", payload or b""))[0]

    def start_max(self, values: Sequence[int]) -> None:
        assert self._pending is None, "one agreement at a time"
        self._pending = self._send("max", struct.pack(f"<{len(values)}q", *values))

    def finish_max(self) -> tuple[int, ...] | None:
        if self._pending is None:
            return None
        number, self._pending = self._pending, None
        rows = [struct.unpack(f"<{len(row) // 8}q", row) for row in self._receive(number)]
        return tuple(max(column) for column in zip(*rows, strict=True))

    def sum_up(self, values: array[int]) -> array[int]:
        rows = [array("q", row) for row in self._receive(self._send("sum", values.tobytes()))]
        return array("q", (sum(column) for column in zip(*rows, strict=True)))

    def _send(self, kind: str, payload: bytes) -> int:
        self._process.enter()
        group, number = self._group, self._count
        self._count += 1
        if group.is_broken:
            raise CoordinationError(f"{kind} failed: rank={self._rank} reason=a rank is gone")
        assert group.kinds.setdefault(number, kind) == kind, (
            f"ranks differ in collective {number}: {group.kinds} {kind}"
        )
        rows = group.sent.setdefault(number, {})
        rows[self._rank] = payload
        if len(rows) == group.size:
            self._process.sim.scheduler.wake(group.waiters)
        return number

    def _receive(self, number: int) -> list[bytes]:
        group, scheduler = self._group, self._process.sim.scheduler
        end_s = scheduler.now_s + self._timeout_s
        while len(group.sent[number]) < group.size:
            if group.is_broken:
                raise CoordinationError(f"collective failed: rank={self._rank} reason=a rank is gone")
            if scheduler.now_s >= end_s:
                self._break()  # as gloo does: a connection on which an operation timed out is closed
                raise WaitTimeoutError(f"collective timed out: rank={self._rank} timeout_s={self._timeout_s:g}")
            group.waiters.append(scheduler.current)
            scheduler.wait(timeout_s=end_s - scheduler.now_s)
        return [group.sent[number][rank] for rank in range(group.size)]

    def _break(self) -> None:
        self._group.is_broken = True
        self._process.sim.scheduler.wake(self._group.waiters)
