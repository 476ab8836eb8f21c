"""Saves as the agent sees them: which sealed moments become checkpoints, what became of each, and who waits to hear it.

Thread: the agent's main thread, except `note_end`, which the persist thread calls.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from moc.agent import wire
from moc.agent.custody import Custody
from moc.agent.jobs import Outcome, SaveJob, Written, inherited_save, is_full, is_whole, once_more
from moc.agent.mending import mend, stack_of
from moc.agent.peers.council import Council
from moc.agent.peers.report import NOBODY, Others, Verdict, Wish
from moc.agent.persister import Persister
from moc.format.keys import CheckpointName
from moc.host import Host
from moc.plan.freeing import Moment
from moc.snapshot.seal import EXPLICIT
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
        self.wishes: set[Wish] = set()
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
        wished = self._wished(custody, others)
        for wish in (wish for wish in wished if wish.is_inherited):
            self._inherit(custody, wish)
        wished = [wish for wish in wished if not wish.is_inherited]
        complete = custody.scan(ended=ended, others=others, wished={wish.moment for wish in wished})
        wished = [wish for wish in wished if custody.holds(wish.moment)]
        flagged, joined = custody.unfinished_saves(), {wish.moment for wish in wished if not wish.is_second}
        for moment in complete:
            if moment in flagged | joined:
                self._look_at(custody, moment, may_start=may_start, is_wished=moment in joined)
            if Wish(moment=moment, is_second=True) in wished:
                self._start(custody, Wish(moment=moment, is_second=True), is_wished=True)
        pending = {moment: moment for moment in flagged - {wish.moment for wish in self.wishes}}
        pending |= {wish.target: wish.moment for wish in wished}
        self._give_up_hopeless(custody, pending, ended | others.ended)
        custody.arena.publish(global_step=custody.global_step, committed_step=self.last_committed_step)

    def _wished(self, custody: Custody, others: Others) -> list[Wish]:
        """Return what agents of other nodes leave with, as far as that has not ended here."""
        number = custody.life.record.number
        return sorted(wish for wish in others.wishes if (number, wish.target) not in self._outcomes)

    def _look_at(self, custody: Custody, moment: Moment, *, may_start: bool, is_wished: bool) -> None:
        """Start the save of a complete moment, or give it up if this agent leaves with another one."""
        is_late = any(moment < wish.moment for wish in self.wishes)  # what this agent leaves with is offered already
        if not is_late and (may_start or is_wished):
            self._start(custody, Wish(moment=moment, is_second=False), is_wished=is_wished)
            return
        is_other = bool(self.wishes) or moment != custody.newest
        if self.council is not None and is_other and not self._is_under_way(custody, moment):
            self.give_up(custody, moment, "the agent is leaving, and has a newer one")

    def _give_up_hopeless(self, custody: Custody, pending: Mapping[Moment, Moment], ended: Collection[int]) -> None:
        """Give up what cannot become complete; `pending` are the moments of checkpoints, and those of their seals."""
        timeout_s = float(custody.life.descriptor["timeout_s"])
        self._first_seen_s = {target: seen for target, seen in self._first_seen_s.items() if target in pending}
        for target, moment in pending.items():
            first_s = self._first_seen_s.setdefault(target, self._host.now_s())
            held = custody.holders.get(moment, set())
            if lacking := sorted(set(ended) - held):
                self.give_up(custody, target, f"ranks {lacking} ended before they had sealed it")
            elif moment in custody.hopeless:
                self.give_up(custody, target, f"ranks {list(custody.hopeless[moment])} skipped their snapshot")
            elif not self._is_under_way(custody, target) and self._host.now_s() - first_s > timeout_s:
                missing = sorted(set(custody.life.world) - held)
                self.give_up(custody, target, f"not every rank sealed in time: ranks={missing} timeout_s={timeout_s}")

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

    def verdicts(self, incarnation: int, asked: Collection[Moment] = ()) -> list[Verdict]:
        """Return how the newest saves of a life have ended, and those that other nodes are at, for their agents.

        Else a save that one of them is slow to hear of would be forgotten behind many that were skipped since.
        """
        found = [
            Verdict(moment=moment, size_bytes=outcome.size_bytes, error=outcome.error)
            for (number, moment), outcome in self._outcomes.items()
            if number == incarnation
        ]
        return [verdict for verdict in found[:-VERDICT_LIMIT] if verdict.moment in asked] + found[-VERDICT_LIMIT:]

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
        life, moment = custody.life.record, custody.newest
        is_stored = life.parent is not None and life.parent.attempt is not None
        needs_source = (moment is None or custody.leans_on_earlier(moment)) and not is_stored
        job = inherited_save(custody, self.council) if needs_source else None
        if moment is not None and job is None:
            mended = mend(custody.arena, stack_of(custody, custody.life, (life.number, moment)))
            # Its own checkpoint may lack what had no turn yet, or what the snapshot has in pieces.
            is_enough = is_whole(custody.life.descriptor, mended.records) and not mended.lenders
            # Or it has failed, and the other nodes still say so.
            outcome = None if self.council is None else self._outcomes.get((life.number, moment))
            has_failed = outcome is not None and outcome.error is not None
            last = Wish(moment=moment, is_second=has_failed or not is_enough)
            if not self._is_committed(custody, last) and not self._is_queued(custody, last.target):
                self.wishes = {last}
                self._offer(custody, last, is_last=True)
        elif job is not None and not self._is_committed(custody, job.wish) and not self._is_queued(custody, job.target):
            log.info("persisting the snapshot that this life was recovered from: step=%d", job.name.step)
            self.wishes = {job.wish}
            self._queue(custody.source(), job, is_last=True)

    def _inherit(self, custody: Custody, wish: Wish) -> None:
        """Save what this life was recovered from, because an agent of another node leaves with it."""
        if self._is_under_way(custody, wish.target):
            return
        job = inherited_save(custody, self.council)
        if job is not None and job.wish == wish:
            self._queue(custody.source(), job, is_last=True)
        else:  # at once: the other one waits for this node's part
            self.give_up(custody, wish.target, "this node has nothing of what the life was recovered from")

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
            target = job.target if job.records else (outcome.name.step, outcome.name.attempt)
            is_present = custody is not None and job.life.number == custody.life.record.number
            if is_present and custody is not None:
                custody.settle(job.moment if job.records else target)
                if outcome.error is None:
                    custody.note_commit((outcome.name.step, outcome.name.attempt))
            if is_present and outcome.error is None:
                self.last_committed_step = max(outcome.name.step, self.last_committed_step or 0)
            self._remember(outcome, (job.life.number, target))

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

    def _is_committed(self, custody: Custody, wish: Wish) -> bool:
        """Return whether all that a moment of the present life asks for is committed.

        In mode full all snapshots of one step are equal; else an earlier one of the step may have stored less.
        """
        if is_full(custody.life.descriptor) and not wish.is_second:
            return self.last_committed_step is not None and self.last_committed_step >= wish.moment[0]
        outcome = self._outcomes.get((custody.life.record.number, wish.target))
        return outcome is not None and outcome.error is None

    def _is_queued(self, custody: Custody, target: Moment) -> bool:
        """Return whether the save of a checkpoint of the present life waits, or is made."""
        number = custody.life.record.number
        with self._lock:
            jobs = [job for _, job in self._under_way.values() if job.records]
        return any((job.life.number, job.target) == (number, target) for job in jobs)

    def _is_under_way(self, custody: Custody, target: Moment) -> bool:
        """Return whether the save of a checkpoint is queued, or has ended and is not collected yet."""
        if self._is_queued(custody, target):  # first: the persist thread moves it from here to there
            return True
        number = custody.life.record.number
        with self._lock:
            ended = [job for job, _ in self._ended if job.records]
        return any((job.life.number, job.target) == (number, target) for job in ended)

    def _start(self, custody: Custody, wish: Wish, *, is_wished: bool) -> None:
        """Queue a save, or give it up where another one is under way and nobody waits for it.

        What an agent leaves with is never refused: it would be lost with its memory. There is one for each node.
        """
        if self._is_under_way(custody, wish.target):
            return
        records = custody.records_of(custody.life.record.number, wish.moment)
        is_awaited = is_wished or any(record.flags & EXPLICIT for record in records.values())
        with self._lock:
            under_way = [job for _, job in self._under_way.values()]
        if under_way and not is_awaited:
            if any(job.records for job in under_way):  # else a look at the storage, which wakes the loop at its end
                self.give_up(custody, wish.target, "the previous save is still under way")
            return
        self._offer(custody, wish, is_wished=is_wished)

    def _offer(self, custody: Custody, wish: Wish, *, is_last: bool = False, is_wished: bool = False) -> None:
        life = custody.life.record
        stack = stack_of(custody, custody.life, (life.number, wish.moment))
        mended = mend(custody.arena, stack if is_last or wish.is_second else stack[:1])
        job = SaveJob(
            arena=custody.arena,
            records=once_more(mended.records) if wish.is_second else mended.records,
            life=life,
            descriptor=custody.life.descriptor,
            pinned=(life.number, wish.moment),
            is_whole=wish.is_second or is_whole(custody.life.descriptor, mended.records),
            council=self.council,
            lenders=mended.lenders,
        )
        if not self._queue(custody, job, is_last=is_last or is_wished):
            self.give_up(custody, wish.target, "too many saves wait")

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

    def _remember(self, outcome: Outcome, key: tuple[int, Moment] | None = None) -> None:
        """Note how the save of a checkpoint has ended, `key`; what it ended with may be an earlier checkpoint."""
        self.last_error = outcome.error
        key = key or (outcome.name.incarnation, (outcome.name.step, outcome.name.attempt))
        if key not in self._outcomes:  # every rank that skips a snapshot gives up the same save
            self._saves_ended += 1
            self._saves_failed += outcome.error is not None
        self._outcomes[key] = outcome
        while len(self._outcomes) > OUTCOME_LIMIT:
            self._outcomes.popitem(last=False)
