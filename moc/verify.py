"""Verification: is a checkpoint what its manifest says, and is a repository what its format says?

Read-only. Everything found wrong becomes a `Finding` and the check goes on; only a store that gives no answer raises.
Without data, manifests, headers and state blobs are checked; with data, also the crc32c of every shard, or of a part of
them that depends on names and a seed only, so that a second run looks at the same bytes. Padding must be zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from moc._native import crc32c
from moc.errors import (
    CoverageError,
    IntegrityError,
    ManifestCorruptError,
    MocError,
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
from moc.format.relative import whole_state
from moc.format.stale import sources
from moc.plan.lineage import chain, is_on_chain
from moc.readback import WRONG, Region, check_data
from moc.repository import Finding, Repository
from moc.state import Expert, check_coverage
from moc.store.port import Progress

__all__ = [
    "CheckedObject",
    "RepositoryReport",
    "VerifyReport",
    "check_states",
    "check_structure",
    "data_bytes",
    "verify_checkpoint",
    "verify_repository",
]

STATE_NAME = "state"
PAD_PREFIX = "__pad__/"


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
    findings += _source_findings(repository, manifest)
    bytes_read = sum(entry.row.header_bytes for entry in objects)
    found, state_bytes = check_states(repository, objects)
    findings += found
    shards, data_read = 0, 0
    if read_data_fraction > 0:
        work = [(o.row, _sample(name, o, read_data_fraction, seed)) for o in objects]
        shards = sum(not region.name.startswith(PAD_PREFIX) for _, regions in work for region in regions)
        wrong, data_read = check_data(repository, work, progress)
        findings += [Finding(key=key, error=error) for key, error in wrong]
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


def _source_findings(repository: Repository, manifest: Manifest) -> Iterator[Finding]:
    """Yield sources of experts that did not lead to the checkpoint, as far as there are records of their lives.

    A checkpoint that was taken out of its repository has no record of earlier lives.
    """
    name = manifest.name
    others = [source for source in sources(manifest.stale_experts) if source.incarnation != name.incarnation]
    if not others:
        return
    records, _ = repository.incarnations()
    by_number = {record.number: record for record in records if record.run == name.run}
    links = chain(by_number, name.incarnation)
    end = links[-1]
    for source in others:
        is_judged = source.incarnation in by_number and (end.is_known or source.incarnation > end.incarnation)
        # At the step of a fork any attempt will do: within a life they have the same state.
        if is_judged and not is_on_chain(links, source.incarnation, source.step):
            words = f"experts come from a checkpoint that did not lead to this one: name={name} source={source}"
            yield Finding(key=manifest_key(name), error=ManifestCorruptError(words))


def check_states(repository: Repository, objects: Sequence[CheckedObject]) -> tuple[list[Finding], int]:
    """Read and decode every state blob, since a recovery needs them all; returns the bytes read as well."""
    findings: list[Finding] = []
    dense = {entry.header.rank: entry for entry in objects if entry.header.state is not None}
    damaged: set[int] = set()

    @lru_cache(maxsize=2)  # a rank's own, and the one that most are relative to
    def read(rank: int) -> bytes:
        return repository.read_state(dense[rank].row, dense[rank].header)

    for rank, entry in sorted(dense.items()):
        asked: list[int] = []

        def fetch(other: int, asked: list[int] = asked) -> bytes:
            asked.append(other)
            if other in damaged:
                raise ManifestCorruptError(f"state is relative to a damaged one: base={other}")
            return read(other)

        try:
            whole_state(rank, dense, fetch)
        except WRONG as error:
            if damaged.isdisjoint(asked):  # else it is the other rank's fault, and that has been said
                words = f"state does not decode: key={entry.row.key} {error}"
                is_decoding = isinstance(error, ManifestCorruptError)
                findings.append(Finding(key=entry.row.key, error=ManifestCorruptError(words) if is_decoding else error))
            damaged.add(rank)
    return findings, sum(entry.header.state[1] for entry in dense.values() if entry.header.state is not None)


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
