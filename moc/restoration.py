"""The restore of the best candidate: all ranks try one after the other until one can be restored whole.

A candidate whose bytes are bad or gone is passed over. One that storage does not give is tried again, since a storage
that is away for a moment must not cost a checkpoint; it is passed over only where the repository gives other things and
an older candidate is restored instead (docs/decisions/, record 16). A rejected candidate leaves the state partly
overwritten, never the outcome: the next one overwrites all of it, or the attach fails.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moc import errors
from moc.agent.client import AgentClient
from moc.agent.runtime import runtime_folder
from moc.agreement import agree, decide, exchange
from moc.errors import (
    IntegrityError,
    MocError,
    NoCheckpointError,
    ObjectMissingError,
    RankFailedError,
    ShardCorruptError,
    StorageError,
    StoreDeniedError,
)
from moc.format.keys import CheckpointName
from moc.format.tagged import decode_state, encode_state, expect_mapping
from moc.host import Host
from moc.plan.lineage import STORAGE, Candidate
from moc.recover import MemorySource, Rejection, Source, StorageSource, reasons_for_drift, restore_shards
from moc.repository import Repository
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.survey import Origin, Request
from moc.trace import Trace
from moc.training import TrainingState, World

__all__ = ["Restored", "map_arena", "restore_best"]

log = logging.getLogger(__name__)

WEIGHT_PARTS = ("master", "weight")
READ_ATTEMPTS = 3  # of a candidate that storage does not give: what passes by itself passes within seconds
READ_DELAY_S = 2.0  # between them; a remote store has repeated each request for longer before


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was restored, and what was passed over for it."""

    candidate: Candidate
    bytes_per_rank: tuple[int, ...]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]


def restore_best(
    request: Request,
    origin: Origin,
    wanted: Sequence[Candidate],
    state: TrainingState,
    world: World,
    *,
    software: Mapping[str, str],
    host: Host,
    trace: Trace,
) -> Restored | None:
    """Restore the first candidate that can be restored; None if none is wanted. Collective.

    Raises the same error on every rank: NoCheckpointError where all are damaged, StorageError where storage does not
    give what there is, and whatever is no fault of a candidate.
    """
    rejected: list[Rejection] = []
    unread: list[tuple[Candidate, MocError]] = []
    for candidate in wanted:
        try:
            sizes, notes = _restore_patiently(
                request, origin, candidate, state, world, software=software, host=host, trace=trace
            )
        except MocError as error:
            if _is_unread(error, candidate):
                if candidate == wanted[-1] or not _repository_answers(request, wanted, world, host=host, trace=trace):
                    raise
                unread.append((candidate, error))
            elif not _is_rejection(error):
                raise
            log.warning("candidate rejected: %s reason=%s", candidate, error)
            rejected.append(Rejection(candidate=str(candidate), reason=str(error)))
            continue
        notes += tuple(_note_unread(passed) for passed, _ in unread)
        return Restored(candidate=candidate, bytes_per_rank=tuple(sizes), rejected=tuple(rejected), notes=notes)
    if unread:
        raise unread[0][1]
    if rejected:
        raise NoCheckpointError(
            "no candidate could be restored: " + "; ".join(f"{r.candidate}: {r.reason}" for r in rejected)
        )
    return None


def _note_unread(candidate: Candidate) -> str:
    return (
        f"a newer checkpoint was passed over because storage does not give it: {candidate}; it is off the lineage now, "
        f"and `moc rewind --step {candidate.step}-{candidate.attempt}` brings it back once it can be read"
    )


def _is_rejection(error: MocError) -> bool:
    """Return whether the error says that the candidate's bytes are bad or gone, on whatever rank."""
    classes = _classes(error)
    return bool(classes) and all(issubclass(c, (IntegrityError, ObjectMissingError)) for c in classes)


def _is_unread(error: MocError, candidate: Candidate) -> bool:
    """Return whether storage holds the candidate, as far as one can tell, and yet does not give it."""
    classes = _classes(error)
    is_of_storage = all(issubclass(c, (IntegrityError, StorageError)) for c in classes)
    # Missing rights are somebody's mistake, and mended by somebody.
    is_denied = any(issubclass(c, StoreDeniedError) for c in classes)
    return candidate.source == STORAGE and is_of_storage and not is_denied and not _is_rejection(error)


def _classes(error: MocError) -> list[type]:
    kinds = sorted(error.kinds) if isinstance(error, RankFailedError) else [type(error).__name__]
    return [getattr(errors, kind, MocError) for kind in kinds]


def _repository_answers(
    request: Request, wanted: Sequence[Candidate], world: World, *, host: Host, trace: Trace
) -> bool:
    """Return whether storage gives FORMAT and a candidate's manifest, so that it refuses single objects. Collective."""

    def look() -> dict[str, object]:
        try:
            repository = Repository(host.open_store(request.storage, trace=trace))
        except StorageError:
            return {"answers": False}
        try:
            return {"answers": repository.exists() and any(_has_manifest(repository, c) for c in wanted)}
        except (StorageError, IntegrityError):
            return {"answers": False}
        finally:
            repository.close()

    return bool(decide(world, look)["answers"])


