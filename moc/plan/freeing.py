"""Which seals of an arena the agent may free (architecture: "Only the agent frees").

A *moment* is (step, attempt): one snapshot of the whole life. Attempts of one step sort in the order they were made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Moment",
    "Seal",
    "attempt_id",
    "attempt_ordinal",
    "complete_moments",
    "filled_limit",
    "freeable",
    "holders_of",
    "hopeless_moments",
    "moment_after",
    "newest_moments",
    "second_attempt",
]

Moment = tuple[int, str]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Seal:
    """One sealed snapshot of one rank, as far as freeing is concerned; `record` is its index in the rank's records."""

    incarnation: int
    step: int
    attempt: str
    rank: int
    record: int

    @property
    def moment(self) -> Moment:
        return (self.step, self.attempt)


def attempt_id(run: str, incarnation: int, token: str, step: int, ordinal: int) -> str:
    """Return the 8 hex digits of the ordinal-th snapshot of a step in a life: the ordinal, then a digest; equal on
    every rank.
    """
    digest = hashlib.sha256(f"{run}/{incarnation}/{token}/{step}/{ordinal}".encode()).hexdigest()
    return f"{ordinal % 256:02x}{digest[:6]}"


def second_attempt(attempt: str) -> str:
    """Return the id of another checkpoint of the same snapshot: it sorts right after the attempt."""
    return f"{min(int(attempt, 16) + 1, 0xFFFFFFFF):08x}"


def attempt_ordinal(attempt: str) -> int:
    """Return the ordinal in an attempt id, modulo 256."""
    return int(attempt[:2], 16)


def moment_after(step: int, ordinal: int) -> Moment:
    """Return a moment that sorts after the ordinal-th attempt of a step and before the next one."""
    return (step, f"{ordinal:02x}~")


def filled_limit(versions: int, *, has_replicas: bool) -> int:
    """Return how many versions of an arena may be in use when a life begins, until it has a global moment.

    One free version is enough for that. Where there are replicas two are needed, for only a flagged snapshot has some:
    the first of a life has none, nor has an explicit one, and either stays until a flagged one is complete beside it.
    """
    return versions - (2 if has_replicas else 1)


def holders_of(seals: Iterable[Seal], incarnation: int) -> dict[Moment, set[int]]:
    """Return the moments of an incarnation, and which ranks hold them."""
    holders: dict[Moment, set[int]] = {}
    for seal in seals:
        if seal.incarnation == incarnation:
            holders.setdefault(seal.moment, set()).add(seal.rank)
    return holders


def complete_moments(seals: Iterable[Seal], ranks: Sequence[int], incarnation: int) -> tuple[Moment, ...]:
    """Return the moments that every rank has sealed in this incarnation, ascending; the last one is global."""
    holders = holders_of(seals, incarnation)
    return tuple(sorted(moment for moment, held in holders.items() if held >= set(ranks)))


def newest_moments(seals: Iterable[Seal], incarnation: int) -> dict[int, Moment]:
    """Return the newest moment that each rank holds in this incarnation."""
    newest: dict[int, Moment] = {}
    for seal in seals:
        if seal.incarnation == incarnation:
            newest[seal.rank] = max(newest.get(seal.rank, seal.moment), seal.moment)
    return newest


def hopeless_moments(
    seals: Iterable[Seal], ranks: Sequence[int], incarnation: int, *, passed: Mapping[int, Moment]
) -> dict[Moment, tuple[int, ...]]:
    """Return the moments that some ranks hold and others never will, with those others.

    A rank seals in ascending order, so a rank that has `passed` a moment without holding it has skipped it. `passed`
    must have been read before `seals`: a rank may seal between the reading of two of its records.
    """
    holders = holders_of(seals, incarnation)
    found = {}
    for moment, held in sorted(holders.items()):
        skipped = tuple(rank for rank in ranks if rank not in held and rank in passed and passed[rank] > moment)
        if skipped:
            found[moment] = skipped
    return found


def freeable(
    seals: Sequence[Seal],
    ranks: Sequence[int],
    incarnation: int,
    *,
    pinned: Iterable[tuple[int, Moment]],
    source: tuple[int, Moment] | None,
    hopeless: Iterable[Moment] = (),
    has_global: bool | None = None,
) -> tuple[Seal, ...]:
    """Return the seals that nothing needs any more.

    A seal is free when a newer moment is global, or its own moment never will be, and nothing pins it: `pinned` holds
    (incarnation, moment) of saves under way, `source` the one that the present life was recovered from.
    Seals of earlier lives stay until this one has a global moment: a complete one, unless `has_global` says otherwise.
    Without the `hopeless`, ranks that skip different
    steps would fill their records for good.
    """
    complete = complete_moments(seals, ranks, incarnation)
    stands_alone = bool(complete) if has_global is None else has_global
    held, lost = set(pinned), set(hopeless)

    def is_needless(seal: Seal) -> bool:
        if seal.incarnation < incarnation:
            return stands_alone
        return seal.moment in lost or (bool(complete) and seal.moment < complete[-1])

    return tuple(
        seal
        for seal in sorted(seals)
        if (seal.incarnation, seal.moment) not in held
        and (seal.incarnation, seal.moment) != source
        and is_needless(seal)
    )
