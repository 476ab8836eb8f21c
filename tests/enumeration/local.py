"""Every operation of a workflow on a local folder times every fault, on the model of a disk.

A crash runs nothing any more, so one undisturbed run that looks at the disk before, in the middle of and after each
operation shows every crash there is; an error goes on, so each has a run of its own. Disks that no program can tell
apart, with the same promises, are judged once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moc.errors import FencedError
from moc.format.keys import MANIFESTS
from moc.format.manifest import ObjectRow, decode_manifest
from moc.store.local import LocalStore
from tests.enumeration.job import Ledger, Life
from tests.enumeration.judge import judge, judge_promises
from tests.enumeration.tally import Case, Tally
from tests.enumeration.workflows import Site, Workflow, go_through
from tests.support.faulty_files import Crash, Fault, FaultKind, FaultyFilesystem, Operation, Phase
from tests.support.model_disk import SURVIVALS, Disk, Survival, subsets
from tests.support.model_files import ModelFilesystem

__all__ = ["Instant", "LocalRuns", "instants", "run_into_crash"]

OpenStore = Callable[[], LocalStore]

FOLDER = "/disk/repository"
THE_END = Operation(number=0, name="the end", path="")
LATER_S = 7200.0  # after a crash: whatever wrote a temporary file is gone for longer than the sweep waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """A disk at one moment of a run, and what was promised by then."""

    where: str
    number: int
    name: str
    phase: Phase
    disk: Disk
    ledger: Ledger
    life: Life | None = None
    """Whose agent may be followed by another one."""


class LocalRuns:
    """Runs and judges cases."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    # Crashes

    def crash_everywhere(self, workflow: Workflow, survivals: Iterable[Survival] = SURVIVALS) -> None:
        """Before, in and after every operation: the process dies, or the power goes."""
        survivals = tuple(survivals)
        for instant in instants(workflow):
            self._check(workflow, f"process crash, {instant.phase}", instant, instant.disk)
            for survival in survivals:
                after = instant.disk.after_power_loss(survival)
                self._check(workflow, f"power loss, {instant.phase}", instant, after, detail=survival.name)

    def lose_every_subset(self, workflow: Workflow, *, limit: int) -> None:
        """After every operation the power goes, and each combination of unsynced names survives.

        Moments with more than `limit` unsynced names are left out.
        """
        for instant in instants(workflow):
            count = instant.disk.unsynced_names()
            if instant.phase == "after" and count <= limit:
                for survival in subsets(count):
                    after = instant.disk.after_power_loss(survival)
                    self._check(workflow, "power loss, every subset", instant, after, detail=survival.name)

    def crash_then_lose_power(self, workflow: Workflow, *, is_chosen: Callable[[Instant], bool]) -> None:
        """The process dies at a chosen instant, another goes on from what is unsynced, and then the power goes.

        The other is the next life, a new agent that adopts the life of the one that died, or who tries again.
        """
        seen: set[object] = set()
        for first in instants(workflow):
            picture = (first.disk.picture(is_durable=True), first.ledger.allowed)
            if picture in seen or not is_chosen(first):
                continue
            seen.add(picture)
            self._lose_power_after(workflow, first, "next life", _next_life)
            if first.life is not None:
                self._lose_power_after(workflow, first, "new agent", _new_agent)
            if workflow.again is not None:
                self._lose_power_after(workflow, first, "again", _again(workflow.again))

    def _lose_power_after(
        self, workflow: Workflow, first: Instant, name: str, act: Callable[[Instant, OpenStore, Ledger], None]
    ) -> None:
        for second in successor_instants(first, act):
            after = second.disk.after_power_loss(SURVIVALS[0])
            where = f"{first.where} ({first.phase}), then {second.where} ({second.phase})"
            instant = replace(second, where=where)
            self._check(workflow, f"process crash, {name}, power loss", instant, after, is_short=True)

    def read_everywhere(self, workflow: Workflow) -> None:
        """Whoever reads a manifest at any moment finds its objects until the next commit."""
        promised: dict[str, tuple[int, tuple[ObjectRow, ...]]] = {}
        for instant in instants(workflow):
            case = Case(workflow=workflow.name, fault="reader", where=f"{instant.where} ({instant.phase})")
            self.tally.count(case)
            files = instant.disk.files()
            commits = instant.ledger.commits
            for path, content in files.items():
                if path.startswith(f"{FOLDER}/{MANIFESTS}/") and path.endswith(".json"):
                    promised[path] = (commits, decode_manifest(content, name=path).objects)
            lost = [
                row.key
                for seen, rows in promised.values()
                for row in rows
                if seen == commits and f"{FOLDER}/{row.key}" not in files
            ]

            def check(lost: list[str] = lost) -> None:
                assert not lost, f"deleted under a reader: {lost}"

            self.tally.judged += 1
            self.tally.check(case, check)

    def _check(
        self,
        workflow: Workflow,
        fault: str,
        instant: Instant,
        disk: Disk,
        *,
        detail: str = "",
        is_short: bool = False,
        is_whole: bool = True,
    ) -> None:
        where = f"{instant.where} {detail}".rstrip()
        case = Case(workflow=workflow.name, fault=fault, where=where)
        self.tally.count(case)
        if not self.tally.is_new((disk.picture(), instant.ledger.allowed, is_short, is_whole)):
            return
        disk = disk.copy()
        disk.now_s += LATER_S

        def open_store() -> LocalStore:
            return LocalStore(Path(FOLDER), filesystem=ModelFilesystem(disk))

        def check() -> None:
            if is_short:
                judge_promises(open_store, instant.ledger)
                return
            judge(open_store, instant.ledger, is_whole=is_whole)
            temporary = [path for path in disk.files() if "~" in path]
            assert not temporary, f"temporary files are left: {temporary}"

        self.tally.check(case, check)

    # Errors

    def fail_everywhere(
        self,
        workflow: Workflow,
        kind: FaultKind,
        number: int = errno.EIO,
        *,
        survivals: Iterable[Survival] = (SURVIVALS[0], SURVIVALS[2]),
        changes_only: bool = False,
        chosen: slice = slice(None),
    ) -> None:
        """Every (chosen) operation fails in this way; what follows must work, and a power loss lose nothing."""
        name = f"{kind} {errno.errorcode[number]}" if kind in ("error", "applied", "dead") else kind
        failing = [op for op in operations(workflow) if _applies(kind, op, changes_only=changes_only)]
        for operation in failing[chosen]:
            run = _Run(workflow, Fault(kind=kind, number=operation.number, errno=number))
            case = Case(workflow=workflow.name, fault=name, where=str(operation))
            self.tally.check(case, run.go)
            if not run.files.has_fired:
                continue
            end = Instant(
                where=str(operation),
                number=operation.number,
                name=operation.name,
                phase="after",
                disk=run.disk,
                ledger=run.site.ledger,
            )
            is_whole = kind != "stale"
            self._check(workflow, name, end, run.disk, is_whole=is_whole)
            for survival in survivals:
                after = run.disk.after_power_loss(survival)
                self._check(workflow, f"{name}, power loss", end, after, detail=survival.name, is_whole=is_whole)


