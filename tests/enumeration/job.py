"""A job of two ranks small enough to be run thousands of times: its snapshots, its lives, and what it was promised.

Production code does the work: the agent's `Persister` (with `persist_rank` from a real arena, `commit`, `Retention`),
the lineage's candidates, `StorageSource`, `restore_shards`. What is left here is the order in which a recovering
trainer calls it. Everything runs on one thread, so that operation n is the same one in every run.
"""

from __future__ import annotations

import functools
import zlib
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moc import errors
from moc._native import crc32c
from moc.agent.jobs import Outcome, SaveJob
from moc.agent.persister import Persister
from moc.config import Config
from moc.format.keys import CheckpointName
from moc.format.manifest import Incarnation, Manifest, encode_incarnation
from moc.format.tagged import encode_state, expect_mapping
from moc.host import Host
from moc.plan.layout import arrange_arena
from moc.plan.lineage import STORAGE, Candidate, candidates, chain, merge_incarnations, tip
from moc.recover import StorageSource, restore_shards
from moc.repository import Repository
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.seal import PERSIST, SealRecord
from moc.state import Expert, catalog_digest, check_coverage
from moc.store.port import Store
from moc.trace import Trace
from tests.enumeration.joint import Pair
from tests.enumeration.serial import SerialHost
from tests.support.plain import PlainState

__all__ = [
    "RUN",
    "Ledger",
    "Life",
    "Snapshots",
    "choose",
    "name_of",
    "restored_step",
    "snapshots",
    "state_of",
]

RUN = "run-7"
SIZE = 2
STEPS = 9  # as many as a workflow and what is done after it need
EXPERTS = 3  # of a job with partial saves: a snapshot copies one, and a checkpoint writes one
PARTIAL = {"mode": "partial", "k_snapshot": 1, "k_persist": 1}
TRACE = Trace()


def state_of(rank: int, *, experts: int = 1) -> PlainState:
    """Return a rank's training state at its beginning."""
    return PlainState(rank, SIZE, layers=1, experts=experts, dense_elements=37, expert_elements=5)


class Snapshots:
    """An arena in which every rank has sealed steps 1 to `STEPS`; slot s - 1 holds step s.

    Where they are partial the seal of step s has expert e of the newest step until then with s % `EXPERTS` == e, and of
    step 1 before that.
    """

    def __init__(self, *, is_partial: bool = False) -> None:
        self.is_partial = is_partial
        self.experts = EXPERTS if is_partial else 1
        states = [state_of(rank, experts=self.experts) for rank in range(SIZE)]
        catalogs = tuple(state.catalog for state in states)
        digest = catalog_digest(catalogs)
        descriptor: dict[str, object] = {
            "versions": STEPS,
            "catalogs": [catalog.to_json() for catalog in catalogs],
            "lineage": [],
        }
        layout = arrange_arena(catalogs, versions=STEPS, descriptor_bytes=descriptor_room(descriptor))
        self.arena = Arena.create(descriptor, layout, name="enumeration")
        self.plan: dict[str, Any] = {
            "catalogs": descriptor["catalogs"],
            "digest": digest,
            "tensors": check_coverage(shard for catalog in catalogs for shard in catalog.shards),
            "topology": {"world_size": SIZE, "node_of_rank": [0] * SIZE, "ep_sizes": []},
            "fingerprint": {"model": "plain"},
            "software": {"moc": "0"},
            "config": asdict(Config(persist_every=1)) | (PARTIAL if is_partial else {}),
        }
        self.digests = [tuple(state.digest() for state in states)]
        self._values = [[_values(state) for state in states]]
        self._records: dict[tuple[int, int], SealRecord] = {}
        for step in range(1, STEPS + 1):
            for state in states:
                state.advance()
                self._records[state.rank, step] = self._seal(state, step, digest)
            self.digests.append(tuple(state.digest() for state in states))
            self._values.append([_values(state) for state in states])

    def _seal(self, state: PlainState, step: int, digest: str) -> SealRecord:
        units = self.arena.rank_layout(state.rank).units
        crcs = array("I", bytes(4 * len(self.arena.catalog(state.rank).shards)))
        offsets = self.arena.shard_offsets(state.rank, array("I", [step - 1] * len(units)))
        state.copy_shards(array("Q", (self.arena.address + offset for offset in offsets)), crcs)
        steps = array("Q", [step if unit.expert is None else self._captured(unit.expert, step) for unit in units])
        for unit, captured in zip(units, steps, strict=True):
            if captured != step:
                shards = slice(unit.first, unit.first + unit.count)
                crcs[shards] = self._records[state.rank, captured].crcs[shards]
        slots = array("I", [captured - 1 for captured in steps])
        blob = encode_state(state.capture()).to_bytes()
        view = self.arena.view(self.arena.state_offset(state.rank, slots), len(blob))
        view[:] = blob
        view.release()
        return SealRecord(
            run=RUN,
            incarnation=0,
            step=step,
            rank=state.rank,
            flags=PERSIST,
            attempt="0" * 8,
            digest=digest,
            state_bytes=len(blob),
            state_crc32c=crc32c(blob),
            slots=slots,
            steps=steps,
            crcs=crcs,
        )

    def _captured(self, expert: Expert, step: int) -> int:
        """Return the step of the expert's version in the snapshot of a step."""
        if not self.is_partial:
            return step
        return max(1, step - (step - expert.index) % EXPERTS)

    def expected_digest(self, rank: int, manifest: Manifest) -> str:
        """Return the digest of a rank restored from a checkpoint: each expert of the step that the manifest names."""
        state = state_of(rank, experts=self.experts)
        state.step = manifest.name.step
        for number, shard in enumerate(state.needed):
            step = state.step if shard.expert is None else manifest.version(shard.expert)[1]
            state.values[number][:] = self._values[step][rank][0][number]
        state.noise = self._values[state.step][rank][1].copy()
        return state.digest()

    def records(self, name: CheckpointName) -> list[SealRecord]:
        """Return the seals of all ranks as those of this attempt."""
        return [
            replace(self._records[rank, name.step], incarnation=name.incarnation, attempt=name.attempt)
            for rank in range(SIZE)
        ]


