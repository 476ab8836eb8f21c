"""Watches every life of the job and everything that it is told, and names what breaks a promise.

It keeps a model of its own (`tests.sim.model`) and looks at production objects only to learn facts that nobody
announces: which agent holds which life's memory, and which token a life has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moc.errors import MocError
from moc.report import RecoveryReport
from moc.snapshot.arena import Arena
from moc.state import Expert
from tests.sim.facts import Held, LifeFact, Survey
from tests.sim.ledger import Moment
from tests.sim.memories import Memories
from tests.sim.model import Links, Record, chain, newest_on, parse_name, position
from tests.sim.state import (
    EXPERTS_PER_LAYER,
    LAYERS,
    PARTIAL_TENSORS,
    Routes,
    TinyState,
    Whole,
    advance,
    first_whole,
    noise_at,
    routes_at,
)

if TYPE_CHECKING:
    from array import array

    from tests.sim.job import Trainer
    from tests.sim.process import Process

__all__ = ["Auditor"]

Found = tuple[Whole, int, Routes | None]
NOTHING_ROUTED = np.zeros((LAYERS, EXPERTS_PER_LAYER), dtype=np.int64)
WITHHELD = "simulated: "  # what every error of the simulated storage begins with
NOT_USABLE = "is not usable in"
TOO_STALE = "expert(s) are older than step"
LIVING_S = 10.0  # a job whose ranks all stepped this lately must not be taken over


@dataclass(slots=True)
class Auditor(Memories):
    """Judges the lives; the simulation stops at the first violation."""

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
                whole, doer = first_whole(0, is_partial=self.sim.knobs.is_partial), 0
                routes: Routes | None = (NOTHING_ROUTED, NOTHING_ROUTED)
                self._judge_start(trainer, fact)
            else:
                found = self._judge_recovery(trainer, fact, is_stored=is_stored)
                if found is None:
                    return
                whole, doer, routes = found
                routes = self._judge_losses(report, routes)
                for rejected in report.rejected:
                    self._judge_rejection(trainer, rejected.candidate, rejected.reason)
            self.lives[record.token] = LifeFact(fact, is_stored)
            self._note_birth(trainer)
            self.begun_s = self.sim.scheduler.now_s
            self.wholes[record.token, state.step] = whole
            self.doers[record.token, state.step] = doer
            self.routes[record.token, state.step] = routes
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
            self._note_birth(trainer)
            self.wholes[record.token, state.step] = whole
            self.doers[record.token, state.step] = state.life
            self.routes[record.token, state.step] = None
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
            known = self.routes[token, state.step - 1]
            made = sum(routes_at(state.step, rank) for rank in range(trainer.launch.size))
            self.routes[token, state.step] = None if known is None else (known[0] + made, known[1] + made)
        self.count("steps")

    def note_committed(self, trainer: Trainer, step: int) -> None:
        session = trainer.session
        assert session is not None
        self.count("saves")
        self.must_be_committed(session.run, session.incarnation, step)

    def note_save_failed(self, trainer: Trainer, error: MocError) -> None:
        self.count("failed saves")
        if self.sim.is_calm:
            self.fail("liveness", f"{trainer.process.name}: a save failed although nothing fails: {error}")

    def note_refused(self, trainer: Trainer, error: MocError) -> None:
        self.count("refused")
        is_late = self.begun_s > trainer.launch.begun_s  # another life began meanwhile, and may have taken the memory
        is_lacking = type(error).__name__ == "NoCheckpointError" and not is_late
        if "InternalError" in str(error) or (is_lacking and not self._is_withheld(trainer, str(error))):
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
        written = set(targets) - {0}  # what a partial snapshot leaves out
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
        surviving = [h for h in self.surviving(trainer) if self.lives[h.token].record.run == fact.run]
        lost_memory = [h for h in surviving if position(links, h.number, h.step) is not None]
        if lost or lost_memory:
            self.fail("recovery", f"life {fact.number} starts anew although there are {lost} {lost_memory}")

    def _judge_recovery(self, trainer: Trainer, fact: Record, *, is_stored: bool) -> Found | None:
        """Compare what was recovered with what there was; return it, the life that did its step, and its routes."""
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
        # What storage or other nodes withheld in every try may be passed over for an older one, and so may what has
        # lost too many tokens for a whole state. The report names it.
        reasons = {r.candidate.rpartition(" attempt=")[0]: r.reason for r in report.rejected}
        passed = {n for n, why in reasons.items() if self._is_withheld(trainer, f"{n} {why}") or TOO_STALE in why}
        is_too_stale = any(TOO_STALE in reason for reason in reasons.values())
        is_last_resort = f"{report.source} step={step} incarnation={number}" in reasons
        if report.stale and not is_last_resort and is_too_stale:
            self.fail("PLT", f"{where}: {report.rejected} for one that is stale too: {report.stale}")
        for name in survey.manifests & set(self.manifests) if survey is not None else ():
            better = position(links, name.number, name.step, name.attempt)
            is_passed = f"storage step={name.step} incarnation={name.number}" in passed
            if better is not None and better < found and not is_passed:
                self.fail("recovery", f"{where}: behind the checkpoint {name}")
        self._judge_ages(report, links, survey)
        self._judge_layers(trainer, report, links, found)
        for held in self.surviving(trainer):
            if report.source != "storage" and (held.number, held.step) == (number, step):
                self._judge_memory(report, self.remembered.get((held.token, step), {}))
            better = position(links, held.number, held.step)
            is_same = records.get(held.number) is not None and records[held.number].token == held.token
            is_behind = better is not None and better < found and is_same
            if is_behind and not is_too_stale and not _was_withheld(held, passed):
                self.fail("recovery", f"{where}: behind the snapshot of step {held.step} of life {held.number}")
        tokens = [r.token for r in (*self.records.get(number, ()), *records.values()) if r.number == number]
        for token in dict.fromkeys(tokens):
            found = self._composed(fact, (token, step), report, state)
            if found is not None and not state.differs_from(found[0]):
                return found[0], self.doers[token, step], found[1]
        self.fail("content", f"{where}: a state that life never had; stale {report.stale}")
        return None

    def _judge_ages(self, report: RecoveryReport, links: Links, survey: Survey | None) -> None:
        """No expert is older than in the newest checkpoint that was there, if storage gave what it had."""
        if survey is None or any(NOT_USABLE in note for note in report.notes):
            return
        newest = newest_on(links, (n for n in survey.manifests & set(self.manifests) if n.step <= report.step))
        if newest is None:
            return
        for row in report.stale:
            promised = self.versions[newest].get(row.expert)
            if row.step < (newest.step if promised is None else promised.step):
                self.fail("age", f"{row} recovered at step {report.step}, although {newest} has {promised}")

    def _judge_layers(self, trainer: Trainer, report: RecoveryReport, links: Links, start: tuple[int, int]) -> None:
        """No expert is older than a snapshot in memory has it right, of those that a recovery has room for."""
        if not report.experts:
            return
        arena = self._arena_of(trainer.process)
        assert arena is not None
        room = arena.rank_layout(trainer.rank).versions - 1  # one is left for the first snapshot of the life
        offered = self._in_memory(trainer, links, start, layers=room - (report.source == "storage"))
        if report.source == "memory" and len({row.source for row in report.experts}) > 1:
            self.count("layered recoveries")
        for row in report.stale:
            if row.step < offered.get(row.expert, 0):
                self.fail("age", f"{row} recovered at step {report.step}, although memory has {offered}")

    def _judge_memory(self, report: RecoveryReport, remembered: Mapping[Expert, int]) -> None:
        """No expert is older than the snapshot that was recovered has it."""
        for row in report.stale:
            if row.step < remembered.get(row.expert, 0) and not self.has_rotted:
                self.fail("age", f"{row} recovered at step {report.step}, although memory has {remembered}")

    def _composed(
        self, fact: Record, moment: Moment, report: RecoveryReport, state: TinyState
    ) -> tuple[Whole, Routes | None] | None:
        """Return a state with the experts that a recovery says are older taken from where the lineage was then, and
        what of the routes it has learned.
        """
        if moment not in self.wholes:
            return None
        whole, routes = dict(self.wholes[moment]), self.routes.get(moment)
        for row in report.stale:
            older = (m for m in self.moments_at(fact, row.step) if state.has(self.wholes[m], row.expert))
            source = next(older, None)
            if source is None or row.step >= report.step:
                return None
            names = [name for name, _, expert in PARTIAL_TENSORS if expert == row.expert]
            whole |= {key: values for key, values in self.wholes[source].items() if key[0] in names}
            before = self.routes.get(source)
            if routes is not None and before is not None:
                learned, place = routes[1].copy(), (row.expert.layer, row.expert.index)
                learned[place] = before[1][place]
                routes = (routes[0], learned)
            else:
                routes = None
        return whole, routes

    def _judge_losses(self, report: RecoveryReport, routes: Routes | None) -> Routes | None:
        """Compare the lost tokens that a recovery reports with those that it has; return what is known now."""
        if report.stale:
            self.count("stale recoveries")
        if report.plt is None or routes is None:
            return None
        self.count("counted recoveries")
        routed, learned = (counts.sum(axis=1) for counts in routes)
        expected = float(np.mean((routed - learned) / np.maximum(routed, 1)))
        if abs(report.plt - expected) > 1e-12:
            self.fail("PLT", f"{report.plt} reported, {expected} lost at step {report.step}: {report.stale}")
        return routes

    def _judge_rejection(self, trainer: Trainer, candidate: str, reason: str) -> None:
        self.count("rejected")
        is_allowed_to_be_stale = self.sim.knobs.plt_limit >= 1 or not self.sim.knobs.is_counting
        is_withheld = self._is_withheld(trainer, f"{candidate} {reason}")
        if not is_withheld and (is_allowed_to_be_stale or TOO_STALE not in reason):
            self.fail("recovery", f"a candidate was rejected although nothing rots: {candidate}: {reason}")

    def _is_withheld(self, trainer: Trainer, words: str) -> bool:
        """Return whether candidates may be refused: storage or the network did not give them, or an agent that was
        alone, and lends nothing to the other nodes of this launch.
        """
        launch = trainer.launch
        is_grown = len(set(launch.places)) > 1 and any(f"incarnation={number} " in words for number in self.alone)
        is_out_of_reach = "memory step=" in words and self.sim.network.last_trouble_s >= launch.begun_s
        is_rotten = self.has_rotted and "memory step=" in words and "shard checksum mismatch" in words
        return WITHHELD in words or is_grown or is_out_of_reach or is_rotten

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


def _was_withheld(held: Held, passed: set[str]) -> bool:
    """Return whether a recovery has passed over a snapshot in memory that is this one, or newer."""
    for name in passed:
        source, step, incarnation = name.rsplit(" ", 2)
        is_memory = source in ("memory", "peer memory")
        if is_memory and incarnation == f"incarnation={held.number}" and int(step.removeprefix("step=")) >= held.step:
            return True
    return False
