"""A request over HTTP from a thread that waits for its answer. No wait is longer than one operation on the socket."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

__all__ = ["HttpCall"]


class _Socket(socket.socket):
    """A connection of which every read is judged first."""

    judge: Callable[[], None]

    def recv_into(self, *args: Any, **options: Any) -> int:
        self.judge()
        return super().recv_into(*args, **options)


class _Connection(HTTPConnection):
    """A connection to a peer; `judge` raises when it is too late to read on."""

    def __init__(self, url: str, *, stall_s: float, judge: Callable[[], None]) -> None:
        parts = urlsplit(url)
        super().__init__(parts.hostname or "", parts.port, timeout=stall_s)
        self._judge = judge

    def connect(self) -> None:
        super().connect()
        self.sock = _Socket(fileno=self.sock.detach())
        self.sock.judge = self._judge
        self.sock.settimeout(self.timeout)


class HttpCall:
    """`moc.network.port.Call`."""

    def __init__(self, url: str, *, stall_s: float, judge: Callable[[], None]) -> None:
        """`stall_s` bounds each operation on the socket; `judge` is called before every read, and may raise."""
        self._connection = _Connection(url, stall_s=stall_s, judge=judge)
        self._response: HTTPResponse | None = None

    def begin(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        with _translated():
            self._connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in headers.items():
                self._connection.putheader(name, value)
            self._connection.endheaders()

    def send(self, piece: bytes | memoryview) -> None:
        with _translated():
            self._connection.send(piece)

    def answer(self) -> tuple[int, Mapping[str, str]]:
        with _translated():
            self._response = self._connection.getresponse()
        return self._response.status, {name.title(): value for name, value in self._response.headers.items()}

    def read(self, limit_bytes: int) -> bytes:
        assert self._response is not None, "answered before"
        with _translated():
            return self._response.read1(limit_bytes)

    def close(self) -> None:
        self._connection.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except HTTPException as error:
        raise OSError(str(error) or type(error).__name__) from error
