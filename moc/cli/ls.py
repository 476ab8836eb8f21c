"""List the checkpoints of a repository, oldest life of the job first.

The last column says what a checkpoint is to the next launch:
  newest      recovery from storage takes this one
  lineage     led to the present state
  off-chain   an abandoned future (a rewind, a late commit): never recovered
  not-finite  holds NaN or infinite values
  corrupt     its manifest does not pass its checksum
Where checkpoints share experts with earlier ones there are two more columns:
WRITTEN, how much of SIZE a checkpoint wrote itself, and STALE, how many of its
experts are of an earlier step.

JSON: {"repository": str, "lineage": [{"incarnation": int, "last_step": int or
null}], "checkpoints": [{"name", "run", "incarnation", "step", "attempt",
"size_bytes": int or null, "written_bytes": of these, what this attempt wrote,
"objects": int or null, "stale_experts": int or null, "modified_s": seconds
since the epoch or null, "is_on_lineage": bool, "is_newest": bool, "is_finite":
bool or null, "error": str or null}], "findings": [{"key", "kind", "message"}]}
Null stands for what a corrupt manifest cannot tell.

Exit codes: 0 ok, 3 not a repository, 5 storage unavailable, 6 other format.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from moc.cli.choose import read_catalogue
from moc.cli.exits import OK
from moc.cli.options import add_json, add_repository, opened
from moc.cli.output import describe_age, describe_bytes, finding_json, name_json, print_json, print_table, say
from moc.errors import IntegrityError, MocError, ObjectMissingError, UsageError
from moc.format.manifest import Manifest
from moc.repository import Repository, StoredCheckpoint

__all__ = ["configure", "run"]

UNREADABLE = (IntegrityError, ObjectMissingError, UsageError)
CONCURRENT_READS = 16  # manifests are small: against a remote store only waiting counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checkpoint and what could be learned of it."""

    stored: StoredCheckpoint
    manifest: Manifest | None
    error: str | None
    is_on_lineage: bool
    is_newest: bool

    def to_json(self) -> dict[str, object]:
        return {
            **name_json(self.stored.name),
            "size_bytes": self.manifest and self.manifest.size_bytes,
            "written_bytes": self.manifest and self.manifest.written_bytes,
            "objects": self.manifest and len(self.manifest.objects),
            "stale_experts": self.manifest and len(self.manifest.stale_experts),
            "modified_s": self.stored.modified_s or None,
            "is_on_lineage": self.is_on_lineage,
            "is_newest": self.is_newest,
            "is_finite": self.manifest and self.manifest.is_finite,
            "error": self.error,
        }

    def marks(self) -> str:
        marks = ["newest" if self.is_newest else "lineage" if self.is_on_lineage else "off-chain"]
        if self.manifest is None:
            marks.append("corrupt")
        elif not self.manifest.is_finite:
            marks.append("not-finite")
        return " ".join(marks)


def configure(parser: argparse.ArgumentParser) -> None:
    add_repository(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with opened(args) as repository:
        catalogue = read_catalogue(repository)
        contents = _read_manifests(repository, catalogue.everything)
        _, findings = repository.incarnations()
    on_lineage = {stored.name for stored in catalogue.lineage}
    newest = next((c.name for c in catalogue.lineage if isinstance(contents[c.name], Manifest)), None)
    rows = []
    for stored in catalogue.everything:
        content = contents[stored.name]
        rows.append(
            Row(
                stored=stored,
                manifest=content if isinstance(content, Manifest) else None,
                error=None if isinstance(content, Manifest) else str(content),
                is_on_lineage=stored.name in on_lineage,
                is_newest=stored.name == newest,
            )
        )
    if args.json:
        links = [{"incarnation": link.incarnation, "last_step": link.last_step} for link in catalogue.links]
        print_json(
            {
                "repository": catalogue.url,
                "lineage": links,
                "checkpoints": [row.to_json() for row in rows],
                "findings": [finding_json(finding) for finding in findings],
            }
        )
        return OK
    for finding in findings:
        say(f"moc ls: unreadable record: {finding}")
    for row in rows:
        if row.error is not None:
            say(f"moc ls: corrupt checkpoint: {row.error}")
    _print_rows(rows, catalogue.url)
    return OK


def _print_rows(rows: list[Row], url: str) -> None:
    if not rows:
        say(f"moc ls: no checkpoints yet: repository={url}")
        return
    now_s = time.time()
    table: dict[str, list[str]] = {
        "STEP": [str(row.stored.name.step) for row in rows],
        "INCARNATION": [str(row.stored.name.incarnation) for row in rows],
        "ATTEMPT": [row.stored.name.attempt for row in rows],
        "SIZE": ["?" if row.manifest is None else describe_bytes(row.manifest.size_bytes) for row in rows],
    }
    if any(row.manifest is not None and row.manifest.stale_experts for row in rows):
        written = ["?" if row.manifest is None else describe_bytes(row.manifest.written_bytes) for row in rows]
        stale = ["?" if row.manifest is None else str(len(row.manifest.stale_experts)) for row in rows]
        table |= {"WRITTEN": written, "STALE": stale}
    ages = [describe_age(now_s - row.stored.modified_s) if row.stored.modified_s else "?" for row in rows]
    table |= {"AGE": ages, "IS": [row.marks() for row in rows]}
    print_table(tuple(table), list(zip(*table.values(), strict=True)), left=frozenset({"IS"}))


def _read_manifests(repository: Repository, listed: tuple[StoredCheckpoint, ...]) -> dict[object, Manifest | MocError]:
    def read(stored: StoredCheckpoint) -> Manifest | MocError:
        try:
            return repository.read_manifest(stored.name)
        except UNREADABLE as error:
            return error

    names = [stored.name for stored in listed]
    if repository.store.properties.is_local or len(listed) < 2:
        return dict(zip(names, map(read, listed), strict=True))
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        return dict(zip(names, pool.map(read, listed), strict=True))
