"""Recovery: choose a state along the lineage (pure, see `moc.plan.lineage`) and copy its bytes into the training state.

A *source* knows where the shards of one candidate lie and can read them. Whatever it reads is checked against a crc32c
that was computed when the snapshot was sealed, before a byte of it reaches the training state; a mismatch rejects the
whole candidate.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from moc._native import crc32c
from moc.errors import CoverageError, ShardCorruptError
from moc.format.contents import contradictions
from moc.format.keys import parse_object_key
from moc.format.manifest import Manifest, ObjectRow
from moc.format.object import ObjectHeader
from moc.format.tagged import decode_state
from moc.host import Host
from moc.plan.lineage import Candidate
from moc.plan.read import Piece, Placed, plan_read
from moc.repository import Repository
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Shard
from moc.trace import Trace
from moc.training import TrainingState

__all__ = [
    "MemorySource",
    "RecoveryReport",
    "Rejection",
    "Source",
    "StorageSource",
    "reasons_for_drift",
    "restore_shards",
]

READERS = 4  # concurrent shard reads per rank; enough to keep a disk or a few HTTP connections busy
IN_FLIGHT_BYTES = 1 << 30  # of shards being read at once per rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A candidate that was not used, and why."""

    candidate: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What a recovery did; the same on every rank. Bytes and seconds are lists by rank and maps by phase."""

    step: int
    source: str
    incarnation: int
    parent_incarnation: int
    run: str
    lineage: tuple[tuple[int, int | None], ...]
    bytes_per_rank: tuple[int, ...]
    seconds: Mapping[str, float]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        total = sum(self.bytes_per_rank)
        timing = " ".join(f"{phase}={seconds:.2f}s" for phase, seconds in self.seconds.items())
        lines = [
            f"recovered step {self.step} from {self.source}: {total / 1e6:.1f} MB, {timing}",
            f"  run {self.run}, incarnation {self.incarnation}, grown from incarnation {self.parent_incarnation}",
        ]
        lines += [f"  rejected {r.candidate}: {r.reason}" for r in self.rejected]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


class Source(Protocol):
    """Where one candidate's bytes are. Thread: `read` from any thread, the rest from one."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the life that the candidate was taken from."""

    @property
    def software(self) -> Mapping[str, object]:
        """Return the versions of what that life ran."""

    def placed(self, needed: Sequence[Shard]) -> tuple[Placed, ...]:
        """Return stored shards that cover all of `needed`, as few as is easy to find."""

    def read(self, row: Placed) -> memoryview:
        """Return all bytes of a stored shard; the caller checks the crc32c."""

    def state(self, rank: int) -> tuple[object, bool]:
        """Return the captured tree for this rank and whether this very rank captured it; the blob is checked."""


class MemorySource:
    """A snapshot in the arena of this node."""

    def __init__(self, arena: Arena, records: Mapping[int, SealRecord]) -> None:
        """`records` holds the seal of every rank of the life that took the snapshot, by rank."""
        self._arena, self._records = arena, dict(sorted(records.items()))

    @property
    def world_size(self) -> int:
        return len(self._records)

    @property
    def software(self) -> Mapping[str, object]:
        software = self._arena.descriptor["software"]
        assert isinstance(software, dict), "the descriptor was written by describe_life"
        return software

    def placed(self, needed: Sequence[Shard]) -> tuple[Placed, ...]:
        rows = []
        for rank, record in self._records.items():
            offsets = self._arena.shard_offsets(rank, record.slots)
            for shard, offset, crc in zip(self._arena.catalog(rank).shards, offsets, record.crcs, strict=True):
                rows.append(Placed(shard=shard, holder=f"memory rank={rank}", position=offset, crc32c=crc))
        return tuple(rows)

    def read(self, row: Placed) -> memoryview:
        return self._arena.view(row.position, row.shard.size_bytes)

    def state(self, rank: int) -> tuple[object, bool]:
        holder = rank if rank in self._records else rank % len(self._records)
        record = self._records[holder]
        view = self._arena.view(self._arena.state_offset(holder, record.slots), record.state_bytes)
        blob = bytes(view)
        view.release()
        return _decode(blob, record.state_crc32c, f"source=memory rank={holder} step={record.step}"), holder == rank


