"""An arena whose owner may give it up while other threads still read it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moc.errors import ClosedError
from moc.snapshot.arena import Arena

__all__ = ["SharedArena"]


class SharedArena:
    """Closes the arena once its owner has given it up and nobody uses it any more. Thread: any."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._lock = threading.Lock()
        self._users = 1  # its owner

    @contextmanager
    def use(self) -> Iterator[Arena]:
        """Keep it open while the block lasts. Raises: ClosedError if it was given up before."""
        with self._lock:
            if not self._users:
                raise ClosedError("the arena was given up")
            self._users += 1
        try:
            yield self.arena
        finally:
            self._leave()

    def retire(self) -> None:
        """Give it up. Only once."""
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            is_unused = not self._users
        if is_unused:
            self.arena.close()
