"""An agent's place in a life of several nodes: who the others are, what they are told, and where they are remembered.

The arena's descriptor holds all of it (node, secret, the agents' URLs), so that an agent which adopts the arena finds
the others, at the place where its predecessor listened. On one node there is no company, and nothing listens.
Thread: the agent's main thread.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moc.agent import wire
from moc.agent.custody import Custody
from moc.agent.life import Life
from moc.agent.peers.council import Council
from moc.agent.peers.proof import Membership
from moc.agent.saves import Saves
from moc.errors import UsageError
from moc.host import Host
from moc.topology import Topology

if TYPE_CHECKING:
    from moc.agent.peers.fellows import Fellows

__all__ = ["Company"]

FLUSH_TIMEOUT_S = 2.0


class Company:
    """The agents of the other nodes, as far as the server has to do with them."""

    def __init__(self, *, host: Host, wake: Callable[[], None]) -> None:
        self._host, self._wake = host, wake
        self._fellows: Fellows | None = None
        self._remembered: list[str] = []

    @property
    def council(self) -> Council | None:
        return None if self._fellows is None else self._fellows.council

    @staticmethod
    def check(descriptor: Mapping[str, Any]) -> None:
        """Raise UsageError if this installation cannot serve a life of several nodes, and the descriptor is of one."""
        if "fellows" in descriptor and importlib.util.find_spec("aiohttp") is None:
            raise UsageError("several nodes need aiohttp: install moc[nodes]")

    def begin(self, life: Life) -> str | None:
        """Enter a life; return this agent's URL, None on one node. Blocks: until it listens. Raises: UsageError."""
        if "fellows" not in life.descriptor:
            self.close()
            return None
        self.check(life.descriptor)
        fellows, topology = life.descriptor["fellows"], Topology.from_json(life.descriptor["topology"])
        node, urls = wire.integer(fellows, "node"), fellows["urls"]
        member = Membership(
            run=life.record.run,
            incarnation=life.record.number,
            node=node,
            nodes=topology.node_count,
            secret=wire.text(fellows, "secret"),
        )
        ranks_of = [topology.ranks_of(other) for other in range(topology.node_count)]
        port = (urlsplit(urls[node]).port or 0) if urls else 0
        self._remembered = list(urls)
        return self._open().begin(member, ranks_of, address=wire.text(fellows, "address"), port=port)

    def meet(self, custody: Custody, urls: list[str]) -> None:
        """Learn where the others are, and begin to talk to them. Raises: UsageError."""
        if self._fellows is None or self.council is None:
            raise UsageError("this agent is in no life of several nodes")
        self._fellows.meet(urls)
        self._remember(custody)

    def adopt(self, custody: Custody) -> None:
        """Take the place of an agent that died, in the life of the arena that was its own."""
        self.begin(custody.life)
        urls = self._remembered
        if self._fellows is not None and urls:  # else it died before the life had begun everywhere: attach fails
            self._fellows.meet(urls)
            self._remember(custody)

    def tell(self, custody: Custody, saves: Saves, *, ended: set[int]) -> None:
        """Have the others told what is new here; called by every turn of the loop."""
        council, number = self.council, custody.life.record.number
        if self._fellows is None or council is None or council.incarnation != number:
            return
        if self._fellows.urls() != self._remembered:
            self._remember(custody)
        report = council.report(
            self._fellows.url,
            custody.held,
            custody.passed,
            ended=ended,
            wishes=saves.wishes,
            verdicts=saves.verdicts(number),
        )
        self._fellows.publish(report)

    def knows_the_newest(self, custody: Custody) -> bool:
        """Return whether it is known of the newest moment here that all nodes hold it, or that one never will."""
        newest = custody.newest_here
        return self.council is None or newest in (None, custody.newest) or newest in custody.hopeless

    def flush(self) -> None:
        """Tell the others the last news. Blocks: a short while."""
        if self._fellows is not None:
            self._fellows.flush(FLUSH_TIMEOUT_S)

    def close(self) -> None:
        """Leave the company, and stop listening."""
        if self._fellows is not None:
            self._fellows.close()
            self._fellows = None

    def facts(self) -> dict[str, object] | None:
        """Return what may be shown of it: no secret."""
        if self._fellows is None or self.council is None:
            return None
        silent = list(self.council.others().silent)
        return {"node": self.council.node, "urls": self._fellows.urls(), "silent": silent}

    def _open(self) -> Fellows:
        if self._fellows is None:
            from moc.agent.peers.fellows import Fellows  # aiohttp takes a while, and one node does not need it

            self._fellows = Fellows(host=self._host, wake=self._wake)
        return self._fellows

    def _remember(self, custody: Custody) -> None:
        """Note in the arena where the others are now, for an agent that adopts it."""
        assert self._fellows is not None, "met before"
        self._remembered = self._fellows.urls()
        descriptor = custody.life.descriptor
        custody.amend({**descriptor, "fellows": {**descriptor["fellows"], "urls": self._remembered}})
