"""Lineage: which snapshots and checkpoints led to the present state, and in which order recovery tries them.

The *chain* starts at the newest incarnation and follows parents; of each ancestor only steps up to the fork count. Whatever is off the
chain (an abandoned future after a rewind, a late commit of a zombie) is never a candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moc.format.manifest import Incarnation, Parent

__all__ = ["Candidate", "Link", "candidates", "chain", "is_on_chain", "merge_incarnations", "tip"]

MEMORY = "memory"
STORAGE = "storage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One incarnation of the chain; steps above `last_step` are not part of it (None: no limit, the tip)."""

    incarnation: int
    last_step: int | None

    def admits(self, incarnation: int, step: int) -> bool:
        return self.incarnation == incarnation and (self.last_step is None or step <= self.last_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A state that recovery may choose."""

    source: str
    incarnation: int
    step: int
    attempt: str

    def as_parent(self) -> Parent:
        return Parent(incarnation=self.incarnation, step=self.step, attempt=self.attempt if self.source == STORAGE else None)

    def __str__(self) -> str:
        return f"{self.source} step={self.step} incarnation={self.incarnation} attempt={self.attempt}"


def merge_incarnations(stored: Iterable[Incarnation], in_memory: Iterable[Incarnation]) -> dict[int, Incarnation]:
    """Return the records by number. A stored record outranks one of the same number that only memory knows (a rewind wins)."""
    merged = {record.number: record for record in in_memory}
    merged.update({record.number: record for record in stored})
    return dict(sorted(merged.items()))


def tip(records: dict[int, Incarnation]) -> int:
    """Return the newest incarnation's number, 0 if there is none."""
    return max(records, default=0)


def chain(records: dict[int, Incarnation], newest: int) -> tuple[Link, ...]:
    """Return the links from `newest` back to the start; a missing or malformed ancestor ends the chain."""
    links: list[Link] = []
    number, last_step = newest, None
    while number in records and (not links or number < links[-1].incarnation):
        links.append(Link(incarnation=number, last_step=last_step))
        parent = records[number].parent
        if parent is None:
            break
        number, last_step = parent.incarnation, parent.step
    return tuple(links)


def is_on_chain(links: Sequence[Link], incarnation: int, step: int) -> bool:
    """Return whether (incarnation, step) led to the present state."""
    return any(link.admits(incarnation, step) for link in links)


def candidates(links: Sequence[Link], known: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Return the admissible candidates in the order of preference: nearest link, newest step, latest attempt, memory before storage."""

    def preference(candidate: Candidate) -> tuple[int, int, bool]:
        depth = next(i for i, link in enumerate(links) if link.admits(candidate.incarnation, candidate.step))
        return (depth, -candidate.step, candidate.source != MEMORY)

    admitted = [c for c in known if is_on_chain(links, c.incarnation, c.step)]
    latest_first = sorted(admitted, key=lambda c: c.attempt, reverse=True)
    return tuple(sorted(latest_first, key=preference))
