"""Show what one checkpoint holds, from its manifest alone.

Where experts are older than the checkpoint, headers are read as well, and a map
shows the step of every expert: '.' for the checkpoint's own, digits for older
ones, '9' the oldest; a count behind a layer is what a restore would lose.

STEP is a step, which prefers the lineage, or STEP-ATTEMPT, or a whole name as
printed by 'moc ls --json'. Without it: the newest on the lineage.

JSON: {"repository", "name", "run", "incarnation", "step", "attempt",
"parent": {"incarnation", "step", "attempt"} or null, "is_on_lineage": bool,
"is_finite": bool, "modified_s", "size_bytes", "tensors", "catalog_digest",
"topology": {...}, "fingerprint": {...}, "versions": {...}, "plt": {"basis",
"routed": [[of each expert] of each layer], "lost": the same} or null,
"stale_experts": [[layer, expert, step, source, routed]], "written_bytes",
"experts": [{"layer", "steps": [of each expert]}] or null (nothing is stale),
"staleness": {"oldest_step", "mean_steps_behind", "plt", "plt_if_restored",
"lost_if_restored": [of each layer]; null where nothing is counted} or null,
"lives": [{"number", "reason", "parent", "last_step"}] newest first, "objects":
[{"key", "rank", "piece", "size_bytes", "header_bytes", "header_crc32c"}]}

Exit codes: 0 ok, 3 no such checkpoint, 4 manifest is corrupt, 5 storage
unavailable, 6 other format.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping

from moc.cli.choose import Catalogue, choose, read_catalogue
from moc.cli.exits import OK
from moc.cli.experts import Steps, expert_map, experts_json, staleness_facts, staleness_json
from moc.cli.options import add_json, add_repository, opened
from moc.cli.output import describe_age, describe_bytes, name_json, print_facts, print_json, print_map, say
from moc.diff import open_side
from moc.errors import IntegrityError, NoCheckpointError, ObjectMissingError
from moc.format.contents import expert_steps
from moc.format.keys import parse_object_key
from moc.format.manifest import Incarnation, Manifest, Parent
from moc.plan.lineage import Link, chain
from moc.repository import Repository, StoredCheckpoint

__all__ = ["configure", "run"]

VALUE_COLUMNS = 64  # what is left of 80 after the names


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", metavar="STEP", nargs="?", help="step, STEP-ATTEMPT or name (default: newest)")
    parser.add_argument("--objects", action="store_true", help="list every object")
    add_repository(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with opened(args) as repository:
        catalogue = read_catalogue(repository)
        stored = chosen_or_newest(catalogue, args.step)
        manifest = repository.read_manifest(stored.name)
        lives = _lives(repository, stored)
        steps = _expert_steps(repository, manifest)
    is_on_lineage = stored in catalogue.lineage
    if args.json:
        print_json(_to_json(catalogue.url, stored, manifest, lives, is_on_lineage, steps))
    else:
        print_facts(_facts(stored, manifest, lives, is_on_lineage, steps))
        print_map(expert_map(manifest, steps or {}))
        if args.objects:
            print()
            for row in manifest.objects:
                print(f"{row.key}  {row.size_bytes}")
    return OK


def chosen_or_newest(catalogue: Catalogue, step: str | None) -> StoredCheckpoint:
    """Return the checkpoint asked for, else the first that recovery would try."""
    if step is not None:
        return choose(catalogue, step)
    if not catalogue.lineage:
        raise NoCheckpointError(
            f"no checkpoint on the lineage: off_chain={len(catalogue.others)} repository={catalogue.url}"
        )
    return catalogue.lineage[0]


def _expert_steps(repository: Repository, manifest: Manifest) -> Steps | None:
    """Return the steps of all experts; None where none is stale, or a damaged object hides it."""
    if not manifest.stale_experts:
        return None
    try:
        return expert_steps(manifest, open_side(repository, manifest).headers)
    except (IntegrityError, ObjectMissingError) as error:
        say(f"moc show: the steps of all experts are not known: {error}")
        return None


def _lives(repository: Repository, stored: StoredCheckpoint) -> list[tuple[Incarnation, Link]]:
    """Return the lives that led to the checkpoint, newest first."""
    records, _ = repository.incarnations()
    by_number = {record.number: record for record in records if record.run == stored.name.run}
    links = chain(by_number, stored.name.incarnation)
    return [(by_number[link.incarnation], link) for link in links if link.is_known]


def _to_json(
    url: str,
    stored: StoredCheckpoint,
    manifest: Manifest,
    lives: list[tuple[Incarnation, Link]],
    is_on_lineage: bool,
    steps: Steps | None,
) -> dict[str, object]:
    is_known = steps is not None or not manifest.stale_experts
    return {
        "repository": url,
        **name_json(manifest.name),
        "parent": manifest.parent and manifest.parent.to_json(),
        "is_on_lineage": is_on_lineage,
        "is_finite": manifest.is_finite,
        "modified_s": stored.modified_s or None,
        "size_bytes": manifest.size_bytes,
        "tensors": manifest.tensors,
        "catalog_digest": manifest.catalog_digest,
        "topology": dict(manifest.topology),
        "fingerprint": dict(manifest.fingerprint),
        "versions": dict(manifest.versions),
        "plt": manifest.routing and manifest.routing.to_json(),
        "stale_experts": [row.to_json() for row in manifest.stale_experts],
        "written_bytes": manifest.written_bytes,
        "experts": None if steps is None else experts_json(steps),
        "staleness": staleness_json(manifest, steps or {}) if is_known else None,
        "lives": [
            {
                "number": record.number,
                "reason": record.reason,
                "parent": record.parent and record.parent.to_json(),
                "last_step": link.last_step,
            }
            for record, link in lives
        ],
        "objects": [
            {
                "key": row.key,
                "rank": parse_object_key(row.key)[1],
                "piece": parse_object_key(row.key)[2],
                "size_bytes": row.size_bytes,
                "header_bytes": row.header_bytes,
                "header_crc32c": row.header_crc32c,
            }
            for row in manifest.objects
        ],
    }


def _facts(
    stored: StoredCheckpoint,
    manifest: Manifest,
    lives: list[tuple[Incarnation, Link]],
    is_on_lineage: bool,
    steps: Steps | None,
) -> list[tuple[str, str]]:
    name = manifest.name
    dense = [row.size_bytes for row in manifest.objects if parse_object_key(row.key)[2] == "d"]
    experts = [row.size_bytes for row in manifest.objects if parse_object_key(row.key)[2] != "d"]
    facts = [
        ("checkpoint", str(name)),
        ("step", str(name.step)),
        ("lineage", "yes" if is_on_lineage else "no, off-chain"),
        ("parent", _describe_parent(manifest.parent)),
        ("age", describe_age(time.time() - stored.modified_s) if stored.modified_s else "unknown"),
        ("values", "all finite" if manifest.is_finite else "some are NaN or infinite"),
        ("size", describe_bytes(manifest.size_bytes)),
        ("tensors", str(manifest.tensors)),
        ("dense", f"{len(dense)} objects, {describe_bytes(sum(dense))}, step {name.step}"),
        ("experts", f"{len(experts)} objects, {describe_bytes(sum(experts))}, {_describe_steps(manifest)}"),
    ]
    if manifest.written_bytes != manifest.size_bytes:
        shared = manifest.size_bytes - manifest.written_bytes
        words = f"{describe_bytes(manifest.written_bytes)}, and {describe_bytes(shared)} by earlier attempts"
        facts.append(("written", words))
    facts += staleness_facts(manifest, steps or {})
    facts += _mapping_facts("topology", manifest.topology)
    facts += _mapping_facts("versions", manifest.versions)
    facts += _mapping_facts("fingerprint", manifest.fingerprint)
    for index, (record, link) in enumerate(lives):
        limit = "" if link.last_step is None else f", up to step {link.last_step}"
        facts.append(("lives" if index == 0 else "", f"{record.number} ({record.reason}{limit})"))
    return facts


def _describe_steps(manifest: Manifest) -> str:
    if not manifest.stale_experts:
        return f"all of step {manifest.name.step}"
    oldest = min(row.step for row in manifest.stale_experts)
    return f"{len(manifest.stale_experts)} older than step {manifest.name.step}, the oldest of step {oldest}"


def _describe_parent(parent: Parent | None) -> str:
    if parent is None:
        return "none"
    return f"step {parent.step}, incarnation {parent.incarnation}, " + (parent.attempt or "from memory")


def _mapping_facts(title: str, mapping: Mapping[str, object]) -> list[tuple[str, str]]:
    facts = []
    for index, (key, value) in enumerate(sorted(mapping.items())):
        text = f"{key} = {value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        short = text if len(text) <= VALUE_COLUMNS else text[: VALUE_COLUMNS - 3] + "..."
        facts.append((title if index == 0 else "", short))
    return facts
