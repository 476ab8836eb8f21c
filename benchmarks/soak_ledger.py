"""What a soaked job has promised and what became of it: announced commits, resumed steps, what is left in storage."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc.format.keys import CheckpointName, parse_manifest_key
from moc.plan.lineage import is_on_chain
from moc.repository import Repository
from moc.store.open import open_store
from moc.verify import verify_checkpoint

__all__ = ["Kill", "Ledger", "broken_promises", "recoveries_by_source"]

COMMITTED = re.compile(r"committed: name=(\S+) bytes=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One kill: when, of whom, and what had been promised by then. `starts` counts the starts that came before."""

    at_s: float
    kind: str
    pids: tuple[int, ...]
    starts: int
    announced_step: int
    global_step: int | None


class Ledger:
    """Compares what the agents have announced in their log with what the repository holds."""

    def __init__(self, storage: Path, log: Path, *, keep_last: int) -> None:
        self._storage, self._log, self._keep_last = storage, log, keep_last
        self.lost: set[CheckpointName] = set()

    def announced(self) -> list[CheckpointName]:
        """Return every commit that an agent has announced, in the order of the announcements."""
        logs = sorted(self._log.parent.glob(f"{self._log.name}*"), reverse=True)  # older ones have numbers
        text = "".join(log.read_text(errors="replace") for log in logs)
        names = [parse_manifest_key(f"manifests/{name}.json") for name in COMMITTED.findall(text)]
        return [name for name in names if name is not None]

    def newest_step(self) -> int:
        """Return the newest announced step on the lineage, 0 before the first."""
        return max((name.step for name in self._chained(self.announced())), default=0)

    def look(self) -> None:
        """Note announced commits that retention may not have dropped, but that are not there.

        Twice before one counts: commits and deletions go on between one listing and the next.
        """
        missing = self._missing()
        if missing:
            self.lost |= missing & self._missing()

    def _missing(self) -> set[CheckpointName]:
        announced = self.announced()
        repository = self._open()
        try:
            listed = {checkpoint.name for checkpoint in repository.checkpoints()}
        finally:
            repository.close()
        newest = sorted(self._chained([*announced, *(listed - set(announced))]))[-self._keep_last :]
        return {name for name in newest if name in announced} - listed

    def leftovers(self, run: str) -> list[str]:
        """Return the objects that no manifest names and no victim list has condemned, and temporary files."""
        repository = self._open()
        try:
            named = {row.key for c in repository.checkpoints() for row in repository.read_manifest(c.name).objects}
            records, _ = repository.incarnations()
            condemned = {key for record in records for key in repository.read_victims(run, record.number)}
            found = [entry.key for entry in repository.objects() if entry.key not in named | condemned]
        finally:
            repository.close()
        return found + [str(path.relative_to(self._storage)) for path in self._storage.rglob(".*~*")]

    def damages(self) -> list[str]:
        """Read every stored byte and return what is wrong."""
        repository = self._open()
        try:
            reports = [verify_checkpoint(repository, c.name, read_data_fraction=1.0) for c in repository.checkpoints()]
        finally:
            repository.close()
        return [str(finding) for report in reports for finding in report.findings]

    def _chained(self, names: Sequence[CheckpointName]) -> list[CheckpointName]:
        """Return the names that led to the newest life."""
        repository = self._open()
        try:
            links = repository.lineage() if repository.exists() else ()
        finally:
            repository.close()
        return [name for name in names if is_on_chain(links, name.incarnation, name.step, name.attempt)]

    def _open(self) -> Repository:
        return Repository(open_store(str(self._storage)))


def recoveries_by_source(storage: Path) -> Counter[str]:
    """Return how many lives began from memory, from storage, or from nothing."""
    repository = Repository(open_store(str(storage)))
    try:
        records, _ = repository.incarnations()
    finally:
        repository.close()
    return Counter(
        "nothing" if r.parent is None else "memory" if r.parent.attempt is None else "storage" for r in records
    )


def broken_promises(kills: Sequence[Kill], starts: Sequence[dict[str, Any]]) -> list[str]:
    """Return the starts that resumed before a step that was promised when somebody was killed.

    An announced commit is promised whatever was killed; a global snapshot, and what a life was recovered from, as long
    as their agent lives.
    """
    broken = []
    for number, start in enumerate(starts):
        before = [kill for kill in kills if kill.starts <= number]
        announced = max((kill.announced_step for kill in before), default=0)
        if start["resume_step"] < announced:
            broken.append(f"start {number + 1} resumed step {start['resume_step']}, announced was {announced}")
        since = [kill for kill in before if kill.starts == number]
        if any(kill.kind in ("agent", "both") for kill in since):
            continue
        former = starts[number - 1]["resume_step"] if number else 0
        known = max((kill.global_step or 0 for kill in since), default=former)
        if start["resume_step"] < known:
            broken.append(f"start {number + 1} resumed step {start['resume_step']}, in memory was {known}")
    return broken
