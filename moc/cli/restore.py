"""Copy one checkpoint out of a repository, as files that stand alone.

Formats: moc (a repository with this one checkpoint, from which a job can
resume), deepspeed (for engine.load_checkpoint), safetensors (weights for any
tool). Every byte is checked on the way. Without --step the newest sound
checkpoint of the lineage is taken; what is passed over is said on stderr.

JSON: {"repository", "name", "run", "incarnation", "step", "attempt",
"format", "target": path or URL, "size_bytes", "files": [path] or null,
"experts": [{"layer": int, "steps": [step of each expert]}], "staleness":
{...} as in 'moc show', "plt": float or null (nothing is counted), "rejected":
[{"name", "kind", "message"}]}

Exit codes: 0 restored, 2 target not empty, 3 no such checkpoint, 4 the
checkpoint asked for is not sound, 5 storage unavailable, 6 other format.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moc.cli.choose import Catalogue, choose, read_catalogue
from moc.cli.exits import OK
from moc.cli.experts import expert_map, experts_json, staleness_facts, staleness_json
from moc.cli.options import add_json, add_repository, opened
from moc.cli.output import describe_bytes, name_json, print_facts, print_json, print_map, progress_bar, say
from moc.errors import IntegrityError, MocError, NoCheckpointError, ObjectMissingError, UsageError
from moc.extract import extract
from moc.format.contents import expert_steps
from moc.format.manifest import Manifest
from moc.repository import Repository, StoredCheckpoint
from moc.store.port import Progress
from moc.verify import check_structure

__all__ = ["configure", "run"]

FORMATS = ("moc", "deepspeed", "safetensors")
DEFAULT_FOLDER = "restored"
TEMPORARY_AGE_S = 60.0  # a temporary file that old belongs to an extraction that is dead
UNSOUND = (IntegrityError, ObjectMissingError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was written."""

    manifest: Manifest
    target: str
    files: tuple[str, ...] | None
    experts: Mapping[int, tuple[int, ...]]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", metavar="STEP", help="step, STEP-ATTEMPT or name (default: newest)")
    parser.add_argument("--to", metavar="DIR", help=f"where to, a new or empty folder (default: {DEFAULT_FOLDER}/STEP)")
    parser.add_argument("--format", choices=FORMATS, default="moc", help="default: moc")
    add_repository(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    rejected: list[tuple[StoredCheckpoint, MocError]] = []
    with opened(args) as repository:
        for stored in _wanted(read_catalogue(repository), args.step):
            target = args.to or f"{DEFAULT_FOLDER}/{stored.name.step}"
            try:
                restored = _restore(repository, stored, args.format, target)
                break
            except UNSOUND as error:
                if args.step is not None:
                    raise
                rejected.append((stored, error))
                say(f"moc restore: step {stored.name.step} is not sound, trying the next older one: {error}")
        else:
            raise type(rejected[-1][1])(f"no sound checkpoint: tried={len(rejected)} last: {rejected[-1][1]}")
        url = repository.url
    if args.json:
        print_json(_to_json(url, args.format, restored, rejected))
    else:
        _print(args.format, restored)
    return OK


def _wanted(catalogue: Catalogue, step: str | None) -> Sequence[StoredCheckpoint]:
    if step is not None:
        return (choose(catalogue, step),)
    if catalogue.unreadable is not None:
        raise IntegrityError(
            f"the newest incarnation record is unreadable, so the lineage is unknown: {catalogue.unreadable} "
            "allowed=--step for a checkpoint of your choice"
        )
    if not catalogue.lineage:
        raise NoCheckpointError(
            f"no checkpoint on the lineage: off_chain={len(catalogue.others)} repository={catalogue.url}"
        )
    return catalogue.lineage


def _restore(repository: Repository, stored: StoredCheckpoint, form: str, target: str) -> Restored:
    manifest = repository.read_manifest(stored.name)
    objects, findings = check_structure(repository, manifest)
    if findings:
        raise findings[0].error
    steps = expert_steps(manifest, ((entry.row, entry.header) for entry in objects))
    files = None
    with progress_bar(f"restore step {stored.name.step}", manifest.size_bytes) as progress:
        if form == "moc":
            target = _extract_to(repository, manifest, target, progress)
        else:
            target = os.path.abspath(target)
            files = _export_to(repository, manifest, form, target, progress)
    return Restored(manifest=manifest, target=target, files=files, experts=steps)


def _extract_to(repository: Repository, manifest: Manifest, target: str, progress: Progress) -> str:
    from moc.store.local import LocalStore
    from moc.store.open import open_store

    store = open_store(target)
    folder = store.properties.url if store.properties.is_local else None
    if folder is not None:
        _require_own_folder(folder)
    if isinstance(store, LocalStore):
        store.sweep(older_than_s=TEMPORARY_AGE_S)
    copy = Repository(store)
    try:
        extract(repository, manifest.name, copy, progress, spool=folder)
    finally:
        copy.close()
    return folder or store.properties.url


def _require_own_folder(folder: str) -> None:
    """Raise UsageError for a folder with other files: the store's own listing leaves out names that no key can have."""
    allowed = {"FORMAT", "incarnations", "manifests", "objects"}
    foreign = sorted(set(os.listdir(folder)) - allowed) if os.path.isdir(folder) else []
    foreign = [name for name in foreign if "~" not in name]  # what an interrupted put left
    if foreign:
        raise UsageError(f"target is not empty: path={folder} first={foreign[0]!r} allowed=a new or empty folder")


def _export_to(
    repository: Repository, manifest: Manifest, form: str, target: str, progress: Progress
) -> tuple[str, ...]:
    if form == "deepspeed":
        from moc.adapters.export.deepspeed import export_deepspeed as export
    else:
        from moc.adapters.export.safetensors import export_safetensors as export
    return tuple(str(file) for file in export(repository, manifest, Path(target), progress))


def _print(form: str, restored: Restored) -> None:
    name = restored.manifest.name
    size = describe_bytes(restored.manifest.size_bytes)
    facts = [
        ("restored", f"step {name.step} (incarnation {name.incarnation}, attempt {name.attempt})"),
        ("to", restored.target),
        (
            "format",
            f"{form}, from {len(restored.manifest.objects)} objects, {size}",
        ),
    ]
    lines = expert_map(restored.manifest, restored.experts)
    if not lines:
        facts += [
            (f"MoE layer {layer}", f"all {len(steps)} experts of step {name.step}")
            for layer, steps in restored.experts.items()
        ]
    print_facts(facts + staleness_facts(restored.manifest, restored.experts))
    print_map(lines)


def _to_json(
    url: str, form: str, restored: Restored, rejected: Sequence[tuple[StoredCheckpoint, MocError]]
) -> dict[str, object]:
    return {
        "repository": url,
        **name_json(restored.manifest.name),
        "format": form,
        "target": restored.target,
        "size_bytes": restored.manifest.size_bytes,
        "files": None if restored.files is None else list(restored.files),
        "experts": experts_json(restored.experts),
        "staleness": staleness_json(restored.manifest, restored.experts),
        "plt": restored.manifest.routing and restored.manifest.routing.plt,
        "rejected": [
            {"name": str(stored.name), "kind": type(error).__name__, "message": str(error)}
            for stored, error in rejected
        ],
    }
