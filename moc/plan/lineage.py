"""Lineage: which snapshots and checkpoints led to the present state, and in which order recovery tries them.

The *chain* starts at the newest incarnation and follows parents; of each ancestor only steps up to the fork count.
Whatever is off the chain (an abandoned future after a rewind, a late commit of a zombie) is never a candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moc.format.keys import LAST_STEP
from moc.format.manifest import Incarnation, Parent
from moc.plan.freeing import second_attempt

__all__ = ["Candidate", "Link", "candidates", "chain", "faults_of", "is_on_chain", "merge_incarnations", "tip"]

MEMORY = "memory"
PEERS = "peer memory"
"""A snapshot in memory of which some ranks' parts are fetched from replicas at other nodes, where they are wanted."""
STORAGE = "storage"
RECOVERY = "recover"
"""The reason of a life that goes on after a failure."""
SOURCES = (MEMORY, PEERS, STORAGE)  # the nearest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One incarnation of the chain.

    Moments after the fork (`last_step`, `last_attempt`) are not part of it (None: no limit).

    `is_known` is False when the incarnation's record is missing or unreadable: what it grew from cannot be told.
    """

    incarnation: int
    last_step: int | None
    last_attempt: str | None = None
    is_known: bool = True

    def admits(self, incarnation: int, step: int, attempt: str | None = None) -> bool:
        if self.incarnation != incarnation or (self.last_step is not None and step > self.last_step):
            return False
        if step != self.last_step or self.last_attempt is None or attempt in (None, self.last_attempt):
            return True
        return second_attempt(attempt) == self.last_attempt  # the snapshot whose second checkpoint is the fork


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A state that recovery may choose."""

    source: str
    run: str
    incarnation: int
    step: int
    attempt: str

    def as_parent(self) -> Parent:
        return Parent(
            incarnation=self.incarnation, step=self.step, attempt=self.attempt if self.source == STORAGE else None
        )

    def __str__(self) -> str:
        return f"{self.source} step={self.step} incarnation={self.incarnation} attempt={self.attempt}"


def merge_incarnations(stored: Iterable[Incarnation], in_memory: Iterable[Incarnation]) -> dict[int, Incarnation]:
    """Return the records by number.

    A stored record outranks one of the same number that only memory knows (a rewind wins).
    """
    merged = {record.number: record for record in in_memory}
    merged.update({record.number: record for record in stored})
    return dict(sorted(merged.items()))


def tip(records: dict[int, Incarnation]) -> int:
    """Return the newest incarnation's number, 0 if there is none."""
    return max(records, default=0)


def chain(records: dict[int, Incarnation], newest: int) -> tuple[Link, ...]:
    """Return the links from `newest` back to the start, or to the first one whose record is missing."""
    links: list[Link] = []
    parent: Parent | None = None
    number = newest
    while number and (not links or number < links[-1].incarnation):
        links.append(
            Link(
                incarnation=number,
                last_step=None if parent is None or parent.step >= LAST_STEP else parent.step,
                last_attempt=None if parent is None else parent.attempt,
                is_known=number in records,
            )
        )
        parent = records[number].parent if number in records else None
        number = 0 if parent is None else parent.incarnation
    return tuple(links)


def faults_of(lineage: Iterable[Incarnation]) -> int:
    """Return how many of these lives went on from storage: a fault came before them that memory did not survive."""
    recovered = [life for life in lineage if life.reason == RECOVERY]
    return len({life.number for life in recovered if life.parent is not None and life.parent.attempt is not None})


def is_on_chain(links: Sequence[Link], incarnation: int, step: int, attempt: str | None = None) -> bool:
    """Return whether the moment led to the present state; without an attempt, whether any of the step's did."""
    return any(link.admits(incarnation, step, attempt) for link in links)


def candidates(links: Sequence[Link], known: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Return the admissible candidates in the order of preference: nearest link, newest step, latest attempt, own
    memory before that of peers before storage.
    """

    def preference(candidate: Candidate) -> tuple[int, int, int]:
        depth = next(
            i for i, link in enumerate(links) if link.admits(candidate.incarnation, candidate.step, candidate.attempt)
        )
        return (depth, -candidate.step, SOURCES.index(candidate.source))

    admitted = [c for c in known if is_on_chain(links, c.incarnation, c.step, c.attempt)]
    latest_first = sorted(admitted, key=lambda c: c.attempt, reverse=True)
    return tuple(sorted(latest_first, key=preference))
