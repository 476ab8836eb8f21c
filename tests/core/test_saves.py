"""Saves as the agent starts them, over a real arena and a real folder whose opening can be held up."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import pytest

from moc._native import crc32c
from moc.agent.custody import Custody
from moc.agent.saves import Saves
from moc.config import Config
from moc.format.manifest import Manifest, Parent, encode_incarnation
from moc.format.tagged import encode_state
from moc.host import SystemHost
from moc.plan.freeing import Moment
from moc.repository import Repository
from moc.snapshot.seal import EXPLICIT, PERSIST, SealRecord
from moc.state import Expert
from moc.store.open import open_store
from moc.store.port import Store
from moc.trace import Trace
from tests.core.test_custody import FIRST, _descriptor, _replicated

PATIENCE_S = 30.0
VERSIONS = 5


class SlowHost(SystemHost):
    """A machine whose storage answers when the test lets it, and whose clock can be moved."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answers = threading.Event(), threading.Event()
        self.jump_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.jump_s

    def open_store(self, url: str, *, trace: Trace) -> Store:
        self.asked.set()
        assert self.answers.wait(PATIENCE_S)
        return super().open_store(url, trace=trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """An agent's saves, without its sockets."""

    saves: Saves
    custody: Custody
    host: SlowHost
    woken: int

    def look(self, *, may_start: bool = True) -> None:
        self.saves.collect(self.custody)
        self.saves.look(self.custody, ended=set(), may_start=may_start)

    def look_until(self, is_true: Callable[[], bool], *, may_start: bool = True) -> None:
        """Look whenever the persist thread says that something has ended."""
        self.look(may_start=may_start)
        while not is_true():
            assert self.host.wait_readable(self.woken, PATIENCE_S), self.saves.outcomes()
            os.read(self.woken, 4096)
            self.look(may_start=may_start)

    def manifests(self) -> list[Manifest]:
        repository = Repository(open_store(str(self.custody.life.descriptor["storage"])))
        return [repository.read_manifest(stored.name) for stored in repository.checkpoints()]

    def leave(self) -> None:
        """Store what an agent stores before it leaves."""
        self.saves.persist_newest(self.custody)
        self.look_until(lambda: not self.saves.is_busy, may_start=False)

    def begin_in_mode_full(self, parent: Parent) -> None:
        """Begin the next life on the same memory."""
        self.begin_second(parent, config=asdict(Config()))

    def begin_second(self, parent: Parent, **facts: object) -> None:
        """Begin the next life on the same memory, with these facts in its descriptor."""
        record = replace(FIRST, number=2, token="1" * 8, reason="recover", parent=parent)
        described = {**self.custody.life.descriptor, **facts}
        described["lineage"] = [encode_incarnation(life).decode() for life in (FIRST, record)]
        self.custody.renew(described)
        self.saves.begin_life()

    def seal(
        self,
        step: int,
        *,
        record: int,
        flags: int,
        ordinal: int = 0,
        older: Mapping[Expert, int] = MappingProxyType({}),
        behind: Sequence[int] | None = None,
        ranks: Sequence[int] | None = None,
        alike: bytes | None = None,
    ) -> Moment:
        """Seal a snapshot of all ranks here, or of these, whose small states hold `alike` and their rank.

        `older` are the steps of experts that it has not captured, or that the ranks have not which are `behind`.
        """
        moment = (step, f"{ordinal:02x}{step:06x}")
        for catalog in self.custody.arena.catalogs:
            if ranks is not None and catalog.rank not in ranks:
                continue
            blob = encode_state({} if alike is None else {"alike": alike, "rank": catalog.rank}).to_bytes()
            units = self.custody.arena.rank_layout(catalog.rank).units
            left = older if behind is None or catalog.rank in behind else {}
            slots = array("I", [record] * len(units))
            with self.custody.arena.view(self.custody.arena.state_offset(catalog.rank, slots), len(blob)) as view:
                view[:] = blob
            self.custody.arena.seal(
                record,
                SealRecord(
                    run=FIRST.run,
                    incarnation=self.custody.life.record.number,
                    step=step,
                    rank=catalog.rank,
                    flags=flags,
                    attempt=moment[1],
                    digest="0" * 16,
                    state_bytes=len(blob),
                    state_crc32c=crc32c(blob),
                    slots=slots,
                    steps=array("Q", [step if u.expert is None else left.get(u.expert, step) for u in units]),
                    crcs=array("I", [crc32c(bytes(shard.size_bytes)) for shard in catalog.shards]),
                ),
            )
        return moment


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """An agent of a job in mode full."""
    yield from _desk(tmp_path, {})


@pytest.fixture
def partial_desk(tmp_path: Path) -> Iterator[Desk]:
    """An agent of a job that stores one expert of two at a time."""
    yield from _desk(tmp_path, {"mode": "partial", "k_persist": 1})


@pytest.fixture
def replicated_desk(tmp_path: Path) -> Iterator[Desk]:
    """An agent of a job that stores one expert of two at a time, with slices of every expert on two ranks."""
    yield from _desk(tmp_path, {"mode": "partial", "k_persist": 1}, _replicated(FIRST))


def _desk(tmp_path: Path, settings: dict[str, object], facts: Mapping[str, object] | None = None) -> Iterator[Desk]:
    storage = tmp_path / "storage"
    repository = Repository(open_store(str(storage)))
    repository.create()
    repository.put_incarnation(FIRST)
    repository.close()
    described = {**(_descriptor(FIRST) if facts is None else facts), "storage": str(storage), "versions": VERSIONS}
    size = len(described["catalogs"])  # type: ignore[arg-type]  # a list
    described["topology"] = {"world_size": size, "node_of_rank": [0] * size, "ep_sizes": []}
    described["config"] = {**asdict(Config()), **settings}
    custody = Custody.create(described, earlier=None)
    receive, send = os.pipe()
    host = SlowHost()
    saves = Saves(host=host, trace=Trace(), reply=lambda _connection, _message: None, wake_fd=send)
    yield Desk(saves=saves, custody=custody, host=host, woken=receive)
    host.answers.set()
    saves.close()
    custody.close()
    os.close(receive)
    os.close(send)


def test_a_periodic_save_waits_for_the_look_at_what_a_dead_agent_has_committed(desk: Desk) -> None:
    desk.seal(7, record=0, flags=PERSIST)
    desk.saves.recall(desk.custody)
    assert desk.host.asked.wait(PATIENCE_S)
    desk.look()
    assert desk.saves.outcomes() == [], "not given up for a save that nobody makes"

    desk.host.answers.set()
    desk.look_until(lambda: desk.saves.last_committed_step == 7)


@pytest.mark.parametrize("jump_s", [1e6, -1e6])
def test_a_clock_that_jumps_in_a_save_costs_nothing_that_is_complete(desk: Desk, jump_s: float) -> None:
    desk.seal(7, record=0, flags=PERSIST)
    desk.look()
    assert desk.host.asked.wait(PATIENCE_S)
    desk.host.jump_s = jump_s
    desk.look()
    assert desk.saves.outcomes() == [], "under way, whatever the time is"

    desk.host.answers.set()
    desk.look_until(lambda: desk.saves.last_committed_step == 7)
    desk.seal(8, record=1, flags=PERSIST)
    desk.look_until(lambda: desk.saves.last_committed_step == 8)
    assert desk.saves.counters() == {"saves": 2, "failed": 0}


@pytest.mark.parametrize(("jump_s", "is_given_up"), [(1e6, True), (-1e6, False)])
def test_a_clock_that_jumps_while_a_seal_is_missing_gives_that_save_up_at_most(
    desk: Desk, jump_s: float, *, is_given_up: bool
) -> None:
    desk.host.answers.set()
    moment = desk.seal(7, record=0, flags=PERSIST, ranks=(0,))
    desk.look()
    desk.host.jump_s = jump_s
    desk.look()
    assert bool(desk.saves.counters()["failed"]) == is_given_up
    assert ("not every rank sealed in time" in str(desk.saves.last_error)) == is_given_up

    assert desk.seal(7, record=0, flags=PERSIST, ranks=(1,)) == moment
    desk.seal(8, record=1, flags=PERSIST | EXPLICIT)
    desk.look_until(lambda: desk.saves.last_committed_step == 8)
    assert desk.saves.last_error is None


def test_a_periodic_save_does_not_wait_for_another_one(desk: Desk) -> None:
    desk.seal(7, record=0, flags=PERSIST)
    desk.look()
    assert desk.host.asked.wait(PATIENCE_S)
    desk.seal(8, record=1, flags=PERSIST)
    desk.look()
    assert "the previous save is still under way" in str(desk.saves.last_error)


def test_the_newest_snapshot_is_stored_before_the_agent_leaves_however_many_saves_wait(desk: Desk) -> None:
    for record, step in enumerate((5, 6, 7)):
        desk.seal(step, record=record, flags=PERSIST | EXPLICIT)
        desk.look()
        assert desk.host.asked.wait(PATIENCE_S)
    desk.seal(8, record=3, flags=0)
    desk.saves.persist_newest(desk.custody)
    desk.look(may_start=False)

    desk.host.answers.set()
    desk.look_until(lambda: not desk.saves.is_busy)
    assert desk.saves.last_committed_step == 8
    assert desk.saves.counters() == {"saves": 4, "failed": 0}


def test_a_save_that_ended_while_the_agent_looked_is_not_taken_for_one_that_never_was_made(desk: Desk) -> None:
    desk.host.answers.set()
    moment = desk.seal(7, record=0, flags=PERSIST)
    desk.look()
    assert desk.host.wait_readable(desk.woken, PATIENCE_S)
    os.read(desk.woken, 4096)  # it has ended, and nobody has taken notice

    desk.saves.look(desk.custody, ended=set(), may_start=True)
    assert desk.saves.outcomes() == []
    assert not desk.custody.is_saving(moment), "not begun again"
    desk.look()
    assert desk.saves.counters() == {"saves": 1, "failed": 0}


def test_an_agent_that_leaves_stores_what_the_newest_checkpoint_has_not_of_its_snapshot(partial_desk: Desk) -> None:
    desk = partial_desk
    desk.host.answers.set()
    for record, step in enumerate((6, 7)):
        desk.seal(step, record=record, flags=PERSIST)
        desk.look_until(lambda step=step: desk.saves.last_committed_step == step)
    (newest,) = desk.manifests()
    assert [row.step for row in newest.stale_experts] == [6]

    desk.leave()

    (last,) = desk.manifests()
    assert last.stale_experts == ()
    assert last.name.step == 7
    assert last.name.attempt > newest.name.attempt, "another checkpoint, with keys of its own"
    assert desk.saves.counters() == {"saves": 3, "failed": 0}

    desk.leave()
    assert desk.manifests() == [last], "there is nothing to add"
    assert desk.saves.counters() == {"saves": 3, "failed": 0}


def test_an_agent_that_leaves_stores_nothing_twice(partial_desk: Desk) -> None:
    desk = partial_desk
    desk.host.answers.set()
    desk.seal(6, record=0, flags=PERSIST)
    desk.look_until(lambda: desk.saves.last_committed_step == 6)
    first = desk.manifests()
    assert first[0].stale_experts == ()

    desk.leave()
    assert desk.manifests() == first, "the first checkpoint had everything"

    desk.seal(7, record=1, flags=PERSIST | EXPLICIT)
    desk.look_until(lambda: desk.saves.last_committed_step == 7)
    awaited = desk.manifests()
    assert awaited[0].stale_experts == ()
    desk.leave()
    assert desk.manifests() == awaited, "an awaited one too"


def test_a_whole_snapshot_of_a_step_that_is_stored_in_part_is_stored_before_the_agent_leaves(
    partial_desk: Desk,
) -> None:
    desk = partial_desk
    desk.host.answers.set()
    for record, step in enumerate((6, 7)):
        desk.seal(step, record=record, flags=PERSIST)
        desk.look_until(lambda step=step: desk.saves.last_committed_step == step)
    desk.seal(7, record=2, flags=PERSIST | EXPLICIT, ordinal=1)

    desk.leave()

    (last,) = desk.manifests()
    assert (last.name.step, last.name.attempt[:2]) == (7, "01")
    assert last.stale_experts == ()
    assert desk.saves.counters() == {"saves": 3, "failed": 0}


def test_a_whole_snapshot_whose_save_failed_is_tried_again_before_the_agent_leaves(partial_desk: Desk) -> None:
    desk = partial_desk
    desk.host.answers.set()
    for record, step in enumerate((6, 7)):
        desk.seal(step, record=record, flags=PERSIST)
        desk.look_until(lambda step=step: desk.saves.last_committed_step == step)
    moment = desk.seal(7, record=2, flags=PERSIST | EXPLICIT, ordinal=1)
    desk.custody.scan()
    desk.saves.give_up(desk.custody, moment, "too many saves wait")

    desk.leave()

    (last,) = desk.manifests()
    assert (last.name.step, last.name.attempt[:2]) == (7, "01")


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_life_in_mode_full_stores_the_partial_snapshot_that_it_was_recovered_from(
    partial_desk: Desk, *, is_stored: bool
) -> None:
    desk, stale = partial_desk, Expert(layer=0, index=1)
    desk.host.answers.set()
    desk.seal(6, record=0, flags=PERSIST if is_stored else 0)
    desk.look_until(lambda: not is_stored or desk.saves.last_committed_step == 6)
    desk.seal(7, record=1, flags=0, older={stale: 6})
    desk.look()
    desk.begin_in_mode_full(Parent(incarnation=1, step=7, attempt=None))

    desk.leave()

    last = desk.manifests()[-1]
    assert desk.saves.last_error is None
    assert (last.name.incarnation, last.name.step) == (2, 7)
    assert [(row.expert, row.step, row.source == last.name) for row in last.stale_experts] == [
        (stale, 6, not is_stored)
    ]
    desk.leave()
    assert desk.manifests()[-1] == last, "once more is the same checkpoint"


def test_an_agent_that_leaves_stores_experts_in_pieces_as_an_older_snapshot_has_them(replicated_desk: Desk) -> None:
    """Storage has them of step 5, memory of step 6, and the newest snapshot in two halves."""
    desk, torn = replicated_desk, Expert(layer=0, index=0)
    desk.host.answers.set()
    desk.seal(5, record=0, flags=PERSIST)
    desk.look_until(lambda: desk.saves.last_committed_step == 5)
    desk.seal(6, record=1, flags=0)
    desk.look()
    desk.seal(7, record=2, flags=0, older={torn: 6}, behind=[2])
    desk.look()

    desk.leave()

    last = desk.manifests()[-1]
    assert desk.saves.last_error is None
    assert last.name.step == 7
    assert [(row.expert, row.step, row.source) for row in last.stale_experts] == [(torn, 6, last.name)]
    assert not desk.custody.pinned()
    desk.leave()
    assert desk.manifests()[-1] == last, "there is nothing to add"
    assert desk.saves.counters() == {"saves": 2, "failed": 0}


def test_what_an_awaited_checkpoint_lacks_of_an_older_snapshot_is_stored_when_the_agent_leaves(
    replicated_desk: Desk,
) -> None:
    desk, torn = replicated_desk, Expert(layer=0, index=0)
    desk.host.answers.set()
    desk.seal(5, record=0, flags=PERSIST)
    desk.look_until(lambda: desk.saves.last_committed_step == 5)
    desk.seal(6, record=1, flags=0)
    desk.look()
    desk.seal(7, record=2, flags=PERSIST | EXPLICIT, older={torn: 6}, behind=[2])
    desk.look_until(lambda: desk.saves.last_committed_step == 7)
    assert [row.step for row in desk.manifests()[-1].stale_experts] == [5], "an awaited save is of its snapshot alone"

    desk.leave()

    assert [row.step for row in desk.manifests()[-1].stale_experts] == [6]


def test_a_life_stores_what_it_was_recovered_from_with_the_experts_of_all_its_layers(replicated_desk: Desk) -> None:
    desk, torn = replicated_desk, Expert(layer=0, index=0)
    desk.host.answers.set()
    desk.seal(5, record=0, flags=PERSIST)
    desk.look_until(lambda: desk.saves.last_committed_step == 5)
    earlier = desk.seal(6, record=1, flags=0)
    desk.look()
    newest = desk.seal(7, record=2, flags=0, older={torn: 6}, behind=[2])
    desk.look()
    layers = [[1, *earlier], [1, *newest]]
    desk.begin_second(Parent(incarnation=1, step=7, attempt=None), layers=layers)

    desk.leave()

    last = desk.manifests()[-1]
    assert desk.saves.last_error is None
    assert (last.name.incarnation, last.name.step) == (2, 7)
    assert [(row.expert, row.step, row.source) for row in last.stale_experts] == [(torn, 6, last.name)]


def test_an_agent_leaves_with_memory_of_another_layout_where_the_first_snapshot_has_experts_in_pieces(
    replicated_desk: Desk,
) -> None:
    """The first snapshot of the new life cannot be a checkpoint: nothing has these experts in its layout."""
    first, torn = replicated_desk, Expert(layer=0, index=0)
    first.host.answers.set()
    first.seal(5, record=0, flags=0)
    first.look()
    record = replace(
        FIRST, number=2, token="1" * 8, reason="recover", parent=Parent(incarnation=1, step=5, attempt=None)
    )
    described = {**first.custody.life.descriptor, "versions": VERSIONS + 1}
    described["lineage"] = [encode_incarnation(life).decode() for life in (FIRST, record)]
    second = replace(first, custody=Custody.create(described, earlier=first.custody))
    second.seal(7, record=0, flags=0, older={torn: 6}, behind=[2])
    second.look()

    second.leave()

    assert second.saves.last_error is None
    assert [(m.name.incarnation, m.name.step, m.stale_experts) for m in second.manifests()] == [(2, 5, ())]
    second.custody.arena.close()


def test_a_life_in_mode_full_stores_no_snapshot_of_its_own_of_several_steps(desk: Desk) -> None:
    desk.host.answers.set()
    desk.seal(7, record=0, flags=PERSIST, older={Expert(layer=0, index=1): 6})
    desk.look_until(lambda: desk.saves.counters()["failed"] == 1)
    assert "a checkpoint of mode full would be of several steps" in str(desk.saves.last_error)
