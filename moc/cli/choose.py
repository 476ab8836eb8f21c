"""Which checkpoint the user means: pure choices over what a repository lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moc.errors import NoCheckpointError, UsageError
from moc.format.keys import parse_incarnation_key
from moc.plan.lineage import STORAGE, Candidate, Link, candidates, chain, is_on_chain, merge_incarnations, tip
from moc.repository import Finding, Repository, StoredCheckpoint

__all__ = ["Catalogue", "choose", "choose_on_lineage", "read_catalogue"]

NAMED_STEPS = 10  # as many as fit one line of an error message
ALLOWED = "STEP, STEP-ATTEMPT or a whole name as printed by 'moc ls --json'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What a repository lists: `lineage` in the order in which recovery tries it, `others` newest life first."""

    url: str
    links: tuple[Link, ...]
    lineage: tuple[StoredCheckpoint, ...]
    others: tuple[StoredCheckpoint, ...]
    unreadable: Finding | None = None
    """A record newer than all readable ones: what it grew from cannot be told, so the lineage is a guess."""

    @property
    def everything(self) -> tuple[StoredCheckpoint, ...]:
        """All checkpoints, oldest life and step first."""
        return tuple(
            sorted((*self.lineage, *self.others), key=lambda c: (c.name.incarnation, c.name.step, c.name.attempt))
        )


def read_catalogue(repository: Repository) -> Catalogue:
    """List a repository's checkpoints by what they are to recovery."""
    records, findings = repository.incarnations()
    merged = merge_incarnations(records, ())
    links = chain(merged, tip(merged))
    newer = [finding for finding in findings if (parse_incarnation_key(finding.key) or ("", 0))[1] > tip(merged)]
    by_candidate = {
        Candidate(
            source=STORAGE, run=c.name.run, incarnation=c.name.incarnation, step=c.name.step, attempt=c.name.attempt
        ): c
        for c in repository.checkpoints()
    }
    others = [
        c for c in by_candidate.values() if not is_on_chain(links, c.name.incarnation, c.name.step, c.name.attempt)
    ]
    return Catalogue(
        url=repository.url,
        links=links,
        lineage=tuple(by_candidate[candidate] for candidate in candidates(links, by_candidate)),
        others=tuple(sorted(others, key=lambda c: (-c.name.incarnation, -c.name.step, c.name.attempt))),
        unreadable=newer[-1] if newer else None,
    )


def choose(catalogue: Catalogue, text: str) -> StoredCheckpoint:
    """Return what `text` names; a bare step prefers the lineage. Raises NoCheckpointError, UsageError."""
    return _first((*catalogue.lineage, *catalogue.others), text, catalogue)


def choose_on_lineage(catalogue: Catalogue, text: str) -> StoredCheckpoint:
    """Return the checkpoint that `text` names; a bare step must be on the lineage, a name with attempt need not be."""
    pool = catalogue.lineage if text.isdecimal() else (*catalogue.lineage, *catalogue.others)
    return _first(pool, text, catalogue)


def _first(pool: Sequence[StoredCheckpoint], text: str, catalogue: Catalogue) -> StoredCheckpoint:
    step = re.fullmatch(r"(\d{1,12})(?:-([0-9a-f]{8}))?", text)
    if step is None and "/" not in text:
        raise UsageError(f"not a checkpoint: given={text!r} allowed={ALLOWED}")
    for stored in pool:
        name = stored.name
        if str(name) == text or (step and name.step == int(step[1]) and step[2] in (None, name.attempt)):
            return stored
    raise NoCheckpointError(
        f"no such checkpoint: given={text} available={_steps(catalogue)} repository={catalogue.url}"
    )


def _steps(catalogue: Catalogue) -> str:
    """Return the steps one can ask for, newest last, shortened."""
    steps = [str(step) for step in sorted({c.name.step for c in catalogue.lineage})]
    shown = ["..."] * (len(steps) > NAMED_STEPS) + steps[-NAMED_STEPS:]
    return ",".join(shown) or "none"
