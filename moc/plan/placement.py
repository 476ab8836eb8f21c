"""Which nodes hold the replicas of a node's snapshots: a function of the number of nodes alone, so equal everywhere.

The failure domain is the node, and neighbours in the order of ranks are taken to fail together sooner than others do
(one chassis, one switch), so replicas go as far away as there is room. Where the number of nodes is divisible by
`replicas + 1`, the nodes form groups that hold each other's replicas: then the fewest sets of nodes exist whose loss at
one time loses a snapshot.
"""

from __future__ import annotations

from moc.errors import UsageError

__all__ = ["check_replicas", "guests_of", "hosts_of"]


def check_replicas(replicas: int, *, nodes: int) -> None:
    """Raise UsageError unless so many replicas of every node's snapshots find other nodes to lie on."""
    if replicas >= nodes:
        raise UsageError(
            f"there are too few nodes for the replicas: replicas={replicas} nodes={nodes} allowed=0..{nodes - 1}"
        )


def hosts_of(node: int, *, nodes: int, replicas: int) -> tuple[int, ...]:
    """Return the nodes that hold replicas of this node's snapshots, the one to ask first in front.

    Every node hosts exactly `replicas` others, and no node hosts itself.
    """
    return tuple((node + distance) % nodes for distance in _distances(nodes, replicas))


def guests_of(node: int, *, nodes: int, replicas: int) -> tuple[int, ...]:
    """Return the nodes whose snapshots this node holds replicas of, ascending."""
    return tuple(sorted((node - distance) % nodes for distance in _distances(nodes, replicas)))


def _distances(nodes: int, replicas: int) -> tuple[int, ...]:
    check_replicas(replicas, nodes=nodes)
    return tuple(number * (nodes // (replicas + 1)) for number in range(1, replicas + 1))
