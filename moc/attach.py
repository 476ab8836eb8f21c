"""The beginning of a life:

find the run, fence earlier lives, choose a state along the lineage, restore it, write the life's record.

Order matters. The agent kills what is left of earlier lives before anything is chosen; the incarnation record is
written before the new life may write anything else; the recovery source stays pinned until the new life has a global
snapshot. A crash between any two steps leaves a chain on which the same state is found again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moc import errors
from moc.agent.client import AgentClient, ensure_agent
from moc.agent.runtime import remember_run, remembered_run, runtime_folder
from moc.agreement import agree, decide, exchange
from moc.clock import Clock
from moc.config import Config
from moc.errors import (
    IntegrityError,
    MismatchError,
    MocError,
    NoCheckpointError,
    ObjectMissingError,
    RankFailedError,
    ShardCorruptError,
    StoreUnavailableError,
    UsageError,
)
from moc.format.keys import CheckpointName, check_run_id
from moc.format.manifest import Incarnation, Parent, decode_incarnation, encode_incarnation
from moc.format.tagged import decode_state, encode_state, expect_mapping
from moc.plan.lineage import MEMORY, STORAGE, Candidate, Link, candidates, chain, merge_incarnations, tip
from moc.recover import MemorySource, RecoveryReport, Rejection, Source, StorageSource, restore_shards
from moc.repository import Repository
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.store.open import absolute_url, open_store
from moc.trace import Trace
from moc.training import TrainingState, World

__all__ = ["Origin", "Recovered", "Request", "recover_life", "write_life"]

log = logging.getLogger(__name__)

LIVE_BEAT_S = 15.0  # a job whose last step is older than this, and than 3 of its steps, is taken for hung
WATCH_INTERVAL_S = 0.1
WEIGHT_PARTS = ("master", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the caller of `attach` asked for."""

    storage: str
    config: Config
    restore: str | int
    run_id: str | None
    take_over: bool
    on_mismatch: tuple[str, ...]
    runtime_root: Path | None
    agent_idle_s: float
    fingerprint: Mapping[str, object]

    def __post_init__(self) -> None:
        is_step = isinstance(self.restore, int) and not isinstance(self.restore, bool) and self.restore >= 0
        if not is_step and self.restore not in ("auto", "never", "weights"):
            raise UsageError(
                f"restore is not usable: restore={self.restore!r} allowed='auto', 'never', 'weights' or a step"
            )
        if self.run_id is not None:
            check_run_id(self.run_id)
        object.__setattr__(self, "storage", absolute_url(self.storage))  # the agent works in another folder

    @property
    def url_digest(self) -> str:
        return hashlib.sha256(self.storage.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What rank 0 decided for all:

    the run, the new life's number, the chain, the candidates in order, and what to tell the user.
    """

    run: str
    number: int
    token: str
    lineage: tuple[Incarnation, ...]
    links: tuple[Link, ...]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    is_stored: bool

    def to_json(self) -> dict[str, object]:
        return {
            "run": self.run,
            "number": self.number,
            "token": self.token,
            "lineage": [encode_incarnation(record).decode() for record in self.lineage],
            "links": [[link.incarnation, link.last_step] for link in self.links],
            "candidates": [[c.source, c.run, c.incarnation, c.step, c.attempt] for c in self.candidates],
            "notes": list(self.notes),
            "is_stored": self.is_stored,
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Origin:
        return Origin(
            run=body["run"],
            number=body["number"],
            token=body["token"],
            lineage=tuple(decode_incarnation(text.encode(), name="lineage") for text in body["lineage"]),
            links=tuple(Link(incarnation=n, last_step=s) for n, s in body["links"]),
            candidates=tuple(
                Candidate(source=s, run=r, incarnation=i, step=n, attempt=a) for s, r, i, n, a in body["candidates"]
            ),
            notes=tuple(body["notes"]),
            is_stored=body["is_stored"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The outcome of the choice: where the new life comes from, and the report (None for a fresh start)."""

    origin: Origin
    parent: Parent | None
    reason: str
    report: RecoveryReport | None


def recover_life(
    request: Request, state: TrainingState, world: World, pids: Sequence[int], *, clock: Clock, trace: Trace
) -> Recovered:
    """Choose and restore a state.

    Collective. Raises the same error on every rank, before anything was written to storage.
    """
    began_s = clock.now_s()
    body = decide(world, lambda: _survey(request, pids, clock=clock, trace=trace).to_json())
    origin = Origin.from_json(body)
    surveyed_s = clock.now_s()
    if world.rank == 0:
        for note in origin.notes:
            log.warning("%s", note)
    wanted = agree(world, lambda: _wanted(request, origin, state))
    rejected: list[Rejection] = []
    for candidate in wanted:
        try:
            sizes = _try_restore(request, origin, candidate, state, world, trace=trace)
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
            seconds={"choose": surveyed_s - began_s, "restore": clock.now_s() - surveyed_s},
            rejected=tuple(rejected),
            notes=origin.notes,
        )
        is_weights = request.restore == "weights"
        parent = None if is_weights else candidate.as_parent()
        return Recovered(origin=origin, parent=parent, reason="weights" if is_weights else "recover", report=report)
    if rejected:
        raise NoCheckpointError(
            "no candidate could be restored: " + "; ".join(f"{r.candidate}: {r.reason}" for r in rejected)
        )
    return Recovered(origin=origin, parent=None, reason="start", report=None)


