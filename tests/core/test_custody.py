"""Custody of real arenas: what a new life finds in memory that an earlier one has left."""

from __future__ import annotations

import os
from array import array
from dataclasses import asdict, replace

import pytest

from moc.agent.custody import Custody
from moc.agent.life import Life
from moc.agent.peers.report import Others
from moc.config import Config
from moc.errors import UsageError
from moc.format.manifest import Incarnation, Parent, encode_incarnation
from moc.plan.freeing import Seal, filled_limit
from moc.snapshot.seal import REPLICATE, SealRecord
from moc.topology import Topology
from tests.support.plain import PlainState
from tests.support.repository import Model

CATALOGS = Model(world_size=2, moe_layers=1, experts=2, hidden=4, dense=(("embed.weight", (50, 4)),)).catalogs()
FIRST = Incarnation(run="run-7", number=1, token="0" * 8, parent=None, reason="start", fingerprint={})
SECOND = replace(
    FIRST, number=2, reason="recover", parent=Parent(incarnation=1, step=5, attempt="00abcdef"), token="1" * 8
)


def _descriptor(*lives: Incarnation) -> dict[str, object]:
    return {
        "run": "run-7",
        "versions": 3,
        "catalogs": [catalog.to_json() for catalog in CATALOGS],
        "fingerprint": {},
        "digest": "0" * 16,
        "tensors": 1,
        "topology": {},
        "software": {},
        "storage": "unused",
        "keep_last": 1,
        "keep_every": 0,
        "timeout_s": 60.0,
        "memory_budget_bytes": None,
        "config": asdict(Config()),
        "lineage": [encode_incarnation(life).decode() for life in lives],
    }


def _seal(
    custody: Custody,
    rank: int,
    step: int,
    record: int,
    *,
    experts_at: int | None = None,
    attempt: str = "00abcdef",
    flags: int = 0,
) -> None:
    units = len(custody.arena.rank_layout(rank).units)
    custody.arena.seal(
        record,
        SealRecord(
            run="run-7",
            incarnation=custody.life.record.number,
            step=step,
            rank=rank,
            flags=flags,
            attempt=attempt,
            digest="0123456789abcdef",
            state_bytes=0,
            state_crc32c=0,
            slots=array("I", [record] * units),
            steps=array("Q", [step, *[step if experts_at is None else experts_at] * (units - 1)]),
            crcs=array("I", [0] * len(custody.arena.catalog(rank).shards)),
        ),
    )


def test_a_source_whose_record_has_rotted_is_freed_when_a_life_begins() -> None:
    custody = Custody.create(_descriptor(FIRST), earlier=None)
    for rank in (0, 1):
        _seal(custody, rank, 5, 0)
    custody.scan()
    assert custody.global_step == 5

    with custody.arena.view(custody.arena._record_offset(1, 0) + 60, 1) as byte:
        byte[0] ^= 0x10
    custody.renew(_descriptor(FIRST, SECOND))

    assert custody.arena.is_free(1, 0), "its trainer could not tell which slots it holds"
    assert custody.arena.is_free(0, 0), "half a snapshot is no source of a recovery"
    custody.close()


def test_what_a_dead_rank_lacks_is_freed_on_the_others() -> None:
    """A rank alone in an explicit save would else wait for slots until its deadline."""
    custody = Custody.create(_descriptor(FIRST), earlier=None)
    for rank, step, record in ((0, 5, 0), (1, 5, 0), (1, 6, 1), (1, 7, 2)):
        _seal(custody, rank, step, record)
    custody.scan()
    assert not custody.arena.is_free(1, 1), "rank 0 may yet seal it"

    custody.scan(ended={0})

    assert custody.global_step == 5
    assert not custody.arena.is_free(1, 0)
    assert custody.arena.is_free(1, 1)
    assert custody.arena.is_free(1, 2)
    custody.close()


