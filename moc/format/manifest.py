"""Manifests and incarnation records: the small records that decide what exists and what led to it; and victim lists.

What decodes does not contradict itself, and encodes to the same bytes again as long as it is of the present version and
has no unknown fields.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from moc.errors import FormatUnsupportedError, InternalError, ManifestCorruptError, TopologyError
from moc.format.canonical import RECORD_LIMIT_BYTES, Fields, open_record, seal_record
from moc.format.columns import Block, ObjectRow, decode_blocks, decode_rows, encode_blocks, objects_of
from moc.format.keys import (
    ATTEMPT_PATTERN,
    INCARNATION_LIMIT,
    LAST_STEP,
    RUN_PATTERN,
    CheckpointName,
    parse_object_key,
    parse_object_keys,
)
from moc.format.stale import StaleExpert, check_owners, decode_stale, encode_stale
from moc.routing import Routing
from moc.state import Expert
from moc.topology import Topology

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_VERSION",
    "RECORD_LIMIT_BYTES",
    "Incarnation",
    "Manifest",
    "ObjectRow",
    "Parent",
    "decode_format",
    "decode_incarnation",
    "decode_lineage",
    "decode_manifest",
    "decode_victims",
    "encode_format",
    "encode_incarnation",
    "encode_lineage",
    "encode_manifest",
    "encode_victims",
]

FORMAT_VERSION = 1
MANIFEST_VERSION = 2  # 1 has a row per object; it is read, and not written any more
FEATURES: tuple[str, ...] = ()
"""Features that a repository may require and that this version has."""
FORMAT_LIMIT_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """What a life or a checkpoint grew from; `attempt` is None when it was a snapshot in memory.

    `step` is `keys.LAST_STEP` where a life includes its parent as a whole.
    """

    incarnation: int
    step: int
    attempt: str | None

    def to_json(self) -> dict[str, object]:
        return {"incarnation": self.incarnation, "step": self.step, "attempt": self.attempt}


@dataclass(frozen=True, slots=True, kw_only=True)
class Incarnation:
    """One life of the job. `token` tells two records with the same number apart; `reason` is one of `REASONS`."""

    run: str
    number: int
    token: str
    parent: Parent | None
    reason: str
    fingerprint: Mapping[str, object] = field(default_factory=dict)

    REASONS = ("start", "recover", "rewind", "load_checkpoint", "weights", "gc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One checkpoint.

    `tensors` is the number of (tensor, part) pairs its objects cover; `stale_experts` is sorted by expert, each once;
    `routing` is None where nothing counts routes.
    """

    name: CheckpointName
    parent: Parent | None
    topology: Mapping[str, object]
    catalog_digest: str
    tensors: int
    objects: tuple[ObjectRow, ...]
    fingerprint: Mapping[str, object]
    versions: Mapping[str, object]
    is_finite: bool
    stale_experts: tuple[StaleExpert, ...] = ()
    routing: Routing | None = None

    def __post_init__(self) -> None:
        for first, second in pairwise(self.stale_experts):
            if first.expert >= second.expert:
                raise InternalError(f"stale experts are not sorted, each once: name={self.name} at={second.expert}")

    @property
    def size_bytes(self) -> int:
        return sum(row.size_bytes for row in self.objects)

    @property
    def written_bytes(self) -> int:
        """Return the size of the objects that this attempt has written itself."""
        owners = parse_object_keys(row.key for row in self.objects)
        return sum(row.size_bytes for row, (owner, *_) in zip(self.objects, owners, strict=True) if owner == self.name)

    def version(self, expert: Expert) -> tuple[CheckpointName, int]:
        """Return the attempt whose objects hold the expert's bytes, and the step of these bytes."""
        place = (expert.layer, expert.index)
        at = bisect_left(self.stale_experts, place, key=lambda row: (row.expert.layer, row.expert.index))
        if at < len(self.stale_experts) and self.stale_experts[at].expert == expert:
            return self.stale_experts[at].source, self.stale_experts[at].step
        return self.name, self.name.step


def encode_format() -> bytes:
    """Return the content of the FORMAT object."""
    return f"moc repository {FORMAT_VERSION}\n".encode() + "".join(f"requires {f}\n" for f in FEATURES).encode()


