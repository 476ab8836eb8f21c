"""What there is to recover from: rank 0 looks at storage, hears what the agents hold (`moc.holdings`), and decides for
all ranks.

Nothing is chosen before the agents have killed what is left of earlier lives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient
from moc.agent.runtime import remembered_run, runtime_folder
from moc.config import Config
from moc.errors import IntegrityError, MismatchError, NoCheckpointError, StoreUnavailableError, UsageError
from moc.format.keys import CheckpointName, check_run_id
from moc.format.manifest import Incarnation, decode_incarnation, encode_incarnation
from moc.host import Host
from moc.plan.lineage import STORAGE, Candidate, Link, candidates, chain, merge_incarnations, tip
from moc.repository import Repository
from moc.store.open import absolute_url
from moc.store.redact import redact_url
from moc.trace import Trace

__all__ = [
    "Holdings",
    "Origin",
    "Request",
    "Stored",
    "refuse_mismatch",
    "refuse_other_runs",
    "survey",
    "survey_storage",
]


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
    node_address: str | None = None
    """Where agents of other nodes reach this node's: a name or an address of this machine. Not used on one node."""

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
    def place(self) -> str:
        """The storage URL without secrets, for messages."""
        return redact_url(self.storage)

    @property
    def url_digest(self) -> str:
        """16 hex digits of the place: other credentials do not make it another one, and it tells nothing of them."""
        return hashlib.sha256(self.place.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What rank 0 decided for all: the run, the new life's number, the chain, the candidates in order, and what to
    tell the user.

    `layers` are all that experts of a candidate may come from, in order: the candidates, and between them the snapshots
    in memory of which some ranks' parts are lost.
    """

    run: str
    number: int
    token: str
    lineage: tuple[Incarnation, ...]
    links: tuple[Link, ...]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    is_stored: bool
    layers: tuple[Candidate, ...]
    lenders: Mapping[str, object] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, object]:
        return {
            "run": self.run,
            "number": self.number,
            "token": self.token,
            "lineage": [encode_incarnation(record).decode() for record in self.lineage],
            "links": [[link.incarnation, link.last_step] for link in self.links],
            "candidates": [_candidate_to_json(candidate) for candidate in self.candidates],
            "layers": [_candidate_to_json(layer) for layer in self.layers],
            "notes": list(self.notes),
            "is_stored": self.is_stored,
            "lenders": dict(self.lenders),
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Origin:
        return Origin(
            run=body["run"],
            number=body["number"],
            token=body["token"],
            lineage=tuple(decode_incarnation(text.encode(), name="lineage") for text in body["lineage"]),
            links=tuple(Link(incarnation=n, last_step=s) for n, s in body["links"]),
            candidates=tuple(map(_candidate_from_json, body["candidates"])),
            layers=tuple(map(_candidate_from_json, body["layers"])),
            notes=tuple(body["notes"]),
            is_stored=body["is_stored"],
            lenders=body["lenders"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What rank 0 has found in storage, and the run that follows from it."""

    run: str
    is_stored: bool
    records: tuple[Incarnation, ...]
    checkpoints: tuple[CheckpointName, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What the agents of all nodes hold: the lives they remember, the snapshots that are whole, and who has which part.

    `torn` are the snapshots of which some ranks' parts are nowhere: layers at most.
    `lenders` is what other nodes need to get at it: see `moc.agent.peers.lender`. It holds secrets.
    """

    lives: tuple[Incarnation, ...]
    snapshots: tuple[Candidate, ...]
    notes: tuple[str, ...]
    torn: tuple[Candidate, ...] = ()
    lenders: Mapping[str, object] = field(default_factory=dict, repr=False)


def survey(request: Request, stored: Stored, held: Holdings, *, host: Host, trace: Trace) -> Origin:
    """Return where the new life comes from. Rank 0 only. Raises: MocError."""
    notes = [*stored.notes, *held.notes]
    records, checkpoints = stored.records, stored.checkpoints
    # Of several nodes an earlier life may have committed, and dropped, what memory does not hold whole by now.
    if stored.is_stored and (not held.snapshots or held.lenders):
        try:
            records, checkpoints = _list_again(request, host=host, trace=trace)
        except StoreUnavailableError as error:
            if not held.snapshots:
                raise
            notes.append(f"storage does not say what it has by now: {error}")
    if not stored.is_stored and not held.snapshots:
        raise StoreUnavailableError(
            f"storage is unavailable and no snapshot is in memory: storage={request.place} reason={stored.notes[-1]}"
        )
    merged = merge_incarnations(records, held.lives)
    newest = tip(merged)
    if newest:
        refuse_mismatch(merged[newest].fingerprint, request)
    links = chain(merged, newest)
    # A life that only memory knows may have the number of a rewind that was written meanwhile: then its snapshots are
    # off the chain.
    outranked = {life.number for life in held.lives if merged[life.number].token != life.token}
    known = [
        *(
            Candidate(source=STORAGE, run=n.run, incarnation=n.incarnation, step=n.step, attempt=n.attempt)
            for n in checkpoints
        ),
        *(snapshot for snapshot in held.snapshots if snapshot.incarnation not in outranked),
    ]
    torn = [snapshot for snapshot in held.torn if snapshot.incarnation not in outranked]
    admissible = candidates(links, known)
    if links and not links[-1].is_known and not admissible and request.restore != "never":
        raise IntegrityError(
            "the lineage is broken, and nothing on its readable part can be restored: "
            f"missing_incarnation={links[-1].incarnation} "
            f"storage={request.place} allowed=restore='never' for a fresh start, or a repaired record; notes={notes}"
        )
    if newest and merged[newest].reason == "rewind" and not admissible and request.restore != "never":
        # Retention may have dropped it while the rewind was written. To begin from nothing must be asked for.
        raise NoCheckpointError(
            f"the job was rewound to a checkpoint that is gone: incarnation={newest} parent={merged[newest].parent} "
            f"storage={request.place} allowed=`moc rewind` to one that `moc ls` shows, or restore='never'"
        )
    return Origin(
        run=stored.run,
        number=max([newest, *(name.incarnation for name in checkpoints)]) + 1,
        token=host.token(),
        lineage=tuple(merged[link.incarnation] for link in reversed(links) if link.is_known),
        links=links,
        candidates=admissible,
        notes=tuple(notes),
        is_stored=stored.is_stored,
        layers=candidates(links, [*known, *torn]),
        lenders=held.lenders,
    )


def _candidate_to_json(candidate: Candidate) -> list[object]:
    return [candidate.source, candidate.run, candidate.incarnation, candidate.step, candidate.attempt]


def _candidate_from_json(row: Sequence[Any]) -> Candidate:
    source, run, incarnation, step, attempt = row
    return Candidate(source=source, run=run, incarnation=incarnation, step=step, attempt=attempt)


def survey_storage(request: Request, *, host: Host, trace: Trace) -> Stored:
    """Return what storage holds. StoreUnavailableError is noted, others are raised."""
    notes: list[str] = []
    remembered = remembered_run(request.runtime_root, request.url_digest)
    try:
        repository = Repository(host.open_store(request.storage, trace=trace))
        try:
            if not repository.exists():
                if remembered is not None:
                    _refuse_vanished(request, remembered, host=host)
                repository.create()
                return Stored(run=request.run_id or host.token(), is_stored=True, records=(), checkpoints=(), notes=())
            records, findings = repository.incarnations()
            names = tuple(checkpoint.name for checkpoint in repository.checkpoints())
            numbers = repository.incarnation_numbers()
        finally:
            repository.close()
    except StoreUnavailableError as error:
        notes.append(f"storage is unavailable: {error}")
        run = request.run_id or remembered
        if run is None:
            raise
        return Stored(run=run, is_stored=False, records=(), checkpoints=(), notes=tuple(notes))
    notes.extend(f"incarnation record is unreadable: {finding}" for finding in findings)
    if findings and numbers and numbers[-1][1] > max((r.number for r in records), default=0):
        raise IntegrityError(f"the newest incarnation record is unreadable, so the lineage is unknown: {findings[-1]}")
    run = request.run_id or (numbers[-1][0] if numbers else host.token())
    refuse_other_runs(numbers, request, run)
    return Stored(run=run, is_stored=True, records=records, checkpoints=names, notes=tuple(notes))


def refuse_other_runs(numbers: Sequence[tuple[str, int]], request: Request, run: str) -> None:
    """Raise MismatchError if one of these lives is of another run, and its repository is not to be taken over."""
    runs = sorted({other for other, _ in numbers})
    if any(other != run for other in runs) and not request.take_over:
        raise MismatchError(
            f"repository belongs to another run: storage={request.place} run_id={run} allowed={runs}, or take_over"
        )


def _list_again(
    request: Request, *, host: Host, trace: Trace
) -> tuple[tuple[Incarnation, ...], tuple[CheckpointName, ...]]:
    """Return what an agent has stored and dropped since the first look: one that was leaving, of another version, or of
    several nodes.
    """
    repository = Repository(host.open_store(request.storage, trace=trace))
    try:
        return repository.incarnations()[0], tuple(checkpoint.name for checkpoint in repository.checkpoints())
    finally:
        repository.close()


def _refuse_vanished(request: Request, remembered: str, *, host: Host) -> None:
    """Raise MismatchError where the repository is empty, but an agent still holds snapshots of a run that used this
    place.

    The folder may not be mounted, or somebody deleted it: starting from nothing must be asked for.
    """
    if request.run_id is not None or request.restore == "never":
        return
    try:
        client = AgentClient.connect(
            runtime_folder(remembered, request.runtime_root), timeout_s=request.config.timeout_s, host=host
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
            f"storage={request.place} "
            f"global_step={status.get('global_step')} allowed=run_id={remembered!r} to go on with them, or "
            "restore='never' to start anew"
        )


def refuse_mismatch(stored: Mapping[str, object], request: Request) -> None:
    """Raise MismatchError listing every fingerprint key that differs and is not allowed by name."""
    differing = [
        f"{key}: stored={_short(stored.get(key))} given={_short(request.fingerprint.get(key))}"
        for key in sorted(set(stored) | set(request.fingerprint))
        if stored.get(key) != request.fingerprint.get(key) and key not in request.on_mismatch
    ]
    if differing:
        raise MismatchError(
            f"repository holds another model or experiment: storage={request.place}; {'; '.join(differing)}; "
            "allowed=equal values, or the keys named in on_mismatch"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
