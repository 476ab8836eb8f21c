"""Replicas find other nodes, evenly, far away, and the same ones on every node."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.errors import UsageError
from moc.plan.placement import check_replicas, guests_of, hosts_of

clusters = st.integers(1, 40).flatmap(lambda nodes: st.tuples(st.just(nodes), st.integers(0, min(nodes - 1, 4))))


@given(clusters)
def test_every_node_hosts_as_many_as_host_it_and_never_itself(cluster: tuple[int, int]) -> None:
    nodes, replicas = cluster
    hosted = Counter(host for node in range(nodes) for host in hosts_of(node, nodes=nodes, replicas=replicas))

    for node in range(nodes):
        hosts = hosts_of(node, nodes=nodes, replicas=replicas)
        assert len(set(hosts)) == replicas
        assert node not in hosts
        assert hosted[node] == replicas
        assert all(0 <= host < nodes for host in hosts)


@given(clusters)
def test_guests_are_those_whose_host_a_node_is(cluster: tuple[int, int]) -> None:
    nodes, replicas = cluster

    for node in range(nodes):
        guests = [other for other in range(nodes) if node in hosts_of(other, nodes=nodes, replicas=replicas)]
        assert list(guests_of(node, nodes=nodes, replicas=replicas)) == guests


@given(clusters)
def test_no_other_offset_lies_farther_away(cluster: tuple[int, int]) -> None:
    """Of a node and its hosts, on a ring, no two are closer than they must be."""
    nodes, replicas = cluster

    ring = sorted([0, *hosts_of(0, nodes=nodes, replicas=replicas)])
    gaps = [(after - before) % nodes or nodes for before, after in zip(ring, [*ring[1:], ring[0]], strict=True)]
    assert min(gaps) == nodes // (replicas + 1)


@pytest.mark.parametrize(("nodes", "replicas"), [(4, 1), (8, 1), (6, 2), (9, 2)])
def test_as_few_sets_of_nodes_as_can_be_lose_a_snapshot_together(nodes: int, replicas: int) -> None:
    fatal = [
        lost
        for lost in combinations(range(nodes), replicas + 1)
        if any(set(hosts_of(node, nodes=nodes, replicas=replicas)) | {node} <= set(lost) for node in range(nodes))
    ]

    assert len(fatal) == nodes // (replicas + 1)


@pytest.mark.parametrize(("nodes", "replicas"), [(1, 1), (2, 2), (3, 5)])
def test_more_replicas_than_other_nodes_are_refused(nodes: int, replicas: int) -> None:
    with pytest.raises(UsageError, match=f"replicas={replicas} nodes={nodes} allowed=0..{nodes - 1}"):
        check_replicas(replicas, nodes=nodes)
