"""What the agent tells of lost tokens: what the newest snapshot that it sees says of them.

A snapshot's small state is read at most once, and only when somebody asks. Thread: the agent's main thread, which is
the one that frees records, so that what is read here stays.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from moc.agent.life import Life
from moc.errors import MocError
from moc.persist import read_capture
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord

__all__ = ["Losses"]

log = logging.getLogger(__name__)


class Losses:
    """The answer of the last snapshot that was read."""

    def __init__(self) -> None:
        self._read: tuple[int, int, str] | None = None
        self._facts: dict[str, object] | None = None

    def facts(self, life: Life, arena: Arena) -> dict[str, object] | None:
        """Return PLT, its limit, what is counted, and routes by MoE layer; None where nothing counts, or yet."""
        record = _newest(arena, life.record.number)
        if record is None:
            return None
        key = (record.incarnation, record.step, record.attempt)
        if key != self._read:
            self._facts, self._read = _facts(arena, record, life.descriptor), key
        return self._facts


def _newest(arena: Arena, incarnation: int) -> SealRecord | None:
    """Return the newest seal of this life by the lowest rank here: all ranks' snapshots of a step say the same."""
    rank = min(catalog.rank for catalog in arena.catalogs)
    records = [record for record in arena.seals(rank).values() if record.incarnation == incarnation]
    return max(records, key=lambda record: (record.step, record.attempt), default=None)


def _facts(arena: Arena, record: SealRecord, descriptor: Mapping[str, object]) -> dict[str, object] | None:
    try:
        capture = read_capture(arena, record)
    except MocError as error:
        log.warning("routes of a snapshot cannot be read: step=%d %s", record.step, error)
        return None
    if capture is None:
        return None
    config, routing = descriptor["config"], capture.routing
    assert isinstance(config, Mapping), "the descriptor was written by describe_life"
    return {
        "step": record.step,
        "plt": routing.plt,
        "plt_limit": config["plt_limit"],
        "basis": routing.basis,
        "routed": [sum(row) for row in routing.routed],
        "lost": list(routing.lost),
    }
