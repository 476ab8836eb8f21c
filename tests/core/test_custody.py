"""Custody of real arenas: what a new life finds in memory that an earlier one has left."""

from __future__ import annotations

from array import array
from dataclasses import asdict, replace

from moc.agent.custody import Custody
from moc.config import Config
from moc.format.manifest import Incarnation, Parent, encode_incarnation
from moc.snapshot.seal import SealRecord
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


def _seal(custody: Custody, rank: int, step: int, record: int) -> None:
    units = len(custody.arena.rank_layout(rank).units)
    custody.arena.seal(
        record,
        SealRecord(
            run="run-7",
            incarnation=custody.life.record.number,
            step=step,
            rank=rank,
            flags=0,
            attempt="00abcdef",
            digest="0123456789abcdef",
            state_bytes=0,
            state_crc32c=0,
            slots=array("I", [record] * units),
            steps=array("Q", [step] * units),
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
