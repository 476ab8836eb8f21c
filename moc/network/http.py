"""An agent's place in the network over HTTP: a server and a client, on one event loop, on a thread of its own.

Nothing listens before `HttpNetwork` is made. Of connections on which nobody has proved who he is only so many are open:
more wait in the kernel until one of these has proved it, is closed, or has taken too long.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from moc.network.port import Answer, Serve

__all__ = ["CONTROL_LIMIT_BYTES", "STRANGER_LIMIT", "HttpNetwork"]

log = logging.getLogger(__name__)

T = TypeVar("T")

CONTROL_LIMIT_BYTES = 16 << 20  # of a body that is read whole; receipts of a thousand ranks take a few hundred KiB
CONNECT_TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 2.0  # for requests under way when this agent stops to listen
CONNECTIONS_PER_PEER = 4
READ_BYTES = 1 << 18  # of a body at once
IDLE_TIMEOUT_S = 30.0  # members talk every second, or open a connection for each request
STRANGER_LIMIT = 128  # open connections on which nothing has been proved yet
STRANGER_AGE_S = 2.0  # one that has proved nothing for so long gives way to others
BACKLOG = 1024  # connections that wait in the kernel
FULL_WAIT_S = 0.02  # until it is looked again whether there is room for one more
ACCEPT_WAIT_S = 1.0  # after one could not be accepted


class Joinable(Protocol):
    """A thread, as far as it is waited for here."""

    def join(self, timeout: float | None = None) -> None: ...


class HttpNetwork:
    """`moc.network.port.Network`. Owns the thread, the listening socket and the connections."""

    def __init__(
        self, serve: Serve, *, address: str, port: int, spawn: Callable[[Callable[[], None], str], Joinable]
    ) -> None:
        """Listen on an address of this machine; on another port if that one is taken (0: any).

        `spawn` starts a thread with a name. Blocks: until it listens, at most START_TIMEOUT_S. Raises: OSError if it
        cannot.
        """
        self._serve, self._address, self._wanted_port = serve, address, port
        self._strangers: dict[web.RequestHandler, float] = {}  # when they came, oldest first
        self._loop = asyncio.new_event_loop()
        self._started: Future[int] = Future()
        self._closing = asyncio.Event()
        self._thread = spawn(self._run, "moc-peers")
        wait([self._started], START_TIMEOUT_S)
        if self._started.cancel():  # the thread ends by itself once its name is looked up, which may take minutes
            raise OSError(f"not looked up in time: timeout_s={START_TIMEOUT_S:g}")
        try:
            self.port = self._started.result()
        except OSError:
            self._thread.join()
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def ask(
        self, url: str, target: str, *, headers: Mapping[str, str], body: bytes, timeout_s: float, limit_bytes: int
    ) -> Answer:
        timeout = ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_TIMEOUT_S, timeout_s))
        try:
            async with self._session.post(
                url + target, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                return answer.status, answer.headers, await _read_whole(answer.content, limit_bytes)
        except (ClientError, asyncio.TimeoutError) as error:
            raise OSError(str(error) or type(error).__name__) from error

    # The loop's thread

    def _run(self) -> None:
        try:
            # Not on the loop's pool: an agent that ends waits for the threads of that.
            family, place = _look_up(self._address)
            if not self._started.cancelled():
                self._loop.run_until_complete(self._main(family, place))
        except OSError as error:  # told to whoever waits for the start; after it nothing raises this
            if self._started.done() and not self._started.cancelled():
                raise
            with suppress(InvalidStateError):  # nobody waits any more
                self._started.set_exception(error)
        finally:
            self._loop.close()

    async def _main(self, family: int, place: tuple[Any, ...]) -> None:
        application = web.Application(client_max_size=CONTROL_LIMIT_BYTES)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(
            application,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=CLOSE_TIMEOUT_S,
            keepalive_timeout=IDLE_TIMEOUT_S,
        )
        await runner.setup()
        server = runner.server
        assert server is not None, "it is set up"
        listener: socket.socket | None = None
        accepting: asyncio.Task[None] | None = None
        self._session = ClientSession(
            connector=TCPConnector(limit_per_host=CONNECTIONS_PER_PEER), trust_env=False, auto_decompress=False
        )
        try:
            listener = await self._listen(family, place)
            accepting = self._loop.create_task(self._accept(listener, server))
            try:
                self._started.set_result(int(listener.getsockname()[1]))
            except InvalidStateError:  # nobody waits any more
                return
            await self._closing.wait()
        finally:
            if accepting is not None:
                accepting.cancel()
                await asyncio.wait([accepting])
            if listener is not None:
                listener.close()
            await self._session.close()
            await runner.cleanup()

    async def _listen(self, family: int, place: tuple[Any, ...]) -> socket.socket:
        """Listen on the wanted port, so that others find a successor where its predecessor was, else on any."""
        for port in (self._wanted_port, 0):
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((place[0], port, *place[2:]))
                listener.listen(BACKLOG)
                listener.setblocking(False)
                return listener
            except OSError:
                listener.close()
                if port == 0:
                    raise
                log.warning("port is taken, using another one: address=%s port=%d", self._address, port)
        raise AssertionError("the last port was any")

    async def _accept(self, listener: socket.socket, server: web.Server) -> None:
        while True:
            await self._make_room(server)
            try:
                connection, _ = await self._loop.sock_accept(listener)
                await self._let_in(connection, server())
            except OSError as error:  # no descriptor is left, or who came is gone
                log.warning("connection cannot be accepted: reason=%s", error)
                await asyncio.sleep(ACCEPT_WAIT_S)

    async def _let_in(self, connection: socket.socket, handler: web.RequestHandler) -> None:
        self._strangers[handler] = self._loop.time()
        await self._loop.connect_accepted_socket(lambda: handler, sock=connection)

    async def _make_room(self, server: web.Server) -> None:
        """Wait until one more may be let in: members that come at once prove themselves one after the other."""
        while True:
            opened = set(server.connections)
            for gone in [each for each in self._strangers if each not in opened]:
                del self._strangers[gone]
            if len(self._strangers) < STRANGER_LIMIT:
                return
            oldest, came_s = next(iter(self._strangers.items()))
            if self._loop.time() - came_s > STRANGER_AGE_S:
                oldest.force_close()
                del self._strangers[oldest]
                return
            await asyncio.sleep(FULL_WAIT_S)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        visit = _Visit(request, self._strangers)
        try:
            await self._serve(visit)
        except (ConnectionError, asyncio.TimeoutError) as error:
            reason = str(error) or type(error).__name__
            log.info(
                "who asked is gone, or too slow: sender=%s target=%s reason=%s", visit.sender, visit.target, reason
            )
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=408)  # read by nobody
        assert visit.response is not None, "everything is answered"
        return visit.response


class _Visit:
    """`moc.network.port.Visit`."""

    def __init__(self, request: web.Request, strangers: dict[web.RequestHandler, float]) -> None:
        self._request, self._strangers = request, strangers
        self.method, self.target, self.headers = request.method, request.raw_path, request.headers
        self.length, self.sender = request.content_length, request.remote or ""
        self.response: web.StreamResponse | None = None
        self._is_body_taken = False

    def vouch(self) -> None:
        self._strangers.pop(self._request.protocol, None)

    async def read(self) -> bytes:
        return await self._request.read()

    async def read_each(self, take: Callable[[memoryview], None], *, stall_s: float) -> None:
        """The bytes go from the socket to `take` on a thread beside the loop: through the loop they cost three times as
        much processor time.
        """
        content, transport, missing = self._request.content, self._request.transport, self.length or 0
        if transport is None:
            raise ConnectionResetError("the sender is gone")
        transport.pause_reading()
        try:
            while data := content.read_nowait():  # has been read before
                take(memoryview(data))
                missing -= len(data)
                transport.pause_reading()  # to have room again lets the loop read on
            if missing:
                self._is_body_taken = True
                await _receive(transport.get_extra_info("socket").dup(), take, missing, stall_s)
                content.feed_eof()
        finally:
            transport.resume_reading()

    def answer(self, status: int, body: bytes = b"", *, headers: Mapping[str, str] | None = None) -> None:
        self.response = web.Response(status=status, body=body, headers=headers)
        # A stranger keeps no place; after a body that was taken the loop does not know where the next request begins.
        if self._is_body_taken or self._request.protocol in self._strangers:
            self.response.force_close()

    async def answer_pieces(self, pieces: Iterable[bytes], *, length: int, stall_s: float) -> None:
        response = web.StreamResponse()
        response.content_length = length
        await response.prepare(self._request)
        for piece in pieces:
            await asyncio.wait_for(response.write(piece), stall_s)
        await response.write_eof()
        self.response = response


def _look_up(address: str) -> tuple[int, tuple[Any, ...]]:
    """Return family and place of a name's first address: on each of several any port would be another one.

    Blocks: as long as the servers of names are silent. Raises: OSError.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
    except UnicodeError as error:
        raise OSError(f"not a name: {error}") from error
    return family, place


async def _receive(source: socket.socket, take: Callable[[memoryview], None], size_bytes: int, stall_s: float) -> None:
    """Give so many bytes from a socket to `take`, on a thread, which closes it. Raises: OSError, what `take` raises."""

    def receive() -> None:
        buffer, missing = memoryview(bytearray(READ_BYTES)), size_bytes
        with source:
            source.settimeout(stall_s)
            while missing:
                length = source.recv_into(buffer[: min(READ_BYTES, missing)])
                if not length:
                    raise ConnectionResetError("the sender is gone")
                take(buffer[:length])
                missing -= length

    try:
        await asyncio.to_thread(receive)
    except asyncio.CancelledError:
        with suppress(OSError):  # it has ended meanwhile
            source.shutdown(socket.SHUT_RDWR)  # the thread must not wait for a sender that nobody listens to
        raise


async def _read_whole(content: Any, limit_bytes: int) -> bytes:
    """Return an answer's body. Raises: ClientError if it is longer than any answer is."""
    parts, length = [], 0
    async for chunk in content.iter_any():
        parts.append(chunk)
        length += len(chunk)
        if length > limit_bytes:
            raise ClientError(f"answer is too long: allowed={limit_bytes}")
    return b"".join(parts)
