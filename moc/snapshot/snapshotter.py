"""One rank's snapshots: claim slots, capture what will change, copy the rest behind the next forward and backward,
seal.

Claiming never waits: without a free record and slots, or after any error, this snapshot is skipped and counted. The
copy runs in one thread; `wait_copied` is called before the next weight update and is the only place where training
waits for a snapshot.

A snapshot copies the dense part and the chosen experts. The others keep slot, step and checksums of the *base*, the
rank's newest sealed record of this life; without one, all are copied.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from moc._native import crc32c
from moc.errors import ClosedError, MocError, UsageError
from moc.format.object import ALIGNMENT, align
from moc.format.tagged import encode_state
from moc.host import Event, Host
from moc.plan.freeing import attempt_ordinal
from moc.plan.slots import Slots, choose_slots
from moc.plan.turns import Chosen, Turns
from moc.snapshot.arena import Arena, CorruptSeal
from moc.snapshot.places import Places
from moc.snapshot.seal import EXPLICIT, PERSIST, SealRecord
from moc.trace import Trace
from moc.training import TrainingState

__all__ = ["Begun", "Setbacks", "SnapshotCounters", "Snapshotter"]

log = logging.getLogger(__name__)

_NOTHING: Mapping[str, object] = MappingProxyType({})


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Setbacks:
    """What the other ranks must hear of, as counts: copies that failed, those of saves that nobody waits for among
    them, and snapshots that took all experts for want of a base.
    """

    failed: int = 0
    lost_saves: int = 0
    widened: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What the newest sealed record says of each unit and shard."""

    slots: Slots
    steps: npt.NDArray[np.uint64]
    crcs: array[int]