def decode_format(content: bytes, *, url: str) -> None:
    """Raise FormatUnsupportedError unless this version can read and write the repository."""
    first, *lines = content.decode("utf-8", "replace").split("\n")
    match = re.fullmatch(r"moc repository ([1-9]\d{0,8})", first, re.ASCII)
    if match is None or len(content) > FORMAT_LIMIT_BYTES:
        raise FormatUnsupportedError(f"not a moc repository: url={url} first_line={first[:60]!r} bytes={len(content)}")
    if int(match[1]) != FORMAT_VERSION:
        raise FormatUnsupportedError(
            f"repository has another format version: url={url} version={match[1]} allowed={FORMAT_VERSION}"
        )
    for line in lines[:-1]:
        if not line.startswith("requires ") or line.removeprefix("requires ") not in FEATURES:
            raise FormatUnsupportedError(
                f"repository needs an unknown feature: url={url} line={line[:60]!r} allowed={list(FEATURES)}"
            )
    if not lines or lines[-1]:
        raise FormatUnsupportedError(f"FORMAT is cut off: url={url} bytes={len(content)} allowed=whole lines")


def encode_incarnation(record: Incarnation) -> bytes:
    return seal_record(
        {
            "version": FORMAT_VERSION,
            "run": record.run,
            "number": record.number,
            "token": record.token,
            "parent": None if record.parent is None else record.parent.to_json(),
            "reason": record.reason,
            "fingerprint": dict(record.fingerprint),
        }
    )


def decode_incarnation(encoded: bytes, *, name: str) -> Incarnation:
    fields = open_record(encoded, name=name)
    _check_version(fields)
    record = Incarnation(
        run=fields.text("run", RUN_PATTERN),
        number=fields.integer("number", minimum=1, maximum=INCARNATION_LIMIT),
        token=fields.text("token", ATTEMPT_PATTERN),
        parent=_parent(fields.optional("parent")),
        reason=fields.text("reason", "|".join(Incarnation.REASONS)),
        fingerprint=fields.mapping("fingerprint"),
    )
    if record.parent is not None and record.parent.incarnation >= record.number:
        raise fields.wrong("parent", "an earlier life")
    return record


def encode_lineage(lives: Iterable[Incarnation]) -> list[str]:
    """Return lives for an arena's descriptor, which has their fingerprint once: else it would grow with every life."""
    return [encode_incarnation(replace(life, fingerprint={})).decode() for life in lives]


def decode_lineage(texts: Iterable[object], *, fingerprint: Mapping[str, object]) -> list[Incarnation]:
    """Return the lives of an arena's descriptor; those before the newest may have differed where the user allowed it.

    Raises: ManifestCorruptError.
    """
    lives = (decode_incarnation(str(text).encode(), name="arena lineage") for text in texts)
    return [replace(life, fingerprint=fingerprint) for life in lives]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest's bytes: a pure function of its value."""
    name = manifest.name
    return seal_record(
        {
            "version": MANIFEST_VERSION,
            "run": name.run,
            "incarnation": name.incarnation,
            "step": name.step,
            "attempt": name.attempt,
            "parent": None if manifest.parent is None else manifest.parent.to_json(),
            "topology": dict(manifest.topology),
            "catalog_digest": manifest.catalog_digest,
            "tensors": manifest.tensors,
            "objects": encode_blocks(manifest.objects),
            "fingerprint": dict(manifest.fingerprint),
            "versions": dict(manifest.versions),
            "is_finite": manifest.is_finite,
            "plt": {} if manifest.routing is None else manifest.routing.to_json(),
            **encode_stale(manifest.stale_experts),
        }
    )


