"""Replicas over real sockets: what arrives is whole and checked, what does not ends in bounded time, what is kept."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from moc.agent.guests import GUEST_VERSIONS, Guests
from moc.agent.peers.client import PeerClient
from moc.agent.peers.proof import PROOF, answer_proof
from moc.agent.peers.reception import STALL_S
from moc.errors import CoordinationError, FencedError, MocError, StoreUnavailableError, UsageError
from moc.format.manifest import Parent
from moc.host import SystemHost
from moc.snapshot.parcel import Intake, parcel_bytes, read_seal, seal_mark, write_seal
from tests.peers.nodes import DEADLINE_S, HOST, LIFE, SENDER, Sender, Wire, descriptor, held_steps, listening, member
from tests.support.repository import Model


@pytest.fixture
def sender() -> Iterator[Sender]:
    made = Sender()
    yield made
    made.close()


@pytest.fixture
def guests() -> Iterator[Guests]:
    made = Guests()
    made.begin_life(LIFE, descriptor(HOST))
    yield made
    made.close()


@pytest.fixture
def url(guests: Guests) -> Iterator[str]:
    with listening(guests) as found:
        yield found


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.courier.close()


def test_a_replica_holds_the_same_bytes_as_the_snapshot(sender: Sender, guests: Guests, url: str, wire: Wire) -> None:
    moment = sender.seal(5, record=1)

    assert wire.send(sender.parcel(moment, url)).error is None

    for rank in (2, 3):
        with guests.open((LIFE.number, *moment), rank) as (arena, replica):
            original = sender.arena.seals(rank)[1]
            assert seal_mark(replica) == seal_mark(original)
            arena.check(replica)


def test_a_replica_is_read_back_by_any_member(sender: Sender, url: str, wire: Wire) -> None:
    moment = sender.seal(5, record=1)
    assert wire.send(sender.parcel(moment, url)).error is None
    lost = Sender()

    client = PeerClient(member(SENDER), url, stall_s=5.0, host=SystemHost())
    where = {"rank": 2, "incarnation": LIFE.number, "step": 5, "attempt": moment[1]}
    intake = Intake(lost.arena, read_seal(client.ask("/replica/find", where)["seal"]))
    target = "/replica/data?" + "&".join(f"{name}={value}" for name, value in where.items())
    client.get(target, intake.write, size_bytes=intake.size_bytes, deadline_s=SystemHost().now_s() + DEADLINE_S)
    intake.check()
    intake.publish()

    (found,) = lost.arena.seals(2).values()
    assert seal_mark(found) == seal_mark(sender.arena.seals(2)[1])
    lost.close()


def test_unchanged_experts_travel_once(sender: Sender, guests: Guests, url: str, wire: Wire) -> None:
    whole = sender.seal(5, record=0)
    first = wire.send(sender.parcel(whole, url))
    partial = sender.seal(6, record=1, fresh=(0, 1), base=0)
    second = wire.send(sender.parcel(partial, url))

    assert first.error is None
    assert second.error is None
    assert 0 < second.size_bytes < first.size_bytes
    for rank in (2, 3):
        with guests.open((LIFE.number, *partial), rank) as (arena, replica):
            assert list(replica.steps) == [6, 6, *[5] * (len(replica.steps) - 2)]
            arena.check(replica)


def test_one_expert_of_sixteen_is_all_that_travels_of_the_experts(url: str, guests: Guests, wire: Wire) -> None:
    """Whatever the snapshots between those that are replicated had: the host has its base, and gets what is newer."""
    catalogs = Model(world_size=4, moe_layers=1, experts=64, hidden=8, dense=(("embed.weight", (97, 4)),)).catalogs()
    sender = Sender(model=catalogs)
    guests.begin_life(LIFE, descriptor(HOST, model=catalogs))
    known = sender.seal(5, record=0)
    whole = wire.send(sender.parcel(known, url))
    units = len(sender.arena.rank_layout(2).units)
    assert units == 1 + 16
    experts = sum(shard.size_bytes for shard in sender.arena.catalog(2).shards if shard.expert is not None)
    for turn in range(1, 7):
        moment = sender.seal(5 + turn, record=turn % 2, fresh=(0, 1 + turn % 16), base=(turn - 1) % 2)
        delivery = wire.send(sender.parcel(moment, url, known=known))
        assert delivery.error is None
        assert whole.size_bytes - delivery.size_bytes == pytest.approx(2 * experts * 15 / 16, abs=200)
        for rank in (2, 3):
            with guests.open((LIFE.number, *moment), rank) as (arena, replica):
                arena.check(replica)
                assert seal_mark(replica) == seal_mark(sender.arena.seals(rank)[turn % 2])
        known = moment
        for rank in (2, 3):
            sender.arena.free(rank, (turn - 1) % 2)
    sender.close()


def test_the_newest_global_replica_stays_until_a_newer_one_is_global(
    sender: Sender, guests: Guests, url: str, wire: Wire
) -> None:
    five = sender.seal(5, record=0)
    wire.send(sender.parcel(five, url))
    guests.note_global(five)
    for record, step in enumerate((6, 7, 8), start=1):
        moment = sender.seal(step, record=record)
        assert wire.send(sender.parcel(moment, url, known=five)).error is None
        assert held_steps(guests) == [5, step], "those between were never global, says who offers the next"

    guests.note_global(moment)

    assert held_steps(guests) == [8]


def test_an_offer_that_comes_late_costs_no_newer_replica(sender: Sender, guests: Guests, url: str, wire: Wire) -> None:
    older, newer = sender.seal(5, record=0), sender.seal(6, record=1)
    assert wire.send(sender.parcel(newer, url)).error is None

    late = sender.parcel(older, url)
    with pytest.raises(FencedError, match="a newer one is here"):
        guests.offer(late.records[2], node=SENDER, token=LIFE.token, known=None)

    assert held_steps(guests) == [6]


def test_a_parcel_under_way_is_no_replica(sender: Sender, guests: Guests) -> None:
    moment = sender.seal(5, record=0)
    record = sender.parcel(moment, "").records[2]
    intake = guests.offer(record, node=SENDER, token=LIFE.token, known=None)
    assert isinstance(intake, Intake)

    assert guests.inventory() == []
    with pytest.raises(UsageError, match="missing"):
        guests.check(intake)
    guests.begin_life(replace(LIFE, number=3), descriptor(HOST))
    with pytest.raises(MocError, match="given up"):
        guests.publish(intake)
    assert guests.inventory() == []


def test_a_replica_whose_shared_unit_has_rotted_is_sent_whole(
    sender: Sender, guests: Guests, url: str, wire: Wire
) -> None:
    """Else every later snapshot would be refused for a unit that does not travel any more."""
    whole = sender.seal(5, record=0)
    wire.send(sender.parcel(whole, url))
    with guests.open((LIFE.number, *whole), 2) as (arena, replica):
        offset = arena.slot_offset(2, 2, replica.slots[2])
        with arena.view(offset, 1) as byte:
            byte[0] ^= 1

    partial = sender.seal(6, record=1, fresh=(0, 1), base=0)
    second = wire.send(sender.parcel(partial, url, known=whole))

    assert second.error is None, "the retry brings what was found rotten"
    with guests.open((LIFE.number, *partial), 2) as (arena, replica):
        arena.check(replica)


def test_memory_that_rots_while_it_is_sent_is_no_replica(sender: Sender, guests: Guests, url: str, wire: Wire) -> None:
    moment = sender.seal(5, record=0)
    parcel = sender.parcel(moment, url)
    with sender.arena.view(sender.arena.slot_offset(3, 2, 0) + 7, 1) as byte:
        byte[0] ^= 1

    delivery = wire.send(parcel)

    assert delivery.error is not None
    assert "shard checksum mismatch" in delivery.error
    assert [rank for *_, rank in guests.inventory()] == [2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token": "1" * 8}, "another life"),
        ({"number": 1}, "another life"),
        ({"number": 3}, "another life"),
        ({"rank": 0}, "no room was declared"),
        ({"digest": "f" * 16}, "planned another save"),
    ],
)
def test_what_is_not_of_this_life_or_not_declared_is_refused(
    sender: Sender, guests: Guests, change: dict[str, Any], words: str
) -> None:
    moment = sender.seal(5, record=0)
    record = sender.parcel(moment, "").records[2]
    token = change.pop("token", LIFE.token)
    if "number" in change:
        change = {"incarnation": change["number"]}

    with pytest.raises(MocError, match=words):
        guests.offer(replace(record, **change), node=SENDER, token=token, known=None)
    assert guests.inventory() == []


@pytest.mark.slow
def test_an_agent_that_leaves_waits_for_nobody_who_is_sending(sender: Sender, guests: Guests) -> None:
    moment = sender.seal(5, record=0)
    parcel = sender.parcel(moment, "")
    has_begun, has_left, ends = threading.Event(), threading.Event(), []

    def halting(intake_units: tuple[int, ...]) -> Iterator[memoryview]:
        chunks = parcel.chunks(parcel.records[2], intake_units)
        yield next(chunks)[:100]
        has_begun.set()
        assert has_left.wait(DEADLINE_S)
        yield from chunks

    def put(url: str) -> None:
        client = PeerClient(member(SENDER), url, stall_s=5.0, host=SystemHost())
        offer = {"seal": write_seal(parcel.records[2]), "token": LIFE.token, "known": None}
        units = tuple(client.ask("/replica/offer", offer)["units"])
        size = parcel_bytes(sender.arena, parcel.records[2], units)
        target = f"/replica/data?rank=2&step=5&attempt={moment[1]}"
        deadline_s = SystemHost().now_s() + DEADLINE_S
        try:
            client.put(target, halting(units), size_bytes=size, deadline_s=deadline_s, pace=1e12)
        except MocError as error:
            ends.append(error)

    with listening(guests) as url:
        sending = threading.Thread(target=put, args=(url,))
        sending.start()
        assert has_begun.wait(DEADLINE_S)
    for thread in threading.enumerate():
        if thread.name.startswith("asyncio"):
            thread.join(STALL_S / 2)
            assert not thread.is_alive(), "it reads for nobody"
    has_left.set()
    sending.join(DEADLINE_S)

    assert [type(error) for error in ends] == [StoreUnavailableError]
    assert guests.inventory() == []


def test_a_node_offers_its_own_ranks_only(sender: Sender, guests: Guests) -> None:
    record = sender.parcel(sender.seal(5, record=0), "").records[2]

    with pytest.raises(UsageError, match="belongs to another node"):
        guests.offer(record, node=3, token=LIFE.token, known=None)


def test_a_new_life_keeps_what_it_grew_from_until_it_is_global_itself(
    sender: Sender, guests: Guests, url: str, wire: Wire
) -> None:
    five, six = sender.seal(5, record=0), sender.seal(6, record=1)
    wire.send(sender.parcel(five, url))
    wire.send(sender.parcel(six, url, known=five))
    child = replace(LIFE, number=3, token="1" * 8, parent=Parent(incarnation=2, step=5, attempt=None))

    guests.begin_life(child, descriptor(HOST, life=child))
    assert held_steps(guests) == [5]
    guests.begin_life(replace(child, number=4), descriptor(HOST, life=child, has_guests=False))
    assert held_steps(guests) == [5], "also where the layout is another one"
    guests.note_global((1, "00abcdef"))

    assert held_steps(guests) == []
    assert guests.size_bytes() == 0


def test_the_attempt_that_a_life_grew_from_is_kept_though_a_later_one_is_here(
    sender: Sender, guests: Guests, url: str, wire: Wire
) -> None:
    five = sender.seal(5, record=0)
    again = sender.seal(5, record=1, ordinal=1)
    wire.send(sender.parcel(five, url))
    guests.note_global(five)
    wire.send(sender.parcel(again, url, known=five))
    assert {attempt for _, _, attempt, _ in guests.inventory()} == {five[1], again[1]}
    child = replace(LIFE, number=3, token="1" * 8, parent=Parent(incarnation=2, step=5, attempt=None))

    guests.begin_life(child, descriptor(HOST, life=child) | {"layers": [[2, *five]]})

    assert [attempt for _, _, attempt, _ in guests.inventory()] == [five[1]] * 2


def test_a_snapshot_that_lent_experts_to_a_life_from_storage_is_kept(
    sender: Sender, guests: Guests, url: str, wire: Wire
) -> None:
    """A failure before the life's first global step finds these experts again."""
    five, six = sender.seal(5, record=0), sender.seal(6, record=1)
    wire.send(sender.parcel(five, url))
    wire.send(sender.parcel(six, url, known=five))
    child = replace(LIFE, number=3, token="1" * 8, parent=Parent(incarnation=2, step=7, attempt="00abcdef"))

    guests.begin_life(child, descriptor(HOST, life=child) | {"layers": [[2, *five]]})

    assert held_steps(guests) == [5]


