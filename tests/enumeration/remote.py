"""Every request of a workflow to an object store times every fault, with and without the retries of production.

An object store has no power to lose: what it has served is durable. What it has instead are answers that get lost, and
puts that it serves when nobody expects them any more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moc.store.port import Store
from moc.store.retry import RetryingStore
from tests.enumeration.job import Ledger, Life
from tests.enumeration.judge import judge
from tests.enumeration.tally import Case, Tally
from tests.enumeration.workflows import Site, Workflow, go_through
from tests.support.faulty_store import Bucket, FaultyStore, Request, StoreFault, StoreFaultKind
from tests.support.model_disk import without_token

__all__ = ["RemoteRuns"]


class _InstantClock:
    """A clock on which waiting takes no time at all."""

    def now_s(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        """Return at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    where: str
    bucket: Bucket
    ledger: Ledger


class RemoteRuns:
    """Runs and judges cases."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    def crash_everywhere(self, workflow: Workflow) -> None:
        """The process dies before or after every request."""
        found: list[Instant] = []
        run = _Run(workflow)

        def look(request: Request, phase: str) -> None:
            if request.is_change:
                where = f"{request} ({phase})"
                found.append(Instant(where=where, bucket=run.bucket.copy(), ledger=run.site.ledger.copy()))

        run.observe = look
        run.go()
        found.append(Instant(where="the end", bucket=run.bucket, ledger=run.site.ledger))
        for instant in found:
            self._check(workflow, "store: process crash", instant)

    def fail_everywhere(
        self, workflow: Workflow, kind: StoreFaultKind, *, retries: bool, chosen: slice = slice(None)
    ) -> None:
        """Every (chosen) request fails in this way; what follows must work, and nothing promised may be lost."""
        name = f"store: {kind}" + (", retried" if retries else "")
        failing = [request for request in requests(workflow) if _applies(kind, request)]
        for request in failing[chosen]:
            run = _Run(workflow, StoreFault(kind=kind, number=request.number), retries=retries)
            self.tally.check(Case(workflow=workflow.name, fault=name, where=str(request)), run.go)
            if not run.store.has_fired:
                continue
            instant = Instant(where=str(request), bucket=run.bucket, ledger=run.site.ledger)
            for moment in _landings(instant) if kind == "late" else (instant,):
                self._check(workflow, name, moment, is_whole=kind not in ("stale", "late"))

    def _check(self, workflow: Workflow, fault: str, instant: Instant, *, is_whole: bool = True) -> None:
        case = Case(workflow=workflow.name, fault=fault, where=instant.where)
        self.tally.count(case)
        picture = tuple((key, without_token(content)) for key, content in sorted(instant.bucket.objects.items()))
        if self.tally.is_new((picture, instant.ledger.allowed, is_whole)):
            bucket = instant.bucket.copy()
            self.tally.check(case, lambda: judge(lambda: FaultyStore(bucket), instant.ledger, is_whole=is_whole))


def _applies(kind: StoreFaultKind, request: Request) -> bool:
    if kind == "stale":
        return request.name == "list"
    if kind == "late":
        return request.name == "put"
    return request.is_change or kind != "applied"


class _Run:
    """One run of a workflow in one process, with a fault from `begin` on."""

    def __init__(self, workflow: Workflow, fault: StoreFault | None = None, *, retries: bool = False) -> None:
        self.workflow, self._fault, self._retries = workflow, fault, retries
        self.bucket = Bucket()
        self.store = FaultyStore(self.bucket)
        self.observe: Callable[[Request, str], None] | None = None
        self.site = Site(open_store=self._open, begin=lambda: self.store.arm(self._fault, self.observe))

    def go(self) -> None:
        fault = None if self._fault is None else self._fault.kind
        go_through(self.workflow, self.site, fault=fault, failure_limit=0 if self._retries else 1)

    def _open(self) -> Store:
        if not self._retries:
            return self.store
        return RetryingStore(self.store, _InstantClock(), chance=random.Random(0))


def _landings(first: Instant) -> Iterator[Instant]:
    """Yield what there is when the put is served at last: now, once the next life has begun, once it has committed."""
    for moment in ("at once", "after the next record", "after the next commit"):
        bucket, ledger = first.bucket.copy(), first.ledger.copy()
        if moment != "at once":
            life = Life(lambda bucket=bucket: FaultyStore(bucket), ledger, keep_last=1)
            life.attach()
            if moment == "after the next commit":
                life.save(1 if life.recovered is None else life.recovered.step + 1)
                bucket.serve_late()
        yield Instant(where=f"{first.where}, served {moment}", bucket=bucket, ledger=ledger)


def requests(workflow: Workflow) -> list[Request]:
    """Return the requests of an undisturbed run."""
    run = _Run(workflow)
    run.go()
    return run.store.requests
