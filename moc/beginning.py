"""The beginning of a life at the agents: each node's leader describes the life to its own agent, and where there are
several, the agents learn where to find each other, and a secret that proves that they belong together.

The secret is made for one life; it goes through the trainers' world and the agents' own sockets, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient
from moc.agreement import agree, decide, exchange
from moc.facts import Facts, describe_life
from moc.format.manifest import Incarnation
from moc.holdings import at_node
from moc.host import Host
from moc.plan.lineage import Candidate
from moc.survey import Request
from moc.training import World

__all__ = ["Beginning"]

SECRET_TOKENS = 8  # of 32 bits


class Beginning:
    """One rank's part in it. Construction, `check` and `begin` are collective, or run under `agree`, as they say."""

    def __init__(
        self,
        folder: Path,
        request: Request,
        facts: Facts,
        world: World,
        lineage: Sequence[Incarnation],
        *,
        layers: Sequence[Candidate],
        base: Candidate | None,
        software: Mapping[str, str],
        host: Host,
    ) -> None:
        """`lineage` are the lives before, `layers` the snapshots in memory that this one's state comes from, `base` is
        the newest checkpoint below it.

        Collective.
        """
        self._folder, self._request, self._facts, self._world = folder, request, facts, world
        self._lineage, self._layers, self._base, self._host = lineage, layers, base, host
        self._software = software
        self._secret: str | None = None
        if facts.topology.node_count > 1:
            self._software, self._secret = self._share(software)

    def check(self, record: Incarnation) -> None:
        """Raise what the node's agent has against the life, before anything is written. Not collective."""
        self._ask("check", {"incarnation": record.number, "descriptor": self._describe(record)})

    def begin(self, record: Incarnation) -> None:
        """Have the agents begin the life. Collective."""
        world, rank = self._world, self._world.rank

        def introduce() -> None:
            with closing(self._connect()) as client:
                client.hello(rank=rank, incarnation=record.number)

        def begin() -> Mapping[str, Any]:
            return self._ask("begin", {"incarnation": record.number, "descriptor": self._describe(record)})

        agree(world, introduce)
        begun = agree(world, begin)
        if self._secret is not None:
            urls = [url for url in exchange(world, begun.get("url")) if url is not None]  # leaders are in nodes' order
            agree(world, lambda: self._ask("meet", {"incarnation": record.number, "urls": urls}))

    def _describe(self, record: Incarnation) -> dict[str, object]:
        lineage = (*(life for life in self._lineage if life.number < record.number), record)
        node = self._facts.node_of(self._world.rank)
        return describe_life(
            self._facts,
            self._request,
            self._software,
            lineage,
            node=node,
            secret=self._secret,
            layers=self._layers,
            base=self._base,
        )

    def _ask(self, verb: str, fields: Mapping[str, object]) -> Mapping[str, Any]:
        """Send the node's agent a request, on the node's leader; nothing happens on the other ranks."""
        rank = self._world.rank
        if not self._facts.is_leader(rank):
            return {}
        with closing(self._connect()) as client:
            timeout_s = self._request.config.timeout_s
            return at_node(self._facts, rank, lambda: client.request(verb, fields, timeout_s=timeout_s)[0])

    def _share(self, software: Mapping[str, str]) -> tuple[Mapping[str, str], str]:
        """Return rank 0's versions, which go into manifests whatever node puts them, and the life's secret."""
        made: Mapping[str, Any] = decide(
            self._world,
            lambda: {
                "software": dict(software),
                "secret": "".join(self._host.token() for _ in range(SECRET_TOKENS)),
            },
        )
        return made["software"], str(made["secret"])

    def _connect(self) -> AgentClient:
        return AgentClient.connect(self._folder, timeout_s=self._request.config.timeout_s, host=self._host)
