"""One rank's snapshots: claim slots, capture what will change, copy the rest behind the next forward and backward,
seal.

Claiming never waits: without a free record and slots, or after any error, this snapshot is skipped and counted. The
copy runs in one thread; `wait_copied` is called before the next weight update and is the only place where training
waits for a snapshot.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from moc._native import crc32c
from moc.errors import ClosedError, MocError, UsageError
from moc.format.object import ALIGNMENT, align
from moc.format.tagged import encode_state
from moc.host import Event, Host
from moc.plan.freeing import attempt_ordinal
from moc.snapshot.arena import Arena, CorruptSeal
from moc.snapshot.seal import EXPLICIT, SealRecord
from moc.trace import Trace
from moc.training import TrainingState

__all__ = ["Begun", "SnapshotCounters", "Snapshotter"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotCounters:
    """What happened to the snapshots of this life; times in milliseconds."""

    sealed: int
    skipped: int
    failed: int
    stall_ms_last: float
    stall_ms_total: float
    capture_ms_last: float
    copy_ms_last: float
    last_problem: str | None


@dataclass(slots=True, kw_only=True)
class _Filling:
    """A snapshot between claim and seal.

    `copied` ends the stall, `finished` says that its record is published or given up.
    """

    step: int
    record_index: int
    flags: int
    attempt: str
    slots: array[int]
    state_bytes: int
    state_crc32c: int
    copied: Event
    finished: Event


class Begun(Enum):
    """What became of the beginning of a snapshot."""

    STARTED = "started"
    NO_SLOT = "no slot"
    FAILED = "failed"


class Snapshotter:
    """Takes the snapshots of one rank in one life. Thread: the training thread, but for its own copy thread."""

    def __init__(
        self,
        state: TrainingState,
        arena: Arena,
        *,
        rank: int,
        run: str,
        incarnation: int,
        digest: str,
        on_sealed: Callable[[int], None],
        host: Host,
        trace: Trace,
    ) -> None:
        """`on_sealed(step)` rings the agent's bell; thread: copy thread; must not block."""
        self._state, self._arena, self._rank = state, arena, rank
        self._run, self._incarnation, self._digest = run, incarnation, digest
        self._on_sealed, self._host, self._trace = on_sealed, host, trace
        self._lengths = array("Q", (shard.size_bytes for shard in arena.catalog(rank).shards))
        self._slots_of_record = {i: record.slots for i, record in arena.seals(rank).items()}
        self._targets_of_slots: dict[bytes, array[int]] = {}
        self._filling: _Filling | None = None
        self._work = host.semaphore()
        self._closing = False
        self._sealed = self._skipped = self._failed = 0
        self._stall_last = self._stall_total = self._capture_last = self._copy_last = 0.0
        self._problem: str | None = None
        self._thread = host.spawn(self._copy_loop, name="moc-copy")

    def begin(self, step: int, *, flags: int, attempt: str) -> Begun:
        """Start the snapshot of the present state. Never raises. Blocks: for the capture of small state only."""
        began_s = self._host.now_s()
        try:
            with self._trace.span("snapshot.capture", step=step, rank=self._rank):
                filling = self._claim(step, flags=flags, attempt=attempt)
                if filling is None:
                    if not flags & EXPLICIT:  # who waits for this save tries again, and counts nothing
                        self._skip(step, "no free slots: the previous snapshots are still needed")
                    self._tell_skip(step, flags=flags, attempt=attempt)
                    return Begun.NO_SLOT
                self._capture(filling)
        except Exception as error:  # noqa: BLE001  # a failed save never stops training: counted, reported, skipped
            self._skip(step, f"{type(error).__name__}: {error}")
            self._tell_skip(step, flags=flags, attempt=attempt)
            return Begun.FAILED
        self._filling = filling
        self._work.release()
        self._capture_last = 1e3 * (self._host.now_s() - began_s)
        return Begun.STARTED

    def wait_copied(self) -> float:
        """Wait until nothing reads the training state any more.

        Return the milliseconds waited. Call before the weight update.
        """
        filling = self._filling
        if filling is None or filling.copied.is_set():
            self._stall_last = 0.0
            return 0.0
        began_s = self._host.now_s()
        with self._trace.span("snapshot.stall", step=filling.step, rank=self._rank):
            filling.copied.wait()
        self._stall_last = 1e3 * (self._host.now_s() - began_s)
        self._stall_total += self._stall_last
        return self._stall_last

    def wait_finished(self, timeout_s: float) -> bool:
        """Wait until the snapshot under way is sealed or given up; return whether that happened in time."""
        return self._filling is None or self._filling.finished.wait(timeout_s)

    @property
    def counters(self) -> SnapshotCounters:
        return SnapshotCounters(
            sealed=self._sealed,
            skipped=self._skipped,
            failed=self._failed,
            stall_ms_last=self._stall_last,
            stall_ms_total=self._stall_total,
            capture_ms_last=self._capture_last,
            copy_ms_last=self._copy_last,
            last_problem=self._problem,
        )

    def close(self) -> None:
        """Finish the snapshot under way and stop the thread; the arena is not closed. Blocks: for one copy."""
        self._closing = True
        self._work.release()
        self._thread.join()

    # Claim and capture: training thread

    def _claim(self, step: int, *, flags: int, attempt: str) -> _Filling | None:
        if self._closing:  # by a life that was to be followed by another, which could not begin: nobody would copy
            raise ClosedError("no snapshots are taken any more: a new life could not begin")
        if self._filling is not None and not self._filling.finished.is_set():
            return None
        layout = self._arena.rank_layout(self._rank)
        held = [index for index in range(layout.versions) if not self._arena.is_free(self._rank, index)]
        unheld = [index for index in range(layout.versions) if index not in held]
        if not unheld:
            return None
        used = [self._known_slots(index) for index in held]
        slots = array("I")
        for unit in range(len(layout.units)):
            taken = {known[unit] for known in used}
            free = [version for version in range(layout.versions) if version not in taken]
            if not free:
                return None
            slots.append(free[0])
        return _Filling(
            step=step,
            record_index=unheld[0],
            flags=flags,
            attempt=attempt,
            slots=slots,
            state_bytes=0,
            state_crc32c=0,
            copied=self._host.event(),
            finished=self._host.event(),
        )

    def _known_slots(self, index: int) -> array[int]:
        known = self._slots_of_record.get(index)
        if known is None:
            record = self._arena.read_seal(self._rank, index)
            if record is None or isinstance(record, CorruptSeal):
                # Its slots are unknown: until the agent frees it nothing may be written anywhere.
                raise UsageError(f"a seal record is corrupt: rank={self._rank} record={index}")
            known = self._slots_of_record[index] = record.slots
        return known

    def _capture(self, filling: _Filling) -> None:
        encoded = encode_state(self._state.capture())
        capacity = self._arena.catalog(self._rank).state_capacity_bytes
        if encoded.size_bytes > capacity:
            raise UsageError(f"state grew beyond its slot: bytes={encoded.size_bytes} allowed={capacity}")
        offset = self._arena.state_offset(self._rank, filling.slots)
        view = self._arena.view(offset, align(encoded.size_bytes))
        encoded.write_into(view)
        # What an object stores beyond the blob must be zero, not the tail of an earlier, longer one.
        view[encoded.size_bytes :] = _ZEROS[: view.nbytes - encoded.size_bytes]
        filling.state_bytes = encoded.size_bytes
        filling.state_crc32c = crc32c(view[: encoded.size_bytes])
        view.release()

    def _skip(self, step: int, problem: str) -> None:
        self._skipped += 1
        if problem != self._problem:
            log.warning("snapshot skipped: step=%d rank=%d problem=%s", step, self._rank, problem)
        self._problem = problem

    def _tell_skip(self, step: int, *, flags: int, attempt: str) -> None:
        """Let the agent free what other ranks hold of this step.

        Not while an earlier one is under way, and not for a save that tries again.
        """
        is_idle = self._filling is None or self._filling.finished.is_set()
        if is_idle and not flags & EXPLICIT:
            self._arena.note_skip(self._rank, step, attempt_ordinal(attempt))

    # Copy and seal: copy thread

    def _copy_loop(self) -> None:
        while True:
            self._work.acquire()
            filling = self._filling
            if filling is not None and not filling.finished.is_set():
                self._copy(filling)
            if self._closing:
                return

    def _copy(self, filling: _Filling) -> None:
        began_s = self._host.now_s()
        try:
            crcs = array("I", bytes(4 * len(self._lengths)))
            with self._trace.span("snapshot.copy", step=filling.step, rank=self._rank):
                self._state.copy_shards(self._targets(filling.slots), crcs)
            filling.copied.set()
            self._copy_last = 1e3 * (self._host.now_s() - began_s)
            with self._trace.span("snapshot.seal", step=filling.step, rank=self._rank):
                self._seal(filling, crcs)
            self._sealed += 1
            self._on_sealed(filling.step)
        except Exception as error:  # the thread's top: recorded and counted, the step stays unsealed
            self._failed += 1
            self._problem = f"{type(error).__name__}: {error}"
            is_defect = not isinstance(error, MocError)
            log.warning(
                "snapshot failed: step=%d rank=%d %s", filling.step, self._rank, self._problem, exc_info=is_defect
            )
        finally:
            filling.copied.set()
            filling.finished.set()

    def _targets(self, slots: array[int]) -> array[int]:
        key = slots.tobytes()
        targets = self._targets_of_slots.get(key)
        if targets is None:
            base = self._arena.address
            targets = array("Q", (base + offset for offset in self._arena.shard_offsets(self._rank, slots)))
            if len(self._targets_of_slots) >= _TARGETS_LIMIT:
                self._targets_of_slots.clear()
            self._targets_of_slots[key] = targets
        return targets

    def _seal(self, filling: _Filling, crcs: array[int]) -> None:
        record = SealRecord(
            run=self._run,
            incarnation=self._incarnation,
            step=filling.step,
            rank=self._rank,
            flags=filling.flags,
            attempt=filling.attempt,
            digest=self._digest,
            state_bytes=filling.state_bytes,
            state_crc32c=filling.state_crc32c,
            slots=filling.slots,
            steps=array("Q", [filling.step]) * len(filling.slots),
            crcs=crcs,
        )
        self._slots_of_record[filling.record_index] = filling.slots
        self._arena.seal(filling.record_index, record)


_ZEROS = memoryview(bytes(ALIGNMENT))
_TARGETS_LIMIT = 64  # address lists kept; in full mode one per version
