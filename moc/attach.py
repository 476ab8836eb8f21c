"""The beginning of a life: find the run, fence earlier lives, choose a state along the lineage, restore it, write the
life's record.

Order matters. The agent kills what is left of earlier lives before anything is chosen; the incarnation record is
written before the new life may write anything else; the recovery source stays pinned until the new life has a global
snapshot. A crash between any two steps leaves a chain on which the same state is found again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moc.agent.runtime import remember_run
from moc.agreement import agree, decide
from moc.errors import MismatchError, NoCheckpointError
from moc.facts import Facts
from moc.format.manifest import Incarnation, Parent
from moc.holdings import gather_holdings
from moc.host import Host
from moc.plan.lineage import STORAGE, Candidate
from moc.plan.versions import expert_sizes
from moc.report import RecoveryReport
from moc.repository import Repository
from moc.restoration import restore_best
from moc.routing import Routing
from moc.survey import Origin, Request, Stored, refuse_other_runs, survey, survey_storage
from moc.trace import Trace
from moc.training import TrainingState, World

__all__ = ["Origin", "Recovered", "Request", "begin_anew", "recover_life", "write_life"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The outcome of the choice: where the new life comes from, and the report (None for a fresh start).

    `layers` are the snapshots in memory that the state comes from, the parent's first, which names no attempt; they are
    needed until the life has a global snapshot. `base` is the newest checkpoint at or below that state, which memory
    may have more of until the life has one of its own. `routing` is what the state says about routes, None where
    nothing counts them.
    """

    origin: Origin
    parent: Parent | None
    reason: str
    report: RecoveryReport | None
    layers: tuple[Candidate, ...] = ()
    base: Candidate | None = None
    routing: Routing | None = None


def recover_life(
    request: Request,
    state: TrainingState,
    world: World,
    facts: Facts,
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
        origin = _survey(request, world, facts, host=host, trace=trace)
    surveyed_s = host.now_s()
    if world.rank == 0:
        for note in origin.notes:
            log.warning("%s", note)
    wanted = agree(world, lambda: _wanted(request, origin, state))
    sizes = expert_sizes(facts.catalogs)
    restored = restore_best(
        request, origin, wanted, state, world, sizes=sizes, software=software, host=host, trace=trace
    )
    if restored is None:
        return Recovered(origin=origin, parent=None, reason="start", report=None)
    candidate = restored.candidate
    report = RecoveryReport(
        step=candidate.step,
        source=candidate.source,
        incarnation=origin.number,
        parent_incarnation=candidate.incarnation,
        run=origin.run,
        lineage=tuple((link.incarnation, link.last_step) for link in origin.links),
        bytes_per_rank=restored.bytes_per_rank,
        seconds={"choose": surveyed_s - began_s, "restore": host.now_s() - surveyed_s},
        rejected=restored.rejected,
        notes=origin.notes + restored.notes,
        stale=restored.stale,
        lost=restored.lost,
        plt=None if restored.routing is None else restored.routing.plt,
        experts=restored.experts,
    )
    if restored.stale and world.rank == 0:
        for line in (*report.origin_lines(), *report.loss_lines()):
            log.warning("%s", line)
    is_weights = request.restore == "weights"
    parent = None if is_weights else candidate.as_parent()
    layers = restored.layers if candidate.source == STORAGE else (candidate, *restored.layers)
    return Recovered(
        origin=origin,
        parent=parent,
        reason="weights" if is_weights else "recover",
        report=report,
        layers=() if is_weights else layers,
        base=None if is_weights else _base(origin, candidate),
        routing=restored.routing,
    )


def _base(origin: Origin, candidate: Candidate) -> Candidate | None:
    """Return the newest checkpoint on the lineage that is not after a candidate."""
    known = [c for c in origin.candidates if c.source == STORAGE and (c.incarnation, c.step) <= _place(candidate)]
    return max(known, key=lambda c: (*_place(c), c.attempt), default=None)


def _place(candidate: Candidate) -> tuple[int, int]:
    return candidate.incarnation, candidate.step


def _survey(request: Request, world: World, facts: Facts, *, host: Host, trace: Trace) -> Origin:
    """Look at storage, at the agents of all nodes, and decide where the new life comes from. Collective."""
    found: list[Stored] = []

    def look() -> dict[str, object]:
        stored = survey_storage(request, host=host, trace=trace)
        found.append(stored)
        return {"run": stored.run, "unstored": None if stored.is_stored else stored.notes[-1]}

    run = decide(world, look)
    unstored = None if run["unstored"] is None else str(run["unstored"])
    held = gather_holdings(request, str(run["run"]), unstored, world, facts, host=host, trace=trace)
    body = decide(world, lambda: survey(request, found[0], held, host=host, trace=trace).to_json())
    return Origin.from_json(body)


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
        anew = replace(origin, number=number, token=host.token(), links=(), candidates=(), layers=())
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

    `check` runs on every rank before anything is written, and raises if the life could not begin there. With storage
    down and memory recovered, the agent writes the record before the first manifest.
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
                repository.put_missing_incarnations(origin.lineage)
                repository.put_incarnation(record)
            finally:
                repository.close()

    agree(world, lambda: check(record))
    agree(world, put)
    return record


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
