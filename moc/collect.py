"""Collection on request: what nothing references is deleted by somebody who is not the committing agent.

Only what belongs to *fenced* lives is ever deleted: lives with a lower number than the newest record, whose agents look
for that record before every commit. An agent that looked just before the record came may still put its manifest, so
nothing is deleted before the record is older than such a put can last (`SETTLE_S`), and what to delete is decided anew
after that. A manifest that comes even later, from an agent that was stopped in between, names objects that are gone:
recovery passes over it, as over any damaged checkpoint.

The newest life's own leftovers are left to its agent, unless the caller ends that life with `fence`, whose record
includes all of its parent: what that life has committed, or still holds in memory, stays recoverable.

A crash between any two actions leaves garbage only; the next collection finds it again. See docs/format.md, I5.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moc.errors import (
    CoordinationError,
    FencedError,
    IntegrityError,
    ManifestCorruptError,
    NoCheckpointError,
    ObjectMissingError,
    StoreFullError,
)
from moc.format.keys import LAST_STEP, CheckpointName, parse_object_key, parse_victims_key
from moc.format.manifest import Incarnation, Manifest, Parent
from moc.gc import TEMPORARY_AGE_S
from moc.host import Host
from moc.plan.lineage import chain, is_on_chain, merge_incarnations, tip
from moc.repository import Repository
from moc.store.port import Entry
from moc.trace import Trace

__all__ = ["SETTLE_S", "CollectReport", "Garbage", "collect", "fence", "find_garbage", "temporary_age_s"]

SETTLE_S = 600.0
"""From an agent's look for newer lives to the end of its put there are two calls of the store, of at most 240 s each:
120 s of tries (moc/store/retry.py) and 120 s for the last one (moc/store/remote.py). The rest is for a pause."""
UPLOAD_AGE_S = 86400.0  # of an upload that a living agent has surely given up: its age counts from its begin
DELETERS = 8  # requests under way to a remote store, where each is a round trip
LISTINGS = 3  # where manifests come and go during so many listings, the repository is too busy to judge
FENCE_REASON = "gc"
WITHOUT_AGENT = (FENCE_REASON, "rewind")  # lives that are nothing but a record


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What nothing references, as of one listing.

    `objects` belong to fenced lives; `held` to the life that may still commit them. `off_lineage` are checkpoints to
    drop, and `dropped_objects` what only they reference. `victim_lists` are those of fenced lives.
    """

    newest: Incarnation | None
    fenced_s: float
    """When the newest record was written, by the store's time; 0.0 where it has none."""
    objects: tuple[Entry, ...]
    held: tuple[Entry, ...]
    off_lineage: tuple[CheckpointName, ...]
    dropped_objects: tuple[Entry, ...]
    victim_lists: tuple[str, ...]

    @property
    def victims(self) -> tuple[Entry, ...]:
        return tuple(sorted((*self.objects, *self.dropped_objects), key=lambda entry: entry.key))

    @property
    def has_agent(self) -> bool:
        """Return whether the newest life is one that an agent may serve."""
        return self.newest is not None and self.newest.reason not in WITHOUT_AGENT


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectReport:
    """What was deleted."""

    dropped: tuple[CheckpointName, ...]
    objects: tuple[Entry, ...]
    temporary_files: int


def find_garbage(repository: Repository, *, with_off_lineage: bool, trace: Trace) -> Garbage:
    """Return what a collection would delete; `with_off_lineage` adds the checkpoints off the lineage. Reads only.

    Raises: IntegrityError while a record or manifest is unreadable, because nobody knows what it references;
    NoCheckpointError or CoordinationError where the lineage does not tell what is off it; StorageError.
    """
    with trace.span("gc.list"):
        records, findings = repository.incarnations()
        if findings:
            raise IntegrityError(f"nothing is deleted while an incarnation record is unreadable: {findings[0]}")
        manifests = _read_manifests(repository)
        newest = max(records, key=lambda record: (record.number, record.run), default=None)
        number = 0 if newest is None else newest.number
        doomed = _off_lineage(records, manifests) if with_off_lineage else ()
        kept = {row.key for m in manifests if m.name not in doomed for row in m.objects}
        named = {row.key for m in manifests for row in m.objects}
        objects: list[Entry] = []
        held: list[Entry] = []
        dropped: list[Entry] = []
        for entry in repository.objects():
            life = _life_of(entry.key)
            if life is None or entry.key in kept:
                continue
            if entry.key in named:
                dropped.append(entry)
            else:
                (objects if life < number else held).append(entry)
        lists = [entry.key for entry in repository.victim_lists() if 0 < _owner_of(entry.key) < number]
    return Garbage(
        newest=newest,
        fenced_s=0.0 if newest is None else repository.incarnation_time_s(newest.run, number),
        objects=tuple(objects),
        held=tuple(held),
        off_lineage=doomed,
        dropped_objects=tuple(dropped),
        victim_lists=tuple(lists),
    )


