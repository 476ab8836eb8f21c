"""What all ranks know of each other before a life begins, and the descriptor that tells the agent."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moc.agent.guests import GUEST_VERSIONS
from moc.agent.runtime import node_identity, own_address
from moc.agreement import agree, exchange
from moc.config import Config
from moc.errors import TopologyError, UsageError
from moc.format.manifest import Incarnation, encode_lineage
from moc.host import Host
from moc.plan.balance import job_rotations
from moc.plan.layout import arrange_arena
from moc.plan.lineage import Candidate
from moc.plan.placement import check_replicas, guests_of, hosts_of
from moc.plan.rotation import Rotation, expert_counts
from moc.plan.turns import Turns, check_k
from moc.state import RankCatalog, catalog_digest, check_coverage
from moc.survey import Request
from moc.topology import Topology
from moc.training import TrainingState, World

__all__ = ["Facts", "describe_life", "gather_facts"]

COMMON_SETTINGS = ("snapshot_every", "persist_every", "mode", "k_snapshot", "k_persist", "replicas", "plt_limit")
"""On what all ranks must agree, so that they, and the agents of their nodes, choose alike without a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Who is where and holds what: by rank, the pids and catalogs; `tensors` counts the (tensor, part) pairs they
    cover, `turns` says in which order experts are snapshotted, `rotation` in which they are committed: searched once
    in a life, because the agent has no arrays.
    """

    topology: Topology
    pids: tuple[int, ...]
    catalogs: tuple[RankCatalog, ...]
    tensors: int
    turns: Turns
    rotation: Rotation
    addresses: tuple[str, ...] = ()
    """By node: where agents of other nodes reach this one's; empty on one node."""

    def node_of(self, rank: int) -> int:
        return self.topology.node_of_rank[rank]

    def ranks_of(self, node: int) -> tuple[int, ...]:
        return self.topology.ranks_of(node)

    def is_leader(self, rank: int) -> bool:
        """Return whether the rank starts its node's agent and speaks for the node: the lowest one does."""
        return rank == self.ranks_of(self.node_of(rank))[0]

    def catalogs_of(self, node: int) -> tuple[RankCatalog, ...]:
        return tuple(self.catalogs[rank] for rank in self.ranks_of(node))

    def pids_beside(self, rank: int) -> tuple[int, ...]:
        """Return the pids of the ranks on the same node; a pid of another machine says nothing here."""
        return tuple(self.pids[other] for other in self.ranks_of(self.node_of(rank)))


def gather_facts(
    state: TrainingState, world: World, request: Request, *, ep_sizes: tuple[tuple[str, int], ...], host: Host
) -> Facts:
    """Tell all ranks who is where and holds what.

    Collective. Raises: TopologyError, CoverageError, UsageError for what cannot be served.
    """
    mine = agree(
        world,
        lambda: {
            "node": node_identity(request.runtime_root),
            "pid": host.pid,
            "catalog": state.catalog.to_json(),
            "fingerprint": dict(request.fingerprint),
            "settings": {name: getattr(request.config, name) for name in COMMON_SETTINGS},
        },
    )
    rows: list[dict[str, Any]] = exchange(world, mine)  # type: ignore[assignment]  # our own dicts come back
    nodes = list(dict.fromkeys(row["node"] for row in rows))  # in the order of their lowest rank
    topology = Topology(
        world_size=world.size, node_of_rank=tuple(nodes.index(row["node"]) for row in rows), ep_sizes=ep_sizes
    )
    _refuse_differing([row["settings"] for row in rows])
    differing = [rank for rank, row in enumerate(rows) if row["fingerprint"] != rows[0]["fingerprint"]]
    if differing:
        raise TopologyError(f"ranks run different experiments: fingerprint of ranks {differing} differs from rank 0's")
    catalogs = tuple(RankCatalog.from_json(row["catalog"]) for row in rows)
    tensors = agree(world, lambda: check_coverage(shard for catalog in catalogs for shard in catalog.shards))
    turns, rotation = _take_turns(catalogs, topology, request.config)
    facts = Facts(
        topology=topology,
        pids=tuple(row["pid"] for row in rows),
        catalogs=catalogs,
        tensors=tensors,
        turns=turns,
        rotation=rotation,
        addresses=_gather_addresses(topology, world, request),
    )
    check_replicas(request.config.replicas, nodes=topology.node_count)
    for node in range(topology.node_count):
        _refuse_over_budget(facts, node, request.config)
    return facts


def _refuse_differing(rows: Sequence[Mapping[str, object]]) -> None:
    """Raise UsageError, on all ranks alike, if the settings differ by which they choose what to save, and when."""
    for name in COMMON_SETTINGS:
        values = [row[name] for row in rows]
        if differing := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise UsageError(
                f"ranks run with different settings: {name}={values[0]!r} on rank 0, {values[differing[0]]!r} on rank "
                f"{differing[0]} allowed=one value on all ranks"
            )


