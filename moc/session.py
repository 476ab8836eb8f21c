"""One rank's part in the job's lives: from attach to detach, without torch.

A session holds what belongs to the present life (arena mapping, snapshotter, link to the agent) and takes at every
boundary the snapshot that `moc.boundary` chooses. `moc.manager` puts an engine in front of it,
the crash tests plain memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moc.agent.client import AgentClient
from moc.agent.link import AgentLink
from moc.agent.runtime import runtime_folder
from moc.agreement import agree, exchange
from moc.attach import Recovered, begin_anew, recover_life, write_life
from moc.beginning import Beginning
from moc.boundary import Boundaries
from moc.errors import ClosedError, MocError, StoreUnavailableError
from moc.facts import gather_facts
from moc.format.manifest import Incarnation
from moc.handle import SaveHandle
from moc.host import Host
from moc.ledger import Ledger
from moc.opening import map_arena
from moc.plan.freeing import attempt_id
from moc.report import RecoveryReport
from moc.routing import Routing
from moc.snapshot.arena import Arena
from moc.snapshot.seal import EXPLICIT, PERSIST
from moc.snapshot.snapshotter import Begun, Snapshotter
from moc.status import Status
from moc.survey import Request
from moc.trace import Trace
from moc.training import TrainingState, World

__all__ = ["Session"]

log = logging.getLogger(__name__)

SLOT_WAIT_S = 0.01
DRAIN_ATTEMPTS = 3


@dataclass(slots=True, kw_only=True)
class _Life:
    """What belongs to one life."""

    record: Incarnation
    lineage: tuple[Incarnation, ...]
    arena: Arena
    link: AgentLink
    snapshotter: Snapshotter
    ledger: Ledger

    def close(self) -> None:
        self.snapshotter.close()
        self.link.close()
        self.arena.close()


class Session:
    """Thread: the training thread. Collective methods say so."""

    def __init__(
        self,
        state: TrainingState,
        world: World,
        request: Request,
        *,
        ep_sizes: tuple[tuple[str, int], ...],
        software: Mapping[str, str],
        host: Host,
        trace: Trace,
    ) -> None:
        """Recover and begin a life.

        Collective. Blocks: for recovery and the creation of the arena. Raises: MocError, the same everywhere.
        """
        self._state, self._world, self._request = state, world, request
        self._host, self._trace, self._software = host, trace, dict(software)
        self._closed = False
        self._last_status: Status | None = None
        self._is_asked_to_terminate = False
        self._ordinal: tuple[int, int] = (-1, 0)
        self._step_s, self._beat_s = 0.0, 0.0
        self._passing_since_s: float | None = None
        self.boundary_name = "hook"
        self._facts = gather_facts(state, world, request, ep_sizes=ep_sizes, host=host)
        self._boundaries = Boundaries(
            world,
            self._facts.turns,
            persist_every=request.config.persist_every,
            has_replicas=request.config.replicas > 0,
        )
        self._is_leader = self._facts.is_leader(world.rank)
        self._recovered = recover_life(
            request, state, world, self._facts, software=self._software, host=host, trace=trace
        )
        self._life = self._begin(self._recovered)

    # Facts

    @property
    def recovery(self) -> RecoveryReport | None:
        """The report of the recovery that began this session, None for a fresh start."""
        return self._recovered.report

    @property
    def step_s(self) -> float:
        """The seconds between the last two boundaries, 0.0 before the second. Thread: any."""
        return self._step_s

    @property
    def incarnation(self) -> int:
        return self._life.record.number

    @property
    def run(self) -> str:
        return self._life.record.run

    @property
    def folder(self) -> Path:
        """The runtime folder of this run's agent."""
        return self._life.link.folder

    def status(self) -> Status:
        """Return what this rank knows; after `close`, what it knew last. Never blocks."""
        if self._last_status is not None:
            return self._last_status
        global_step, committed_step = self._life.arena.published()
        counters = self._life.snapshotter.counters
        return Status(
            step=self._state.step,
            incarnation=self.incarnation,
            last_global_step=global_step,
            last_committed_step=committed_step,
            stall_ms_last=counters.stall_ms_last,
            snapshots=counters,
            agents_replaced=self._life.link.agents_replaced,
            boundary=self.boundary_name,
            plt=self._life.ledger.plt,
        )

    # The loop

    def before_update(self) -> None:
        """Wait until the snapshot under way reads nothing any more. Call right before every weight update."""
        if self._closed:
            return
        if self._passing_since_s is not None:
            pass_ns = int((self._host.now_s() - self._passing_since_s) * 1e9)
            self._life.arena.note_pass(self._world.rank, pass_ns)
            self._passing_since_s = None
        self._life.snapshotter.wait_copied()

    def boundary(self) -> bool:
        """End a step and return True if the ranks agreed to terminate.

        Heartbeat, snapshot, agreement: collective, without waiting for the present step's.
        """
        self._refuse_closed()
        step, life = self._state.step, self._life
        now_s = self._host.now_s()
        self._step_s, self._beat_s = now_s - (self._beat_s or now_s), now_s
        now_ns = int(now_s * 1e9)
        life.arena.beat(self._world.rank, incarnation=life.record.number, step=step, now_ns=now_ns)
        life.link.look()
        is_terminating = self._boundaries.learn()
        choice = None if is_terminating else self._boundaries.choose(step)
        begun = Begun.NO_SLOT
        if choice is not None:
            attempt = self._next_attempt(step)
            extra = life.ledger.settle(step, choice.experts, failed=life.snapshotter.setbacks.failed)
            begun = life.snapshotter.begin(
                step, flags=choice.flags, attempt=attempt, experts=choice.experts, extra=extra
            )
            life.ledger.note(is_begun=begun is Begun.STARTED)
        self._boundaries.tell(
            choice,
            begun,
            life.snapshotter.setbacks,
            is_asked_to_terminate=self._is_asked_to_terminate,
            settled_step=life.arena.settled_step(),
        )
        if self._passing_since_s is None:
            self._passing_since_s = self._host.now_s()
        return is_terminating

    def save(self) -> SaveHandle:
        """Take a snapshot of the present state and have it committed; returns once it is copied. Called by all ranks.

        Blocks: for the copy, and for free slots, at most the configured timeout. A failure is on the handle.
        """
        self._refuse_closed()
        step, life = self._state.step, self._life
        attempt = self._next_attempt(step)
        with self._trace.span("save.take", step=step, rank=self._world.rank):
            problem = self._begin_awaited(step, attempt)
        self._passing_since_s = self._host.now_s()
        if problem is not None:
            self._boundaries.note_failed_save()
            try:
                life.link.skip(step, attempt, problem)
            except MocError as error:
                log.warning("agent could not be told of a failed save: %s", error)
        return SaveHandle(step=step, attempt=attempt, problem=problem, link=life.link, host=self._host)

    def register_routing(self, layer: int, counts: object) -> None:
        """Count this rank's routes to every expert of a MoE layer in a micro-batch. Raises: UsageError."""
        self._refuse_closed()
        self._life.ledger.register(layer, counts)

    def ask_to_terminate(self) -> None:
        """Ask for a durable save at the next boundary on which all ranks agree.

        Thread: any, signal handlers included.
        """
        self._is_asked_to_terminate = True  # a plain attribute: a lock could be held by the code the signal interrupts

    def begin_life(self, reason: str) -> None:
        """Begin a life without parent, after the engine's state was replaced from elsewhere. Collective."""
        self._refuse_closed()
        self._life.snapshotter.wait_finished(self._request.config.timeout_s)
        former = self._life
        origin = begin_anew(
            self._request, self._recovered.origin, former.lineage, self._world, host=self._host, trace=self._trace
        )
        recovered = Recovered(origin=origin, parent=None, reason=reason, report=self._recovered.report)
        log.warning("a new life begins without a parent: incarnation=%d reason=%s", origin.number, reason)
        with self._trace.span("life.renew", incarnation=origin.number, rank=self._world.rank):
            former.snapshotter.close()
            self._life = self._begin(recovered)
            self._boundaries.begin_life()
            former.close()  # only now: should the new life not begin, the old one's memory is still mapped

    def close(self, *, is_collective: bool) -> None:
        """Leave.

        Collective: all ranks seal, then the agent persists the newest snapshot and exits. Otherwise: just stop, the
        agent stays.
        """
        if self._closed:
            return
        self._closed = True
        self._last_status = self.status()  # the arena is unmapped below
        life, rank = self._life, self._world.rank
        if not is_collective:
            life.snapshotter.close()
            life.link.close()
            return
        with self._trace.span("detach.seal", step=self._state.step, rank=rank):
            self._seal_last(life)
        life.snapshotter.close()
        try:
            if self._is_leader:  # the others need not wait for the last upload, which may outlast any timeout
                with self._trace.span("detach.drain", step=self._state.step):
                    self._drain(life)
        finally:
            life.link.close()
            life.arena.close()

    # Inside

    def _seal_last(self, life: _Life) -> None:
        """Return once all ranks have sealed the present step, or have said why they cannot. Collective."""
        step, rank = self._state.step, self._world.rank
        self._world.finish_max()
        life.snapshotter.wait_finished(self._request.config.timeout_s)
        is_sealed = exchange(self._world, self._has_sealed_all(life, step))
        if step and not all(is_sealed):
            problem = self._begin_awaited(step, self._next_attempt(step))
            if problem is not None:
                log.warning("the last step could not be snapshotted: step=%d reason=%s", step, problem)
        exchange(self._world, rank)  # everybody has sealed

    def _has_sealed_all(self, life: _Life, step: int) -> bool:
        """Return whether this rank's newest snapshot is of this step, with all experts."""
        rank = self._world.rank
        if life.arena.words(rank).sealed_step != step or self._request.config.k_snapshot is None:
            return life.arena.words(rank).sealed_step == step
        own = [record for record in life.arena.seals(rank).values() if record.incarnation == life.record.number]
        newest = max(own, key=lambda record: (record.step, record.attempt), default=None)
        return newest is not None and all(held == step for held in newest.steps)

    def _drain(self, life: _Life) -> None:
        """Have the agent persist and leave.

        While the arena is mapped here, an agent that dies meanwhile is replaced.
        """
        timeout_s = self._request.config.timeout_s
        for attempt in range(1, DRAIN_ATTEMPTS + 1):
            life.link.wait_connected(timeout_s, is_gone=attempt > 1)
            try:
                reply = self._connect(life.link.folder).drain(timeout_s)
            except StoreUnavailableError:
                if attempt == DRAIN_ATTEMPTS:
                    raise
                log.warning("agent died while it drained: attempt=%d", attempt)
                continue
            committed = reply.get("last_committed_step")
            if self._state.step and committed != self._state.step:
                log.warning("the last step is not stored: committed=%s reason=%s", committed, reply.get("last_error"))
            return

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError("the manager is detached")

    def _next_attempt(self, step: int) -> str:
        ordinal = self._ordinal[1] + 1 if self._ordinal[0] == step else 0
        self._ordinal = (step, ordinal)
        record = self._life.record
        return attempt_id(record.run, record.number, record.token, step, ordinal)

    def _begin_awaited(self, step: int, attempt: str) -> str | None:
        """Begin a snapshot that somebody waits for; return why it could not be had. Collective."""
        snapshotter, timeout_s = self._life.snapshotter, self._request.config.timeout_s
        deadline_s = self._host.now_s() + timeout_s
        snapshotter.wait_finished(timeout_s)  # its fate belongs into the ledger
        failed = snapshotter.counters.failed
        extra = self._life.ledger.settle(step, failed=failed)
        while True:
            snapshotter.wait_finished(max(deadline_s - self._host.now_s(), 0.0))
            outcome = snapshotter.begin(step, flags=PERSIST | EXPLICIT, attempt=attempt, extra=extra)
            self._life.ledger.note(is_begun=outcome is Begun.STARTED)
            if outcome is Begun.STARTED:
                break
            if outcome is Begun.FAILED or self._host.now_s() >= deadline_s:
                return snapshotter.counters.last_problem or "no free slots"
            self._life.link.look()  # only an agent frees slots
            self._host.sleep(SLOT_WAIT_S)
        snapshotter.wait_finished(max(deadline_s - self._host.now_s(), 0.0))
        return snapshotter.counters.last_problem if snapshotter.counters.failed > failed else None

    def _begin(self, recovered: Recovered) -> _Life:
        """Write the life's record, have the agents begin it, map the arena, start the snapshotter. Collective."""
        rank, folder = self._world.rank, runtime_folder(recovered.origin.run, self._request.runtime_root)
        beginning = Beginning(
            folder,
            self._request,
            self._facts,
            self._world,
            recovered.origin.lineage,
            layers=recovered.layers,
            base=recovered.base,
            software=self._software,
            host=self._host,
        )
        record = write_life(
            self._request, recovered, self._world, check=beginning.check, host=self._host, trace=self._trace
        )
        with self._trace.span("attach.begin", incarnation=record.number, rank=rank):
            beginning.begin(record)
            arena = agree(self._world, lambda: map_arena(self._request, record.run, host=self._host))
            agree(self._world, lambda: arena.populate_rank(rank))
        link = agree(
            self._world,
            lambda: AgentLink(
                folder,
                run=record.run,
                rank=rank,
                is_leader=self._is_leader,
                incarnation=record.number,
                idle_s=self._request.agent_idle_s,
                arena=arena,
                host=self._host,
                trace=self._trace,
            ),
        )
        snapshotter = self._snapshotter(record, arena, link)
        arena.beat(rank, incarnation=record.number, step=self._state.step, now_ns=int(self._host.now_s() * 1e9))
        lineage, ledger = (*recovered.origin.lineage, record), self._open_ledger(recovered.routing)
        return _Life(record=record, lineage=lineage, arena=arena, link=link, snapshotter=snapshotter, ledger=ledger)

    def _open_ledger(self, restored: Routing | None) -> Ledger:
        experts, limit = self._facts.turns.counts, self._request.config.plt_limit
        step, source = self._state.step, self._state.routes
        return Ledger(experts, self._world, step=step, plt_limit=limit, restored=restored, source=source)

    def _snapshotter(self, record: Incarnation, arena: Arena, link: AgentLink) -> Snapshotter:
        return Snapshotter(
            self._state,
            arena,
            rank=self._world.rank,
            run=record.run,
            incarnation=record.number,
            digest=str(arena.descriptor["digest"]),
            turns=self._facts.turns,
            on_sealed=link.ring,
            host=self._host,
            trace=self._trace,
        )

    def _connect(self, folder: Path) -> AgentClient:
        return AgentClient.connect(folder, timeout_s=self._request.config.timeout_s, host=self._host)
