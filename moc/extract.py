"""Extraction: one checkpoint as a repository of its own, from which a job can resume.

Objects are copied byte for byte; every checksum is tested on the way, before an object gets its name. The order is
FORMAT, objects, incarnation record, manifest: a crash anywhere leaves nothing that lists as a checkpoint, and the same
extraction can be repeated. An error, unlike a crash, takes back what was written.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moc._native import crc32c
from moc.errors import MocError, ShardCorruptError, StorageError, UsageError
from moc.format.contents import expert_steps
from moc.format.keys import FORMAT_KEY, CheckpointName, incarnation_key, manifest_key
from moc.format.manifest import Incarnation, Manifest
from moc.repository import Finding, Repository
from moc.store.port import Progress
from moc.store.translate import translate_os_error
from moc.trace import Trace
from moc.verify import CheckedObject, check_states, check_structure

__all__ = ["ExtractReport", "extract"]

PIECE_BYTES = 64 * 2**20  # of one read
MEMORY_BYTES = 256 * 2**20  # a larger object is collected in a temporary file, which the kernel may write out


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """What was copied. `expert_steps` maps each MoE layer to the steps of its experts' bytes, by expert index."""

    name: CheckpointName
    objects: int
    bytes_copied: int
    expert_steps: dict[int, tuple[int, ...]] = field(default_factory=dict)


def extract(
    source: Repository,
    name: CheckpointName,
    target: Repository,
    progress: Progress | None = None,
    trace: Trace | None = None,
    *,
    spool: str | None = None,
) -> ExtractReport:
    """Copy one checkpoint into an empty repository, or into one that an extraction of the same checkpoint began.

    `spool` is the folder for the temporary files of large objects. Thread: any. Blocks: until everything is durable.
    Raises: IntegrityError when anything about the checkpoint is wrong, UsageError for another target, StorageError.
    """
    trace = trace or Trace()
    with trace.span("extract.check", step=name.step):
        manifest = source.read_manifest(name)
        objects, findings = check_structure(source, manifest)
        _raise_first(findings)
        _raise_first(check_states(source, objects)[0])
        record = _record(manifest)
        present = _require_target(target, manifest, record)
    try:
        with trace.span("extract.create", url=target.url):
            target.create()
        for entry in objects:
            with trace.span("extract.copy", key=entry.row.key, bytes=entry.row.size_bytes):
                _copy(source, entry, target, progress, spool)
        with trace.span("extract.record", incarnation=record.number):
            target.put_incarnation(record)
        with trace.span("extract.commit", step=name.step):
            target.put_manifest(manifest)
    except MocError:
        _take_back(target, _keys(manifest, record), present)
        raise
    return ExtractReport(
        name=name,
        objects=len(objects),
        bytes_copied=sum(entry.row.size_bytes for entry in objects),
        expert_steps=expert_steps(manifest, ((entry.row, entry.header) for entry in objects)),
    )


def _record(manifest: Manifest) -> Incarnation:
    """Return the record of a life that begins at this checkpoint. Pure, so that a repetition writes the same bytes."""
    return Incarnation(
        run=manifest.name.run,
        number=manifest.name.incarnation,
        token=manifest.name.attempt,
        parent=None,
        reason="start",
        fingerprint=manifest.fingerprint,
    )


def _keys(manifest: Manifest, record: Incarnation) -> tuple[str, ...]:
    """Return all keys of the extracted repository, in the order in which they are written."""
    objects = (row.key for row in manifest.objects)
    return (FORMAT_KEY, *objects, incarnation_key(record.run, record.number), manifest_key(manifest.name))


def _require_target(target: Repository, manifest: Manifest, record: Incarnation) -> frozenset[str]:
    """Return the keys in the target; raises UsageError when it holds anything but parts of this checkpoint."""
    present = frozenset(entry.key for entry in target.store.list(""))
    foreign = sorted(present - set(_keys(manifest, record)))
    if foreign:
        raise UsageError(
            f"target is not empty: url={target.url} files={len(foreign)} first={foreign[0]} "
            f"allowed=an empty folder or this checkpoint name={manifest.name}"
        )
    if present:
        target.require()
    return present


def _take_back(target: Repository, keys: Sequence[str], present: frozenset[str]) -> None:
    """Delete what this extraction wrote, the manifest first; a store that refuses leaves what a repetition can use."""
    with contextlib.suppress(StorageError):
        for key in reversed(keys):
            if key not in present:
                target.store.delete(key)


def _raise_first(findings: Sequence[Finding]) -> None:
    if findings:
        error = findings[0].error
        more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise ShardCorruptError(f"checkpoint is not sound: {error}{more}") from error


def _copy(
    source: Repository, entry: CheckedObject, target: Repository, progress: Progress | None, spool: str | None
) -> None:
    """Collect the whole object, test all its checksums, then put it."""
    row = entry.row
    view = _buffer(row.size_bytes, spool)
    for offset in range(0, row.size_bytes, PIECE_BYTES):
        piece = view[offset : offset + PIECE_BYTES]
        source.store.read_into(row.key, offset, piece)
        if progress is not None:
            progress(piece.nbytes)
    for name, begin, length, expected in _checksums(entry):
        actual = crc32c(view[begin : begin + length])
        if actual != expected:
            raise ShardCorruptError(
                f"checksum mismatch: key={row.key} shard={name!r} expected={expected:08x} actual={actual:08x}"
            )
    for position, length in entry.header.pads:
        begin = row.header_bytes + position
        view[begin : begin + length] = bytes(length)  # it has no checksum: what rotted there is not copied
    target.put_object(row.key, [view])


def _checksums(entry: CheckedObject) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, first byte in the object, length and crc32c of everything that has a checksum."""
    row, header = entry.row, entry.header
    yield "header", 0, row.header_bytes, row.header_crc32c
    for stored in header.shards:
        yield stored.shard.name, row.header_bytes + stored.position, stored.shard.size_bytes, stored.crc32c
    if header.state is not None:
        yield "state", row.header_bytes + header.state[0], header.state[1], header.state[2]


def _buffer(size_bytes: int, spool: str | None) -> memoryview:
    """Return page-aligned memory for an object: anonymous, or of a nameless temporary file when it is large.

    It is given back with the last reference: an error that flies past may still hold a view of it.
    """
    try:
        if size_bytes <= MEMORY_BYTES:
            return memoryview(mmap.mmap(-1, size_bytes))
        with tempfile.TemporaryFile(dir=spool) as file:
            file.truncate(size_bytes)
            return memoryview(mmap.mmap(file.fileno(), size_bytes))
    except OSError as error:
        raise translate_os_error(error, action="spool", subject=f"bytes={size_bytes} folder={spool}") from error
