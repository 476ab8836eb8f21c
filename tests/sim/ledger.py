"""What was written and deleted, judged by the invariants of docs/format.md at the moment when a reader could see it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moc.state import Expert
from tests.sim.facts import Knowledge, LifeFact, Survey
from tests.sim.model import (
    Record,
    StoredName,
    chain,
    due_to_go,
    newest_on,
    parse_name,
    parse_record,
)
from tests.sim.state import EXPERTS_PER_LAYER, Routes, Whole
from tests.sim.versions import Contents, Version, stored_versions
from tests.support.forge import object_keys

if TYPE_CHECKING:
    from tests.sim.process import Process
    from tests.sim.simulation import Simulation

__all__ = ["Ledger", "Moment"]

Moment = tuple[str, int]  # a life's token and a step


@dataclass(slots=True)
class Ledger:
    """Everything that ever was stored, and what the lives were that it must agree with.

    `wholes` has the state of every life (by token) at every step, `doers` the life that did that step, `routes` what
    was routed to each expert until then and what it has learned (None where nobody knows), `versions` the
    experts that a checkpoint has of an earlier one, `seen` the records that a process listed last, `committer` the life
    that it committed for last.
    """

    sim: Simulation
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    lives: dict[str, LifeFact] = field(default_factory=dict)
    wholes: dict[Moment, Whole] = field(default_factory=dict)
    doers: dict[Moment, int] = field(default_factory=dict)
    routes: dict[Moment, Routes | None] = field(default_factory=dict)
    written: dict[str, bytes] = field(default_factory=dict)
    records: dict[int, list[Record]] = field(default_factory=dict)
    manifests: dict[StoredName, tuple[str, ...]] = field(default_factory=dict)
    versions: dict[StoredName, dict[Expert, Version]] = field(default_factory=dict)
    parents: dict[StoredName, tuple[int, int, str | None] | None] = field(default_factory=dict)
    dropped: set[StoredName] = field(default_factory=set)
    seen: dict[int, dict[int, Record]] = field(default_factory=dict)
    committer: dict[int, int] = field(default_factory=dict)
    surveys: dict[int, Survey] = field(default_factory=dict)
    begun_s: float = 0.0  # when a life began last, as far as one can see

    def fail(self, promise: str, what: str) -> None:
        self.sim.note(None, f"VIOLATION {promise}: {what}")
        self.violations.append(f"{promise}: {what}")

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def note_put(self, key: str, content: bytes, *, by: Process, knowledge: Knowledge) -> None:
        digest = hashlib.sha256(content).digest()
        if not key.startswith("victims/") and self.written.setdefault(key, digest) != digest:
            self.fail("I1", f"{key} is written with a second content by {by.name}")
        if key.startswith("incarnations/"):
            record = parse_record(content)
            self.begun_s = self.sim.scheduler.now_s
            self.records.setdefault(record.number, []).append(record)
        elif key.startswith("manifests/"):
            self._judge_commit(key, content, by, knowledge)

    def knowledge(self, by: Process) -> Knowledge:
        """Return what a process knows when it asks for a change, which may take effect later."""
        return Knowledge(self.committer.get(by.pid), self.seen.get(by.pid, {}))

    def is_past(self, key: str, commits: int) -> bool:
        """Return whether a life newer than the key's has committed, or anybody three times since there were so many."""
        if self.counts.get("committed", 0) >= commits + 3:
            return True
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
        keys = tuple(object_keys(body))
        sizes = [size for block in body["objects"] for size in block["size"]]
        self.manifests[name] = keys
        self.committer[by.pid] = name.number
        self.count("committed")
        if max(knowledge.seen, default=0) > name.number:
            self.fail("fence", f"{by.name} commits {name} having seen {sorted(knowledge.seen)}")
        stored = {entry.key: entry.size_bytes for entry in self.sim.storage.memory.list("objects")}
        missing = [key for key, size in zip(keys, sizes, strict=True) if stored.get(key) != size]
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
        versions = self.versions[name] = stored_versions(name, body)
        parent = body["parent"]
        self.parents[name] = None if parent is None else (parent["incarnation"], parent["step"], parent["attempt"])
        wholes: dict[Expert | None, list[Whole]] = {None: [whole]}
        for expert, version in versions.items():
            wholes[expert] = [self.wholes[moment] for moment in self.moments_at(owners[-1], version.step)]
        covered = {tensor: np.zeros(len(values), dtype=np.int64) for tensor, values in whole.items()}
        contents = Contents(name, versions, wholes, covered)
        for object_key in keys:
            stored_bytes = self.sim.storage.memory.read(object_key, limit_bytes=1 << 30)
            for defect in contents.defects(parse_name(object_key), stored_bytes):
                self.fail("content", f"{object_key} committed by {by.name}: {defect}")
        if any((count != 1).any() for count in covered.values()):
            self.fail("I3", f"{name} does not cover every element once: {covered}")
        self._judge_turns(name, versions)

    def _judge_turns(self, name: StoredName, versions: Mapping[Expert, Version]) -> None:
        """No expert waits longer than a turn, as far as the job's own commits tell."""
        knobs = self.sim.knobs
        if versions and not knobs.is_partial:
            self.fail("mode", f"{name} of mode full has older experts: {versions}")
        if not versions or knobs.k_persist is None:
            return
        self.count("partial commits")
        turn = -(-EXPERTS_PER_LAYER // knobs.k_persist)
        turn *= 2 if knobs.mode == "partial_by_load" and knobs.is_counting else 1  # the starvation bound of that policy
        for expert, version in versions.items():
            commits = self._commits_since(version.source, name)
            if commits >= turn:
                self.fail("turn", f"{name} has {expert} of {version}, {commits} commits ago: at most {turn - 1}")

    def _commits_since(self, source: StoredName, name: StoredName) -> int:
        """Return how many checkpoints grew from one another between two, the second included.

        What lands later than its committer waited for it is known to nobody, and nothing grows from it. A rewind that
        lands late may have the number of a life that storage never saw: then there are two lineages, and 0 is returned.
        """
        stored = {record.token for rows in self.records.values() for record in rows}
        if any(f.record.number in self.records and f.record.token not in stored for f in self.lives.values()):
            return 0
        count, at = 0, name
        while at != source and at in self.parents:
            count += 1
            number, step, attempt = self.parents[at] or (0, 0, None)
            if attempt is not None:
                at = StoredName(number, step, attempt, name.run)
                continue
            links = chain({n: r[-1] for n, r in self.records.items() if n <= number})
            known = [n for n in (*self.manifests, *self.dropped) if n < at and (n.number, n.step) <= (number, step)]
            at = newest_on(links, known) or source
        return count

    def moments_at(self, life: Record, step: int) -> list[Moment]:
        """Return the moments of this step that a life's lineage has had."""
        found, lives = [], [life]
        while lives:
            found += [(r.token, step) for r in lives if (r.token, step) in self.wholes]
            parents = {r.parent[0] for r in lives if r.parent is not None and step <= r.parent[1]}
            known = [f.record for f in self.lives.values()] + [r for rows in self.records.values() for r in rows]
            lives = list({r.token: r for r in known if r.number in parents and r.run == life.run}.values())
        return found

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