class StorageSource:
    """A checkpoint in a repository. Headers are read once; those of this rank's own objects first."""

    def __init__(self, repository: Repository, manifest: Manifest, *, rank: int) -> None:
        self._repository, self._manifest, self._rank = repository, manifest, rank
        self._rows = {row.key: row for row in manifest.objects}
        self._headers: dict[str, ObjectHeader] = {}

    @property
    def world_size(self) -> int:
        return int(str(self._manifest.topology["world_size"]))

    @property
    def software(self) -> Mapping[str, object]:
        return self._manifest.versions

    def placed(self, needed: Sequence[Shard]) -> tuple[Placed, ...]:
        mine = [row for row in self._manifest.objects if parse_object_key(row.key)[1] == self._rank]
        own = self._placed_in(mine)
        try:
            plan_read(needed, own)
        except CoverageError:
            return self._placed_in(self._manifest.objects)
        return own

    def read(self, row: Placed) -> memoryview:
        view = memoryview(bytearray(row.shard.size_bytes))
        self._repository.read_range(self._rows[row.holder], row.position, view)
        return view

    def state(self, rank: int) -> tuple[object, bool]:
        dense = {parse_object_key(r.key)[1]: r for r in self._manifest.objects if parse_object_key(r.key)[2] == "d"}
        holder = rank if rank in dense else rank % len(dense)
        row = dense[holder]
        header = self._header(row)
        if header.state is None:
            raise ShardCorruptError(f"object carries no state: key={row.key}")
        position, length, expected = header.state
        blob = bytearray(length)
        self._repository.read_range(row, position, memoryview(blob))
        return _decode(bytes(blob), expected, f"key={row.key}"), holder == rank

    def _placed_in(self, rows: Sequence[ObjectRow]) -> tuple[Placed, ...]:
        return tuple(
            Placed(shard=stored.shard, holder=row.key, position=stored.position, crc32c=stored.crc32c)
            for row in rows
            for stored in self._header(row).shards
        )

    def _header(self, row: ObjectRow) -> ObjectHeader:
        if row.key not in self._headers:
            header = self._repository.read_header(row)
            for error in contradictions(self._manifest, row, header):
                raise error
            self._headers[row.key] = header
        return self._headers[row.key]


def restore_shards(
    source: Source,
    state: TrainingState,
    candidate: Candidate,
    *,
    parts: Sequence[str] | None,
    host: Host,
    trace: Trace,
) -> int:
    """Copy every needed shard (of these parts only, where given) from the source into the training state.

    Return the bytes read.

    Nothing is written to the state unless the whole plan covers it; a shard is written after its checksum was found
    right. When this raises (IntegrityError, MismatchError, StorageError) the state is partly overwritten: restore
    another candidate or stop.
    """
    targets = [i for i, shard in enumerate(state.needed) if parts is None or shard.part in parts]
    needed = [state.needed[i] for i in targets]
    placed = source.placed(needed)
    pieces = plan_read(needed, placed)
    budget = _ByteBudget(IN_FLIGHT_BYTES)
    jobs = [(index, tuple(group)) for index, group in groupby(pieces, key=lambda piece: piece.source)]

    def fill(job: tuple[int, tuple[Piece, ...]]) -> int:
        row = placed[job[0]]
        with (
            budget.take(row.shard.size_bytes),
            trace.span("recover.read", shard=row.shard.name, bytes=row.shard.size_bytes),
            source.read(row) as view,
        ):
            actual = crc32c(view)
            if actual != row.crc32c:
                raise ShardCorruptError(
                    f"shard checksum mismatch: shard={row.shard.name} holder={row.holder} candidate={candidate} "
                    f"expected={row.crc32c} actual={actual}"
                )
            for piece in job[1]:
                with view[piece.source_offset : piece.source_offset + piece.length_bytes] as part:
                    state.write_shard(targets[piece.target], piece.target_offset, part)
        return row.shard.size_bytes

    return sum(host.map(fill, jobs, workers=READERS, name="moc-read"))


def reasons_for_drift(
    *, stored_ranks: int, ranks: int, stored_software: Mapping[str, object], software: Mapping[str, object]
) -> tuple[str, ...]:
    """Return why a run whose every tensor was restored may yet not go on bit-exactly. Pure."""
    reasons = []
    if stored_ranks != ranks:
        reasons.append(
            f"the number of ranks has changed, so the run is not bit-exact: stored={stored_ranks} present={ranks}"
        )
    for name in sorted(stored_software.keys() | software.keys()):
        stored, present = stored_software.get(name), software.get(name)
        if stored != present:
            reasons.append(f"a version has changed, so the run may not be bit-exact: {name} {stored=} {present=}")
    return tuple(reasons)


def _decode(blob: bytes, expected: int, where: str) -> object:
    actual = crc32c(blob)
    if actual != expected:
        raise ShardCorruptError(f"state checksum mismatch: {where} expected={expected} actual={actual}")
    return decode_state(blob)


class _ByteBudget:
    """Admits holders while their bytes fit; a single larger one is admitted alone."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used = limit_bytes, 0
        self._changed = threading.Condition()

    def take(self, size_bytes: int) -> _Held:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size_bytes <= self._limit)
            self._used += size_bytes
        return _Held(self, size_bytes)

    def give_back(self, size_bytes: int) -> None:
        with self._changed:
            self._used -= size_bytes
            self._changed.notify_all()


class _Held:
    """Bytes taken from a budget until the block ends."""

    def __init__(self, budget: _ByteBudget, size_bytes: int) -> None:
        self._budget, self._size = budget, size_bytes

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._budget.give_back(self._size)
