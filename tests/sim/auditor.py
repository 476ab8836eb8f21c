"""Watches everything that a reader or a user could see, and names what breaks a promise.

It keeps a model of its own (`tests.sim.model`) and looks at production objects only to learn facts that nobody
announces: which agent holds which life's memory, and which token a life has.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moc.errors import MocError
from moc.snapshot.arena import Arena
from tests.sim.facts import Held, Knowledge, LifeFact, Survey
from tests.sim.model import (
    Record,
    StoredName,
    chain,
    due_to_go,
    object_defect,
    parse_name,
    parse_record,
    position,
)
from tests.sim.state import Whole, advance, first_whole, noise_at

if TYPE_CHECKING:
    from array import array

    from tests.sim.job import Trainer
    from tests.sim.process import Process
    from tests.sim.simulation import Simulation

__all__ = ["Auditor"]

LIVING_S = 10.0  # a job whose ranks all stepped this lately must not be taken over


@dataclass(slots=True)
class Auditor:
    """Collects violations; the simulation stops at the first."""

    sim: Simulation
    violations: list[str] = field(default_factory=list)
    lives: dict[str, LifeFact] = field(default_factory=dict)
    wholes: dict[tuple[str, int], Whole] = field(default_factory=dict)
    doers: dict[tuple[str, int], int] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    written: dict[str, bytes] = field(default_factory=dict)
    records: dict[int, list[Record]] = field(default_factory=dict)
    manifests: dict[StoredName, tuple[str, ...]] = field(default_factory=dict)
    dropped: set[StoredName] = field(default_factory=set)
    seen: dict[int, dict[int, Record]] = field(default_factory=dict)
    committer: dict[int, int] = field(default_factory=dict)
    surveys: dict[int, Survey] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def fail(self, promise: str, what: str) -> None:
        self.sim.note(None, f"VIOLATION {promise}: {what}")
        self.violations.append(f"{promise}: {what}")

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # Storage

    def note_put(self, key: str, content: bytes, *, by: Process, knowledge: Knowledge) -> None:
        digest = hashlib.sha256(content).digest()
        if not key.startswith("victims/") and self.written.setdefault(key, digest) != digest:
            self.fail("I1", f"{key} is written with a second content by {by.name}")
        if key.startswith("incarnations/"):
            record = parse_record(content)
            self.records.setdefault(record.number, []).append(record)
        elif key.startswith("manifests/"):
            self._judge_commit(key, content, by, knowledge)

    def knowledge(self, by: Process) -> Knowledge:
        """Return what a process knows when it asks for a change, which may take effect later."""
        return Knowledge(self.committer.get(by.pid), self.seen.get(by.pid, {}))

    def is_past(self, key: str) -> bool:
        """Return whether a life newer than the key's has committed."""
        newest = max((name.number for name in self.manifests), default=0)
        return "/" in key and int(key.split("/")[1][:6]) < newest

    def note_delete(self, key: str, *, by: Process, knowledge: Knowledge) -> None:
        kind = key.partition("/")[0]
        if kind not in ("manifests", "objects"):
            if kind != "victims":
                self.fail("I5", f"{by.name} deletes {key}")
            return
        life, seen = knowledge.life, knowledge.seen
        if by.kind != "agent" or life is None or max(seen, default=0) > life:
            self.fail("I5", f"{by.name} of life {life} deletes {key} having seen {sorted(seen)}")
        if kind == "objects":
            holders = [name for name, keys in self.manifests.items() if key in keys]
            if holders:
                self.fail("I2", f"{by.name} deletes {key}, which {holders[0]} names")
            return
        name = parse_name(key)
        if name not in self.manifests:
            return  # again
        knobs = self.sim.knobs
        rule = {"keep_last": knobs.keep_last, "keep_every": knobs.keep_every}
        if not due_to_go(name, [n for n in self.manifests if n.run == name.run], chain(seen), **rule):
            listed = ", ".join(f"{n.number}/{n.step}" for n in sorted(self.manifests))
            self.fail("retention", f"{by.name} drops {name}; listed: {listed}; chain: {chain(seen)}")
        del self.manifests[name]
        self.dropped.add(name)
        self.count("dropped")

    def note_list(self, prefix: str, keys: list[str], *, by: Process) -> None:
        if prefix != "incarnations":
            return
        self.seen[by.pid] = self._stored_records()
        if by.kind == "trainer":
            survey = self.surveys.setdefault(by.pid, Survey({}, set(self.manifests)))
            survey.records = self._stored_records()

    def _stored_records(self) -> dict[int, Record]:
        """Return the records by number; of two first jobs that raced, the one with the later name counts."""
        return {number: max(records, key=lambda r: r.run) for number, records in sorted(self.records.items())}

    def _judge_commit(self, key: str, content: bytes, by: Process, knowledge: Knowledge) -> None:
        name, body = parse_name(key), json.loads(content)["body"]
        keys = tuple(row["key"] for row in body["objects"])
        self.manifests[name] = keys
        self.committer[by.pid] = name.number
        self.count("committed")
        if max(knowledge.seen, default=0) > name.number:
            self.fail("fence", f"{by.name} commits {name} having seen {sorted(knowledge.seen)}")
        stored = {entry.key: entry.size_bytes for entry in self.sim.storage.memory.list("objects")}
        missing = [row["key"] for row in body["objects"] if stored.get(row["key"]) != row["size"]]
        if missing:
            self.fail("I2", f"{by.name} commits {name} without {missing}")
            return
        owners = [r for r in self.records.get(name.number, []) if r.run == name.run]
        if not owners:
            self.fail("lineage", f"{by.name} commits {name} before the life's record is written")
            return
        whole = self._whole_of(owners[-1], name.step)
        if whole is None:
            self.fail("content", f"{by.name} commits {name}, a state that life {owners[-1].token} never had")
            return
        covered = {tensor: np.zeros(len(values), dtype=np.int64) for tensor, values in whole.items()}
        for object_key in keys:
            defect = object_defect(self.sim.storage.memory.read(object_key, limit_bytes=1 << 30), whole, covered)
            if defect is not None:
                self.fail("content", f"{object_key} committed by {by.name}: {defect}")
        if any((count != 1).any() for count in covered.values()):
            self.fail("I3", f"{name} does not cover every element once: {covered}")

    def _whole_of(self, life: Record, step: int) -> Whole | None:
        """Return a life's state at a step; one that never came to train is what it was recovered from."""
        if (life.token, step) not in self.wholes and life.token not in self.lives and life.parent is not None:
            parents = [r.token for r in self.records.get(life.parent[0], ()) if r.run == life.run]
            parents += [f.record.token for f in self.lives.values() if f.record.number == life.parent[0]]
            known = [token for token in parents if step == life.parent[1] and (token, step) in self.wholes]
            if known:
                self.wholes[life.token, step] = self.wholes[known[0], step]
                self.doers[life.token, step] = self.doers[known[0], step]
        return self.wholes.get((life.token, step))

    # Lives

    def note_attached(self, trainer: Trainer) -> None:
        """A rank has recovered and begun its life."""
        session, state = trainer.session, trainer.state
        assert session is not None
        assert state is not None
        record, report = session._life.record, session.recovery
        grown = (
            None if record.parent is None else (record.parent.incarnation, record.parent.step, record.parent.attempt)
        )
        fact = Record(record.run, record.number, record.token, grown)
        self.sim.note(trainer.process, "attached", {"life": record.number, "step": state.step, "parent": grown})
        if record.token not in self.lives:
            is_stored = report is None or not any(n.startswith("storage is unavailable") for n in report.notes)
            self.count("recovered from " + ("nothing" if report is None else report.source))
            if report is None:
                whole, doer = first_whole(0), 0
                self._judge_start(trainer, fact)
            else:
                source = self._judge_recovery(trainer, fact, is_stored=is_stored)
                if source is None:
                    return
                whole, doer = self.wholes[source, report.step], self.doers[source, report.step]
                for rejected in report.rejected:
                    self._judge_rejection(rejected.candidate, rejected.reason)
            self.lives[record.token] = LifeFact(fact, is_stored)
            self.wholes[record.token, state.step] = whole
            self.doers[record.token, state.step] = doer
        self._compare(trainer, record.token)
        state.life = int(record.token, 16)

    def note_loaded(self, trainer: Trainer, whole: Whole) -> None:
        """A rank has replaced its state from elsewhere and begun a life without a parent."""
        session, state = trainer.session, trainer.state
        assert session is not None
        assert state is not None
        record = session._life.record
        if record.token not in self.lives:
            self.lives[record.token] = LifeFact(Record(record.run, record.number, record.token, None), True)
            self.wholes[record.token, state.step] = whole
            self.doers[record.token, state.step] = state.life
            self.count("loaded")
        state.life = int(record.token, 16)

    def note_step(self, trainer: Trainer) -> None:
        state = trainer.state
        assert state is not None
        token = f"{state.life:08x}"
        if (token, state.step) not in self.wholes:
            before = self.wholes[token, state.step - 1]
            self.wholes[token, state.step] = {
                tensor: advance(values, step=state.step, life=state.life) for tensor, values in before.items()
            }
            self.doers[token, state.step] = state.life
        self.count("steps")

    def note_status(self, trainer: Trainer) -> None:
        """What a trainer is told: from now on it must hold."""
        session, state = trainer.session, trainer.state
        assert session is not None
        assert state is not None
        status, life = session.status(), session._life
        record = life.record
        if status.last_committed_step is not None:
            self._must_be_committed(record.run, record.number, status.last_committed_step)
        step = status.last_global_step
        held = self.held.get(record.token)
        if held is not None and step is not None and step < held.step:
            self.fail("global", f"life {record.number} had a global step {held.step}, now {step}")
        agent = self.sim.agent_of(record.run)
        if step is not None and agent is not None and self._holds(agent, record.token, step):
            if held is None or step > held.step:
                self.count("global")
            if held is None or step > held.step or agent is not held.agent:
                now_s = self.sim.scheduler.now_s
                self.held[record.token] = Held(record.number, record.token, step, agent, now_s)
            self._must_be_global(life.arena, record.number, step, trainer.launch.size)

    def note_committed(self, trainer: Trainer, step: int) -> None:
        session = trainer.session
        assert session is not None
        self.count("saves")
        self._must_be_committed(session.run, session.incarnation, step)

    def note_save_failed(self, trainer: Trainer, error: MocError) -> None:
        self.count("failed saves")
        if self.sim.is_calm:
            self.fail("liveness", f"{trainer.process.name}: a save failed although nothing fails: {error}")

    def note_refused(self, trainer: Trainer, error: MocError) -> None:
        self.count("refused")
        if "InternalError" in str(error) or type(error).__name__ == "NoCheckpointError":
            self.fail("attach", f"{trainer.process.name}: {type(error).__name__}: {error}")

    def note_fenced(self, victim: Process, *, by: Process) -> None:
        """An agent kills a trainer: never one of a job that lives."""
        self.count("fenced")
        trainer = next(
            t for job in self.sim.jobs for launch in job.launches for t in launch.trainers if t.process is victim
        )
        now_s, others = self.sim.scheduler.now_s, trainer.launch.trainers
        is_living = all(
            t.process.is_alive
            and not t.process.is_stopped
            and t.stepped_s > now_s - LIVING_S
            and t.process.stopped_s < now_s - LIVING_S
            for t in others
        )
        if is_living:
            self.fail("second job", f"{by.name} kills {victim.name}, whose job is training")

    def note_copy(self, process: Process, rank: int, targets: array[int]) -> None:
        """A trainer is about to write these addresses: none may belong to a sealed record."""
        arena = self._arena_of(process)
        if arena is None:
            return
        written = set(targets)
        for index, record in arena.seals(rank).items():
            sealed = {arena.address + offset for offset in arena.shard_offsets(rank, record.slots)}
            if written & sealed:
                self.fail(
                    "slots", f"{process.name} overwrites record {index}: step {record.step} of {record.incarnation}"
                )

    # Inside

    def _judge_start(self, trainer: Trainer, fact: Record) -> None:
        """Nothing was recovered: there must be nothing to recover from."""
        survey = self.surveys.get(trainer.launch.trainers[0].process.pid)
        if survey is None:
            self.fail("recovery", f"{trainer.process.name} starts anew without having seen the storage")
            return
        links = chain(survey.records)
        lost = [n for n in survey.manifests & set(self.manifests) if position(links, n.number, n.step, n.attempt)]
        lost_memory = [h for h in self._surviving(trainer) if position(links, h.number, h.step) is not None]
        if lost or lost_memory:
            self.fail("recovery", f"life {fact.number} starts anew although there are {lost} {lost_memory}")

    def _judge_recovery(self, trainer: Trainer, fact: Record, *, is_stored: bool) -> str | None:
        """Compare what was recovered with what there was; return the token of the life it comes from."""
        session, state = trainer.session, trainer.state
        assert session is not None
        assert state is not None
        report = session.recovery
        assert report is not None
        number, step = report.parent_incarnation, report.step
        survey = self.surveys.get(trainer.launch.trainers[0].process.pid) if is_stored else None
        records = dict(survey.records) if survey is not None else {}
        for life in self.lives.values():
            is_known = not life.is_stored or survey is None
            if is_known and life.record.run == fact.run and life.record.number not in records:
                records[life.record.number] = life.record
        links = chain({n: r for n, r in records.items() if n < fact.number})
        found = position(links, number, step)
        where = f"life {fact.number} recovered {report.source} step {step} of life {number}; chain {links}"
        if found is None:
            self.fail("lineage", f"{where}: off the lineage")
            return None
        for name in survey.manifests & set(self.manifests) if survey is not None else ():
            better = position(links, name.number, name.step, name.attempt)
            if better is not None and better < found:
                self.fail("recovery", f"{where}: behind the checkpoint {name}")
        for held in self._surviving(trainer):
            better = position(links, held.number, held.step)
            is_same = records.get(held.number) is not None and records[held.number].token == held.token
            if better is not None and better < found and is_same:
                self.fail("recovery", f"{where}: behind the snapshot of step {held.step} of life {held.number}")
        tokens = [r.token for r in (*self.records.get(number, ()), *records.values()) if r.number == number]
        found_in = [t for t in tokens if (t, step) in self.wholes and not state.differs_from(self.wholes[t, step])]
        if not found_in:
            self.fail("content", f"{where}: a state that life never had")
            return None
        return found_in[0]

    def _judge_rejection(self, candidate: str, reason: str) -> None:
        self.count("rejected")
        self.fail("recovery", f"a candidate was rejected although nothing rots: {candidate}: {reason}")

    def _compare(self, trainer: Trainer, token: str) -> None:
        state = trainer.state
        assert state is not None
        differing = state.differs_from(self.wholes[token, state.step])
        if differing is not None:
            self.fail("content", f"{trainer.process.name} restored other bytes: {differing} at step {state.step}")
        expected = noise_at(trainer.rank, state.step, self.doers[token, state.step])
        is_exact = not self.sim.knobs.resize_odds  # a rank that is new keeps its own
        if is_exact and state.noise.tobytes() != expected.tobytes():
            self.fail("content", f"{trainer.process.name} restored other small state: {state.noise} not {expected}")

    def _must_be_committed(self, run: str, number: int, step: int) -> None:
        if not any((n.run, n.number, n.step) == (run, number, step) for n in (*self.manifests, *self.dropped)):
            self.fail("commit", f"step {step} of life {number} was announced as committed and is not stored")

    def _must_be_global(self, arena: Arena, number: int, step: int, size: int) -> None:
        moments = [
            {(r.step, r.attempt) for r in arena.seals(rank).values() if r.incarnation == number} for rank in range(size)
        ]
        whole = set.intersection(*moments)
        if not any(moment[0] >= step for moment in whole):
            self.fail("global", f"step {step} of life {number} was announced as global and memory holds {moments}")

    def _surviving(self, trainer: Trainer) -> list[Held]:
        """Return the snapshots announced before a launch began whose agent has lived ever since."""
        begun_s = trainer.launch.begun_s
        return [
            held
            for held in self.held.values()
            if held.since_s < begun_s and held.agent.is_alive and self._holds(held.agent, held.token, None)
        ]

    def _holds(self, agent: Process, token: str, step: int | None) -> bool:
        """Return whether an agent has the memory of this life, and (with a step) says itself that it is global."""
        custody = self.sim.server_of(agent)._custody
        if custody is None:
            return False
        if step is None:
            return any(record.token == token for record in custody.source().life.lineage)
        return custody.life.record.token == token and custody.global_step is not None and custody.global_step >= step

    def _arena_of(self, process: Process) -> Arena | None:
        for job in self.sim.jobs:
            for trainer in job.trainers:
                if trainer.process is process and trainer.session is not None:
                    return trainer.session._life.arena
        return None

    # The end

    def judge_end(self) -> None:
        """Nothing fails any more, the job has ended, every agent has left: look for what is lost or left over."""
        stored = self.sim.storage.content()
        named = {key for keys in self.manifests.values() for key in keys}
        gone = sorted(named - set(stored))
        if gone:
            self.fail("I2", f"objects are missing: {gone}")
        last = self.sim.jobs[0].launches[-1].trainers[0]
        assert last.session is not None
        assert last.state is not None
        run, number = last.session.run, last.session.incarnation
        if not any((n.run, n.number, n.step) == (run, number, last.state.step) for n in self.manifests):
            self.fail("liveness", f"step {last.state.step} of life {number} is not stored after the job has left")
        victims = stored.get(f"victims/{number:06d}-{run}.json", b"").decode()
        leftover = [
            key
            for key in stored
            if key.startswith("objects/")
            and key not in named
            and key not in victims
            and f"-{run}/" in key
            and parse_name(key).number < number  # its own failed saves are left to the next life
        ]
        if leftover:
            self.fail("leftovers", f"objects that nobody names are left: {leftover}")
