"""What agents hold in memory, of their own node and of others, judged when trainers are told of it or need it.

It looks at production objects only to learn facts that nobody announces: which agent has which bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moc.agent.server import Agent
from moc.errors import ShardCorruptError
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert
from tests.sim.facts import Held
from tests.sim.ledger import Ledger, Moment
from tests.sim.model import Links, position
from tests.sim.rot import Layer, Remains, remains_of
from tests.sim.versions import consistent_steps

if TYPE_CHECKING:
    from tests.sim.job import Trainer
    from tests.sim.process import Process

__all__ = ["Memories"]

REPLICA_TROUBLE_S = 60.0  # a parcel and its repetitions have ended by then: who is away for that has had trouble since
Snapshot = tuple[int, str]  # a moment of one life


@dataclass(slots=True)
class _Node:
    """One node of a life as its agent has it; `records` are by moment and rank, `guests` the replicas by moment."""

    agent: Process
    server: Agent
    arena: Arena
    ranks: tuple[int, ...]
    records: Mapping[Snapshot, Mapping[int, SealRecord]]
    guests: Mapping[Snapshot, Mapping[int, bool]]
    """By moment and rank, whether the bytes of the replica are right."""

    @property
    def moments(self) -> set[Snapshot]:
        """The moments that all ranks of the node hold."""
        return {moment for moment, records in self.records.items() if set(records) == set(self.ranks)}


@dataclass(slots=True)
class Memories(Ledger):
    """`held` is the newest global snapshot by life, `remembered` the step of each expert that all its slices in a
    snapshot are of, `born_s` when a life began, `alone` the numbers of lives on one node, `remains` what a rank (by its
    pid) could recover from memory on one node, `has_rotted` whether a bit of memory has flipped.
    """

    held: dict[str, Held] = field(default_factory=dict)
    remembered: dict[Moment, dict[Expert, int]] = field(default_factory=dict)
    born_s: dict[str, float] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    remains: dict[int, Remains] = field(default_factory=dict)
    has_rotted: bool = False

    def note_status(self, trainer: Trainer) -> None:
        """What a trainer is told: from now on it must hold."""
        session = trainer.session
        assert session is not None
        status, life = session.status(), session._life
        record = life.record
        if status.last_committed_step is not None:
            self.must_be_committed(record.run, record.number, status.last_committed_step)
        step = status.last_global_step
        held = self.held.get(record.token)
        if held is not None and step is not None and step < held.step and len(held.keepers) == 1:
            self.fail("global", f"life {record.number} had a global step {held.step}, now {step}")
        agent = self.sim.agent_at(record.run, trainer.process.machine)
        if agent is None:
            return
        self._judge_guests(agent)
        if step is not None and self._holds(agent, record.token, step):
            if held is None or step > held.step:
                self.count("global")
            self._must_be_global(trainer, step)

    def note_rot(self, layer: Layer, rank: int, expert: Expert | None) -> None:
        self.sim.note(None, "memory rots", {"snapshot": layer, "rank": rank, "expert": expert})
        self.has_rotted = True
        self.count("rotten")

    def note_span(self, process: Process, event: str, span: str) -> None:
        """Look at memory while a launch recovers: what is there before and after is there all the while."""
        if not self.has_rotted or event != "begin" or span not in ("recover.restore", "recover.apply"):
            return
        found: dict[Layer, Mapping[Expert, int]] = {}
        for agent in self.sim.agents:
            if agent.process.is_alive and agent.server is not None and agent.server._custody is not None:
                found |= remains_of(agent.server._custody)
        if span == "recover.apply":
            before = self.remains.get(process.pid, {})
            found = {layer: kept for layer, kept in before.items() if layer in found}
        self.remains[process.pid] = found

    def _in_memory(self, trainer: Trainer, links: Links, start: tuple[int, int], *, layers: int) -> dict[Expert, int]:
        """Return the newest step at which each expert is right in the snapshots, at most so many, from a place of the
        lineage back.
        """
        remains = self.remains.get(trainer.launch.trainers[0].process.pid, {})
        placed = [(position(links, *layer[:2]), -int(layer[2], 16), layer) for layer in remains]
        older = sorted((place, late, layer) for place, late, layer in placed if place is not None and place >= start)
        newest: dict[Expert, int] = {}
        for _, _, layer in older[:layers]:
            for expert, step in remains[layer].items():
                newest[expert] = max(newest.get(expert, step), step)
        return newest

    def must_be_committed(self, run: str, number: int, step: int) -> None:
        if not any((n.run, n.number, n.step) == (run, number, step) for n in (*self.manifests, *self.dropped)):
            self.fail("commit", f"step {step} of life {number} was announced as committed and is not stored")

    def surviving(self, trainer: Trainer) -> list[Held]:
        """Return the snapshots announced before a launch began of which every part is with an agent that has lived ever
        since, on a machine of the launch. An agent that was alone lends nothing to others.
        """
        launch = trainer.launch
        machines = {other.process.machine.number for other in launch.trainers}
        return [
            held
            for held in self.held.values()
            if held.since_s < launch.begun_s
            and (len(held.keepers) > 1 or len(machines) == 1)
            and all(
                any(a.machine.number in machines and self._holds(a, held.token, None) for a in agents)
                for agents in held.keepers
            )
        ]

    # Inside

    def _note_birth(self, trainer: Trainer) -> None:
        session = trainer.session
        assert session is not None
        life = session._life.record
        self.born_s[life.token] = self.sim.scheduler.now_s
        if len(set(trainer.launch.places)) == 1:
            self.alone.add(life.number)

    def _must_be_global(self, trainer: Trainer, step: int) -> None:
        """All ranks' seals of a moment that is at least as new exist, and the replicas that were to be made."""
        session = trainer.session
        assert session is not None
        life = session._life.record
        nodes = self._nodes_of(trainer)
        if nodes is None:
            return  # part of it is with trainers alone, until an agent adopts it
        common = sorted(m for m in set.intersection(*(node.moments for node in nodes)) if m[0] >= step)
        if not common:
            held = [sorted(node.records) for node in nodes]
            self.fail("global", f"step {step} of life {life.number} was announced as global and memory holds {held}")
            return
        arenas = {rank: node.arena for node in nodes for rank in node.ranks}
        for moment in common:
            records = {rank: record for node in nodes for rank, record in node.records[moment].items()}
            self.remembered[life.token, moment[0]] = consistent_steps(arenas, records)
        self._must_have_replicas(life.token, nodes, common)
        # Of several moments the one of which most is known to be elsewhere too.
        keepers = max((_keepers(nodes, moment) for moment in common), key=lambda rows: sum(map(len, rows)))
        held, now_s = self.held.get(life.token), self.sim.scheduler.now_s
        if held is None or step > held.step or keepers != held.keepers:
            newest = step if held is None else max(step, held.step)
            self.held[life.token] = Held(life.number, life.token, newest, keepers, now_s)

    def _must_have_replicas(self, token: str, nodes: list[_Node], common: list[Snapshot]) -> None:
        """A global moment is with every host of every node, if that host did not refuse or was not reached."""
        if not self.sim.knobs.replicas or len(nodes) == 1 or any(n.agent.begun_s > self.born_s[token] for n in nodes):
            return  # who has begun since has lost the replicas that it held, and the record of its duties
        lacking = [self._lacking(nodes, moment) for moment in common]
        if all(lacking):
            self.fail("replicas", f"life {token} was told of {common[0]}, of which replicas are missing: {lacking}")
        self.count("replicated")

    def _lacking(self, nodes: list[_Node], moment: Snapshot) -> list[str]:
        """Return which replicas of a moment do not exist although nobody says so."""
        found = []
        for number, node in enumerate(nodes):
            duty = node.server._company._replicas._duties.get(moment)
            if duty is None:
                found.append(f"node {number} has not begun")
                continue
            for host in duty.parcels:
                delivery = duty.deliveries.get(host)
                if delivery is not None and delivery.error is not None:
                    self._must_have_had_trouble(node.agent, nodes[host].agent, delivery.error)
                elif not all(nodes[host].guests.get(moment, {}).get(rank) for rank in node.ranks):
                    found.append(f"node {number} at node {host}")
        return found

    def _must_have_had_trouble(self, sender: Process, host: Process, error: str) -> None:
        now_s = self.sim.scheduler.now_s
        troubled_s = self.sim.network.troubled_s(sender.machine, host.machine)
        if max(troubled_s, sender.stopped_s, host.stopped_s) < now_s - REPLICA_TROUBLE_S:
            self.fail("replicas", f"{host.name} is away for {sender.name} although nothing is wrong: {error}")

    def _judge_guests(self, agent: Process) -> None:
        """Memory for others is bounded: what the present life declares, and what it was recovered from."""
        guests = self.sim.server_of(agent)._company._guests
        if len(guests._guests) > 2 * self.sim.knobs.replicas:
            ranks = [guest.ranks for guest in guests._guests]
            self.fail("guests", f"{agent.name} holds more arenas of others than two lives have: {ranks}")

    def _nodes_of(self, trainer: Trainer) -> list[_Node] | None:
        """Return all nodes of a trainer's life, None if some agent does not have its part in hand now."""
        session, launch = trainer.session, trainer.launch
        assert session is not None
        life = session._life.record
        found = []
        for number in dict.fromkeys(launch.places):
            ranks = tuple(rank for rank, node in enumerate(launch.places) if node == number)
            agent = self.sim.agent_at(life.run, launch.trainers[ranks[0]].process.machine)
            custody = None if agent is None else self.sim.server_of(agent)._custody
            if agent is None or custody is None or custody.life.record.token != life.token:
                return None
            records: dict[Snapshot, dict[int, SealRecord]] = {}
            for rank in ranks:
                for record in custody.arena.seals(rank).values():
                    if record.incarnation == life.number:
                        records.setdefault((record.step, record.attempt), {})[rank] = record
            server = self.sim.server_of(agent)
            guests = _replicas_in(server, life.number)
            found.append(_Node(agent, server, custody.arena, ranks, records, guests))
        return found

    def _holds(self, agent: Process, token: str, step: int | None) -> bool:
        """Return whether an agent lives and has the memory of this life, and (with a step) says that it is global."""
        custody = self.sim.server_of(agent)._custody if agent.is_alive else None
        if custody is None:
            return False
        if step is None:
            return any(record.token == token for record in custody.source().life.lineage)
        return custody.life.record.token == token and custody.global_step is not None and custody.global_step >= step


def _keepers(nodes: list[_Node], moment: Snapshot) -> tuple[tuple[Process, ...], ...]:
    """Return by node whose memory has its part of a moment."""
    return tuple(
        (node.agent, *(other.agent for other in nodes if set(node.ranks) <= set(other.guests.get(moment, ()))))
        for node in nodes
    )


def _replicas_in(server: Agent, incarnation: int) -> dict[Snapshot, dict[int, bool]]:
    """Return the replicas of a life's snapshots, by moment and rank, and whether their bytes are right."""
    found: dict[Snapshot, dict[int, bool]] = {}
    for guest in server._company._guests._guests:
        for rank, _, record in guest.seals():
            if record.incarnation == incarnation:
                found.setdefault((record.step, record.attempt), {})[rank] = _is_right(guest.arena, record)
    return found


def _is_right(arena: Arena, record: SealRecord) -> bool:
    try:
        arena.check(record)
    except ShardCorruptError:
        return False
    return True
