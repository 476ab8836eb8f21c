"""Nodes of one process: arenas with sealed snapshots, and agents' network sides that take replicas in."""

from __future__ import annotations

import queue
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np

from moc._native import crc32c
from moc.agent.guests import Guests
from moc.agent.loans import Loans
from moc.agent.peers.courier import Courier, Delivery, Parcel
from moc.agent.peers.proof import Membership
from moc.agent.peers.reception import Reception
from moc.agent.peers.transport import Routes, Transport
from moc.config import Config
from moc.format.manifest import Incarnation, encode_incarnation
from moc.host import Host, SystemHost
from moc.plan.freeing import Moment
from moc.plan.layout import arrange_arena
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.seal import SealRecord
from moc.state import RankCatalog
from moc.topology import Topology
from moc.trace import Trace
from tests.support.repository import Model

DEADLINE_S = 30.0
CATALOGS = Model(world_size=4, moe_layers=1, experts=8, hidden=8, dense=(("embed.weight", (997, 4)),)).catalogs()
LIFE = Incarnation(run="run-7", number=2, token="0" * 8, parent=None, reason="start", fingerprint={})
DIGEST = "0123456789abcdef"
SENDER, HOST = 1, 0


def member(node: int, *, secret: str = "a secret") -> Membership:
    return Membership(run=LIFE.run, incarnation=LIFE.number, node=node, nodes=2, secret=secret)


def descriptor(
    node: int,
    *,
    life: Incarnation = LIFE,
    has_guests: bool = True,
    model: tuple[RankCatalog, ...] = CATALOGS,
) -> dict[str, object]:
    """Return what node's agent is told: node n has the ranks 2n and 2n+1, and hosts the other node."""
    catalogs = [[catalog.to_json() for catalog in model[2 * n : 2 * n + 2]] for n in (0, 1)]
    guests = [{"node": 1 - node, "catalogs": catalogs[1 - node]}] if has_guests else []
    return {
        "run": life.run,
        "versions": 4,
        "catalogs": catalogs[node],
        "guests": guests,
        "digest": DIGEST,
        "lineage": [encode_incarnation(life).decode()],
    }


def whole_descriptor(node: int, *, storage: str = "unused") -> dict[str, object]:
    """Return what node's agent is told, with all that a custody needs to know."""
    return descriptor(node) | {
        "hosts": [1 - node],
        "fellows": {"node": node, "secret": "a secret", "address": "127.0.0.1", "urls": []},
        "topology": Topology(world_size=4, node_of_rank=(0, 0, 1, 1)).to_json(),
        "tensors": 1,
        "fingerprint": {},
        "software": {},
        "storage": storage,
        "keep_last": 1,
        "keep_every": 0,
        "timeout_s": 1.0,
        "memory_budget_bytes": None,
        "config": asdict(Config(persist_every=0)),
    }


class Sender:
    """The arena of node 1, filled by hand; by default one of its own."""

    def __init__(self, arena: Arena | None = None, *, model: tuple[RankCatalog, ...] = CATALOGS) -> None:
        if arena is not None:
            self.arena = arena
            return
        described = descriptor(SENDER, model=model)
        layout = arrange_arena(model[2:], versions=4, descriptor_bytes=descriptor_room(described))
        self.arena = Arena.create(described, layout, name="sender")

    def seal(
        self,
        step: int,
        *,
        record: int,
        fresh: Iterable[int] | None = None,
        base: int | None = None,
        flags: int = 0,
        ordinal: int = 0,
    ) -> Moment:
        """Seal a snapshot of both ranks in slots of this number; all units but `fresh` stay those of record `base`."""
        attempt = f"{ordinal:02x}{step:06d}"
        for rank in (2, 3):
            self._seal(rank, (step, attempt), record, fresh, base, flags)
        return (step, attempt)

    def _seal(
        self, rank: int, moment: Moment, index: int, fresh: Iterable[int] | None, base: int | None, flags: int
    ) -> None:
        step, attempt = moment
        layout, shards = self.arena.rank_layout(rank), self.arena.catalog(rank).shards
        units = range(len(layout.units)) if fresh is None else sorted(fresh)
        held = None if base is None else self.arena.seals(rank)[base]
        slots = array("I", [index] * len(layout.units) if held is None else held.slots)
        steps = array("Q", [step] * len(layout.units) if held is None else held.steps)
        crcs = array("I", bytes(4 * len(shards)) if held is None else held.crcs.tobytes())
        for unit in units:
            slots[unit], steps[unit] = index, step
        numbers = np.random.default_rng(1000 * rank + step)
        offsets = self.arena.shard_offsets(rank, slots)
        for unit in units:
            part = layout.units[unit]
            for shard in range(part.first, part.first + part.count):
                with self.arena.view(offsets[shard], shards[shard].size_bytes) as view:
                    view[:] = numbers.bytes(view.nbytes)
                    crcs[shard] = crc32c(view)
        state = b"state of %d at %d" % (rank, step) * (1 + step % 3)
        with self.arena.view(self.arena.state_offset(rank, slots), len(state)) as view:
            view[:] = state
        sealed = SealRecord(
            run=LIFE.run,
            incarnation=LIFE.number,
            step=step,
            rank=rank,
            flags=flags,
            attempt=attempt,
            digest=DIGEST,
            state_bytes=len(state),
            state_crc32c=crc32c(state),
            slots=slots,
            steps=steps,
            crcs=crcs,
        )
        self.arena.seal(index, sealed)

    def parcel(self, moment: Moment, url: str, *, known: Moment | None = None, token: str = LIFE.token) -> Parcel:
        records = {
            rank: record
            for rank in (2, 3)
            for record in self.arena.seals(rank).values()
            if (record.step, record.attempt) == moment
        }
        assert len(records) == 2
        return Parcel(arena=self.arena, records=records, moment=moment, token=token, known=known, url=url)

    def close(self) -> None:
        self.arena.close()


class Wire:
    """A courier from node 1 to node 0, and what it has told."""

    def __init__(self, *, secret: str = "a secret", stall_s: float = 5.0, host: Host | None = None) -> None:
        self._told: queue.Queue[Delivery] = queue.Queue()
        self.courier = Courier(
            member(SENDER, secret=secret), HOST, stall_s=stall_s, on_end=self._told.put, host=host or SystemHost(),
            trace=Trace(),
        )  # fmt: skip

    def send(self, parcel: Parcel) -> Delivery:
        self.courier.send(parcel)
        return self._told.get(timeout=DEADLINE_S)


@contextmanager
def listening(guests: Guests, loans: Loans | None = None) -> Iterator[str]:
    """Serve an agent's guests, and what it lends, as node 0; gives the URL."""
    routes = Routes()
    Reception(guests, loans or Loans(guests)).add_to(routes)
    transport = Transport(routes, address="127.0.0.1", port=0, host=SystemHost())
    transport.enter(member(HOST))
    try:
        yield transport.url
    finally:
        transport.close()


def held_steps(guests: Guests) -> list[int]:
    """Return the steps of which both ranks have a replica."""
    rows = [(step, rank) for _, step, _, rank in guests.inventory()]
    return sorted({step for step, _ in rows if {(step, 2), (step, 3)} <= set(rows)})  # type: ignore[type-var]
