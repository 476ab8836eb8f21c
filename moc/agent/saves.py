"""Saves as the agent sees them: which sealed moments become checkpoints, what became of each, and who waits to hear it.

Thread: the agent's main thread, except `note_end`, which the persist thread calls.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moc.agent import wire
from moc.agent.composer import FULL
from moc.agent.custody import Custody
from moc.agent.mending import mend, stack_of
from moc.agent.peers.council import Council
from moc.agent.peers.report import NOBODY, Others, Verdict
from moc.agent.persister import Outcome, Persister, SaveJob, Written
from moc.format.keys import CheckpointName
from moc.host import Host
from moc.plan.freeing import Moment, second_attempt
from moc.snapshot.seal import EXPLICIT, SealRecord
from moc.trace import Trace

__all__ = ["Saves", "Waiter"]

log = logging.getLogger(__name__)

OUTCOME_LIMIT = 256
VERDICT_LIMIT = 16  # told to the agents of other nodes; saves come one after the other


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A connection that waits for a save to end."""

    connection: socket.socket
    moment: Moment
    deadline_s: float


class Saves:
    """Starts saves of sealed moments and remembers how they ended."""

    def __init__(
        self, *, host: Host, trace: Trace, reply: Callable[[socket.socket, wire.Message], None], wake_fd: int
    ) -> None:
        """`wake_fd` is written to when a save has ended on the persist thread."""
        self._host, self._reply, self._wake_fd = host, reply, wake_fd
        self._persister = Persister(on_end=self.note_end, host=host, trace=trace)
        self._under_way: dict[int, tuple[Custody, SaveJob]] = {}
        self._ended: list[tuple[SaveJob, Outcome]] = []
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[tuple[int, Moment], Outcome] = OrderedDict()
        self._first_seen_s: dict[Moment, float] = {}
        self._waiters: list[Waiter] = []
        self._saves_ended = self._saves_failed = 0
        self.council: Council | None = None
        self.wishes: set[Moment] = set()
        """What all nodes are to save although it was not flagged: the last moment before this agent leaves."""
        self.last_committed_step: int | None = None
        self.last_error: str | None = None
        """Why the newest save failed; None again after a commit."""

    @property
    def commits(self) -> int:
        """Return how many saves this agent has committed."""
        return self._saves_ended - self._saves_failed

    @property
    def written(self) -> Written | None:
        """Return what the newest save has written, None before the first."""
        return self._persister.written

    @property
    def is_busy(self) -> bool:
        """Return whether anything is being persisted, waits for it, or has ended unnoticed."""
        with self._lock:
            return bool(self._under_way) or bool(self._ended)

    def counters(self) -> dict[str, int]:
        """Return how many saves have ended since the agent began, and how many of them failed."""
        return {"saves": self._saves_ended, "failed": self._saves_failed}

    def outcomes(self) -> list[dict[str, object]]:
        """Return how the remembered saves ended, oldest first."""
        return [
            {"name": str(o.name), "size_bytes": o.size_bytes, "seconds": o.seconds, "error": o.error}
            for o in self._outcomes.values()
        ]

    def begin_life(self) -> None:
        """Forget what was remembered of the former life."""
        self.last_committed_step = None
        self._first_seen_s.clear()

    def enter(self, council: Council | None) -> None:
        """Make the saves of the present life together with the agents of its other nodes, None: alone."""
        self.council = council

    def recall(self, custody: Custody) -> None:
        """Have the persist thread look up what this life has committed already.

        For an agent that has adopted an arena.
        """
        self._queue(
            custody,
            SaveJob(
                arena=custody.arena,
                records={},
                life=custody.life.record,
                descriptor=custody.life.descriptor,
                pinned=None,
                is_whole=True,
            ),
        )

    def look(self, custody: Custody, *, ended: set[int], may_start: bool) -> None:
        """Start what is complete, give up what cannot become complete; `ended` are this node's ranks that seal no more.

        Unless it `may_start`, only what other nodes want is started, and what is older than the newest is given up:
        they may have started it, and would start nothing newer before they have this node's part.
        """
        others = NOBODY if self.council is None else self.council.others()
        self._hear(custody, others)
        complete = custody.scan(ended=ended, others=others)
        for moment in complete:
            is_late = any(moment < wish for wish in self.wishes)  # what this agent leaves with is offered already
            if not is_late and (may_start or moment in custody.wishes):
                self._start(custody, moment)
            elif self.council is not None and moment != custody.newest and not self._is_under_way(custody, moment):
                self.give_up(custody, moment, "the agent is leaving, and has a newer one")
        timeout_s = float(custody.life.descriptor["timeout_s"])
        unfinished = custody.unfinished_saves() | custody.wishes
        self._first_seen_s = {moment: seen for moment, seen in self._first_seen_s.items() if moment in unfinished}
        for moment in unfinished:
            first_s = self._first_seen_s.setdefault(moment, self._host.now_s())
            held = custody.holders.get(moment, set())
            if lacking := sorted((ended | others.ended) - held):
                self.give_up(custody, moment, f"ranks {lacking} ended before they had sealed it")
            elif moment in custody.hopeless:
                self.give_up(custody, moment, f"ranks {list(custody.hopeless[moment])} skipped their snapshot")
            elif not self._is_under_way(custody, moment) and self._host.now_s() - first_s > timeout_s:
                missing = sorted(set(custody.life.world) - held)
                self.give_up(custody, moment, f"not every rank sealed in time: ranks={missing} timeout_s={timeout_s}")
        custody.arena.publish(global_step=custody.global_step, committed_step=self.last_committed_step)

    def _hear(self, custody: Custody, others: Others) -> None:
        """Take over how saves have ended at other nodes: what is committed there is, what failed there fails here."""
        life = custody.life.record
        for verdict in others.verdicts:
            known = self._outcomes.get((life.number, verdict.moment))
            is_news = known is None or (known.error is not None and verdict.error is None)
            if not is_news or self._is_under_way(custody, verdict.moment):
                continue  # a save under way hears it itself
            custody.settle(verdict.moment)
            step, attempt = verdict.moment
            name = CheckpointName(run=life.run, incarnation=life.number, step=step, attempt=attempt)
            if verdict.error is None:
                self.last_committed_step = max(step, self.last_committed_step or 0)
                custody.note_commit(verdict.moment)
                self._persister.list_again()
            self._remember(Outcome(name=name, size_bytes=verdict.size_bytes, seconds=0.0, error=verdict.error))

    def verdicts(self, incarnation: int) -> list[Verdict]:
        """Return how the newest saves of a life have ended, for the agents of other nodes."""
        found = [
            Verdict(moment=moment, size_bytes=outcome.size_bytes, error=outcome.error)
            for (number, moment), outcome in self._outcomes.items()
            if number == incarnation
        ]
        return found[-VERDICT_LIMIT:]

    def give_up(self, custody: Custody, moment: Moment, reason: str) -> None:
        """End a save that was not started."""
        custody.settle(moment)
        log.warning("save skipped: step=%d attempt=%s reason=%s", *moment, reason)
        life = custody.life.record
        name = CheckpointName(run=life.run, incarnation=life.number, step=moment[0], attempt=moment[1])
        where = "" if self.council is None else f" node={self.council.node}"
        self._remember(Outcome(name=name, size_bytes=0, seconds=0.0, error=f"save skipped: {reason}{where}"))

    def persist_newest(self, custody: Custody) -> None:
        """Save the newest global moment unless all of it is committed.

        Of a life without one, what it was recovered from, as its own.
        """
        custody.scan(others=NOBODY if self.council is None else self.council.others())
        life, moment, source = custody.life.record, custody.newest, custody.source()
        is_stored = life.parent is not None and life.parent.attempt is not None
        needs_source = (moment is None or custody.leans_on_earlier(moment)) and not is_stored
        records = source.recovery_source(custody.life) if needs_source else {}
        if moment is not None and not records:
            mended = mend(custody.arena, stack_of(custody, custody.life, (life.number, moment)))
            is_made = self._is_committed(custody, moment) or self._is_queued(custody, moment)
            # Its checkpoint may lack what had no turn yet, or what the snapshot has in pieces.
            is_enough = _is_whole(custody, mended.records) and not mended.lenders
            if not (is_made and is_enough):
                self.wishes = {moment}
                self._offer(custody, moment, is_last=True)
            return
        if not records:
            return
        log.info(
            "persisting the snapshot that this life was recovered from: step=%d", min(r.step for r in records.values())
        )
        record = next(iter(records.values()))
        key = (record.incarnation, (record.step, record.attempt))
        mended = mend(source.arena, stack_of(source, custody.life, key))
        own = {rank: replace(record, incarnation=life.number) for rank, record in mended.records.items()}
        job = SaveJob(
            arena=source.arena,
            records=own if _is_whole(source, own) and _is_of_one_step(own) else _once_more(own),
            life=life,
            descriptor=source.life.descriptor,
            pinned=key,
            is_whole=True,
            council=self.council,
            lenders=mended.lenders,
        )
        self._queue(source, job, is_last=True)

    def wait(self, waiter: Waiter) -> None:
        """Answer the connection when the save has ended, or at its deadline."""
        self._waiters.append(waiter)

    def forget_waiters(self, connection: socket.socket) -> None:
        self._waiters = [waiter for waiter in self._waiters if waiter.connection is not connection]

    def answer_waiters(self, incarnation: int | None) -> None:
        """Answer those whose save has ended or whose time is over."""
        waiting, self._waiters = self._waiters, []
        for waiter in waiting:
            outcome = None if incarnation is None else self._outcomes.get((incarnation, waiter.moment))
            if outcome is not None:
                state = "failed" if outcome.error else "committed"
                body = {
                    "state": state,
                    "reason": outcome.error,
                    "bytes": outcome.size_bytes,
                    "seconds": outcome.seconds,
                }
                self._reply(waiter.connection, body)
            elif self._host.now_s() >= waiter.deadline_s:
                self._reply(waiter.connection, {"state": "pending"})
            else:
                self._waiters.append(waiter)

    def collect(self, custody: Custody | None) -> None:
        """Take notice of saves that have ended."""
        with self._lock:
            ended, self._ended = self._ended, []
        for job, outcome in ended:
            moment = job.moment if job.records else (outcome.name.step, outcome.name.attempt)
            is_present = custody is not None and job.life.number == custody.life.record.number
            if is_present and custody is not None:
                custody.settle(moment)
                if outcome.error is None:
                    custody.note_commit((outcome.name.step, outcome.name.attempt))
            if is_present and outcome.error is None:
                self.last_committed_step = max(outcome.name.step, self.last_committed_step or 0)
            self._remember(outcome)

    def note_end(self, job: SaveJob, outcomes: list[Outcome]) -> None:
        """Thread: the persist thread."""
        with self._lock:
            holder, _ = self._under_way.pop(id(job))
            self._ended.extend((job, outcome) for outcome in outcomes)
        for key in job.pins:
            holder.unpin(*key)
        os.write(self._wake_fd, b"x")

    def close(self) -> None:
        """Finish what is queued and stop the persist thread."""
        self._persister.close()

    def _is_committed(self, custody: Custody, moment: Moment) -> bool:
        """Return whether all that a moment of the present life asks for is committed.

        In mode full all snapshots of one step are equal; else an earlier one of the step may have stored less.
        """
        if _is_full(custody):
            return self.last_committed_step is not None and self.last_committed_step >= moment[0]
        outcome = self._outcomes.get((custody.life.record.number, moment))
        return outcome is not None and outcome.error is None

    def _is_under_way(self, custody: Custody, moment: Moment) -> bool:
        """Return whether a save of the present life waits, is made, or has ended and is not collected yet."""
        if self._is_queued(custody, moment):  # first: the persist thread notes the end as it takes it off
            return True
        number = custody.life.record.number
        with self._lock:
            ended = [outcome.name for _, outcome in self._ended]
        return any((name.incarnation, (name.step, name.attempt)) == (number, moment) for name in ended)

    def _is_queued(self, custody: Custody, moment: Moment) -> bool:
        """Return whether a save of the present life waits or is made. What it borrows is no save of its own."""
        with self._lock:
            return any(job.pinned == (custody.life.record.number, moment) for _, job in self._under_way.values())

    def _start(self, custody: Custody, moment: Moment) -> None:
        if self._is_under_way(custody, moment):
            return
        records = custody.records_of(custody.life.record.number, moment)
        is_awaited = any(record.flags & EXPLICIT for record in records.values()) or moment in custody.wishes
        with self._lock:
            under_way = [job for _, job in self._under_way.values()]
        if under_way and not is_awaited:
            if any(
                job.records for job in under_way
            ):  # else only a look at the storage, which wakes the loop at its end
                self.give_up(custody, moment, "the previous save is still under way")
            return
        self._offer(custody, moment)

    def _offer(self, custody: Custody, moment: Moment, *, is_last: bool = False) -> None:
        life = custody.life.record
        stack = stack_of(custody, custody.life, (life.number, moment))
        mended = mend(custody.arena, stack if is_last else stack[:1])
        is_whole = _is_whole(custody, mended.records)
        is_another = is_last and (not is_whole or bool(mended.lenders))
        job = SaveJob(
            arena=custody.arena,
            records=_once_more(mended.records) if is_another else mended.records,
            life=life,
            descriptor=custody.life.descriptor,
            pinned=(life.number, moment),
            is_whole=is_last or is_whole,
            council=self.council,
            lenders=mended.lenders,
        )
        if not self._queue(custody, job, is_last=is_last):
            self.give_up(custody, moment, "too many saves wait")

    def _queue(self, custody: Custody, job: SaveJob, *, is_last: bool = False) -> bool:
        for key in job.pins:
            custody.pin(*key)
        with self._lock:
            self._under_way[id(job)] = custody, job
        if self._persister.offer(job, is_last=is_last):
            return True
        with self._lock:
            del self._under_way[id(job)]
        for key in job.pins:
            custody.unpin(*key)
        return False

    def _remember(self, outcome: Outcome) -> None:
        self.last_error = outcome.error
        key = (outcome.name.incarnation, (outcome.name.step, outcome.name.attempt))
        if key not in self._outcomes:  # every rank that skips a snapshot gives up the same save
            self._saves_ended += 1
            self._saves_failed += outcome.error is not None
        self._outcomes[key] = outcome
        while len(self._outcomes) > OUTCOME_LIMIT:
            self._outcomes.popitem(last=False)


def _is_whole(custody: Custody, records: Mapping[int, SealRecord]) -> bool:
    """Return whether the checkpoint that a moment asks for has all experts that memory has newer than storage."""
    return _is_full(custody) or any(record.flags & EXPLICIT for record in records.values())


def _is_full(custody: Custody) -> bool:
    return str(custody.life.descriptor["config"]["mode"]) == FULL


def _is_of_one_step(records: Mapping[int, SealRecord]) -> bool:
    return all(step == record.step for record in records.values() for step in record.steps)


def _once_more(records: Mapping[int, SealRecord]) -> dict[int, SealRecord]:
    """Return the seals for a second checkpoint of their moment: with other experts it is another one, and a key is
    written with one content only.
    """
    return {rank: replace(record, attempt=second_attempt(record.attempt)) for rank, record in records.items()}
