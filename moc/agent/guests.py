"""Replicas of other nodes' snapshots in this agent's memory: a guest is one such node, with an arena of its own.

What always holds: a replica exists only when its seal does, and the seal is written last, after every checksum was
found right here. The newest global moment of a guest is never freed before a newer one is global; beside it there is
room for the one that arrives. Nothing of a life that is not the present one is taken in, and what an earlier life has
left is kept, as the source of a recovery, until the present one has a global moment.

Thread: `begin_life`, `note_global` and `close` from the agent's main thread, the rest from the peers' thread.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moc.agent.life import layers_of
from moc.errors import FencedError, ShardCorruptError, UsageError
from moc.format.manifest import Incarnation
from moc.plan.freeing import Moment
from moc.plan.layout import ArenaLayout, arrange_arena
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.parcel import Intake
from moc.snapshot.seal import SealRecord
from moc.snapshot.shared import SharedArena
from moc.state import catalogs_from_json

__all__ = ["GUEST_VERSIONS", "Guests", "guest_layouts"]

log = logging.getLogger(__name__)

GUEST_VERSIONS = 2  # the newest global moment, and the one that arrives


def guest_layouts(descriptor: Mapping[str, Any]) -> list[tuple[dict[str, Any], ArenaLayout]]:
    """Return the descriptor and the layout of every guest's arena that a life declares."""
    found = []
    for guest in descriptor.get("guests", ()):
        # As the guest's own arena is described, but for what only its agent needs to know of other nodes, and for where
        # the storage is: a URL may hold a password, and a replica is given to who asks for it over the network.
        common = {name: value for name, value in descriptor.items() if name not in ("guests", "hosts", "storage")}
        described = common | {
            "catalogs": guest["catalogs"],
            "versions": GUEST_VERSIONS,
            "own_versions": descriptor["versions"],
            "fellows": {"node": guest["node"], "secret": "", "address": "", "urls": []},
        }
        layout = arrange_arena(
            catalogs_from_json(guest["catalogs"]),
            versions=GUEST_VERSIONS,
            descriptor_bytes=descriptor_room(described),
        )
        found.append((described, layout))
    return found


@dataclass(slots=True, eq=False)
class _Guest:
    """One guest's arena."""

    shared: SharedArena
    node: int
    is_present: bool = True
    pins: dict[tuple[int, int, str], int] = field(default_factory=dict)

    @property
    def arena(self) -> Arena:
        return self.shared.arena

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(catalog.rank for catalog in self.arena.catalogs)

    def seals(self) -> list[tuple[int, int, SealRecord]]:
        """Return (rank, index, record) of all replicas."""
        return [(rank, index, r) for rank in self.ranks for index, r in sorted(self.arena.seals(rank).items())]

    def free(self, rank: int, index: int, record: SealRecord) -> None:
        if (record.incarnation, record.step, record.attempt) not in self.pins:
            self.arena.free(rank, index)


