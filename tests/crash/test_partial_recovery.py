"""Experts in pieces, rotten or gone, in real jobs of a partial mode: which version each comes from, bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import pytest

from moc.format.keys import parse_object_key
from moc.format.manifest import Manifest
from moc.snapshot.arena import Arena
from moc.state import Expert
from tests.support.disk import FailingDisk
from tests.support.job import Event, Job, Life
from tests.support.plain import EXPERTS, LAYERS, mixed_tensors

SIZE = 4  # every expert has slices on two ranks
HELD = 18  # the step at which jobs are held and killed
OPTIONS = {"mode": "partial", "k_snapshot": 2, "k_persist": 1, "keep_last": 50, "plt_limit": 1.0, "routes": True}
Versions = Mapping[Expert, int]


@contextlib.contextmanager
def arena_of(job: Job) -> Iterator[Arena]:
    """Map the agent's arena, as its trainers do."""
    _, descriptors = job.ask_agent("arena")
    arena = Arena.attach(descriptors[0])
    try:
        yield arena
    finally:
        arena.close()


def held(job: Job, *, calm_until: int = HELD, **options: object) -> Life:
    """Start a life, let it come to the step where it is held, and kill it there; the agent lives on."""
    life = job.start(hold_at=HELD, calm_until=calm_until, **options)
    for rank in range(SIZE):
        life.event("held", rank=rank)
    life.kill()
    return life


def steps_in_memory(arena: Arena) -> dict[int, dict[Expert, set[int]]]:
    """Return by step of a complete snapshot and expert the steps of its slices."""
    found: dict[int, dict[Expert, set[int]]] = {}
    holders: dict[int, set[int]] = {}
    for rank in range(SIZE):
        units = arena.rank_layout(rank).units
        for record in arena.seals(rank).values():
            holders.setdefault(record.step, set()).add(rank)
            for unit, step in zip(units, record.steps, strict=True):
                if unit.expert is not None:
                    found.setdefault(record.step, {}).setdefault(unit.expert, set()).add(step)
    return {step: found[step] for step in found if len(holders[step]) == SIZE}


def newest_manifest(job: Job) -> Manifest:
    repository = job.repository()
    try:
        return repository.read_manifest(max(checkpoint.name for checkpoint in repository.checkpoints()))
    finally:
        repository.close()


def flip_in_memory(arena: Arena, rank: int, step: int, expert: Expert) -> None:
    """Flip a bit of one rank's slice of an expert in a snapshot."""
    record = next(record for record in arena.seals(rank).values() if record.step == step)
    units = arena.rank_layout(rank).units
    number = next(n for n, unit in enumerate(units) if unit.expert == expert)
    place = arena.slot_offset(rank, number, record.slots[number]) + units[number].positions[0] + 3
    with arena.view(place, 1) as view:
        view[0] ^= 0x10


def recovered(job: Job, life: Life, step: int, versions: Versions) -> Event:
    """Fail unless every rank has these versions of experts and all else of `step`, and counts what that has lost.

    Return rank 0's event.
    """
    older = {expert: version for expert, version in sorted(versions.items()) if version < step}
    events = [life.event("attached", rank=rank) for rank in range(life.size)]
    for rank, event in enumerate(events):
        assert event["step"] == step, life.story()
        assert [row[:3] for row in event["stale"]] == [[e.layer, e.index, v] for e, v in older.items()], life.story()
        assert event["tensors"] == mixed_tensors(rank, life.size, step, versions), f"rank {rank}\n{life.story()}"
    lost, plt = losses(job.lives[0], step, older)
    assert events[0]["lost"] == lost
    assert events[0]["plt"] == pytest.approx(plt)
    return events[0]


def losses(first: Life, step: int, older: Versions) -> tuple[list[int], float]:
    """Return the routes lost by layer and the PLT, from a log of every route of the first life."""
    log = {
        (rank, event["step"]): event["routes"]
        for rank in range(first.size)
        for event in first.events(rank, "step")
        if event["step"] <= step
    }
    lost, total = [0] * LAYERS, [0] * LAYERS
    for (_, done), rows in log.items():
        for layer, row in enumerate(rows):
            for index, count in enumerate(row):
                total[layer] += count
                lost[layer] += count * (older.get(Expert(layer=layer, index=index), step) < done)
    return lost, sum(part / whole for part, whole in zip(lost, total, strict=True)) / LAYERS


