"""Snapshots that agents of other nodes have in memory, as who recovers sees them: where they are, and how to ask.

A *lender* is an agent that has a rank's part of a snapshot: its own rank's, or a replica. It is asked as a member of
the life that it serves, which need not be that of another one. Whatever lenders do, a part is right or an error, and
no wait is without a limit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from moc._native import crc32c
from moc.agent import wire
from moc.agent.peers.client import PeerClient
from moc.agent.peers.courier import SLOWEST_BYTES_PER_S, STALL_S
from moc.agent.peers.proof import Membership
from moc.errors import InternalError, MocError, ShardCorruptError, StoreUnavailableError, UsageError
from moc.host import Host
from moc.plan.layout import Unit, arrange_rank
from moc.snapshot.parcel import read_seal
from moc.snapshot.seal import SealRecord
from moc.state import RankCatalog

__all__ = [
    "Doubts",
    "Lender",
    "LentPart",
    "Snapshot",
    "ask_in_turn",
    "ask_seal",
    "data_target",
    "lenders_of",
    "merge_lenders",
]

log = logging.getLogger(__name__)

T = TypeVar("T")
Snapshot = tuple[int, int, str]
_Told = tuple[RankCatalog, tuple[Unit, ...], Mapping[str, object]]

ROUNDS = 2  # an agent that hundreds of ranks ask at once may turn one away before it has seen who that is
ROUND_WAIT_S = 1.0
SPARED_S = 60.0  # a node that is gone costs seconds to ask, and a recovery has thousands of questions


@dataclass(frozen=True, slots=True, kw_only=True)
class Lender:
    """An agent of another node, and the life of which it is a member."""

    run: str
    incarnation: int
    node: int
    nodes: int
    secret: str = field(repr=False)
    url: str

    @staticmethod
    def from_json(row: object) -> Lender:
        """Raises: UsageError for what no agent has told."""
        if not isinstance(row, Mapping):
            raise UsageError(f"not an agent that lends snapshots: type={type(row).__name__}")
        return Lender(
            run=wire.text(row, "run"),
            incarnation=wire.integer(row, "incarnation"),
            node=wire.integer(row, "node"),
            nodes=wire.integer(row, "nodes"),
            secret=wire.text(row, "secret"),
            url=wire.text(row, "url"),
        )

    def client(self, host: Host) -> PeerClient:
        """Return a client that asks as some member that is not that node: what this one was it may not know."""
        member = Membership(
            run=self.run,
            incarnation=self.incarnation,
            node=(self.node + 1) % self.nodes,
            nodes=self.nodes,
            secret=self.secret,
        )
        return PeerClient(member, self.url, stall_s=STALL_S, host=host)


def merge_lenders(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return who has what, from the inventories of all agents that can be asked: what `lenders_of` reads.

    Each place is [incarnation, step, attempt, rank, number of the member, is a replica]; empty if nobody has anything.
    """
    members = [row for row in rows if row.get("peer")]
    owned = [
        [*snapshot, rank, number, False]
        for number, row in enumerate(members)
        for *snapshot, ranks in row["sealed"]
        for rank in ranks
    ]
    replicas = [[*replica, number, True] for number, row in enumerate(members) for replica in row["replicas"]]
    return {"members": [row["peer"] for row in members], "places": [*owned, *replicas]} if members else {}


def lenders_of(told: Mapping[str, Any], snapshot: Snapshot) -> dict[int, tuple[Lender, ...]]:
    """Return who has each rank's part of a snapshot: its own agent before those with replicas. Raises: UsageError."""
    members = [Lender.from_json(row) for row in told.get("members", ())]
    found: dict[int, list[tuple[bool, int]]] = {}
    for row in told.get("places", ()):
        match row:
            case [int(incarnation), int(step), str(attempt), int(rank), int(number), bool(is_replica)] if (
                0 <= number < len(members)
            ):
                if (incarnation, step, attempt) == snapshot:
                    found.setdefault(rank, []).append((is_replica, number))
            case _:
                raise UsageError(f"not the place of a snapshot: given={row!r:.80}")
    return {rank: tuple(members[number] for _, number in sorted(places)) for rank, places in sorted(found.items())}