def fence(repository: Repository, garbage: Garbage, *, trace: Trace) -> Incarnation | None:
    """End the newest life: from the record that is written here on its saves fail; None if there is no such life.

    The record's parent is that life as a whole. Raises: FencedError if another life began since the listing.
    """
    if garbage.newest is None or not garbage.has_agent:
        return None
    former = garbage.newest
    record = Incarnation(
        run=former.run,
        number=former.number + 1,
        token=secrets.token_hex(4),
        parent=Parent(incarnation=former.number, step=LAST_STEP, attempt=None),
        reason=FENCE_REASON,
        fingerprint=former.fingerprint,
    )
    with trace.span("gc.fence", incarnation=record.number):
        _refuse_if_newer(repository, former.number)
        repository.put_incarnation(record)
    return record


def collect(
    repository: Repository,
    *,
    with_off_lineage: bool,
    settle_s: float,
    host: Host,
    trace: Trace,
    on_wait: Callable[[float], None],
) -> CollectReport:
    """Condemn, let commits under way end, look again, delete; `on_wait` is told how many seconds the wait takes.

    Deleted is what both looks find, so a life that begins in between changes nothing but this: raises FencedError
    before a checkpoint is dropped. Raises also: as `find_garbage`.
    """
    first = find_garbage(repository, with_off_lineage=with_off_lineage, trace=trace)
    number = 0 if first.newest is None else first.newest.number
    final = first
    if first.victims:
        condemned = _condemn(repository, first.victims, trace=trace)
        _settle(repository, first, condemned, settle_s=settle_s, host=host, trace=trace, on_wait=on_wait)
        final = find_garbage(repository, with_off_lineage=with_off_lineage, trace=trace)
    repository.sync_names()  # what is deleted below must not depend on names that a dead process has left unsynced
    dropped = tuple(name for name in first.off_lineage if name in final.off_lineage)
    for name in dropped:
        with trace.span("gc.drop", step=name.step, attempt=name.attempt):
            _refuse_if_newer(repository, number)  # a rewind may have put this very checkpoint onto the lineage
            repository.delete_manifest(name)
    condemned_keys = {entry.key for entry in first.victims}
    victims = tuple(entry for entry in final.victims if entry.key in condemned_keys)
    _delete(repository, victims, host=host, trace=trace)
    for key in final.victim_lists:
        if _owner_of(key) < number:
            with trace.span("gc.forget", key=key):
                repository.store.delete(key)
    with trace.span("gc.sweep"):
        temporary = repository.store.sweep(older_than_s=temporary_age_s(repository, final))
    return CollectReport(dropped=dropped, objects=victims, temporary_files=temporary)


def temporary_age_s(repository: Repository, garbage: Garbage) -> float:
    """Return how old something invisible must be to belong to no put under way.

    A file's age counts from its last write, an upload's to an object store from its begin, hours before its end.
    """
    may_upload = garbage.has_agent and not repository.store.properties.is_local
    return UPLOAD_AGE_S if may_upload else TEMPORARY_AGE_S


def _delete(repository: Repository, victims: Sequence[Entry], *, host: Host, trace: Trace) -> None:
    """Delete in any order: nothing references them."""

    def delete(entry: Entry) -> None:
        with trace.span("gc.delete", key=entry.key):
            repository.store.delete(entry.key)

    workers = 1 if repository.store.properties.is_local else DELETERS
    host.map(delete, victims, workers=workers, name="moc-delete")


