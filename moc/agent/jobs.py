"""A save as the agent's threads hand it to each other: what is to be saved, under which name, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moc.agent.composer import FULL
from moc.agent.custody import Custody
from moc.agent.mending import mend, stack_of
from moc.agent.peers.council import Council
from moc.agent.peers.report import Wish
from moc.format.keys import CheckpointName
from moc.format.manifest import Incarnation
from moc.persist import checkpoint_name
from moc.plan.freeing import Moment, second_attempt
from moc.snapshot.arena import Arena
from moc.snapshot.seal import EXPLICIT, SealRecord

__all__ = ["Outcome", "SaveJob", "Written", "inherited_save", "is_full", "is_whole", "once_more"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """One save: the seals of all ranks at one moment, pinned until `on_end`, and the life whose checkpoint they become.

    Without records the job only looks up what the life has committed. `descriptor` is that of the arena the seals are
    in. `is_whole` says that all experts are written which memory has newer than storage. With a `council` the records
    are those of this node, and the agents of the others make their part. `lenders` are the seals of older snapshots
    that hold some of the experts: see `moc.agent.mending`.
    """

    arena: Arena
    records: Mapping[int, SealRecord]
    life: Incarnation
    descriptor: Mapping[str, Any]
    pinned: tuple[int, Moment] | None
    is_whole: bool
    council: Council | None = None
    lenders: tuple[SealRecord, ...] = ()

    @property
    def pins(self) -> frozenset[tuple[int, Moment]]:
        """What must not be freed meanwhile: the snapshot, and those that lend it experts."""
        lent = {(record.incarnation, (record.step, record.attempt)) for record in self.lenders}
        return frozenset(lent if self.pinned is None else {self.pinned, *lent})

    @property
    def name(self) -> CheckpointName:
        return checkpoint_name(next(iter(self.records.values())))

    @property
    def moment(self) -> Moment:
        """The moment of the seals: the checkpoint's, but for one that is made of a moment a second time."""
        return self.target if self.pinned is None else self.pinned[1]

    @property
    def target(self) -> Moment:
        """The moment of the checkpoint."""
        return (self.name.step, self.name.attempt)

    @property
    def wish(self) -> Wish:
        """What an agent that leaves with this save tells the others."""
        is_second = self.target != self.moment
        return Wish(moment=self.moment, is_second=is_second, is_inherited=self.is_inherited)

    @property
    def is_offered(self) -> bool:
        """Return whether the nodes compose the checkpoint together: experts take turns, or did in an earlier life."""
        return self.council is not None and (not is_full(self.descriptor) or self.is_inherited)

    @property
    def is_inherited(self) -> bool:
        """Return whether the seals are an earlier life's: what the job's life was recovered from."""
        return self.pinned is not None and self.pinned[0] != self.life.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a save ended; `error` is None when it is committed."""

    name: CheckpointName
    size_bytes: int
    seconds: float
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one save has put into storage, and how long that took."""

    size_bytes: int
    seconds: float


def is_full(descriptor: Mapping[str, Any]) -> bool:
    """Return whether every checkpoint of a life is its snapshot."""
    return str(descriptor["config"]["mode"]) == FULL


def is_whole(descriptor: Mapping[str, Any], records: Mapping[int, SealRecord]) -> bool:
    """Return whether the checkpoint that a moment asks for has all experts that memory has newer than storage."""
    return is_full(descriptor) or any(record.flags & EXPLICIT for record in records.values())


def once_more(records: Mapping[int, SealRecord]) -> dict[int, SealRecord]:
    """Return the seals for a second checkpoint of their moment: with other experts it is another one, and a key is
    written with one content only.
    """
    return {rank: replace(record, attempt=second_attempt(record.attempt)) for rank, record in records.items()}


def inherited_save(custody: Custody, council: Council | None) -> SaveJob | None:
    """Return the save of what the present life was recovered from, as its own; None where memory has nothing of it."""
    source, life = custody.source(), custody.life
    origin = source.recovery_source(life)
    if not origin:
        return None
    first = next(iter(origin.values()))
    key = (first.incarnation, (first.step, first.attempt))
    mended = mend(source.arena, stack_of(source, life, key))
    own = {rank: replace(record, incarnation=life.record.number) for rank, record in mended.records.items()}
    is_of_one_step = all(step == record.step for record in own.values() for step in record.steps)
    # Whether it is whole one node cannot tell alone, and all must give the checkpoint one name.
    is_made_at_once = council is None and is_whole(source.life.descriptor, own) and is_of_one_step
    return SaveJob(
        arena=source.arena,
        records=own if is_made_at_once else once_more(own),
        life=life.record,
        descriptor=source.life.descriptor,
        pinned=key,
        is_whole=True,
        council=council,
        lenders=mended.lenders,
    )
