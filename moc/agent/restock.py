"""Brings back what a node has lost: replicas of its ranks, from other nodes' memory into its own, before a recovery.

A replaced node's agent has nothing at all; it makes an arena as its predecessor's was, so that everything later finds
what it would have found there. What a node still has is checked, and fetched again where its checksums are wrong. The
bytes are right before their seal is written. Thread: the agent's main thread, but for the errand.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moc.agent import wire
from moc.agent.custody import Custody
from moc.agent.peers.client import PeerClient
from moc.agent.peers.courier import SLOWEST_BYTES_PER_S, STALL_S
from moc.agent.peers.lender import Doubts, Lender, Snapshot, ask_in_turn, ask_seal, data_target, lenders_of
from moc.agent.room import refuse_if_too_large
from moc.errors import MocError, ShardCorruptError, UsageError
from moc.host import Host
from moc.plan.layout import arrange_arena
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.parcel import Intake
from moc.state import catalogs_from_json
from moc.trace import Trace

__all__ = ["Errand", "Restock", "errand_from"]

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A snapshot of which all ranks of this node are wanted; `rank` is one of them, `lenders` has those of all nodes.

    `storage` is the job's own, which no other node is asked for.
    """

    snapshot: Snapshot
    rank: int
    run: str
    storage: str = field(repr=False)
    memory_budget_bytes: int | None
    lenders: Mapping[int, Sequence[Lender]]


def errand_from(message: wire.Message) -> Errand:
    """Return the errand in a request; raises UsageError."""
    snapshot = (wire.integer(message, "incarnation"), wire.integer(message, "step"), wire.text(message, "attempt"))
    return Errand(
        snapshot=snapshot,
        rank=wire.integer(message, "rank"),
        run=wire.text(message, "run"),
        storage=wire.text(message, "storage"),
        memory_budget_bytes=None if message.get("budget") is None else wire.integer(message, "budget"),
        lenders=lenders_of(wire.mapping(message, "lenders"), snapshot),
    )