def _has_manifest(repository: Repository, candidate: Candidate) -> bool:
    if candidate.source != STORAGE:
        return False
    try:
        repository.read_manifest(_checkpoint_name(candidate))
    except (StorageError, IntegrityError):
        return False
    return True


def _restore_patiently(
    request: Request,
    origin: Origin,
    candidate: Candidate,
    state: TrainingState,
    world: World,
    *,
    software: Mapping[str, str],
    host: Host,
    trace: Trace,
) -> tuple[list[int], tuple[str, ...]]:
    """Restore as `_try_restore`, again and after a pause where storage does not give the candidate."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return _try_restore(request, origin, candidate, state, world, software=software, host=host, trace=trace)
        except MocError as error:
            if attempt == READ_ATTEMPTS or not _is_unread(error, candidate):
                raise
            log.warning("storage does not give a candidate, trying again: %s reason=%s", candidate, error)
        host.sleep(READ_DELAY_S)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _try_restore(
    request: Request,
    origin: Origin,
    candidate: Candidate,
    state: TrainingState,
    world: World,
    *,
    software: Mapping[str, str],
    host: Host,
    trace: Trace,
) -> tuple[list[int], tuple[str, ...]]:
    """Restore one candidate on all ranks; return bytes by rank, and what the user should know.

    Raises one error on all ranks if any rank fails.
    """

    def restore() -> tuple[int, Mapping[str, object], bool, tuple[str, ...]]:
        with trace.span("recover.restore", source=candidate.source, step=candidate.step, rank=world.rank):
            source, close = _open_source(request, origin, candidate, world.rank, host=host, trace=trace)
            try:
                notes: tuple[str, ...] = ()
                if request.restore != "weights":
                    notes = reasons_for_drift(
                        stored_ranks=source.world_size,
                        ranks=world.size,
                        stored_software=source.software,
                        software=software,
                    )
                return *_restore(request, source, candidate, state, world, host=host, trace=trace), notes
            finally:
                close()

    size, tree, is_exact, notes = agree(world, restore)
    with trace.span("recover.apply", step=candidate.step, rank=world.rank):
        agree(world, lambda: state.apply(tree))  # agreed upon before the collective: a failed rank would not take part
        agree(world, state.derive_weights)
        agree(world, lambda: state.finish_restore(tree, exact_rank=is_exact))
    return [int(str(value)) for value in exchange(world, size)], notes


def _restore(
    request: Request,
    source: Source,
    candidate: Candidate,
    state: TrainingState,
    world: World,
    *,
    host: Host,
    trace: Trace,
) -> tuple[int, Mapping[str, object], bool]:
    if request.restore == "weights":
        own = encode_state(state.capture()).to_bytes()
        state.begin_restore()
        size = restore_shards(source, state, candidate, parts=WEIGHT_PARTS, host=host, trace=trace)
        return size, expect_mapping(decode_state(own), "state"), True
    tree, is_exact = source.state(world.rank)
    state.begin_restore()
    size = restore_shards(source, state, candidate, parts=None, host=host, trace=trace)
    return size, expect_mapping(tree, "state"), is_exact


def _open_source(
    request: Request, origin: Origin, candidate: Candidate, rank: int, *, host: Host, trace: Trace
) -> tuple[Source, Any]:
    if candidate.source == STORAGE:
        repository = Repository(host.open_store(request.storage, trace=trace))
        name = _checkpoint_name(candidate)
        try:
            return StorageSource(repository, repository.read_manifest(name), rank=rank), repository.close
        except MocError:
            repository.close()
            raise
    arena = map_arena(request, origin.run, "source", host=host)
    records: dict[int, SealRecord] = {}
    for holder in (catalog.rank for catalog in arena.catalogs):
        for record in arena.seals(holder).values():
            if (record.incarnation, record.step, record.attempt) == (
                candidate.incarnation,
                candidate.step,
                candidate.attempt,
            ):
                records[holder] = record
    missing = sorted({catalog.rank for catalog in arena.catalogs} - set(records))
    if missing:
        arena.close()
        raise ShardCorruptError(f"seal is gone: candidate={candidate} ranks={missing}")
    return MemorySource(arena, records), arena.close


def _checkpoint_name(candidate: Candidate) -> CheckpointName:
    return CheckpointName(
        run=candidate.run, incarnation=candidate.incarnation, step=candidate.step, attempt=candidate.attempt
    )


def map_arena(request: Request, run: str, verb: str, *, host: Host) -> Arena:
    """Map the agent's arena: that of the present life ("arena"), or that a recovery reads from ("source")."""
    folder = runtime_folder(run, request.runtime_root)
    client = AgentClient.connect(folder, timeout_s=request.config.timeout_s, host=host)
    try:
        _, descriptors = client.request(verb)
    finally:
        client.close()
    for extra in descriptors[1:]:
        os.close(extra)
    return Arena.attach(descriptors[0])
