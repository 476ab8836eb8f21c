"""Manifests and incarnation records: the two kinds of small record that decide what exists and what led to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from moc.errors import FormatUnsupportedError, ManifestCorruptError, UsageError
from moc.format.canonical import Fields, open_record, seal_record
from moc.format.keys import CheckpointName, check_run_id, parse_object_key

__all__ = [
    "FORMAT_VERSION",
    "RECORD_LIMIT_BYTES",
    "Incarnation",
    "Manifest",
    "ObjectRow",
    "Parent",
    "decode_format",
    "decode_incarnation",
    "decode_manifest",
    "encode_format",
    "encode_incarnation",
    "encode_manifest",
]

FORMAT_VERSION = 1
FEATURES: tuple[str, ...] = ()
"""Features that a repository may require and that this version has."""
RECORD_LIMIT_BYTES = 1 << 28


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
    lines = content.decode("utf-8", "replace").splitlines()
    match = re.fullmatch(r"moc repository (\d+)", lines[0]) if lines else None
    if match is None:
        raise FormatUnsupportedError(f"not a moc repository: url={url} first_line={(lines or [''])[0][:60]!r}")
    if int(match[1]) != FORMAT_VERSION:
        raise FormatUnsupportedError(
            f"repository has another format version: url={url} version={match[1]} allowed={FORMAT_VERSION}"
        )
    for line in lines[1:]:
        if not line.startswith("requires ") or line.removeprefix("requires ") not in FEATURES:
            raise FormatUnsupportedError(
                f"repository needs an unknown feature: url={url} line={line[:60]!r} allowed={list(FEATURES)}"
            )


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
    return Incarnation(
        run=_run(fields),
        number=fields.integer("number", minimum=1),
        token=fields.text("token"),
        parent=_parent(fields.optional("parent")),
        reason=fields.text("reason"),
        fingerprint=fields.mapping("fingerprint"),
    )


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
    objects = []
    for row in fields.objects("objects"):
        parse_object_key(row.text("key"))
        objects.append(
            ObjectRow(
                key=row.text("key"),
                size_bytes=row.integer("size"),
                header_bytes=row.integer("header", minimum=1),
                header_crc32c=row.integer("header_crc32c"),
            )
        )
    return Manifest(
        name=CheckpointName(
            run=_run(fields),
            incarnation=fields.integer("incarnation", minimum=1),
            step=fields.integer("step"),
            attempt=fields.text("attempt"),
        ),
        parent=_parent(fields.optional("parent")),
        topology=fields.mapping("topology"),
        catalog_digest=fields.text("catalog_digest"),
        tensors=fields.integer("tensors"),
        objects=tuple(objects),
        fingerprint=fields.mapping("fingerprint"),
        versions=fields.mapping("versions"),
        is_finite=fields.boolean("is_finite"),
        stale_experts=tuple(_stale(row, fields.name) for row in fields.rows("stale_experts")),
        plt=fields.mapping("plt"),
    )


def _check_version(fields: Fields) -> None:
    version = fields.integer("version")
    if version != FORMAT_VERSION:
        raise FormatUnsupportedError(
            f"record has another format version: name={fields.name} version={version} allowed={FORMAT_VERSION}"
        )


def _run(fields: Fields) -> str:
    try:
        return check_run_id(fields.text("run"))
    except UsageError as error:
        raise ManifestCorruptError(f"record field is wrong: name={fields.name} field=run {error}") from error


def _parent(fields: Fields | None) -> Parent | None:
    if fields is None:
        return None
    attempt = None if fields.body.get("attempt") is None else fields.text("attempt")
    return Parent(incarnation=fields.integer("incarnation", minimum=1), step=fields.integer("step"), attempt=attempt)


def _stale(row: object, name: str) -> tuple[int, int, int]:
    if not (isinstance(row, list) and len(row) == 3 and all(type(n) is int and n >= 0 for n in row)):
        raise ManifestCorruptError(f"record field is wrong: name={name} field=stale_experts given={row!r}")
    return (row[0], row[1], row[2])
