"""Typed operations over a store and the format: what can be listed, read and written in a repository.

Invariants kept here: a manifest is put only through `put_manifest` (after its objects, see `moc.commit`); records are
read back only through their self-checksums; every object key that a manifest names is parsed, so no path can leave its
folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moc._native import crc32c
from moc.errors import (
    FormatUnsupportedError,
    IntegrityError,
    ManifestCorruptError,
    MocError,
    NoCheckpointError,
    ObjectMissingError,
    ShardCorruptError,
)
from moc.format.keys import (
    FORMAT_KEY,
    INCARNATIONS,
    MANIFESTS,
    OBJECTS,
    VICTIMS,
    CheckpointName,
    incarnation_key,
    manifest_key,
    parse_incarnation_key,
    parse_manifest_key,
    parse_object_key,
    victims_key,
)
from moc.format.manifest import (
    FORMAT_LIMIT_BYTES,
    RECORD_LIMIT_BYTES,
    Incarnation,
    Manifest,
    ObjectRow,
    decode_format,
    decode_incarnation,
    decode_manifest,
    decode_victims,
    encode_format,
    encode_incarnation,
    encode_manifest,
    encode_victims,
)
from moc.format.object import ObjectHeader, header_length, parse_header
from moc.plan.lineage import Link, chain, merge_incarnations, tip
from moc.store.port import Entry, Segment, Store

__all__ = ["Finding", "Repository", "StoredCheckpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A listed manifest; it is a checkpoint once `Repository.read_manifest` has accepted it."""

    name: CheckpointName
    modified_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong with one key."""

    key: str
    error: MocError

    def __str__(self) -> str:
        return f"{self.key}: {self.error}"


class Repository:
    """One repository. Thread: any. Blocks: on the store. Raises: StorageError, IntegrityError."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        return self.store.properties.url

    def exists(self) -> bool:
        """Return whether there is a repository that this version can use.

        Raises FormatUnsupportedError if there is another kind.
        """
        try:
            content = self.store.read(FORMAT_KEY, limit_bytes=FORMAT_LIMIT_BYTES)
        except IntegrityError as error:
            raise FormatUnsupportedError(f"not a moc repository: url={self.url} {error}") from error
        except ObjectMissingError:
            if self.store.list(MANIFESTS) or self.store.list(INCARNATIONS):
                raise FormatUnsupportedError(
                    f"repository has manifests but no {FORMAT_KEY}: url={self.url} allowed=the file {FORMAT_KEY!r} as "
                    "written at creation"
                ) from None
            return False
        decode_format(content, url=self.url)
        return True

    def require(self) -> None:
        """Raise NoCheckpointError unless the repository exists."""
        if not self.exists():
            raise NoCheckpointError(f"no moc repository here: url={self.url}")

    def create(self) -> None:
        """Write FORMAT; writing it again writes the same bytes."""
        self.store.put(FORMAT_KEY, [memoryview(encode_format())])

    # Incarnations

    def incarnations(self) -> tuple[tuple[Incarnation, ...], tuple[Finding, ...]]:
        """Return all readable incarnation records, ascending, and what is wrong with the others."""
        records, findings = [], []
        for entry in self.store.list(INCARNATIONS):
            parsed = parse_incarnation_key(entry.key)
            if parsed is None:
                continue
            try:
                record = decode_incarnation(self.store.read(entry.key, limit_bytes=RECORD_LIMIT_BYTES), name=entry.key)
                if (record.run, record.number) != parsed:
                    raise ManifestCorruptError(
                        f"record names another life than its key: key={entry.key} run={record.run} "
                        f"number={record.number}"
                    )
                records.append(record)
            except (IntegrityError, ObjectMissingError) as error:
                findings.append(Finding(key=entry.key, error=error))
        return tuple(sorted(records, key=lambda r: (r.number, r.run))), tuple(findings)

    def incarnation_numbers(self) -> tuple[tuple[str, int], ...]:
        """Return (run, number) of every incarnation key, readable or not, ascending by number."""
        parsed = [parse_incarnation_key(entry.key) for entry in self.store.list(INCARNATIONS)]
        return tuple(sorted((p for p in parsed if p is not None), key=lambda p: (p[1], p[0])))

    def incarnation_time_s(self, run: str, number: int) -> float:
        """Return when a life's record was written, by the store's own time; 0.0 where that is not known."""
        key = incarnation_key(run, number)
        return next((entry.modified_s for entry in self.store.list(INCARNATIONS) if entry.key == key), 0.0)

    def put_incarnation(self, record: Incarnation) -> None:
        """Write an incarnation record.

        Raises FencedError where the store enforces create-only and another life has the number.
        """
        self.store.put(
            incarnation_key(record.run, record.number), [memoryview(encode_incarnation(record))], create_only=True
        )

    def put_missing_incarnations(self, lineage: Sequence[Incarnation]) -> None:
        """Write the records of lives that began while the storage was away, oldest first.

        Without them the chain would end at the gap, and checkpoints beyond it would be none of the lineage's.
        """
        held = set(self.incarnation_numbers())
        for record in sorted(lineage, key=lambda record: record.number):
            if (record.run, record.number) not in held:
                self.put_incarnation(record)

    def lineage(self) -> tuple[Link, ...]:
        """Return the chain that recovery would follow from what is stored."""
        records, _ = self.incarnations()
        merged = merge_incarnations(records, ())
        return chain(merged, tip(merged))

    # Checkpoints

    def checkpoints(self) -> tuple[StoredCheckpoint, ...]:
        """Return every listed manifest, by incarnation, step and attempt; contents are not read."""
        found = []
        for entry in self.store.list(MANIFESTS):
            name = parse_manifest_key(entry.key)
            if name is not None:
                found.append(StoredCheckpoint(name=name, modified_s=entry.modified_s))
        return tuple(sorted(found, key=lambda c: (c.name.incarnation, c.name.step, c.name.attempt)))

    def read_manifest(self, name: CheckpointName) -> Manifest:
        """Return a manifest; raises ObjectMissingError or ManifestCorruptError naming its key."""
        key = manifest_key(name)
        manifest = decode_manifest(self.store.read(key, limit_bytes=RECORD_LIMIT_BYTES), name=key)
        if manifest.name != name:
            raise ManifestCorruptError(f"manifest names another checkpoint than its key: {key=} name={manifest.name}")
        return manifest

    def put_manifest(self, manifest: Manifest) -> None:
        """Commit. When this returns the checkpoint exists and survives a power loss."""
        self.store.put(manifest_key(manifest.name), [memoryview(encode_manifest(manifest))])

    def delete_manifest(self, name: CheckpointName) -> None:
        self.store.delete(manifest_key(name))

    # Objects

    def put_object(self, key: str, segments: Sequence[Segment]) -> None:
        """Write an object durably."""
        self.store.put(key, segments)

    def read_header(self, row: ObjectRow) -> ObjectHeader:
        """Read and check an object's header against its manifest row.

        Raises ShardCorruptError naming key and what differs.
        """
        size = self.store.size_bytes(row.key)
        if size != row.size_bytes:
            raise ShardCorruptError(f"object has a wrong size: key={row.key} expected={row.size_bytes} actual={size}")
        encoded = bytearray(row.header_bytes)
        self.store.read_into(row.key, 0, memoryview(encoded))
        actual = crc32c(encoded)
        if actual != row.header_crc32c:
            raise ShardCorruptError(
                f"object header checksum mismatch: key={row.key} expected={row.header_crc32c} actual={actual}"
            )
        if header_length(bytes(encoded[:8]), key=row.key) != row.header_bytes:
            raise ShardCorruptError(f"object header has a wrong length: key={row.key} expected={row.header_bytes}")
        header = parse_header(bytes(encoded), key=row.key)
        if row.header_bytes + header.data_bytes != row.size_bytes:
            raise ShardCorruptError(f"object data have a wrong length: key={row.key} data_bytes={header.data_bytes}")
        name, rank, piece = parse_object_key(row.key)
        facts = (
            ("checkpoint", str(name), str(header.name)),
            ("rank", rank, header.rank),
            ("piece", piece, header.piece),
        )
        for what, expected, found in facts:
            if expected != found:
                raise ShardCorruptError(
                    f"object names another {what} than its key: key={row.key} {expected=} actual={found!r}"
                )
        return header

    def read_range(self, row: ObjectRow, position: int, view: memoryview) -> None:
        """Fill `view` from byte `position` of the object's data area; the caller checks the crc32c."""
        self.store.read_into(row.key, row.header_bytes + position, view)

    def read_state(self, row: ObjectRow, header: ObjectHeader) -> bytes:
        """Return the state blob of a dense object; raises ShardCorruptError if its checksum is not the header's."""
        if header.state is None:
            raise ShardCorruptError(f"object carries no state: key={row.key}")
        position, length, expected = header.state
        blob = bytearray(length)
        self.read_range(row, position, memoryview(blob))
        actual = crc32c(blob)
        if actual != expected:
            raise ShardCorruptError(f"state checksum mismatch: key={row.key} expected={expected} actual={actual}")
        return bytes(blob)

    def objects(self) -> list[Entry]:
        """Return every stored object, by key."""
        return self.store.list(OBJECTS)

    # Deletion in two phases (docs/format.md, invariant I5)

    def read_victims(self, run: str, incarnation: int) -> tuple[str, ...]:
        """Return the object keys that a life has condemned, sorted; empty if there is no list.

        Raises ManifestCorruptError naming the list.
        """
        key = victims_key(run, incarnation)
        try:
            return decode_victims(self.store.read(key, limit_bytes=RECORD_LIMIT_BYTES), name=key, run=run)
        except ObjectMissingError:
            return ()

    def put_victims(self, run: str, incarnation: int, victims: Sequence[str]) -> str:
        """Replace the victim list of a life and return its key.

        The one key that is re-written, by its own life or once that is fenced, because no checkpoint depends on it.
        """
        key = victims_key(run, incarnation)
        self.store.put(key, [memoryview(encode_victims(victims))])
        return key

    def victim_lists(self) -> list[Entry]:
        return self.store.list(VICTIMS)

    def sync_names(self) -> None:
        """Make durable what the listings of lives and checkpoints show, also what a process left unfinished that died.

        Call between such a listing and whatever cannot be taken back: a deletion, or an announcement.
        """
        for prefix in (INCARNATIONS, MANIFESTS):
            self.store.sync(prefix)

    def close(self) -> None:
        self.store.close()
