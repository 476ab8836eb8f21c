"""Partial checkpoints of real jobs and agents that are killed: no expert is forgotten, and every byte is what it says.

Trainers log the checksum of every shard at every step of their life. Whatever is stored is compared with that: an
expert of a checkpoint must have the bytes that the life of its source had at the step which the manifest names.
"""

from __future__ import annotations

import pytest

from moc.format.contents import live_shards
from moc.format.keys import parse_object_key
from moc.format.manifest import Manifest
from moc.state import Expert
from tests.support.job import Job, Life, start_agent, wait_killed

RUN = "partial"
LAYERS, EXPERTS, K = 2, 4, 1
TURN = EXPERTS // K  # commits within which every expert is committed
EVERY = 2
GRID = [Expert(layer=layer, index=index) for layer in range(LAYERS) for index in range(EXPERTS)]


def partial_job(*, k_snapshot: int | None = None, size: int = 2, nodes: int = 1) -> Job:
    return Job(
        size=size,
        nodes=nodes,
        persist_every=EVERY,
        keep_last=TURN,
        run_id=RUN,
        step_s=0.002,
        mode="partial",
        k_snapshot=k_snapshot,
        k_persist=K,
        log_shards=True,
    )


def checksums(job: Job) -> dict[tuple[int, int, str], set[int]]:
    """Return the checksums that shards had, by life, step and name."""
    found: dict[tuple[int, int, str], set[int]] = {}
    for life in job.lives:
        for rank in range(life.size):
            for event in life.events(rank):
                for name, value in (event.get("shards") or {}).items():
                    found.setdefault((event["incarnation"], event["step"], name), set()).add(value)
    return found


def judge(job: Job, *, is_partial: bool = True) -> list[Manifest]:
    """Return the checkpoints that are stored, after a look at all their bytes; no expert is older than a turn."""
    job.sound()
    repository, known = job.repository(), checksums(job)
    manifests = [repository.read_manifest(stored.name) for stored in repository.checkpoints()]
    for manifest in manifests:
        for row in manifest.objects:
            owner, _, _ = parse_object_key(row.key)
            for stored in live_shards(manifest, row, repository.read_header(row)):
                had = known[owner.incarnation, stored.step, stored.shard.name]
                assert stored.crc32c in had, f"{manifest.name}: {stored.shard.name} of step {stored.step}"
    newest, names = manifests[-1], [manifest.name for manifest in manifests[-TURN:]]
    assert len(names) == TURN or not is_partial
    for expert in GRID:
        source, step = newest.version(expert)
        assert source in names, f"{expert} of {source} waits for longer than {TURN} commits: {names}"
        assert step <= source.step
    assert any(row.source != newest.name for row in newest.stale_experts) == is_partial
    repository.close()
    return manifests


def go_on(life: Life, *, commits: int) -> None:
    """Wait for so many further commits."""
    goal = len(life.events(0, "committed")) + commits
    life.until(lambda: len(life.events(0, "committed")) >= goal, f"{commits} further commits")


@pytest.mark.parametrize(
    ("span", "event"),
    [("persist.put", "end"), ("commit.put", "begin"), ("commit.put", "end"), ("retention.drop", "begin")],
)
def test_an_agent_killed_at_a_span_is_followed_by_one_that_goes_on_with_the_turn(span: str, event: str) -> None:
    with partial_job(k_snapshot=2) as job:
        agent = start_agent(job, RUN, f"{span}:{event}:2")
        life = job.start()
        wait_killed(agent, life)
        go_on(life, commits=TURN)
        life.kill()
        job.kill_agent()

        judge(job)


@pytest.mark.parametrize("span", ["persist.put", "commit.put", "retention.delete"])
def test_the_life_after_a_lost_node_goes_on_with_the_turn(span: str) -> None:
    with partial_job(k_snapshot=2) as job:
        agent = start_agent(job, RUN, f"{span}:begin:9")
        life = job.start()
        wait_killed(agent, life)
        life.kill()
        second = job.start()
        attached = second.event("attached")
        assert attached["source"] == "storage"
        assert attached["step"] >= (life.newest_step("committed") or 0)
        go_on(second, commits=2)
        second.kill()
        job.kill_agent()

        stored = judge(job)

        assert {name.incarnation for name in (m.name for m in stored)} == {1, 2}, "some are of either life"


def test_a_job_that_ends_well_has_its_last_step_whole() -> None:
    with partial_job(k_snapshot=2) as job:
        life = job.start(steps=20 * EVERY + 1)
        life.finished()

        manifests = judge(job, is_partial=False)

        assert manifests[-1].name.step == 20 * EVERY + 1
        assert manifests[-1].stale_experts == ()


def test_what_a_dead_job_leaves_in_memory_is_stored_whole_when_its_agent_leaves() -> None:
    with partial_job() as job:
        life = job.start()
        go_on(life, commits=TURN)
        life.kill()
        job.ask_agent("drain")

        manifests = judge(job, is_partial=False)

        assert manifests[-1].name.step >= (life.newest_step("global") or 0)
        assert manifests[-1].stale_experts == (), "memory had all experts of its newest step"
