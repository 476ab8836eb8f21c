"""A blocking client for the agent of another node: for the threads that send replicas and fetch them.

Every wait has a limit: `stall_s` for one operation on the socket, a deadline for the whole, which is looked at before
every read: a peer that sends drop by drop, of an answer's head too, is late by at most one operation. Whatever goes
wrong on the way, a peer that lies about its answer included, is a StoreUnavailableError or CoordinationError.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any, TypeVar

from moc.agent.peers.proof import PROOF, STREAM, Membership, answer_proof, body_digest, request_headers
from moc.errors import CoordinationError, StoreUnavailableError
from moc.host import Host
from moc.network.port import Call

__all__ = ["PeerClient"]

T = TypeVar("T")

ANSWER_LIMIT_BYTES = 64 << 20  # of a control message: a seal record of a million shards, in base64
READ_BYTES = 1 << 20


class PeerClient:
    """One peer, as a member of a life sees it. Each request opens its own connection. Thread: any."""

    def __init__(self, member: Membership, url: str, *, stall_s: float, host: Host) -> None:
        self._member, self.url, self._stall_s, self._host = member, url, stall_s, host

    def ask(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """Send a control message and return the answer, whose proof is checked.

        Raises: StoreUnavailableError where nobody answers, CoordinationError for a refusal or an answer without proof.
        """
        text = json.dumps(body, separators=(",", ":")).encode()
        headers = request_headers(self._member, "POST", path, body_digest(text))

        def talk(call: Call) -> tuple[int, str, bytes]:
            call.begin("POST", path, headers | {"Content-Length": str(len(text))})
            call.send(text)
            status, given = call.answer()
            return status, given.get(PROOF, ""), self._read_whole(call)

        # To connect, to have the answer begin, and to have its body: stall_s each.
        status, proof, content = self._talk(talk, deadline_s=self._host.now_s() + 3 * self._stall_s)
        expected = answer_proof(self._member, headers[PROOF], status, content)
        if not hmac.compare_digest(proof.encode("utf-8", "replace"), expected.encode()):
            raise CoordinationError(f"agent of another node refused: url={self.url} path={path} status={status}")
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CoordinationError(f"answer of another node is not readable: url={self.url} path={path}") from error
        if not isinstance(found, dict) or "error" in found:
            reason = found.get("error") if isinstance(found, dict) else "not an object"
            raise CoordinationError(f"agent of another node refused: url={self.url} path={path} reason={reason}")
        return found

    def put(
        self, target: str, chunks: Iterable[memoryview], *, size_bytes: int, deadline_s: float, pace: float
    ) -> None:
        """Send bytes, at most `pace` of them per second, by `deadline_s` on the host's clock.

        Raises: StoreUnavailableError where the peer stalls or is gone, CoordinationError for a refusal.
        """
        headers = request_headers(self._member, "PUT", target, STREAM)

        def talk(call: Call) -> tuple[int, bytes]:
            call.begin("PUT", target, headers | {"Content-Length": str(size_bytes)})
            began_s, sent = self._host.now_s(), 0
            for chunk in chunks:
                self._refuse_late(deadline_s, sent)
                call.send(chunk)
                sent += len(chunk)
                ahead_s = began_s + sent / pace - self._host.now_s()
                if ahead_s > 0:
                    self._host.sleep(ahead_s)
            status, _ = call.answer()
            return status, self._read_whole(call)

        # What has arrived by the deadline is still to be checked there.
        status, content = self._talk(talk, deadline_s=deadline_s + 2 * self._stall_s)
        if status != 200:
            words = content[:500].decode("utf-8", "replace")
            raise CoordinationError(f"agent of another node refused: url={self.url} status={status} reason={words}")

    def get(self, target: str, take: Callable[[bytes], None], *, size_bytes: int, deadline_s: float) -> None:
        """Give exactly `size_bytes` from the peer to `take`, piece by piece, by `deadline_s` on the host's clock."""
        headers = request_headers(self._member, "GET", target, STREAM)

        def talk(call: Call) -> int:
            call.begin("GET", target, headers)
            status, _ = call.answer()
            if status != 200:
                words = self._read_whole(call)[:500].decode("utf-8", "replace")
                raise CoordinationError(f"agent of another node refused: url={self.url} status={status} reason={words}")
            received = 0
            while received < size_bytes and (data := call.read(min(READ_BYTES, size_bytes - received))):
                take(data)
                received += len(data)
            return received

        received = self._talk(talk, deadline_s=deadline_s)
        if received != size_bytes:
            raise StoreUnavailableError(
                f"agent of another node sent half: url={self.url} bytes={received} expected={size_bytes}"
            )

    def _talk(self, talk: Callable[[Call], T], *, deadline_s: float) -> T:
        def judge() -> None:
            if self._host.now_s() > deadline_s:
                raise StoreUnavailableError(f"agent of another node is too slow: url={self.url}")

        try:
            with closing(self._host.dial(self.url, stall_s=self._stall_s, judge=judge)) as call:
                return talk(call)
        except OSError as error:
            words = str(error) or type(error).__name__
            raise StoreUnavailableError(
                f"agent of another node does not answer: url={self.url} reason={words}"
            ) from error

    def _read_whole(self, call: Call) -> bytes:
        """Return an answer's body; a peer that sends it drop by drop is given up like one that sends nothing."""
        deadline_s, parts, length = self._host.now_s() + self._stall_s, [], 0
        while data := call.read(READ_BYTES):
            self._refuse_late(deadline_s, length)
            parts.append(data)
            length += len(data)
            if length > ANSWER_LIMIT_BYTES:
                raise CoordinationError(f"answer of another node is too long: url={self.url}")
        return b"".join(parts)

    def _refuse_late(self, deadline_s: float, reached: int) -> None:
        if self._host.now_s() > deadline_s:
            raise StoreUnavailableError(f"agent of another node is too slow: url={self.url} bytes={reached}")
