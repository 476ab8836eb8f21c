"""What a recovery reads from agents of other nodes: only what it needs, checked, from whoever has it right."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest

from moc._native import crc32c
from moc.agent.custody import Custody
from moc.agent.guests import Guests
from moc.agent.loans import Loans
from moc.agent.peers.lender import SPARED_S, Doubts, Lender, LentPart, lenders_of, merge_lenders
from moc.agent.peers.transport import Routes, Transport
from moc.errors import ShardCorruptError, UsageError
from moc.held import HeldPart, MemorySource
from moc.host import SystemHost
from moc.plan.freeing import Moment
from moc.plan.read import find_pieces
from moc.snapshot.parcel import piece_range, seal_mark, write_seal
from moc.state import Shard
from tests.peers.nodes import CATALOGS, HOST, LIFE, SENDER, Sender, listening, member, whole_descriptor

PASSWORD = "c4nary"
NOWHERE = "http://127.0.0.1:9"  # the port of a service that no machine offers any more


class Owner:
    """An agent that lends the ranks 2 and 3 of its own node."""

    def __init__(self) -> None:
        described = whole_descriptor(SENDER, storage=f"vault://me:{PASSWORD}@place/repo")
        self.custody = Custody.create(described, earlier=None)
        self.sender = Sender(self.custody.arena)
        self.guests = Guests()
        self.loans = Loans(self.guests)
        self.loans.show(self.custody)
        self._stack = ExitStack()
        self.url = self._stack.enter_context(listening(self.guests, self.loans))

    def part(self, moment: Moment, rank: int, *before: Lender) -> LentPart:
        lenders = [*before, lender(self.url)]
        return LentPart((LIFE.number, *moment), rank, lenders, host=SystemHost())

    def rot(self, rank: int, step: int) -> None:
        record = next(r for r in self.custody.arena.seals(rank).values() if r.step == step)
        with self.custody.arena.view(self.custody.arena.shard_offsets(rank, record.slots)[0], 1) as byte:
            byte[0] ^= 1

    def close(self) -> None:
        self._stack.close()
        self.loans.close()
        self.guests.close()
        self.custody.close()


class Deaf:
    """Something in an agent's place that hangs up on everybody, and counts them."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.calls = 0
        self._thread = threading.Thread(target=self._hang_up, daemon=True)
        self._thread.start()

    def _hang_up(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                if not connection.recv(1):
                    return  # as `close` does
                self.calls += 1

    def close(self) -> None:
        with socket.create_connection(self._listening.getsockname()):
            pass
        self._thread.join()
        self._listening.close()


class Clock(SystemHost):
    """This machine, whose clock can be moved."""

    jump_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.jump_s


def lender(url: str) -> Lender:
    return Lender(run=LIFE.run, incarnation=LIFE.number, node=HOST, nodes=2, secret="a secret", url=url)


@pytest.fixture
def owner() -> Iterator[Owner]:
    with closing(Owner()) as made:
        yield made


def test_a_part_that_is_lent_is_what_was_sealed(owner: Owner) -> None:
    moment = owner.sender.seal(5, record=0)
    part = owner.part(moment, 2)
    held = HeldPart(owner.custody.arena, owner.custody.arena.seals(2)[0])

    assert part.catalog == CATALOGS[2]
    assert part.units == held.units
    assert seal_mark(part.record) == seal_mark(held.record)
    assert part.state() == held.state()
    for index in range(len(part.catalog.shards)):
        with held.read(index) as expected:
            assert part.read(index) == expected


def test_only_what_is_missing_here_is_asked_for(owner: Owner) -> None:
    """A tensor that every rank needs, of which each has a share: a frozen one."""
    moment = owner.sender.seal(5, record=0)
    own = HeldPart(owner.custody.arena, owner.custody.arena.seals(2)[0])
    unreachable = LentPart((LIFE.number, *moment), 3, [lender(NOWHERE)], host=SystemHost())

    mine = MemorySource({2: own}, {3: unreachable}).placed(own.catalog.shards[:3])

    assert not find_pieces(own.catalog.shards[:3], mine.rows)[1]
    assert unreachable.lent_bytes == 0
    lent = owner.part(moment, 3)
    first, second = (next(s for s in c.shards if s.tensor == "embed.weight") for c in (own.catalog, lent.catalog))
    both = Shard(
        tensor=first.tensor, part=first.part, dtype=first.dtype, shape=first.shape, offset=first.offset,
        length=first.length + second.length, expert=None,
    )  # fmt: skip
    assert second.offset == first.offset + first.length
    source = MemorySource({2: own}, {3: lent})
    rows = source.placed([both]).rows
    pieces, gaps = find_pieces([both], rows)
    assert not gaps
    for piece in pieces:
        row = rows[piece.source]
        with source.read(row) as view:
            assert crc32c(view) == row.crc32c
    assert source.lent_bytes == second.size_bytes


def test_a_part_that_nobody_gives_is_missing_and_nothing_else_is(owner: Owner) -> None:
    moment = owner.sender.seal(5, record=0)
    own = HeldPart(owner.custody.arena, owner.custody.arena.seals(2)[0])
    unreachable = LentPart((LIFE.number, *moment), 3, [lender(NOWHERE)], host=SystemHost())
    source = MemorySource({}, {1: unreachable, 2: owner.part(moment, 2), 3: unreachable})
    experts = [unit.expert for unit in own.units if unit.expert is not None]
    wanted = [shard for shard in own.catalog.shards if shard.expert in experts[:1]]

    (told,) = [told for rank in range(4) for told in source.slices(experts, rank, 4, step=5)]
    assert sorted(told) == sorted(experts)
    assert source.world_size == 4
    placing = source.placed(wanted)

    assert not find_pieces(wanted, placing.rows)[1]
    assert [type(error) for error in placing.failures] == [ShardCorruptError] * 2
    assert source.lent_experts == frozenset()
    for row in placing.rows:
        with source.read(row):
            pass
    assert source.lent_experts == set(experts[:1])


def test_what_one_has_wrong_another_has_right(owner: Owner) -> None:
    moment = owner.sender.seal(5, record=0)
    with closing(Owner()) as other:
        other.sender.seal(5, record=0)
        other.rot(2, 5)

        part = owner.part(moment, 2, lender(NOWHERE), lender(other.url))
        with memoryview(part.read(0)) as view:
            assert crc32c(view) == part.record.crcs[0]

        owner.rot(2, 5)
        with pytest.raises(ShardCorruptError, match="checksum mismatch"):
            part.read(0)


def test_who_does_not_answer_is_asked_once_and_not_for_every_shard(owner: Owner) -> None:
    moment, host = owner.sender.seal(5, record=0), Clock()
    with closing(Deaf()) as deaf:
        doubts = Doubts(host)
        lenders = [lender(deaf.url), lender(owner.url)]
        for rank in (2, 3):
            part = LentPart((LIFE.number, *moment), rank, lenders, host=host, doubts=doubts)
            assert len(part.state()) == part.record.state_bytes
            for index in range(len(part.catalog.shards)):
                with part.read(index):
                    pass
        assert deaf.calls == 1


def test_who_alone_has_something_and_does_not_answer_is_asked_again_after_a_while_only(owner: Owner) -> None:
    moment, host = owner.sender.seal(5, record=0), Clock()
    with closing(Deaf()) as deaf:
        doubts = Doubts(host)
        parts = [LentPart((LIFE.number, *moment), r, [lender(deaf.url)], host=host, doubts=doubts) for r in (1, 2, 3)]
        source = MemorySource({}, dict(enumerate(parts[:2], start=1)))
        assert source.slices([], 0, 1, step=5) == []
        assert deaf.calls == 2, "an agent may turn one away once"
        assert len(source.placed(CATALOGS[2].shards[:1]).failures) == 2
        assert deaf.calls == 2
        host.jump_s = SPARED_S + 1
        with pytest.raises(ShardCorruptError, match="does not answer"):
            _ = parts[0].record
        assert deaf.calls == 2, "what was said of a part stays so"
        with pytest.raises(ShardCorruptError, match="does not answer"):
            _ = parts[2].record
        assert deaf.calls == 4


def test_what_is_freed_or_of_another_attempt_is_not_lent(owner: Owner) -> None:
    five = owner.sender.seal(5, record=0)
    with pytest.raises(ShardCorruptError, match="no such"):
        _ = owner.part((5, "01000005"), 2).record
    part = owner.part(five, 2)
    assert part.catalog.rank == 2
    owner.custody.arena.free(2, 0)

    with pytest.raises(ShardCorruptError, match="status=404"):
        part.read(0)
    with pytest.raises(ShardCorruptError, match="no such"):
        _ = owner.part(five, 2).record


def test_an_arena_that_the_agent_gives_up_is_read_to_the_end(owner: Owner) -> None:
    moment = owner.sender.seal(5, record=0)
    with owner.loans.open((LIFE.number, *moment), 2) as (arena, record):
        owner.loans.close()
        arena.check(record)
    with pytest.raises(UsageError, match="no such"), owner.loans.open((LIFE.number, *moment), 2):
        pass


def test_what_is_told_of_a_life_holds_no_secret(owner: Owner) -> None:
    moment = owner.sender.seal(5, record=0)
    part = owner.part(moment, 2)

    told = json.dumps(dict(part.life))

    assert set(part.life) == {"topology", "software", "fingerprint"}
    assert PASSWORD not in told
    assert "a secret" not in told
    assert "a secret" not in repr(lender(owner.url))


def test_a_state_that_is_longer_than_its_room_is_not_fetched(owner: Owner) -> None:
    moment = owner.sender.seal(5, record=0)
    arena, routes = owner.custody.arena, Routes()
    catalog, life = arena.catalog(2), {name: arena.descriptor[name] for name in ("topology", "software", "fingerprint")}
    seal = write_seal(replace(arena.seals(2)[0], state_bytes=catalog.state_capacity_bytes + 1))
    routes.message("/replica/find", lambda _node, _body: {"seal": seal})
    routes.message("/replica/catalog", lambda _node, _body: {"catalog": catalog.to_json(), "life": life})
    with closing(Transport(routes, address="127.0.0.1", port=0, host=SystemHost())) as liar:
        liar.enter(member(HOST))
        part = LentPart((LIFE.number, *moment), 2, [lender(liar.url)], host=SystemHost())

        with pytest.raises(ShardCorruptError, match="of another catalog"):
            part.state()


def test_a_piece_lies_where_the_layout_says(owner: Owner) -> None:
    owner.sender.seal(5, record=0)
    owner.sender.seal(6, record=1)
    arena = owner.custody.arena
    for rank in (2, 3):
        for record in arena.seals(rank).values():
            sizes = [shard.size_bytes for shard in arena.catalog(rank).shards]
            expected = list(zip(arena.shard_offsets(rank, record.slots), sizes, strict=True))
            assert [piece_range(arena, record, str(index)) for index in range(len(sizes))] == expected


@pytest.mark.parametrize("piece", ["-1", "99999", "1e3", "state2"])
def test_a_piece_that_does_not_exist_is_refused(owner: Owner, piece: str) -> None:
    moment = owner.sender.seal(5, record=0)
    part = owner.part(moment, 2)
    with pytest.raises(ShardCorruptError, match="no such piece"):
        part._fetch(piece, 1, 0)


def test_lenders_are_the_owner_first_and_then_who_has_a_replica() -> None:
    peers = [{**row, "node": node} for node, row in enumerate([_peer("a"), _peer("b")])]
    rows = [
        {"peer": peers[0], "sealed": [[2, 5, "x", [0]]], "replicas": [[2, 5, "x", 1]]},
        {"peer": peers[1], "sealed": [[2, 5, "x", [1]], [2, 6, "x", [1]]], "replicas": [[2, 5, "x", 0]]},
        {"sealed": [[2, 5, "x", [2]]]},  # an agent that listens to nobody
    ]

    told = json.loads(json.dumps(merge_lenders(rows)))
    found = lenders_of(told, (2, 5, "x"))

    assert {rank: [one.url for one in row] for rank, row in found.items()} == {0: ["a", "b"], 1: ["b", "a"]}
    assert lenders_of({}, (2, 5, "x")) == {}
    with pytest.raises(UsageError, match="not the place"):
        lenders_of({**told, "places": [[2, 5, "x", 0, 7, False]]}, (2, 5, "x"))


def _peer(url: str) -> dict[str, object]:
    return {"run": "r", "incarnation": 2, "nodes": 2, "secret": "s", "url": url}
