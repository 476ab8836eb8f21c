"""Custody of real arenas: what a new life finds in memory that an earlier one has left."""

from __future__ import annotations

import socket
import threading
from array import array
from contextlib import closing
from dataclasses import asdict, replace

import pytest

from moc.agent.custody import Custody
from moc.agent.life import Life
from moc.agent.mending import Pieces
from moc.agent.restock import Errand, Restock
from moc.config import Config
from moc.errors import UsageError
from moc.format.manifest import Incarnation, Parent, encode_incarnation
from moc.host import SystemHost
from moc.snapshot.seal import SealRecord
from moc.state import Expert
from moc.trace import Trace
from tests.support.plain import PlainState
from tests.support.repository import Model

DEADLINE_S = 30.0
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


def test_experts_in_pieces_are_looked_for_once_in_what_is_sealed_and_again_in_what_is_sealed_anew() -> None:
    """The agent asks at every turn of its loop, and a look takes as long as the model has experts."""
    custody = Custody.create(_replicated(FIRST), earlier=None)
    for rank in range(4):
        _seal(custody, rank, 6, 1, experts_at=5 if rank == 2 else 6)
    custody.scan()
    pieces, key = Pieces(custody.arena), (1, (6, "00abcdef"))

    found = pieces.of(key, custody.records_of(*key))
    assert found == {Expert(layer=layer, index=0) for layer in (0, 1)}
    custody.scan()
    assert pieces.of(key, custody.records_of(*key)) is found

    custody.arena.free(2, 1)
    _seal(custody, 2, 6, 1)
    custody.look_again()
    custody.scan()
    assert pieces.of(key, custody.records_of(*key)) == frozenset()
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


def test_memory_of_another_layout_stays_while_an_errand_reads_it() -> None:
    """It is read by address on a thread: unmapped it would end the agent, and the recovery would lose its source."""
    earlier = Custody.create(_descriptor(FIRST), earlier=None)
    custody = Custody.create(_descriptor(FIRST, SECOND), earlier=earlier)
    woken = threading.Event()
    restock = Restock(host=SystemHost(), trace=Trace(), wake=woken.set)
    errand = Errand(
        snapshot=(1, 5, "00abcdef"), rank=0, run="run-7", storage="unused", memory_budget_bytes=None, lenders={}
    )
    for rank in (0, 1):
        _seal(custody, rank, 7, 0)
    asking, answered = socket.socketpair()
    with closing(custody), asking, answered:
        restock.want(answered, errand)
        restock.start_next(custody)

        custody.scan()

        assert custody.earlier is earlier
        assert custody.global_step is None, "the source of the recovery would change under it"
        assert earlier.pinned() == {(1, (5, "00abcdef"))}
        assert woken.wait(DEADLINE_S)
        restock.collect()
        assert not earlier.pinned()
        custody.scan()
        assert custody.global_step == 7
        assert custody.earlier is None


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


@pytest.mark.parametrize("layers", [{}, [5], [[1, 4]], [[1, "4", "00abcdef"]], [[1, True, "00abcdef"]]])
def test_layers_that_no_trainer_has_described_are_refused(layers: object) -> None:
    with pytest.raises(UsageError, match="layers"):
        Life.of(_replicated(FIRST, layers=layers))
