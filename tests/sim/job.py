"""A job as its user runs it: a launcher that starts lives again and again, and the training loop of each rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moc.config import Config
from moc.errors import MocError
from moc.session import Session
from moc.survey import Request
from tests.sim.machine import Machine
from tests.sim.scheduler import Fiber
from tests.sim.state import TinyState, first_whole, routes_at
from tests.sim.world import Group, SimWorld

if TYPE_CHECKING:
    from tests.sim.process import Process
    from tests.sim.simulation import Simulation

__all__ = ["STORAGE_URL", "Job", "Launch", "Trainer"]

STORAGE_URL = "sim://repository"
HEALED_STEPS = 6  # that a job must do once nothing fails any more
LONGEST_LIFE = 60  # steps
SAVE_DEADLINE_S = 30.0
KILL_ODDS = 0.7  # that the launcher ends the rest of a life; else whoever is left becomes a zombie
ENGINE_TIMEOUT_S = 1000.0  # of the engine's own collectives


@dataclass(slots=True)
class Trainer:
    """One rank of a launch."""

    launch: Launch
    rank: int
    node: int
    process: Process
    session: Session | None = None
    state: TinyState | None = None
    stepped_s: float = 0.0  # when it came to its last boundary
    has_finished: bool = False


@dataclass(slots=True)
class Launch:
    """One start of the job: its ranks, and what all of them decide alike."""

    job: Job
    number: int
    size: int
    world: Group
    engine: Group
    begun_s: float
    is_last: bool  # begun when nothing fails any more
    trainers: list[Trainer] = field(default_factory=list)
    actions: dict[int, str] = field(default_factory=dict)
    first_healed_step: int | None = None

    @property
    def places(self) -> tuple[int, ...]:
        """The node of each rank."""
        return tuple(trainer.node for trainer in self.trainers)

    @property
    def has_failed(self) -> bool:
        return any(t.process.is_dead and not t.has_finished for t in self.trainers)

    @property
    def has_ended(self) -> bool:
        return all(t.process.is_dead for t in self.trainers)

    def action(self, step: int) -> str:
        """Return what every rank does after a step; decided once."""
        if step not in self.actions:
            self.actions[step] = self._decide(step)
        return self.actions[step]

    def _decide(self, step: int) -> str:
        sim, knobs = self.job.sim, self.job.sim.knobs
        if sim.is_healed:
            if self.first_healed_step is None:
                self.first_healed_step = step
            if step >= self.first_healed_step + HEALED_STEPS:
                return "detach"
            return "save" if step == self.first_healed_step + 2 else ""
        odds = sim.chance.random()
        if odds < knobs.save_odds:
            return "save"
        if odds < knobs.save_odds + knobs.load_odds:
            return "load"
        is_long = len(self.actions) > LONGEST_LIFE
        return "detach" if is_long or odds > 1 - knobs.detach_odds else ""


class Job:
    """A launcher and its launches."""

    def __init__(self, sim: Simulation, name: str, *, is_guest: bool) -> None:
        """A guest is a second job on the first one's repository: it gives up when nothing fails any more."""
        self.sim, self.name, self.is_guest = sim, name, is_guest
        self.launches: list[Launch] = []
        self.is_done = False
        self._waiters: list[Fiber] = []
        self.process = sim.process("launcher", name)
        self.process.start(self._launch_for_ever)

    @property
    def _is_leaving(self) -> bool:
        return self.is_guest and self.sim.is_healed

    @property
    def trainers(self) -> list[Trainer]:
        """All whose process lives, of whatever launch."""
        return [t for launch in self.launches for t in launch.trainers if t.process.is_alive]

    def wake(self) -> None:
        self.sim.scheduler.wake(self._waiters)

    def _launch_for_ever(self) -> None:
        knobs, chance = self.sim.knobs, self.sim.chance
        while not self._is_leaving:
            launch = self._start()
            while not (self._is_leaving or launch.has_failed or launch.has_ended):
                self._wait()
            if launch.is_last and launch.has_ended and not launch.has_failed:
                break
            self.process.host.sleep(chance.random() * knobs.restart_s)
            if self._is_leaving or chance.random() < KILL_ODDS:
                self._end(launch)
        self.is_done = True

    def _places(self, size: int) -> list[int]:
        """Return the node of each rank."""
        knobs, chance = self.sim.knobs, self.sim.chance
        places = [rank * knobs.nodes // max(size, knobs.nodes) for rank in range(size)]
        if knobs.shuffle_odds and chance.random() < knobs.shuffle_odds:
            chance.shuffle(places)
        return places

    def _wait(self) -> None:
        self._waiters.append(self.sim.scheduler.current)
        self.sim.scheduler.wait()

    def _end(self, launch: Launch) -> None:
        for trainer in launch.trainers:
            trainer.process.kill("by the launcher")

    def _start(self) -> Launch:
        sim = self.sim
        is_resized = sim.chance.random() < sim.knobs.resize_odds
        size = sim.knobs.other_size if is_resized else sim.knobs.size
        number = len(self.launches) + 1
        launch = Launch(
            self,
            number,
            size,
            Group(size),
            Group(size),
            sim.scheduler.now_s,
            is_last=sim.is_healed and not sim.living("cli"),
        )
        for rank, node in enumerate(self._places(size)):
            where = f"@{sim.nodes[node].number}" if len(sim.nodes) > 1 else ""
            process = sim.process("trainer", f"{self.name}{number}.{rank}{where}", machine=sim.nodes[node])
            trainer = Trainer(launch, rank, node, process)
            process.on_end.append(self.wake)
            launch.trainers.append(trainer)
        self.launches.append(launch)
        for trainer in launch.trainers:
            trainer.process.start(lambda trainer=trainer: _train(sim, trainer))
        return launch


def _train(sim: Simulation, trainer: Trainer) -> None:
    """The main thread of one rank."""
    process, launch, knobs = trainer.process, trainer.launch, sim.knobs
    state = trainer.state = TinyState(trainer.rank, launch.size, process)
    world = SimWorld(launch.world, trainer.rank, process, timeout_s=knobs.timeout_s)
    engine = SimWorld(launch.engine, trainer.rank, process, timeout_s=ENGINE_TIMEOUT_S)
    software = {"sim": "1"}
    try:
        trainer.session = Session(
            state,
            world,
            _request(sim, launch, process.machine),
            ep_sizes=(),
            software=software,
            host=process.host,
            trace=process.trace,
        )
    except MocError as error:
        sim.note(process, "refused", {"error": type(error).__name__, "words": str(error)})
        sim.auditor.note_refused(trainer, error)
        return
    sim.auditor.note_attached(trainer)
    try:
        _steps(sim, trainer, trainer.session, state, engine)
    except MocError as error:
        sim.note(process, "failed", {"error": type(error).__name__, "words": str(error)})


def _steps(sim: Simulation, trainer: Trainer, session: Session, state: TinyState, engine: SimWorld) -> None:
    process, knobs = trainer.process, sim.knobs
    while True:
        process.host.sleep(sim.chance.random() * knobs.step_s)
        session.before_update()
        if knobs.barrier_every and state.step % knobs.barrier_every == 0:
            engine.all_gather(b"")
        state.advance()
        if knobs.is_counting:
            for layer, counts in enumerate(routes_at(state.step, trainer.rank).tolist()):
                session.register_routing(layer, counts)
        sim.auditor.note_step(trainer)
        is_terminating = session.boundary()
        trainer.stepped_s = sim.scheduler.now_s
        sim.auditor.note_status(trainer)
        action = trainer.launch.action(state.step)
        if action == "save" or is_terminating:
            _save(sim, trainer, session)
        if action == "load":
            whole = first_whole(state.step + 17 * trainer.launch.number, is_partial=knobs.is_partial)
            session.before_update()
            state.take(whole)
            session.begin_life("load_checkpoint")
            sim.auditor.note_loaded(trainer, whole)
        if action == "detach" or is_terminating:
            session.close(is_collective=not is_terminating)
            trainer.has_finished = True
            sim.note(process, "left", {"step": state.step})
            return


def _save(sim: Simulation, trainer: Trainer, session: Session) -> None:
    handle = session.save()
    try:
        handle.wait_committed(SAVE_DEADLINE_S)
    except MocError as error:
        sim.note(trainer.process, "save failed", {"words": str(error)})
        sim.auditor.note_save_failed(trainer, error)
        return
    sim.auditor.note_committed(trainer, handle.step)


def _request(sim: Simulation, launch: Launch, machine: Machine) -> Request:
    knobs = sim.knobs
    config = Config(
        snapshot_every=knobs.snapshot_every,
        persist_every=knobs.persist_every,
        mode=knobs.mode,
        k_snapshot=knobs.k_snapshot,
        k_persist=knobs.k_persist,
        plt_limit=knobs.plt_limit,
        replicas=min(knobs.replicas, len(set(launch.places)) - 1),
        versions=knobs.versions,
        keep_last=knobs.keep_last,
        keep_every=knobs.keep_every,
        timeout_s=knobs.timeout_s,
    )
    return Request(
        storage=STORAGE_URL,
        config=config,
        restore="auto",
        run_id=knobs.run_id,
        take_over=sim.is_healed and not launch.job.is_guest,
        on_mismatch=(),
        runtime_root=machine.root,
        node_address=machine.address,
        agent_idle_s=knobs.idle_s,
        fingerprint={"model": "tiny"},
    )
