"""The commit: from receipts to a checkpoint, by one put of one manifest.

The manifest is a pure function of plan, composition and receipts, so any agent that holds all receipts may put it,
twice if need be: the bytes are the same. A crash before the put leaves no checkpoint, after it a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moc.errors import FencedError, ManifestCorruptError, PlanDivergedError
from moc.format.keys import CheckpointName
from moc.format.manifest import Manifest, Parent
from moc.persist import Receipt
from moc.plan.composition import Composition
from moc.repository import Repository
from moc.trace import Trace

__all__ = ["CommitPlan", "build_manifest", "commit", "refuse_if_fenced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitPlan:
    """What every agent knows about a checkpoint before any byte of it is written."""

    ranks: tuple[int, ...]
    digest: str
    tensors: int
    topology: Mapping[str, object]
    fingerprint: Mapping[str, object]
    versions: Mapping[str, object]


WRITTEN_WHOLE = Composition()
"""Of a checkpoint that shares nothing with others, all of its own step."""


def build_manifest(
    plan: CommitPlan,
    name: CheckpointName,
    parent: Parent | None,
    receipts: Sequence[Receipt],
    *,
    composition: Composition = WRITTEN_WHOLE,
) -> Manifest:
    """Return the manifest.

    Raises PlanDivergedError unless there is exactly one receipt per rank and all follow the plan. Pure.
    """
    ranks = tuple(sorted(receipt.rank for receipt in receipts))
    if ranks != plan.ranks:
        raise PlanDivergedError(f"receipts do not match the plan: step={name.step} ranks={ranks} expected={plan.ranks}")
    for receipt in receipts:
        if receipt.digest != plan.digest:
            raise PlanDivergedError(
                f"rank planned another save: step={name.step} rank={receipt.rank} digest={receipt.digest} "
                f"expected={plan.digest}"
            )
    written = [row for receipt in receipts for row in receipt.rows]
    return Manifest(
        name=name,
        parent=parent,
        topology=plan.topology,
        catalog_digest=plan.digest,
        tensors=plan.tensors,
        objects=tuple(sorted((*written, *composition.kept), key=lambda row: row.key)),
        fingerprint=plan.fingerprint,
        versions=plan.versions,
        is_finite=all(receipt.is_finite for receipt in receipts) and composition.is_kept_finite,
        stale_experts=composition.stale,
        routing=composition.routing,
    )


def refuse_if_fenced(repository: Repository, run: str, incarnation: int) -> None:
    """Raise FencedError if a newer life, or another run, has written its record.

    Call immediately before a commit or a deletion.
    """
    numbers = repository.incarnation_numbers()
    newer = [
        (other, number) for other, number in numbers if number > incarnation or (number == incarnation and other != run)
    ]
    if newer:
        raise FencedError(
            f"a newer life has taken over: run={run} incarnation={incarnation} newer={newer[-1][1]}-{newer[-1][0]}"
        )


def commit(repository: Repository, manifest: Manifest, *, trace: Trace) -> None:
    """Put the manifest.

    When this returns the checkpoint exists. Raises: FencedError, PlanDivergedError, StorageError.
    """
    name = manifest.name
    with trace.span("commit.fence", step=name.step):
        refuse_if_fenced(repository, name.run, name.incarnation)
        condemned = _condemned(repository, manifest)
        doomed = sorted(row.key for row in manifest.objects if row.key in condemned)
        if doomed:
            raise PlanDivergedError(
                f"manifest references an object that is being deleted: step={name.step} key={doomed[0]}"
            )
    with trace.span("commit.put", step=name.step, attempt=name.attempt):
        repository.put_manifest(manifest)


def _condemned(repository: Repository, manifest: Manifest) -> frozenset[str]:
    """Return what is being deleted; nothing where the list is damaged."""
    name = manifest.name
    try:
        return frozenset(repository.read_victims(name.run, name.incarnation))
    except ManifestCorruptError:
        # As long as the life is not fenced, only it writes its list, and it condemns what no checkpoint names that it
        # keeps: never what the save under way has written, nor what that shares with the newest checkpoint. So a list
        # that has rotted does not end all saves of the life.
        refuse_if_fenced(repository, name.run, name.incarnation)
        return frozenset()
