"""What must hold on a disk (or in a bucket) after whatever has happened to it.

1. Every listed checkpoint is sound, and every record readable.
2. Recovery along the lineage finds a state that the ledger allows, and restores exactly its bytes.
3. The next life attaches, saves and commits twice; recovery then finds the second of these saves.
4. After its rounds of retention nothing is left but what is documented (docs/format.md, "Leftovers").
"""

from __future__ import annotations

from collections.abc import Callable

from moc.format.keys import CheckpointName
from moc.format.manifest import Manifest
from moc.repository import Repository
from moc.store.port import Store
from moc.verify import verify_repository
from tests.enumeration.job import RUN, STEPS, Ledger, Life, choose, name_of, restored_step
from tests.enumeration.serial import SerialHost

__all__ = ["judge", "judge_promises"]


def judge(open_store: Callable[[], Store], ledger: Ledger, *, is_whole: bool = True) -> None:
    """Check all of the above. `is_whole` is False where older checkpoints may have been damaged (stale listings)."""
    _require_sound(Repository(open_store()), is_whole=is_whole)
    life = Life(open_store, ledger.copy(), keep_last=1)
    life.attach()
    _require_allowed(life.recovered, ledger)
    step = 0 if life.recovered is None else life.recovered.step
    for later in (step + 1, step + 2):
        assert later <= STEPS, "a workflow leaves room for two more steps"
        saved = life.save(later)
    repository = Repository(open_store())
    _, admissible, _ = choose(repository)
    assert restored_step(repository, admissible[0], SerialHost(open_store)) == step + 2
    findings = verify_repository(repository, read_data_fraction=0.0).all_findings
    assert not findings, f"unsound after the next life: {[str(finding) for finding in findings]}"
    _require_no_leftovers(repository, life.number, repository.read_manifest(saved))


def judge_promises(open_store: Callable[[], Store], ledger: Ledger) -> None:
    """Check 1 and 2 only."""
    repository = Repository(open_store())
    _require_sound(repository, is_whole=True)
    _, admissible, _ = choose(repository)
    if admissible:
        restored_step(repository, admissible[0], SerialHost(open_store))
    _require_allowed(name_of(admissible[0]) if admissible else None, ledger)


def _require_sound(repository: Repository, *, is_whole: bool) -> None:
    if is_whole and repository.exists():
        findings = verify_repository(repository, read_data_fraction=1.0).all_findings
        assert not findings, f"unsound: {[str(finding) for finding in findings]}"


def _require_allowed(found: CheckpointName | None, ledger: Ledger) -> None:
    promised = sorted(str(name) for name in ledger.allowed)
    assert found in ledger.allowed, f"recovery finds {found}, promised was one of {promised}"


def _require_no_leftovers(repository: Repository, incarnation: int, kept: Manifest) -> None:
    manifests = [checkpoint.name for checkpoint in repository.checkpoints()]
    assert manifests == [kept.name], f"checkpoints are left: {[str(name) for name in manifests]}"
    condemned = set(repository.read_victims(RUN, incarnation))
    known = {row.key for row in kept.objects} | condemned
    stored = {entry.key for entry in repository.objects()}
    assert stored <= known, f"objects that nothing references are left: {sorted(stored - known)}"
    lists = [entry.key for entry in repository.victim_lists()]
    assert len(lists) == 1, f"victim lists are left: {lists}"