def _read_manifests(repository: Repository) -> list[Manifest]:
    """Read all manifests, of one moment: a listing that another one confirms.

    A retention at work elsewhere drops some meanwhile; what only those named could be named by one not listed yet.
    """
    known: dict[CheckpointName, Manifest] = {}
    names = _names(repository)
    for _ in range(LISTINGS):
        unreadable: Exception | None = None
        for name in names:
            try:
                known[name] = known.get(name) or repository.read_manifest(name)
            except (IntegrityError, ObjectMissingError) as error:
                unreadable = error
        again = _names(repository)
        if again == names and unreadable is None:
            return [known[name] for name in names]
        if again == names:
            raise IntegrityError(f"nothing is deleted while a manifest is unreadable: {unreadable}") from unreadable
        names = again
    raise CoordinationError(f"checkpoints come and go while they are listed: listings={LISTINGS} allowed=try again")


def _names(repository: Repository) -> list[CheckpointName]:
    return [stored.name for stored in repository.checkpoints()]


def _off_lineage(records: Sequence[Incarnation], manifests: Sequence[Manifest]) -> tuple[CheckpointName, ...]:
    """Return the checkpoints off the lineage, oldest first, unless that leaves none or the lineage is not known."""
    merged = merge_incarnations(records, ())
    links = chain(merged, tip(merged))
    if not all(link.is_known for link in links):
        lost = next(link.incarnation for link in links if not link.is_known)
        raise CoordinationError(f"the lineage cannot be followed, so nothing is off it for sure: missing={lost}")
    names = [m.name for m in manifests]
    off = tuple(name for name in names if not is_on_chain(links, name.incarnation, name.step, name.attempt))
    if off and len(off) == len(names):
        raise NoCheckpointError(
            f"no checkpoint is on the lineage, so none off it is dropped: off_lineage={len(off)} "
            "allowed=after the present life's first commit"
        )
    return off


def _condemn(repository: Repository, victims: Sequence[Entry], *, trace: Trace) -> set[str]:
    """Write one victim list per life: a commit of that life which names a victim fails. Returns the lists' keys.

    A full store takes no lists. They are the second line of defence, and space can only come back by deleting.
    """
    lives: dict[tuple[str, int], list[str]] = {}
    for entry in victims:
        owner = parse_object_key(entry.key)[0]
        lives.setdefault((owner.run, owner.incarnation), []).append(entry.key)
    keys = set()
    for (run, number), condemned in sorted(lives.items()):
        with (
            trace.span("gc.condemn", incarnation=number, objects=len(condemned)),
            contextlib.suppress(StoreFullError),
        ):
            keys.add(repository.put_victims(run, number, condemned))
    return keys


def _settle(
    repository: Repository,
    garbage: Garbage,
    condemned: set[str],
    *,
    settle_s: float,
    host: Host,
    trace: Trace,
    on_wait: Callable[[float], None],
) -> None:
    """Wait until the newest record is `settle_s` old by the store's time, which the lists just written tell.

    Where nothing tells, for all of `settle_s`.
    """
    now_s = max((entry.modified_s for entry in repository.victim_lists() if entry.key in condemned), default=0.0)
    age_s = max(now_s - garbage.fenced_s, 0.0) if garbage.fenced_s else 0.0
    left_s = settle_s - age_s
    if left_s <= 0:
        return
    on_wait(left_s)
    with trace.span("gc.settle", seconds=left_s):
        host.sleep(left_s)


def _refuse_if_newer(repository: Repository, number: int) -> None:
    newer = [key for key in repository.incarnation_numbers() if key[1] > number]
    if newer:
        raise FencedError(f"a life began meanwhile: incarnation={newer[-1][1]} run={newer[-1][0]} allowed=try again")


def _life_of(key: str) -> int | None:
    """Return the number of the life that wrote an object, None for a file that is not moc's."""
    try:
        return parse_object_key(key)[0].incarnation
    except ManifestCorruptError:
        return None


def _owner_of(key: str) -> int:
    """Return the number of the life whose victim list this is, 0 for a file that is not moc's."""
    life = parse_victims_key(key)
    return 0 if life is None else life[1]
