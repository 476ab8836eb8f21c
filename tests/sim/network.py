"""The network between machines: requests and answers travel, late, in another order, twice, in part, changed, or not.

What one connection carries keeps its order; what several carry does not. A request whose sender has given up may still
arrive. The end of a process is told to whoever talks with it, the loss of a machine or a partition to nobody. The
event loops, agents, proofs and messages above are production's: `moc.network.port`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.sim.machine import Machine

if TYPE_CHECKING:
    from tests.sim.place import Place, SimVisit
    from tests.sim.process import Process
    from tests.sim.simulation import Simulation

__all__ = ["Exchange", "SimNetwork"]

RESEND_S = 0.3  # what cannot come through a partition is sent again after this
FIRST_PORT = 40001


class SimNetwork:
    """Who listens where, which machines cannot hear each other, and how often something goes wrong."""

    def __init__(self, sim: Simulation, chance: random.Random) -> None:
        self.sim, self.chance = sim, chance
        self.are_faults_on = True
        self.places: dict[tuple[str, int], Place] = {}
        self._next_port = FIRST_PORT
        self._parted: set[tuple[int, int]] = set()
        self._exchanges: list[Exchange] = []
        self._troubled_s: dict[tuple[int, int], float] = {}

    def take_port(self, place: Place, address: str, wanted: int) -> int:
        """Listen at a port, another one if that is taken; return it."""
        port = wanted
        if not port or (address, port) in self.places:
            port, self._next_port = self._next_port, self._next_port + 1
        self.places[address, port] = place
        return port

    def leave(self, place: Place) -> None:
        """Stop listening."""
        self.places = {where: other for where, other in self.places.items() if other is not place}

    # Faults

    def part(self, one: Machine, other: Machine, *, is_parted: bool) -> None:
        """Let two machines hear each other, or not."""
        pair = _pair(one, other)
        self._parted = (self._parted | {pair}) if is_parted else (self._parted - {pair})
        self.note_trouble(one, other)
        self.sim.note(None, "parted" if is_parted else "joined", {"machines": pair})

    def heal(self) -> None:
        self.are_faults_on = False
        for pair in self._parted:
            self._troubled_s[pair] = self.sim.scheduler.now_s
        self._parted = set()

    def are_parted(self, one: Machine, other: Machine) -> bool:
        return _pair(one, other) in self._parted

    @property
    def last_trouble_s(self) -> float:
        """Return when something went wrong last between any two machines."""
        return self.sim.scheduler.now_s if self._parted else max(self._troubled_s.values(), default=float("-inf"))

    def note_trouble(self, one: Machine, other: Machine) -> None:
        self._troubled_s[_pair(one, other)] = self.sim.scheduler.now_s

    def troubled_s(self, one: Machine, other: Machine) -> float:
        """Return when something went wrong last between two machines."""
        if self.are_parted(one, other):
            return self.sim.scheduler.now_s
        return self._troubled_s.get(_pair(one, other), float("-inf"))

    def draw(self, odds: float) -> bool:
        return self.are_faults_on and self.chance.random() < odds

    def latency_s(self, exchange: Exchange) -> float:
        knobs = self.sim.knobs
        slow_s = 0.0
        if self.draw(knobs.net_slow_odds):
            slow_s = self.chance.random() * knobs.net_slow_s
            exchange.note_trouble()
        return self.chance.random() * knobs.net_s + slow_s

    # Exchanges

    def open(
        self,
        sender: Process,
        url: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        *,
        on_news: Callable[[], None],
    ) -> Exchange:
        exchange = Exchange(self, sender, url, method, target, headers, on_news=on_news)
        self._exchanges = [other for other in self._exchanges if not other.is_over]
        self._exchanges.append(exchange)
        return exchange

    def note_end(self, process: Process) -> None:
        """A process has ended: the kernel of its machine says so, if the machine is still there."""
        if not process.machine.is_lost:
            for exchange in self._exchanges:
                exchange.note_end(process)


class _Lane:
    """One direction of a connection: what is put in arrives in order, as long as the machines are there."""

    def __init__(self, exchange: Exchange, source: Machine, target: Callable[[], Machine]) -> None:
        self._exchange, self._source, self._target = exchange, source, target
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()

    def put(self, act: Callable[[], None]) -> None:
        """Have something happen at the other end, later."""
        exchange = self._exchange
        when_s = exchange.network.sim.scheduler.now_s + exchange.network.latency_s(exchange)
        self._queue.append((when_s, act))
        if len(self._queue) == 1:
            self._move(when_s)

    def _move(self, when_s: float) -> None:
        scheduler = self._exchange.network.sim.scheduler
        scheduler.call_at(max(when_s, scheduler.now_s), self._arrive)

    def _arrive(self) -> None:
        network, target = self._exchange.network, self._target()
        if self._source.is_lost or target.is_lost:
            return
        if network.are_parted(self._source, target):
            self._move(network.sim.scheduler.now_s + RESEND_S)
            return
        self._queue.popleft()[1]()
        if self._queue:
            self._move(self._queue[0][0])


class Exchange:
    """One request and its answer, as its sender sees it; `on_news` is called between the turns of fibers."""

    def __init__(
        self,
        network: SimNetwork,
        sender: Process,
        url: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        *,
        on_news: Callable[[], None],
    ) -> None:
        self.network, self.sender, self._on_news = network, sender, on_news
        parts = urlsplit(url)
        self.where = (parts.hostname or "", parts.port or 0)
        self.method, self.target, self.headers = method, target, dict(headers)
        knobs = network.sim.knobs
        self._is_lost, self._is_answer_lost = network.draw(knobs.net_lost_odds), network.draw(knobs.net_lost_odds)
        self._is_cut = network.draw(knobs.net_cut_odds)
        self.is_twice = method == "POST" and network.draw(knobs.net_twice_odds)
        if self._is_lost or self._is_answer_lost or self._is_cut:
            self.note_trouble()
        self._sent = b""
        self.visit: SimVisit | None = None
        self.error: OSError | None = None
        self.head: tuple[int, Mapping[str, str]] | None = None
        self.pieces: deque[bytes] = deque()
        self.is_whole = self.is_over = False
        self._there = _Lane(self, sender.machine, self._machine)
        self._back: _Lane | None = None
        if not self._is_lost:
            self._there.put(self._arrive)

    @property
    def length(self) -> int | None:
        text = self.headers.get("Content-Length")
        return None if text is None else int(text)

    def note_trouble(self) -> None:
        self.network.note_trouble(self.sender.machine, self._machine())

    def note_end(self, process: Process) -> None:
        """One of both has ended."""
        if process is self.sender:
            self.hang_up()
        elif self.visit is not None and self.visit.place.process is process:
            self._fail(ConnectionResetError("simulated: the other process has ended"))

    # The sender

    def send(self, piece: bytes) -> None:
        """Send some of the body."""
        if self.method == "PUT" and piece and self.network.draw(self.network.sim.knobs.net_flip_odds):
            self.note_trouble()
            place = self.network.chance.randrange(len(piece))
            piece = piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
        self._sent += piece
        if self._is_cut and len(self._sent) * 2 >= (self.length or 0):
            self._is_lost = True
            self._there.put(lambda: self.visit is None or self.visit.note_gone())
            self._fail(ConnectionResetError("simulated: the connection is cut"))
        elif not self._is_lost:
            self._there.put(lambda: self.visit is None or self.visit.feed(piece))

    def hang_up(self) -> None:
        """Be interested no more: what is on its way arrives all the same."""
        if not self.is_over:
            self.is_over = True
            self._there.put(lambda: self.visit is None or self.visit.note_gone())

    # The other side

    def begin_answer(self, status: int, headers: Mapping[str, str]) -> None:
        def arrive() -> None:
            self.head = (status, dict(headers))

        self._reply(arrive)

    def answer_piece(self, piece: bytes) -> None:
        self._reply(lambda: self.pieces.append(piece))

    def end_answer(self) -> None:
        def arrive() -> None:
            self.is_whole = True

        self._reply(arrive)

    def _reply(self, arrive: Callable[[], None]) -> None:
        if self._is_answer_lost or self.visit is None:
            return
        if self._back is None:
            self._back = _Lane(self, self._machine(), lambda: self.sender.machine)

        def act() -> None:
            arrive()
            self._on_news()

        self._back.put(act)

    # Inside

    def _machine(self) -> Machine:
        return self.network.sim.machine_at(self.where[0])

    def _arrive(self) -> None:
        place = self.network.places.get(self.where)
        if place is None:
            self.visit = None
            self._fail(ConnectionRefusedError("simulated: nobody listens there"))
            return
        self.visit = place.receive(self)
        if self.is_twice:
            again = self.network.sim.scheduler
            when_s = again.now_s + self.network.chance.random() * self.network.sim.knobs.net_slow_s
            again.call_at(when_s, lambda: place.receive_again(self, self._sent))

    def _fail(self, error: OSError) -> None:
        if self.error is None and not self.is_over:
            self.error = error
            self.note_trouble()
            self._on_news()


def _pair(one: Machine, other: Machine) -> tuple[int, int]:
    return (min(one.number, other.number), max(one.number, other.number))
