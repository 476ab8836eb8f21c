"""Where the bytes of a recovery are, and how they get into the training state.

A *source* knows where the shards of one snapshot or checkpoint lie and can read them. Whatever it reads is checked
against a crc32c that was computed when the snapshot was sealed, before a byte of it reaches the training state. What is
to become of a bad shard others decide: `moc.assembly` for an expert, `moc.restoration` for a whole candidate.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from moc._native import crc32c
from moc.errors import IntegrityError, MocError, ShardCorruptError, StorageError
from moc.format.contents import contradictions, live_shards
from moc.format.keys import parse_object_keys
from moc.format.manifest import Manifest, ObjectRow
from moc.format.object import ObjectHeader
from moc.format.relative import whole_state
from moc.format.tagged import decode_state, expect_mapping
from moc.host import Host
from moc.plan.lineage import STORAGE, Candidate
from moc.plan.read import Piece, Placed, find_pieces
from moc.plan.versions import Inventory, Version
from moc.repository import Repository
from moc.routing import ROUTING_KEY, Capture, Routing
from moc.state import Expert, Shard
from moc.trace import Trace
from moc.training import TrainingState

__all__ = [
    "Filled",
    "Placing",
    "Source",
    "StorageSource",
    "decode_checked",
    "fill_shards",
    "is_inside",
    "restore_shards",
    "split_tree",
]

READERS = 4  # concurrent shard reads per rank; enough to keep a disk or a few HTTP connections busy
IN_FLIGHT_BYTES = 1 << 30  # of shards being read at once per rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """Stored shards, and why others could not be looked for: what is not among `rows` may be behind a failure."""

    rows: tuple[Placed, ...]
    failures: tuple[MocError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """The bytes read for some shards, and by expert why its shards could not all be had."""

    size_bytes: int
    damaged: Mapping[Expert, MocError]


class Source(Protocol):
    """Where the bytes of one snapshot or checkpoint are. Thread: `read` from any thread, the rest from one."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the life that the candidate was taken from."""

    @property
    def software(self) -> Mapping[str, object]:
        """Return the versions of what that life ran."""

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """Return what that life was an experiment of."""

    def slices(self, experts: Sequence[Expert], rank: int, size: int, *, step: int) -> list[Inventory]:
        """Return what rank `rank` of `size` tells the others of the versions that are here.

        One inventory for each part that is this rank's to tell; those of all ranks say which experts are whole (see
        `moc.plan.versions.consistent`). What a version has learned is told where it is older than `step`.
        """

    def placed(self, needed: Sequence[Shard]) -> Placing:
        """Return stored shards that cover all of `needed`, as few as is easy to find."""

    def read(self, row: Placed) -> memoryview:
        """Return all bytes of a stored shard; the caller checks the crc32c."""

    def state(self, rank: int) -> tuple[object, bool]:
        """Return the captured tree for this rank and whether this very rank captured it; the blob is checked."""


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

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return self._manifest.fingerprint

    def slices(self, experts: Sequence[Expert], rank: int, size: int, *, step: int) -> list[Inventory]:
        if rank:
            return []  # every rank has read the same manifest
        stale = {row.expert: row.routed for row in self._manifest.stale_experts}
        inventory: dict[Expert, Version] = {}
        for expert in experts:
            source, held = self._manifest.version(expert)
            learned = stale[expert] if expert in stale else _learned(self._manifest.routing, expert)
            inventory[expert] = Version(step=held, learned=learned, holder=f"{STORAGE} {source}")
        return [inventory]

    def placed(self, needed: Sequence[Shard]) -> Placing:
        mine = [row for row, rank, _ in self._placed_rows() if rank == self._rank]
        own = self._placed_in(mine)
        if not find_pieces(needed, own.rows)[1]:
            return own
        return self._placed_in(self._manifest.objects)

    def read(self, row: Placed) -> memoryview:
        view = memoryview(bytearray(row.shard.size_bytes))
        self._repository.read_range(self._rows[row.holder], row.position, view)
        return view

    def state(self, rank: int) -> tuple[object, bool]:
        dense = {other: row for row, other, piece in self._placed_rows() if piece == "d"}
        holder = rank if rank in dense else rank % len(dense)

        def fetch(other: int) -> bytes:
            row = dense[other]
            return self._repository.read_state(row, self._header(row))

        return whole_state(holder, dense, fetch), holder == rank

    def _placed_rows(self) -> Iterator[tuple[ObjectRow, int, str]]:
        """Yield each object with its rank and piece."""
        rows = self._manifest.objects
        for row, (_, rank, piece) in zip(rows, parse_object_keys(row.key for row in rows), strict=True):
            yield row, rank, piece

    def _placed_in(self, objects: Sequence[ObjectRow]) -> Placing:
        rows: list[Placed] = []
        failures: list[MocError] = []
        for row in objects:
            try:
                header = self._header(row)
            except (IntegrityError, StorageError) as error:
                failures.append(error)
                continue
            rows += [
                Placed(shard=stored.shard, holder=row.key, position=stored.position, crc32c=stored.crc32c)
                for stored in live_shards(self._manifest, row, header)
            ]
        return Placing(rows=tuple(rows), failures=tuple(failures))

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
    """Copy every needed shard (of these parts only, where given) from this one source into the training state.

    Return the bytes read. Raises as `fill_shards`, and for an expert too.
    """
    targets = [i for i, shard in enumerate(state.needed) if parts is None or shard.part in parts]
    filled = fill_shards(source, state, targets, candidate, host=host, trace=trace)
    for _, error in sorted(filled.damaged.items()):
        raise error
    return filled.size_bytes


