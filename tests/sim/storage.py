"""The repository's storage: one memory shared by all processes, seen by each through a store that is slow and fails.

Faults, by operation: an error before anything happened; an error although it has happened; an error, or the death of
the caller, while the operation is under way, which then takes effect later; no answer at all for a while. Every change
is shown to the auditor at the moment when a reader could see it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from moc.errors import FencedError, MocError, StoreDeniedError, StoreUnavailableError
from moc.store.memory import MemoryStore
from moc.store.port import Entry, Segment, Store, StoreProperties
from moc.store.retry import RetryingStore
from moc.trace import Trace
from tests.sim.facts import Knowledge
from tests.sim.knobs import Knobs
from tests.sim.scheduler import Killed

if TYPE_CHECKING:
    from tests.sim.process import Process
    from tests.sim.simulation import Simulation

__all__ = ["SimStore", "Storage"]

T = TypeVar("T")


class Storage:
    """What is stored, whether it answers, and how often it fails."""

    def __init__(self, sim: Simulation, knobs: Knobs, chance: random.Random) -> None:
        self.sim, self.knobs, self.chance = sim, knobs, chance
        self.memory = MemoryStore(name="sim")
        self.is_down = False
        self.are_faults_on = True

    def open(self, process: Process, url: str, trace: Trace) -> Store:
        store = SimStore(self, process, url)
        if not self.knobs.is_remote:
            return store
        return RetryingStore(store, process.host, chance=self.chance, trace=trace)

    def put(self, key: str, content: bytes, *, create_only: bool, by: Process, knowledge: Knowledge) -> None:
        self.sim.note(by, "store.put lands", {"key": key, "bytes": len(content)})
        self.memory.put(key, [memoryview(content)], create_only=create_only)
        self.sim.auditor.note_put(key, content, by=by, knowledge=knowledge)

    def delete(self, key: str, *, by: Process, knowledge: Knowledge) -> None:
        self.sim.note(by, "store.delete lands", {"key": key})
        self.sim.auditor.note_delete(key, by=by, knowledge=knowledge)
        self.memory.delete(key)

    def content(self) -> dict[str, bytes]:
        """Return everything that is stored."""
        return {e.key: self.memory.read(e.key, limit_bytes=1 << 30) for e in self.memory.list("")}


class SimStore:
    """`moc.store.port.Store` of one process."""

    def __init__(self, storage: Storage, process: Process, url: str) -> None:
        self._storage, self._process = storage, process
        self.properties = StoreProperties(url=url, create_only=True, is_local=not storage.knobs.is_remote)

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        content = b"".join(segments)
        storage, process = self._storage, self._process
        knowledge = storage.sim.auditor.knowledge(process)

        def land() -> None:
            storage.put(key, content, create_only=create_only, by=process, knowledge=knowledge)

        self._change("put", key, land)

    def delete(self, key: str) -> None:
        knowledge = self._storage.sim.auditor.knowledge(self._process)
        self._change("delete", key, lambda: self._storage.delete(key, by=self._process, knowledge=knowledge))

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        return self._look("read", lambda: self._storage.memory.read(key, limit_bytes=limit_bytes))

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        self._look("read", lambda: self._storage.memory.read_into(key, offset, view))

    def size_bytes(self, key: str) -> int:
        return self._look("stat", lambda: self._storage.memory.size_bytes(key))

    def list(self, prefix: str) -> list[Entry]:
        def look() -> list[Entry]:
            entries = self._storage.memory.list(prefix)
            self._storage.sim.auditor.note_list(prefix, [entry.key for entry in entries], by=self._process)
            return entries

        return self._look("list", look)

    def sweep(self, *, older_than_s: float, is_dry_run: bool = False) -> int:
        return self._look("sweep", lambda: self._storage.memory.sweep(older_than_s=older_than_s, is_dry_run=is_dry_run))

    def sync(self, prefix: str) -> None:
        self._look("sync", lambda: self._storage.memory.sync(prefix))

    def free_bytes(self) -> int | None:
        return self._look("free", self._storage.memory.free_bytes)

    def close(self) -> None:
        """Nothing is held."""

    def _look(self, what: str, act: Callable[[], T]) -> T:
        self._travel(what)
        return act()

    def _change(self, what: str, key: str, land: Callable[[], None]) -> None:
        """Have a change take effect, now, later, or twice told wrongly."""
        storage, scheduler, chance = self._storage, self._storage.sim.scheduler, self._storage.chance
        commits = storage.sim.auditor.counts.get("committed", 0)
        try:
            self._travel(what)
        except Killed:
            # The request is on its way although nobody waits for the answer any more.
            if storage.are_faults_on and chance.random() < storage.knobs.late_odds:
                scheduler.call_at(
                    scheduler.now_s + chance.random() * storage.knobs.late_s,
                    lambda: self._land_late(key, commits, land),
                )
            raise
        fault = chance.random() if storage.are_faults_on else 1.0
        if fault < storage.knobs.late_odds / 8:
            scheduler.call_at(
                scheduler.now_s + chance.random() * storage.knobs.late_s, lambda: self._land_late(key, commits, land)
            )
            raise StoreUnavailableError(f"simulated: no answer in time, it lands later: op={what}")
        land()
        if fault < storage.knobs.lost_answer_odds:
            raise StoreUnavailableError(f"simulated: the answer was lost: op={what}")

    def _land_late(self, key: str, commits: int, land: Callable[[], None]) -> None:
        """Let a request take effect that nobody waits for, unless it is too old for that (docs/format.md, A6)."""
        if self._storage.sim.auditor.is_past(key, commits):
            return
        try:
            land()
        except FencedError:
            return

    def _travel(self, what: str) -> None:
        """Take the time of one operation, and perhaps fail before anything has happened."""
        storage, process = self._storage, self._process
        process.host.sleep(storage.chance.random() * storage.knobs.store_s)
        error: MocError | None = None
        if storage.is_down:
            error = StoreUnavailableError(f"simulated: storage is down: op={what}")
        elif storage.are_faults_on and storage.chance.random() < storage.knobs.error_odds:
            denied = storage.chance.random() < 0.2
            error = (StoreDeniedError if denied else StoreUnavailableError)(f"simulated: refused: op={what}")
        if error is not None:
            storage.sim.note(process, "store fails", {"reason": str(error)})
            raise error
