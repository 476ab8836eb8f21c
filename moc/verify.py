"""Verification: is a checkpoint what its manifest says, and is a repository what its format says?

Read-only. Everything found wrong becomes a `Finding` and the check goes on; only a store that gives no answer raises.
Without data, manifests, headers and state blobs are checked; with data, also the crc32c of every shard, or of a part of
them that depends on names and a seed only, so that a second run looks at the same bytes. Padding must be zero.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from moc._native import crc32c
from moc.errors import (
    CoverageError,
    IntegrityError,
    ManifestCorruptError,
    MocError,
    ObjectMissingError,
    ShardCorruptError,
    UsageError,
)
from moc.format.contents import contradictions, live_shards
from moc.format.keys import (
    FORMAT_KEY,
    OBJECTS,
    CheckpointName,
    incarnation_key,
    manifest_key,
    parse_incarnation_key,
    parse_manifest_key,
    parse_object_key,
    parse_victims_key,
)
from moc.format.manifest import Manifest, ObjectRow
from moc.format.object import ObjectHeader
from moc.format.tagged import decode_state
from moc.repository import Finding, Repository
from moc.state import Expert, check_coverage
from moc.store.port import Progress

__all__ = [
    "CheckedObject",
    "RepositoryReport",
    "VerifyReport",
    "check_structure",
    "data_bytes",
    "verify_checkpoint",
    "verify_repository",
]

WINDOW_BYTES = 16 * 2**20  # of data in memory per reader: more leaves the processor's caches, less asks more often
GAP_BYTES = 2**20  # reading a smaller gap costs less than another request
READERS_LOCAL = 4  # never more than there are cores: the checksum is the cost
READERS_REMOTE = 8  # waiting is the cost
STATE_NAME = "state"
PAD_PREFIX = "__pad__/"

WRONG = (IntegrityError, ObjectMissingError, UsageError)
"""What stored bytes can raise; other storage errors say nothing about the bytes and fly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What is wrong with one checkpoint; no findings means that it is sound as far as it was read."""

    name: CheckpointName
    findings: tuple[Finding, ...]
    bytes_read: int
    objects: int
    shards: int

    @property
    def is_sound(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryReport:
    """What is wrong with a repository; notes are facts that harm nothing: unknown files, unreferenced objects."""

    checkpoints: tuple[VerifyReport, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        return self.findings + tuple(finding for report in self.checkpoints for finding in report.findings)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedObject:
    """An object whose header agrees with its manifest row."""

    row: ObjectRow
    header: ObjectHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Bytes of an object's data area that one checksum covers."""

    name: str
    position: int
    length: int
    crc32c: int


