"""The agent's persist thread: one save at a time, from sealed slots to a committed manifest, then retention.

A save that fails is reported to whoever waits for it and counted; nothing here can stop training.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moc.agent.composer import Composer
from moc.agent.jobs import Outcome, SaveJob, Written
from moc.agent.peers.council import Council
from moc.agent.peers.report import Contribution, Verdict
from moc.commit import CommitPlan, build_manifest, commit, refuse_if_fenced
from moc.errors import (
    FencedError,
    ManifestCorruptError,
    MocError,
    PlanDivergedError,
    SaveFailedError,
    StorageError,
    StoreUnavailableError,
)
from moc.format.keys import CheckpointName
from moc.format.manifest import Incarnation, Parent, decode_lineage
from moc.format.relative import StateBase
from moc.gc import Retention
from moc.host import Host
from moc.persist import Receipt, persist_rank
from moc.plan.composition import Composition
from moc.plan.offers import Offer, joined
from moc.repository import Repository
from moc.snapshot.seal import SealRecord
from moc.trace import Trace

__all__ = ["Outcome", "Persister", "SaveJob", "Written"]

log = logging.getLogger(__name__)

QUEUE_LIMIT = 2  # saves that somebody waits for; more are refused
WRITERS = 4  # ranks persisted at once


@dataclass(frozen=True, slots=True, kw_only=True)
class _Composed:
    """What a save consists of; `digest` is what the nodes have agreed on, None where none of them needed to.

    Small states are stored relative to `state`: of the job's lowest rank where nodes have offered, else of the node's.
    """

    composition: Composition
    state: StateBase | None
    digest: str | None = None


class Persister:
    """Owns the persist thread. Thread: public methods from one; `on_end` is called on the persist thread."""

    def __init__(self, *, on_end: Callable[[SaveJob, list[Outcome]], None], host: Host, trace: Trace) -> None:
        self._on_end, self._host, self._trace = on_end, host, trace
        self._jobs: deque[SaveJob | None] = deque()
        self._queued = host.semaphore()  # one permit per job in the queue
        self._repository: Repository | None = None
        self._retention: Retention | None = None
        self._composer: Composer | None = None
        self._prepared: tuple[str, int, str, int] | None = None
        self._commits_elsewhere = 0
        self._commits: list[CheckpointName] = []
        self.written: Written | None = None
        """By the newest save. Thread: any."""
        self._thread = host.spawn(self._run, name="moc-persist")

    def offer(self, job: SaveJob, *, is_last: bool = False) -> bool:
        """Queue a save; return False if the queue is full, which it never is for what an agent leaves with."""
        if len(self._jobs) >= QUEUE_LIMIT and not is_last:
            return False
        self._put(job)
        return True

    def list_again(self) -> None:
        """Have the next save look up what is committed: another node has committed what this one has not saved."""
        self._commits_elsewhere += 1

    def close(self) -> None:
        """Finish what is queued and stop. Blocks: for those saves."""
        self._put(None)
        self._thread.join()

    def _put(self, job: SaveJob | None) -> None:
        self._jobs.append(job)
        self._queued.release()

    def _run(self) -> None:
        while self._queued.acquire() and (job := self._jobs.popleft()) is not None:
            self._on_end(job, [self._attempt(job)] if job.records else self._recall(job))

    def _attempt(self, job: SaveJob) -> Outcome:
        """Save and say how it went: the thread's top, nothing escapes."""
        began_s = self._host.now_s()
        name, size, error = job.name, 0, None
        try:
            name, size = self._save(job)
        except SaveFailedError as failure:  # at another node: its words, everywhere
            error = str(failure)
            log.error("save failed: name=%s %s", job.name, error)
        except MocError as failure:
            error = f"{type(failure).__name__}: {failure}{_where(job)}"
            log.error("save failed: name=%s %s", job.name, error)
            if isinstance(failure, StorageError):
                self._prepared = None  # open the repository anew: the folder may have been replaced meanwhile
        except Exception as failure:  # a defect: recorded, reported, and the next save starts afresh
            error = f"InternalError: {type(failure).__name__}: {failure}{_where(job)}"
            log.exception("save failed: name=%s", job.name)
        if job.council is not None:
            if error is not None:
                self._prepared = None  # list anew: what failed here, or so it seemed, another node may have committed
            job.council.withdraw()
        return Outcome(name=name, size_bytes=size, seconds=self._host.now_s() - began_s, error=error)

    def _recall(self, job: SaveJob) -> list[Outcome]:
        """Return what the job's life has committed, nothing if the storage does not say."""
        try:
            self._prepare(job)
        except MocError as error:
            log.warning("cannot look up earlier commits: %s", error)
            return []
        except Exception:  # the thread's top: a defect here must not end the thread that all later saves need
            log.exception("cannot look up earlier commits")
            return []
        return [Outcome(name=name, size_bytes=0, seconds=0.0, error=None) for name in self._commits]

    def _save(self, job: SaveJob) -> tuple[CheckpointName, int]:
        """Return name and size of the checkpoint that has the job's moment."""
        repository, records = self._prepare(job), tuple(job.records.values())
        assert self._composer is not None, "prepared"
        if job.name in self._commits:
            # By an agent that died before it could say so; a key is written with one content only.
            return job.name, repository.read_manifest(job.name).written_bytes
        composed = self._compose(job, records)
        if not isinstance(composed, _Composed):
            return composed
        composition = composed.composition
        receipts = self._write(job, repository, composed)
        plan, parent = _commit_plan(job.descriptor), self._parent(job)
        if job.council is not None:
            joint = self._gather(job, job.council, parent, receipts, composed)
            if isinstance(joint, Verdict):
                return self._take_over(job, joint)
            receipts = [receipt for part in joint for receipt in part.receipts]
            if composed.digest is None:
                composition = replace(composition, routing=joint[0].routing)
        manifest = build_manifest(plan, job.name, parent, receipts, composition=composition)
        commit(repository, manifest, trace=self._trace)
        self._commits.append(job.name)
        if job.council is not None:  # before retention: another node waits a while only until it commits itself
            job.council.announce(Verdict(moment=job.target, size_bytes=manifest.written_bytes, error=None))
        self._composer.note_commit(manifest, composition, receipts)
        log.info("committed: name=%s bytes=%d kept=%d", job.name, manifest.written_bytes, len(composition.kept))
        self._retain(job)
        return manifest.name, manifest.written_bytes

    def _compose(self, job: SaveJob, records: Sequence[SealRecord]) -> _Composed | tuple[CheckpointName, int]:
        """Return what to write and to keep; or name and size of the checkpoint that makes this one needless.

        Blocks: for the offers of other nodes, where experts take turns. Raises PlanDivergedError where another node has
        composed something else.
        """
        composer, council = self._composer, job.council if job.is_offered else None
        assert composer is not None, "prepared before"
        mine = composer.offer(
            job.name,
            records,
            job.arena,
            job.descriptor,
            is_whole=job.is_whole,
            is_inherited=job.is_inherited,
            is_joint=council is not None,
            is_lowest=council is None or council.is_lowest,
            lenders=job.lenders,
        )
        offers: tuple[Offer, ...] = (mine,)
        if council is not None:
            with self._trace.span("save.offer", step=job.name.step, attempt=job.name.attempt, node=council.node):
                found = council.consult(mine, timeout_s=float(job.descriptor["timeout_s"]))
            if isinstance(found, Verdict):
                return self._take_over(job, found)
            offers = found
        if job.moment != job.target:
            stored = composer.stored(job.name, job.moment, offers)
            if stored is not None:
                return stored.name, stored.written_bytes
        composition = composer.compose(job.name, offers, job.descriptor)
        if council is None:
            return _Composed(composition=composition, state=mine.state)
        if composer.base is not None and composer.base.incarnation == job.life.number:
            self._commits = sorted({*self._commits, composer.base})  # of which another node may have known alone
        council.confirm(joined(mine, offers, composition.digest))
        return _Composed(composition=composition, state=offers[0].state, digest=composition.digest)

    def _write(self, job: SaveJob, repository: Repository, composed: _Composed) -> list[Receipt]:
        """Put the objects of this node's ranks."""
        experts = frozenset(composed.composition.written)
        records, began_s = tuple(job.records.values()), self._host.now_s()
        with self._trace.span("save.persist", step=job.name.step, attempt=job.name.attempt):
            receipts = self._host.map(
                lambda record: persist_rank(
                    job.arena, record, repository, experts=experts, base=composed.state, trace=self._trace
                ),
                records,
                workers=_writers(repository),
                name="moc-write",
            )
        size_bytes = sum(row.size_bytes for receipt in receipts for row in receipt.rows)
        self.written = Written(size_bytes=size_bytes, seconds=self._host.now_s() - began_s)
        return receipts

    def _gather(
        self,
        job: SaveJob,
        council: Council,
        parent: Parent | None,
        receipts: Sequence[Receipt],
        composed: _Composed,
    ) -> tuple[Contribution, ...] | Verdict:
        """Return the contributions of all nodes, or what another one has made of them. Blocks: for the other nodes.

        Raises PlanDivergedError where the manifest would not follow from the contributions alone: nodes do not know the
        same commits, or have composed different checkpoints.
        """
        step, attempt = job.target
        mine = Contribution(
            moment=job.target,
            parent=parent,
            receipts=tuple(receipts),
            routing=composed.composition.routing if composed.digest is None and council.is_lowest else None,
            composed=composed.digest,
        )
        with self._trace.span("save.gather", step=step, attempt=attempt, node=council.node):
            joint = council.gather(mine, timeout_s=float(job.descriptor["timeout_s"]))
        if isinstance(joint, Verdict):
            return joint
        parents = [part.parent for part in joint]
        if any(other != parent for other in parents):
            raise PlanDivergedError(f"nodes follow different commits: step={step} parents={parents}")
        digests = [part.composed for part in joint]
        if any(other != composed.digest for other in digests):
            raise PlanDivergedError(f"nodes have composed different checkpoints: step={step} digests={digests}")
        return joint

    def _take_over(self, job: SaveJob, verdict: Verdict) -> tuple[CheckpointName, int]:
        """Return name and size of the checkpoint that another node has committed."""
        assert self._composer is not None, "prepared before"
        log.info("committed by another node: name=%s bytes=%d", job.name, verdict.size_bytes)
        if job.moment == job.target:
            self._commits.append(job.name)
            self._composer.note_commit_elsewhere(job.name)
        else:
            self._prepared = None  # list anew: its first checkpoint may have been enough
        return job.name, verdict.size_bytes

    def _retain(self, job: SaveJob) -> None:
        """Do a round of retention; its failure is not the save's."""
        assert self._retention is not None, "prepared before"
        try:
            gone = self._retention.after_commit()
        except MocError as error:
            log.warning("retention failed, the next commit tries again: %s", error)
            return
        for name in gone:
            log.info("dropped by retention: name=%s", name)

    def _prepare(self, job: SaveJob) -> Repository:
        """Open the repository for this life, once; write what a recovery without storage could not write."""
        key = (str(job.descriptor["storage"]), job.life.number, job.life.token, self._commits_elsewhere)
        if self._prepared == key and self._repository is not None:
            return self._repository
        if self._repository is not None:
            self._repository.close()
        self._prepared = None
        repository = Repository(self._host.open_store(str(job.descriptor["storage"]), trace=self._trace))
        self._repository = repository
        if not repository.exists():
            # Every life begins with a repository: an empty place is a folder that is not mounted, or was moved away.
            raise StoreUnavailableError(f"repository has vanished: url={repository.url} allowed=back in its place")
        refuse_if_fenced(repository, job.life.run, job.life.number)
        lives = decode_lineage(job.descriptor["lineage"], fingerprint=job.life.fingerprint)
        repository.put_missing_incarnations([record for record in lives if record.number < job.life.number])
        self._put_life(repository, job.life)
        listed = [checkpoint.name for checkpoint in repository.checkpoints()]
        repository.sync_names()  # what a dead agent has put is announced only once it is durable
        self._commits = [name for name in listed if (name.run, name.incarnation) == (job.life.run, job.life.number)]
        self._composer = Composer(repository, job.life, lives, listed)
        self._retention = Retention(
            repository,
            run=job.life.run,
            incarnation=job.life.number,
            keep_last=job.descriptor["keep_last"],
            keep_every=job.descriptor["keep_every"],
            trace=self._trace,
        )
        self._prepared = key
        return repository

    def _parent(self, job: SaveJob) -> Parent | None:
        """Return the commit of this life before the job's, or what the life grew from."""
        earlier = max((name for name in self._commits if name < job.name), default=None)
        if earlier is None:
            return job.life.parent
        return Parent(incarnation=earlier.incarnation, step=earlier.step, attempt=earlier.attempt)

    def _put_life(self, repository: Repository, life: Incarnation) -> None:
        """Write the life's record if a recovery without storage could not.

        Raises FencedError if its number was taken meanwhile.
        """
        if (life.run, life.number) not in repository.incarnation_numbers():
            repository.put_incarnation(life)
            return
        records, findings = repository.incarnations()
        held = [record for record in records if record.number == life.number]
        if not held:
            listed = "; ".join(map(str, findings))
            raise ManifestCorruptError(
                f"the record of this life is unreadable: run={life.run} incarnation={life.number} {listed}"
            )
        if held[-1].token != life.token:
            raise FencedError(
                f"another life has this number: run={life.run} incarnation={life.number} token={held[-1].token}"
            )


def _writers(repository: Repository) -> int:
    """Return how many ranks to persist at once: a remote put holds a second copy of its object, so there one."""
    return WRITERS if repository.store.properties.is_local else 1


def _where(job: SaveJob) -> str:
    return "" if job.council is None else f" node={job.council.node}"


def _commit_plan(descriptor: Mapping[str, Any]) -> CommitPlan:
    is_alone = "fellows" not in descriptor
    ranks = sorted(row["rank"] for row in descriptor["catalogs"])
    return CommitPlan(
        ranks=tuple(ranks if is_alone else range(descriptor["topology"]["world_size"])),
        digest=descriptor["digest"],
        tensors=descriptor["tensors"],
        topology=descriptor["topology"],
        fingerprint=descriptor["fingerprint"],
        versions=descriptor["software"],
    )
