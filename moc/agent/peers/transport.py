"""The agent's thread for other agents: an HTTP server and a client, on one event loop.

Nothing listens before `Transport` is made, which only an agent of a life of several nodes does. A request is served
only with the proof of the present life; control messages are bounded, whole, and proved in both directions. Routes are
added by those who answer them, before the life is entered: `Routes`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from moc.agent.peers.proof import (
    BODY,
    PROOF,
    STREAM,
    Membership,
    answer_proof,
    body_digest,
    refuse_stranger,
    request_headers,
)
from moc.errors import CoordinationError, MocError, StoreUnavailableError, UsageError
from moc.host import Host

__all__ = ["CONTROL_LIMIT_BYTES", "Routes", "Transport"]

log = logging.getLogger(__name__)

T = TypeVar("T")

CONTROL_LIMIT_BYTES = 16 << 20  # of one control message; receipts of a thousand ranks take a few hundred KiB
CONNECT_TIMEOUT_S = 5.0
BODY_TIMEOUT_S = 30.0  # to receive a control message whole
START_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 2.0  # for requests under way when this agent stops to listen
CONNECTIONS_PER_PEER = 4
IDLE_TIMEOUT_S = 30.0  # members talk every second, or open a connection for each request
STRANGER_LIMIT = 128  # open connections on which nothing has been proved yet

Answer = Callable[[int, dict[str, Any]], Mapping[str, object]]
Stream = Callable[[int, web.Request], Awaitable[web.StreamResponse]]


class Routes:
    """Which request is answered by whom. All callables run on the transport's event loop and must not block it."""

    def __init__(self) -> None:
        self.messages: dict[str, Answer] = {}
        self.streams: list[tuple[str, str, Stream]] = []

    def message(self, path: str, answer: Answer) -> None:
        """Answer POST of a JSON object: `answer(node, body)` returns one. Body and answer are covered by proofs."""
        self.messages[path] = answer

    def stream(self, method: str, path: str, serve: Stream) -> None:
        """Serve bytes: `serve(node, request)`. The proof covers path and query only: check what the body carries."""
        self.streams.append((method, path, serve))


