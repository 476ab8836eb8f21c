"""One thread at a time, chosen by a seed, under a clock that jumps when everybody waits.

A *fiber* is a simulated thread (a greenlet). It runs until it waits or pauses; then the scheduler lets one of those
that could go on go on. Descriptors that fibers wait for are real ones of the kernel.
"""

from __future__ import annotations

import heapq
import random
import select
import traceback
from asyncio import AbstractEventLoop, events
from collections.abc import Callable
from typing import TYPE_CHECKING

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from tests.sim.process import Process

__all__ = ["Fiber", "Killed", "Scheduler", "StuckError"]

START_S = 1000.0  # a clock that begins at 0 would look like one that was never read


class Killed(BaseException):
    """Raised in every thread of a killed process, wherever it is; only the scheduler catches it."""


class StuckError(Exception):
    """Nobody can go on, or the simulation has used up its switches."""


class Fiber:
    """A simulated thread; what `Host.spawn` returns."""

    __slots__ = (
        "deadline_s",
        "greenlet",
        "handle",
        "is_ended",
        "is_woken",
        "joiners",
        "loop",
        "name",
        "process",
        "scheduler",
    )

    def __init__(self, scheduler: Scheduler, process: Process, target: Callable[[], None], name: str) -> None:
        self.scheduler, self.process, self.name = scheduler, process, name
        self.greenlet = greenlet(lambda: scheduler.run_fiber(self, target), parent=scheduler.hub)
        self.deadline_s: float | None = None
        self.handle: int | None = None
        self.is_woken, self.is_ended = True, False
        self.joiners: list[Fiber] = []
        self.loop: AbstractEventLoop | None = None  # that runs on it: asyncio knows one loop per real thread

    def join(self, timeout: float | None = None) -> None:
        if self.process.is_dead:  # whoever joins a thread is of the same process, and on its way out
            raise Killed
        if not self.is_ended:
            self.joiners.append(self.scheduler.current)
            self.scheduler.wait(timeout_s=timeout)

    def is_alive(self) -> bool:
        return not self.is_ended