@dataclass(slots=True, kw_only=True)
class _Filling:
    """A snapshot between claim and seal: by unit its slot, its step and whether it is copied, by shard its checksum.

    `copied` ends the stall, `finished` says that its record is published or given up.
    """

    step: int
    record_index: int
    flags: int
    attempt: str
    slots: Slots
    steps: npt.NDArray[np.uint64]
    crcs: array[int]
    is_copied: Chosen
    is_base_spoilt: bool
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
        turns: Turns,
        on_sealed: Callable[[int], None],
        host: Host,
        trace: Trace,
    ) -> None:
        """`turns` says where an expert stands in a choice. `on_sealed(step)` rings the agent's bell; thread: copy
        thread; must not block.
        """
        self._state, self._arena, self._rank = state, arena, rank
        self._run, self._incarnation, self._digest = run, incarnation, digest
        self._on_sealed, self._host, self._trace = on_sealed, host, trace
        self._places = Places(arena, rank, turns)
        self._slots_of_record = {i: _slots(record) for i, record in arena.seals(rank).items()}
        self._base: _Base | None = None
        self._filling: _Filling | None = None
        self._work = host.semaphore()
        self._closing = False
        self._sealed = self._skipped = self._failed = self._lost_saves = self._widened = 0
        self._stall_last = self._stall_total = self._capture_last = self._copy_last = 0.0
        self._problem: str | None = None
        self._thread = host.spawn(self._copy_loop, name="moc-copy")

    def begin(
        self,
        step: int,
        *,
        flags: int,
        attempt: str,
        experts: Chosen | None = None,
        extra: Mapping[str, object] = _NOTHING,
    ) -> Begun:
        """Start the snapshot of the present state, with these experts (None: all of them) and `extra` in its tree.

        Never raises. Blocks: for the capture of small state only.
        """
        began_s = self._host.now_s()
        try:
            with self._trace.span("snapshot.capture", step=step, rank=self._rank):
                filling = self._claim(step, flags=flags, attempt=attempt, experts=experts)
                if filling is None:
                    if not flags & EXPLICIT:  # who waits for this save tries again, and counts nothing
                        self._skip(step, "no free slots: the previous snapshots are still needed")
                    self._tell_skip(step, flags=flags, attempt=attempt)
                    return Begun.NO_SLOT
                self._capture(filling, extra)
        except Exception as error:  # noqa: BLE001  # a failed save never stops training: counted, reported, skipped
            self._skip(step, f"{type(error).__name__}: {error}")
            self._tell_skip(step, flags=flags, attempt=attempt)
            return Begun.FAILED
        if filling.is_base_spoilt:
            self._base = None  # should this copy fail, some of its slots hold neither the old bytes nor whole new ones
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

    @property
    def setbacks(self) -> Setbacks:
        return Setbacks(failed=self._failed, lost_saves=self._lost_saves, widened=self._widened)

    def close(self) -> None:
        """Finish the snapshot under way and stop the thread; the arena is not closed. Blocks: for one copy."""
        self._closing = True
        self._work.release()
        self._thread.join()

    # Claim and capture: training thread

    def _claim(self, step: int, *, flags: int, attempt: str, experts: Chosen | None) -> _Filling | None:
        if self._closing:  # by a life that was to be followed by another, which could not begin: nobody would copy
            raise ClosedError("no snapshots are taken any more: a new life could not begin")
        if self._filling is not None and not self._filling.finished.is_set():
            return None
        versions, base = self._arena.rank_layout(self._rank).versions, self._base
        held = [index for index in range(versions) if not self._arena.is_free(self._rank, index)]
        unheld = [index for index in range(versions) if index not in held]
        if not unheld:
            return None
        wanted = self._places.units_of(experts)
        copied = wanted if base is not None else np.ones_like(wanted)
        used = [self._known_slots(index) for index in held]
        chosen = choose_slots(versions, copied, held=used, base=None if base is None else base.slots)
        if chosen is None:
            return None
        slots, overwritten = chosen
        self._widened += not np.array_equal(copied, wanted)
        steps = np.full(len(slots), step, dtype=np.uint64)
        if base is not None:
            steps[~copied] = base.steps[~copied]
        return _Filling(
            step=step,
            record_index=unheld[0],
            flags=flags,
            attempt=attempt,
            slots=slots,
            steps=steps,
            crcs=array("I", bytes(4 * self._places.shard_count)) if base is None else base.crcs[:],
            is_copied=copied,
            is_base_spoilt=bool(overwritten[1:].any()),  # the dense part, unit 0, is never taken from the base
            state_bytes=0,
            state_crc32c=0,
            copied=self._host.event(),
            finished=self._host.event(),
        )

    def _known_slots(self, index: int) -> Slots:
        known = self._slots_of_record.get(index)
        if known is None:
            record = self._arena.read_seal(self._rank, index)
            if record is None or isinstance(record, CorruptSeal):
                # Its slots are unknown: until the agent frees it nothing may be written anywhere.
                raise UsageError(f"a seal record is corrupt: rank={self._rank} record={index}")
            known = self._slots_of_record[index] = _slots(record)
        return known

    def _capture(self, filling: _Filling, extra: Mapping[str, object]) -> None:
        encoded = encode_state({**self._state.capture(), **extra})
        capacity = self._arena.catalog(self._rank).state_capacity_bytes
        if encoded.size_bytes > capacity:
            raise UsageError(f"state grew beyond its slot: bytes={encoded.size_bytes} allowed={capacity}")
        offset = self._places.state_offset(filling.slots)
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
            with self._trace.span("snapshot.copy", step=filling.step, rank=self._rank):
                targets = self._places.targets(filling.slots, filling.is_copied)
                self._state.copy_shards(targets, filling.crcs)
            filling.copied.set()
            copy_s = self._host.now_s() - began_s
            self._copy_last = 1e3 * copy_s
            if copy_s > 0:
                self._arena.note_copy(self._rank, int(self._places.bytes_of(filling.is_copied) / copy_s))
            with self._trace.span("snapshot.seal", step=filling.step, rank=self._rank):
                self._seal(filling)
            self._sealed += 1
            self._on_sealed(filling.step)
        except Exception as error:  # the thread's top: recorded and counted, the step stays unsealed
            self._failed += 1
            self._lost_saves += bool(filling.flags & PERSIST) and not filling.flags & EXPLICIT
            self._problem = f"{type(error).__name__}: {error}"
            is_defect = not isinstance(error, MocError)
            log.warning(
                "snapshot failed: step=%d rank=%d %s", filling.step, self._rank, self._problem, exc_info=is_defect
            )
        finally:
            filling.copied.set()
            filling.finished.set()

    def _seal(self, filling: _Filling) -> None:
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
            slots=array("I", filling.slots.tobytes()),
            steps=array("Q", filling.steps.tobytes()),
            crcs=filling.crcs,
        )
        self._slots_of_record[filling.record_index] = filling.slots
        self._arena.seal(filling.record_index, record)
        self._base = _Base(slots=filling.slots, steps=filling.steps, crcs=filling.crcs)


def _slots(record: SealRecord) -> Slots:
    return np.array(record.slots, dtype=np.uint32)


_ZEROS = memoryview(bytes(ALIGNMENT))
