"""A loopback HTTP proxy that answers badly on purpose: what lies between a client and a real S3 server.

It forwards every byte as it came, the Host header included, so that signatures stay valid. A `Fault` says which
requests are hit, from which match on, how often, and how. Every hit is counted, so a test can see that it took place.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

__all__ = ["Answer", "Fault", "FaultProxy", "Harm", "expired_token", "internal_error", "missing", "slow_down"]

DEADLINE_S = 30.0
HEAD_LIMIT_BYTES = 2**16
FLIPPED_BIT = 0x10
FLIP_BYTES = 1009


class Harm(Enum):
    """What happens to a request other than a bad answer."""

    RESET_BEFORE = "the connection is reset, the server never saw the request"
    RESET_AFTER = "the server did it, the connection is reset before the answer"
    ERROR_AFTER = "the server did it, the answer is an internal error"
    STALL = "the request is read and never answered"
    STALL_UNREAD = "not even the request's body is read"
    CUT = "the connection is reset in the middle of the answer's body"
    SHORT = "half of the answer's body, under a length that fits it"
    FLIP_ANSWER = "the answer's body has flipped bits"
    FLIP_REQUEST = "the request's body has flipped bits when it reaches the server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An error that the server never gave."""

    status: int
    code: str
    words: str = "injected"

    def encode(self, method: str) -> bytes:
        text = f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>{self.words}</Message></Error>".encode()
        head = (
            f"HTTP/1.1 {self.status} injected\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else text)


@dataclass(slots=True, kw_only=True)
class Fault:
    """Which requests are hit, and how: those whose method and target match, from the `first` on, `count` of them."""

    harm: Harm | Answer
    method: str = ".*"
    target: str = ".*"
    """Found anywhere in the path and query, as they are on the wire."""
    first: int = 1
    count: int | None = None
    matches: int = 0
    hits: int = 0
    is_hit: threading.Event = field(default_factory=threading.Event)

    def wait_hit(self) -> None:
        assert self.is_hit.wait(DEADLINE_S), f"no request was hit: {self}"

    def _takes(self, method: str, target: str) -> bool:
        if not re.fullmatch(self.method, method) or not re.search(self.target, target):
            return False
        self.matches += 1
        if self.matches < self.first or (self.count is not None and self.hits >= self.count):
            return False
        self.hits += 1
        self.is_hit.set()
        return True


@dataclass(frozen=True, slots=True)
class _Message:
    """One request or response as it is on the wire."""

    head: bytes
    body: bytes

    @property
    def start(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")


class FaultProxy:
    """A running proxy before 127.0.0.1:`port`. A context manager; faults may be changed from any thread."""

    def __init__(self, port: int) -> None:
        self._upstream_port = port
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._requests: list[tuple[str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(DEADLINE_S)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Method and target of every request so far."""
        with self._lock:
            return list(self._requests)

    def inject(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Forget all faults and requests."""
        with self._lock:
            self._faults.clear()
            self._requests.clear()

    @contextlib.contextmanager
    def injected(self, fault: Fault) -> Iterator[Fault]:
        """Inject a fault for the length of a block."""
        try:
            yield self.inject(fault)
        finally:
            self.heal()

    def _harm(self, method: str, target: str) -> Harm | Answer | None:
        with self._lock:
            self._requests.append((method, target))
            return next((fault.harm for fault in self._faults if fault._takes(method, target)), None)

    # In the loop's thread

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=HEAD_LIMIT_BYTES)

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection: one request after the other over one connection to the server."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while head := await _read_head(reader):
                if upstream is None:
                    upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=HEAD_LIMIT_BYTES)
                if not await self._exchange(head, reader, writer, *upstream):
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            _reset(writer)  # one side has gone, so the other is let go
        finally:
            for end in (writer, *(upstream[1:] if upstream else ())):
                end.close()

    async def _exchange(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        """Serve one request; return whether the connection may go on."""
        method, target = _Message(head, b"").start[:2]
        harm = self._harm(method, target)
        if harm is Harm.STALL_UNREAD:
            await asyncio.Event().wait()  # until the proxy ends: a paused reader does not see that the client has left
        if b"\r\nexpect: 100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect: 100-continue", b"", head)
        body = await _read_body(reader, head)
        if isinstance(harm, Answer):
            writer.write(harm.encode(method))
            await writer.drain()
            return True
        if harm is Harm.RESET_BEFORE:
            _reset(writer)
            return False
        if harm is Harm.STALL:
            await reader.read()  # until the client gives up
            return False
        to_server.write(head + (_flip(body) if harm is Harm.FLIP_REQUEST else body))
        await to_server.drain()
        answer_head = await _read_head(from_server)
        answer = _Message(answer_head, await _read_answer_body(from_server, answer_head, method))
        return await _reply(answer, harm, writer, method)


async def _reply(answer: _Message, harm: Harm | None, writer: asyncio.StreamWriter, method: str) -> bool:
    """Pass an answer on, harmed or not; return whether the connection may go on."""
    half = len(answer.body) // 2
    match harm:
        case Harm.RESET_AFTER:
            _reset(writer)
            return False
        case Harm.ERROR_AFTER:
            writer.write(internal_error().encode(method))
        case Harm.CUT:
            writer.write(answer.head + answer.body[:half])
            await writer.drain()
            writer.close()
            return False
        case Harm.SHORT:
            short = re.sub(rb"(?i)(\r\ncontent-length: )\d+", rb"\g<1>%d" % half, answer.head)
            writer.write(short + answer.body[:half])
        case Harm.FLIP_ANSWER:
            writer.write(answer.head + _flip(answer.body))
        case None | Harm.FLIP_REQUEST:
            writer.write(answer.head + answer.body)
        case Harm.RESET_BEFORE | Harm.STALL | Harm.STALL_UNREAD:
            raise AssertionError(f"{harm} needs no answer")
        case _:
            assert_never(harm)
    await writer.drain()
    return True


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    """Return start line and headers with the empty line, or nothing at the end of the connection."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return b""


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """Return the body as it is on the wire, chunk sizes included."""
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    if length:
        return await reader.readexactly(int(length.group(1)))
    body = b""
    if re.search(rb"(?i)\r\ntransfer-encoding: chunked", head):
        while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
            size = await reader.readuntil(b"\r\n")
            body += size + await reader.readexactly(int(size.split(b";")[0], 16) + 2)
    return body


async def _read_answer_body(reader: asyncio.StreamReader, head: bytes, method: str) -> bytes:
    status = int(_Message(head, b"").start[1])
    return b"" if method == "HEAD" or status in (204, 304) else await _read_body(reader, head)


def _flip(body: bytes) -> bytes:
    """Flip one bit in each kilobyte, the middle of a smaller body, so that not only padding is hit."""
    flipped = bytearray(body)
    for offset in range(min(len(body) // 2, FLIP_BYTES), len(body), FLIP_BYTES):
        flipped[offset] ^= FLIPPED_BIT
    return bytes(flipped)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a crashed peer or a firewall does."""
    if not writer.transport.is_closing():
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def slow_down(words: str = "Please reduce your request rate.") -> Answer:
    return Answer(status=503, code="SlowDown", words=words)


def internal_error() -> Answer:
    return Answer(status=500, code="InternalError", words="We encountered an internal error. Please try again.")


def expired_token() -> Answer:
    return Answer(status=403, code="ExpiredToken", words="The provided token has expired.")


def missing() -> Answer:
    return Answer(status=404, code="NoSuchKey", words="The specified key does not exist.")