def fill_shards(
    source: Source, state: TrainingState, targets: Sequence[int], candidate: Candidate, *, host: Host, trace: Trace
) -> Filled:
    """Copy these needed shards from the source into the training state.

    A shard is written after its checksum was found right, and none of the dense part unless all of that is there. When
    this raises (IntegrityError, MismatchError, StorageError), and for every damaged expert, the state is partly
    overwritten: restore it from elsewhere or stop.
    """
    needed = [state.needed[i] for i in targets]
    placing = source.placed(needed)
    placed = placing.rows
    pieces, damaged = _plan(needed, placing)
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

    def attempt(job: tuple[int, tuple[Piece, ...]]) -> int | tuple[Expert, MocError]:
        expert = placed[job[0]].shard.expert
        try:
            return fill(job)
        except (IntegrityError, StorageError) as error:
            if expert is None:
                raise
            return expert, error

    size_bytes = 0
    for outcome in host.map(attempt, jobs, workers=READERS, name="moc-read"):
        if isinstance(outcome, int):
            size_bytes += outcome
        else:
            damaged.setdefault(*outcome)
    return Filled(size_bytes=size_bytes, damaged=damaged)


def split_tree(tree: object, is_exact: bool) -> tuple[dict[str, object], bool, Capture | None]:
    """Take what a captured tree says about routes out of it; raises ShardCorruptError where that cannot be."""
    fields = dict(expect_mapping(tree, "state"))
    captured = fields.pop(ROUTING_KEY, None)
    if captured is None:
        return fields, is_exact, None
    try:
        return fields, is_exact, Capture.from_tree(captured)
    except (TypeError, ValueError) as error:
        raise ShardCorruptError(f"captured routes are not readable: reason={error}") from error


def _plan(needed: Sequence[Shard], placing: Placing) -> tuple[tuple[Piece, ...], dict[Expert, MocError]]:
    """Return the pieces to read, and the experts of which some are missing; raises where that is a dense shard."""
    pieces, gaps = find_pieces(needed, placing.rows)
    damaged: dict[Expert, MocError] = {}
    for target, gap in sorted(gaps.items()):
        # What is missing may be behind any failure; one that may pass is worth another try.
        reason = min(placing.failures, key=lambda error: isinstance(error, IntegrityError), default=gap)
        expert = needed[target].expert
        if expert is None:
            raise reason
        damaged.setdefault(expert, reason)
    return tuple(piece for piece in pieces if needed[piece.target].expert not in damaged), damaged


def _learned(routing: Routing | None, expert: Expert) -> int:
    if routing is None or not is_inside(routing.learned, expert):
        return 0
    return routing.learned[expert.layer][expert.index]


def is_inside(counts: Sequence[Sequence[int]], expert: Expert) -> bool:
    """Return whether counts by layer and index have one for this expert."""
    return expert.layer < len(counts) and expert.index < len(counts[expert.layer])


def decode_checked(blob: bytes, expected: int, where: str) -> object:
    """Return the tree of a state blob; raises ShardCorruptError if its checksum is not the expected one."""
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