def _gather_addresses(topology: Topology, world: World, request: Request) -> tuple[str, ...]:
    """Return where each node's agent is reached, nothing on one node, where no name is looked up either. Collective."""
    if topology.node_count == 1:
        return ()
    found = exchange(world, agree(world, lambda: request.node_address or own_address()))
    addresses = [found[topology.ranks_of(node)[0]] for node in range(topology.node_count)]
    if None in addresses:
        raise TopologyError(
            f"no address is known at which the agent of a node is reached: node={addresses.index(None)}"
        )
    at_home = [_is_loopback(str(address)) for address in addresses]
    if len(set(at_home)) > 1:  # where all are, the nodes are of one machine
        node, other = at_home.index(True), at_home.index(False)
        raise TopologyError(
            f"the agent of a node would be reached from its own machine only: node={node} address={addresses[node]}, "
            f"node {other} has {addresses[other]} allowed=attach(node_address=...) that the other nodes reach"
        )
    return tuple(map(str, addresses))


def _is_loopback(address: str) -> bool:
    """Return whether it is one; a name is what somebody has chosen, and is not looked up."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _take_turns(catalogs: tuple[RankCatalog, ...], topology: Topology, config: Config) -> tuple[Turns, Rotation]:
    """Return the order of the experts in snapshots and in commits.

    Raises: UsageError, on all ranks alike, for more experts than there are.
    """
    known = {shard.expert for catalog in catalogs for shard in catalog.shards if shard.expert is not None}
    counts = expert_counts(sorted(known))
    check_k("k_snapshot", config.k_snapshot, counts)
    check_k("k_persist", config.k_persist, counts)
    ks = (config.k_snapshot, config.k_persist)
    for_snapshots, for_commits = job_rotations(catalogs, topology.ep_sizes, ks)
    return Turns(for_snapshots, k=config.k_snapshot, every=config.snapshot_every), for_commits


def _refuse_over_budget(facts: Facts, node: int, config: Config) -> None:
    """Raise UsageError, on all ranks and before anything is created, if the slots alone are larger than the budget."""
    own = arrange_arena(facts.catalogs_of(node), versions=config.arena_versions, descriptor_bytes=0).size_bytes
    guests = sum(
        arrange_arena(facts.catalogs_of(guest), versions=GUEST_VERSIONS, descriptor_bytes=0).size_bytes
        for guest in guests_of(node, nodes=facts.topology.node_count, replicas=config.replicas)
    )
    budget = config.memory_budget_bytes
    if budget is not None and own + guests > budget:
        sizes = f"arena_bytes={own}" + (f" replica_bytes={guests}" if guests else "")
        raise UsageError(f"snapshots do not fit: {sizes} allowed=memory_budget_bytes={budget}")


def describe_life(
    facts: Facts,
    request: Request,
    software: Mapping[str, str],
    lineage: Sequence[Incarnation],
    *,
    node: int,
    secret: str | None,
    layers: Sequence[Candidate] = (),
    base: Candidate | None = None,
) -> dict[str, object]:
    """Return the descriptor of one node's arena for the life that `lineage` ends with. Pure.

    It holds the catalogs of the node's own ranks; digest, tensors, experts and topology are the whole life's. `secret`
    is what the agents of several nodes know each other by, None on one node. `layers` are the snapshots in memory that
    the life's state was recovered from, `base` is the newest checkpoint that it grew from.
    """
    config = request.config
    descriptor: dict[str, object] = {
        "run": lineage[-1].run,
        "versions": config.arena_versions,
        "catalogs": [catalog.to_json() for catalog in facts.catalogs_of(node)],
        "digest": catalog_digest(facts.catalogs),
        "tensors": facts.tensors,
        "experts": list(facts.turns.counts),
        "topology": facts.topology.to_json(),
        "fingerprint": dict(request.fingerprint),
        "software": dict(software),
        "storage": request.storage,
        "keep_last": config.keep_last,
        "keep_every": config.keep_every,
        "timeout_s": config.timeout_s,
        "memory_budget_bytes": config.memory_budget_bytes,
        "config": asdict(config),
        "lineage": encode_lineage(lineage),
    }
    if config.k_persist is not None:
        descriptor["rotation"] = [list(order) for order in facts.rotation.orders]
    if layers:
        descriptor["layers"] = [[layer.incarnation, layer.step, layer.attempt] for layer in layers]
    if base is not None:
        descriptor["base"] = [[base.incarnation, base.step, base.attempt]]
    if secret is not None:
        address = facts.addresses[node]
        descriptor["fellows"] = {"node": node, "secret": secret, "address": address, "urls": []}
        descriptor |= _hosting(facts, node, config)
    return descriptor


def _hosting(facts: Facts, node: int, config: Config) -> dict[str, object]:
    """Return which nodes hold replicas of this node's snapshots, and what this one holds of others."""
    if not config.replicas:
        return {}
    nodes = facts.topology.node_count
    guests = guests_of(node, nodes=nodes, replicas=config.replicas)
    return {
        "hosts": list(hosts_of(node, nodes=nodes, replicas=config.replicas)),
        "guests": [
            {"node": guest, "catalogs": [catalog.to_json() for catalog in facts.catalogs_of(guest)]} for guest in guests
        ],
    }
