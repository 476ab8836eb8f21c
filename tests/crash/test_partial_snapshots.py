"""Partial snapshots in real jobs: every version of an expert in memory is that of the step its seal says."""

from __future__ import annotations

from functools import cache

import pytest

from moc._native import crc32c
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert
from tests.support.job import Job, Life
from tests.support.plain import PlainState

EXPERTS = 4
PARTIAL = {"mode": "partial", "k_snapshot": 1, "k_persist": 1}


class Undisturbed:
    """The checksums of one rank's shards by step, computed as far as somebody has asked."""

    def __init__(self, rank: int, size: int) -> None:
        self._state = PlainState(rank, size)
        self._rows: list[dict[str, int]] = []

    def at(self, step: int) -> dict[str, int]:
        while len(self._rows) <= step:
            shards, values = self._state.catalog.shards, self._state.values
            self._rows.append({shard.name: crc32c(value) for shard, value in zip(shards, values, strict=True)})
            self._state.advance()
        return self._rows[step]


undisturbed = cache(Undisturbed)


def sealed(job: Job, life: Life) -> list[SealRecord]:
    """Return all sealed records of a life whose trainers have ended, after a look at every byte they speak of."""
    assert not any(process.is_alive() for process in life.processes)
    _, descriptors = job.ask_agent("arena")
    arena = Arena.attach(descriptors[0])
    try:
        records = [record for rank in range(life.size) for record in arena.seals(rank).values()]
        for record in records:
            arena.check(record)
            steps = [
                record.steps[number]
                for number, unit in enumerate(arena.rank_layout(record.rank).units)
                for _ in range(unit.count)
            ]
            for shard, step, crc in zip(arena.catalog(record.rank).shards, steps, record.crcs, strict=True):
                assert crc == undisturbed(record.rank, life.size).at(step)[shard.name], (record.rank, record.step, step)
            assert record.steps[0] == record.step
        return records
    finally:
        arena.close()


def versions_of(job: Job, records: list[SealRecord], step: int) -> dict[Expert, set[int]]:
    """Return the steps that the ranks' records of one step have of every expert."""
    _, descriptors = job.ask_agent("arena")
    arena = Arena.attach(descriptors[0])
    found: dict[Expert, set[int]] = {}
    for record in records:
        for number, unit in enumerate(arena.rank_layout(record.rank).units):
            if record.step == step and unit.expert is not None:
                found.setdefault(unit.expert, set()).add(record.steps[number])
    arena.close()
    return found


def leaves_out(job: Job) -> bool:
    """Return whether a sealed record of a living job holds older experts; one that is owed many soon holds all."""
    _, descriptors = job.ask_agent("arena")
    arena = Arena.attach(descriptors[0])
    found = [record for layout in arena.layout.ranks for record in arena.seals(layout.rank).values()]
    arena.close()
    return any(min(record.steps) < record.step for record in found)


def newest_global(records: list[SealRecord], size: int) -> int:
    steps = [record.step for record in records]
    return max(step for step in steps if steps.count(step) == size)


@pytest.mark.parametrize("versions", [2, 3])
def test_every_version_is_that_of_the_step_its_seal_says_also_after_the_agents_death(versions: int) -> None:
    with Job(size=2, persist_every=0, versions=versions, step_s=0.002, **PARTIAL) as job:
        life = job.start(only={1: {"defect_at": 9}})
        life.event("global", step=12)
        life.until(lambda: leaves_out(job), "a snapshot that leaves experts out")
        job.kill_agent()
        life.event("global", step=life.newest_step("step") + 3)  # by the agent that has adopted the arena
        life.until(lambda: leaves_out(job), "a snapshot that leaves experts out")
        life.kill()

        records = sealed(job, life)
        step = newest_global(records, 2)
        versions_held = versions_of(job, records, step)
        assert len(versions_held) == 2 * EXPERTS
        assert all(len(steps) == 1 for steps in versions_held.values()), "slices of different steps"


def test_ranks_that_skip_different_steps_come_to_global_snapshots_of_one_version_of_each_expert() -> None:
    # Steps are much shorter than the agent's look: each rank finds its records full at steps of its own.
    with Job(size=3, versions=2, persist_every=0, **PARTIAL) as job:
        life = job.start()
        for _ in range(4):
            life.event("global", step=(life.newest_step("step") or 0) + 1)
        life.kill()

        records = sealed(job, life)
        held = versions_of(job, records, newest_global(records, 3))
        assert all(len(steps) == 1 for steps in held.values()), held


def test_an_awaited_save_and_the_first_snapshot_of_each_life_hold_everything() -> None:
    with Job(size=2, persist_every=0, step_s=0.005, **PARTIAL) as job:
        life = job.start(save_at=7, renew_at=10, kill={0: "snapshot.seal:end:12"})
        life.ended()
        # Snapshots 1..7, the save of step 7, 8..10, then the first of the renewed life.
        life.kill()
        records = sealed(job, life)
        first = [record for record in records if record.incarnation == 2]
        assert {step for record in first if record.step == 11 for step in record.steps} == {11}

        saved = job.repository().checkpoints()
        assert [checkpoint.name.step for checkpoint in saved] == [7]
        assert not job.repository().read_manifest(saved[0].name).stale_experts
        job.sound()


@pytest.mark.parametrize("options", [{"k_snapshot": 5, "k_persist": 1}, {"k_persist": 5}])
def test_more_experts_than_the_model_has_are_refused_before_anything_is_written(options: dict[str, int]) -> None:
    name, k = max(options.items(), key=lambda item: item[1])
    with Job(size=2, mode="partial", **options) as job:
        life = job.start()
        assert f"{name}={k} allowed=1..{EXPERTS}" in life.refused("UsageError")
        assert not job.storage.exists()
