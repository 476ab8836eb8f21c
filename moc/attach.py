"""The beginning of a life: find the run, fence earlier lives, choose a state along the lineage, restore it, write the
life's record.

Order matters. The agent kills what is left of earlier lives before anything is chosen; the incarnation record is
written before the new life may write anything else; the recovery source stays pinned until the new life has a global
snapshot. A crash between any two steps leaves a chain on which the same state is found again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moc import errors
from moc.agent.client import AgentClient
from moc.agent.runtime import remember_run, runtime_folder
from moc.agreement import agree, decide, exchange
from moc.errors import (
    IntegrityError,
    MismatchError,
    MocError,
    NoCheckpointError,
    ObjectMissingError,
    RankFailedError,
    ShardCorruptError,
)
from moc.format.keys import CheckpointName
from moc.format.manifest import Incarnation, Parent
from moc.format.tagged import decode_state, encode_state, expect_mapping
from moc.host import Host
from moc.plan.lineage import STORAGE, Candidate
from moc.recover import (
    MemorySource,
    RecoveryReport,
    Rejection,
    Source,
    StorageSource,
    reasons_for_drift,
    restore_shards,
)
from moc.repository import Repository
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.survey import Origin, Request, refuse_other_runs, survey
from moc.trace import Trace
from moc.training import TrainingState, World

__all__ = ["Origin", "Recovered", "Request", "begin_anew", "map_arena", "recover_life", "write_life"]

log = logging.getLogger(__name__)

WEIGHT_PARTS = ("master", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The outcome of the choice: where the new life comes from, and the report (None for a fresh start)."""

    origin: Origin
    parent: Parent | None
    reason: str
    report: RecoveryReport | None


def recover_life(
    request: Request,
    state: TrainingState,
    world: World,
    pids: Sequence[int],
    *,
    software: Mapping[str, str],
    host: Host,
    trace: Trace,
) -> Recovered:
    """Choose and restore a state; `software` are this life's versions.

    Collective. Raises the same error on every rank, before anything was written to storage.
    """
    began_s = host.now_s()
    with trace.span("attach.survey", rank=world.rank):
        body = decide(world, lambda: survey(request, pids, host=host, trace=trace).to_json())
    origin = Origin.from_json(body)
    surveyed_s = host.now_s()
    if world.rank == 0:
        for note in origin.notes:
            log.warning("%s", note)
    wanted = agree(world, lambda: _wanted(request, origin, state))
    rejected: list[Rejection] = []
    for candidate in wanted:
        try:
            sizes, notes = _try_restore(
                request, origin, candidate, state, world, software=software, host=host, trace=trace
            )
        except MocError as error:
            if not _is_rejection(error):
                raise  # a storage that is away for a moment must not cost a checkpoint: let the supervisor try again
            log.warning("candidate rejected: %s reason=%s", candidate, error)
            rejected.append(Rejection(candidate=str(candidate), reason=str(error)))
            continue
        report = RecoveryReport(
            step=candidate.step,
            source=candidate.source,
            incarnation=origin.number,
            parent_incarnation=candidate.incarnation,
            run=origin.run,
            lineage=tuple((link.incarnation, link.last_step) for link in origin.links),
            bytes_per_rank=tuple(sizes),
            seconds={"choose": surveyed_s - began_s, "restore": host.now_s() - surveyed_s},
            rejected=tuple(rejected),
            notes=origin.notes + notes,
        )
        is_weights = request.restore == "weights"
        parent = None if is_weights else candidate.as_parent()
        return Recovered(origin=origin, parent=parent, reason="weights" if is_weights else "recover", report=report)
    if rejected:
        raise NoCheckpointError(
            "no candidate could be restored: " + "; ".join(f"{r.candidate}: {r.reason}" for r in rejected)
        )
    return Recovered(origin=origin, parent=None, reason="start", report=None)


def begin_anew(
    request: Request, origin: Origin, lineage: tuple[Incarnation, ...], world: World, *, host: Host, trace: Trace
) -> Origin:
    """Return the origin of a life after those of `lineage` that grows from none of them. Collective."""

    def find() -> dict[str, object]:
        repository = Repository(host.open_store(request.storage, trace=trace))
        try:
            newest = max((number for _, number in repository.incarnation_numbers()), default=0)
        finally:
            repository.close()
        number = max(newest, lineage[-1].number) + 1
        anew = replace(origin, number=number, token=host.token(), links=(), candidates=())
        return replace(anew, lineage=lineage, is_stored=True).to_json()

    return Origin.from_json(decide(world, find))


def write_life(
    request: Request,
    recovered: Recovered,
    world: World,
    *,
    check: Callable[[Incarnation], None],
    host: Host,
    trace: Trace,
) -> Incarnation:
    """Write the new life's record, from which on every earlier life is fenced. Collective.

    `check` runs on rank 0 before anything is written, and raises if the life could not begin. With storage down and
    memory recovered, the agent writes the record before the first manifest.
    """
    origin = recovered.origin
    record = Incarnation(
        run=origin.run,
        number=origin.number,
        token=origin.token,
        parent=recovered.parent,
        reason=recovered.reason,
        fingerprint=request.fingerprint,
    )

    def put() -> None:
        if world.rank != 0:
            return
        check(record)
        if not origin.is_stored:
            remember_run(request.runtime_root, request.url_digest, origin.run)
            return
        with trace.span("attach.record", incarnation=record.number):
            repository = Repository(host.open_store(request.storage, trace=trace))
            try:
                repository.create()
                # A run may have begun since the survey.
                refuse_other_runs(repository.incarnation_numbers(), request, origin.run)
                remember_run(request.runtime_root, request.url_digest, origin.run)
                repository.put_incarnation(record)
            finally:
                repository.close()

    agree(world, put)
    return record


def _is_rejection(error: MocError) -> bool:
    """Return whether the error says that the candidate's bytes are bad or gone, on whatever rank."""
    kinds = error.kinds if isinstance(error, RankFailedError) else {type(error).__name__}
    classes = [getattr(errors, kind, None) for kind in kinds]
    return bool(classes) and all(
        isinstance(c, type) and issubclass(c, (IntegrityError, ObjectMissingError)) for c in classes
    )


def _wanted(request: Request, origin: Origin, state: TrainingState) -> tuple[Candidate, ...]:
    """Return the candidates to try; raises NoCheckpointError or MismatchError."""
    if request.restore == "never":
        return ()
    wanted = origin.candidates
    if isinstance(request.restore, int):
        wanted = tuple(c for c in wanted if c.step == request.restore)
        if not wanted:
            steps = sorted({c.step for c in origin.candidates})
            raise NoCheckpointError(f"no such step on the lineage: step={request.restore} available={steps}")
    if request.restore == "weights" and not wanted:
        raise NoCheckpointError(f"no checkpoint to take weights from: storage={request.place}")
    if wanted and state.step and wanted[0].step != state.step and request.restore != "weights":
        raise MismatchError(
            f"the engine has already stepped: engine_step={state.step} candidate={wanted[0]} allowed=a fresh engine, "
            "or restore='never'"
        )
    return wanted


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
        name = CheckpointName(
            run=candidate.run, incarnation=candidate.incarnation, step=candidate.step, attempt=candidate.attempt
        )
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
