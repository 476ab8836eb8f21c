"""What an arena holds that a recovery may choose from, and what it keeps for it beside the newest snapshot.

In the partial modes the newest snapshot may have experts in pieces, and where a node of several is lost, experts come
from what the others have in memory at or below the newest committed step: so that of its snapshot is kept, at all nodes
alike, as long as there is room (docs/decisions/, record 27).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from moc.agent.life import Life
from moc.plan.freeing import Moment, second_attempt
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert

__all__ = ["BASED_VERSIONS", "base_of", "holdings", "origin_of", "supplement"]

SUPPLEMENTED_VERSIONS = 3  # the newest snapshot, one that has what it lacks, and room for the next
BASED_VERSIONS = SUPPLEMENTED_VERSIONS + 1  # that of the newest commit too; one more where snapshots have replicas

Key = tuple[int, Moment]


def _keeps_base(life: Life) -> bool:
    """Return whether a life keeps the snapshot of its newest commit; the same at all of its nodes.

    With fewer versions it would take the room of the snapshots to come. On one node nobody could read it: what loses a
    part of memory there loses all of it.
    """
    is_partial = str(life.descriptor["config"]["mode"]) != "full"
    return is_partial and life.nodes > 1 and life.descriptor["versions"] >= BASED_VERSIONS + bool(life.hosts)


def base_of(life: Life, committed: Moment | None, records: Iterable[SealRecord]) -> Key | None:
    """Return the snapshot of the newest commit, before a life's first that of its origin; None where none is kept."""
    if not _keeps_base(life):
        return None
    base = life.base if committed is None else (life.record.number, committed)
    if base is None:
        return None
    number, (step, attempt) = base
    same = {r.attempt for r in records if (r.incarnation, r.step) == (number, step)}
    if attempt in same:
        return base
    # A second checkpoint has no snapshot of its own, and of an adopted life's commits only the step is known.
    first = {other for other in same if second_attempt(other) == attempt}
    is_any = committed is not None and not first
    return number, (step, max(same if is_any else first, default=attempt))


def origin_of(life: Life, ranks: Iterable[int], records: Iterable[SealRecord]) -> Key | None:
    """Return the attempt at the parent's step that a life was recovered from, else the latest that these ranks hold.

    Only that one is kept for a recovery, at all nodes: with more of them a life might find no free record, ever.
    """
    parent = life.record.parent
    if parent is None:
        return None
    holders: dict[Moment, set[int]] = {}
    for record in records:
        is_origin = (record.incarnation, record.step) == (parent.incarnation, parent.step)
        if is_origin and parent.attempt in (None, record.attempt):
            holders.setdefault((record.step, record.attempt), set()).add(record.rank)
    chosen = {moment for moment in holders if (parent.incarnation, moment) in life.layers}
    whole = [moment for moment in chosen or holders if holders[moment] == set(ranks)]
    return (parent.incarnation, max(whole)) if whole else None


def supplement(
    versions: int,
    known: Sequence[Key],
    in_pieces: Callable[[Key], Collection[Expert]],
    *,
    kept: Collection[Key] = (),
) -> Key | None:
    """Return the snapshot to keep beside the newest, because it has experts whole that the newest has not.

    `known` are the complete ones, ascending; of these some are `kept` anyway, which cost no room: the newest of them
    that has all of these experts whole, else the newest one that has any. Without it they come from storage, if the job
    fails before it makes up for them, for which two versions have no room.
    """
    if len(known) < 2 or versions < SUPPLEMENTED_VERSIONS:
        return None
    lacking = frozenset(in_pieces(known[-1]))
    if not lacking:
        return None
    older = known[-2::-1]
    anyway = (key for key in older if key in kept and lacking.isdisjoint(in_pieces(key)))
    return next(anyway, None) or next((key for key in older if lacking.difference(in_pieces(key))), None)


def holdings(arena: Arena, life: Life) -> dict[str, object]:
    """Return the snapshots in an arena of a life: complete, incomplete and corrupt ones."""
    digest = life.descriptor["digest"]
    holders: dict[tuple[int, int, str], set[int]] = {}
    for rank in life.ranks:
        for record in arena.seals(rank).values():
            if record.digest != digest:
                continue  # of a life whose other nodes held other things: nobody can tell whether it is whole
            holders.setdefault((record.incarnation, record.step, record.attempt), set()).add(rank)
    return {
        "ranks": list(life.ranks),
        "world": list(life.world),
        "sealed": [[*key, sorted(held)] for key, held in sorted(holders.items())],
        "snapshots": [list(key) for key, held in sorted(holders.items()) if held >= set(life.ranks)],
        "incomplete": [[*key, sorted(held)] for key, held in sorted(holders.items()) if held < set(life.ranks)],
        "corrupt": [[c.rank, c.record] for rank in life.ranks for c in arena.corrupt_seals(rank)],
    }