def goes_on(job: Job, life: Life, step: int, versions: Versions, *, is_damaged: bool = False) -> None:
    """Fail unless the life trains on from these versions, and nothing that it stores last is older than that."""
    life.finished()
    done = [life.event("done", rank=rank, may_end=True) for rank in range(life.size)]
    for rank, event in enumerate(done):
        further = event["step"] - step
        assert event["tensors"] == mixed_tensors(rank, life.size, step, versions, further), life.story()
    assert newest_manifest(job).name.step == done[0]["step"]
    assert all(row.step > step for row in newest_manifest(job).stale_experts)
    if not is_damaged:
        job.sound()


def torn(job: Job) -> tuple[Life, dict[Expert, int]]:
    """Hold a life right after one rank's copy of a snapshot failed; return it and the versions to be recovered.

    What the others have copied in the snapshot before is in pieces in the newest one.
    """
    life = held(job, calm_until=HELD - 2, only={2: {"copy_defect_at": HELD - 1}})
    with arena_of(job) as arena:
        moments = steps_in_memory(arena)
    newest = moments.pop(HELD)
    pieces = {expert for expert, steps in newest.items() if len(steps) > 1}
    assert pieces, "the failed copy has left experts in pieces"
    versions = {expert: max(steps) for expert, steps in newest.items() if expert not in pieces}
    for expert in pieces:
        whole = [max(moments[step][expert]) for step in moments if len(moments[step][expert]) == 1]
        versions[expert] = max(whole, default=newest_manifest(job).version(expert)[1])
    return life, versions


def test_experts_in_pieces_come_from_the_snapshot_before_and_storage_is_not_asked(disk: FailingDisk) -> None:
    with Job(size=SIZE, storage=disk.folder / "repo", **OPTIONS) as job:
        _, versions = torn(job)
        disk.fail()

        life = job.start(hold_at=HELD)
        attached = recovered(job, life, HELD, versions)

        assert attached["source"] == "memory"
        assert any(f"memory step={HELD - 2}" in source for _, _, _, source in attached["stale"]), attached["stale"]
        disk.repair()


def test_an_agent_that_leaves_stores_experts_in_pieces_as_memory_would_have_given_them() -> None:
    with Job(size=SIZE, **OPTIONS) as job:
        _, versions = torn(job)
        stored = newest_manifest(job)
        assert any(stored.version(expert)[1] < step < HELD for expert, step in versions.items()), "memory alone has it"

        job.ask_agent("drain")
        attached = recovered(job, job.start(hold_at=HELD), HELD, versions)

        assert attached["source"] == "storage"
        job.sound()


def test_an_expert_in_pieces_that_is_rotten_in_the_snapshot_before_comes_from_storage(disk: FailingDisk) -> None:
    with Job(size=SIZE, storage=disk.folder / "repo", **OPTIONS) as job:
        _, versions = torn(job)
        with arena_of(job) as arena:
            newest = steps_in_memory(arena)[HELD]
            expert = min(expert for expert, steps in newest.items() if len(steps) > 1)
            flip_in_memory(arena, 2, HELD - 2, expert)
        versions[expert] = newest_manifest(job).version(expert)[1]
        disk.fail()

        words = job.start().refused("StoreUnavailableError")

        assert "no whole version" in words, "no snapshot has it, and storage cannot be asked"
        disk.repair()
        life = job.start(steps=HELD + 4)
        attached = recovered(job, life, HELD, versions)
        assert any(source.startswith("storage") for _, _, _, source in attached["stale"]), attached["stale"]
        goes_on(job, life, HELD, versions)


@pytest.mark.parametrize(
    "kill",
    [
        "recover.read:begin:9",
        pytest.param("attach.record:begin:1", marks=pytest.mark.slow),
        pytest.param("attach.begin:end:1", marks=pytest.mark.slow),
        "snapshot.capture:begin:1",
    ],
)
def test_a_recovery_that_dies_is_made_again_with_the_same_result(kill: str) -> None:
    with Job(size=SIZE, **OPTIONS) as job:
        _, versions = torn(job)
        for _ in range(2):
            failed = job.start(kill={0: kill})
            failed.ended()
            assert failed.newest_step("global") is None

        life = job.start(steps=HELD + 4)
        recovered(job, life, HELD, versions)
        goes_on(job, life, HELD, versions)


