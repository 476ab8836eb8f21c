"""A node of several is lost in a partial mode, without replicas: which version of every expert the job goes on with.

The dense part is that of the newest checkpoint. Experts of which the nodes that are left have all slices are as its
snapshot had them, the others as the checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from moc.snapshot.arena import Arena
from moc.state import Expert
from tests.crash.test_partial_recovery import OPTIONS, goes_on, newest_manifest, recovered
from tests.support.job import Event, Job, Life
from tests.support.plain import EXPERTS, LAYERS

COMMITTED, HELD = 15, 18
GRID = [Expert(layer=layer, index=index) for layer in range(LAYERS) for index in range(EXPERTS)]
Steps = dict[Expert, int]


class PlacedJob(Job):
    """A job whose ranks are where it is told. Experts with an even index have slices on all even ranks."""

    def __init__(self, places: Mapping[int, int], **options: object) -> None:
        self._places = dict(places)
        super().__init__(size=len(places), nodes=max(places.values()) + 1, run_id="lost", **{**OPTIONS, **options})

    def node_of(self, rank: int, size: int | None = None) -> int:
        return self._places[rank]


DIVIDED = {0: 0, 1: 1}  # each node has its own experts
SHARED = {0: 0, 1: 0, 2: 1, 3: 1}  # every expert has a slice on each node
WITHIN = {0: 0, 2: 0, 1: 1, 3: 1}  # every expert has two slices, both on one node
THREE = {0: 0, 2: 0, 4: 1, 1: 1, 3: 1, 5: 2}  # even experts on the first two nodes, odd ones on the last two


def _held(job: Job, step: int = HELD, **options: object) -> Life:
    """Have a life come to a step, with every snapshot global and every checkpoint made on the way, and stay there."""
    life = job.start(hold_at=step, calm_until=step, **options)
    for rank in range(life.size):
        life.event("held", rank=rank)
    return life


def _lose(job: Job, life: Life, node: int) -> None:
    job.destroy_node(life, node)
    life.kill()


def _in_memory(job: Job, node: int, step: int) -> list[tuple[Expert, int]]:
    """Return the experts and steps of all slices in a node's snapshot of a step."""
    _, descriptors = job.ask_agent("source", node=node)
    arena = Arena.attach(descriptors[0])
    slices = [
        (unit.expert, held)
        for catalog in arena.catalogs
        for record in arena.seals(catalog.rank).values()
        for unit, held in zip(arena.rank_layout(catalog.rank).units, record.steps, strict=True)
        if record.step == step and unit.expert is not None
    ]
    arena.close()
    return slices


def _expected(job: Job, left: list[int]) -> Steps:
    """Return the step of every expert's bytes after all nodes but these are lost, from what is stored and held now."""
    newest = newest_manifest(job)
    assert newest.name.step == COMMITTED
    slices = [row for node in left for row in _in_memory(job, node, COMMITTED)]
    versions = {expert: newest.version(expert)[1] for expert in GRID}
    for expert in GRID:
        held = [step for other, step in slices if other == expert]
        # By rank as `PlainState` cuts them: one slice of an even expert on each even rank.
        wanted = len([rank for rank in range(job.size) if rank % 2 == expert.index % 2])
        if len(held) == wanted and len(set(held)) == 1:
            versions[expert] = max(versions[expert], held[0])
    return versions


def _tells(job: Job, attached: Event, versions: Steps) -> list[Expert]:
    """Fail unless the report says of every expert where it comes from; return those that come from memory."""
    newest = newest_manifest(job)
    rows = {Expert(layer=layer, index=index): (level, step) for layer, index, level, step in attached["experts"]}
    for expert, step in versions.items():
        is_newer = step > newest.version(expert)[1]
        assert rows[expert] == ("memory" if is_newer else "storage", step), (expert, attached["experts"])
    return [expert for expert in GRID if rows[expert][0] == "memory"]


