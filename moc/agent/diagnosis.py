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

__all__ = ["diagnose", "status_of", "with_ages"]


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


def with_ages(rows: list[dict[str, object]], now_s: float) -> list[dict[str, object]]:
    """Return the trainers' rows, each with the seconds since its last heartbeat."""
    for row in rows:
        beat_ns = row.get("beat_ns")
        row["beat_age_s"] = now_s - beat_ns / 1e9 if isinstance(beat_ns, int) and beat_ns else None
    return rows


def status_of(custody: Custody | None, saves: Saves) -> dict[str, object]:
    """Return what an agent's status says of its life and its saves, a JSON value."""
    life = {
        "incarnation": None if custody is None else custody.life.record.number,
        "storage": None if custody is None else redact_url(str(custody.life.descriptor["storage"])),
        "global_step": None if custody is None else custody.global_step,
        "arena_bytes": 0 if custody is None else custody.arena.size_bytes,
        "versions": None if custody is None else custody.life.descriptor["versions"],
    }
    saved = {
        "last_committed_step": saves.last_committed_step,
        "persisting": saves.is_busy,
        "counters": saves.counters(),
        "last_error": saves.last_error,
    }
    return {**life, **saved}


def _descriptor(descriptor: Mapping[str, Any]) -> dict[str, object]:
    shown = {name: value for name, value in descriptor.items() if name not in ("catalogs", "fingerprint", "lineage")}
    catalogs = [
        {"rank": row["rank"], "shards": len(row["shards"]), "state_capacity_bytes": row["state_capacity_bytes"]}
        for row in descriptor["catalogs"]
    ]
    if "guests" in shown:
        shown["guests"] = [guest["node"] for guest in shown["guests"]]
    if "fellows" in shown:
        shown["fellows"] = {name: value for name, value in shown["fellows"].items() if name != "secret"}
    return {**shown, "storage": redact_url(str(descriptor["storage"])), "catalogs": catalogs}


def _arena(custody: Custody) -> dict[str, object]:
    arena = custody.arena
    return {
        "size_bytes": arena.size_bytes,
        "incarnation": custody.life.record.number,
        "newest_global": custody.stable,
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