def _applies(kind: FaultKind, operation: Operation, *, changes_only: bool) -> bool:
    if kind == "stale":
        return operation.name == "list_directory"
    if kind == "short":
        return operation.name == "write"
    if kind == "applied":
        return operation.is_change
    return operation.is_change or not changes_only


class _Run:
    """One run of a workflow in one process, with a fault from `begin` on."""

    def __init__(self, workflow: Workflow, fault: Fault | None = None) -> None:
        self.workflow, self._fault = workflow, fault
        self.disk = Disk("/disk")
        self.files = FaultyFilesystem(ModelFilesystem(self.disk))
        self._observe: Callable[[Operation, Phase], None] | None = None
        self.site = Site(open_store=self._open, begin=self._begin)
        self._has_begun = False

    def observed(self, observe: Callable[[Operation, Phase], None]) -> _Run:
        self._observe = observe
        return self

    def go(self) -> None:
        fault = None if self._fault is None else self._fault.kind
        go_through(self.workflow, self.site, fault=fault)

    def instant(self, operation: Operation, phase: Phase) -> Instant:
        """Return what there is at this moment."""
        return Instant(
            where=str(operation),
            number=operation.number,
            name=operation.name,
            phase=phase,
            disk=self.disk.copy(),
            ledger=self.site.ledger.copy(),
            life=self.site.current,
        )

    def _open(self) -> LocalStore:
        return LocalStore(Path(FOLDER), filesystem=self.files)

    def _begin(self) -> None:
        self.files.arm(self._fault, self._observe)


def instants(workflow: Workflow) -> Iterator[Instant]:
    """Yield every moment of an undisturbed run at which it may be cut off."""
    found: list[Instant] = []
    run = _Run(workflow)

    def look(operation: Operation, phase: Phase) -> None:
        if operation.is_change:
            found.append(run.instant(operation, phase))

    run.observed(look).go()
    found.append(run.instant(THE_END, "after"))
    yield from found


def run_into_crash(workflow: Workflow, number: int) -> Disk:
    """Return the disk after a run that really ends at this operation."""
    run = _Run(workflow, Fault(kind="crash", number=number))
    try:
        run.go()
    except Crash:
        return run.disk
    raise AssertionError(f"the run went on after its end: {number}")


def successor_instants(first: Instant, act: Callable[[Instant, OpenStore, Ledger], None]) -> Iterator[Instant]:
    """Yield every moment of what another process does after a crash."""
    found: list[Instant] = []
    disk, ledger = first.disk.copy(), first.ledger.copy()
    disk.now_s += LATER_S

    def look(operation: Operation, phase: Phase) -> None:
        if operation.is_change and phase == "after":
            found.append(
                Instant(
                    where=str(operation),
                    number=operation.number,
                    name=operation.name,
                    phase=phase,
                    disk=disk.copy(),
                    ledger=ledger.copy(),
                )
            )

    files = FaultyFilesystem(ModelFilesystem(disk), observe=look)
    act(first, lambda: LocalStore(Path(FOLDER), filesystem=files), ledger)
    found.append(Instant(where="the end", number=0, name="the end", phase="after", disk=disk, ledger=ledger))
    yield from found


def _next_life(_: Instant, open_store: OpenStore, ledger: Ledger) -> None:
    """Attach, save twice, and do the rounds of retention."""
    life = Life(open_store, ledger, keep_last=1)
    life.attach()
    step = 0 if life.recovered is None else life.recovered.step
    for later in (step + 1, step + 2):
        life.save(later)


def _new_agent(first: Instant, open_store: OpenStore, ledger: Ledger) -> None:
    """Announce what the agent that died has committed, and save; unless a rewind has fenced this life."""
    assert first.life is not None
    life = Life(open_store, ledger, keep_last=first.life.keep_last, adopted=first.life)
    try:
        life.recall()
        life.save(max((name.step for name in ledger.allowed if name is not None), default=0) + 1)
    except FencedError:
        return


def _again(act: Callable[[Site], None]) -> Callable[[Instant, OpenStore, Ledger], None]:
    return lambda _, open_store, ledger: act(Site(open_store=open_store, ledger=ledger))


def operations(workflow: Workflow) -> list[Operation]:
    """Return the operations of an undisturbed run."""
    run = _Run(workflow)
    run.go()
    return run.files.operations