@pytest.mark.parametrize(
    ("places", "lost", "usable"),
    [
        (DIVIDED, 1, {0}),
        pytest.param(DIVIDED, 0, {1}, marks=pytest.mark.slow),
        pytest.param(SHARED, 1, set(), marks=pytest.mark.slow),
        pytest.param(WITHIN, 0, {1}, marks=pytest.mark.slow),
        (THREE, 2, {0}),
        pytest.param(THREE, 1, set(), marks=pytest.mark.slow),
        pytest.param(THREE, 0, {1}, marks=pytest.mark.slow),
    ],
)
def test_experts_that_are_left_whole_are_as_new_as_the_newest_commits_snapshot(
    places: Mapping[int, int], lost: int, usable: set[int]
) -> None:
    with PlacedJob(places) as job:
        first = _held(job)
        left = [node for node in range(len(job.roots)) if node != lost]
        versions = _expected(job, left)
        _lose(job, first, lost)

        life = job.start(steps=HELD + 4)
        attached = recovered(job, life, COMMITTED, versions)

        assert attached["source"] == "storage"
        assert any("no memory of this run" in note and f"nodes=[{lost}]" in note for note in attached["notes"])
        assert not any("not usable" in note for note in attached["notes"]), (
            "what is not whole is known before it is read"
        )
        from_memory = _tells(job, attached, versions)
        assert {expert.index % 2 for expert in from_memory} == usable, "or the test shows nothing"
        goes_on(job, life, COMMITTED, versions)


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param("recover.read:begin:9", marks=pytest.mark.slow),
        "attach.record:end:1",
        pytest.param("attach.begin:end:1", marks=pytest.mark.slow),
        pytest.param("snapshot.seal:begin:1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("is_lost_again", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_recovery_from_what_is_left_that_dies_is_made_again_with_the_same_result(
    kill: str, is_lost_again: bool
) -> None:
    with PlacedJob(DIVIDED) as job:
        first = _held(job)
        versions = _expected(job, [0])
        _lose(job, first, 1)
        for _ in range(2):
            failed = job.start(kill={0: kill})
            failed.ended()
            assert failed.newest_step("global") is None
            if is_lost_again:
                _lose(job, failed, 1)

        life = job.start(steps=HELD + 4)
        attached = recovered(job, life, COMMITTED, versions)

        assert _tells(job, attached, versions)
        goes_on(job, life, COMMITTED, versions)


def test_a_node_lost_again_before_the_next_commit_costs_no_more_wherever_it_is_by_then() -> None:
    with PlacedJob(DIVIDED) as job:
        first = _held(job)
        versions = _expected(job, [0])
        _lose(job, first, 1)
        job.replace_node(1)
        second = _held(job, COMMITTED + 3, only={1: {"node_address": "127.0.0.2"}})
        recovered(job, second, COMMITTED, versions)
        _lose(job, second, 1)
        job.replace_node(1)

        life = job.start(steps=HELD + 4, only={1: {"node_address": "127.0.0.3"}})
        attached = recovered(job, life, COMMITTED, versions)

        assert _tells(job, attached, versions), "the snapshot of the checkpoint has stayed beside the life's own"
        goes_on(job, life, COMMITTED, versions)


@pytest.mark.slow
def test_in_an_arena_without_room_for_it_experts_come_from_the_checkpoint_and_no_snapshot_is_missed() -> None:
    with PlacedJob(DIVIDED, versions=2) as job:
        first = _held(job)
        newest = newest_manifest(job)
        versions = {expert: newest.version(expert)[1] for expert in GRID}
        _lose(job, first, 1)

        life = job.start(steps=HELD + 4)
        recovered(job, life, COMMITTED, versions)
        goes_on(job, life, COMMITTED, versions)


@pytest.mark.slow
def test_mode_full_takes_no_expert_from_what_is_left() -> None:
    with PlacedJob(DIVIDED) as job:
        first = _held(job)
        newest = newest_manifest(job)
        versions = {expert: newest.version(expert)[1] for expert in GRID}
        _lose(job, first, 1)

        life = job.start(steps=HELD + 4, mode="full", k_snapshot=None, k_persist=None)
        attached = recovered(job, life, COMMITTED, versions)

        assert attached["experts"] == []
        goes_on(job, life, COMMITTED, versions)


@pytest.mark.slow
def test_a_checkpoint_that_is_asked_for_by_its_step_gets_what_memory_has_at_or_below_it() -> None:
    with PlacedJob(DIVIDED) as job:
        first = _held(job)
        versions = _expected(job, [0])
        _lose(job, first, 1)

        recovered(job, job.start(steps=HELD + 4, restore=COMMITTED), COMMITTED, versions)
