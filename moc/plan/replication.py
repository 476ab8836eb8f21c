"""Replication as values: what is global when snapshots have replicas, and up to which step nothing is left to send.

Only some moments are replicated: those that every rank has flagged, one at a time, so that all nodes replicate the same
ones. A node's *duty* to a moment is done when each of its hosts holds whole replicas of all its ranks, or is counted as
away. A moment is *global* when every rank has sealed it and every node has done its duty, those that are not heard of
any more included: their memory may be lost, and what is freed for a global moment must not be all that is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from moc.plan.freeing import Moment

__all__ = ["global_moment", "settled_step"]


def global_moment(
    complete: Iterable[Moment], done: Mapping[int, Collection[Moment]], *, nodes: Collection[int]
) -> Moment | None:
    """Return the newest complete moment to which every node has done its duty, None before the first.

    `done[n]` are the moments that node n says it has done its duty to.
    """
    duties = [frozenset(done.get(node, ())) for node in sorted(nodes)]
    return max((moment for moment in complete if all(moment in held for held in duties)), default=None)


def settled_step(outstanding: Iterable[Moment], *, passed: Iterable[int | None]) -> int | None:
    """Return the step up to which nothing is left to replicate on this node, None before the first.

    `outstanding` are the flagged moments that are neither global nor given up, `passed` the newest step that each rank
    of the node has sealed or skipped. The trainers flag the next snapshot once this has reached the last flagged one.
    """
    steps = [-1 if step is None else step for step in passed]
    reached = min(steps, default=-1)
    first = min((step for step, _ in outstanding), default=None)
    settled = reached if first is None else min(reached, first - 1)
    return settled if settled >= 0 else None
