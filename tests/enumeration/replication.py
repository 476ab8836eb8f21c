"""Every operation of a snapshot's way to another node's memory, times every death and error of either side.

The courier, its client, the transport with its proofs, the reception and the guests are production's; the network
between them is `moc.network.port` without any network: an operation of the sender is a function call, numbered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from moc.agent.guests import GUEST_VERSIONS, Guests
from moc.agent.loans import Loans
from moc.agent.peers.courier import Courier, Delivery
from moc.agent.peers.reception import Reception
from moc.agent.peers.transport import Routes, Transport
from moc.network.port import Serve
from moc.plan.freeing import Moment
from moc.snapshot.parcel import seal_mark
from moc.trace import Trace
from tests.enumeration.serial import SerialHost
from tests.enumeration.tally import Case, Tally
from tests.peers.nodes import HOST, LIFE, SENDER, Sender, descriptor, held_steps, member
from tests.support.faulty_files import Crash

__all__ = ["DELIVERIES", "FAULTS", "Way", "deliver_everywhere"]

Fault = Literal["the sender dies", "the host dies", "an error", "a bit flips"]
FAULTS: tuple[Fault, ...] = ("the sender dies", "the host dies", "an error", "a bit flips")
RANKS = (2, 3)
STALL_S = 5.0


@dataclass(frozen=True, slots=True)
class Way:
    """What was delivered before, and is delivered now; `is_known` says whether the sender knows that to be global."""

    name: str
    before: tuple[int, ...]
    step: int
    is_known: bool
    fresh: tuple[int, ...] | None = None
    """The units that the snapshot does not share with the one before; None: it shares none."""


DELIVERIES = (
    Way("first", (), 5, is_known=False),
    Way("second", (5,), 6, is_known=True),
    Way("in place of one that is not global", (5, 6), 7, is_known=False),
    Way("with shared experts", (5,), 6, is_known=True, fresh=(0, 1)),
)


@dataclass(slots=True)
class _Line:
    """What the two nodes are connected by: who serves, and which operation goes wrong, before or after its effect."""

    serve: Serve | None = None
    count: int = 0
    number: int | None = None
    fault: Fault = "an error"
    is_after: bool = False
    names: list[str] = field(default_factory=list)
    kill_host: Callable[[], None] = lambda: None

    def pass_by(self, name: str, act: Callable[[], None]) -> None:
        """Do one operation, unless it is the one that goes wrong before its effect."""
        number, self.count = self.count, self.count + 1
        self.names.append(name)
        is_chosen = number == self.number
        if not is_chosen or self.is_after or self.fault == "a bit flips":
            act()
        if is_chosen:
            self._strike()

    def _strike(self) -> None:
        match self.fault:
            case "the sender dies":
                raise Crash
            case "the host dies":
                self.kill_host()
                raise ConnectionResetError("the host has died")
            case "an error":
                raise ConnectionResetError("the connection is cut")
            case "a bit flips":
                return

    def carry(self, piece: bytes) -> bytes:
        """Return what arrives of a piece: its operation is the next one."""
        if self.count == self.number and self.fault == "a bit flips" and piece:
            return piece[:-1] + bytes([piece[-1] ^ 1])
        return piece


class _Visit:
    """`moc.network.port.Visit` of a request that is there, as far as it came."""

    sender = "the sender"

    def __init__(self, method: str, target: str, headers: Mapping[str, str], body: Iterable[bytes]) -> None:
        self.method, self.target, self.headers = method, target, headers
        self.length = int(headers["Content-Length"]) if "Content-Length" in headers else None
        self._pieces = deque(body)
        self._missing = self.length or 0
        self.status, self.given, self.answered = 500, dict[str, str](), b""

    def vouch(self) -> None:
        """Nobody counts connections here."""

    async def read(self) -> bytes:
        pieces = []
        while piece := self._read_piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def read_each(self, take: Callable[[memoryview], None], *, stall_s: float) -> None:
        while piece := self._read_piece():
            take(memoryview(piece))

    def _read_piece(self) -> bytes:
        if self._missing and not self._pieces:
            raise ConnectionResetError("the sender is gone")
        piece = self._pieces.popleft() if self._pieces else b""
        self._missing -= len(piece)
        return piece

    def answer(self, status: int, body: bytes = b"", *, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.answered, self.given = status, body, dict(headers or {})

    async def answer_pieces(self, pieces: Iterable[bytes], *, length: int, stall_s: float) -> None:
        self.answer(200, b"".join(pieces))


class _Call:
    """`moc.network.port.Call` over a line: the whole request is served when its answer is waited for, or it ends."""

    def __init__(self, line: _Line) -> None:
        self._line, self._body, self._is_served = line, list[bytes](), False
        self._head: tuple[str, str, Mapping[str, str]] | None = None
        self._visit: _Visit | None = None

    def begin(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        def act() -> None:
            self._head = (method, target, headers)

        self._line.pass_by(f"{method} {target.partition('?')[0]}", act)

    def send(self, piece: bytes) -> None:
        arriving = self._line.carry(bytes(piece))
        self._line.pass_by("a piece", lambda: self._body.append(arriving))

    def answer(self) -> tuple[int, Mapping[str, str]]:
        self._line.pass_by("the answer", self._serve)
        assert self._visit is not None, "served"
        return self._visit.status, self._visit.given

    def read(self, limit_bytes: int) -> bytes:
        assert self._visit is not None, "answered before"
        found, self._visit.answered = self._visit.answered[:limit_bytes], self._visit.answered[limit_bytes:]
        return found

    def close(self) -> None:
        if self._head is not None and not self._is_served:  # what was sent has arrived
            self._serve()

    def _serve(self) -> None:
        assert self._head is not None, "begun before"
        self._is_served = True
        self._visit = _Visit(*self._head, self._body)
        serve = self._line.serve
        if serve is None:
            raise ConnectionRefusedError("nobody listens")
        try:
            asyncio.run(_run(serve, self._visit))
        except ConnectionResetError:
            self._visit.answer(500)


async def _run(serve: Serve, visit: _Visit) -> None:
    await serve(visit)


class _Place:
    """`moc.network.port.Network`, as far as somebody listens."""

    port = 1

    def close(self) -> None:
        """Nothing is open."""


class _Host(SerialHost):
    """One thread, no time, and the line. The courier runs while somebody calls `work`."""

    def __init__(self, line: _Line) -> None:
        super().__init__(_no_store)
        self._line, self._time_s = line, 0.0

    def now_s(self) -> float:
        self._time_s += 1e-6
        return self._time_s

    def sleep(self, seconds: float) -> None:
        self._time_s += seconds

    def event(self) -> Any:
        return _Flag(self)

    def listen(self, serve: Serve, *, address: str, port: int) -> Any:
        self._line.serve = serve
        return _Place()

    def dial(self, url: str, *, stall_s: float, judge: Callable[[], None]) -> Any:
        return _Call(self._line)


class _Flag:
    """An event for which nobody is there to wait."""

    def __init__(self, host: _Host) -> None:
        self._host, self._is_set = host, False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        self._host.sleep(timeout or 0.0)
        return self._is_set


class _Receiver:
    """The host's agent, which may be followed by another one with nothing in its memory."""

    def __init__(self, line: _Line) -> None:
        self._line, self.deaths = line, 0
        self.guests = self._begin()

    def die(self) -> None:
        self.deaths += 1
        self.guests.close()
        self.guests = self._begin()

    def _begin(self) -> Guests:
        guests, routes = Guests(), Routes()
        guests.begin_life(LIFE, descriptor(HOST))
        Reception(guests, Loans(guests)).add_to(routes)
        Transport(routes, address="host", port=1, host=_Host(self._line)).enter(member(HOST))
        return guests


