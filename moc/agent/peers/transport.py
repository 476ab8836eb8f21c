"""How an agent talks to those of other nodes: who is served, what is proved, and which request is answered by whom.

Nothing listens before `Transport` is made, which only an agent of a life of several nodes does. A request is served
only with the proof of the present life; control messages are bounded, whole, and proved in both directions. Routes are
added by those who answer them, before the life is entered: `Routes`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from moc.agent.peers.proof import (
    BODY,
    PROOF,
    Membership,
    answer_proof,
    body_digest,
    refuse_stranger,
    request_headers,
)
from moc.errors import CoordinationError, MocError, StoreUnavailableError, UsageError
from moc.host import Host
from moc.network.port import Pending, Visit, path_of

__all__ = ["ANSWER_LIMIT_BYTES", "Routes", "Transport"]

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_LIMIT_BYTES = 16 << 20  # of a report; receipts of a thousand ranks take a few hundred KiB
BODY_TIMEOUT_S = 30.0  # to receive a control message whole

Message = Mapping[str, object] | bytes
"""A JSON object, encoded already where it is told often."""
Respond = Callable[[int, dict[str, Any]], Message]
Stream = Callable[[int, Visit], Awaitable[None]]


class Routes:
    """Which request is answered by whom. All callables run on the transport's event loop and must not block it."""

    def __init__(self) -> None:
        self.messages: dict[str, Respond] = {}
        self.streams: dict[tuple[str, str], Stream] = {}

    def message(self, path: str, answer: Respond) -> None:
        """Answer POST of a JSON object: `answer(node, body)` returns one. Body and answer are covered by proofs."""
        self.messages[path] = answer

    def stream(self, method: str, path: str, serve: Stream) -> None:
        """Serve bytes: `serve(node, visit)`. The proof covers path and query only: check what the body carries."""
        self.streams[method, path] = serve


class Transport:
    """An agent's place in the network, and the life that it speaks for. Thread: any, unless a method is a coroutine.

    Coroutines run on the network's loop: from other threads go through `submit`.
    """

    def __init__(self, routes: Routes, *, address: str, port: int, host: Host) -> None:
        """Listen on an address of this machine; on another port if that one is taken (0: any).

        Blocks: until it listens. Raises: UsageError if it cannot.
        """
        self._routes, self._address = routes, address
        self._member: Membership | None = None
        try:
            self._network = host.listen(self._serve, address=address, port=port)
        except OSError as error:
            raise UsageError(f"agents cannot be reached here: address={address} reason={error}") from error

    @property
    def port(self) -> int:
        return self._network.port

    @property
    def url(self) -> str:
        """Return where other nodes find this agent."""
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"http://{host}:{self.port}"

    def enter(self, member: Membership | None) -> None:
        """Serve, and speak for, this life from now on; None: nobody is served."""
        self._member = member

    def submit(self, work: Coroutine[Any, Any, T]) -> Pending[T]:
        """Run a coroutine on the loop."""
        return self._network.submit(work)

    def close(self) -> None:
        """Stop listening and end the thread."""
        self._member = None
        self._network.close()

    # Client

    async def ask(self, url: str, path: str, body: Message, *, timeout_s: float) -> dict[str, Any]:
        """Send a control message and return the answer.

        Raises: StoreUnavailableError where nobody answers, CoordinationError for a refusal, or an answer without proof.
        """
        member = self._member
        if member is None:
            raise CoordinationError("this agent is in no life of several nodes")
        text = _encode(body)
        headers = request_headers(member, "POST", path, body_digest(text))
        try:
            status, given, content = await self._network.ask(
                url, path, headers=headers, body=text, timeout_s=timeout_s, limit_bytes=ANSWER_LIMIT_BYTES
            )
        except OSError as error:
            words = str(error) or type(error).__name__
            raise StoreUnavailableError(f"agent of another node does not answer: url={url} reason={words}") from error
        proof = answer_proof(member, headers[PROOF], status, content)
        if not hmac.compare_digest(given.get(PROOF, "").encode(), proof.encode()):
            raise CoordinationError(f"agent of another node refused: url={url} path={path} status={status}")
        found = _parse(content)
        if "error" in found:
            raise CoordinationError(f"agent of another node refused: url={url} path={path} reason={found['error']}")
        return found

    # Server

    async def _serve(self, visit: Visit) -> None:
        path = path_of(visit.target)
        answer, stream = self._routes.messages.get(path), self._routes.streams.get((visit.method, path))
        if stream is None and (answer is None or visit.method != "POST"):
            visit.answer(404)
            return
        try:
            member = self._member
            node = refuse_stranger(member, visit.method, visit.target, visit.headers)
            assert member is not None, "who is in no life refuses everybody"
            visit.vouch()
            if stream is not None:
                await stream(node, visit)
            elif answer is not None:
                await self._answer(answer, member, node, visit)
        except UsageError as error:
            log.info("refused another node: sender=%s path=%s reason=%s", visit.sender, path, error)
            visit.answer(403, str(error).encode())

    async def _answer(self, answer: Respond, member: Membership, node: int, visit: Visit) -> None:
        """Answer a control message. Raises: UsageError for what must not be heard."""
        text = await asyncio.wait_for(visit.read(), BODY_TIMEOUT_S)
        if body_digest(text) != visit.headers[BODY]:
            raise UsageError("body is not what was proved")
        if self._member is not member:  # a report of that life must not be heard in this one
            raise UsageError("another life has begun while the body came")
        try:
            found: Message = answer(node, _parse(text))
        except MocError as error:
            found = {"error": str(error)}
        content = _encode(found)
        visit.answer(200, content, headers={PROOF: answer_proof(member, visit.headers[PROOF], 200, content)})


def _encode(message: Message) -> bytes:
    return message if isinstance(message, bytes) else json.dumps(message, separators=(",", ":")).encode()


def _parse(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CoordinationError(f"message between agents is not readable: {error}") from error
    if not isinstance(found, dict):
        raise CoordinationError("message between agents is not an object")
    return found