def _replicated(*lives: Incarnation, versions: int = 3, layers: object = None) -> dict[str, object]:
    """Return the descriptor of lives in which every expert has slices on two ranks."""
    catalogs = [PlainState(rank, 4, experts=2, expert_elements=40, dense_elements=40).catalog for rank in range(4)]
    descriptor = _descriptor(*lives) | {"versions": versions, "catalogs": [catalog.to_json() for catalog in catalogs]}
    return descriptor if layers is None else descriptor | {"layers": layers}


@pytest.mark.parametrize("versions", [2, 3])
def test_a_snapshot_stays_while_the_newest_has_experts_in_pieces_that_it_has_whole(versions: int) -> None:
    custody = Custody.create(_replicated(FIRST, versions=versions), earlier=None)
    for rank in range(4):
        _seal(custody, rank, 5, 0)
    custody.scan()
    for rank in range(4):
        _seal(custody, rank, 6, 1, experts_at=5 if rank == 2 else 6)  # rank 2 has missed what rank 0 has of an expert

    custody.scan()

    assert custody.global_step == 6
    assert custody.arena.is_free(0, 0) == (versions == 2), "with two versions no snapshot could make up for it"
    if versions == 3:
        for rank in range(4):
            _seal(custody, rank, 7, 2)
        custody.scan()
        assert all(custody.arena.is_free(rank, record) for rank in range(4) for record in (0, 1))
    custody.close()


def test_what_a_life_was_recovered_from_stays_while_its_first_snapshot_has_experts_in_pieces() -> None:
    custody = Custody.create(_replicated(FIRST), earlier=None)
    for rank in range(4):
        _seal(custody, rank, 4, 0)
        _seal(custody, rank, 5, 1)
    custody.renew(_replicated(FIRST, SECOND, layers=[[1, 4, "00abcdef"]]))

    for rank in range(4):
        _seal(custody, rank, 7, 2, experts_at=5 if rank == 2 else 7)
    custody.scan()

    assert custody.global_step == 7
    assert [custody.arena.is_free(0, record) for record in range(3)] == [True, False, False], "room for the next"
    for rank in range(4):
        _seal(custody, rank, 8, 0)
    custody.scan()
    assert [custody.arena.is_free(0, record) for record in range(3)] == [False, True, True]
    custody.close()


def test_memory_of_another_layout_stays_while_the_first_snapshot_has_experts_in_pieces() -> None:
    """It is what a recovery reads until then: a crash right after that snapshot would find these in storage only."""
    earlier = Custody.create(_replicated(FIRST), earlier=None)
    for rank in range(4):
        _seal(earlier, rank, 5, 0)
    earlier.scan()
    custody = Custody.create(_replicated(FIRST, SECOND, versions=4), earlier=earlier)
    for rank in range(4):
        _seal(custody, rank, 7, 0, experts_at=6 if rank == 2 else 7)

    custody.scan()

    assert custody.newest == (7, "00abcdef")
    assert custody.global_step is None, "not announced: it is not what a recovery would take"
    assert {record.step for record in custody.source().recovery_source(custody.life).values()} == {5}
    for rank in range(4):
        _seal(custody, rank, 8, 1)
    custody.scan()
    assert custody.global_step == 8
    assert custody.earlier is None
    custody.close()


def test_layers_of_a_recovery_stay_until_the_new_life_has_a_global_snapshot() -> None:
    custody = Custody.create(_replicated(FIRST), earlier=None)
    for rank in range(4):
        for record, step in enumerate((3, 4, 5)):
            _seal(custody, rank, step, record)

    custody.renew(_replicated(FIRST, SECOND, layers=[[1, 4, "00abcdef"]]))

    for _ in range(2):
        assert [custody.arena.is_free(0, record) for record in range(3)] == [True, False, False]
        custody.scan()
    for rank in range(4):
        _seal(custody, rank, 6, 0)
    custody.scan()
    assert [custody.arena.is_free(0, record) for record in range(3)] == [False, True, True]
    custody.close()