class _Sender:
    """The agent of the node whose snapshots travel; its arena outlives it."""

    def __init__(self, arena: Sender, line: _Line) -> None:
        self._arena, self._told = arena, list[Delivery]()
        self._host = _Host(line)
        self._courier = Courier(
            member(SENDER), HOST, stall_s=STALL_S, on_end=self._told.append, host=self._host, trace=Trace()
        )

    def send(self, moment: Moment, *, known: Moment | None) -> Delivery:
        self._courier.send(self._arena.parcel(moment, "http://host:1", known=known))
        self._host.work()
        return self._told[-1]


@contextmanager
def _sealed(way: Way) -> Iterator[tuple[Sender, dict[int, Moment]]]:
    """Give a node that has sealed all that a way tells of, and one snapshot more."""
    sender = Sender()
    try:
        moments: dict[int, Moment] = {}
        for record, step in enumerate((*way.before, way.step)):
            is_shared = way.fresh is not None and step == way.step
            moments[step] = sender.seal(
                step, record=record, fresh=way.fresh if is_shared else None, base=record - 1 if is_shared else None
            )
        moments[way.step + 1] = sender.seal(way.step + 1, record=len(moments))
        yield sender, moments
    finally:
        sender.close()


def deliver_everywhere(way: Way, tally: Tally, *, faults: Iterable[Fault] = FAULTS, stride: int = 1) -> None:
    """Have everything go wrong at every operation of a way, before and after its effect."""
    with _sealed(way) as (sender, moments):
        names = _run_case(way, sender, moments, _Line())
        cases = [
            (number, fault, is_after)
            for fault in faults
            for number in range(len(names))
            for is_after in ((False,) if fault == "a bit flips" else (False, True))
            if fault != "a bit flips" or names[number] == "a piece"
        ]
        for number, fault, is_after in cases[::stride]:
            where = f"operation {number} ({names[number]}), {'after' if is_after else 'before'}"
            case = Case(workflow=f"delivery: {way.name}", fault=fault, where=where)
            tally.count(case)
            tally.judged += 1
            line = _Line(number=number, fault=fault, is_after=is_after)
            tally.check(case, lambda line=line: _run_case(way, sender, moments, line))