def verify_checkpoint(
    repository: Repository,
    name: CheckpointName,
    *,
    read_data_fraction: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check one checkpoint. Thread: any. Blocks: on the store. Raises: StorageError when the store gives no answer.

    `read_data_fraction`, 0.0 to 1.0, is how many of the shards are read, `seed` chooses which; `progress` gets bytes.
    """
    if not 0.0 <= read_data_fraction <= 1.0:
        raise UsageError(f"fraction is out of range: read_data_fraction={read_data_fraction} allowed=0.0..1.0")
    try:
        manifest = repository.read_manifest(name)
    except WRONG as error:
        return VerifyReport(
            name=name, findings=(Finding(key=manifest_key(name), error=error),), bytes_read=0, objects=0, shards=0
        )
    objects, findings = check_structure(repository, manifest)
    bytes_read = sum(entry.row.header_bytes for entry in objects)
    found, state_bytes = _check_states(repository, objects)
    findings += found
    shards, data_read = 0, 0
    if read_data_fraction > 0:
        work = [(o.row, _sample(name, o, read_data_fraction, seed)) for o in objects]
        shards = sum(not region.name.startswith(PAD_PREFIX) for _, regions in work for region in regions)
        found, data_read = _check_data(repository, work, progress)
        findings += found
    return VerifyReport(
        name=name,
        findings=tuple(sorted(findings, key=lambda f: (f.key, str(f.error)))),
        bytes_read=bytes_read + state_bytes + data_read,
        objects=len(objects),
        shards=shards,
    )


def verify_repository(
    repository: Repository, *, read_data_fraction: float = 0.0, seed: int = 0, progress: Progress | None = None
) -> RepositoryReport:
    """Check everything in a repository. Raises: NoCheckpointError, FormatUnsupportedError, StorageError."""
    repository.require()
    _, findings = repository.incarnations()
    names = [stored.name for stored in repository.checkpoints()]
    findings += tuple(_life_findings(repository.incarnation_numbers(), names))
    findings += tuple(_victim_findings(repository))
    reports = tuple(
        verify_checkpoint(repository, name, read_data_fraction=read_data_fraction, seed=seed, progress=progress)
        for name in names
    )
    return RepositoryReport(checkpoints=reports, findings=tuple(findings), notes=tuple(_notes(repository, names)))


def data_bytes(manifest: Manifest) -> int:
    """Return how many bytes of data the objects of a checkpoint hold, padding included: the scale of a progress bar."""
    return sum(row.size_bytes - row.header_bytes for row in manifest.objects)


def check_structure(repository: Repository, manifest: Manifest) -> tuple[list[CheckedObject], list[Finding]]:
    """Check all headers against the manifest and each other; returns the objects whose headers can be trusted."""
    objects: list[CheckedObject] = []
    findings: list[Finding] = []
    key = manifest_key(manifest.name)
    for row in manifest.objects:
        try:
            header = repository.read_header(row)
        except WRONG as error:
            findings.append(Finding(key=row.key, error=error))
            continue
        objects.append(CheckedObject(row=row, header=header))
        findings += [Finding(key=row.key, error=error) for error in contradictions(manifest, row, header)]
    if len(objects) == len(manifest.objects):  # else elements are missing for a reason that was already given
        findings += [Finding(key=key, error=error) for error in _whole_errors(manifest, objects)]
    return objects, findings


def _whole_errors(manifest: Manifest, objects: Sequence[CheckedObject]) -> Iterator[MocError]:
    """Yield what is wrong between objects: elements missing or twice, experts with two steps or an undeclared one."""
    key = manifest_key(manifest.name)
    stored = [row for entry in objects for row in live_shards(manifest, entry.row, entry.header)]
    try:
        tensors = check_coverage(row.shard for row in stored)
        if tensors != manifest.tensors:
            yield CoverageError(f"number of tensors differs: key={key} expected={manifest.tensors} actual={tensors}")
    except CoverageError as error:
        yield error
    steps: dict[Expert, int] = {}
    for row in stored:
        expert = row.shard.expert
        if expert is not None and steps.setdefault(expert, row.step) != row.step:
            yield ShardCorruptError(
                f"expert has two steps: key={key} shard={row.shard.name} expected={steps[expert]} actual={row.step}"
            )
    stale = {(expert, step) for expert, step in steps.items() if step != manifest.name.step}
    for expert, step in sorted(stale ^ {(row.expert, row.step) for row in manifest.stale_experts}):
        declared = "declared but not stored" if (expert, step) not in stale else "stored but not declared"
        place = f"layer={expert.layer} expert={expert.index} step={step}"
        yield ManifestCorruptError(f"stale expert is {declared}: key={key} {place}")


def _check_states(repository: Repository, objects: Sequence[CheckedObject]) -> tuple[list[Finding], int]:
    """Read and decode every state blob: small, and a recovery needs them all."""
    findings: list[Finding] = []
    bytes_read = 0
    for entry in objects:
        if entry.header.state is None:
            continue
        position, length, expected = entry.header.state
        blob = bytearray(length)
        try:
            repository.read_range(entry.row, position, memoryview(blob))
            bytes_read += length
            _require_crc(entry.row.key, STATE_NAME, expected, crc32c(blob))
            try:
                decode_state(memoryview(blob))
            except IntegrityError as error:
                raise ManifestCorruptError(f"state does not decode: key={entry.row.key} {error}") from error
        except WRONG as error:
            findings.append(Finding(key=entry.row.key, error=error))
    return findings, bytes_read


def _sample(name: CheckpointName, entry: CheckedObject, fraction: float, seed: int) -> tuple[Region, ...]:
    """Return the shards and pads to read, by position; which ones follows from the names and the seed alone."""

    def is_chosen(shard: str) -> bool:
        digest = hashlib.blake2b(f"{seed}/{name}/{entry.row.key}/{shard}".encode(), digest_size=8).digest()
        return fraction >= 1 or int.from_bytes(digest, "little") < fraction * 2**64

    regions = [
        Region(name=s.shard.name, position=s.position, length=s.shard.size_bytes, crc32c=s.crc32c)
        for s in entry.header.shards
        if is_chosen(s.shard.name)
    ]
    for position, length in entry.header.pads:
        if is_chosen(f"{PAD_PREFIX}{position}"):
            zeros = crc32c(bytes(length))
            regions.append(Region(name=f"{PAD_PREFIX}{position}", position=position, length=length, crc32c=zeros))
    return tuple(sorted(regions, key=lambda region: (region.position, region.name)))


def windows(regions: Iterable[Region]) -> Iterator[tuple[Region, ...]]:
    """Yield runs of regions that one read covers; a region larger than a window is a run by itself."""
    run: list[Region] = []
    for region in regions:
        end = region.position + region.length
        if run and (
            end - run[0].position > WINDOW_BYTES or region.position - run[-1].position - run[-1].length > GAP_BYTES
        ):
            yield tuple(run)
            run = []
        run.append(region)
    if run:
        yield tuple(run)


def _check_data(
    repository: Repository, work: Iterable[tuple[ObjectRow, tuple[Region, ...]]], progress: Progress | None
) -> tuple[list[Finding], int]:
    """Read the regions by a few threads that share one queue; each holds one window of bytes at a time."""
    queue = ((row, window) for row, regions in work for window in windows(regions))
    lock = threading.Lock()
    findings: list[Finding] = []
    counts: list[int] = []

    def read_until_done() -> None:
        bytes_read = 0
        buffer = memoryview(mmap.mmap(-1, WINDOW_BYTES))  # used again and again: fresh pages cost as much as the read
        while True:
            with lock:
                row, window = next(queue, (None, ()))
            if row is None:
                break
            bytes_read += sum(region.length for region in window)
            errors = _check_window(repository, row, window, buffer, progress)
            with lock:
                findings.extend(Finding(key=row.key, error=error) for error in errors)
        counts.append(bytes_read)

    is_local = repository.store.properties.is_local
    readers = min(READERS_LOCAL, os.cpu_count() or 1) if is_local else READERS_REMOTE
    with ThreadPoolExecutor(readers, thread_name_prefix="moc-verify") as pool:
        for future in [pool.submit(read_until_done) for _ in range(readers)]:
            future.result()
    return findings, sum(counts)


def _check_window(
    repository: Repository, row: ObjectRow, window: Sequence[Region], buffer: memoryview, progress: Progress | None
) -> list[MocError]:
    first, last = window[0].position, max(region.position + region.length for region in window)
    try:
        if last - first > WINDOW_BYTES:
            (region,) = window
            _require_crc(row.key, region.name, region.crc32c, _long_crc(repository, row, region, buffer, progress))
            return []
        view = buffer[: last - first]
        repository.read_range(row, first, view)
        if progress is not None:
            progress(view.nbytes)
    except WRONG as error:
        return [error]
    errors: list[MocError] = []
    for region in window:
        start = region.position - first
        try:
            _require_crc(row.key, region.name, region.crc32c, crc32c(view[start : start + region.length]))
        except ShardCorruptError as error:
            errors.append(error)
    return errors


def _long_crc(
    repository: Repository, row: ObjectRow, region: Region, buffer: memoryview, progress: Progress | None
) -> int:
    """Return the checksum of a region that is too large to hold."""
    actual = 0
    for offset in range(0, region.length, WINDOW_BYTES):
        piece = buffer[: min(WINDOW_BYTES, region.length - offset)]
        repository.read_range(row, region.position + offset, piece)
        actual = crc32c(piece, actual)
        if progress is not None:
            progress(piece.nbytes)
    return actual


def _require_crc(key: str, shard: str, expected: int, actual: int) -> None:
    if expected != actual:
        raise ShardCorruptError(f"checksum mismatch: {key=} {shard=} expected={expected:08x} actual={actual:08x}")


def _life_findings(numbers: Sequence[tuple[str, int]], checkpoints: Sequence[CheckpointName]) -> Iterator[Finding]:
    """Yield what is wrong between the records of lives: one that is missing, two with one number. Pure."""
    for (run, number), (other, next_number) in pairwise(numbers):
        if number == next_number:
            words = f"two lives have one number: number={number} runs={run},{other}"
            yield Finding(key=incarnation_key(other, number), error=ManifestCorruptError(words))
    for run, number in sorted({(name.run, name.incarnation) for name in checkpoints} - set(numbers)):
        words = f"life has checkpoints but no record: run={run} incarnation={number}"
        yield Finding(key=incarnation_key(run, number), error=ManifestCorruptError(words))


def _victim_findings(repository: Repository) -> Iterator[Finding]:
    for entry in repository.victim_lists():
        life = parse_victims_key(entry.key)
        if life is not None:
            try:
                repository.read_victims(*life)
            except IntegrityError as error:
                yield Finding(key=entry.key, error=error)


def _notes(repository: Repository, checkpoints: Sequence[CheckpointName]) -> Iterator[str]:
    """Yield what lies in the repository without being part of a checkpoint, and where its lineage ends too early."""
    for link in repository.lineage():
        if not link.is_known:  # also of a life that never reached the storage, and was recovered from memory
            yield f"lineage ends at a life without a readable record: incarnation={link.incarnation}"
    referenced: set[str] = set()
    for name in checkpoints:
        try:
            referenced |= {row.key for row in repository.read_manifest(name).objects}
        except WRONG:
            continue  # already a finding; its objects count as orphans until it is readable
    for entry in repository.store.list(""):
        if entry.key.startswith(f"{OBJECTS}/"):
            try:
                parse_object_key(entry.key)
            except ManifestCorruptError:
                yield f"unknown file: key={entry.key} size_bytes={entry.size_bytes}"
                continue
            if entry.key not in referenced:
                yield f"object that no checkpoint references: key={entry.key} size_bytes={entry.size_bytes}"
        elif not _is_record(entry.key):
            yield f"unknown file: key={entry.key} size_bytes={entry.size_bytes}"


def _is_record(key: str) -> bool:
    parsers: tuple[Callable[[str], object], ...] = (parse_manifest_key, parse_incarnation_key, parse_victims_key)
    return key == FORMAT_KEY or any(parse(key) is not None for parse in parsers)
