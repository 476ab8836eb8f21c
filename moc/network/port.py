"""The port to the agents of other nodes: requests and answers as HTTP has them, whole or piece by piece.

A process is at one place of the network and serves what comes there on one event loop (`Network`); its threads send
requests of their own and wait for them (`Call`). Who may ask, and what a message means, is decided above this port.
What goes wrong on the way is an OSError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, urlsplit

__all__ = ["Answer", "Call", "Network", "Pending", "Serve", "Visit", "path_of", "query_of"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Answer = tuple[int, Mapping[str, str], bytes]
"""Status, headers, body."""


class Visit(Protocol):
    """A request as the one who answers it sees it; it is answered once. Thread: the network's loop."""

    @property
    def method(self) -> str: ...

    @property
    def target(self) -> str:
        """Return path and query, as they were sent."""

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def length(self) -> int | None:
        """Return how many bytes the body has, None if nobody says."""

    @property
    def sender(self) -> str:
        """Return where the request comes from, for a log."""

    def vouch(self) -> None:
        """Say that the sender has proved who it is: its connection counts as a stranger's no more."""

    async def read(self) -> bytes:
        """Return the whole body, which is bounded."""

    async def read_each(self, take: Callable[[memoryview], None], *, stall_s: float) -> None:
        """Give all bytes of the body to `take`, piece by piece, on whatever thread; a piece is valid until it returns.

        Raises: OSError if the sender is gone, or sends nothing for `stall_s`, and whatever `take` raises.
        """

    def answer(self, status: int, body: bytes = b"", *, headers: Mapping[str, str] | None = None) -> None:
        """Answer with a body that is there."""

    async def answer_pieces(self, pieces: Iterable[bytes], *, length: int, stall_s: float) -> None:
        """Answer with status 200 and a body of this length, while the receiver takes a piece within `stall_s`."""


Serve = Callable[[Visit], Awaitable[None]]


class Pending(Protocol[T_co]):
    """The result of a coroutine, for other threads."""

    def result(self, timeout: float | None = None, /) -> T_co:
        """Wait for the result, at most `timeout` seconds; raises what the coroutine has raised."""


class Network(Protocol):
    """One process's place in the network, with an event loop of its own. Thread: any, unless it is a coroutine."""

    @property
    def port(self) -> int:
        """Return the port that it listens at."""

    def submit(self, work: Coroutine[Any, Any, T]) -> Pending[T]:
        """Run a coroutine on the loop."""

    async def ask(
        self, url: str, target: str, *, headers: Mapping[str, str], body: bytes, timeout_s: float, limit_bytes: int
    ) -> Answer:
        """Send a POST request and return its answer. Raises: OSError, for an answer that is too long too."""

    def close(self) -> None:
        """Stop listening and end the loop. Blocks: for requests under way, a short while."""


class Call(Protocol):
    """One request to another node on a connection of its own, from a thread that waits. Raises: OSError."""

    def begin(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        """Connect and send the head of the request."""

    def send(self, piece: bytes | memoryview) -> None:
        """Send some of the body."""

    def answer(self) -> tuple[int, Mapping[str, str]]:
        """Wait for the head of the answer: status and headers."""

    def read(self, limit_bytes: int) -> bytes:
        """Return some of the answer's body, nothing at its end."""

    def close(self) -> None: ...


def path_of(target: str) -> str:
    """Return the path of a request's target."""
    return urlsplit(target).path


def query_of(target: str) -> dict[str, str]:
    """Return the fields of a request's target; of one that is given twice the last counts."""
    return dict(parse_qsl(urlsplit(target).query))
