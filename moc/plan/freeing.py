"""Which seals of an arena the agent may free (architecture: "Only the agent frees")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Seal", "complete_steps", "freeable", "global_step"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Seal:
    """One sealed snapshot of one rank, as far as freeing is concerned; `record` is its index in the rank's records."""

    incarnation: int
    step: int
    rank: int
    record: int
    attempt: str


def complete_steps(seals: Iterable[Seal], ranks: Sequence[int], incarnation: int) -> tuple[int, ...]:
    """Return the steps that every rank has sealed in this incarnation, ascending."""
    holders: dict[int, set[int]] = {}
    for seal in seals:
        if seal.incarnation == incarnation:
            holders.setdefault(seal.step, set()).add(seal.rank)
    return tuple(sorted(step for step, held in holders.items() if held >= set(ranks)))


def global_step(seals: Iterable[Seal], ranks: Sequence[int], incarnation: int) -> int | None:
    """Return the newest step that every rank has sealed in this incarnation, None if there is none."""
    return max(complete_steps(seals, ranks, incarnation), default=None)


def freeable(seals: Sequence[Seal], ranks: Sequence[int], incarnation: int, pinned: Iterable[tuple[int, int]]) -> tuple[Seal, ...]:
    """Return the seals that nothing needs any more. `pinned` holds (incarnation, step) pairs.

    A seal is free when a newer one of its rank is at or below the global step and nothing pins it. Seals of earlier incarnations
    are kept, as the only thing to recover from, until the present one has a global step; those that are not pinned as the recovery
    source were off the chain and are dropped by the agent when the new life begins.
    """
    newest = global_step(seals, ranks, incarnation)
    if newest is None:
        return ()
    held = set(pinned)
    return tuple(
        seal
        for seal in sorted(seals)
        if (seal.incarnation, seal.step) not in held and (seal.incarnation < incarnation or seal.step < newest)
    )
