"""What is enumerated: the workflows of a job, each from its first operation on storage to its last.

A workflow prepares what it needs, calls `site.begin()`, and then does what faults are thrown at. Like the agent it goes
on after an error of the store: a save that failed is an outcome, an attach that failed is tried again by a next life.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moc.cli.choose import choose_on_lineage, read_catalogue
from moc.cli.rewind import write_rewind
from moc.collect import collect, fence, find_garbage
from moc.errors import FencedError, MocError, StorageError
from moc.format.keys import CheckpointName
from moc.persist import persist_rank
from moc.repository import Repository
from moc.store.port import Store
from moc.trace import Trace
from moc.verify import check_structure
from tests.enumeration.job import RUN, TRACE, Ledger, Life, snapshots
from tests.enumeration.serial import SerialHost

__all__ = ["ATTEMPTS", "WORKFLOWS", "Site", "StorageGoneError", "Workflow", "go_through"]

ATTEMPTS = 2  # at the beginning of a life, before the storage counts as gone


class StorageGoneError(Exception):
    """The storage is gone for good: the workflow ends here."""


@dataclass(slots=True)
class Site:
    """Where a workflow runs. `begin` is called where the enumerated part starts, `move_on` between two processes."""

    open_store: Callable[[], Store]
    begin: Callable[[], None] = lambda: None
    move_on: Callable[[], None] = lambda: None
    ledger: Ledger = field(default_factory=Ledger)
    failures: list[MocError] = field(default_factory=list)
    current: Life | None = None
    """The life that goes on; None before its beginning, and while nobody knows of it."""

    def life(self, *, keep_last: int = 1, is_offline: bool = False) -> Life:
        """Begin a life: recover and write its record."""
        for _ in range(ATTEMPTS):
            try:
                life = Life(self.open_store, self.ledger, keep_last=keep_last)
                life.attach(is_offline=is_offline)
            except (StorageError, FencedError) as error:  # fenced: a stale listing hid a life that has the number
                self.failures.append(error)
            else:
                self.current = life
                return life
        raise StorageGoneError

    def save(self, life: Life, step: int) -> None:
        """Save a step; the round of retention that follows a commit belongs to it."""
        try:
            life.save(step)
        except MocError as error:
            self.failures.append(error)

    def rewind(self, step: int) -> None:
        """Do what `moc rewind --step` does."""
        self.current = None
        for _ in range(ATTEMPTS):
            try:
                repository = Repository(self.open_store())
                stored = choose_on_lineage(read_catalogue(repository), str(step))
                manifest = repository.read_manifest(stored.name)
                _, findings = check_structure(repository, manifest)
                assert not findings, f"not sound: {findings}"
                self.ledger.attempt(manifest.name)
                write_rewind(repository, manifest)
            except StorageError as error:
                self.failures.append(error)
            else:
                self.ledger.announce(manifest.name)
                return
        raise StorageGoneError

    def collect(self) -> None:
        """Do what `moc gc --apply --fence --off-lineage` does."""
        self.current = None

        def end_reading(event: str, span: str, _: dict[str, object]) -> None:
            if (event, span) == ("end", "gc.drop"):  # whoever asks for this takes it from under readers, too
                self.ledger.commits += 1

        for _ in range(ATTEMPTS):
            try:
                repository = Repository(self.open_store())
                fence(repository, find_garbage(repository, with_off_lineage=True, trace=TRACE), trace=TRACE)
                collect(
                    repository,
                    with_off_lineage=True,
                    settle_s=0.0,
                    host=SerialHost(self.open_store),
                    trace=Trace(end_reading),
                    on_wait=lambda _: None,
                )
            except MocError as error:
                self.failures.append(error)
            else:
                return
        raise StorageGoneError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflow:
    """`act` returns the life that goes on; its next save must work, of the step after `last_step`.

    `again` is what somebody may do, instead of a next life, when a process has died in the middle.
    """

    name: str
    act: Callable[[Site], Life]
    last_step: int
    again: Callable[[Site], None] | None = None


def go_through(workflow: Workflow, site: Site, *, fault: str | None, failure_limit: int = 1) -> None:
    """Run; after a fault that passes, the next save must work without another one. `fault` is its kind."""
    try:
        life = workflow.act(site)
    except StorageGoneError:
        assert fault == "dead", "gave up although the storage answers"
        return
    if fault is None or fault == "dead":
        return
    # A stale listing breaks what every store promises: a save may find a contradiction and fail by it.
    expected = MocError if fault == "stale" else StorageError
    assert all(isinstance(error, expected) for error in site.failures), f"not a storage error: {site}"
    assert len(site.failures) <= failure_limit, f"more failures than {failure_limit}: {site.failures}"
    life.save(workflow.last_step + 1)


def first_save(site: Site) -> Life:
    site.begin()
    life = site.life()
    site.save(life, 1)
    return life


def further_save(site: Site) -> Life:
    life = site.life(keep_last=2)
    site.save(life, 1)
    site.begin()
    site.save(life, 2)
    return life


def retention(site: Site) -> Life:
    """One round that drops a checkpoint, one that deletes its objects and drops the next."""
    life = site.life()
    site.save(life, 1)
    site.begin()
    site.save(life, 2)
    site.save(life, 3)
    return life


def retention_over_lives(site: Site) -> Life:
    """The same, where the dropped checkpoints are another life's."""
    former = site.life(keep_last=2)
    site.save(former, 1)
    site.save(former, 2)
    site.move_on()
    life = site.life(keep_last=1)
    site.begin()
    site.save(life, 3)
    site.save(life, 4)
    return life


