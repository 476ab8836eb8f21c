"""What a rank knows of its life, as `manager.status()` reports it."""

from __future__ import annotations

from dataclasses import dataclass

from moc.snapshot.snapshotter import SnapshotCounters

__all__ = ["Status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a rank knows without asking anybody; steps are None before the first.

    `plt` is the proportion of lost tokens (0..1) at the last snapshot, None where nothing counts routes.
    """

    step: int
    incarnation: int
    last_global_step: int | None
    last_committed_step: int | None
    stall_ms_last: float
    snapshots: SnapshotCounters
    agents_replaced: int
    boundary: str
    plt: float | None
