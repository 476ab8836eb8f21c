"""One simulation: a seed, its processes, its log, and what the auditor found."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import random
import shutil
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moc.agent.server import Agent
from tests.sim.auditor import Auditor
from tests.sim.job import Job
from tests.sim.knobs import Knobs
from tests.sim.machine import Machine
from tests.sim.nemesis import Nemesis
from tests.sim.network import SimNetwork
from tests.sim.process import Process
from tests.sim.scheduler import Fiber, Scheduler, StuckError
from tests.sim.storage import Storage

__all__ = ["Report", "Simulation", "simulate"]

TURN_LIMIT = 100_000
TIME_LIMIT_S = 20_000.0  # virtual
CALM_S = 80.0  # after the last fault: what was under way has ended by then
MEMORY = Path("/dev/shm")  # where a rename waits for no disk
TAIL = 60  # lines of the log that a failure prints


@dataclass(frozen=True, slots=True)
class Report:
    """What a seed did: equal digests mean equal runs, event for event."""

    seed: int
    digest: str
    violations: tuple[str, ...]
    counts: Mapping[str, int]
    turns: int
    virtual_s: float
    log: tuple[str, ...]


@dataclass(slots=True)
class SimAgent:
    """A simulated agent process and the production server in it."""

    process: Process
    folder: Path
    run: str
    server: Agent | None = None
    has_ended_start: bool = False
    waiters: list[Fiber] = field(default_factory=list)

    def wait_ready(self, timeout_s: float) -> bool:
        scheduler = self.process.sim.scheduler
        if not self.has_ended_start:
            self.waiters.append(scheduler.current)
            scheduler.wait(timeout_s=timeout_s)
        return self.has_ended_start

    def note_started(self) -> None:
        self.has_ended_start = True
        self.process.sim.scheduler.wake(self.waiters)


class Simulation:
    """Owns everything of one seed."""

    def __init__(self, seed: int, *, is_partial: bool, has_nodes: bool, keep_log: bool) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.knobs = Knobs.draw(self.chance, is_partial=is_partial, has_nodes=has_nodes)
        self.root = Path(tempfile.mkdtemp(prefix="moc-sim-", dir=MEMORY if MEMORY.is_dir() else None))
        self._digest = hashlib.sha256()
        self._log: deque[str] = deque(maxlen=None if keep_log else TAIL)
        self._processes: dict[int, Process] = {}
        self._fence_of: dict[int, Process] = {}
        self.agents: list[SimAgent] = []
        self.jobs: list[Job] = []
        self.machines: list[Machine] = []
        self.nodes = [self.new_machine() for _ in range(self.knobs.nodes)]
        """The machines that the job runs on; a lost one is replaced by an empty one."""
        self.is_healed = False
        self._healed_s = 0.0
        self.scheduler = Scheduler(self.chance, switch_odds=self.knobs.switch_odds, tick_s=self.knobs.tick_s)
        self.network = SimNetwork(self, self.chance)
        self.auditor = Auditor(self)
        self.storage = Storage(self, self.knobs, self.chance)
        self.nemesis = Nemesis(self, self.chance)
        self.note(None, f"knobs {self.knobs}")

    # Machines and processes

    def new_machine(self) -> Machine:
        number = len(self.machines) + 1
        self.machines.append(Machine(number, self.root / f"m{number}"))
        return self.machines[-1]

    def machine_at(self, address: str) -> Machine:
        return next(machine for machine in self.machines if machine.address == address)

    def lose(self, node: int) -> None:
        """A machine is gone with everything on it, and an empty one comes in its place."""
        lost = self.nodes[node]
        lost.is_lost = True
        self.note(None, "machine is lost", {"node": node, "machine": lost.number})
        for process in list(self._processes.values()):
            if process.machine is lost and process.kind != "launcher" and process.is_alive:
                process.kill("with its machine")
        self.nodes[node] = self.new_machine()

    def process(self, kind: str, name: str, *, machine: Machine | None = None) -> Process:
        pid = 1000 + len(self._processes)
        process = self._processes[pid] = Process(self, kind, name, pid, machine or self.nodes[0])
        self._fence_of[os.fstat(process.death_receive).st_ino] = process
        return process

    def process_of(self, pidfd: int) -> Process:
        return self._fence_of[os.fstat(pidfd).st_ino]

    def living(self, kind: str | None = None) -> list[Process]:
        """Return the processes that live, the launchers left out unless asked for."""
        return [
            p
            for p in self._processes.values()
            if p.is_alive and p.fibers and (p.kind == kind or (kind is None and p.kind != "launcher"))
        ]

    def start_agent(self, folder: Path, *, run: str, idle_s: float, machine: Machine) -> SimAgent:
        """Do what `python -m moc.agent` does."""
        where = f"@{machine.number}" if len(self.nodes) > 1 else ""
        process = self.process("agent", f"agent{len(self.agents) + 1}{where}", machine=machine)
        agent = SimAgent(process, folder, run)
        process.on_end.append(agent.note_started)

        def main() -> None:
            agent.server = Agent(folder, run=run, idle_s=idle_s, host=process.host, trace=process.trace)
            process.selectors.append(agent.server._selector)  # has the listening socket, which must not outlive it
            if agent.server.listen():
                agent.note_started()
                agent.server.serve()

        self.agents.append(agent)
        process.start(main)
        return agent

    def agent_at(self, run: str, machine: Machine) -> Process | None:
        """Return the agent of a run that listens on a machine, None if there is none."""
        rows = [a for a in self.agents if a.run == run and a.process.machine is machine]
        found = [a for a in rows if a.process.is_alive and a.has_ended_start]
        return found[-1].process if found else None

    def server_of(self, process: Process) -> Agent:
        server = next(a.server for a in self.agents if a.process is process)
        assert server is not None
        return server

    @property
    def is_calm(self) -> bool:
        return self.is_healed and self.scheduler.now_s > self._healed_s + CALM_S

    # The run

    def note(self, process: Process | None, what: str, fields: Mapping[str, object] | None = None) -> None:
        """Write one line of the log."""
        now_s = self.scheduler.now_s
        name = "-" if process is None else process.name
        line = f"{now_s:.4f} {name} {what} {fields or ''}".replace(str(self.root), "ROOT")
        self._digest.update(line.encode())
        self._log.append(line)

    def run(self) -> Report:
        """Run to the end. Never raises for what goes wrong inside: it is a violation."""
        handler = _LogLines(self)
        logger = logging.getLogger("moc")
        level, propagates = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            self.jobs.append(Job(self, "job", is_guest=False))
            if self.knobs.is_raced:
                self.jobs.append(Job(self, "rival", is_guest=True))
            self.scheduler.call_at(self.scheduler.now_s + self.knobs.chaos_s, self._heal)
            self.scheduler.run(self._is_over, turn_limit=TURN_LIMIT, until_s=TIME_LIMIT_S)
            if not self._problems():
                self.auditor.judge_end()
        except StuckError as error:
            self.auditor.fail("liveness", str(error).replace(str(self.root), "ROOT"))
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagates
            self._clear()
        return Report(
            seed=self.seed,
            digest=self._digest.hexdigest(),
            violations=tuple(self._problems()),
            counts=dict(sorted(self.auditor.counts.items())),
            turns=self.scheduler.turns,
            virtual_s=self.scheduler.now_s,
            log=tuple(self._log),
        )

    def _heal(self) -> None:
        if self.is_healed:
            return
        self.is_healed, self._healed_s = True, self.scheduler.now_s
        self.note(None, "nothing fails any more")
        self.nemesis.sleep()
        for job in self.jobs:
            job.wake()

    def _is_over(self) -> bool:
        if self.auditor.violations or self.scheduler.defects:
            return True
        if not self.is_healed and self.scheduler.turns > self.knobs.chaos_turns:
            self._heal()
        return self.is_healed and all(job.is_done for job in self.jobs) and not self.living()

    def _problems(self) -> list[str]:
        return self.auditor.violations + self.scheduler.defects

    def _clear(self) -> None:
        for process in self._processes.values():
            process.bury()
        shutil.rmtree(self.root)


class _LogLines(logging.Handler):
    """What moc logs is part of the simulation's log."""

    def __init__(self, sim: Simulation) -> None:
        super().__init__()
        self._sim = sim

    def emit(self, record: logging.LogRecord) -> None:
        self._sim.note(None, f"{record.name}: {record.getMessage()}")
        if record.exc_info:
            self._sim.auditor.fail("defect", logging.Formatter().formatException(record.exc_info))


def simulate(seed: int, *, is_partial: bool = False, has_nodes: bool = False, keep_log: bool = False) -> Report:
    """Run one seed, in mode full or partial, on one node or several, and leave no descriptor behind."""
    before = set(os.listdir("/proc/self/fd"))
    gc.disable()  # nothing may be closed by a collection that comes at a time of its own
    gc.freeze()  # what was there before is no garbage of this seed, and takes long to look through
    try:
        report = Simulation(seed, is_partial=is_partial, has_nodes=has_nodes, keep_log=keep_log).run()
    finally:
        gc.collect()
        gc.unfreeze()
        gc.enable()
    for descriptor in sorted(set(os.listdir("/proc/self/fd")) - before, key=int):
        try:
            os.close(int(descriptor))
        except OSError:
            continue  # that of the listing itself
    return report
