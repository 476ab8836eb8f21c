"""A simulated process: its threads, what it holds of the kernel, and its `Host`.

Sockets, locks, pipes and arenas are real; a pidfd is a pipe that becomes readable at the end of the process. A killed
process does nothing any more: each of its threads ends where it is, and what the kernel would close is closed.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from moc.host import SystemHost
from moc.network.port import Serve
from moc.store.port import Store
from moc.trace import Trace
from tests.sim.machine import Machine
from tests.sim.place import Place, SimCall
from tests.sim.scheduler import Fiber, Killed, Scheduler

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

__all__ = ["Process", "SimHost"]

KERNEL = SystemHost()  # for what the simulation leaves to it

T = TypeVar("T")
R = TypeVar("R")


class Process:
    """One simulated process; `kind` is "trainer", "agent", "cli" or "launcher"."""

    def __init__(self, sim: Simulation, kind: str, name: str, pid: int, machine: Machine) -> None:
        self.sim, self.kind, self.name, self.pid, self.machine = sim, kind, name, pid, machine
        self.begun_s = sim.scheduler.now_s
        self.fibers: list[Fiber] = []
        self.is_dead = self.is_stopped = False
        self.stopped_s = float("-inf")  # when it was stopped last
        self.sockets: list[socket.socket] = []
        self.selectors: list[selectors.BaseSelector] = []
        self.locks: list[IO[bytes]] = []
        self.on_end: list[Callable[[], None]] = []
        self.death_receive, self._death_send = os.pipe()
        self.host = SimHost(self)
        self.trace = Trace(self._sink)

    @property
    def is_alive(self) -> bool:
        return not self.is_dead

    def start(self, main: Callable[[], None]) -> None:
        self.main = self.sim.scheduler.spawn(self, main, "main")

    def stop(self) -> None:
        """SIGSTOP."""
        self.is_stopped, self.stopped_s = True, self.sim.scheduler.now_s
        self.sim.note(self, "stopped")

    def proceed(self) -> None:
        """SIGCONT."""
        if self.is_stopped:
            self.is_stopped, self.stopped_s = False, self.sim.scheduler.now_s
            self.sim.note(self, "continued")

    def kill(self, reason: str) -> None:
        """SIGKILL. Raises Killed where a process kills itself."""
        if self.is_dead:
            return
        self.sim.note(self, f"killed: {reason}")
        self._end()
        if self.fibers:  # the one that runs
            raise Killed

    def note_end(self, fiber: Fiber) -> None:
        """A thread has ended; with the main one the process ends."""
        self.fibers.remove(fiber)
        if fiber is self.main and not self.is_dead:
            self.sim.note(self, "ended")
            self._end()

    def enter(self) -> None:
        """Every call of the operating system begins here: nothing after the end, and others may go first."""
        if self.is_dead:
            raise Killed
        self.sim.scheduler.pause()

    def _end(self) -> None:
        self.is_dead, self.is_stopped = True, False
        scheduler = self.sim.scheduler
        for fiber in list(self.fibers):
            if not scheduler.is_running(fiber):
                scheduler.throw(fiber)
        for selector in self.selectors:
            for key in list((selector.get_map() or {}).values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            selector.close()
        for held in (*self.sockets, *self.locks):
            held.close()
        os.write(self._death_send, b"x")  # whoever holds a duplicate sees it
        os.close(self._death_send)
        os.close(self.death_receive)
        for act in self.on_end:
            act()
        self.sim.network.note_end(self)

    def bury(self) -> None:
        """End what is left when the simulation is over."""
        if not self.is_dead:
            self._end()

    def _sink(self, event: str, span: str, fields: dict[str, object]) -> None:
        """Spans are where a nemesis strikes."""
        if self.is_dead:
            raise Killed
        self.sim.note(self, f"{span} {event}", fields)
        self.sim.auditor.note_span(self, event, span)
        self.sim.nemesis.at_span(self, event, span)
        self.sim.scheduler.pause()


class _Event:
    """What `Host.event` returns."""

    __slots__ = ("_is_set", "_process", "_waiters")

    def __init__(self, process: Process) -> None:
        self._process, self._is_set = process, False
        self._waiters: list[Fiber] = []

    def set(self) -> None:
        self._is_set = True
        self._process.sim.scheduler.wake(self._waiters)

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        self._process.enter()
        if not self._is_set:
            scheduler = self._process.sim.scheduler
            self._waiters.append(scheduler.current)
            scheduler.wait(timeout_s=timeout)
        return self._is_set


class _Semaphore:
    """What `Host.semaphore` returns."""

    __slots__ = ("_permits", "_process", "_waiters")

    def __init__(self, process: Process) -> None:
        self._process, self._permits = process, 0
        self._waiters: list[Fiber] = []

    def release(self) -> None:
        self._permits += 1
        self._process.sim.scheduler.wake(self._waiters)

    def acquire(self) -> bool:
        self._process.enter()
        while not self._permits:
            scheduler = self._process.sim.scheduler
            self._waiters.append(scheduler.current)
            scheduler.wait()
        self._permits -= 1
        return True


class SimHost:
    """`moc.host.Host` of one simulated process."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def _scheduler(self) -> Scheduler:
        return self._process.sim.scheduler

    def now_s(self) -> float:
        return self._scheduler.now_s

    def sleep(self, seconds: float) -> None:
        self._process.enter()
        self._scheduler.wait(timeout_s=seconds)

    @property
    def pid(self) -> int:
        return self._process.pid

    def token(self) -> str:
        return f"{self._process.sim.chance.getrandbits(32):08x}"

    def spawn(self, target: Callable[[], None], *, name: str) -> Fiber:
        self._process.enter()
        return self._scheduler.spawn(self._process, target, name)

    def event(self) -> _Event:
        return _Event(self._process)

    def semaphore(self) -> _Semaphore:
        return _Semaphore(self._process)

    def map(self, act: Callable[[T], R], items: Iterable[T], *, workers: int, name: str) -> list[R]:
        todo = list(enumerate(items))
        done: dict[int, R] = {}
        failed: dict[int, Exception] = {}

        def work() -> None:
            while todo and not failed:
                index, item = todo.pop(0)
                try:
                    done[index] = act(item)
                except Exception as error:  # noqa: BLE001  # raised below, as a pool does
                    failed[index] = error

        for fiber in [self.spawn(work, name=name) for _ in range(min(workers, len(todo)))]:
            fiber.join()
        if failed:
            first = failed[min(failed)]
            failed.clear()  # what an error's traceback refers to ends with it
            raise first
        return [done[index] for index in sorted(done)]

    def wait_readable(self, handle: socket.socket | int, timeout_s: float | None) -> bool:
        self._process.enter()
        return self._scheduler.wait(timeout_s=timeout_s, handle=handle if isinstance(handle, int) else handle.fileno())

    def select(self, selector: selectors.BaseSelector, timeout_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        self._process.enter()
        if selector not in self._process.selectors:
            self._process.selectors.append(selector)
        ready = selector.select(0)
        if not ready:
            self._scheduler.wait(timeout_s=timeout_s, handle=selector.fileno())
            ready = selector.select(0)
        return ready

    def pidfd(self) -> int:
        self._process.enter()
        return os.dup(self._process.death_receive)

    def kill(self, pidfd: int) -> None:
        self._process.enter()
        victim = self._process.sim.process_of(pidfd)
        if victim.is_dead:
            raise ProcessLookupError
        self._process.sim.auditor.note_fenced(victim, by=self._process)
        victim.kill(f"by {self._process.name}")

    def start_agent(self, folder: Path, *, run: str, idle_s: float, log: Path, timeout_s: float) -> None:
        self._process.enter()
        agent = self._process.sim.start_agent(folder, run=run, idle_s=idle_s, machine=self._process.machine)
        if not agent.wait_ready(timeout_s):
            raise TimeoutError(f"not started in time: timeout_s={timeout_s}")

    def connect(self, path: str, timeout_s: float) -> socket.socket:
        self._process.enter()
        sock = KERNEL.connect(path, timeout_s)
        self._process.sockets = [held for held in self._process.sockets if held.fileno() >= 0]
        self._process.sockets.append(sock)
        return sock

    def lock(self, path: Path) -> IO[bytes] | None:
        self._process.enter()
        file = KERNEL.lock(path)
        if file is not None:
            self._process.locks.append(file)
        return file

    def open_store(self, url: str, *, trace: Trace) -> Store:
        self._process.enter()
        return self._process.sim.storage.open(self._process, url, trace)

    def listen(self, serve: Serve, *, address: str, port: int) -> Place:
        self._process.enter()
        return Place(self._process.sim.network, self._process, serve, address=address, port=port)

    def dial(self, url: str, *, stall_s: float, judge: Callable[[], None]) -> SimCall:
        return SimCall(self._process.sim.network, self._process, url, stall_s=stall_s, judge=judge)