def test_the_attempt_that_a_life_was_recovered_from_stays_whatever_else_this_node_has_sealed() -> None:
    """Other nodes may not have the later attempt: if each kept its latest, nothing would be whole any more."""
    custody = Custody.create(_descriptor(FIRST), earlier=None)
    for rank in (0, 1):
        _seal(custody, rank, 5, 0)
        _seal(custody, rank, 5, 1, attempt="01abcdef")

    custody.renew(_descriptor(FIRST, SECOND) | {"layers": [[1, 5, "00abcdef"]]})

    for _ in range(2):
        assert [custody.arena.is_free(0, record) for record in range(3)] == [False, True, True]
        custody.scan()
    assert {record.attempt for record in custody.recovery_source(custody.life).values()} == {"00abcdef"}
    custody.close()


def test_beside_half_of_what_a_life_was_recovered_from_no_other_attempt_takes_the_last_free_record() -> None:
    custody = Custody.create(_descriptor(FIRST) | {"versions": 2}, earlier=None)
    _seal(custody, 0, 5, 0)
    for rank in (0, 1):
        _seal(custody, rank, 5, 1, attempt="01abcdef")

    custody.renew(_descriptor(FIRST, SECOND) | {"versions": 2, "layers": [[1, 5, "00abcdef"]]})
    custody.scan()

    assert [custody.arena.is_free(rank, record) for rank in (0, 1) for record in (0, 1)] == [False, True, True, True]
    custody.close()


def _joint(*lives: Incarnation, versions: int = 4, mode: str = "partial", base: object = None) -> dict[str, object]:
    """Return the descriptor of node 0 of two, with two of four ranks."""
    topology = Topology(world_size=4, node_of_rank=(0, 0, 1, 1), ep_sizes=())
    descriptor = _replicated(*lives, versions=versions) | {
        "topology": topology.to_json(),
        "config": asdict(Config(mode=mode)),
        "fellows": {"node": 0, "secret": "", "address": "", "urls": []},
    }
    descriptor["catalogs"] = descriptor["catalogs"][:2]  # type: ignore[index]
    return descriptor if base is None else descriptor | {"base": [base]}


def _elsewhere(*steps: int, number: int = 1) -> Others:
    return Others(
        seals=tuple(
            Seal(incarnation=number, step=step, attempt="00abcdef", rank=rank, record=0)
            for step in steps
            for rank in (2, 3)
        )
    )


def _held(custody: Custody) -> list[int]:
    return sorted({r.step for rank in (0, 1) for r in custody.arena.seals(rank).values()})


def _seal_all(custody: Custody, step: int, *, number: int = 1) -> None:
    for rank in (0, 1):
        free = next(
            record for record in range(custody.arena.layout.ranks[0].versions) if custody.arena.is_free(rank, record)
        )
        _seal(custody, rank, step, free)
    custody.scan(others=_elsewhere(step, number=number))


@pytest.mark.parametrize(
    ("mode", "versions", "is_kept"), [("partial", 4, True), ("partial", 3, False), ("full", 4, False)]
)
def test_the_snapshot_of_the_newest_commit_stays_until_the_next_commit(mode: str, versions: int, is_kept: bool) -> None:
    custody = Custody.create(_joint(FIRST, versions=versions, mode=mode), earlier=None)
    _seal_all(custody, 5)
    custody.note_commit((5, "00abcdef"))
    for step in range(6, 12):
        _seal_all(custody, step)
        assert _held(custody) == ([5, step] if is_kept else [step])

    custody.note_commit((11, "00abcdef"))
    _seal_all(custody, 12)

    assert _held(custody) == ([11, 12] if is_kept else [12])
    custody.close()


