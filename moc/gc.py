"""Deletion: retention after a commit, and the collection of what nothing references.

Retention works in two phases, by the committing agent only, serial with its commits. After commit n the objects that only dropped
checkpoints reference go into the life's victim list, then the dropped manifests are deleted (from here on those checkpoints do not
exist). After a later commit the listed objects are deleted and the list is emptied. A crash between any two actions leaves either
the old checkpoints, or objects that no manifest references; the next round or `moc gc` removes those.
"""

from __future__ import annotations

from dataclasses import dataclass

from moc.commit import refuse_if_fenced
from moc.errors import IntegrityError, ObjectMissingError
from moc.format.keys import CheckpointName
from moc.format.manifest import Manifest
from moc.plan.lineage import is_on_chain
from moc.plan.retention import CheckpointFact, dropped
from moc.repository import Repository
from moc.trace import Trace

__all__ = ["Retention", "RetentionReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionReport:
    """What one round did."""

    dropped: tuple[CheckpointName, ...]
    deleted_objects: int


class Retention:
    """The retention rounds of one life. Thread: the agent's persist thread."""

    def __init__(self, repository: Repository, *, run: str, incarnation: int, keep_last: int, keep_every: int, trace: Trace) -> None:
        self._repository, self._run, self._incarnation = repository, run, incarnation
        self._keep_last, self._keep_every, self._trace = keep_last, keep_every, trace
        self._manifests: dict[CheckpointName, Manifest] = {}

    def after_commit(self) -> RetentionReport:
        """Do one round. Raises: FencedError, StorageError; a failed round is repeated after the next commit."""
        with self._trace.span("retention.list", incarnation=self._incarnation):
            refuse_if_fenced(self._repository, self._run, self._incarnation)
            self._read_manifests()
        deleted = self._delete_condemned()
        links = self._repository.lineage()
        facts = [
            CheckpointFact(name=m.name, is_on_chain=is_on_chain(links, m.name.incarnation, m.name.step), is_finite=m.is_finite)
            for m in self._manifests.values()
        ]
        doomed = dropped(facts, keep_last=self._keep_last, keep_every=self._keep_every)
        if doomed:
            self._drop(doomed)
        return RetentionReport(dropped=doomed, deleted_objects=deleted)

    def _read_manifests(self) -> None:
        listed = {c.name for c in self._repository.checkpoints() if c.name.run == self._run}
        self._manifests = {name: m for name, m in self._manifests.items() if name in listed}
        for name in sorted(listed - set(self._manifests)):
            try:
                self._manifests[name] = self._repository.read_manifest(name)
            except (IntegrityError, ObjectMissingError):
                # A corrupt manifest protects nothing by what it says, so nothing may be deleted on its account: its objects stay
                # because `_drop` condemns only what a dropped manifest names.
                continue

    def _drop(self, doomed: tuple[CheckpointName, ...]) -> None:
        condemned = {row.key for name in doomed for row in self._manifests[name].objects}
        kept = {row.key for name, m in self._manifests.items() if name not in doomed for row in m.objects}
        earlier = self._repository.read_victims(self._run, self._incarnation)
        with self._trace.span("retention.condemn", objects=len(condemned - kept)):
            self._repository.put_victims(self._run, self._incarnation, sorted((condemned - kept) | set(earlier)))
        for name in doomed:
            with self._trace.span("retention.drop", step=name.step, attempt=name.attempt):
                refuse_if_fenced(self._repository, self._run, self._incarnation)
                self._repository.delete_manifest(name)
            del self._manifests[name]

    def _delete_condemned(self) -> int:
        """Delete what an earlier round condemned, except what a manifest still names (a crash before the manifest's deletion)."""
        condemned = self._repository.read_victims(self._run, self._incarnation)
        if not condemned:
            return 0
        listed = {c.name for c in self._repository.checkpoints()}
        named = {row.key for name, m in self._manifests.items() if name in listed for row in m.objects}
        refuse_if_fenced(self._repository, self._run, self._incarnation)
        victims = [key for key in condemned if key not in named]
        for key in victims:
            with self._trace.span("retention.delete", key=key):
                self._repository.store.delete(key)
        self._repository.put_victims(self._run, self._incarnation, [])
        return len(victims)
