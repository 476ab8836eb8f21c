"""One checkpoint as whole logical tensors: any element range of any tensor, checked, without an engine.

The structure (headers, coverage, steps of experts) is checked when the checkpoint is opened, the bytes of a shard
whenever it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from moc._native import crc32c
from moc.errors import CoverageError, InternalError, ShardCorruptError
from moc.format.contents import live_shards
from moc.format.keys import parse_object_key
from moc.format.manifest import Manifest, ObjectRow
from moc.format.object import StoredShard
from moc.format.relative import whole_state
from moc.format.tagged import expect_mapping
from moc.repository import Repository
from moc.state import DTYPE_BYTES, Expert, Shard, shard_order
from moc.store.port import Progress
from moc.verify import check_structure

__all__ = ["MASTER", "WEIGHT", "CheckpointSource"]

MASTER = "master"
WEIGHT = "weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A stored shard and the manifest row of its object."""

    row: ObjectRow
    stored: StoredShard


class CheckpointSource:
    """Reads one checkpoint. Thread: one. Blocks: on the store. Raises: StorageError, IntegrityError.

    `progress` gets the bytes read from shards and state blobs; `is_partial` says whether some experts lie in objects of
    other attempts.
    """

    def __init__(self, repository: Repository, manifest: Manifest, progress: Progress) -> None:
        objects, findings = check_structure(repository, manifest)
        if findings:
            raise findings[0].error
        self.manifest = manifest
        self._repository, self._progress = repository, progress
        self._shards: dict[tuple[str, str], list[_Stored]] = {}
        self._states: dict[int, tuple[ObjectRow, tuple[int, int, int]]] = {}
        self._experts: dict[int, set[Expert]] = {}
        self.is_partial = any(row.source != manifest.name for row in manifest.stale_experts)
        for entry in objects:
            owner, rank, _ = parse_object_key(entry.row.key)
            if entry.header.state is not None:
                self._states[rank] = (entry.row, entry.header.state)
            for stored in live_shards(manifest, entry.row, entry.header):
                shard = stored.shard
                self._shards.setdefault((shard.tensor, shard.part), []).append(_Stored(row=entry.row, stored=stored))
            if owner.incarnation == manifest.name.incarnation:  # within a life nothing moves to another rank
                held = {stored.shard.expert for stored in entry.header.shards if stored.shard.expert is not None}
                self._experts.setdefault(rank, set()).update(held)
        for rows in self._shards.values():
            rows.sort(key=lambda row: row.stored.shard.offset)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Return the ranks that took part, ascending."""
        return tuple(sorted(self._states))

    def experts_of(self, rank: int) -> frozenset[Expert]:
        """Return the experts of which a rank is seen to have written something in this life."""
        return frozenset(self._experts.get(rank, ()))

    def tensors(self, part: str) -> tuple[Shard, ...]:
        """Return one shard that spans each tensor which has this part, in catalog order."""
        firsts = (rows[0].stored.shard for (_, found), rows in self._shards.items() if found == part)
        return tuple(sorted((replace(s, offset=0, length=prod(s.shape)) for s in firsts), key=shard_order))

    def parts(self, tensor: str) -> Mapping[str, str]:
        """Return the dtype of every part of a tensor, by part, sorted."""
        found = {part: rows[0].stored.shard.dtype for (name, part), rows in self._shards.items() if name == tensor}
        return dict(sorted(found.items()))

    def state(self, rank: int) -> dict[str, Any]:
        """Return the tree that a rank captured; its arrays are views of a fresh buffer."""
        return dict(expect_mapping(whole_state(rank, self._states, self._state_blob), f"state of rank {rank}"))

    def _state_blob(self, rank: int) -> bytes:
        row, (position, length, expected) = self._states[rank]
        blob = bytearray(length)
        self._fetch(row, position, memoryview(blob), expected, "the state blob")
        return bytes(blob)

    def read(self, whole: Shard) -> bytearray:
        """Return all bytes of a tensor's part."""
        buffer = bytearray(whole.size_bytes)
        self.read_into(whole.tensor, whole.part, 0, memoryview(buffer))
        return buffer

    def read_into(self, tensor: str, part: str, first: int, view: memoryview) -> None:
        """Fill a writable byte view with the elements of a tensor's part from element `first` on.

        Every shard that is touched is read whole, as its checksum covers all of it; one that lies inside the range is
        read in place.
        """
        if not view.nbytes:
            return
        rows = self._shards.get((tensor, part))
        if rows is None:
            raise CoverageError(
                f"checkpoint does not hold a tensor: tensor={tensor} part={part} name={self.manifest.name}"
            )
        width = DTYPE_BYTES[rows[0].stored.shard.dtype]
        end = first + view.nbytes // width
        if first < 0 or end > prod(rows[0].stored.shard.shape):
            raise InternalError(f"range is outside its tensor: tensor={tensor} part={part} first={first} end={end}")
        for entry in rows:
            shard = entry.stored.shard
            low, high = max(first, shard.offset), min(end, shard.offset + shard.length)
            if low >= high:
                continue
            target = view[(low - first) * width : (high - first) * width]
            if high - low == shard.length:
                self._fetch_shard(entry, target)
            else:
                whole = bytearray(shard.size_bytes)
                self._fetch_shard(entry, memoryview(whole))
                target[:] = memoryview(whole)[(low - shard.offset) * width : (high - shard.offset) * width]

    def _fetch_shard(self, entry: _Stored, view: memoryview) -> None:
        self._fetch(entry.row, entry.stored.position, view, entry.stored.crc32c, entry.stored.shard.name)

    def _fetch(self, row: ObjectRow, position: int, view: memoryview, expected: int, what: str) -> None:
        self._repository.read_range(row, position, view)
        actual = crc32c(view)
        if actual != expected:
            raise ShardCorruptError(
                f"checksum mismatch: key={row.key} shard={what} expected={expected:08x} actual={actual:08x}"
            )
        self._progress(view.nbytes)