class Scheduler:
    """Owns the clock and all fibers of one simulation."""

    def __init__(self, chance: random.Random, *, switch_odds: float, tick_s: float) -> None:
        """`switch_odds` is the chance that a pause lets others go first, `tick_s` the most that a turn takes."""
        self._chance, self._switch_odds, self._tick_s = chance, switch_odds, tick_s
        self.now_s = START_S
        self.hub = getcurrent()
        self._current: Fiber | None = None
        self.turns = 0
        self.defects: list[str] = []
        self._fibers: list[Fiber] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_count = 0
        self._poller = select.poll()
        self._polled: dict[int, int] = {}

    @property
    def current(self) -> Fiber:
        """The fiber that runs."""
        assert self._current is not None, "between the turns of fibers nobody waits"
        return self._current

    def is_running(self, fiber: Fiber) -> bool:
        return fiber is self._current

    # For fibers

    def spawn(self, process: Process, target: Callable[[], None], name: str) -> Fiber:
        fiber = Fiber(self, process, target, name)
        process.fibers.append(fiber)
        self._fibers.append(fiber)
        return fiber

    def pause(self) -> None:
        """Let others go first, perhaps."""
        if self._chance.random() < self._switch_odds:
            self.current.is_woken = True
            self.hub.switch()

    def wait(self, *, timeout_s: float | None = None, handle: int | None = None) -> bool:
        """Wait to be woken, or for a descriptor to become readable; return False when the time was over first."""
        fiber = self.current
        fiber.is_woken, fiber.handle = False, handle
        fiber.deadline_s = None if timeout_s is None else self.now_s + max(timeout_s, 0.0)
        if handle is not None:
            self._watch(handle)
        try:
            self.hub.switch()
        finally:
            if handle is not None:
                self._unwatch(handle)
            fiber.deadline_s = fiber.handle = None
        return fiber.is_woken

    def wake(self, fibers: list[Fiber]) -> None:
        """Let these fibers go on, and forget them."""
        for fiber in fibers:
            fiber.is_woken = True
        fibers.clear()

    def call_at(self, when_s: float, act: Callable[[], None]) -> None:
        """Call `act` at a time, between the turns of fibers; it must not wait."""
        self._timer_count += 1
        heapq.heappush(self._timers, (when_s, self._timer_count, act))

    def throw(self, fiber: Fiber) -> None:
        """Raise `Killed` in a fiber that does not run; it has ended when this returns."""
        if fiber.greenlet.gr_frame is None:  # it has never begun
            self._end(fiber)
            fiber.process.note_end(fiber)
            return
        fiber.greenlet.parent = getcurrent()
        loop = events._get_running_loop()
        events._set_running_loop(fiber.loop)
        fiber.greenlet.throw(Killed)
        events._set_running_loop(loop)

    # The loop

    def run(self, is_over: Callable[[], bool], *, turn_limit: int, until_s: float) -> None:
        """Let fibers go on until `is_over`. Raises: StuckError."""
        while not is_over():
            self.turns += 1
            if self.turns > turn_limit or self.now_s > START_S + until_s:
                raise StuckError(f"no end: turns={self.turns} now_s={self.now_s:.1f}\n{self.describe()}")
            if self._timers and self._timers[0][0] <= self.now_s:
                heapq.heappop(self._timers)[2]()
                continue
            ready = self._ready()
            if not ready:
                self._jump()
                continue
            self._current = ready[self._chance.randrange(len(ready))] if len(ready) > 1 else ready[0]
            self._go_on(self._current)
            self._current = None
            self.now_s += self._chance.random() * self._tick_s

    def run_fiber(self, fiber: Fiber, target: Callable[[], None]) -> None:
        try:
            target()
        except Killed:
            pass
        except Exception:  # noqa: BLE001  # the top of a thread: told as a violation
            self.defects.append(f"thread {fiber.process.name}/{fiber.name} ended with\n{traceback.format_exc()}")
        self._end(fiber)
        fiber.process.note_end(fiber)

    def _go_on(self, fiber: Fiber) -> None:
        events._set_running_loop(fiber.loop)
        fiber.greenlet.switch()
        fiber.loop = events._get_running_loop()
        events._set_running_loop(None)

    def describe(self) -> str:
        """Return where every fiber is, for a simulation that does not end."""
        rows = []
        for fiber in self._fibers:
            frame = fiber.greenlet.gr_frame
            where = "".join(traceback.format_stack(frame, limit=8)) if frame is not None else "not begun\n"
            stopped = " stopped" if fiber.process.is_stopped else ""
            rows.append(f"{fiber.process.name}/{fiber.name}{stopped} until={fiber.deadline_s}\n{where}")
        return "".join(rows)

    def _end(self, fiber: Fiber) -> None:
        fiber.is_ended = True
        self._fibers.remove(fiber)
        self.wake(fiber.joiners)

    def _ready(self) -> list[Fiber]:
        readable = {handle for handle, _ in self._poller.poll(0)} if self._polled else ()
        now_s, found = self.now_s, []
        for fiber in self._fibers:
            if fiber.process.is_stopped:
                continue
            if fiber.handle is not None and fiber.handle in readable:
                fiber.is_woken = True
            if fiber.is_woken or (fiber.deadline_s is not None and fiber.deadline_s <= now_s):
                found.append(fiber)
        return found

    def _jump(self) -> None:
        """Move the clock to when the next one goes on by itself."""
        times = [f.deadline_s for f in self._fibers if f.deadline_s is not None and not f.process.is_stopped]
        times += [self._timers[0][0]] if self._timers else []
        if not times:
            raise StuckError(f"everybody waits for ever: now_s={self.now_s:.1f}\n{self.describe()}")
        self.now_s = max(self.now_s, min(times))

    def _watch(self, handle: int) -> None:
        self._polled[handle] = self._polled.get(handle, 0) + 1
        self._poller.register(handle, select.POLLIN)

    def _unwatch(self, handle: int) -> None:
        self._polled[handle] -= 1
        if not self._polled[handle]:
            del self._polled[handle]
            self._poller.unregister(handle)
