"""What goes wrong, drawn by the seed: deaths at any span, stops, storage that does not answer, users' commands."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from moc.agent.client import AgentClient
from moc.cli.choose import choose_on_lineage, read_catalogue
from moc.cli.rewind import write_rewind
from moc.errors import MocError
from moc.repository import Repository
from tests.sim.job import STORAGE_URL, Job
from tests.sim.machine import Machine
from tests.sim.rot import rot

if TYPE_CHECKING:
    from tests.sim.process import Process
    from tests.sim.simulation import Simulation

__all__ = ["Nemesis"]

ANSWER_TIMEOUT_S = 5.0


class Nemesis:
    """Acts at random times while `is_awake`, and at spans."""

    def __init__(self, sim: Simulation, chance: random.Random) -> None:
        self.sim, self.chance = sim, chance
        self.is_awake = True
        self._guests = 0
        self._acts: tuple[tuple[int, Callable[[], None]], ...] = (
            (8, self._kill_trainer),
            (6, self._kill_trainers),
            (4, self._kill_agent),
            (1, self._kill_everything),
            (3, self._stop_trainer),
            (2, self._stop_agent),
            (3, self._storage_down),
            (3, self._rewind),
            (2, self._ask_status),
            (1, self._drain),
            (2, self._terminate),
            (3, self._second_job),
        )
        if sim.knobs.nodes > 1:
            self._acts += ((12, self._lose_machine), (5, self._part), (2, self._isolate), (2, self._kill_agents))
        if sim.knobs.is_rotting:
            self._acts += ((12, self._rot),)
        self._later()

    def at_span(self, process: Process, event: str, span: str) -> None:
        """Kill a process at a span; raises Killed in it."""
        knobs = self.sim.knobs
        if self.is_awake and self.chance.random() < knobs.event_odds:
            self.sim.scheduler.call_at(self.sim.scheduler.now_s, self._strike)
        odds = {"trainer": knobs.trainer_kill_odds, "agent": knobs.agent_kill_odds}.get(process.kind, 0.0)
        if self.is_awake and odds and self.chance.random() < odds:
            process.kill(f"at {span} {event}")

    def sleep(self) -> None:
        """Let nothing fail any more."""
        self.is_awake = False
        self.sim.storage.is_down = self.sim.storage.are_faults_on = False
        self.sim.network.heal()
        for process in self.sim.living():
            process.proceed()

    def _later(self) -> None:
        wait_s = self.chance.expovariate(1 / self.sim.knobs.event_s)
        self.sim.scheduler.call_at(self.sim.scheduler.now_s + wait_s, self._act)

    def _act(self) -> None:
        if self.is_awake:
            self._strike()
            self._later()

    def _strike(self) -> None:
        if self.is_awake:
            weights = [weight for weight, _ in self._acts]
            self.chance.choices([act for _, act in self._acts], weights)[0]()

    def _soon(self, longest_s: float, act: Callable[[], None]) -> None:
        self.sim.scheduler.call_at(self.sim.scheduler.now_s + self.chance.random() * longest_s, act)

    # Deaths and stops

    def _one(self, kind: str) -> list[Process]:
        living = self.sim.living(kind)
        return [self.chance.choice(living)] if living else []

    def _kill_trainer(self) -> None:
        for process in self._one("trainer"):
            process.kill("by the nemesis")

    def _kill_trainers(self) -> None:
        for process in self.sim.living("trainer"):
            process.kill("by the nemesis, all")

    def _kill_agent(self) -> None:
        for process in self._one("agent"):
            process.kill("by the nemesis")

    def _kill_everything(self) -> None:
        for process in [*self.sim.living("agent"), *self.sim.living("trainer")]:
            process.kill("by the nemesis, the whole node")

    def _stop_trainer(self) -> None:
        for process in self._one("trainer"):
            process.stop()
            self._soon(40.0, process.proceed)

    def _stop_agent(self) -> None:
        for process in self._one("agent"):
            process.stop()
            self._soon(20.0, process.proceed)

    def _storage_down(self) -> None:
        storage = self.sim.storage
        storage.is_down = True

        def mend() -> None:
            storage.is_down = False

        self._soon(20.0, mend)

    def _rot(self) -> None:
        """The job fails, and a bit of what its newest snapshot alone has flips."""
        self._kill_trainers()
        rot(self.sim)

    # Machines and what is between them

    def _lose_machine(self) -> None:
        self.sim.lose(self.chance.randrange(len(self.sim.nodes)))

    def _kill_agents(self) -> None:
        for process in self.sim.living("agent"):
            process.kill("by the nemesis, all agents")

    def _part(self) -> None:
        """Two machines do not hear each other for a while."""
        one, other = self.chance.sample(self.sim.nodes, 2)
        self._part_for_a_while([(one, other)])

    def _isolate(self) -> None:
        """One machine is not heard by the others for a while."""
        alone = self.chance.choice(self.sim.nodes)
        self._part_for_a_while([(alone, other) for other in self.sim.nodes if other is not alone])

    def _part_for_a_while(self, pairs: list[tuple[Machine, Machine]]) -> None:
        network = self.sim.network
        for one, other in pairs:
            network.part(one, other, is_parted=True)

        def mend() -> None:
            for one, other in pairs:
                network.part(one, other, is_parted=False)

        self._soon(self.sim.knobs.part_s, mend)

    # What users do

    def _terminate(self) -> None:
        for job in self.sim.jobs:
            for trainer in job.trainers:
                if trainer.session is not None:
                    trainer.session.ask_to_terminate()

    def _second_job(self) -> None:
        if self.chance.random() < self.sim.knobs.second_job_odds and not self._guests:
            self._guests += 1
            self.sim.jobs.append(Job(self.sim, "guest", is_guest=True))

    def _rewind(self) -> None:
        process = self.sim.process("cli", "rewind")
        process.start(lambda: self._rewind_in(process))

    def _rewind_in(self, process: Process) -> None:
        """`moc rewind --force`, to a checkpoint on the lineage or off it."""
        try:
            repository = Repository(process.host.open_store(STORAGE_URL, trace=process.trace))
            catalogue = read_catalogue(repository)
            pool = catalogue.everything if self.chance.random() < 0.2 else catalogue.lineage
            if not pool:
                return
            name = self.chance.choice(pool).name
            stored = choose_on_lineage(catalogue, str(name))
            record, _ = write_rewind(repository, repository.read_manifest(stored.name), token=process.host.token())
            self.sim.note(process, "rewound", {"to": str(stored.name), "incarnation": record.number})
        except MocError as error:
            self.sim.note(process, "failed", {"words": str(error)})

    def _ask_status(self) -> None:
        self._ask("status", lambda client: client.status())

    def _drain(self) -> None:
        self._ask("drain", lambda client: client.drain(ANSWER_TIMEOUT_S))

    def _ask(self, name: str, ask: Callable[[AgentClient], object]) -> None:
        """`moc status` or `moc agent stop`."""
        process = self.sim.process("cli", name)

        def main() -> None:
            for agent in self.sim.agents:
                if agent.process.is_alive:
                    try:
                        client = AgentClient.connect(agent.folder, timeout_s=ANSWER_TIMEOUT_S, host=process.host)
                        ask(client)
                        client.close()
                    except MocError as error:
                        self.sim.note(process, "failed", {"words": str(error)})

        process.start(main)