def _run_case(way: Way, sender: Sender, moments: Mapping[int, Moment], line: _Line) -> list[str]:
    """Deliver once with a fault, judge, deliver again and once more without; return the names of the operations."""
    number, line.number = line.number, None
    receiver, agent = _Receiver(line), _Sender(sender, line)
    line.kill_host = receiver.die
    try:
        known: Moment | None = None
        for step in way.before:
            delivery = agent.send(moments[step], known=known)
            assert delivery.error is None, f"not delivered without a fault: {delivery.error}"
            known = moments[step] if way.is_known else None
        line.count, line.number = 0, number
        line.names.clear()
        told: Delivery | None = None
        try:
            told = agent.send(moments[way.step], known=known)
        except Crash:
            agent = _Sender(sender, line)  # that adopts the arena
        names = list(line.names)
        line.number = None
        _judge(receiver, sender, way, told, known)
        again = agent.send(moments[way.step], known=known)
        assert again.error is None, f"not delivered afterwards: {again.error}"
        _judge(receiver, sender, way, again, known)
        last = agent.send(moments[way.step + 1], known=moments[way.step])
        assert last.error is None, f"the next one is not delivered: {last.error}"
        assert held_steps(receiver.guests) == [way.step, way.step + 1], "what is older than the global one is freed"
        return names
    finally:
        receiver.guests.close()


def _judge(receiver: _Receiver, sender: Sender, way: Way, told: Delivery | None, known: Moment | None) -> None:
    """What was acknowledged is there; nothing is there in part, or wrong; what is global has stayed."""
    guests, held = receiver.guests, held_steps(receiver.guests)
    steps = {rank: dict[int, int]() for rank in RANKS}
    for incarnation, step, attempt, rank in guests.inventory():
        with guests.open((incarnation, step, attempt), rank) as (arena, record):  # type: ignore[arg-type]
            arena.check(record)
            originals = [r for r in sender.arena.seals(record.rank).values() if r.step == record.step]
            assert [seal_mark(original) for original in originals] == [seal_mark(record)], f"another one: {record}"
            steps[record.rank][record.step] = steps[record.rank].get(record.step, 0) + 1
    for rank, counts in steps.items():
        assert set(counts.values()) <= {1}, f"held twice: {rank=} {counts}"
        assert len(counts) <= GUEST_VERSIONS, f"more than there is room for: {rank=} {counts}"
    if told is not None and told.error is None and not receiver.deaths:
        assert way.step in held, f"acknowledged, but not there: {held}"
    if told is not None and told.error is None and receiver.deaths:
        assert any(way.step in counts for counts in steps.values()), (
            f"acknowledged, but nothing of it is there: {steps}"
        )
    if known is not None and not receiver.deaths:
        assert known[0] in held, f"the global one has gone: {held}"


def _no_store() -> Any:
    raise AssertionError("replication needs no storage")
