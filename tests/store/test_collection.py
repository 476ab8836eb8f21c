"""A collection on every kind of store: it goes by the store's own listing and time."""

from __future__ import annotations

from moc.collect import collect, fence, find_garbage
from moc.format.manifest import Parent
from moc.host import SystemHost
from moc.repository import Repository
from moc.store.port import Store
from moc.trace import Trace
from moc.verify import verify_repository
from tests.support.repository import Model, RepositoryBuilder

TRACE = Trace()


class StandingClock(SystemHost):
    """Time that passes only in `sleep`."""

    slept_s = 0.0

    def now_s(self) -> float:
        return self.slept_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


def test_leftovers_go_after_a_wait_and_every_checkpoint_stays(store: Store) -> None:
    builder = RepositoryBuilder(store, model=Model(moe_layers=1))
    builder.begin(1)
    kept = builder.commit(1, 10)
    _litter(builder, 1, 20)
    builder.begin(2, parent=Parent(incarnation=1, step=10, attempt=kept.name.attempt))
    _litter(builder, 2, 30)
    repository, clock = builder.repository, StandingClock()

    first = _collect(repository, clock)
    record = fence(repository, find_garbage(repository, with_off_lineage=True, trace=TRACE), trace=TRACE)
    second = _collect(repository, clock)

    assert ({key.split("/")[1] for key in first}, {key.split("/")[1] for key in second}) == (
        {"000001-run-7"},
        {"000002-run-7"},
    )
    assert record is not None
    assert 2 * 120 < clock.slept_s <= 2 * 180, "both records are seconds old"
    report = verify_repository(repository, read_data_fraction=1.0)
    assert (report.all_findings, report.notes) == ((), ())
    assert [checkpoint.name for checkpoint in report.checkpoints] == [kept.name]
    assert repository.victim_lists() == []


def _litter(builder: RepositoryBuilder, incarnation: int, step: int) -> None:
    for catalog in builder.model.catalogs():
        builder.write_objects(builder.name(incarnation, step), catalog)


def _collect(repository: Repository, clock: StandingClock) -> set[str]:
    report = collect(repository, with_off_lineage=True, settle_s=180.0, host=clock, trace=TRACE, on_wait=lambda _: None)
    return {entry.key for entry in report.objects}