def _fields(snapshot: Snapshot, rank: int) -> dict[str, object]:
    incarnation, step, attempt = snapshot
    return {"rank": rank, "incarnation": incarnation, "step": step, "attempt": attempt}


def data_target(snapshot: Snapshot, rank: int, piece: str | None = None) -> str:
    """Return path and query of the bytes of a part: all of them, or of the shard of this number, or "state"."""
    fields = _fields(snapshot, rank) | ({} if piece is None else {"piece": piece})
    return "/replica/data?" + "&".join(f"{name}={value}" for name, value in fields.items())


def ask_seal(client: PeerClient, snapshot: Snapshot, rank: int) -> SealRecord:
    """Return the seal of a rank's part. Raises: MocError."""
    record = read_seal(client.ask("/replica/find", _fields(snapshot, rank)).get("seal"))
    if (record.rank, record.incarnation, record.step, record.attempt) != (rank, *snapshot):
        raise ShardCorruptError(f"another seal was given: rank={record.rank} step={record.step}")
    return record


class Doubts:
    """Which lenders have not answered in one recovery. They are asked after all others; for a while not at all, once
    they were asked again and nobody else could give it. Thread: any.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._doubted: set[str] = set()
        self._spared_until_s: dict[str, float] = {}

    def in_order(self, lenders: Sequence[Lender]) -> list[Lender]:
        """Return whom to ask, in this order."""
        with self._lock:
            now_s = self._host.now_s()
            asked = [lender for lender in lenders if self._spared_until_s.get(lender.url, now_s) <= now_s]
            return sorted(asked, key=lambda lender: lender.url in self._doubted)

    def note(self, lender: Lender, *, answers: bool) -> None:
        """Note whether a lender has answered."""
        with self._lock:
            if answers:
                self._doubted.discard(lender.url)
                self._spared_until_s.pop(lender.url, None)
            else:
                self._doubted.add(lender.url)

    def spare(self, lender: Lender) -> None:
        """Ask a lender nothing for a while."""
        with self._lock:
            self._spared_until_s[lender.url] = self._host.now_s() + SPARED_S


def ask_in_turn(
    lenders: Sequence[Lender],
    act: Callable[[PeerClient], T],
    *,
    snapshot: Snapshot,
    rank: int,
    host: Host,
    doubts: Doubts,
) -> T:
    """Return what the first lender gives that gives it right. Raises: ShardCorruptError if none does."""
    failures: list[tuple[Lender, MocError]] = []
    asked = doubts.in_order(lenders)
    spared = [f"node {lender.node}: did not answer before" for lender in lenders if lender not in asked]
    for number in range(ROUNDS if asked else 0):
        if number:
            host.sleep(ROUND_WAIT_S)
        failures = []
        for lender in asked:
            try:
                found = act(lender.client(host))
            except MocError as error:
                log.warning("snapshot cannot be had: rank=%d node=%d reason=%s", rank, lender.node, error)
                doubts.note(lender, answers=not isinstance(error, StoreUnavailableError))
                failures.append((lender, error))
            else:
                doubts.note(lender, answers=True)
                return found
        if not any(isinstance(error, StoreUnavailableError) for _, error in failures):
            break
    for lender, failure in failures:
        if isinstance(failure, StoreUnavailableError):
            doubts.spare(lender)
    problems = [*(f"node {lender.node}: {failure}" for lender, failure in failures), *spared]
    raise ShardCorruptError(f"no other node gives it: rank={rank} snapshot={snapshot} {'; '.join(problems)}")


class LentPart:
    """One rank's part of a snapshot, which other nodes have (see `moc.held.Part`).

    A seal or catalog that nobody gives is not asked for again.
    """

    def __init__(
        self, snapshot: Snapshot, rank: int, lenders: Sequence[Lender], *, host: Host, doubts: Doubts | None = None
    ) -> None:
        """`doubts` are those of the recovery."""
        self._snapshot, self._rank, self._lenders, self._host = snapshot, rank, lenders, host
        self._doubts = doubts or Doubts(host)
        self._lock = threading.Lock()
        self._good = ""
        self.holder = f"memory of another node rank={rank}"
        self.lent_bytes = 0

    @property
    def record(self) -> SealRecord:
        return _given(self._seal)

    @cached_property
    def _seal(self) -> SealRecord | ShardCorruptError:
        return self._attempt(lambda client: ask_seal(client, self._snapshot, self._rank))

    @cached_property
    def _told(self) -> _Told | ShardCorruptError:
        if isinstance(self._seal, ShardCorruptError):
            return self._seal
        record = self._seal

        def ask(client: PeerClient) -> _Told:
            answer = client.ask("/replica/catalog", _fields(self._snapshot, self._rank))
            life = wire.mapping(answer, "life")
            for name in ("topology", "software", "fingerprint"):
                wire.mapping(life, name)
            try:
                catalog = RankCatalog.from_json(wire.mapping(answer, "catalog"))
            except (InternalError, LookupError, TypeError, ValueError) as error:
                raise ShardCorruptError(f"catalog is not readable: rank={self._rank} reason={error}") from error
            units = arrange_rank(catalog, versions=1).units
            is_of_catalog = (len(catalog.shards), len(units)) == (len(record.crcs), len(record.slots))
            if not is_of_catalog or record.state_bytes > catalog.state_capacity_bytes:
                raise ShardCorruptError(f"the seal is of another catalog: rank={self._rank} step={record.step}")
            return catalog, units, life

        return self._attempt(ask)

    @property
    def catalog(self) -> RankCatalog:
        return _given(self._told)[0]

    @property
    def units(self) -> tuple[Unit, ...]:
        return _given(self._told)[1]

    @property
    def life(self) -> Mapping[str, object]:
        return _given(self._told)[2]

    def read(self, index: int) -> memoryview:
        return self._fetch(str(index), self.catalog.shards[index].size_bytes, self.record.crcs[index])

    def state(self) -> bytes:
        _given(self._told)  # so that the blob is no longer than the catalog allows
        record = self.record
        return bytes(self._fetch("state", record.state_bytes, record.state_crc32c))

    def _fetch(self, piece: str, size_bytes: int, expected: int) -> memoryview:
        target = data_target(self._snapshot, self._rank, piece)

        def get(client: PeerClient) -> memoryview:
            view, reached = memoryview(bytearray(size_bytes)), 0

            def take(data: bytes) -> None:
                nonlocal reached
                view[reached : reached + len(data)] = data
                reached += len(data)

            deadline_s = self._host.now_s() + STALL_S + size_bytes / SLOWEST_BYTES_PER_S
            client.get(target, take, size_bytes=size_bytes, deadline_s=deadline_s)
            actual = crc32c(view)
            if actual != expected:  # another one may have it right
                raise ShardCorruptError(f"checksum mismatch: {piece=} {expected=} {actual=}")
            return view

        found = self._ask(get)
        with self._lock:
            self.lent_bytes += size_bytes
        return found

    def _attempt(self, act: Callable[[PeerClient], T]) -> T | ShardCorruptError:
        """Return what is asked for, or why nobody gives it."""
        try:
            return self._ask(act)
        except ShardCorruptError as error:
            return error

    def _ask(self, act: Callable[[PeerClient], T]) -> T:
        """Ask first who gave something last."""

        def ask(client: PeerClient) -> T:
            found = act(client)
            self._good = client.url
            return found

        lenders = sorted(self._lenders, key=lambda lender: lender.url != self._good)
        return ask_in_turn(lenders, ask, snapshot=self._snapshot, rank=self._rank, host=self._host, doubts=self._doubts)


def _given(found: T | ShardCorruptError) -> T:
    if isinstance(found, ShardCorruptError):
        raise found
    return found
