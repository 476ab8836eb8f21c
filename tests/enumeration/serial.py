"""A host with one thread, so that operation n is the same one in every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from moc.host import Semaphore, SystemHost, Task
from moc.store.port import Store
from moc.trace import Trace

__all__ = ["SerialHost"]

T = TypeVar("T")
R = TypeVar("R")


class SerialHost(SystemHost):
    """One thread, and a store of the test's own. The persist thread runs while somebody calls `work`."""

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store, self._permits = open_store, 0
        self.work: Callable[[], None] = lambda: None

    def open_store(self, url: str, *, trace: Trace) -> Store:
        return self._open_store()

    def map(self, act: Callable[[T], R], items: Iterable[T], *, workers: int, name: str) -> list[R]:
        return [act(item) for item in items]

    def spawn(self, target: Callable[[], None], *, name: str) -> Task:
        self.work = target
        return self

    def semaphore(self) -> Semaphore:
        return self

    def release(self) -> None:
        self._permits += 1

    def acquire(self) -> bool:
        """Take a permit; without one the thread has nothing more to do for now."""
        self._permits -= 1
        if self._permits < 0:
            self._permits = 0
            return False
        return True

    def join(self, timeout: float | None = None) -> None:
        """Nothing runs by itself."""

    def is_alive(self) -> bool:
        return False