def rewind(site: Site) -> Life:
    """A rewind, and the life after it up to its first commit."""
    former = site.life(keep_last=3)
    for step in (1, 2, 3):
        site.save(former, step)
    site.move_on()
    site.begin()
    site.rewind(1)
    site.move_on()
    life = site.life(keep_last=3)
    site.save(life, 2)
    return life


def recovery(site: Site) -> Life:
    """A recovery and the record of the new life."""
    former = site.life(keep_last=2)
    site.save(former, 1)
    site.save(former, 2)
    site.move_on()
    site.begin()
    return site.life(keep_last=2)


def record_by_the_agent(site: Site) -> Life:
    """A life that began while storage was down: its agent writes the record before the first save."""
    former = site.life(keep_last=2)
    site.save(former, 1)
    site.move_on()
    life = site.life(keep_last=2, is_offline=True)
    site.begin()
    site.save(life, 2)
    return life


def sweep(site: Site) -> Life:
    """A later life removes what an earlier one left: condemned objects and their list, objects of a save cut off."""
    former = site.life()
    site.save(former, 1)
    site.save(former, 2)
    name = CheckpointName(run=RUN, incarnation=former.number, step=3, attempt="ff000000")
    shots = snapshots(is_partial=site.ledger.is_partial)
    for record in shots.records(name):
        persist_rank(shots.arena, record, Repository(site.open_store()), trace=TRACE)
    site.move_on()
    site.begin()
    life = site.life()
    site.save(life, 3)
    site.save(life, 4)
    return life


def collection(site: Site) -> Life:
    """An abandoned future, and what a save cut off has left, are collected between two lives."""
    former = site.life(keep_last=3)
    for step in (1, 2):
        site.save(former, step)
    site.move_on()
    site.rewind(1)
    site.move_on()
    second = site.life(keep_last=3)
    site.save(second, 2)
    name = CheckpointName(run=RUN, incarnation=second.number, step=3, attempt="ff000000")
    shots = snapshots(is_partial=site.ledger.is_partial)
    for record in shots.records(name):
        persist_rank(shots.arena, record, Repository(site.open_store()), trace=TRACE)
    site.move_on()
    site.begin()
    site.collect()
    site.move_on()
    life = site.life(keep_last=3)
    site.save(life, 3)
    return life


def partial(act: Callable[[Site], Life]) -> Callable[[Site], Life]:
    """Return the same workflow of a job whose checkpoints share experts."""

    def run(site: Site) -> Life:
        site.ledger.is_partial = True
        return act(site)

    return run


def joint(act: Callable[[Site], Life]) -> Callable[[Site], Life]:
    """Return the same workflow of a job on two nodes."""

    def run(site: Site) -> Life:
        site.ledger.is_joint = True
        return act(site)

    return run


WORKFLOWS = (
    Workflow(name="first save", act=first_save, last_step=1),
    Workflow(name="further save", act=further_save, last_step=2),
    Workflow(name="retention", act=retention, last_step=3),
    Workflow(name="retention over lives", act=retention_over_lives, last_step=4),
    Workflow(name="rewind", act=rewind, last_step=3, again=lambda site: site.rewind(1)),
    Workflow(name="recovery", act=recovery, last_step=2),
    Workflow(name="late record", act=record_by_the_agent, last_step=2),
    Workflow(name="sweep", act=sweep, last_step=4),
    Workflow(name="collection", act=collection, last_step=3, again=Site.collect),
    Workflow(name="partial retention", act=partial(retention), last_step=3),
    Workflow(name="partial retention over lives", act=partial(retention_over_lives), last_step=4),
    Workflow(name="partial rewind", act=partial(rewind), last_step=3, again=lambda site: site.rewind(1)),
    Workflow(name="partial sweep", act=partial(sweep), last_step=4),
    Workflow(name="partial collection", act=partial(collection), last_step=3, again=Site.collect),
    Workflow(name="joint first save", act=joint(first_save), last_step=1),
    Workflow(name="joint retention", act=joint(retention), last_step=3),
    Workflow(name="joint late record", act=joint(record_by_the_agent), last_step=2),
    Workflow(name="joint partial retention", act=joint(partial(retention)), last_step=3),
    Workflow(name="joint partial retention over lives", act=joint(partial(retention_over_lives)), last_step=4),
)