class Transport:
    """Owns the thread, the listening socket and the connections. Thread: any, unless a method is a coroutine.

    Coroutines run on the transport's loop: from other threads go through `submit`.
    """

    def __init__(self, routes: Routes, *, address: str, port: int, host: Host) -> None:
        """Listen on an address of this machine; on another port if that one is taken (0: any).

        Blocks: until it listens. Raises: UsageError if it cannot.
        """
        self._routes, self._address, self._wanted_port, self._host = routes, address, port, host
        self._member: Membership | None = None
        self._members_connections: set[web.RequestHandler] = set()
        self._loop = asyncio.new_event_loop()
        self._started: Future[int] = Future()
        self._closing = asyncio.Event()
        self._thread = host.spawn(self._run, name="moc-peers")
        try:
            self.port = self._started.result(START_TIMEOUT_S)
        except OSError as error:
            self._thread.join()
            raise UsageError(f"agents cannot be reached here: address={address} reason={error}") from error

    @property
    def url(self) -> str:
        """Return where other nodes find this agent."""
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"http://{host}:{self.port}"

    def enter(self, member: Membership | None) -> None:
        """Serve, and speak for, this life from now on; None: nobody is served."""
        self._member = member

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Stop listening and end the thread."""
        self._member = None
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    # Client

    async def ask(self, url: str, path: str, body: Mapping[str, object], *, timeout_s: float) -> dict[str, Any]:
        """Send a control message and return the answer.

        Raises: StoreUnavailableError where nobody answers, CoordinationError for a refusal, or an answer without proof.
        """
        member = self._require_member()
        text = json.dumps(body, separators=(",", ":")).encode()
        headers = request_headers(member, "POST", path, body_digest(text))
        try:
            async with self._session.post(
                url + path, data=text, headers=headers, timeout=_timeout(timeout_s), allow_redirects=False
            ) as answer:
                content = await _read_whole(answer.content)
                status, proof = answer.status, answer.headers.get(PROOF, "")
        except (ClientError, OSError, asyncio.TimeoutError) as error:
            words = str(error) or type(error).__name__
            raise StoreUnavailableError(f"agent of another node does not answer: url={url} reason={words}") from error
        if not hmac.compare_digest(proof.encode(), answer_proof(member, headers[PROOF], status, content).encode()):
            raise CoordinationError(f"agent of another node refused: url={url} path={path} status={status}")
        found = _parse(content)
        if "error" in found:
            raise CoordinationError(f"agent of another node refused: url={url} path={path} reason={found['error']}")
        return found

    def stream_headers(self, method: str, target: str) -> dict[str, str]:
        """Return the headers of a request to a stream; `target` is path and query as they are sent."""
        return request_headers(self._require_member(), method, target, STREAM)

    @property
    def session(self) -> ClientSession:
        """The client's connections, for streams. Use it on the loop only, with a timeout for each request."""
        return self._session

    def _require_member(self) -> Membership:
        if self._member is None:
            raise CoordinationError("this agent is in no life of several nodes")
        return self._member

    # Server

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except OSError as error:  # told to whoever waits for the start; after it nothing raises this
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            self._loop.close()

    async def _main(self) -> None:
        application = web.Application(client_max_size=CONTROL_LIMIT_BYTES)
        for path, answer in sorted(self._routes.messages.items()):
            application.router.add_post(path, self._message_handler(answer))
        for method, path, serve in self._routes.streams:
            application.router.add_route(method, path, self._stream_handler(serve))
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
        listener: asyncio.Server | None = None
        self._session = ClientSession(
            connector=TCPConnector(limit_per_host=CONNECTIONS_PER_PEER), trust_env=False, auto_decompress=False
        )
        try:
            listener = await self._listen(server)
            self._started.set_result(int(listener.sockets[0].getsockname()[1]))
            await self._closing.wait()
        finally:
            if listener is not None:
                listener.close()
            await self._session.close()
            await runner.cleanup()

    async def _listen(self, server: web.Server) -> asyncio.Server:
        """Listen on the wanted port, so that others find a successor where its predecessor was, else on any.

        Of a name's addresses on the first one: on each of several any port would be another one.
        """
        try:
            found = await self._loop.getaddrinfo(self._address, None, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"not a name: {error}") from error
        family, _, _, _, place = found[0]
        for port in (self._wanted_port, 0):
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((place[0], port, *place[2:]))
                return await self._loop.create_server(lambda: self._let_in(server), sock=listener)
            except OSError:
                listener.close()
                if port == 0:
                    raise
                log.warning("port is taken, using another one: address=%s port=%d", self._address, port)
        raise AssertionError("the last port was any")

    def _let_in(self, server: web.Server) -> web.RequestHandler:
        """Serve a new connection; of too many that have proved nothing the oldest is closed, a member's never is."""
        opened = server.connections
        self._members_connections &= set(opened)
        strangers = [each for each in opened if each not in self._members_connections]
        for stranger in strangers[: max(0, len(strangers) + 1 - STRANGER_LIMIT)]:
            stranger.force_close()
        return server()

    def _admit(self, request: web.Request) -> tuple[Membership, int]:
        """Return the present life and the node that asks; raises UsageError for a stranger."""
        member = self._member
        node = refuse_stranger(member, request.method, request.raw_path, request.headers)
        assert member is not None, "who is in no life refuses everybody"
        self._members_connections.add(request.protocol)
        return member, node

    def _message_handler(self, answer: Answer) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            try:
                member, node = self._admit(request)
            except UsageError as error:
                return _refuse(request, error)
            text = await asyncio.wait_for(request.read(), BODY_TIMEOUT_S)
            if body_digest(text) != request.headers[BODY]:
                return _refuse(request, UsageError("body is not what was proved"))
            if self._member is not member:  # a report of that life must not be heard in this one
                return _refuse(request, UsageError("another life has begun while the body came"))
            try:
                found: Mapping[str, object] = answer(node, _parse(text))
            except MocError as error:
                found = {"error": str(error)}
            content = json.dumps(found, separators=(",", ":")).encode()
            proof = answer_proof(member, request.headers[PROOF], 200, content)
            return web.Response(body=content, content_type="application/json", headers={PROOF: proof})

        return handle

    def _stream_handler(self, serve: Stream) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                _, node = self._admit(request)
            except UsageError as error:
                return _refuse(request, error)
            return await serve(node, request)

        return handle


def _refuse(request: web.Request, error: UsageError) -> web.Response:
    log.info("refused another node: remote=%s path=%s reason=%s", request.remote, request.path, error)
    return web.Response(status=403, text=str(error))


async def _read_whole(content: Any) -> bytes:
    """Return an answer's body; raises ClientError if it is longer than any answer is."""
    parts, length = [], 0
    async for chunk in content.iter_any():
        parts.append(chunk)
        length += len(chunk)
        if length > CONTROL_LIMIT_BYTES:
            raise ClientError(f"answer is too long: allowed={CONTROL_LIMIT_BYTES}")
    return b"".join(parts)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CoordinationError(f"message between agents is not readable: {error}") from error
    if not isinstance(found, dict):
        raise CoordinationError("message between agents is not an object")
    return found


def _timeout(total_s: float) -> ClientTimeout:
    return ClientTimeout(total=total_s, sock_connect=min(CONNECT_TIMEOUT_S, total_s))