def test_a_rotten_expert_in_memory_costs_its_updates_since_the_newest_whole_version() -> None:
    with Job(size=SIZE, **OPTIONS) as job:
        held(job)
        expert = Expert(layer=1, index=2)
        with arena_of(job) as arena:
            (newest,) = [moment for step, moment in steps_in_memory(arena).items() if step == HELD]
            flip_in_memory(arena, 2, HELD, expert)
        versions = {e: max(steps) for e, steps in newest.items()} | {expert: newest_manifest(job).version(expert)[1]}

        life = job.start(steps=HELD + 4)
        attached = recovered(job, life, HELD, versions)

        assert any("checksum" in note for note in attached["notes"])
        goes_on(job, life, HELD, versions)


def test_a_rotten_seal_of_one_rank_costs_the_dense_part_and_the_experts_that_it_has_slices_of() -> None:
    with Job(size=SIZE, **OPTIONS) as job:
        first = job.start(hold_at=15, calm_until=15)
        for rank in range(SIZE):
            first.event("held", rank=rank)
        first.kill()
        newest = newest_manifest(job)
        assert newest.name.step == 15
        with arena_of(job) as arena:
            in_memory = steps_in_memory(arena)[15]
            (record,) = [index for index, found in arena.seals(2).items() if found.step == 15]
            with arena.view(arena._record_offset(2, record) + 60, 1) as byte:
                byte[0] ^= 0x10
        versions = {expert: newest.version(expert)[1] for expert in in_memory}
        versions |= {e: max(versions[e], *steps) for e, steps in in_memory.items() if e.index % 2}  # ranks 1 and 3
        assert any(step > newest.version(expert)[1] for expert, step in versions.items())

        life = job.start(steps=19)
        attached = recovered(job, life, 15, versions)

        assert attached["source"] == "storage"
        levels = {(layer, index): level for layer, index, level, _ in attached["experts"]}
        for expert, step in versions.items():
            level = "memory" if step > newest.version(expert)[1] else "storage"
            assert levels[expert.layer, expert.index] == level
        goes_on(job, life, 15, versions)


@pytest.mark.parametrize("damage", [pytest.param("flipped", marks=pytest.mark.slow), "dropped"])
def test_a_bad_object_of_an_earlier_checkpoint_costs_its_experts_their_updates(damage: str) -> None:
    with Job(size=SIZE, **OPTIONS) as job:
        held(job)
        job.kill_agent()
        newest = newest_manifest(job)
        grid = [Expert(layer=layer, index=index) for layer in range(LAYERS) for index in range(EXPERTS)]
        # An object that is not the newest checkpoint's own, and the one expert in it that the checkpoint takes from it.
        row = next(
            row
            for row in reversed(newest.objects)
            if parse_object_key(row.key)[0] != newest.name and parse_object_key(row.key)[0].step == 10
        )
        repository = job.repository()
        held_here = {stored.shard.expert for stored in repository.read_header(row).shards}
        lost = [e for e in grid if e in held_here and newest.version(e)[0] == parse_object_key(row.key)[0]]
        assert lost
        path = job.storage / row.key
        if damage == "dropped":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            for stored in repository.read_header(row).shards:
                if stored.shard.expert == lost[0]:
                    content[row.header_bytes + stored.position] ^= 0x10
            path.write_bytes(content)
            lost = lost[:1]
        older = [
            manifest
            for manifest in (repository.read_manifest(c.name) for c in repository.checkpoints())
            if manifest.name < newest.name
        ]
        repository.close()
        versions = {e: newest.version(e)[1] for e in grid}
        for expert in lost:
            versions[expert] = max(
                m.version(expert)[1] for m in older if m.version(expert)[0] != parse_object_key(row.key)[0]
            )

        life = job.start(steps=newest.name.step + 4)
        attached = recovered(job, life, newest.name.step, versions)

        assert attached["source"] == "storage"
        goes_on(job, life, newest.name.step, versions, is_damaged=True)


def test_a_job_in_mode_full_takes_stale_experts_as_they_are_and_says_so() -> None:
    with Job(size=SIZE, **OPTIONS) as job:
        held(job)
        job.kill_agent()
        newest = newest_manifest(job)
        versions = {row.expert: row.step for row in newest.stale_experts}
        assert versions

        life = job.start(steps=newest.name.step + 4, mode="full", k_snapshot=None, k_persist=None)
        recovered(job, life, newest.name.step, versions)
        goes_on(job, life, newest.name.step, versions)


def test_other_numbers_of_ranks_take_every_expert_in_the_same_version() -> None:
    with Job(size=SIZE, **OPTIONS) as job:
        _, versions = torn(job)
        for size in (2, 1):
            life = job.start(size=size, kill=dict.fromkeys(range(size), "snapshot.capture:begin:1"))
            recovered(job, life, HELD, versions)
            life.ended()
