"""One process's end of the simulated network: `moc.network.port` over exchanges.

`Place` listens and asks on an event loop of its own, `SimCall` asks from a thread that waits.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moc.errors import MocError
from moc.network.port import Answer, Serve
from tests.sim.loop import Pending, SimLoop, fulfil
from tests.sim.network import Exchange, SimNetwork
from tests.sim.scheduler import Fiber

if TYPE_CHECKING:
    from tests.sim.process import Process

__all__ = ["Place", "SimCall", "SimVisit"]

GRACE_S = 2.0  # for requests under way when a place is closed


class Place:
    """Listens for one process. `moc.network.port.Network`."""

    def __init__(self, network: SimNetwork, process: Process, serve: Serve, *, address: str, port: int) -> None:
        if address != process.machine.address:
            raise OSError(f"not an address of this machine: {address}")
        self.network, self.process, self._serve = network, process, serve
        self.port = network.take_port(self, address, port)
        self.loop = SimLoop(process)
        self._closing = asyncio.Event()
        self._visits: list[asyncio.Task[None]] = []
        process.on_end.append(self._end)
        self._fiber = process.host.spawn(self._run, name="moc-peers")

    def submit(self, work: Coroutine[Any, Any, Any]) -> Pending:
        return self.loop.submit(work)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._closing.set)
        self._fiber.join()

    async def ask(
        self, url: str, target: str, *, headers: Mapping[str, str], body: bytes, timeout_s: float, limit_bytes: int
    ) -> Answer:
        done: asyncio.Future[None] = self.loop.create_future()

        def on_news() -> None:
            if not self.loop.is_closed() and (exchange.is_whole or exchange.error is not None):
                self.loop.call_soon_threadsafe(fulfil, done, None)

        whole = {**headers, "Content-Length": str(len(body))}
        exchange = self.network.open(self.process, url, "POST", target, whole, on_news=on_news)
        exchange.send(body)
        try:
            await asyncio.wait_for(done, timeout_s)
        except asyncio.TimeoutError as error:
            exchange.note_trouble()
            raise OSError("simulated: no answer in time") from error
        finally:
            exchange.hang_up()
        if exchange.error is not None:
            raise exchange.error
        assert exchange.head is not None, "it is whole"
        content = b"".join(exchange.pieces)
        if len(content) > limit_bytes:
            raise OSError(f"answer is too long: allowed={limit_bytes}")
        return *exchange.head, content

    # Between the turns of fibers

    def receive(self, exchange: Exchange) -> SimVisit:
        """A request has come: serve it."""
        visit = SimVisit(self, exchange)
        self.loop.call_soon_threadsafe(self._begin, visit)
        return visit

    def receive_again(self, exchange: Exchange, body: bytes) -> None:
        """A request has come a second time: nobody waits for the answer."""
        if self.network.places.get(exchange.where) is self:
            visit = SimVisit(self, exchange, is_heard=False)
            self.loop.call_soon_threadsafe(self._begin, visit)
            visit.feed(body)

    # The loop's fiber

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self._main())
        finally:
            self._end()

    def _end(self) -> None:
        self.network.leave(self)
        self.loop.abandon()

    async def _main(self) -> None:
        await self._closing.wait()
        self.network.leave(self)
        if self._visits:
            _, late = await asyncio.wait(self._visits, timeout=GRACE_S)
            for task in self._visits:
                if task in late:
                    task.cancel()

    def _begin(self, visit: SimVisit) -> None:
        self._visits = [task for task in self._visits if not task.done()]
        self._visits.append(self.loop.create_task(self._handle(visit)))

    async def _handle(self, visit: SimVisit) -> None:
        """Serve one request; what goes wrong is answered so, as a server does."""
        try:
            await self._serve(visit)
        except (OSError, asyncio.TimeoutError, MocError) as error:
            self.process.sim.note(self.process, "request failed", {"error": f"{type(error).__name__}: {error}"})
            visit.answer(500)
        except Exception:  # noqa: BLE001  # the top of a task: told as a violation
            self.process.sim.auditor.fail("defect", traceback.format_exc())


class SimVisit:
    """`moc.network.port.Visit`."""

    def __init__(self, place: Place, exchange: Exchange, *, is_heard: bool = True) -> None:
        self.place, self._exchange, self._is_heard = place, exchange, is_heard
        self.method, self.target, self.headers = exchange.method, exchange.target, exchange.headers
        self.length, self.sender = exchange.length, exchange.sender.name
        self._pieces: deque[bytes] = deque()
        self._missing = exchange.length or 0
        self._is_gone = self._is_answered = False
        self._news = asyncio.Event()

    def vouch(self) -> None:
        """Strangers are no part of the simulation."""

    # Between the turns of fibers

    def feed(self, piece: bytes) -> None:
        self._tell(lambda: self._pieces.append(piece))

    def note_gone(self) -> None:
        """The sender has hung up."""

        def note() -> None:
            self._is_gone = True

        self._tell(note)

    def _tell(self, note: Callable[[], None]) -> None:
        def take() -> None:
            note()
            self._news.set()

        if not self.place.loop.is_closed():
            self.place.loop.call_soon_threadsafe(take)

    # The loop's fiber

    async def read(self) -> bytes:
        pieces = []
        while piece := await self._read_piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def read_each(self, take: Callable[[memoryview], None], *, stall_s: float) -> None:
        while piece := await asyncio.wait_for(self._read_piece(), stall_s):
            take(memoryview(piece))

    async def _read_piece(self) -> bytes:
        while self._missing and not self._pieces:
            if self._is_gone:
                raise ConnectionResetError("simulated: the sender is gone")
            self._news.clear()
            await self._news.wait()
        if not self._missing:
            return b""
        piece = self._pieces.popleft()
        self._missing -= len(piece)
        return piece

    def answer(self, status: int, body: bytes = b"", *, headers: Mapping[str, str] | None = None) -> None:
        if self._is_heard and not self._is_answered:
            self._is_answered = True
            self._exchange.begin_answer(status, headers or {})
            if body:
                self._exchange.answer_piece(body)
            self._exchange.end_answer()

    async def answer_pieces(self, pieces: Iterable[bytes], *, length: int, stall_s: float) -> None:
        self._is_answered = True
        self._exchange.begin_answer(200, {"Content-Length": str(length)})
        for piece in pieces:
            if self._is_gone:
                raise ConnectionResetError("simulated: the receiver is gone")
            self._exchange.answer_piece(bytes(piece))
            await asyncio.sleep(self.place.network.chance.random() * self.place.process.sim.knobs.net_s)
        self._exchange.end_answer()


class SimCall:
    """`moc.network.port.Call`."""

    def __init__(
        self, network: SimNetwork, process: Process, url: str, *, stall_s: float, judge: Callable[[], None]
    ) -> None:
        self._network, self._process, self._url = network, process, url
        self._stall_s, self._judge = stall_s, judge
        self._waiters: list[Fiber] = []
        self._exchange: Exchange | None = None

    def begin(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        self._process.enter()
        self._exchange = self._network.open(self._process, self._url, method, target, headers, on_news=self._wake)

    def send(self, piece: bytes) -> None:
        self._process.enter()
        exchange = self._opened()
        if exchange.error is not None:
            raise exchange.error
        exchange.send(bytes(piece))

    def answer(self) -> tuple[int, Mapping[str, str]]:
        exchange = self._opened()
        self._wait(lambda: exchange.head is not None)
        assert exchange.head is not None, "waited for"
        return exchange.head

    def read(self, limit_bytes: int) -> bytes:
        exchange = self._opened()
        self._wait(lambda: bool(exchange.pieces) or exchange.is_whole)
        if not exchange.pieces:
            return b""
        piece = exchange.pieces.popleft()
        if len(piece) > limit_bytes:
            exchange.pieces.appendleft(piece[limit_bytes:])
        return piece[:limit_bytes]

    def close(self) -> None:
        if self._exchange is not None:
            self._exchange.hang_up()

    def _opened(self) -> Exchange:
        assert self._exchange is not None, "begun before"
        return self._exchange

    def _wake(self) -> None:
        self._process.sim.scheduler.wake(self._waiters)

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """Wait for news, at most `stall_s`. Raises: OSError, and what the judge raises."""
        exchange, scheduler = self._opened(), self._process.sim.scheduler
        end_s = scheduler.now_s + self._stall_s
        self._process.enter()
        while not is_there():
            self._judge()
            if exchange.error is not None:
                raise exchange.error
            if scheduler.now_s >= end_s:
                exchange.note_trouble()
                raise TimeoutError("simulated: no answer in time")
            self._waiters.append(scheduler.current)
            scheduler.wait(timeout_s=end_s - scheduler.now_s)