class Guests:
    """All replicas that this agent holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guests: list[_Guest] = []
        self._life: Incarnation | None = None
        self._digest = ""
        self._intakes: dict[int, Intake] = {}
        self._distrusted: set[int] = set()
        self._global: Moment | None = None

    # Main thread

    def missing_bytes(self, descriptor: Mapping[str, Any]) -> int:
        """Return how much memory `begin_life` would take for this life's guests."""
        with self._lock:
            return sum(
                layout.size_bytes for described, layout in guest_layouts(descriptor) if self._fitting(described) is None
            )

    def begin_life(self, life: Incarnation, descriptor: Mapping[str, Any]) -> None:
        """Make room for the guests that a life declares, and keep what it may have been recovered from.

        Blocks: about 0.7 s per GB. Raises: OSError if there is no memory.
        """
        with self._lock:
            self._intakes.clear()
            self._life, self._digest, self._global = life, str(descriptor["digest"]), None
            for guest in self._guests:
                guest.is_present = False
                _keep_source(guest, life, layers_of(descriptor))
            layouts = guest_layouts(descriptor)
            fitting = [self._fitting(described) for described, _ in layouts]
            self._retire([guest for guest in self._guests if guest not in fitting and not guest.seals()])
        for (described, layout), found in zip(layouts, fitting, strict=True):
            # Not under the lock: the peers' thread must not wait for the memory of a whole guest.
            arena = None if found is not None else Arena.create(described, layout, name=f"{life.run}-guest")
            with self._lock:
                if arena is not None:
                    self._guests.append(_Guest(shared=SharedArena(arena), node=described["fellows"]["node"]))
                elif found is not None:
                    found.arena.describe(described)
                    found.node, found.is_present = described["fellows"]["node"], True

    def note_global(self, moment: Moment) -> None:
        """Free what a newer global moment of the present life makes needless."""
        with self._lock:
            self._note_global(moment)

    def inventory(self) -> list[list[object]]:
        """Return [incarnation, step, attempt, rank] of every replica."""
        with self._lock:
            return [[r.incarnation, r.step, r.attempt, rank] for guest in self._guests for rank, _, r in guest.seals()]

    def size_bytes(self) -> int:
        with self._lock:
            return sum(guest.arena.size_bytes for guest in self._guests)

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._intakes.clear()
            guests, self._guests = self._guests, []
            for guest in guests:
                guest.shared.retire()

    # Peers' thread: taking in

    def offer(self, record: SealRecord, *, node: int, token: str, known: Moment | None) -> Intake | SealRecord:
        """Return an intake for a snapshot that a node offers of its own ranks, or its replica if that is here already.

        `known` is the newest moment that the sender knows to be global. An earlier intake of the same rank ends.
        Raises: FencedError for another life or an older moment, UsageError where there is no room, IntegrityError.
        """
        moment = (record.step, record.attempt)
        with self._lock:
            self._refuse_other_lives(record, token)
            guest = self._guest_of(record.rank)
            if guest.node != node:
                raise UsageError(f"the rank belongs to another node: rank={record.rank} node={guest.node} {node=}")
            self._refuse_older(guest, record)
            self._intakes.pop(record.rank, None)
            if known is not None:
                self._note_global(known)
            for corrupt in guest.arena.corrupt_seals(record.rank):
                log.error("seal record of a replica is corrupt: rank=%d record=%d", corrupt.rank, corrupt.record)
                guest.arena.free(corrupt.rank, corrupt.record)
            for rank, index, held in guest.seals():
                if rank != record.rank or held.incarnation != record.incarnation:
                    continue
                if (held.step, held.attempt) == moment:
                    return held
                # The sender has settled all that it has offered before: what is not global by now never will be.
                if (held.step, held.attempt) != self._global:
                    guest.free(rank, index, held)
            intake = Intake(guest.arena, record, may_share=record.rank not in self._distrusted)
            self._intakes[record.rank] = intake
            return intake

    def take(self, intake: Intake, data: memoryview) -> None:
        """Take in the next bytes. Raises: UsageError, FencedError if the intake was ended meanwhile."""
        with self._lock:
            self._refuse_ended(intake)
            intake.write(data)

    def check(self, intake: Intake) -> None:
        """Check all that has arrived against its seal.

        Blocks: for the checksums. Raises: ShardCorruptError, UsageError, FencedError if the intake was ended meanwhile.
        """
        rank = intake.record.rank
        with contextlib.ExitStack() as stack:
            with self._lock:
                self._refuse_ended(intake)
                stack.enter_context(self._guest_of(rank).shared.use())
            try:
                intake.check()
            except ShardCorruptError:
                with self._lock:  # it may be a unit that was here before: the next parcel brings all of them
                    self._distrusted.add(rank)
                raise

    def publish(self, intake: Intake) -> None:
        """Make it a replica. Only after `check`. Raises: FencedError if the intake was ended meanwhile."""
        with self._lock:
            self._refuse_ended(intake)
            intake.publish()
            self._distrusted.discard(intake.record.rank)
            del self._intakes[intake.record.rank]

    def drop(self, intake: Intake) -> None:
        """End an intake; nothing of it stays."""
        with self._lock:
            if self._intakes.get(intake.record.rank) is intake:
                del self._intakes[intake.record.rank]

    # Peers' thread: giving out

    @contextlib.contextmanager
    def open(self, snapshot: tuple[int, int, str], rank: int) -> Iterator[tuple[Arena, SealRecord]]:
        """Give access to a replica, which stays while the block lasts. Raises: UsageError if there is none."""
        with contextlib.ExitStack() as stack:
            with self._lock:
                found = [
                    (guest, record)
                    for guest in self._guests
                    if rank in guest.ranks
                    for record in guest.arena.seals(rank).values()
                    if (record.incarnation, record.step, record.attempt) == snapshot
                ]
                if not found:
                    raise UsageError(f"there is no such replica: rank={rank} snapshot={snapshot}")
                guest, record = found[0]
                arena = stack.enter_context(guest.shared.use())
                guest.pins[snapshot] = guest.pins.get(snapshot, 0) + 1
            try:
                yield arena, record
            finally:
                with self._lock:
                    guest.pins[snapshot] -= 1
                    if not guest.pins[snapshot]:
                        del guest.pins[snapshot]

    def describe(self, rank: int) -> dict[str, Any]:
        """Return the descriptor of the arena of which a guest is the replica. Raises: UsageError if there is none."""
        with self._lock:
            for guest in self._guests:
                if rank in guest.ranks:
                    described: dict[str, Any] = guest.arena.descriptor
                    return described | {"versions": described["own_versions"]}
        raise UsageError(f"there is no such guest: rank={rank}")

    # Inside, under the lock

    def _refuse_other_lives(self, record: SealRecord, token: str) -> None:
        life = self._life
        if life is None or (record.run, record.incarnation, token) != (life.run, life.number, life.token):
            present = None if life is None else life.number
            raise FencedError(
                f"another life: run={record.run} rank={record.rank} incarnation={record.incarnation} {present=}"
            )
        if record.digest != self._digest:
            raise UsageError(f"rank planned another save: rank={record.rank} digest={record.digest}")

    @staticmethod
    def _refuse_older(guest: _Guest, record: SealRecord) -> None:
        """Raise FencedError for a request that comes late: making room for it would cost a newer replica."""
        for rank, _, held in guest.seals():
            is_newer = (held.step, held.attempt) > (record.step, record.attempt)
            if rank == record.rank and held.incarnation == record.incarnation and is_newer:
                raise FencedError(f"a newer one is here: {rank=} step={record.step} held={held.step}")

    def _refuse_ended(self, intake: Intake) -> None:
        if self._intakes.get(intake.record.rank) is not intake:
            raise FencedError(f"the parcel was given up: rank={intake.record.rank} step={intake.record.step}")

    def _guest_of(self, rank: int) -> _Guest:
        for guest in self._guests:
            if guest.is_present and rank in guest.ranks:
                return guest
        raise UsageError(f"no room was declared for this rank: rank={rank}")

    def _fitting(self, described: Mapping[str, Any]) -> _Guest | None:
        for guest in self._guests:
            if guest.arena.descriptor["catalogs"] == described["catalogs"] and guest.arena.has_room(described):
                return guest
        return None

    def _note_global(self, moment: Moment) -> None:
        life = self._life
        if life is None or (self._global is not None and moment <= self._global):
            return
        self._global = moment
        for guest in self._guests:
            for rank, index, record in guest.seals():
                if record.incarnation < life.number or (record.step, record.attempt) < moment:
                    guest.free(rank, index, record)
        self._retire([guest for guest in self._guests if not guest.is_present])

    def _retire(self, guests: Sequence[_Guest]) -> None:
        self._guests = [guest for guest in self._guests if guest not in guests]
        for guest in guests:
            guest.shared.retire()


def _keep_source(guest: _Guest, life: Incarnation, layers: Collection[tuple[int, Moment]]) -> None:
    """Free all replicas but one of each rank, for there must be room for the next: that of the state that the life was
    recovered from, in the attempt that `layers` name, else the latest; where there is none, the newest of `layers`.
    """
    parent = None if life.parent is None else (life.parent.incarnation, life.parent.step)
    kept: dict[int, tuple[bool, bool, int, int, str, int]] = {}
    for rank, index, record in guest.seals():
        is_source = (record.incarnation, record.step) == parent
        is_used = (record.incarnation, (record.step, record.attempt)) in layers
        if is_source or is_used:
            worth = (is_source, is_used, record.incarnation, record.step, record.attempt, index)
            kept[rank] = max(kept.get(rank, worth), worth)
    for rank, index, record in guest.seals():
        if rank not in kept or kept[rank][-1] != index:
            guest.free(rank, index, record)