def test_strangers_get_nothing_and_leave_nothing(sender: Sender, guests: Guests, url: str, wire: Wire) -> None:
    moment = sender.seal(5, record=0)
    stranger = Wire(secret="another secret")
    with closing(stranger.courier):
        delivery = stranger.send(sender.parcel(moment, url))
    assert delivery.error is not None
    assert "status=403" in delivery.error
    assert guests.inventory() == []
    assert wire.send(sender.parcel(moment, url)).error is None

    client = PeerClient(member(SENDER, secret="another secret"), url, stall_s=5.0, host=SystemHost())
    where = {"rank": 2, "incarnation": LIFE.number, "step": 5, "attempt": moment[1]}
    with pytest.raises(CoordinationError, match="status=403"):
        client.ask("/replica/find", where)
    target = "/replica/data?" + "&".join(f"{name}={value}" for name, value in where.items())
    received: list[bytes] = []
    with pytest.raises(CoordinationError, match="status=403"):
        client.get(target, received.append, size_bytes=1000, deadline_s=SystemHost().now_s() + DEADLINE_S)
    assert received == []


# Hosts that misbehave


class _Hostile(BaseHTTPRequestHandler):
    """A peer that knows the secret and does whatever its server's `act` says."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.act(self)  # type: ignore[attr-defined]

    do_PUT = do_POST  # the name is http.server's

    def do_GET(self) -> None:
        self.server.act(self)  # type: ignore[attr-defined]

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: bytes, *, is_proved: bool = True, claimed: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if claimed is None else claimed))
        if is_proved:
            self.send_header(PROOF, answer_proof(member(HOST), self.headers[PROOF], 200, content))
        self.end_headers()
        self.wfile.write(content)


def _unproved(peer: _Hostile) -> None:
    peer.answer(b'{"held": 1}', is_proved=False)


def _wrong_ack(peer: _Hostile) -> None:
    peer.answer(b'{"held": 1}')


def _half(peer: _Hostile) -> None:
    peer.answer(b'{"held"', claimed=1000)


def _nonsense(peer: _Hostile) -> None:
    peer.answer(b'{"units": "all"}')


def _stall(peer: _Hostile) -> None:
    peer.server.released.wait(DEADLINE_S)  # type: ignore[attr-defined]


def _drip(peer: _Hostile) -> None:
    """One byte after the other, each sooner than any limit for a single operation."""
    peer.send_response(200)
    peer.send_header("Content-Length", "1000")
    peer.end_headers()
    _trickle(peer)


def _drip_head(peer: _Hostile) -> None:
    peer.wfile.write(b"HTTP/1.0 200 OK\r\nServer:")
    _trickle(peer)


def _trickle(peer: _Hostile) -> None:
    for _ in range(1000):
        if peer.server.released.wait(0.05):  # type: ignore[attr-defined]
            return
        try:
            peer.wfile.write(b" ")
        except OSError:
            return


@contextmanager
def hostile(act: Callable[[_Hostile], None]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hostile)
    server.act, server.released = act, threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.released.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (_unproved, "refused"),
        (_wrong_ack, "not what was sent"),
        (_half, "not readable"),
        (_nonsense, "not readable"),
        (_stall, "does not answer"),
        (_drip, "too slow"),
        (_drip_head, "too slow"),
    ],
)
def test_a_host_that_lies_or_stalls_is_given_up_in_bounded_time(
    sender: Sender, act: Callable[[_Hostile], None], words: str
) -> None:
    moment = sender.seal(5, record=0)
    impatient = Wire(stall_s=0.3)
    with hostile(act) as url, closing(impatient.courier):
        delivery = impatient.send(sender.parcel(moment, url))
        assert delivery.error is not None
        assert words in delivery.error
        assert delivery.seconds < 10

        again = impatient.send(sender.parcel(moment, url))
        assert again.error is not None
        assert again.seconds < delivery.seconds, "who is away is tried once"


class JumpingHost(SystemHost):
    """A machine whose clock jumps forwards once, after it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def now_s(self) -> float:
        self.looks -= 1
        return super().now_s() + (1e6 if self.looks < 0 else 0.0)