def write_life(request: Request, recovered: Recovered, world: World, *, trace: Trace) -> Incarnation:
    """Write the new life's record, from which on every earlier life is fenced. Collective.

    With storage down and memory recovered, the agent writes it before the first manifest.
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
        remember_run(request.runtime_root, request.url_digest, origin.run)
        if not origin.is_stored:
            return
        with trace.span("attach.record", incarnation=record.number):
            repository = Repository(open_store(request.storage, trace=trace))
            try:
                repository.create()
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


# Rank 0: what is there


def _survey(request: Request, pids: Sequence[int], *, clock: Clock, trace: Trace) -> Origin:
    notes: list[str] = []
    stored, checkpoints, run, is_stored = _survey_storage(request, notes, trace=trace)
    in_memory, snapshots = _survey_memory(request, run, pids, notes, clock=clock)
    if not is_stored and not snapshots:
        raise StoreUnavailableError(
            f"storage is unavailable and no snapshot is in memory: storage={request.storage} reason={notes[-1]}"
        )
    merged = merge_incarnations(stored, in_memory)
    newest = tip(merged)
    if newest:
        _refuse_mismatch(merged[newest].fingerprint, request)
    links = chain(merged, newest)
    # A life that only memory knows may have the number of a rewind that was written meanwhile: then its snapshots are
    # off the chain.
    outranked = {life.number for life in in_memory if merged[life.number].token != life.token}
    known = [
        *(
            Candidate(source=STORAGE, run=n.run, incarnation=n.incarnation, step=n.step, attempt=n.attempt)
            for n in checkpoints
        ),
        *(snapshot for snapshot in snapshots if snapshot.incarnation not in outranked),
    ]
    admissible = candidates(links, known)
    if links and not links[-1].is_known and not admissible and request.restore != "never":
        raise IntegrityError(
            "the lineage is broken, and nothing on its readable part can be restored: "
            f"missing_incarnation={links[-1].incarnation} "
            f"storage={request.storage} allowed=restore='never' for a fresh start, or a repaired record; notes={notes}"
        )
    return Origin(
        run=run,
        number=max([newest, *(name.incarnation for name in checkpoints)]) + 1,
        token=secrets.token_hex(4),
        lineage=tuple(merged[link.incarnation] for link in reversed(links) if link.is_known),
        links=links,
        candidates=admissible,
        notes=tuple(notes),
        is_stored=is_stored,
    )


def _survey_storage(
    request: Request, notes: list[str], *, trace: Trace
) -> tuple[tuple[Incarnation, ...], list[CheckpointName], str, bool]:
    """Return records, checkpoints, run id, and whether the storage answered.

    StoreUnavailableError is noted, others are raised.
    """
    remembered = remembered_run(request.runtime_root, request.url_digest)
    try:
        repository = Repository(open_store(request.storage, trace=trace))
        try:
            if not repository.exists():
                if remembered is not None:
                    _refuse_vanished(request, remembered)
                repository.create()
                return (), [], request.run_id or secrets.token_hex(4), True
            records, findings = repository.incarnations()
            names = [checkpoint.name for checkpoint in repository.checkpoints()]
            numbers = repository.incarnation_numbers()
        finally:
            repository.close()
    except StoreUnavailableError as error:
        notes.append(f"storage is unavailable: {error}")
        run = request.run_id or remembered
        if run is None:
            raise
        return (), [], run, False
    notes.extend(f"incarnation record is unreadable: {finding}" for finding in findings)
    if findings and numbers and numbers[-1][1] > max((r.number for r in records), default=0):
        raise IntegrityError(f"the newest incarnation record is unreadable, so the lineage is unknown: {findings[-1]}")
    runs = sorted({run for run, _ in numbers})
    run = request.run_id or (numbers[-1][0] if numbers else secrets.token_hex(4))
    if any(other != run for other in runs) and not request.take_over:
        raise MismatchError(
            f"repository belongs to another run: storage={request.storage} run_id={run} allowed={runs}, or take_over"
        )
    return records, names, run, True


def _refuse_vanished(request: Request, remembered: str) -> None:
    """Raise MismatchError where the repository is empty, but an agent still holds snapshots of a run that used this
    place.

    The folder may not be mounted, or somebody deleted it: starting from nothing must be asked for.
    """
    if request.run_id is not None or request.restore == "never":
        return
    try:
        client = AgentClient.connect(
            runtime_folder(remembered, request.runtime_root), timeout_s=request.config.timeout_s
        )
    except StoreUnavailableError:
        return
    try:
        status = client.status()
    finally:
        client.close()
    if status.get("arena_bytes"):
        raise MismatchError(
            f"the repository is empty, but an agent holds snapshots of run {remembered} that used it: "
            f"storage={request.storage} "
            f"global_step={status.get('global_step')} allowed=run_id={remembered!r} to go on with them, or "
            "restore='never' to start anew"
        )


def _survey_memory(
    request: Request, run: str, pids: Sequence[int], notes: list[str], *, clock: Clock
) -> tuple[list[Incarnation], list[Candidate]]:
    """Start the agent if need be, end what is left of earlier lives, and return the lives and snapshots it holds."""
    client = ensure_agent(
        runtime_folder(run, request.runtime_root),
        run=run,
        idle_s=request.agent_idle_s,
        timeout_s=request.config.timeout_s,
        before_drain=lambda old: _refuse_live_job(old, pids, clock=clock),
    )
    try:
        _refuse_live_job(client, pids, clock=clock)
        fenced, _ = client.request("fence", {"spare_pids": list(pids)})
        if fenced["killed"]:
            notes.append(f"killed trainers of an earlier life: pids={fenced['killed']}")
        if fenced["quarantined"]:
            notes.append(
                f"trainers that cannot be killed, their memory is not used again: pids={fenced['quarantined']}"
            )
        inventory, _ = client.request("inventory")
    finally:
        client.close()
    if not inventory["has_arena"]:
        return [], []
    notes.extend(f"seal record is corrupt: rank={rank} record={record}" for rank, record in inventory["corrupt"])
    notes.extend(
        f"snapshot is incomplete: step={step} sealed by ranks {ranks}" for _, step, _, ranks in inventory["incomplete"]
    )
    lives = [decode_incarnation(text.encode(), name="arena lineage") for text in inventory["lineage"]]
    lives[-1] = replace(lives[-1], fingerprint=inventory["fingerprint"])
    return lives, [
        Candidate(source=MEMORY, run=run, incarnation=number, step=step, attempt=attempt)
        for number, step, attempt in inventory["snapshots"]
    ]


def _refuse_live_job(client: AgentClient, pids: Sequence[int], *, clock: Clock) -> None:
    """Raise UsageError if an earlier life of this run still trains; wait while that is not clear.

    A life trains if all its trainers here are alive and their step advances: with one dead the collectives of the
    others cannot end.
    """
    first: dict[int, object] = {}
    while True:
        inventory, _ = client.request("inventory")
        rows = [row for row in inventory["live"] if row["pid"] not in pids]
        if not rows or not all(row["alive"] for row in rows):
            return
        beats = {row["rank"]: (row.get("beat_step"), row.get("beat_ns")) for row in rows}
        first = first or dict(beats)
        if any(beats[rank] != first.get(rank) for rank in beats):
            raise UsageError(
                f"another job of this run is training: pids={[row['pid'] for row in rows]} "
                f"incarnation={rows[0]['incarnation']} "
                "allowed=one job per repository; stop it first"
            )
        newest_ns = max(row.get("beat_ns") or 0 for row in rows)
        patience_s = max(LIVE_BEAT_S, 3e-9 * max(row.get("beat_interval_ns") or 0 for row in rows))
        if clock.now_s() - newest_ns * 1e-9 > patience_s:
            return
        clock.sleep(WATCH_INTERVAL_S)


def _refuse_mismatch(stored: Mapping[str, object], request: Request) -> None:
    """Raise MismatchError listing every fingerprint key that differs and is not allowed by name."""
    differing = [
        f"{key}: stored={_short(stored.get(key))} given={_short(request.fingerprint.get(key))}"
        for key in sorted(set(stored) | set(request.fingerprint))
        if stored.get(key) != request.fingerprint.get(key) and key not in request.on_mismatch
    ]
    if differing:
        raise MismatchError(
            f"repository holds another model or experiment: storage={request.storage}; {'; '.join(differing)}; "
            "allowed=equal values, or the keys named in on_mismatch"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Every rank: restore


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
        raise NoCheckpointError(f"no checkpoint to take weights from: storage={request.storage}")
    if wanted and state.step and wanted[0].step != state.step and request.restore != "weights":
        raise MismatchError(
            f"the engine has already stepped: engine_step={state.step} candidate={wanted[0]} allowed=a fresh engine, "
            "or restore='never'"
        )
    return wanted


def _try_restore(
    request: Request, origin: Origin, candidate: Candidate, state: TrainingState, world: World, *, trace: Trace
) -> list[int]:
    """Restore one candidate on all ranks; return bytes by rank. Raises one error on all ranks if any rank fails."""

    def restore() -> tuple[int, Mapping[str, object], bool]:
        with trace.span("recover.restore", source=candidate.source, step=candidate.step, rank=world.rank):
            source, close = _open_source(request, origin, candidate, world.rank, trace=trace)
            try:
                return _restore(request, source, candidate, state, world, trace=trace)
            finally:
                close()

    size, tree, is_exact = agree(world, restore)
    agree(world, lambda: state.apply(tree))  # agreed upon before the collective: a rank that failed would not take part
    agree(world, state.derive_weights)
    agree(world, lambda: state.finish_restore(tree, exact_rank=is_exact))
    return [int(str(value)) for value in exchange(world, size)]


def _restore(
    request: Request, source: Source, candidate: Candidate, state: TrainingState, world: World, *, trace: Trace
) -> tuple[int, Mapping[str, object], bool]:
    if request.restore == "weights":
        own = encode_state(state.capture()).to_bytes()
        state.begin_restore()
        size = restore_shards(source, state, candidate, parts=WEIGHT_PARTS, trace=trace)
        return size, expect_mapping(decode_state(own), "state"), True
    tree, is_exact = source.state(world.rank)
    state.begin_restore()
    size = restore_shards(source, state, candidate, parts=None, trace=trace)
    return size, expect_mapping(tree, "state"), is_exact


def _open_source(
    request: Request, origin: Origin, candidate: Candidate, rank: int, *, trace: Trace
) -> tuple[Source, Any]:
    if candidate.source == STORAGE:
        repository = Repository(open_store(request.storage, trace=trace))
        name = CheckpointName(
            run=candidate.run, incarnation=candidate.incarnation, step=candidate.step, attempt=candidate.attempt
        )
        try:
            return StorageSource(repository, repository.read_manifest(name), rank=rank), repository.close
        except MocError:
            repository.close()
            raise
    arena = _map_source(request, origin.run)
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


def _map_source(request: Request, run: str) -> Arena:
    client = AgentClient.connect(runtime_folder(run, request.runtime_root), timeout_s=request.config.timeout_s)
    try:
        _, descriptors = client.request("source")
    finally:
        client.close()
    for extra in descriptors[1:]:
        os.close(extra)
    return Arena.attach(descriptors[0])
