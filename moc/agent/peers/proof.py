"""Who may talk to an agent over the network: members of the same life, who prove that they know its secret.

The secret is made for one life, travels through the trainers' world and the agent's own Unix socket, and never goes
over the network between agents: each message carries a keyed hash over everything that decides what it means.
Pure: from values to values.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from moc.errors import UsageError

__all__ = ["LIFE", "Membership", "answer_proof", "body_digest", "refuse_stranger", "request_headers"]

LIFE, BODY, PROOF = "Moc-Life", "Moc-Body", "Moc-Proof"
STREAM = "-"
"""As the body's digest: the proof does not cover the body, which carries checksums of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One node's place in a life of several nodes."""

    run: str
    incarnation: int
    node: int
    nodes: int
    secret: str = field(repr=False)

    def life(self, node: int) -> str:
        """Return how a node of this life introduces itself."""
        return f"{self.run}/{self.incarnation}/{node}"


def body_digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def request_headers(member: Membership, method: str, target: str, digest: str) -> dict[str, str]:
    """Return the headers of a request of this member; `target` is path and query, `digest` the body's or STREAM."""
    life = member.life(member.node)
    return {LIFE: life, BODY: digest, PROOF: _proof(member.secret, "request", method, target, life, digest)}


def refuse_stranger(member: Membership | None, method: str, target: str, headers: Mapping[str, str]) -> int:
    """Return which node sent the request; raises UsageError unless it is another one of the same life.

    Takes the same time however much of the proof is right.
    """
    life, digest = headers.get(LIFE, ""), headers.get(BODY, "")
    if member is None:
        raise UsageError("this agent serves no life of several nodes")
    callers = [node for node in range(member.nodes) if node != member.node and member.life(node) == life]
    if not callers:
        raise UsageError("not a node of this life")
    expected = _proof(member.secret, "request", method, target, life, digest)
    if not hmac.compare_digest(expected.encode(), headers.get(PROOF, "").encode("utf-8", "replace")):
        raise UsageError("not a node of this life")
    return callers[0]


def answer_proof(member: Membership, request_proof: str, status: int, body: bytes) -> str:
    """Return the proof that an answer belongs to a request, and comes from a member."""
    return _proof(member.secret, "answer", request_proof, str(status), body_digest(body))


def _proof(secret: str, *words: str) -> str:
    """Return a keyed hash over the words; none of them can run into the next."""
    text = "".join(f"{len(word)}:{word}" for word in words)
    return hmac.new(secret.encode(), text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
