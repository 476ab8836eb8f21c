"""What ranks really write of a partial checkpoint is as even as the plan says, where ZeRO cuts experts into columns."""

from __future__ import annotations

from pathlib import Path

from moc.config import Config
from moc.facts import Facts, describe_life
from moc.format.keys import parse_object_key
from moc.format.manifest import Manifest
from moc.plan.balance import balanced_rotation, job_rotations, windows
from moc.plan.bound import lower_bound
from moc.plan.ownership import Ownership, zero2_ownership
from moc.plan.rotation import even_rotation
from moc.plan.scope import MOC_LAYOUT
from moc.plan.turns import Turns
from moc.state import RankCatalog, check_coverage
from moc.survey import Request
from moc.topology import Topology
from tests.core.test_partial_saves import FIRST, Bench
from tests.plan.values import owned_catalogs, tiny

LAYERS, EXPERTS, RANKS, EP, K = 2, 16, 8, 2, 4
SHAPE = tiny(layers=LAYERS, experts=EXPERTS, hidden=64, expert_ffn=1024)  # headers and gaps are small beside an expert


def _descriptor(catalogs: tuple[RankCatalog, ...], folder: Path) -> dict[str, object]:
    """Return what the agent of a job with these catalogs is told."""
    config = Config(mode="partial", k_persist=K, persist_every=1)
    topology = Topology(world_size=RANKS, node_of_rank=(0,) * RANKS, ep_sizes=(("ep_size_2", EP),))
    for_snapshots, for_commits = job_rotations(catalogs, topology.ep_sizes, (None, K))
    facts = Facts(
        topology=topology,
        pids=tuple(range(RANKS)),
        catalogs=catalogs,
        tensors=check_coverage(shard for catalog in catalogs for shard in catalog.shards),
        turns=Turns(for_snapshots, k=None, every=1),
        rotation=for_commits,
    )
    request = Request(
        storage=str(folder),
        config=config,
        restore="auto",
        run_id=None,
        take_over=False,
        on_mismatch=(),
        runtime_root=folder,
        agent_idle_s=1.0,
        fingerprint={},
    )
    return describe_life(facts, request, {}, [FIRST], node=0, secret=None)


def _written(manifest: Manifest) -> list[int]:
    """Return the bytes of the files of experts that each rank has written, headers and gaps included."""
    sizes = [0] * RANKS
    for row in manifest.objects:
        owner, rank, piece = parse_object_key(row.key)
        if owner == manifest.name and piece != "d":
            sizes[rank] += row.size_bytes
    return sizes


def _worst(own: Ownership, orders: object) -> int:
    return max(int(own.selected_elements(selected).max()) for selected in windows(orders, K))  # type: ignore[arg-type]


def test_the_fullest_rank_writes_at_most_a_hundredth_more_than_the_bound(tmp_path: Path) -> None:
    own = zero2_ownership(SHAPE, RANKS, EP)
    bound = lower_bound(own, K)
    assert _worst(own, even_rotation(LAYERS, EXPERTS, EP)) == 2 * bound, "an order that knows no columns does not do"
    catalogs = owned_catalogs(own)
    rotation = _descriptor(catalogs, tmp_path)["rotation"]
    assert rotation == [list(order) for order in balanced_rotation(own, K).orders], "what `moc plan` reports"
    bench = Bench(experts=EXPERTS, size=RANKS, k=K, cuts=[c.shards for c in catalogs], rotation=rotation)  # type: ignore[arg-type]

    manifests = [bench.save() for _ in range(1 + EXPERTS // K)]

    bench.close()
    assert len(bench.written(manifests[0])) == LAYERS * EXPERTS, "the first one is whole"
    for manifest in manifests[1:]:
        assert len(bench.written(manifest)) == LAYERS * K
        assert bound * MOC_LAYOUT.total <= max(_written(manifest)) <= 1.01 * bound * MOC_LAYOUT.total
