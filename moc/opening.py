"""How a rank opens what a recovery reads: a checkpoint in storage, or what its node's agent holds of a snapshot.

A candidate is opened whole or not at all; of an older layer a rank opens what its node has, be it nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import closing
from typing import Any

from moc.agent.client import AgentClient
from moc.agent.runtime import runtime_folder
from moc.errors import MocError, ShardCorruptError
from moc.format.keys import CheckpointName
from moc.host import Host
from moc.plan.lineage import PEERS, STORAGE, Candidate
from moc.recover import MemorySource, Source, StorageSource
from moc.repository import Repository
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.survey import Origin, Request
from moc.trace import Trace

__all__ = ["checkpoint_name", "map_arena", "open_source"]

log = logging.getLogger(__name__)

Opened = tuple[Source | None, Callable[[], None]]


def open_source(
    request: Request, origin: Origin, candidate: Candidate, rank: int, *, is_whole: bool, host: Host, trace: Trace
) -> Opened:
    """Return a candidate's source, and what closes it; None where this node has nothing of a layer.

    `is_whole`: it is the candidate itself, so all ranks of this node must have their part. Raises: MocError.
    """
    if candidate.source == STORAGE:
        repository = Repository(host.open_store(request.storage, trace=trace))
        try:
            manifest = repository.read_manifest(checkpoint_name(candidate))
            return StorageSource(repository, manifest, rank=rank), repository.close
        except MocError:
            repository.close()
            raise
    if candidate.source == PEERS:
        _fetch_replicas(request, origin, candidate, rank, host=host)
    arena = _map(request, origin.run, "source", host=host)
    records = {} if arena is None else _records_of(arena, candidate)
    ranks = [] if arena is None else [catalog.rank for catalog in arena.catalogs]
    missing = [rank for rank in ranks if rank not in records]
    if is_whole and (arena is None or missing):
        if arena is not None:
            arena.close()
        raise ShardCorruptError(f"seal is gone: candidate={candidate} ranks={missing or 'all of this node'}")
    if arena is None:
        return None, lambda: None
    if missing:
        log.warning("part of a snapshot is lost: %s ranks=%s", candidate, missing)
    return MemorySource(arena, records), arena.close


def _records_of(arena: Arena, candidate: Candidate) -> dict[int, SealRecord]:
    """Return the seals of a snapshot by rank, as an agent's inventory counts them."""
    wanted = (candidate.incarnation, candidate.step, candidate.attempt)
    return {
        record.rank: record
        for catalog in arena.catalogs
        for record in arena.seals(catalog.rank).values()
        if (record.incarnation, record.step, record.attempt) == wanted
    }


def _fetch_replicas(request: Request, origin: Origin, candidate: Candidate, rank: int, *, host: Host) -> None:
    """Have this node's agent fetch what the node lacks of a snapshot, or has rotten. Every rank of the node asks.

    Blocks: until it has. Raises: ShardCorruptError if it cannot be had.
    """
    snapshot = (candidate.incarnation, candidate.step, candidate.attempt)
    places: Any = origin.replicas["places"]
    fields = {name: origin.replicas[name] for name in ("run", "life", "nodes", "secret")} | {
        "incarnation": candidate.incarnation,
        "step": candidate.step,
        "attempt": candidate.attempt,
        "rank": rank,
        "budget": request.config.memory_budget_bytes,
        "storage": request.storage,
        "places": [place[3:] for place in places if tuple(place[:3]) == snapshot],
    }
    folder, timeout_s = runtime_folder(origin.run, request.runtime_root), request.config.timeout_s
    try:
        with closing(AgentClient.connect(folder, timeout_s=timeout_s, host=host)) as client:
            reply, _ = client.request("restock", fields, timeout_s=timeout_s)
    except MocError as error:  # a refusal too: what this node cannot have is no reason not to try an older state
        raise ShardCorruptError(f"replicas cannot be had: candidate={candidate} reason={error}") from error
    if "problem" in reply:
        raise ShardCorruptError(f"replicas cannot be had: candidate={candidate} reason={reply['problem']}")
    log.info("replicas fetched: candidate=%s rank=%d bytes=%s", candidate, rank, reply.get("bytes"))


def checkpoint_name(candidate: Candidate) -> CheckpointName:
    """Return the name of a candidate in storage."""
    return CheckpointName(
        run=candidate.run, incarnation=candidate.incarnation, step=candidate.step, attempt=candidate.attempt
    )


def map_arena(request: Request, run: str, *, host: Host) -> Arena:
    """Map the arena of the present life. Raises: MocError."""
    arena = _map(request, run, "arena", host=host)
    assert arena is not None, "the agent has begun the life"
    return arena


def _map(request: Request, run: str, verb: str, *, host: Host) -> Arena | None:
    """Map the agent's arena: that of the present life ("arena"), or that a recovery reads from ("source"), None if it
    has none.
    """
    folder = runtime_folder(run, request.runtime_root)
    with closing(AgentClient.connect(folder, timeout_s=request.config.timeout_s, host=host)) as client:
        _, descriptors = client.request(verb)
    for extra in descriptors[1:]:
        os.close(extra)
    return Arena.attach(descriptors[0]) if descriptors else None