def decode_manifest(encoded: bytes, *, name: str) -> Manifest:
    """Parse and check a manifest of any version; raises ManifestCorruptError naming `name`."""
    fields = open_record(encoded, name=name)
    version = _check_version(fields, newest=MANIFEST_VERSION)
    checkpoint = CheckpointName(
        run=fields.text("run", RUN_PATTERN),
        incarnation=fields.integer("incarnation", minimum=1, maximum=INCARNATION_LIMIT),
        step=fields.integer("step", maximum=LAST_STEP),
        attempt=fields.text("attempt", ATTEMPT_PATTERN),
    )
    parent = _parent(fields.optional("parent"))
    if parent is not None and not _is_earlier(parent, checkpoint):
        raise fields.wrong("parent", "an earlier moment")
    blocks = decode_rows(fields) if version == 1 else decode_blocks(fields, checkpoint.run)
    stale = decode_stale(fields, checkpoint)
    _check_objects(fields, checkpoint, blocks, stale)
    return Manifest(
        name=checkpoint,
        parent=parent,
        topology=_topology(fields),
        catalog_digest=fields.text("catalog_digest", "[0-9a-f]{16}"),
        tensors=fields.integer("tensors"),
        objects=objects_of(blocks),
        fingerprint=fields.mapping("fingerprint"),
        versions=fields.mapping("versions"),
        is_finite=fields.boolean("is_finite"),
        stale_experts=stale,
        routing=_routing(fields),
    )


def encode_victims(victims: Iterable[str]) -> bytes:
    """Return the list of objects that a life is about to delete."""
    return seal_record({"victims": sorted(victims)})


def decode_victims(encoded: bytes, *, name: str, run: str) -> tuple[str, ...]:
    """Return the listed object keys, sorted.

    Raises ManifestCorruptError for a list that names anything but objects of this run, so that nothing else is deleted.
    """
    fields = open_record(encoded, name=name)
    victims = fields.rows("victims")
    if not all(isinstance(key, str) for key in victims) or victims != sorted(set(victims)):
        raise fields.wrong("victims", "object keys, sorted, each once")
    for key in victims:
        if parse_object_key(key)[0].run != run:
            raise ManifestCorruptError(f"victim belongs to another run: name={name} victim={key} allowed={run}")
    return tuple(victims)


def _check_version(fields: Fields, *, newest: int = FORMAT_VERSION) -> int:
    """Return the record's version; raises FormatUnsupportedError for one that this version of moc does not know."""
    version = fields.integer("version")
    if not 1 <= version <= newest:
        raise FormatUnsupportedError(
            f"record has another format version: name={fields.name} version={version} allowed=1 to {newest}"
        )
    return version


def _parent(fields: Fields | None) -> Parent | None:
    if fields is None:
        return None
    return Parent(
        incarnation=fields.integer("incarnation", minimum=1, maximum=INCARNATION_LIMIT),
        step=fields.integer("step", maximum=LAST_STEP),
        attempt=None if fields.is_null("attempt") else fields.text("attempt", ATTEMPT_PATTERN),
    )


def _is_earlier(parent: Parent, name: CheckpointName) -> bool:
    """Return whether a checkpoint can have grown from `parent`: of an earlier life, or saved before it in its own."""
    if parent.incarnation != name.incarnation:
        return parent.incarnation < name.incarnation
    return parent.attempt is not None and (parent.step, parent.attempt) < (name.step, name.attempt)


def _check_objects(
    fields: Fields, name: CheckpointName, blocks: Sequence[Block], stale: tuple[StaleExpert, ...]
) -> None:
    """Raise ManifestCorruptError unless each object may belong to the checkpoint and each rank has a dense one."""
    check_owners(fields, name, stale, blocks)
    dense_ranks = next((list(block.ranks) for block in blocks if block.piece == "d"), [])
    world_size = fields.mapping("topology").get("world_size")
    if type(world_size) is not int or dense_ranks != list(range(min(world_size, len(dense_ranks) + 1))):
        raise ManifestCorruptError(
            f"dense objects are not one per rank: name={fields.name} expected_ranks={world_size} "
            f"actual={len(dense_ranks)}"
        )


def _topology(fields: Fields) -> Mapping[str, object]:
    topology = fields.mapping("topology")
    try:
        Topology.from_json(topology)
    except (TopologyError, LookupError, TypeError, ValueError) as error:
        raise ManifestCorruptError(f"record field is wrong: name={fields.name} field=topology {error}") from error
    return topology


def _routing(fields: Fields) -> Routing | None:
    counts = fields.mapping("plt")
    if not counts:
        return None
    try:
        return Routing.from_json(counts)
    except (TypeError, ValueError) as error:
        raise ManifestCorruptError(f"record field is wrong: name={fields.name} field=plt {error}") from error
