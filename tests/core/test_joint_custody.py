"""Custody of real arenas at one of several nodes: what the agents of all keep alike, and what they give up together."""

from __future__ import annotations

import os
from dataclasses import asdict, replace

import pytest

from moc.agent.custody import Custody
from moc.agent.peers.report import Others
from moc.config import Config
from moc.format.manifest import Incarnation, Parent
from moc.plan.freeing import Seal, filled_limit
from moc.snapshot.seal import REPLICATE
from moc.topology import Topology
from tests.core.test_custody import FIRST, SECOND, _replicated, _seal


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


def test_a_new_life_keeps_the_snapshot_whose_second_checkpoint_it_grew_from() -> None:
    custody = Custody.create(_joint(FIRST), earlier=None)
    for record, attempt in enumerate(("00abcdef", "01abcdef")):
        for rank in (0, 1):
            _seal(custody, rank, 5, record, attempt=attempt)
    custody.scan()
    grown = replace(SECOND, parent=Parent(incarnation=1, step=5, attempt="00abcdf0"))

    custody.renew(_joint(FIRST, grown, base=[1, 5, "00abcdf0"]))

    assert [custody.arena.is_free(0, record) for record in range(2)] == [False, True]
    custody.scan()
    assert [custody.arena.is_free(0, record) for record in range(2)] == [False, True]
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


def _of_two(node: int, *lives: Incarnation, versions: int = 3, hosts: tuple[int, ...] = ()) -> dict[str, object]:
    """Return the descriptor of one of two nodes, each of which has a slice of every expert of its own on two ranks."""
    described = _joint(*lives, versions=versions) | {"digest": "0123456789abcdef", "hosts": list(hosts)}
    topology = Topology(world_size=4, node_of_rank=(0, 1, 0, 1), ep_sizes=())
    catalogs = _replicated(*lives)["catalogs"]
    return described | {
        "topology": topology.to_json(),
        "fellows": {"node": node, "secret": "", "address": "", "urls": []},
        "catalogs": [catalogs[rank] for rank in topology.ranks_of(node)],  # type: ignore[index]
    }


def _heard(custody: Custody) -> Others:
    """Return what another node hears of this one."""
    number, held = custody.life.record.number, custody.held.items()
    seals = [
        Seal(incarnation=number, step=step, attempt=attempt, rank=rank, record=0)
        for (step, attempt), ranks in held
        for rank in ranks
    ]
    done = {custody.life.node: custody.done}
    return Others(seals=tuple(seals), done=done, leaning=frozenset(custody.leaning))


def test_a_snapshot_that_is_being_saved_stands_in_for_another_one_where_the_newest_has_experts_in_pieces() -> None:
    """Else all versions would be in use until the save has ended, and every snapshot be skipped."""
    custody = Custody.create(_of_two(0, FIRST, versions=4), earlier=None)
    elsewhere: list[Seal] = []

    def seal(step: int, *, experts_at: int | None = None) -> list[int]:
        free = next(record for record in range(4) if custody.arena.is_free(0, record))
        for rank in (0, 2):
            _seal(custody, rank, step, free, experts_at=experts_at if rank == 2 else None)
        elsewhere.extend(Seal(incarnation=1, step=step, attempt="00abcdef", rank=rank, record=0) for rank in (1, 3))
        custody.scan(others=Others(seals=tuple(elsewhere)))
        return sorted(record.step for record in custody.arena.seals(0).values())

    seal(5)
    custody.note_commit((5, "00abcdef"))
    seal(6)
    custody.pin(1, (6, "00abcdef"))
    seal(7)

    assert seal(8, experts_at=7) == [5, 6, 8]
    custody.unpin(1, (6, "00abcdef"))
    assert seal(9) == [5, 9]
    assert seal(10, experts_at=9) == [5, 9, 10], "without a save the newest one that has them stays"
    custody.close()


@pytest.mark.parametrize("has_replicas", [False, True])
def test_all_nodes_stay_with_memory_of_another_layout_while_one_of_them_has_experts_in_pieces(
    has_replicas: bool,
) -> None:
    """If one node showed a recovery that memory, and the other one the new snapshot, neither would be whole."""
    nodes = []
    for node, ranks in enumerate(((0, 2), (1, 3))):
        earlier = Custody.create(_of_two(node, FIRST), earlier=None)
        for rank in ranks:
            _seal(earlier, rank, 5, 0)
        earlier.scan()
        described = _of_two(node, FIRST, SECOND, versions=5, hosts=(1 - node,) if has_replicas else ())
        nodes.append(Custody.create(described, earlier=earlier))

    def look(step: int, record: int, *, behind: int | None) -> None:
        for custody in nodes:
            for rank in custody.life.ranks:
                experts_at, flags = 6 if rank == behind else step, REPLICATE if has_replicas else 0
                _seal(custody, rank, step, record, experts_at=experts_at, flags=flags)
            custody.scan()
        if has_replicas:
            for custody in nodes:
                assert (step, "00abcdef") in custody.unreplicated()
                custody.done = ((step, "00abcdef"),)
        for _ in range(2):
            nodes[0].scan(others=_heard(nodes[1]))
            nodes[1].scan(others=_heard(nodes[0]))

    look(7, 0, behind=2)
    assert [custody.newest for custody in nodes] == [(7, "00abcdef")] * 2
    assert [custody.global_step for custody in nodes] == [None, None]
    assert [custody.inventory()["snapshots"] for custody in nodes] == [[[1, 5, "00abcdef"]]] * 2
    assert [custody.unreplicated() for custody in nodes] == [[], []], "else no other one would ever be replicated"

    look(8, 1, behind=None)
    assert [custody.global_step for custody in nodes] == [8, 8]
    assert [custody.inventory()["snapshots"] for custody in nodes] == [[[2, 8, "00abcdef"]]] * 2
    for custody in nodes:
        custody.close()
