"""An agent's place in a life of several nodes: who the others are, what they are told, and where they are remembered.

The arena's descriptor holds all of it (node, secret, the agents' URLs), so that an agent which adopts the arena finds
the others, at the place where its predecessor listened. On one node there is no company, and nothing listens.
Thread: the agent's main thread.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moc.agent import wire
from moc.agent.custody import Custody
from moc.agent.guests import Guests
from moc.agent.life import Life
from moc.agent.loans import Loans
from moc.agent.peers.council import Council
from moc.agent.peers.proof import Membership
from moc.agent.replicas import Replicas
from moc.agent.room import refuse_if_too_large
from moc.agent.saves import Saves
from moc.errors import UsageError
from moc.host import Host
from moc.topology import Topology
from moc.trace import Trace

if TYPE_CHECKING:
    from moc.agent.peers.fellows import Fellows

__all__ = ["Company"]

log = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 2.0
SECRET_TOKENS = 8  # of 32 bits


class Company:
    """The agents of the other nodes, as far as the server has to do with them."""

    def __init__(self, *, host: Host, trace: Trace, wake: Callable[[], None]) -> None:
        self._host, self._wake = host, wake
        self._guests = Guests()
        self._loans = Loans(self._guests)
        self._replicas = Replicas(self._guests, host=host, trace=trace, wake=wake)
        self._fellows: Fellows | None = None
        self._remembered: list[str] = []
        self._member: Membership | None = None

    @property
    def council(self) -> Council | None:
        return None if self._fellows is None else self._fellows.council

    @staticmethod
    def check(descriptor: Mapping[str, Any]) -> None:
        """Raise UsageError if this installation cannot serve a life of several nodes, and the descriptor is of one."""
        if "fellows" in descriptor and importlib.util.find_spec("aiohttp") is None:
            raise UsageError("several nodes need aiohttp: install moc[nodes]")

    def refuse_too_large(self, descriptor: Mapping[str, Any], custody: Custody | None) -> None:
        """Raise UsageError if a life does not fit into memory, with the replicas of other nodes' snapshots."""
        replica_bytes = self._guests.missing_bytes(descriptor)
        if custody is None or not custody.fits(descriptor):
            Custody.refuse_too_large(descriptor, earlier=custody, replica_bytes=replica_bytes)
        elif replica_bytes:
            refuse_if_too_large(0, None, replica_bytes=replica_bytes)

    def lend(self, custody: Custody, address: str) -> None:
        """Let nodes that a job has now read what it left here when this was its only one, until the next life begins.

        Also after an attach that failed, where this node may not have come to listen again: the next one reads it.

        Blocks: until it listens. Raises: UsageError if it cannot.
        """
        if self._fellows is not None or importlib.util.find_spec("aiohttp") is None:
            return
        life, secret = custody.life.record, "".join(self._host.token() for _ in range(SECRET_TOKENS))
        # A life of one node has no other member: who reads asks as a second one, which nobody is.
        nodes = max(2, custody.life.nodes)
        member = Membership(run=life.run, incarnation=life.number, node=0, nodes=nodes, secret=secret)
        self._enter(member, lambda fellows: fellows.listen(member, address=address, port=0))
        self._loans.show(custody)

    def replicas_held(self) -> dict[str, object]:
        """Return what a recovery must know to read from here: which replicas there are, and of which life this agent is
        a member.
        """
        member = self._member
        if self._fellows is None or member is None:
            return {}
        return {
            "replicas": self._guests.inventory(),
            "peer": {
                "run": member.run,
                "incarnation": member.incarnation,
                "node": member.node,
                "nodes": member.nodes,
                "secret": member.secret,
                "url": self._fellows.url,
            },
        }

    def begin(self, life: Life) -> str | None:
        """Enter a life; return this agent's URL, None on one node. Blocks: until it listens. Raises: UsageError."""
        self._replicas.end_life()  # before any arena that it reads from is given up
        self._loans.close()  # else a new arena would have to find room beside the old one
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
        address = wire.text(fellows, "address")
        url = self._enter(member, lambda opened: opened.begin(member, ranks_of, address=address, port=port))
        self._remembered = list(urls)
        return url

    def replicate(self, custody: Custody) -> None:
        """Make room for replicas of other nodes' snapshots, and begin to send this node's. Blocks: 0.7 s per GB.

        Where there is no memory for them this node refuses what others send: they see it as away.
        """
        life = custody.life
        try:
            self._guests.begin_life(life.record, life.descriptor)
        except OSError as error:
            log.error("there is no memory for replicas of other nodes: reason=%s", error)
        self._replicas.begin_life(custody, None if self._fellows is None else self._member)

    def meet(self, custody: Custody, urls: list[str]) -> None:
        """Learn where the others are, and begin to talk to them. Raises: UsageError."""
        if self._fellows is None or self.council is None:
            raise UsageError("this agent is in no life of several nodes")
        self._fellows.meet(urls)
        self._remember(custody)

    def adopt(self, custody: Custody) -> None:
        """Take the place of an agent that died, in the life of the arena that was its own."""
        self.begin(custody.life)
        self.replicate(custody)
        urls = self._remembered
        if self._fellows is not None and urls:  # else it died before the life had begun everywhere: attach fails
            self._fellows.meet(urls)
            self._remember(custody)

    def tell(self, custody: Custody, saves: Saves, *, ended: set[int]) -> None:
        """Have the others told what is new here; called by every turn of the loop."""
        council, number = self.council, custody.life.record.number
        if custody.stable is not None:
            self._guests.note_global(custody.stable)
        if self._fellows is not None:
            self._loans.show(custody)
        if self._fellows is None or council is None or council.incarnation != number:
            return
        if self._fellows.urls() != self._remembered:
            self._remember(custody)
        self._replicas.look(custody, self._remembered)
        report = council.report(
            self._fellows.url,
            custody.held,
            custody.passed,
            ended=ended,
            wishes=saves.wishes,
            verdicts=saves.verdicts(number, council.asked()),
            done=custody.done,
            leaning=custody.leaning,
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

    def leave(self) -> None:
        """Leave the company for good, and give the memory of replicas back."""
        self.close()
        self._replicas.close()

    def close(self) -> None:
        """Leave the company, and stop listening."""
        if self._fellows is not None:
            self._fellows.close()
            self._fellows = None
        self._loans.close()

    def facts(self) -> dict[str, object] | None:
        """Return what may be shown of it: no secret."""
        if self._fellows is None or self.council is None:
            return None
        silent = list(self.council.others().silent)
        facts: dict[str, object] = {"node": self.council.node, "urls": self._fellows.urls(), "silent": silent}
        return facts | ({"replication": self._replicas.status()} if self._replicas.is_active else {})

    def _open(self) -> Fellows:
        if self._fellows is None:
            from moc.agent.peers.fellows import Fellows  # aiohttp takes a while, and one node does not need it
            from moc.agent.peers.reception import Reception

            self._fellows = Fellows(host=self._host, wake=self._wake)
            Reception(self._guests, self._loans).add_to(self._fellows.routes)
        return self._fellows

    def _enter(self, member: Membership, listen: Callable[[Fellows], str]) -> str:
        """Become a member and return this agent's URL; nothing is left of who cannot listen. Raises: UsageError."""
        try:
            url = listen(self._open())
        except BaseException:
            self.close()
            raise
        self._member = member
        return url

    def _remember(self, custody: Custody) -> None:
        """Note in the arena where the others are now, for an agent that adopts it."""
        assert self._fellows is not None, "met before"
        self._remembered = self._fellows.urls()
        descriptor = custody.life.descriptor
        custody.amend({**descriptor, "fellows": {**descriptor["fellows"], "urls": self._remembered}})