class Restock:
    """One errand at a time, on a thread of its own; those who want the same wait together."""

    def __init__(self, *, host: Host, trace: Trace, wake: Callable[[], None]) -> None:
        """`wake` tells the main thread that an errand has ended."""
        self._host, self._trace, self._wake = host, trace, wake
        self._doubts = Doubts(host)
        self._lock = threading.Lock()
        self._wanted: list[tuple[socket.socket, Errand]] = []
        self._errand: Errand | None = None
        self._read: tuple[Custody, Custody] | None = None  # whose source is read for the errand, and that source
        self._outcome: tuple[Custody | None, dict[str, object]] | None = None

    @property
    def is_busy(self) -> bool:
        """Return whether an errand is under way, or waits."""
        return self._errand is not None or bool(self._wanted)

    def want(self, connection: socket.socket, errand: Errand) -> None:
        """Note an errand, and whom to answer."""
        self._wanted.append((connection, errand))

    def start_next(self, custody: Custody | None) -> None:
        """Begin the first errand, if there is one and none is under way, into this custody's arena or a new one."""
        if self._errand is not None or not self._wanted:
            return
        errand = self._errand = self._wanted[0][1]
        arena = None
        if custody is not None:
            arena = self._keep(custody, errand.snapshot).arena

        def run() -> None:
            outcome = self._attempt(errand, arena)
            with self._lock:
                self._outcome = outcome
            self._wake()

        self._host.spawn(run, name="moc-restock")

    def collect(self) -> tuple[Custody | None, list[tuple[socket.socket, dict[str, object]]]]:
        """Return the custody of the arena that an ended errand has made, if it made one, and the replies to those who
        wanted it.
        """
        with self._lock:
            outcome, self._outcome = self._outcome, None
        if outcome is None or self._errand is None:
            return None, []
        snapshot, self._errand = self._errand.snapshot, None
        self._release(snapshot)
        replies = [(connection, outcome[1]) for connection, errand in self._wanted if errand.snapshot == snapshot]
        self._wanted = [row for row in self._wanted if row[1].snapshot != snapshot]
        return outcome[0], replies

    def _keep(self, custody: Custody, snapshot: Snapshot) -> Custody:
        """Return the source, kept as it is until `_release`: to unmap what the errand reads would end the agent, and
        what it has brought back would be freed while ranks of this node still lack it.
        """
        source, (incarnation, step, attempt) = custody.source(), snapshot
        source.pin(incarnation, (step, attempt))
        custody.is_read = True
        self._read = (custody, source)
        return source

    def _release(self, snapshot: Snapshot) -> None:
        if self._read is not None:
            (custody, source), (incarnation, step, attempt) = self._read, snapshot
            custody.is_read, self._read = False, None
            source.unpin(incarnation, (step, attempt))

    # The errand's thread

    def _attempt(self, errand: Errand, arena: Arena | None) -> tuple[Custody | None, dict[str, object]]:
        """Do the errand and say how it went: the thread's top, nothing escapes."""
        made: Custody | None = None
        self._doubts = Doubts(self._host)
        try:
            with self._trace.span("replica.fetch", step=errand.snapshot[1]):
                if arena is None:
                    made = self._make_arena(errand)
                    arena = made.arena
                fetched = [self._restore(errand, arena, catalog.rank) for catalog in arena.catalogs]
        except (MocError, OSError) as error:
            log.warning("replicas could not be fetched: snapshot=%s %s", errand.snapshot, error)
            return made, {"problem": f"{type(error).__name__}: {error}"}
        except Exception as error:  # a defect: recorded, answered, and the agent goes on
            log.exception("replicas could not be fetched: snapshot=%s", errand.snapshot)
            return made, {"problem": f"InternalError: {type(error).__name__}: {error}"}
        log.info("fetched replicas: snapshot=%s bytes=%d", errand.snapshot, sum(fetched))
        return made, {"bytes": sum(fetched)}

    def _make_arena(self, errand: Errand) -> Custody:
        """Return an arena as the lost one was, as a host of this node's replicas describes it."""
        given = self._first(errand, errand.rank, lambda client: _described(client, errand.rank))
        described = {**given, "storage": errand.storage}
        catalogs = described["catalogs"]
        nodes = max(lender.nodes for lender in errand.lenders[errand.rank])
        # A life on this arena describes the guests too.
        room = descriptor_room({**described, "guests": [catalogs for _ in range(nodes - 1)]})
        layout = arrange_arena(catalogs_from_json(catalogs), versions=described["versions"], descriptor_bytes=room)
        refuse_if_too_large(layout.size_bytes, errand.memory_budget_bytes)
        return Custody.of(Arena.create(described, layout, name=errand.run), None)

    def _restore(self, errand: Errand, arena: Arena, rank: int) -> int:
        """See that a rank's part of the snapshot is here and right; return the bytes fetched for it."""
        for index, record in arena.seals(rank).items():
            if (record.incarnation, record.step, record.attempt) == errand.snapshot:
                try:
                    arena.check(record)
                    return 0
                except ShardCorruptError as error:
                    log.error("snapshot has rotted in memory, its replica is fetched: %s", error)
                    arena.free(rank, index)
        return self._first(errand, rank, lambda client: self._fetch(client, errand, arena, rank))

    def _first(self, errand: Errand, rank: int, act: Callable[[PeerClient], T]) -> T:
        lenders = errand.lenders.get(rank, ())
        return ask_in_turn(lenders, act, snapshot=errand.snapshot, rank=rank, host=self._host, doubts=self._doubts)

    def _fetch(self, client: PeerClient, errand: Errand, arena: Arena, rank: int) -> int:
        record = ask_seal(client, errand.snapshot, rank)
        intake = Intake(arena, record, may_share=False)
        deadline_s = self._host.now_s() + STALL_S + intake.size_bytes / SLOWEST_BYTES_PER_S
        target = data_target(errand.snapshot, rank)
        client.get(target, intake.write, size_bytes=intake.size_bytes, deadline_s=deadline_s)
        intake.check()
        intake.publish()
        return intake.size_bytes


def _described(client: PeerClient, rank: int) -> dict[str, Any]:
    described = client.ask("/replica/describe", {"rank": rank}).get("descriptor")
    if not isinstance(described, dict):
        raise UsageError("no descriptor was given")
    return described