@pytest.mark.parametrize("looks", [2, 4, 6, 8])
def test_a_clock_that_jumps_while_a_replica_is_sent_costs_one_try_at_most(
    sender: Sender, guests: Guests, url: str, looks: int
) -> None:
    host = JumpingHost(looks)
    wire = Wire(host=host)
    with closing(wire.courier):
        delivery = wire.send(sender.parcel(sender.seal(5, record=0), url))

        assert host.looks < 0, "it has jumped meanwhile"
        assert delivery.error is None
        assert held_steps(guests) == [5]


@pytest.mark.parametrize("act", [_drip, _drip_head])
def test_a_replica_that_comes_drop_by_drop_is_given_up_at_its_deadline(act: Callable[[_Hostile], None]) -> None:
    host = SystemHost()
    received: list[bytes] = []
    with hostile(act) as url:
        client = PeerClient(member(SENDER), url, stall_s=5.0, host=host)
        with pytest.raises(StoreUnavailableError, match="too slow"):
            client.get("/replica/data", received.append, size_bytes=1000, deadline_s=host.now_s() + 0.5)


def test_a_host_that_is_gone_is_back_with_the_next_moment(sender: Sender, guests: Guests, wire: Wire) -> None:
    moment = sender.seal(5, record=0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    gone = wire.send(sender.parcel(moment, f"http://127.0.0.1:{port}"))
    assert gone.error is not None
    assert StoreUnavailableError.__name__ in gone.error

    with listening(guests) as url:
        assert wire.send(sender.parcel(moment, url)).error is None
    assert held_steps(guests) == [5]


def test_a_cancelled_parcel_reads_the_arena_no_more(sender: Sender) -> None:
    """The agent closes arenas when a new life begins, whatever a host does meanwhile."""
    moment = sender.seal(5, record=0)
    reached = threading.Event()

    def stall_late(peer: _Hostile) -> None:
        reached.set()
        _stall(peer)

    waiting = Wire(stall_s=20.0)
    with hostile(stall_late) as url:
        parcel = sender.parcel(moment, url)
        waiting.courier.send(parcel)
        assert reached.wait(DEADLINE_S)
        waiting.courier.close()
        with pytest.raises(MocError, match="cancelled"):
            next(parcel.chunks(parcel.records[2], (0,)))


def test_there_is_room_for_the_global_replica_and_the_one_that_arrives() -> None:
    assert GUEST_VERSIONS == 2
