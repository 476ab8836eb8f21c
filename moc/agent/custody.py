"""Custody of the arena: what is sealed, what is global, what is pinned, and what may be freed. Only the agent frees.

Thread: the agent's main thread, except `pin` and `unpin`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from typing import Any

from moc.agent.keeping import base_of, holdings, origin_of, supplement
from moc.agent.life import Life
from moc.agent.mending import Pieces
from moc.agent.peers.report import NOBODY, Others
from moc.agent.room import refuse_if_too_large
from moc.plan.freeing import (
    Moment,
    Seal,
    complete_moments,
    filled_limit,
    freeable,
    holders_of,
    hopeless_moments,
    moment_after,
    newest_moments,
)
from moc.plan.layout import ArenaLayout, arrange_arena
from moc.plan.replication import global_moment
from moc.snapshot.arena import Arena, CorruptSeal, descriptor_room
from moc.snapshot.seal import PERSIST, REPLICATE, SealRecord
from moc.state import Expert, catalogs_from_json

__all__ = ["Custody"]

log = logging.getLogger(__name__)

NEVER: Moment = (1 << 64, "")  # after every moment


class Custody:
    """The arena in the agent's hands, and the custody of an earlier life's arena where the layout has changed since."""

    def __init__(self, arena: Arena, *, earlier: Custody | None = None) -> None:
        self.arena, self.earlier = arena, earlier
        self._is_source_earlier = earlier is not None
        self._records: dict[tuple[int, int], SealRecord] = {}
        self._pieces = Pieces(arena)
        self._pins: dict[tuple[int, Moment], int] = {}
        self._pins_lock = threading.Lock()
        self.is_read = False  # whether an errand reads the source: to become global would end that
        self._adopt_descriptor()

    @classmethod
    def create(cls, descriptor: Mapping[str, Any], *, earlier: Custody | None) -> Custody:
        """Create an arena for a life. Blocks: about 0.7 s per GB. Raises: UsageError if it does not fit."""
        layout = cls.refuse_too_large(descriptor, earlier=earlier)
        return cls.of(Arena.create(descriptor, layout, name=str(descriptor["run"])), earlier)

    @classmethod
    def adopt(cls, fd: int) -> Custody:
        """Take over the arena of an agent that died. Owns `fd`. Raises: IntegrityError, UsageError if it is none."""
        custody = cls.of(Arena.attach(fd), None)
        committed_step = custody.arena.published()[1]
        custody.committed = None if committed_step is None else (committed_step, "")
        return custody

    @classmethod
    def of(cls, arena: Arena, earlier: Custody | None) -> Custody:
        """Take an arena, which is closed if its descriptor is none. Raises: UsageError, IntegrityError, TypeError."""
        try:
            return cls(arena, earlier=earlier)
        except BaseException:
            arena.close()
            raise

    @staticmethod
    def refuse_too_large(
        descriptor: Mapping[str, Any], *, earlier: Custody | None, replica_bytes: int = 0
    ) -> ArenaLayout:
        """Return the layout of a new arena; raises UsageError if it does not fit into memory with these replicas."""
        layout = arrange_arena(
            catalogs_from_json(descriptor["catalogs"]),
            versions=descriptor["versions"],
            descriptor_bytes=descriptor_room(descriptor),
        )
        held_bytes = 0 if earlier is None else earlier.arena.size_bytes
        refuse_if_too_large(
            layout.size_bytes, descriptor["memory_budget_bytes"], held_bytes=held_bytes, replica_bytes=replica_bytes
        )
        return layout

    def fits(self, descriptor: Mapping[str, Any]) -> bool:
        """Return whether this memory can serve a life with that descriptor."""
        held = self.arena.descriptor
        is_same = held["catalogs"] == descriptor["catalogs"] and held["versions"] == descriptor["versions"]
        return is_same and self.arena.has_room(descriptor)

    def renew(self, descriptor: Mapping[str, Any]) -> None:
        """Begin a new life on the same memory: keep the recovery source and what is pinned, free the rest.

        No trainer of an earlier life may be alive.
        """
        self.arena.describe(descriptor)
        self._adopt_descriptor()
        pinned = self.pinned() | self.life.layers
        base = self._base()
        limit = filled_limit(self.arena.layout.ranks[0].versions, has_replicas=bool(self.life.hosts))
        if base is not None and len(pinned | {base}) <= limit:
            pinned.add(base)
        # Read again: a record that has rotted since it was first read would stay, as the source, and its new trainer,
        # who cannot tell its slots, could never take a snapshot.
        self._records.clear()
        self._refresh()
        source = self._origin(self.life)
        for (rank, index), record in list(self._records.items()):
            key = (record.incarnation, (record.step, record.attempt))
            if key != source and key not in pinned:
                self._free(rank, index)
        for rank in self.life.ranks:
            self.arena.clear_words(rank)

    def amend(self, descriptor: Mapping[str, Any]) -> None:
        """Replace the descriptor by one of the same life and layout."""
        self.arena.describe(descriptor)
        self.life = Life.of(self.arena.descriptor)

    def _adopt_descriptor(self) -> None:
        self.life = Life.of(self.arena.descriptor)
        self._settled: set[Moment] = set()
        self.newest: Moment | None = None
        """The newest moment of this life that every rank has sealed."""
        self.complete: tuple[Moment, ...] = ()
        self.committed: Moment | None = None
        """The newest moment of this life that is known to be committed."""
        self.stable: Moment | None = None
        """The newest global moment of this life: the newest complete one, or where there are replicas, the newest of
        which every node has done its duty."""
        self.done: tuple[Moment, ...] = ()
        """The newest moments to which this node has done its duty."""
        self.leaning: tuple[Moment, ...] = ()
        """The moments that this node's part of lets none of the nodes do without memory of another layout."""
        self._leaning_elsewhere: frozenset[Moment] = frozenset()
        self._replicated: Moment | None = None
        self.begun: Moment | None = None
        """The newest moment whose replication has begun; no older one ever will."""
        self.hopeless: dict[Moment, tuple[int, ...]] = {}
        self.holders: dict[Moment, set[int]] = {}
        """The moments of this life that anybody holds, as of the last look, and which ranks do."""
        self.passed: dict[int, Moment] = {}
        """How far each of this node's ranks had come, before the last look at what they hold."""
        self._passed: dict[int, Moment] = {}

    @property
    def global_step(self) -> int | None:
        """The newest step of this life that is global."""
        return None if self.stable is None else self.stable[0]

    def unreplicated(self) -> list[Moment]:
        """Return the moments held here that are to be replicated, and are neither global nor passed over, ascending."""
        number = self.life.record.number
        flagged = {
            (r.step, r.attempt) for r in self._records.values() if r.incarnation == number and r.flags & REPLICATE
        }
        return sorted(
            moment
            for moment in flagged
            if moment not in self.hopeless
            and (self.begun is None or moment >= self.begun)
            and all(settled is None or moment > settled for settled in (self.stable, self._replicated))
        )

    def pin(self, incarnation: int, moment: Moment) -> None:
        """Keep the seals of a moment until `unpin`. Thread: any."""
        with self._pins_lock:
            key = (incarnation, moment)
            self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, incarnation: int, moment: Moment) -> None:
        """Undo one `pin`. Thread: any."""
        with self._pins_lock:
            key = (incarnation, moment)
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]

    def is_saving(self, moment: Moment) -> bool:
        """Return whether a moment of the present life is being persisted."""
        return (self.life.record.number, moment) in self.pinned()

    def is_pinned(self) -> bool:
        """Return whether a save or an errand reads this memory, or that of an earlier life behind it."""
        return bool(self.pinned()) or (self.earlier is not None and self.earlier.is_pinned())

    def pinned(self) -> set[tuple[int, Moment]]:
        with self._pins_lock:
            return set(self._pins)

    def scan(
        self, *, ended: Collection[int] = (), others: Others = NOBODY, wished: Collection[Moment] = ()
    ) -> list[Moment]:
        """Look at all records, free what nothing needs. `ended` are this node's ranks whose trainers are dead, `others`
        what the agents of other nodes have reported, `wished` what these want saved.

        Return the complete ones of this life's saves that have not ended and of what is wished, ascending.
        """
        passed = self._read_passed()  # before the records: what a rank has passed, it shows or will never have
        # A dead rank seals no more: without this the others would hold what it lacks until their own end.
        passed |= dict.fromkeys(ended, NEVER)
        self._refresh()
        ranks, incarnation = self.life.world, self.life.record.number
        own = self._seals()
        self._passed, self.passed = newest_moments(own, incarnation), passed
        seals = [*own, *others.seals]
        self.hopeless = hopeless_moments(seals, ranks, incarnation, passed={**others.passed, **passed})
        self.holders = holders_of(seals, incarnation)
        self.complete = complete = complete_moments(seals, ranks, incarnation)
        if complete and complete[-1] != self.newest:
            self.newest = complete[-1]
        self.leaning, self._leaning_elsewhere = self._leaning(), others.leaning
        self._note_global(others)
        if self.stable is not None:
            self._is_source_earlier = False
        if self.earlier is not None and not self._is_source_earlier and not self.earlier.is_pinned():
            self.earlier.close()
            self.earlier = None
        # With a global step the new life stands on its own.
        whole = self._origin(self.life)
        source = None if self.stable is not None else whole
        wanted = self.unfinished_saves().union(wished)
        pinned = self.pinned() | {(incarnation, moment) for moment in wanted}
        if self.life.hosts:
            kept = [*self.unreplicated(), *([] if self.stable is None else [self.stable])]
            pinned |= {(incarnation, moment) for moment in kept}
        pinned |= self._kept_in_partial_modes(whole, kept=pinned)
        here = set(self.life.ranks)
        for seal in freeable(
            seals,
            ranks,
            incarnation,
            pinned=pinned,
            source=source,
            hopeless=self.hopeless,
            has_global=self.stable is not None,
        ):
            if seal.rank in here:
                self._free(seal.rank, seal.record)
        return [moment for moment in complete if moment in wanted]

    def _kept_in_partial_modes(
        self, source: tuple[int, Moment] | None, *, kept: Collection[tuple[int, Moment]]
    ) -> set[tuple[int, Moment]]:
        """Return what to keep beside the newest complete snapshot because it may not have all that a recovery wants."""
        known = [*([source] if source else []), *((self.life.record.number, moment) for moment in self.complete)]
        lacking = supplement(self.arena.layout.ranks[0].versions, known, self._in_pieces, kept=kept)
        base = self._base()
        return {key for key in (lacking, base) if key is not None}

    def _base(self) -> tuple[int, Moment] | None:
        """Return the snapshot of the newest commit, None where none is kept."""
        return base_of(self.life, self.committed, self._records.values())

    def note_commit(self, moment: Moment) -> None:
        """Say that a moment of the present life is committed."""
        self.committed = max(moment, self.committed or moment)

    def _note_global(self, others: Others) -> None:
        found = self.newest
        if self.life.hosts:
            done = {**others.done, self.life.node: self.done}
            self._replicated = found = global_moment(self.complete, done, nodes=range(self.life.nodes))
        if found is not None and not self.is_read and not self.leans_on_earlier(found):
            self.stable = max(found, self.stable or found)

    def leans_on_earlier(self, moment: Moment) -> bool:
        """Return whether a moment has experts in pieces at any node that still reads memory of another layout.

        All nodes must say the same: else some would show a recovery that memory, and others have given it up.
        """
        return moment in self.leaning or moment in self._leaning_elsewhere

    def _leaning(self) -> tuple[Moment, ...]:
        """Return the moments, held here whole, with experts in pieces that only memory of another layout has whole."""
        if self.source() is self:
            return ()
        number = self.life.record.number
        mine = (moment for moment in sorted(self.held) if self.holds(moment))
        return tuple(moment for moment in mine if self._in_pieces((number, moment)))

    def _in_pieces(self, key: tuple[int, Moment]) -> frozenset[Expert]:
        return self._pieces.of(key, self.records_of(*key))

    def _read_passed(self) -> dict[int, Moment]:
        """Return how far each rank has come: what it has sealed by the last look, or what it says it has skipped."""
        passed = dict(self._passed)
        for rank in self.life.ranks:
            skipped = self.arena.skipped(rank)
            if skipped is not None:
                moment = moment_after(*skipped)
                passed[rank] = max(passed.get(rank, moment), moment)
        return passed

    def holds(self, moment: Moment) -> bool:
        """Return whether all of this node's ranks hold a moment of the present life."""
        return len(self.records_of(self.life.record.number, moment)) == len(self.life.ranks)

    @property
    def held(self) -> dict[Moment, set[int]]:
        """The moments of this life in this memory, as of the last look, and which of this node's ranks hold them."""
        here = set(self.life.ranks)
        return {moment: ranks & here for moment, ranks in self.holders.items() if ranks & here}

    @property
    def newest_here(self) -> Moment | None:
        """The newest moment that all of this node's ranks hold."""
        return max((moment for moment, ranks in self.held.items() if ranks == set(self.life.ranks)), default=None)

    def records_of(self, incarnation: int, moment: Moment) -> dict[int, SealRecord]:
        """Return the seals of one moment by rank."""
        return {
            rank: record
            for (rank, _), record in sorted(self._records.items())
            if record.incarnation == incarnation and (record.step, record.attempt) == moment
        }

    def recovery_source(self, life: Life) -> dict[int, SealRecord]:
        """Return the seals that a life, the present one, was recovered from, by rank.

        Empty if memory does not hold all of them.
        """
        self._refresh()
        source = self._origin(life)
        return {} if source is None else self.records_of(*source)

    def _origin(self, life: Life) -> tuple[int, Moment] | None:
        return origin_of(life, self.life.ranks, self._records.values())

    def settle(self, moment: Moment) -> None:
        """Say that the save of this moment has ended, well or badly, and holds its seals no longer."""
        self._settled.add(moment)

    def unfinished_saves(self) -> set[Moment]:
        """Return the saves of this life that at least one rank has sealed and that have not ended."""
        number = self.life.record.number
        self._settled &= {(r.step, r.attempt) for r in self._records.values() if r.incarnation == number}
        return {
            (r.step, r.attempt)
            for r in self._records.values()
            if r.incarnation == number and r.flags & PERSIST and (r.step, r.attempt) not in self._settled
        }

    def source(self) -> Custody:
        """Return the custody that a recovery reads from: the earlier life's until a life on this memory has had a
        global step.
        """
        return self.earlier if self.earlier is not None and self._is_source_earlier else self

    def inventory(self) -> dict[str, object]:
        """Return what a recovery may choose from: complete snapshots, incomplete and corrupt ones, the lineage."""
        source = self.source()
        return {
            "lineage": list(self.life.descriptor["lineage"]),
            "fingerprint": self.life.descriptor["fingerprint"],
            **holdings(source.arena, source.life),
        }

    def look_again(self) -> None:
        """Read all records anew at the next look: somebody else of this agent has freed and sealed some."""
        self._records.clear()

    def close(self) -> None:
        """Give the memory back."""
        if self.earlier is not None:
            self.earlier.close()
        self.arena.close()

    def _refresh(self) -> None:
        for rank in self.life.ranks:
            for index in range(self.arena.rank_layout(rank).versions):
                key = (rank, index)
                if self.arena.is_free(rank, index):
                    self._records.pop(key, None)
                elif key not in self._records:
                    record = self.arena.read_seal(rank, index)
                    if isinstance(record, CorruptSeal):
                        log.error("seal record is corrupt: rank=%d record=%d", rank, index)
                        self.arena.free(rank, index)  # it can never be used, and would hold its slots for ever
                    elif record is not None:
                        self._records[key] = record

    def _seals(self) -> list[Seal]:
        return sorted(
            Seal(incarnation=r.incarnation, step=r.step, rank=rank, record=index, attempt=r.attempt)
            for (rank, index), r in self._records.items()
        )

    def _free(self, rank: int, index: int) -> None:
        self.arena.free(rank, index)
        self._records.pop((rank, index), None)
