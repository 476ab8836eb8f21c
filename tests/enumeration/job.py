"""A job of two ranks small enough to be run thousands of times: its snapshots, its lives, and what it was promised.

Production code does the work: the agent's `Persister` (with `persist_rank` from a real arena, `commit`, `Retention`),
the lineage's candidates, `StorageSource`, `restore_shards`. What is left here is the order in which a recovering
trainer calls it. Everything runs on one thread, so that operation n is the same one in every run.
"""

from __future__ import annotations

import functools
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from moc import errors
from moc._native import crc32c
from moc.agent.persister import Outcome, Persister, SaveJob
from moc.config import Config
from moc.format.keys import CheckpointName
from moc.format.manifest import Incarnation, encode_incarnation
from moc.format.tagged import encode_state, expect_mapping
from moc.host import Host, Semaphore, SystemHost, Task
from moc.plan.layout import arrange_arena
from moc.plan.lineage import STORAGE, Candidate, candidates, chain, merge_incarnations, tip
from moc.recover import StorageSource, restore_shards
from moc.repository import Repository
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.seal import PERSIST, SealRecord
from moc.state import catalog_digest, check_coverage
from moc.store.port import Store
from moc.trace import Trace
from tests.support.plain import PlainState

__all__ = [
    "RUN",
    "Ledger",
    "Life",
    "SerialHost",
    "Snapshots",
    "choose",
    "name_of",
    "restored_step",
    "snapshots",
    "state_of",
]

T = TypeVar("T")
R = TypeVar("R")

RUN = "run-7"
SIZE = 2
STEPS = 9  # as many as a workflow and what is done after it need
TRACE = Trace()


def state_of(rank: int) -> PlainState:
    """Return a rank's training state at its beginning."""
    return PlainState(rank, SIZE, layers=1, experts=1, dense_elements=37, expert_elements=5)


class Snapshots:
    """An arena in which every rank has sealed steps 1 to `STEPS`; slot s - 1 holds step s."""

    def __init__(self) -> None:
        states = [state_of(rank) for rank in range(SIZE)]
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
            "config": asdict(Config()),
        }
        self.digests = [tuple(state.digest() for state in states)]
        self._records: dict[tuple[int, int], SealRecord] = {}
        for step in range(1, STEPS + 1):
            for state in states:
                state.advance()
                self._records[state.rank, step] = self._seal(state, step, digest)
            self.digests.append(tuple(state.digest() for state in states))

    def _seal(self, state: PlainState, step: int, digest: str) -> SealRecord:
        units = self.arena.rank_layout(state.rank).units
        slots = array("I", [step - 1] * len(units))
        offsets = self.arena.shard_offsets(state.rank, slots)
        crcs = array("I", bytes(4 * len(offsets)))
        state.copy_shards(array("Q", (self.arena.address + offset for offset in offsets)), crcs)
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
            steps=array("Q", [step] * len(units)),
            crcs=crcs,
        )

    def records(self, name: CheckpointName) -> list[SealRecord]:
        """Return the seals of all ranks as those of this attempt."""
        return [
            replace(self._records[rank, name.step], incarnation=name.incarnation, attempt=name.attempt)
            for rank in range(SIZE)
        ]


@functools.cache
def snapshots() -> Snapshots:
    return Snapshots()


@dataclass(slots=True)
class Ledger:
    """What recovery may find: the state promised last, or one that was being written since. None: nothing at all."""

    allowed: frozenset[CheckpointName | None] = frozenset({None})
    lives: int = 0
    commits: int = 0

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


class SerialHost(SystemHost):
    """One thread, and a store of the test's own. The persist thread runs while somebody calls `work`."""

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store, self._permits = open_store, 0
        self.work: Callable[[], None] = lambda: None

    def open_store(self, url: str, *, trace: Trace) -> Store:
        return self._open_store()

    def map(self, act: Callable[[T], R], items: Iterable[T], *, workers: int, name: str) -> list[R]:
        return [act(item) for item in items]

    def spawn(self, target: Callable[[], None], *, name: str) -> Task:
        self.work = target
        return self

    def semaphore(self) -> Semaphore:
        return self

    def release(self) -> None:
        self._permits += 1

    def acquire(self) -> bool:
        """Take a permit; without one the thread has nothing more to do for now."""
        self._permits -= 1
        if self._permits < 0:
            self._permits = 0
            return False
        return True

    def join(self, timeout: float | None = None) -> None:
        """Nothing runs by itself."""

    def is_alive(self) -> bool:
        return False


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
            fingerprint=snapshots().plan["fingerprint"],
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
        (outcome,) = self._offer({record.rank: record for record in snapshots().records(name)})
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
        shots = snapshots()
        assert self.record is not None, "attached before"
        lineage = [encode_incarnation(record).decode() for record in (*self._lineage, self.record)]
        descriptor = shots.plan | {
            "keep_last": self.keep_last,
            "keep_every": 0,
            "storage": "model",
            "lineage": lineage,
        }
        self._outcomes.clear()
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
    """Restore all ranks from a checkpoint and return the step; fails unless every byte is that step's."""
    manifest = repository.read_manifest(name_of(candidate))
    digests = []
    for rank in range(SIZE):
        state = state_of(rank)
        source = StorageSource(repository, manifest, rank=rank)
        tree, is_exact = source.state(rank)
        restore_shards(source, state, candidate, parts=None, host=host, trace=TRACE)
        fields = expect_mapping(tree, "state")
        state.apply(fields)
        state.finish_restore(fields, exact_rank=is_exact)
        digests.append(state.digest())
    assert tuple(digests) == snapshots().digests[candidate.step], f"restored bytes differ from step {candidate.step}"
    return candidate.step


def name_of(candidate: Candidate) -> CheckpointName:
    """Return the checkpoint that a candidate in storage is."""
    return CheckpointName(
        run=candidate.run, incarnation=candidate.incarnation, step=candidate.step, attempt=candidate.attempt
    )
