"""How a rank opens what a recovery reads: a checkpoint in storage, or a snapshot in memory, wherever its parts are.

A candidate is opened whole or not at all; of an older layer a rank opens what agents have, be it nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import closing

from moc.agent.client import AgentClient
from moc.agent.peers.lender import Doubts, LentPart, Snapshot, lenders_of
from moc.agent.runtime import runtime_folder
from moc.errors import MocError, ShardCorruptError
from moc.format.keys import CheckpointName
from moc.held import MemorySource, held_parts
from moc.host import Host
from moc.plan.lineage import PEERS, STORAGE, Candidate
from moc.recover import Source, StorageSource
from moc.repository import Repository
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.survey import Origin, Request
from moc.trace import Trace

__all__ = ["checkpoint_name", "map_arena", "open_source"]

log = logging.getLogger(__name__)

Opened = tuple[Source | None, Callable[[], None]]


def open_source(
    request: Request,
    origin: Origin,
    candidate: Candidate,
    rank: int,
    *,
    is_whole: bool,
    doubts: Doubts,
    host: Host,
    trace: Trace,
) -> Opened:
    """Return a candidate's source, and what closes it; None where nobody has anything of a layer.

    `is_whole`: it is the candidate itself, so no rank's part may be missing. `doubts` are those of the recovery.
    Raises: MocError.
    """
    if candidate.source == STORAGE:
        repository = Repository(host.open_store(request.storage, trace=trace))
        try:
            manifest = repository.read_manifest(checkpoint_name(candidate))
            return StorageSource(repository, manifest, rank=rank), repository.close
        except MocError:
            repository.close()
            raise
    snapshot = (candidate.incarnation, candidate.step, candidate.attempt)
    lenders = lenders_of(origin.lenders, snapshot)
    # A rank that the snapshot's life had not has nothing to bring back to where it was: it reads what it needs.
    if candidate.source == PEERS and rank in lenders:
        _fetch_replicas(request, origin, candidate, rank, host=host)
    arena = _map(request, origin.run, "source", host=host)
    records = {} if arena is None else _records_of(arena, snapshot)
    close: Callable[[], None] = _nothing if arena is None else arena.close
    here = [catalog.rank for catalog in arena.catalogs] if arena is not None and records else []
    missing = [other for other in here if other not in records and other not in lenders]
    if is_whole and (missing or not (records or lenders)):
        close()
        raise ShardCorruptError(f"seal is gone: candidate={candidate} ranks={missing or 'all'}")
    if missing:
        log.warning("part of a snapshot is lost: %s ranks=%s", candidate, missing)
    lent = {other: LentPart(snapshot, other, found, host=host, doubts=doubts) for other, found in lenders.items()}
    own = {} if arena is None else held_parts(arena, records)
    return (MemorySource(own, lent) if own or lent else None), close


def _nothing() -> None:
    """What closes what is not open."""


def _records_of(arena: Arena, snapshot: Snapshot) -> dict[int, SealRecord]:
    """Return an arena's seals of a snapshot by rank."""
    return {
        record.rank: record
        for catalog in arena.catalogs
        for record in arena.seals(catalog.rank).values()
        if (record.incarnation, record.step, record.attempt) == snapshot
    }


def _fetch_replicas(request: Request, origin: Origin, candidate: Candidate, rank: int, *, host: Host) -> None:
    """Have this node's agent bring back what the node has lost of a snapshot, or has rotten. Every rank asks.

    What it cannot bring back is read from where it is. Blocks: until it has. Raises: ShardCorruptError if it does not
    answer, or refuses.
    """
    fields = {
        "incarnation": candidate.incarnation,
        "step": candidate.step,
        "attempt": candidate.attempt,
        "rank": rank,
        "run": origin.run,
        "budget": request.config.memory_budget_bytes,
        "storage": request.storage,
        "lenders": origin.lenders,
    }
    folder, timeout_s = runtime_folder(origin.run, request.runtime_root), request.config.timeout_s
    try:
        with closing(AgentClient.connect(folder, timeout_s=timeout_s, host=host)) as client:
            reply, _ = client.request("restock", fields, timeout_s=timeout_s)
    except MocError as error:  # a refusal too: what this node cannot have is no reason not to try an older state
        raise ShardCorruptError(f"replicas cannot be had: candidate={candidate} reason={error}") from error
    if "problem" in reply:
        log.warning("replicas cannot be had here: candidate=%s rank=%d reason=%s", candidate, rank, reply["problem"])
    else:
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