def _values(state: PlainState) -> tuple[list[np.ndarray], np.ndarray]:
    """Return a copy of a rank's shards and of its small state."""
    return [value.copy() for value in state.values], state.noise.copy()


@functools.cache
def snapshots(*, is_partial: bool = False) -> Snapshots:
    return Snapshots(is_partial=is_partial)


@dataclass(slots=True)
class Ledger:
    """What recovery may find: the state promised last, or one that was being written since. None: nothing at all."""

    allowed: frozenset[CheckpointName | None] = frozenset({None})
    lives: int = 0
    commits: int = 0
    is_partial: bool = False
    """Whether the job's saves are partial."""
    is_joint: bool = False
    """Whether the job's two ranks are on two nodes, whose agents save together."""

    def attempt(self, name: CheckpointName) -> None:
        self.allowed |= {name}

    def announce(self, name: CheckpointName) -> None:
        self.allowed = frozenset({name})
        self.commits += 1

    def copy(self) -> Ledger:
        return replace(self)

    def token(self) -> str:
        """Return what tells this life from another with its number."""
        self.lives += 1
        return f"{self.lives:08x}"


class Life:
    """One life of the job and the agent that serves it. `open_store` opens what it works on."""

    def __init__(
        self, open_store: Callable[[], Store], ledger: Ledger, *, keep_last: int, adopted: Life | None = None
    ) -> None:
        """With `adopted` this is a new agent, which adopts the life of one that has died."""
        self._host, self._ledger, self.keep_last = SerialHost(open_store), ledger, keep_last
        self.record = None if adopted is None else adopted.record
        self._lineage: tuple[Incarnation, ...] = () if adopted is None else adopted._lineage
        self.recovered: CheckpointName | None = None
        self._outcomes: list[Outcome] = []
        self._persister = Persister(
            on_end=lambda _, outcomes: self._outcomes.extend(outcomes), host=self._host, trace=TRACE
        )
        self._tries = 0 if adopted is None else 128
        self._pair: Pair | None = None

    @property
    def number(self) -> int:
        assert self.record is not None, "attached before"
        return self.record.number

    def attach(self, *, is_offline: bool = False) -> None:
        """Recover and write this life's record. Raises: MocError, after which the life is over.

        A life that `is_offline` recovers its state from memory, and its agent writes the record before the first save.
        """
        repository = Repository(self._host.open_store("", trace=TRACE))
        if not repository.exists():
            repository.create()
        self._lineage, admissible, number = choose(repository)
        parent = None
        if admissible:
            self.recovered = name_of(admissible[0])
            step = restored_step(repository, admissible[0], self._host)
            assert step == self.recovered.step, f"restored another step: {step} instead of {self.recovered}"
            parent = replace(admissible[0], source="memory" if is_offline else STORAGE).as_parent()
        record = Incarnation(
            run=RUN,
            number=number,
            token=self._ledger.token(),
            parent=parent,
            reason="recover" if admissible else "start",
            fingerprint={"model": "plain"},
        )
        if not is_offline:
            repository.create()
            repository.put_incarnation(record)
        self.record = record

    def save(self, step: int) -> CheckpointName:
        """Persist and commit a step, and do the round of retention. Raises: MocError, if it was not committed."""
        self._tries += 1
        digits = zlib.crc32(f"{self.number}/{step}/{self._tries}".encode()) & 0xFFFFFF
        name = CheckpointName(run=RUN, incarnation=self.number, step=step, attempt=f"{self._tries:02x}{digits:06x}")
        self._ledger.attempt(name)
        shots = snapshots(is_partial=self._ledger.is_partial)
        (outcome,) = self._offer({record.rank: record for record in shots.records(name)})
        if outcome.error is not None:
            kind, _, words = outcome.error.partition(": ")
            raise getattr(errors, kind)(words)
        self._ledger.announce(name)
        return name

    def recall(self) -> None:
        """Announce what an agent that has died had committed, as a new one does."""
        names = [outcome.name for outcome in self._offer({})]
        if names:
            self._ledger.announce(max(names))

    def _offer(self, records: dict[int, SealRecord]) -> list[Outcome]:
        shots = snapshots(is_partial=self._ledger.is_partial)
        assert self.record is not None, "attached before"
        lineage = [encode_incarnation(record).decode() for record in (*self._lineage, self.record)]
        descriptor = shots.plan | {
            "keep_last": self.keep_last,
            "keep_every": 0,
            "storage": "model",
            "lineage": lineage,
        }
        self._outcomes.clear()
        if self._ledger.is_joint and records:
            self._pair = self._pair or Pair(lambda: self._host.open_store("", trace=TRACE), self.record)
            return [self._pair.save(records, shots.arena, descriptor)]
        job = SaveJob(
            arena=shots.arena, records=records, life=self.record, descriptor=descriptor, pinned=None, is_whole=False
        )
        assert self._persister.offer(job), "one save at a time"
        self._host.work()
        return list(self._outcomes)