def test_an_agent_that_adopts_an_arena_keeps_the_snapshot_of_the_newest_commit_before_it_has_looked_it_up() -> None:
    first = Custody.create(_joint(FIRST), earlier=None)
    _seal_all(first, 5)
    first.note_commit((5, "00abcdef"))
    _seal_all(first, 6)
    first.arena.publish(global_step=6, committed_step=5)

    custody = Custody.adopt(os.dup(first.arena.fd))
    _seal_all(custody, 7)
    assert _held(custody) == [5, 7]
    custody.note_commit((5, "00abcdef"))
    _seal_all(custody, 8)

    assert _held(custody) == [5, 8]
    custody.close()
    first.close()


def test_a_new_life_keeps_the_snapshot_of_the_checkpoint_that_it_grew_from_until_its_own_first_commit() -> None:
    custody = Custody.create(_joint(FIRST), earlier=None)
    _seal_all(custody, 4)
    custody.note_commit((4, "00abcdef"))
    _seal_all(custody, 5)

    custody.renew(_joint(FIRST, SECOND, base=[1, 4, "00abcdef"]) | {"layers": [[1, 5, "00abcdef"]]})
    assert _held(custody) == [4, 5]
    _seal_all(custody, 7, number=2)
    assert _held(custody) == [4, 7], "what it was recovered from is needed no more"
    custody.note_commit((7, "00abcdef"))
    _seal_all(custody, 8, number=2)

    assert _held(custody) == [7, 8]
    custody.close()


def test_a_new_life_has_room_for_its_first_snapshot_whatever_it_keeps() -> None:
    custody = Custody.create(_joint(FIRST), earlier=None)
    for record, step in enumerate((3, 4, 5, 6)):
        for rank in (0, 1):
            _seal(custody, rank, step, record)

    layers = [[1, step, "00abcdef"] for step in (6, 5, 4)]
    custody.renew(_joint(FIRST, SECOND, base=[1, 3, "00abcdef"]) | {"layers": layers})

    assert _held(custody) == [4, 5, 6]
    custody.close()


@pytest.mark.parametrize("versions", [3, 5])
def test_with_replicas_a_flagged_snapshot_becomes_global_beside_all_that_a_new_life_keeps(versions: int) -> None:
    """The first snapshot of a life, or an explicit save, is not replicated: it must not take the last free version."""
    custody = Custody.create(_joint(FIRST, versions=versions) | {"hosts": [1]}, earlier=None)
    steps = range(2, 2 + versions)
    for record, step in enumerate(steps):
        for rank in (0, 1):
            _seal(custody, rank, step, record)
    used = list(steps)[-filled_limit(versions, has_replicas=True) :]  # as many as a restore reads from memory at most
    layers = {"layers": [[1, step, "00abcdef"] for step in used], "hosts": [1]}
    parent = Parent(incarnation=1, step=used[-1], attempt=None)
    second = replace(SECOND, parent=parent)
    custody.renew(_joint(FIRST, second, versions=versions, base=[1, used[0] - 1, "00abcdef"]) | layers)
    assert _held(custody) == used

    _seal_all(custody, 10, number=2)
    for rank in (0, 1):
        free = next(record for record in range(versions) if custody.arena.is_free(rank, record))
        _seal(custody, rank, 11, free, flags=REPLICATE)
    custody.scan(others=_elsewhere(10, 11, number=2))
    assert custody.unreplicated() == [(11, "00abcdef")]
    custody.done = ((11, "00abcdef"),)
    custody.scan(others=replace(_elsewhere(11, number=2), done={1: custody.done}))

    assert custody.global_step == 11
    assert _held(custody) == [11]
    custody.close()


@pytest.mark.parametrize("layers", [{}, [5], [[1, 4]], [[1, "4", "00abcdef"]], [[1, True, "00abcdef"]]])
def test_layers_that_no_trainer_has_described_are_refused(layers: object) -> None:
    with pytest.raises(UsageError, match="layers"):
        Life.of(_replicated(FIRST, layers=layers))
