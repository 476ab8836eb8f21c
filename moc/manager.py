"""The façade: attach a DeepSpeed engine, take part in its steps, detach."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moc.adapters.deepspeed import DeepSpeedState, Hooks, plain_json, refuse_attached
from moc.adapters.software import software_versions
from moc.adapters.world import TorchWorld
from moc.agent.stacks import StackDump
from moc.agreement import agree
from moc.config import Config
from moc.errors import MocError
from moc.handle import SaveHandle
from moc.host import SystemHost
from moc.report import RecoveryReport
from moc.session import Session
from moc.status import Status
from moc.survey import Request
from moc.termination import Termination
from moc.trace import open_trace

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["CheckpointManager"]

log = logging.getLogger(__name__)

AGENT_IDLE_S = 1800.0  # how long an agent keeps a dead job's memory before it persists it and leaves
TERMINATION_DEADLINE_S = 300.0
BOUNDARY_DEADLINE_S = 10.0
NO_LOADER = "no data loader is registered in stateful: after a recovery the order of the data is not restored"


class CheckpointManager:
    """Makes one training job survive failures. One per engine and process. Thread: the training thread.

    Use `attach`; then call `step()` at the end of every step of the loop, `save()` for an explicit checkpoint,
    `detach()` at the end.
    """

    def __init__(self, engine: DeepSpeedEngine, state: DeepSpeedState, world: TorchWorld, session: Session) -> None:
        """Not for users: see `attach`."""
        self._state, self._world, self._session = state, world, session
        self._is_explicit = False
        self._is_ended = False
        self._pid = os.getpid()
        self._hooked_steps = 0
        self._hooks = Hooks(engine, session.before_update, self._on_engine_step, self._on_load, self.detach)
        try:
            self._termination = Termination(ask=session.ask_to_terminate, patience_s=self._patience_s)
        except BaseException:
            self._hooks.detach()
            raise
        self._stacks = StackDump(session.folder, f"rank{world.rank:05d}")
        atexit.register(self._at_exit)
        self.resume_step = state.step
        state.routes.install(session.register_routing)

    @classmethod
    def attach(
        cls,
        engine: DeepSpeedEngine,
        storage: str | Path = "checkpoints",
        config: Config | None = None,
        *,
        stateful: Mapping[str, object] | None = None,
        restore: str | int = "auto",
        fingerprint: Mapping[str, object] | None = None,
        run_id: str | None = None,
        take_over: bool = False,
        on_mismatch: Sequence[str] = (),
        runtime_dir: Path | None = None,
        node_address: str | None = None,
        trace_dir: str | Path | None = None,
    ) -> CheckpointManager:
        """Attach to an engine: recover what there is, begin a new life, hook the engine. Collective.

        storage: a path or any fsspec URL. stateful: objects with `state_dict`/`load_state_dict` that belong to the loop
        (the data loader). restore: "auto" (newest on the lineage, or a fresh start), "never", "weights" (weights only),
        or a step. fingerprint: further values that must be equal to resume. on_mismatch: fingerprint keys that may
        differ. take_over: use another run's repository. runtime_dir: where the node's agents live (two "nodes" on one
        machine need two). node_address: this node's for agents of others (None: that towards MASTER_ADDR). trace_dir:
        for spans, see `moc trace`. Raises: MocError, the same on every rank, before the engine is hooked.
        """
        settings = Config() if config is None else config
        world = TorchWorld(timeout_s=settings.timeout_s)
        try:
            agree(world, lambda: refuse_attached(engine))  # before a new life fences the one of the other manager
            state = agree(world, lambda: DeepSpeedState(engine, stateful or {}, extra_fingerprint=fingerprint or {}))
            state.routes.begin(with_hooks=settings.mode != "full")
            if not stateful and world.rank == 0:
                log.warning(NO_LOADER)
            request = agree(
                world,
                lambda: Request(
                    storage=str(storage),
                    config=settings,
                    restore=restore,
                    run_id=run_id,
                    take_over=take_over,
                    on_mismatch=tuple(on_mismatch),
                    runtime_root=runtime_dir,
                    agent_idle_s=AGENT_IDLE_S,
                    fingerprint=plain_json(state.fingerprint),
                    node_address=node_address,
                ),
            )
            folder = None if not trace_dir else Path(trace_dir).absolute()
            trace = agree(world, lambda: open_trace(folder, f"rank{world.rank:05d}"))
            grid, host, found = state.ep_sizes, SystemHost(trace_dir=folder), software_versions()
            session = Session(state, world, request, ep_sizes=grid, software=found, host=host, trace=trace)
            return cls._hooked(engine, state, world, session)
        except BaseException:
            world.close()
            raise

    @property
    def recovery(self) -> RecoveryReport | None:
        """What was recovered at attach, None for a fresh start."""
        return self._session.recovery

    @property
    def incarnation(self) -> int:
        """The number of this life of the job, 1 for the first."""
        return self._session.incarnation

    @property
    def run_id(self) -> str:
        """The run's name, stable across restarts."""
        return self._session.run

    def step(self) -> None:
        """End a step of the user's loop, after everything that belongs to it.

        Called by all ranks. Never raises for a failed save.
        """
        self._is_explicit = True
        self._session.boundary_name = "manager.step()"
        self._boundary()

    def save(self) -> SaveHandle:
        """Have the present state committed.

        Returns once it is copied. Called by all ranks. See `SaveHandle.wait_committed`.
        """
        return self._session.save()

    def register_routing(self, layer: int, counts: object) -> None:
        """Count the routes that each *global* expert of a MoE layer has kept of this rank's tokens in a micro-batch.

        In training only, from the first step on, by all ranks, not where activation checkpointing repeats a forward.
        layer: in module order. counts: integers on any device. Not for DeepSpeed's own layers in the partial modes,
        where moc counts. Raises: UsageError.
        """
        self._state.routes.register(layer, counts)

    def status(self) -> Status:
        """Return what this rank knows. Never blocks."""
        return self._session.status()

    def detach(self) -> None:
        """Unhook, make the last step durable, leave the engine as it was. Again is harmless.

        Collective, and blocks until the last step is durable; while an exception flies (in a `finally`) other ranks may
        not come here, so then it only lets go: the agent keeps what is sealed.
        """
        self._unhook()
        try:
            self._session.close(is_collective=sys.exc_info()[0] is None)
        finally:
            self._world.close()
            self._stacks.close()  # last: a rank that hangs above can still be asked where

    # Inside

    @classmethod
    def _hooked(
        cls, engine: DeepSpeedEngine, state: DeepSpeedState, world: TorchWorld, session: Session
    ) -> CheckpointManager:
        """Hook the engine on all ranks, or on none and end the session. Collective."""
        made: list[CheckpointManager] = []
        try:
            agree(world, lambda: made.append(cls(engine, state, world, session)))
        except BaseException:
            for manager in made:
                manager._unhook()
            session.close(is_collective=False)
            raise
        return made[0]

    def _on_engine_step(self) -> None:
        """The boundary for loops that do not call `step()`.

        The first engine step of a life is not snapshotted here: only its end shows whether the loop calls `step()`, and
        a snapshot taken too early would miss what the loop does after `engine.step()`.
        """
        self._state.note_update()
        self._hooked_steps += 1
        if not self._is_explicit and self._hooked_steps > 1:
            self._boundary()

    def _boundary(self) -> None:
        if not self._is_ended and self._session.boundary():
            self._terminate()

    def _on_load(self) -> None:
        """The engine's state was replaced by one of DeepSpeed's checkpoints: a new life without parent. Collective."""
        self._state.note_loaded()
        self._session.begin_life("load_checkpoint")

    def _terminate(self) -> None:
        """All ranks agreed that SIGTERM came: a durable save, then what SIGTERM would have done."""
        self._is_ended = True  # should the process go on, by a handler of its own, then without moc
        self._termination.heard()
        log.warning("SIGTERM: saving step %d before leaving", self._state.step)
        try:
            self._session.save().wait_committed(TERMINATION_DEADLINE_S)
        except MocError as error:
            log.error("the save before leaving failed: %s", error)
        self._unhook()
        self._session.close(is_collective=False)
        self._stacks.close()
        os.kill(os.getpid(), signal.SIGTERM)

    def _patience_s(self) -> float:
        """Return how long a rank may take to its next boundary after SIGTERM; DeepSpeed's launcher kills after 30 s."""
        return max(BOUNDARY_DEADLINE_S, 3 * self._session.step_s)

    def _unhook(self) -> None:
        self._hooks.detach()
        self._state.routes.remove()
        atexit.unregister(self._at_exit)
        self._termination.restore()

    def _at_exit(self) -> None:
        """Python ends without `detach`: no collectives, others may be dead. The agent keeps what is sealed."""
        if os.getpid() != self._pid:
            return  # a forked child, which does not have the arena
        self._unhook()
        self._session.close(is_collective=False)
        self._stacks.close()
