"""Lost tokens against a log of every route and against what the experts' own bytes say, over lives that end by kills.

The experts of these jobs count what they learn (`tests.support.witness`), so what was lost is known without moc.
"""

from __future__ import annotations

import os
import random
import struct

import pytest

from moc.format.contents import live_shards
from moc.format.manifest import Manifest
from moc.recover import StorageSource
from moc.repository import Repository
from moc.routing import ROUTING_KEY, Capture
from moc.state import Expert
from tests.support.job import Job, Life
from tests.support.plain import EXPERTS, LAYERS
from tests.support.witness import MICRO_BATCHES, routes_of

SEED = int(os.environ.get("MOC_CRASH_SEED", "20251125"))
KS = ((1, 1), (2, 1), (4, 1), (3, 2), (1, 1), (4, 2))  # experts per snapshot and per commit, by life
FULL = tuple((None, None) for _ in KS)


@pytest.mark.parametrize("mode", ["partial", "partial_by_load", pytest.param("full", marks=pytest.mark.slow)])
def test_lost_tokens_equal_a_log_of_every_route_over_five_faults(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(f"{mode} {SEED}")
    with capsys.disabled():
        print(f" seed={SEED}", end="")
    losses = []
    with Job(size=2, mode=mode, persist_every=3, step_s=0.01, witness=True, plt_limit=1.0, keep_last=1000) as job:
        *during, (k_snapshot, k_persist) = FULL if mode == "full" else KS
        for fault, (k, fewer) in enumerate(during):
            life = job.start(k_snapshot=k, k_persist=fewer)
            losses.append(loss_at_the_beginning(job, life))
            _kill(job, life, chance, is_memory_lost=fault % 2 == 0)
        last_step = (life.newest_step("step") or 0) + 20
        life = job.start(k_snapshot=k_snapshot, k_persist=k_persist, steps=last_step)
        losses.append(loss_at_the_beginning(job, life))
        life.finished()

        routed = routed_on_the_lineage(job.lives, last_step)
        repository = job.repository()
        manifests = [repository.read_manifest(checkpoint.name) for checkpoint in repository.checkpoints()]
        for manifest in manifests:
            check_versions(repository, manifest)
        last = max(manifests, key=lambda manifest: manifest.name)
        for capture in captures_of(repository, last):
            assert dict(by_expert(capture.routing.routed)) == routed
            assert capture.routing == last.routing
        repository.close()
        assert last.name.step == last_step
        assert any(manifest.stale_experts for manifest in manifests) == (mode != "full")
        assert (max(losses) > 0) == (mode != "full"), losses


def _kill(job: Job, life: Life, chance: random.Random, *, is_memory_lost: bool) -> None:
    """Let a life train for a while, with a commit of its own, and end it; perhaps the memory of its node with it."""
    attached = life.event("attached")["step"]
    life.event("committed", step=attached + 1)
    reached = (life.newest_step("step") or 0) + chance.randrange(1, 9)
    for rank in range(life.size):
        life.event("step", rank=rank, step=reached)
    if is_memory_lost:
        job.kill_agent()
    life.kill(*([] if is_memory_lost else [chance.randrange(life.size)]))
    life.ended()
    life.kill()


def loss_at_the_beginning(job: Job, life: Life) -> float:
    """Compare what moc says is lost at the beginning of a life with routes and bytes; return it."""
    attached = [life.event("attached", rank=rank) for rank in range(life.size)]
    if attached[0]["step"] == 0:
        assert [event["plt_now"] for event in attached] == [None] * life.size
        return 0.0
    learned: dict[str, int] = {}
    for event in attached:
        for name, count in event["learned"].items():
            assert learned.setdefault(name, count) == count, f"slices of an expert differ: {name}\n{life.story()}"
    routed = routed_on_the_lineage(job.lives, attached[0]["step"])
    shares = []
    for layer in range(LAYERS):
        experts = [Expert(layer=layer, index=index) for index in range(EXPERTS)]
        total = sum(routed[expert] for expert in experts)
        shares.append(sum(routed[e] - learned[f"{e.layer}.{e.index}"] for e in experts) / total)
    expected = sum(shares) / len(shares)
    assert [event["plt_now"] for event in attached] == pytest.approx([expected] * life.size, abs=1e-12), life.story()
    return expected


def routed_on_the_lineage(lives: list[Life], last_step: int) -> dict[Expert, int]:
    """Return what was routed up to a step of the last life: in every life, in the steps that its successor has kept."""
    kept: list[tuple[Life, int, int]] = []
    for life in lives:
        resumed = life.event("attached")["step"]
        kept = [(other, number, step) for other, number, step in kept if step <= resumed]
        number = life.event("attached")["incarnation"]
        kept += [(life, number, event["step"]) for event in life.events(0, "step")]
    kept = [(life, number, step) for life, number, step in kept if step <= last_step]
    assert [step for _, _, step in kept] == list(range(1, last_step + 1))
    routed = {Expert(layer=layer, index=index): 0 for layer in range(LAYERS) for index in range(EXPERTS)}
    for life, number, step in kept:
        for rank in range(life.size):
            for turn in range(MICRO_BATCHES):
                for expert, count in by_expert(routes_of(number, step, rank, turn)):
                    routed[expert] += count
    return routed


def check_versions(repository: Repository, manifest: Manifest) -> None:
    """Compare what a manifest says every expert has learned with the expert's bytes."""
    routing = manifest.routing
    assert routing is not None
    claimed = dict(by_expert(routing.learned)) | {row.expert: row.routed for row in manifest.stale_experts}
    seen = set()
    for row in manifest.objects:
        for stored in live_shards(manifest, row, repository.read_header(row)):
            if stored.shard.expert is not None:
                value = bytearray(4)
                repository.read_range(row, stored.position, memoryview(value))
                assert struct.unpack("<f", value) == (claimed[stored.shard.expert],), (manifest.name, stored.shard.name)
                seen.add(stored.shard.expert)
    assert sorted(seen) == sorted(claimed)


def captures_of(repository: Repository, manifest: Manifest) -> list[Capture]:
    """Return what the state of each rank says in a checkpoint."""
    captures = []
    for rank in range(int(str(manifest.topology["world_size"]))):
        tree, is_exact = StorageSource(repository, manifest, rank=rank).state(rank)
        assert is_exact
        assert isinstance(tree, dict)
        captures.append(Capture.from_tree(tree[ROUTING_KEY]))
    return captures


def by_expert(counts: tuple[tuple[int, ...], ...]) -> list[tuple[Expert, int]]:
    return [(Expert(layer=l, index=i), count) for l, row in enumerate(counts) for i, count in enumerate(row)]
