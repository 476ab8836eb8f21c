"""Manifests and incarnation records: the small records that decide what exists and what led to it; and victim lists.

What decodes does not contradict itself, and encodes to the same bytes again as long as it has no unknown fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from moc.errors import FormatUnsupportedError, ManifestCorruptError, TopologyError
from moc.format.canonical import RECORD_LIMIT_BYTES, Fields, open_record, seal_record
from moc.format.keys import (
    ATTEMPT_PATTERN,
    INCARNATION_LIMIT,
    LAST_STEP,
    RUN_PATTERN,
    CheckpointName,
    parse_object_key,
)
from moc.format.object import ALIGNMENT, HEADER_LIMIT_BYTES
from moc.topology import Topology

__all__ = [
    "FORMAT_VERSION",
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
FEATURES: tuple[str, ...] = ()
"""Features that a repository may require and that this version has."""
FORMAT_LIMIT_BYTES = 4096
CRC_LIMIT = (1 << 32) - 1


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
class ObjectRow:
    """One object of a checkpoint: its key, sizes in bytes, and the crc32c of its header."""

    key: str
    size_bytes: int
    header_bytes: int
    header_crc32c: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One checkpoint.

    `tensors` is the number of (tensor, part) pairs its objects cover; `plt` counts lost and routed tokens per layer.
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
    stale_experts: tuple[tuple[int, int, int], ...] = ()
    plt: Mapping[str, object] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(row.size_bytes for row in self.objects)


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
            "version": FORMAT_VERSION,
            "run": name.run,
            "incarnation": name.incarnation,
            "step": name.step,
            "attempt": name.attempt,
            "parent": None if manifest.parent is None else manifest.parent.to_json(),
            "topology": dict(manifest.topology),
            "catalog_digest": manifest.catalog_digest,
            "tensors": manifest.tensors,
            "objects": [
                {"key": r.key, "size": r.size_bytes, "header": r.header_bytes, "header_crc32c": r.header_crc32c}
                for r in sorted(manifest.objects, key=lambda r: r.key)
            ],
            "fingerprint": dict(manifest.fingerprint),
            "versions": dict(manifest.versions),
            "is_finite": manifest.is_finite,
            "stale_experts": [list(row) for row in manifest.stale_experts],
            "plt": dict(manifest.plt),
        }
    )


def decode_manifest(encoded: bytes, *, name: str) -> Manifest:
    """Parse and check a manifest; raises ManifestCorruptError naming `name`."""
    fields = open_record(encoded, name=name)
    _check_version(fields)
    checkpoint = CheckpointName(
        run=fields.text("run", RUN_PATTERN),
        incarnation=fields.integer("incarnation", minimum=1, maximum=INCARNATION_LIMIT),
        step=fields.integer("step", maximum=LAST_STEP),
        attempt=fields.text("attempt", ATTEMPT_PATTERN),
    )
    parent = _parent(fields.optional("parent"))
    if parent is not None and not _is_earlier(parent, checkpoint):
        raise fields.wrong("parent", "an earlier moment")
    objects = tuple(_object_row(row) for row in fields.objects("objects"))
    _check_objects(fields, checkpoint, objects)
    return Manifest(
        name=checkpoint,
        parent=parent,
        topology=_topology(fields),
        catalog_digest=fields.text("catalog_digest", "[0-9a-f]{16}"),
        tensors=fields.integer("tensors"),
        objects=objects,
        fingerprint=fields.mapping("fingerprint"),
        versions=fields.mapping("versions"),
        is_finite=fields.boolean("is_finite"),
        stale_experts=tuple(_stale(row, checkpoint, fields.name) for row in fields.rows("stale_experts")),
        plt=fields.mapping("plt"),
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


def _check_version(fields: Fields) -> None:
    version = fields.integer("version")
    if version != FORMAT_VERSION:
        raise FormatUnsupportedError(
            f"record has another format version: name={fields.name} version={version} allowed={FORMAT_VERSION}"
        )


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


def _object_row(row: Fields) -> ObjectRow:
    header_bytes = row.integer("header", minimum=ALIGNMENT, maximum=HEADER_LIMIT_BYTES)
    if header_bytes % ALIGNMENT:
        raise row.wrong("header", f"a multiple of {ALIGNMENT}")
    return ObjectRow(
        key=row.text("key"),  # parsed by `_check_objects`
        size_bytes=row.integer("size", minimum=header_bytes),
        header_bytes=header_bytes,
        header_crc32c=row.integer("header_crc32c", maximum=CRC_LIMIT),
    )


def _check_objects(fields: Fields, name: CheckpointName, objects: tuple[ObjectRow, ...]) -> None:
    """Raise ManifestCorruptError unless each object may belong to the checkpoint and each rank has a dense one."""
    keys = [row.key for row in objects]
    dense_ranks = []
    for key in keys:
        owner, rank, piece = parse_object_key(key)
        is_earlier = owner.run == name.run and owner.incarnation <= name.incarnation and owner.step <= name.step
        if not is_earlier or (piece == "d" and owner != name):
            raise ManifestCorruptError(f"object is of another attempt: name={fields.name} object={key}")
        if piece == "d":
            dense_ranks.append(rank)
    for first, second in pairwise(keys):
        if first >= second:
            what = "named twice" if first == second else "out of order"
            raise ManifestCorruptError(f"object is {what}: name={fields.name} object={second}")
    world_size = fields.mapping("topology").get("world_size")
    if type(world_size) is not int or dense_ranks != list(range(min(world_size, len(objects) + 1))):
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


def _stale(row: object, checkpoint: CheckpointName, name: str) -> tuple[int, int, int]:
    is_row = isinstance(row, list) and len(row) == 3 and all(type(n) is int and n >= 0 for n in row)
    if not isinstance(row, list) or not is_row or row[2] >= checkpoint.step:
        raise ManifestCorruptError(f"record field is wrong: name={name} field=stale_experts given={row!r}")
    return (row[0], row[1], row[2])
