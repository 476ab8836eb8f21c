"""Retention: which checkpoints stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moc.format.keys import CheckpointName

__all__ = ["CheckpointFact", "dropped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFact:
    """What retention needs to know of a committed checkpoint."""

    name: CheckpointName
    is_on_chain: bool
    is_finite: bool


def dropped(facts: Iterable[CheckpointFact], *, keep_last: int, keep_every: int) -> tuple[CheckpointName, ...]:
    """Return the checkpoints to drop, oldest first.

    Kept are, of those on the chain: the newest `keep_last`, every one whose step is a multiple of `keep_every` (0:
    none), and the newest whose values are all finite. Those off the chain go once the chain itself has `keep_last`
    newer ones: until then somebody who rewound by mistake can rewind again.
    """
    ordered = sorted(facts, key=lambda fact: (fact.name.incarnation, fact.name.step, fact.name.attempt))
    chain = [fact for fact in ordered if fact.is_on_chain]
    kept = {fact.name for fact in chain[-keep_last:]}
    if keep_every:
        kept |= {fact.name for fact in chain if fact.name.step % keep_every == 0}
    kept |= {fact.name for fact in [f for f in chain if f.is_finite][-1:]}
    for fact in ordered:
        newer = sum(1 for other in chain if other.name.incarnation > fact.name.incarnation)
        if not fact.is_on_chain and newer < keep_last:
            kept.add(fact.name)
    return tuple(fact.name for fact in ordered if fact.name not in kept)