def choose(repository: Repository) -> tuple[tuple[Incarnation, ...], tuple[Candidate, ...], int]:
    """Return the lives so far, the candidates in the order in which recovery tries them, and the next life's number."""
    records, findings = repository.incarnations()
    assert not findings, f"incarnation records are damaged: {[str(finding) for finding in findings]}"
    merged = merge_incarnations(records, ())
    names = [checkpoint.name for checkpoint in repository.checkpoints()]
    known = [
        Candidate(source=STORAGE, run=n.run, incarnation=n.incarnation, step=n.step, attempt=n.attempt) for n in names
    ]
    number = max([tip(merged), *(name.incarnation for name in names)]) + 1
    return tuple(merged.values()), candidates(chain(merged, tip(merged)), known), number


def restored_step(repository: Repository, candidate: Candidate, host: Host) -> int:
    """Restore all ranks from a checkpoint and return the step; fails unless every byte is that step's, or of the step
    that the manifest names for an expert.
    """
    manifest = repository.read_manifest(name_of(candidate))
    is_partial = manifest.catalog_digest != snapshots().plan["digest"]
    shots = snapshots(is_partial=is_partial)
    for rank in range(SIZE):
        state = state_of(rank, experts=shots.experts)
        source = StorageSource(repository, manifest, rank=rank)
        tree, is_exact = source.state(rank)
        restore_shards(source, state, candidate, parts=None, host=host, trace=TRACE)
        fields = expect_mapping(tree, "state")
        state.apply(fields)
        state.finish_restore(fields, exact_rank=is_exact)
        assert state.digest() == shots.expected_digest(rank, manifest), f"restored bytes differ: {candidate} {rank=}"
    return candidate.step


def name_of(candidate: Candidate) -> CheckpointName:
    """Return the checkpoint that a candidate in storage is."""
    return CheckpointName(
        run=candidate.run, incarnation=candidate.incarnation, step=candidate.step, attempt=candidate.attempt
    )
