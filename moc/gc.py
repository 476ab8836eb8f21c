"""Deletion: retention after a commit, and the collection of what nothing references.

Retention works in two phases, by the committing agent only, serial with its commits. After commit n the objects that
only dropped checkpoints reference go into the life's victim list, then the dropped manifests are deleted (from here on
those checkpoints do not exist). After a later commit the listed objects are deleted and the list is emptied. A crash
between any two actions leaves either the old checkpoints, or objects that no manifest references; the next round of
this life, or the first of the next one, removes those.
"""

from __future__ import annotations

from collections.abc import Iterable

from moc.commit import refuse_if_fenced
from moc.errors import IntegrityError, ManifestCorruptError, StorageError
from moc.format.keys import CheckpointName, parse_object_key, parse_victims_key
from moc.format.manifest import Manifest
from moc.format.stale import is_earlier
from moc.plan.lineage import Link, chain, is_on_chain, merge_incarnations, tip
from moc.plan.retention import CheckpointFact, dropped
from moc.repository import Repository
from moc.trace import Trace

__all__ = ["Retention"]


TEMPORARY_AGE_S = 3600.0  # a temporary file this old belongs to no put under way


class Retention:
    """The retention rounds of one life. Thread: the agent's persist thread."""

    def __init__(
        self, repository: Repository, *, run: str, incarnation: int, keep_last: int, keep_every: int, trace: Trace
    ) -> None:
        self._repository, self._run, self._incarnation = repository, run, incarnation
        self._keep_last, self._keep_every, self._trace = keep_last, keep_every, trace
        self._manifests: dict[CheckpointName, Manifest] = {}
        self._is_swept = False

    def after_commit(self) -> tuple[CheckpointName, ...]:
        """Do one round; return the checkpoints it has dropped.

        Raises: FencedError, StorageError, IntegrityError; a failed round is repeated after the next commit.
        """
        with self._trace.span("retention.list", incarnation=self._incarnation):
            refuse_if_fenced(self._repository, self._run, self._incarnation)
            links = self._lineage()
            unreadable = self._read_manifests()
            # A manifest that is listed may be lost, and a missing one come back, while whoever put or deleted it had no
            # time to sync that: what is deleted below must not depend on it.
            self._repository.sync_names()
        self._delete_condemned(unreadable)
        if not self._is_swept and not unreadable:
            self._sweep()
            self._is_swept = True
        first_known = 0 if all(link.is_known for link in links) else links[-1].incarnation
        facts = [
            CheckpointFact(
                name=m.name,
                is_on_chain=is_on_chain(links, m.name.incarnation, m.name.step, m.name.attempt),
                is_finite=m.is_finite,
            )
            for m in self._manifests.values()
            if m.name.incarnation >= first_known  # older ones may be on the chain, whose record is lost
        ]
        doomed = dropped(facts, keep_last=self._keep_last, keep_every=self._keep_every)
        if doomed:
            self._drop(doomed, unreadable)
        return doomed

    def _lineage(self) -> tuple[Link, ...]:
        """Return the chain; raises IntegrityError if a record is unreadable, since what it hides may not be deleted."""
        records, findings = self._repository.incarnations()
        if findings:
            raise IntegrityError(f"nothing is deleted while an incarnation record is unreadable: {findings[0]}")
        merged = merge_incarnations(records, ())
        return chain(merged, tip(merged))

    def _read_manifests(self) -> list[CheckpointName]:
        """Read what is new; return the names that cannot be read."""
        listed = {c.name for c in self._repository.checkpoints() if c.name.run == self._run}
        self._manifests = {name: m for name, m in self._manifests.items() if name in listed}
        unreadable = []
        for name in sorted(listed - set(self._manifests)):
            try:
                self._manifests[name] = self._repository.read_manifest(name)
            except (IntegrityError, StorageError):
                # It stays, and so do all objects that it may name.
                unreadable.append(name)
        return unreadable

    def _drop(self, doomed: tuple[CheckpointName, ...], unreadable: list[CheckpointName]) -> None:
        """Condemn what only the doomed ones name, then drop them.

        What an unreadable manifest may name is not condemned: a commit may yet share it, and would fail. If nobody
        names it, a life finds it in its first round.
        """
        condemned = {row.key for name in doomed for row in self._manifests[name].objects}
        condemned = {key for key in condemned if not _may_be_named(key, unreadable)}
        kept = {row.key for name, m in self._manifests.items() if name not in doomed for row in m.objects}
        earlier = self._read_condemned()
        with self._trace.span("retention.condemn", objects=len(condemned - kept)):
            self._repository.put_victims(self._run, self._incarnation, sorted((condemned - kept) | set(earlier)))
        for name in doomed:
            with self._trace.span("retention.drop", step=name.step, attempt=name.attempt):
                refuse_if_fenced(self._repository, self._run, self._incarnation)
                self._repository.delete_manifest(name)
            del self._manifests[name]

    def _delete_condemned(self, unreadable: list[CheckpointName]) -> None:
        """Delete what an earlier round condemned, except what a manifest still names (a crash before the manifest's
        deletion), or may name: that waits until its manifest is gone or can be read.
        """
        condemned = self._read_condemned()
        waiting = [key for key in condemned if _may_be_named(key, unreadable)]
        spared = self._named().union(waiting)
        self._delete([key for key in condemned if key not in spared])
        if len(condemned) > len(waiting):
            self._repository.put_victims(self._run, self._incarnation, waiting)

    def _read_condemned(self) -> tuple[str, ...]:
        """Return the life's own list; one that is damaged is emptied, and what it named is left to the next life."""
        try:
            return self._repository.read_victims(self._run, self._incarnation)
        except ManifestCorruptError:
            self._repository.put_victims(self._run, self._incarnation, [])
            return ()

    def _sweep(self) -> None:
        """Delete what lives before this one left behind: objects that no manifest names, victim lists, temporary files.

        Those lives are fenced: this one's record, which they look for before every commit, is older than this round by
        a whole save.
        """
        named = self._named()
        victims = []
        for entry in self._repository.objects():
            try:
                owner = parse_object_key(entry.key)[0]
            except ManifestCorruptError:
                continue  # not ours
            if owner.run == self._run and owner.incarnation < self._incarnation and entry.key not in named:
                victims.append(entry.key)
        self._delete(victims)
        for entry in self._repository.victim_lists():
            life = parse_victims_key(entry.key)
            if life is not None and life[0] == self._run and life[1] < self._incarnation:
                self._repository.store.delete(entry.key)
        self._repository.store.sweep(older_than_s=TEMPORARY_AGE_S)

    def _named(self) -> set[str]:
        """Return the object keys that readable manifests name."""
        return {row.key for m in self._manifests.values() for row in m.objects}

    def _delete(self, keys: list[str]) -> None:
        if keys:
            refuse_if_fenced(self._repository, self._run, self._incarnation)
        for key in keys:
            with self._trace.span("retention.delete", key=key):
                self._repository.store.delete(key)


def _may_be_named(key: str, manifests: Iterable[CheckpointName]) -> bool:
    """Return whether a manifest of such a name may reference the object: its own, or experts of an earlier attempt."""
    owner, _, piece = parse_object_key(key)
    return any(owner == name or (piece != "d" and is_earlier(owner, name)) for name in manifests)
