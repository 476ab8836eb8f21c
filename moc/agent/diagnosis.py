"""What the agent knows beyond its status, for `moc doctor`: the life, the arena's records and words, saves, last spans.

Nothing here is a secret: storage is a URL without user and query, and of the catalogs only sizes are told.
Thread: the agent's main thread.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moc.agent.custody import Custody
from moc.agent.saves import Saves
from moc.snapshot.arena import Arena
from moc.store.redact import redact_url
from moc.trace import RingSink

__all__ = ["diagnose"]


def diagnose(custody: Custody | None, saves: Saves, spans: RingSink, *, connections: int) -> dict[str, object]:
    """Return the agent's diagnosis, a JSON value."""
    process = {
        "connections": connections,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "descriptor_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    return {
        "process": process,
        "saves": saves.outcomes(),
        "spans": spans.rows(),
        "descriptor": None if custody is None else _descriptor(custody.life.descriptor),
        "arena": None if custody is None else _arena(custody),
        "earlier_arena": None if custody is None or custody.earlier is None else _arena(custody.earlier),
    }


def _descriptor(descriptor: Mapping[str, Any]) -> dict[str, object]:
    shown = {name: value for name, value in descriptor.items() if name not in ("catalogs", "fingerprint", "lineage")}
    catalogs = [
        {"rank": row["rank"], "shards": len(row["shards"]), "state_capacity_bytes": row["state_capacity_bytes"]}
        for row in descriptor["catalogs"]
    ]
    if "fellows" in shown:
        shown["fellows"] = {name: value for name, value in shown["fellows"].items() if name != "secret"}
    return {**shown, "storage": redact_url(str(descriptor["storage"])), "catalogs": catalogs}


def _arena(custody: Custody) -> dict[str, object]:
    arena = custody.arena
    return {
        "size_bytes": arena.size_bytes,
        "incarnation": custody.life.record.number,
        "newest_global": custody.newest,
        "pinned": sorted([incarnation, *moment] for incarnation, moment in custody.pinned()),
        "unfinished_saves": sorted(map(list, custody.unfinished_saves())),
        "hopeless": [[*moment, list(ranks)] for moment, ranks in sorted(custody.hopeless.items())],
        "ranks": [_rank(arena, rank) for rank in custody.life.ranks],
    }


def _rank(arena: Arena, rank: int) -> dict[str, object]:
    seals = {
        str(index): {
            "incarnation": seal.incarnation,
            "step": seal.step,
            "attempt": seal.attempt,
            "flags": seal.flags,
            "state_bytes": seal.state_bytes,
        }
        for index, seal in sorted(arena.seals(rank).items())
    }
    return {
        "rank": rank,
        "words": asdict(arena.words(rank)),
        "skipped": arena.skipped(rank),
        "records": arena.rank_layout(rank).versions,
        "slots_bytes": arena.rank_layout(rank).slots_bytes,
        "seals": seals,
        "corrupt": [seal.record for seal in arena.corrupt_seals(rank)],
    }
