"""The node agent: owns the arena, watches the trainers, persists what they seal, and outlives them.

One thread serves sockets and looks at the arena, one persists. A trainer's death is seen on its pidfd, not on its socket: a forked
data-loader worker may keep the socket open.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import selectors
import signal
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moc
from moc.agent import wire
from moc.agent.custody import Custody
from moc.agent.persister import Outcome, Persister, SaveJob
from moc.agent.runtime import LOCK_NAME, SOCKET_NAME
from moc.clock import Clock
from moc.errors import MocError, UsageError
from moc.format.keys import CheckpointName
from moc.plan.freeing import Moment
from moc.snapshot.arena import Arena
from moc.snapshot.seal import EXPLICIT
from moc.trace import Trace

__all__ = ["Agent"]

log = logging.getLogger(__name__)

TICK_S = 0.05  # a lost bell costs at most this
REAP_TIMEOUT_S = 10.0
OUTCOME_LIMIT = 256
BACKLOG = 256

Descriptors = list[int]


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A trainer process of this node; `is_alive` turns False when its pidfd becomes readable."""

    rank: int
    pid: int
    pidfd: int
    incarnation: int
    is_alive: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A connection that waits for a save to end."""

    connection: socket.socket
    moment: Moment
    deadline_s: float


class Agent:
    """The agent of one run on one node. Thread: `serve` and everything it calls run on one thread."""

    def __init__(self, folder: Path, *, run: str, idle_s: float, clock: Clock, trace: Trace) -> None:
        self._folder, self._run, self._idle_s, self._clock, self._trace = folder, run, idle_s, clock, trace
        self._selector = selectors.DefaultSelector()
        self._custody: Custody | None = None
        self._trainers: dict[int, Trainer] = {}
        self._waiters: list[Waiter] = []
        self._outcomes: OrderedDict[Moment, Outcome] = OrderedDict()
        self._ended: list[tuple[SaveJob, Custody, Outcome]] = []
        self._custody_of_job: dict[int, Custody] = {}
        self._ended_lock = threading.Lock()
        self._wake_receive, self._wake_send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._last_committed: int | None = None
        self._first_seen_s: dict[Moment, float] = {}
        self._drain_connection: socket.socket | None = None
        self._is_leaving = False
        self._active_s = clock.now_s()
        self._persister = Persister(on_end=self._note_end, now_s=clock.now_s, trace=trace)
        self._verbs: dict[str, Callable[[socket.socket, wire.Message, Descriptors], None]] = {
            "hello": self._hello,
            "inventory": self._inventory,
            "fence": self._fence,
            "begin": self._begin,
            "adopt": self._adopt,
            "arena": self._arena,
            "source": self._source_arena,
            "bell": self._bell,
            "wait": self._wait,
            "skip": self._skip,
            "status": self._status,
            "drain": self._drain,
        }

    def listen(self) -> bool:
        """Take the folder's lock and listen; return False if another agent has it."""
        self._lock_file = (self._folder / LOCK_NAME).open("ab")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another agent has the lock: folder=%s", self._folder)
            return False
        path = self._folder / SOCKET_NAME
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        os.chmod(path, 0o600)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_receive, selectors.EVENT_READ, self._drain_wake)
        log.info("agent listens: run=%s pid=%d version=%s", self._run, os.getpid(), moc.__version__)
        return True

    def serve(self) -> None:
        """Serve until drained or idle. SIGTERM drains."""
        signal.signal(signal.SIGTERM, lambda *_: self._start_drain())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole foreground group; the trainers decide
        while not self._is_done():
            for key, _ in self._selector.select(TICK_S):
                key.data(key.fileobj)
            self._collect_ended()
            self._look()
            self._answer_waiters()
        self._leave()

    # The loop's parts

    def _is_done(self) -> bool:
        idle = not any(t.is_alive for t in self._trainers.values()) and self._clock.now_s() - self._active_s > self._idle_s
        if idle and not self._is_leaving:
            log.info("idle: idle_s=%s", self._idle_s)
            self._start_drain()
        return self._is_leaving and not self._persister.is_busy and not self._ended

    def _look(self) -> None:
        """Look at the arena: free, start saves, end those that cannot succeed any more."""
        custody = self._custody
        if custody is None:
            return
        for moment in custody.scan():
            self._start_save(custody, moment)
        timeout_s = float(custody.life.descriptor["timeout_s"])
        for moment in custody.unfinished_saves():
            first_s = self._first_seen_s.setdefault(moment, self._clock.now_s())
            if moment in custody.hopeless:
                self._give_up(custody, moment, f"ranks {list(custody.hopeless[moment])} skipped their snapshot")
            elif not self._is_started(custody, moment) and self._clock.now_s() - first_s > timeout_s:
                self._give_up(custody, moment, f"not every rank sealed in time: timeout_s={timeout_s}")
        custody.arena.publish(global_step=custody.global_step, committed_step=self._last_committed)

    def _is_started(self, custody: Custody, moment: Moment) -> bool:
        return (custody.life.record.number, moment) in custody.pinned()

    def _start_save(self, custody: Custody, moment: Moment) -> None:
        if self._is_started(custody, moment):
            return
        records = custody.records_of(custody.life.record.number, moment)
        is_awaited = any(record.flags & EXPLICIT for record in records.values())
        if self._persister.is_busy and not is_awaited:
            self._give_up(custody, moment, "the previous save is still under way")
            return
        self._offer(custody, moment)

    def _offer(self, custody: Custody, moment: Moment) -> None:
        life = custody.life.record
        job = SaveJob(
            arena=custody.arena,
            records=custody.records_of(life.number, moment),
            life=life,
            descriptor=custody.life.descriptor,
        )
        custody.pin(life.number, moment)
        self._custody_of_job[id(job)] = custody
        if not self._persister.offer(job):
            custody.unpin(life.number, moment)
            del self._custody_of_job[id(job)]
            self._give_up(custody, moment, "too many saves wait")

    def _give_up(self, custody: Custody, moment: Moment, reason: str) -> None:
        custody.settle(moment)
        log.warning("save skipped: step=%d attempt=%s reason=%s", *moment, reason)
        life = custody.life.record
        name = CheckpointName(run=life.run, incarnation=life.number, step=moment[0], attempt=moment[1])
        self._remember(Outcome(name=name, size_bytes=0, seconds=0.0, error=f"save skipped: {reason}"))

    def _note_end(self, job: SaveJob, outcome: Outcome) -> None:
        """Thread: the persist thread."""
        with self._ended_lock:
            self._ended.append((job, self._custody_of_job.pop(id(job)), outcome))
        os.write(self._wake_send, b"x")

    def _collect_ended(self) -> None:
        with self._ended_lock:
            ended, self._ended = self._ended, []
        for job, custody, outcome in ended:
            moment = (job.name.step, job.name.attempt)
            if job.life.number == custody.life.record.number:
                custody.settle(moment)
            custody.unpin(job.name.incarnation, moment)
            if outcome.error is None:
                self._last_committed = max(job.name.step, self._last_committed or 0)
            self._remember(outcome)

    def _remember(self, outcome: Outcome) -> None:
        self._outcomes[outcome.name.step, outcome.name.attempt] = outcome
        while len(self._outcomes) > OUTCOME_LIMIT:
            self._outcomes.popitem(last=False)

    def _answer_waiters(self) -> None:
        remaining = []
        for waiter in self._waiters:
            outcome = self._outcomes.get(waiter.moment)
            if outcome is not None:
                state = "failed" if outcome.error else "committed"
                reply = {"state": state, "reason": outcome.error, "bytes": outcome.size_bytes, "seconds": outcome.seconds}
                self._reply(waiter.connection, reply)
            elif self._clock.now_s() >= waiter.deadline_s:
                self._reply(waiter.connection, {"state": "pending"})
            else:
                remaining.append(waiter)
        self._waiters = remaining

    # Connections

    def _accept(self, _: object) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError as error:
            log.warning("accept failed: %s", error)
            return
        if not wire.peer_is_me(connection):
            log.warning("refused a connection of another user")
            connection.close()
            return
        connection.setblocking(True)
        connection.settimeout(REAP_TIMEOUT_S)  # a reply to a stopped client must not stop the agent for good
        self._selector.register(connection, selectors.EVENT_READ, self._serve_message)

    def _serve_message(self, connection: Any) -> None:
        try:
            message, descriptors = wire.receive(connection)
        except (OSError, ValueError) as error:
            if not isinstance(error, ConnectionError):
                log.warning("bad message: %s", error)
            self._hang_up(connection)
            return
        self._active_s = self._clock.now_s()
        verb = message.get("verb")
        serve = self._verbs.get(verb) if isinstance(verb, str) else None
        try:
            if serve is None:
                raise UsageError(f"unknown verb: verb={verb!r} allowed={sorted(self._verbs)}")
            serve(connection, message, descriptors)
        except MocError as error:
            self._reply(connection, {"error": str(error)})
        except (KeyError, TypeError, ValueError, OSError) as error:
            log.exception("request failed: verb=%s", verb)
            self._reply(connection, {"error": f"{type(error).__name__}: {error}"})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _reply(self, connection: socket.socket, reply: wire.Message, descriptors: Descriptors | None = None) -> None:
        try:
            wire.send(connection, reply, descriptors or [])
        except OSError as error:
            log.info("client left before its reply: %s", error)
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        self._waiters = [waiter for waiter in self._waiters if waiter.connection is not connection]
        if connection.fileno() >= 0:
            self._selector.unregister(connection)
            connection.close()

    def _drain_wake(self, _: object) -> None:
        os.read(self._wake_receive, 4096)

    # Verbs

    def _hello(self, connection: socket.socket, message: wire.Message, descriptors: Descriptors) -> None:
        rank = message.get("rank")
        if isinstance(rank, int) and descriptors:
            held = self._trainers.pop(rank, None)
            if held is not None:
                self._forget_pidfd(held)
            trainer = Trainer(rank=rank, pid=message["pid"], pidfd=descriptors.pop(0), incarnation=message["incarnation"])
            self._trainers[rank] = trainer
            self._selector.register(trainer.pidfd, selectors.EVENT_READ, lambda _: self._note_death(trainer))
        life = None if self._custody is None else self._custody.life.record.number
        self._reply(connection, {"version": moc.__version__, "pid": os.getpid(), "run": self._run, "incarnation": life})

    def _note_death(self, trainer: Trainer) -> None:
        log.warning("trainer ended: rank=%d pid=%d incarnation=%d", trainer.rank, trainer.pid, trainer.incarnation)
        trainer.is_alive = False
        self._active_s = self._clock.now_s()
        self._forget_pidfd(trainer)

    def _forget_pidfd(self, trainer: Trainer) -> None:
        if trainer.pidfd >= 0:
            self._selector.unregister(trainer.pidfd)
            os.close(trainer.pidfd)
            trainer.pidfd = -1

    def _inventory(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        live = self._live_trainers()
        if self._custody is None:
            self._reply(connection, {"has_arena": False, "live": live})
            return
        self._reply(connection, {"has_arena": True, "live": live, **self._custody.inventory()})

    def _live_trainers(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for rank, trainer in sorted(self._trainers.items()):
            row: dict[str, object] = {
                "rank": rank,
                "pid": trainer.pid,
                "alive": trainer.is_alive,
                "incarnation": trainer.incarnation,
            }
            if self._custody is not None and rank in self._custody.life.ranks:
                words = self._custody.arena.words(rank)
                row |= {
                    "sealed_step": words.sealed_step,
                    "beat_step": words.beat_step,
                    "beat_ns": words.beat_ns,
                    "beat_interval_ns": words.beat_interval_ns,
                }
            rows.append(row)
        return rows

    def _fence(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Kill and reap trainers of earlier lives; what cannot be reaped is named, and its memory never written again."""
        killed, quarantined = [], []
        for trainer in self._trainers.values():
            if not trainer.is_alive or trainer.pid in message["spare_pids"]:
                continue
            signal.pidfd_send_signal(trainer.pidfd, signal.SIGKILL)
            killed.append(trainer.pid)
        for trainer in self._trainers.values():
            if trainer.pid not in killed:
                continue
            poller = select.poll()
            poller.register(trainer.pidfd, select.POLLIN)
            if poller.poll(REAP_TIMEOUT_S * 1e3):
                self._note_death(trainer)
            else:
                quarantined.append(trainer.pid)
        self._reply(connection, {"killed": killed, "quarantined": quarantined})

    def _begin(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Begin a life: on the same memory if the layout is the same and nobody of an earlier life can still write to it."""
        descriptor, number = message["descriptor"], message["incarnation"]
        zombies = [t.pid for t in self._trainers.values() if t.is_alive and t.incarnation != number]
        held = self._custody
        if held is not None and not zombies and held.fits(descriptor):
            held.renew(descriptor)
        else:
            source = None if held is None else held.source()
            if held is not None and source is not held:
                held.arena.close()  # no life on it came to a global snapshot
                self._custody = source
            self._custody = Custody.create(descriptor, earlier=source)
        self._last_committed = None
        self._first_seen_s = {}
        self._reply(connection, {})

    def _adopt(self, connection: socket.socket, message: wire.Message, descriptors: Descriptors) -> None:
        """Take over the arena of an agent that died, from a trainer that kept it."""
        if self._custody is None:
            self._custody = Custody(Arena.attach(descriptors.pop(0)))
            log.info("adopted an arena: incarnation=%d bytes=%d", self._custody.life.record.number, self._custody.arena.size_bytes)
        self._reply(connection, {})

    def _arena(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        if self._custody is None:
            raise UsageError("there is no arena yet")
        self._reply(connection, {}, [self._custody.arena.fd])

    def _source_arena(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        if self._custody is None:
            raise UsageError("there is no arena yet")
        self._reply(connection, {}, [self._custody.source().arena.fd])

    def _bell(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Nothing to do: the loop looks at the arena after every event."""

    def _wait(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        deadline_s = self._clock.now_s() + float(message["timeout_s"])
        self._waiters.append(
            Waiter(connection=connection, moment=(message["step"], message["attempt"]), deadline_s=deadline_s)
        )

    def _skip(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """A rank could not take the snapshot of a save: the save cannot succeed."""
        custody = self._custody
        if custody is None:
            raise UsageError("there is no arena yet")
        self._give_up(
            custody, (message["step"], message["attempt"]), f"rank {message['rank']} skipped its snapshot: {message['reason']}"
        )
        self._reply(connection, {})

    def _status(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        custody = self._custody
        errors = [outcome.error for outcome in self._outcomes.values() if outcome.error]
        now_ns = int(self._clock.now_s() * 1e9)
        ranks = self._live_trainers()
        for row in ranks:
            beat_ns = row.get("beat_ns")
            row["beat_age_s"] = (now_ns - beat_ns) / 1e9 if isinstance(beat_ns, int) and beat_ns else None
        self._reply(
            connection,
            {
                "run": self._run,
                "pid": os.getpid(),
                "version": moc.__version__,
                "incarnation": None if custody is None else custody.life.record.number,
                "storage": None if custody is None else custody.life.descriptor["storage"],
                "ranks": ranks,
                "global_step": None if custody is None else custody.global_step,
                "last_committed_step": self._last_committed,
                "persisting": self._persister.is_busy,
                "arena_bytes": 0 if custody is None else custody.arena.size_bytes,
                "versions": None if custody is None else custody.life.descriptor["versions"],
                "counters": {"saves": len(self._outcomes), "failed": len(errors)},
                "last_error": errors[-1] if errors else None,
            },
        )

    def _drain(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        self._drain_connection = connection
        self._start_drain()

    # Leaving

    def _start_drain(self) -> None:
        """Queue the newest global snapshot unless it is committed already, then leave."""
        if self._is_leaving:
            return
        self._is_leaving = True
        custody = self._custody
        if custody is None:
            return
        custody.scan()
        newest = custody.newest
        is_committed = newest is not None and self._last_committed is not None and self._last_committed >= newest[0]
        if newest is not None and not is_committed and not self._is_started(custody, newest):
            self._offer(custody, newest)

    def _leave(self) -> None:
        self._collect_ended()
        self._answer_waiters()
        self._persister.close()
        (self._folder / SOCKET_NAME).unlink(missing_ok=True)
        self._listener.close()
        if self._drain_connection is not None:
            errors = [outcome.error for outcome in self._outcomes.values() if outcome.error]
            reply = {"last_committed_step": self._last_committed, "last_error": errors[-1] if errors else None}
            self._reply(self._drain_connection, reply)
        log.info("agent leaves: last_committed_step=%s", self._last_committed)
