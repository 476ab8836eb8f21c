"""asyncio over the scheduler: one event loop is one fiber, its clock is the simulation's, its executor other fibers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from tests.sim.scheduler import Fiber

if TYPE_CHECKING:
    from tests.sim.process import Process

__all__ = ["Pending", "SimLoop", "fulfil"]


class SimLoop(asyncio.BaseEventLoop):
    """The event loop of one process; runs on the fiber that calls `run_until_complete`."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process, self._waiters, self._is_notified = process, list[Fiber](), False
        self._selector = self  # BaseEventLoop asks it for what is ready, and how long to wait for it
        self._begun: list[asyncio.Task[Any]] = []
        self._waiting: list[Coroutine[Any, Any, Any]] = []
        self.set_exception_handler(self._note_defect)

    def time(self) -> float:
        return self._process.sim.scheduler.now_s

    def select(self, timeout: float | None) -> list[object]:
        """Wait until there is something to do: another thread says so, or a timer is due."""
        self._process.enter()
        if not self._is_notified and timeout != 0:
            scheduler = self._process.sim.scheduler
            self._waiters.append(scheduler.current)
            scheduler.wait(timeout_s=timeout)
        self._is_notified = False
        return []

    def _process_events(self, event_list: list[object]) -> None:
        """There are none: messages come by `call_soon_threadsafe`."""

    def _write_to_self(self) -> None:
        self._is_notified = True
        self._process.sim.scheduler.wake(self._waiters)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = super().create_task(coro, **options)
        self._begun = [other for other in self._begun if not other.done()]
        self._begun.append(task)
        return task

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        done = self.create_future()

        def work() -> None:
            try:
                found = func(*args)
            except Exception as error:  # noqa: BLE001  # raised where the result is awaited, as a pool does
                self.call_soon_threadsafe(_fail, done, error)
            else:
                self.call_soon_threadsafe(fulfil, done, found)

        self._process.sim.scheduler.spawn(self._process, work, "executor")
        return done

    def submit(self, work: Coroutine[Any, Any, Any]) -> Pending:
        """Run a coroutine on the loop. Thread: any."""
        pending = Pending(self._process)

        def begin() -> None:
            self._waiting.remove(work)
            self.create_task(work).add_done_callback(pending.note)

        self._waiting.append(work)
        self.call_soon_threadsafe(begin)
        return pending

    def abandon(self) -> None:
        """End what is under way without another turn, if none is under way: the process is dead, or has ended."""
        if self.is_running():
            return
        for work in self._waiting:
            work.close()
        self._waiting.clear()
        tasks, self._begun = self._begun, []
        for task in tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                task.get_coro().close()
        self.close()

    def _note_defect(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self._process.is_dead:
            error = context.get("exception")
            words = f"{type(error).__name__}: {error}" if error is not None else ""
            self._process.sim.auditor.fail("defect", f"{self._process.name}: {context['message']} {words}")


class Pending:
    """The result of a coroutine, for the other threads of its process: `moc.network.port.Pending`."""

    def __init__(self, process: Process) -> None:
        self._process, self._waiters = process, list[Fiber]()
        self._task: asyncio.Task[Any] | None = None

    def note(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._process.sim.scheduler.wake(self._waiters)

    def result(self, timeout: float | None = None, /) -> Any:
        self._process.enter()
        if self._task is None:
            scheduler = self._process.sim.scheduler
            self._waiters.append(scheduler.current)
            scheduler.wait(timeout_s=timeout)
        if self._task is None:
            raise TimeoutError
        return self._task.result()


def fulfil(future: asyncio.Future[Any], found: object) -> None:
    """Give a future its result, if nobody has given it up."""
    if not future.done():
        future.set_result(found)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
