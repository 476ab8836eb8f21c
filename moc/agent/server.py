"""The node agent: owns the arena, watches the trainers, persists what they seal, and outlives them.

One thread serves sockets and looks at the arena, one persists (`moc.agent.persister`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moc
from moc.agent import wire
from moc.agent.adviser import Adviser
from moc.agent.company import Company
from moc.agent.custody import Custody
from moc.agent.diagnosis import diagnose, status_of, with_ages
from moc.agent.door import Door
from moc.agent.life import Life
from moc.agent.losses import Losses
from moc.agent.restock import Restock, errand_from
from moc.agent.runtime import LOCK_NAME, SOCKET_NAME
from moc.agent.saves import Saves, Waiter
from moc.agent.trainers import Trainer, Trainers
from moc.errors import CoordinationError, MocError, UsageError
from moc.host import Host
from moc.trace import RingSink, Trace

__all__ = ["Agent"]

log = logging.getLogger(__name__)

TICK_S = 0.2  # a lost bell costs at most this
LAST_NEWS_S = 10.0  # an agent that leaves waits so long for what other nodes hold
SPAN_LIMIT = 512  # of the last spans, kept for `moc doctor`
ATTACH_VERBS = ("inventory", "fence", "check", "begin", "meet", "adopt", "arena", "source", "restock")

Descriptors = list[int]


class Agent:
    """The agent of one run on one node. Thread: `serve` and everything it calls run on one thread."""

    def __init__(self, folder: Path, *, run: str, idle_s: float, host: Host, trace: Trace) -> None:
        self._folder, self._run, self._idle_s, self._host = folder, run, idle_s, host
        self._selector = selectors.DefaultSelector()
        self._wake_receive, self._wake_send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._custody: Custody | None = None
        self._losses = Losses()
        self._trainers = Trainers(self._selector, on_death=self._note_activity, host=host)
        self._door = Door(self._selector, serve=self._serve_message, host=host)
        self._spans = RingSink(SPAN_LIMIT, now_s=host.now_s)
        trace = trace.joined_by(self._spans)
        self._trace = trace
        self._company = Company(host=host, trace=trace, wake=self._wake)
        self._restock = Restock(host=host, trace=trace, wake=self._wake)
        self._adviser = Adviser()
        self._saves = Saves(host=host, trace=trace, reply=self._reply, wake_fd=self._wake_send)
        self._drainers: list[socket.socket] = []
        self._is_asked_to_leave = False
        self._is_leaving = self._is_last_offered = False
        self._leave_by_s = 0.0
        self._active_s = host.now_s()
        self._verbs: dict[str, Callable[[socket.socket, wire.Message, Descriptors], None]] = {
            "hello": self._hello,
            "inventory": self._inventory,
            "fence": self._fence,
            "check": self._check,
            "begin": self._begin,
            "meet": self._meet,
            "adopt": self._adopt,
            "arena": self._arena,
            "source": self._source_arena,
            "restock": self._fetch_replicas,
            "bell": self._bell,
            "wait": self._wait,
            "skip": self._skip,
            "status": self._status,
            "diagnose": self._diagnose,
            "drain": self._drain,
        }

    def listen(self) -> bool:
        """Take the folder's lock and listen; return False if another agent has it."""
        self._lock_file = self._host.lock(self._folder / LOCK_NAME)
        if self._lock_file is None:
            log.info("another agent has the lock: folder=%s", self._folder)
            return False
        with self._trace.span("agent.listen", run=self._run):
            self._door.open(self._folder / SOCKET_NAME)
        self._selector.register(self._wake_receive, selectors.EVENT_READ, self._drain_wake)
        log.info("agent listens: run=%s pid=%d version=%s", self._run, self._host.pid, moc.__version__)
        return True

    def serve(self) -> None:
        """Serve until drained or idle."""
        while not (self._is_last_offered and not self._saves.is_busy):
            for key, _ in self._host.select(self._selector, TICK_S):
                key.data(key.fileobj)
            self._turn()
        self._leave()

    def ask_to_leave(self, *_: object) -> None:
        """Have the agent persist and leave, as a drain does.

        A signal handler too: it runs between any two instructions of the loop, so it only notes and wakes.
        """
        self._is_asked_to_leave = True
        os.write(self._wake_send, b"x")

    def _turn(self) -> None:
        """What the loop does after every event, and at least every tick."""
        self._door.look()
        self._saves.collect(self._custody)
        self._adviser.look(self._custody, self._saves)
        self._collect_replicas()
        if self._restock.is_busy:
            self._active_s = self._host.now_s()
        is_idle = not self._trainers.living() and self._host.now_s() - self._active_s > self._idle_s
        if (is_idle or self._is_asked_to_leave) and not self._is_leaving:
            log.info("leaving: idle=%s asked=%s", is_idle, self._is_asked_to_leave)
            self._is_leaving = True
            self._leave_by_s = self._host.now_s() + LAST_NEWS_S
        if self._is_leaving and not self._is_last_offered:
            self._offer_last()
        self._look()
        self._saves.answer_waiters(None if self._custody is None else self._custody.life.record.number)

    def _look(self) -> None:
        if self._custody is not None:
            ended = self._trainers.ended(self._custody.life.record.number)
            self._saves.look(self._custody, ended=ended, may_start=not self._is_leaving)
        self._tell()

    def _tell(self) -> None:
        if self._custody is not None:
            ended = self._trainers.ended(self._custody.life.record.number)
            self._company.tell(self._custody, self._saves, ended=ended)

    def _offer_last(self) -> None:
        """Have the newest moment saved, once it is known which one all nodes hold, or nobody can wait for it longer."""
        custody = self._custody
        is_known = custody is None or self._company.knows_the_newest(custody)
        if is_known or self._host.now_s() > self._leave_by_s:
            self._is_last_offered = True
            if self._company.council is not None:
                self._company.council.hurry()
            if custody is not None:
                self._saves.persist_newest(custody)

    def _note_activity(self, _: Trainer) -> None:
        """The idle clock begins again when a trainer comes or goes, or an attach asks; a status is neither."""
        self._active_s = self._host.now_s()

    def _leave(self) -> None:
        self._saves.close()
        self._saves.collect(self._custody)
        self._tell()
        self._saves.answer_waiters(None if self._custody is None else self._custody.life.record.number)
        self._company.flush()
        self._company.leave()
        (self._folder / SOCKET_NAME).unlink(missing_ok=True)
        self._door.close()
        reply = {"last_committed_step": self._saves.last_committed_step, "last_error": self._saves.last_error}
        with self._trace.span("agent.leave"):
            for connection in self._drainers:
                self._reply(connection, reply)
        log.info("agent leaves: last_committed_step=%s", self._saves.last_committed_step)

    # Connections

    def _serve_message(self, connection: Any) -> None:
        try:
            message, descriptors = wire.receive(connection)
        except (OSError, ValueError) as error:
            if not isinstance(error, ConnectionError):
                log.warning("bad message: %s", error)
            self._hang_up(connection)
            return
        verb = message.get("verb")
        serve = self._verbs.get(verb) if isinstance(verb, str) else None
        if verb in ATTACH_VERBS:
            self._active_s = self._host.now_s()
        try:
            if serve is None:
                raise UsageError(f"unknown verb: verb={verb!r} allowed={sorted(self._verbs)}")
            serve(connection, message, descriptors)
        except MocError as error:
            self._reply(connection, {"error": str(error), "is_usage": isinstance(error, UsageError)})
        except Exception as error:  # whatever a message brings about: answered, and the agent goes on
            log.exception("request failed: verb=%s", verb)
            self._reply(connection, {"error": f"{type(error).__name__}: {error}"})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _reply(self, connection: socket.socket, reply: wire.Message, descriptors: Descriptors | None = None) -> None:
        try:
            wire.send(connection, reply, descriptors or [])
        except OSError as error:
            log.info("client left before its reply, or does not read: %s", error)
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        self._saves.forget_waiters(connection)
        self._drainers = [other for other in self._drainers if other is not connection]
        self._door.hang_up(connection)

    def _drain_wake(self, _: object) -> None:
        os.read(self._wake_receive, 4096)

    def _wake(self) -> None:
        """Have the loop look. Thread: any."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full: it will look
            os.write(self._wake_send, b"x")

    # Verbs

    def _hello(self, connection: socket.socket, message: wire.Message, descriptors: Descriptors) -> None:
        life = None if self._custody is None else self._custody.life.record.number
        if message.get("rank") is not None and descriptors:
            rank, pid, incarnation = (wire.integer(message, field) for field in ("rank", "pid", "incarnation"))
            trainer = Trainer(
                rank=rank,
                pid=pid,
                pidfd=descriptors.pop(0),
                incarnation=incarnation,
                version=str(message.get("version"))[:64],
            )
            self._trainers.enter(trainer, newest_incarnation=life)
            self._active_s = self._host.now_s()
        facts = {"pid": self._host.pid, "run": self._run, "incarnation": life, "leaving": self._is_leaving}
        self._reply(connection, {"version": moc.__version__, **facts})

    def _inventory(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        live = self._trainers.rows(None if self._custody is None else self._custody.arena)
        if self._custody is None:
            self._reply(connection, {"has_arena": False, "live": live})
            return
        if "lend_at" in message:
            self._company.lend(self._custody, wire.text(message, "lend_at"))
        held = {**self._custody.inventory(), **self._company.replicas_held()}
        self._reply(connection, {"has_arena": True, "live": live, **held})

    def _fence(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Kill and reap trainers of earlier lives, or none if one lives that the caller has not looked at.

        What cannot be reaped is named, and its memory never written again.
        """
        spared = wire.integers(message, "spare_pids")
        judged = {*spared, *wire.integers(message, "known_pids")}
        unknown = sorted(trainer.pid for trainer in self._trainers.living() if trainer.pid not in judged)
        killed: list[int] = []
        quarantined: list[int] = []
        if not unknown:
            with self._trace.span("agent.fence"):
                killed, quarantined = self._trainers.fence(spared)
        self._reply(connection, {"killed": killed, "quarantined": quarantined, "unknown": unknown})

    def _check(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Refuse, before anything is written, a life that `begin` would refuse."""
        if self._is_leaving:
            raise UsageError("the agent is leaving: attach again")
        descriptor = wire.mapping(message, "descriptor")
        self._company.check(descriptor)
        self._company.refuse_too_large(descriptor, self._custody)
        self._reply(connection, {})

    def _begin(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Begin a life: on the same memory if the layout is the same and nobody of an earlier life can still write to
        it.
        """
        descriptor, held = wire.mapping(message, "descriptor"), self._custody
        life = Life.of(descriptor)  # before anything is given up for it
        if self._is_leaving:
            raise UsageError("the agent is leaving: attach again")
        if self._restock.is_busy:
            raise CoordinationError("replicas are being fetched for an attach that has ended: attach again")
        url = self._company.begin(life)
        incarnation = wire.integer(message, "incarnation")
        zombies = self._trainers.zombies(incarnation)
        with self._trace.span("agent.begin", incarnation=incarnation):
            if held is not None and not zombies and held.fits(descriptor):
                held.renew(descriptor)
            else:
                source = None if held is None else held.source()
                if held is not None and source is not held:
                    held.arena.close()  # no life on it came to a global snapshot
                    self._custody = source
                self._custody = Custody.create(descriptor, earlier=source)
            assert self._custody is not None, "renewed or created"
            self._company.replicate(self._custody)
        self._saves.begin_life()
        self._adviser.begin_life()
        self._saves.enter(self._company.council)
        self._trainers.begin_life(message["incarnation"])
        self._reply(connection, {} if url is None else {"url": url})

    def _meet(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Tell the agent of a life that has begun where those of the other nodes are."""
        custody, incarnation = self._custody, wire.integer(message, "incarnation")
        if custody is None or custody.life.record.number != incarnation:
            raise UsageError(f"another life has begun: incarnation={incarnation}")
        with self._trace.span("agent.meet", incarnation=incarnation):
            self._company.meet(custody, wire.texts(message, "urls"))
        self._reply(connection, {})

    def _adopt(self, connection: socket.socket, message: wire.Message, descriptors: Descriptors) -> None:
        """Take over the arena of an agent that died, from a trainer that kept it."""
        if self._custody is None:
            if not descriptors:
                raise UsageError("no arena was sent along")
            with self._trace.span("agent.adopt"):
                custody = Custody.adopt(descriptors.pop(0))
                try:
                    self._company.adopt(custody)
                except BaseException:
                    custody.close()  # the trainers try again, and keep it mapped
                    raise
                self._custody = custody
            self._saves.enter(self._company.council)
            self._saves.recall(self._custody)
            log.info(
                "adopted an arena: incarnation=%d bytes=%d",
                self._custody.life.record.number,
                self._custody.arena.size_bytes,
            )
        self._reply(connection, {})

    def _arena(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        if self._custody is None:
            raise UsageError("there is no arena yet")
        self._reply(connection, {}, [self._custody.arena.fd])

    def _source_arena(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        self._reply(connection, {}, [] if self._custody is None else [self._custody.source().arena.fd])

    def _fetch_replicas(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Fetch what this node lacks of a snapshot, or has rotten, from replicas; the reply comes when that is done."""
        if self._trainers.strangers():
            raise UsageError("trainers of an earlier life may still write to this memory")
        self._restock.want(connection, errand_from(message))

    def _collect_replicas(self) -> None:
        """Take notice of replicas that were fetched, answer who asked, and begin to fetch what is wanted next."""
        made, replies = self._restock.collect()
        if made is not None and self._custody is not None:
            made.close()  # somebody else has handed over an arena meanwhile: what is asked for next goes there
        elif made is not None:
            self._custody = made
        if replies and self._custody is not None:
            self._custody.source().look_again()
        for connection, reply in replies:
            self._reply(connection, reply)
        self._restock.start_next(self._custody)

    def _bell(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Nothing to do: the loop looks at the arena after every event."""

    def _wait(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        deadline_s = self._host.now_s() + wire.number(message, "timeout_s")
        moment = (wire.integer(message, "step"), wire.text(message, "attempt"))
        self._saves.wait(Waiter(connection=connection, moment=moment, deadline_s=deadline_s))

    def _skip(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """A rank could not take the snapshot of a save: the save cannot succeed."""
        if self._custody is None:
            raise UsageError("there is no arena yet")
        moment = (wire.integer(message, "step"), wire.text(message, "attempt"))
        reason = f"rank {wire.integer(message, 'rank')} skipped its snapshot: {wire.text(message, 'reason')}"
        self._saves.give_up(self._custody, moment, reason)
        self._reply(connection, {})

    def _status(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        custody = self._custody
        rows = self._trainers.rows(None if custody is None else custody.arena)
        facts = {"run": self._run, "pid": self._host.pid, "version": moc.__version__, "leaving": self._is_leaving}
        saved = facts | {"ranks": with_ages(rows, self._host.now_s())} | status_of(custody, self._saves)
        saved["advice"] = None if self._adviser.newest is None else self._adviser.newest.to_json()
        saved["routing"] = None if custody is None else self._losses.facts(custody.life, custody.arena)
        company = self._company.facts()
        if company is not None:
            saved["company"] = company
        self._reply(connection, saved)

    def _diagnose(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Everything else that helps to judge a job from afar."""
        found = diagnose(self._custody, self._saves, self._spans, connections=self._door.connections)
        self._reply(connection, found)

    def _drain(self, connection: socket.socket, message: wire.Message, _: Descriptors) -> None:
        """Persist the newest global snapshot and leave; the reply comes when that is done."""
        self._drainers.append(connection)
        self._is_asked_to_leave = True
