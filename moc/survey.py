"""What there is to recover from: rank 0 looks at storage and at the node's agent, and decides for all ranks.

Nothing is chosen before the agent has killed what is left of earlier lives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient, ensure_agent
from moc.agent.runtime import remembered_run, runtime_folder
from moc.config import Config
from moc.errors import IntegrityError, MismatchError, StoreUnavailableError, UsageError
from moc.format.keys import CheckpointName, check_run_id
from moc.format.manifest import Incarnation, decode_incarnation, decode_lineage, encode_incarnation
from moc.host import Host
from moc.plan.lineage import MEMORY, STORAGE, Candidate, Link, candidates, chain, merge_incarnations, tip
from moc.repository import Repository
from moc.store.open import absolute_url
from moc.store.redact import redact_url
from moc.trace import Trace

__all__ = ["Origin", "Request", "refuse_mismatch", "refuse_other_runs", "survey"]

LIVE_BEAT_S = 15.0  # a job whose last step is older than this, and than 3 of its steps, is taken for hung
FIRST_STEP_S = 60.0  # before a first step there is no interval to judge by, and it may compile for long
WATCH_INTERVAL_S = 0.1


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


def survey(request: Request, pids: Sequence[int], *, host: Host, trace: Trace) -> Origin:
    notes: list[str] = []
    stored, checkpoints, run, is_stored = _survey_storage(request, notes, host=host, trace=trace)
    in_memory, snapshots = _survey_memory(request, run, pids, notes, is_stored=is_stored, host=host, trace=trace)
    if is_stored and not snapshots:
        stored, checkpoints = _list_again(request, host=host, trace=trace)
    if not is_stored and not snapshots:
        raise StoreUnavailableError(
            f"storage is unavailable and no snapshot is in memory: storage={request.place} reason={notes[-1]}"
        )
    merged = merge_incarnations(stored, in_memory)
    newest = tip(merged)
    if newest:
        refuse_mismatch(merged[newest].fingerprint, request)
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
            f"storage={request.place} allowed=restore='never' for a fresh start, or a repaired record; notes={notes}"
        )
    return Origin(
        run=run,
        number=max([newest, *(name.incarnation for name in checkpoints)]) + 1,
        token=host.token(),
        lineage=tuple(merged[link.incarnation] for link in reversed(links) if link.is_known),
        links=links,
        candidates=admissible,
        notes=tuple(notes),
        is_stored=is_stored,
    )


def _survey_storage(
    request: Request, notes: list[str], *, host: Host, trace: Trace
) -> tuple[tuple[Incarnation, ...], list[CheckpointName], str, bool]:
    """Return records, checkpoints, run id, and whether the storage answered.

    StoreUnavailableError is noted, others are raised.
    """
    remembered = remembered_run(request.runtime_root, request.url_digest)
    try:
        repository = Repository(host.open_store(request.storage, trace=trace))
        try:
            if not repository.exists():
                if remembered is not None:
                    _refuse_vanished(request, remembered, host=host)
                repository.create()
                return (), [], request.run_id or host.token(), True
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
    run = request.run_id or (numbers[-1][0] if numbers else host.token())
    refuse_other_runs(numbers, request, run)
    return records, names, run, True


def refuse_other_runs(numbers: Sequence[tuple[str, int]], request: Request, run: str) -> None:
    """Raise MismatchError if one of these lives is of another run, and its repository is not to be taken over."""
    runs = sorted({other for other, _ in numbers})
    if any(other != run for other in runs) and not request.take_over:
        raise MismatchError(
            f"repository belongs to another run: storage={request.place} run_id={run} allowed={runs}, or take_over"
        )


def _list_again(request: Request, *, host: Host, trace: Trace) -> tuple[tuple[Incarnation, ...], list[CheckpointName]]:
    """Return what an agent that was leaving, or of another version, has stored since the first look."""
    repository = Repository(host.open_store(request.storage, trace=trace))
    try:
        return repository.incarnations()[0], [checkpoint.name for checkpoint in repository.checkpoints()]
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


def _survey_memory(
    request: Request, run: str, pids: Sequence[int], notes: list[str], *, is_stored: bool, host: Host, trace: Trace
) -> tuple[list[Incarnation], list[Candidate]]:
    """Start the agent if need be, end what is left of earlier lives, and return the lives and snapshots it holds."""

    def before_drain(old: AgentClient) -> None:
        _refuse_live_job(old, pids, host=host)
        if not is_stored and old.status().get("arena_bytes"):
            raise StoreUnavailableError(
                f"an agent of another version holds snapshots that it cannot store now: folder={old.folder} "
                f"reason={notes[-1]}"
            )

    client = ensure_agent(
        runtime_folder(run, request.runtime_root),
        run=run,
        idle_s=request.agent_idle_s,
        timeout_s=request.config.timeout_s,
        before_drain=before_drain,
        host=host,
        trace=trace,
    )
    try:
        fenced: dict[str, Any] = {"unknown": True}
        while fenced["unknown"]:  # a trainer that has come to a young agent since the look: it may belong to a live job
            known = _refuse_live_job(client, pids, host=host)
            fenced, _ = client.request("fence", {"spare_pids": list(pids), "known_pids": known})
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
    return decode_lineage(inventory["lineage"], fingerprint=inventory["fingerprint"]), [
        Candidate(source=MEMORY, run=run, incarnation=number, step=step, attempt=attempt)
        for number, step, attempt in inventory["snapshots"]
    ]


def _refuse_live_job(client: AgentClient, pids: Sequence[int], *, host: Host) -> list[int]:
    """Raise UsageError if an earlier life of this run still trains; wait while that is not clear.

    Return the pids of the trainers that were looked at: those of a life that is over.

    A life trains if all its trainers here are alive and their step advances: with one dead the collectives of the
    others cannot end.
    """
    first: dict[int, object] = {}
    first_s = host.now_s()
    while True:
        inventory, _ = client.request("inventory")
        rows = [row for row in inventory["live"] if row["pid"] not in pids]
        if not rows or not all(row["alive"] for row in rows):
            return [row["pid"] for row in rows]
        beats = {row["rank"]: (row.get("beat_step"), row.get("beat_ns")) for row in rows}
        first = first or dict(beats)
        if any(beats[rank] != first.get(rank) for rank in beats):
            raise UsageError(
                f"another job of this run is training: pids={[row['pid'] for row in rows]} "
                f"incarnation={rows[0]['incarnation']} "
                "allowed=one job per repository; stop it first"
            )
        # A life that has just begun has no heartbeat yet: it counts as young as it can be.
        newest_s = max(row.get("beat_ns") or 0 for row in rows) * 1e-9 or first_s
        interval_ns = max(row.get("beat_interval_ns") or 0 for row in rows)
        patience_s = max(LIVE_BEAT_S, 3e-9 * interval_ns) if interval_ns else FIRST_STEP_S
        if host.now_s() - newest_s > patience_s:
            return [row["pid"] for row in rows]
        host.sleep(WATCH_INTERVAL_S)


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
