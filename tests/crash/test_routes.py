"""The counters of routes against a log of every route, over lives that end by kills."""

from __future__ import annotations

import os
import random

import pytest

from moc.format.tagged import decode_state
from moc.routing import ROUTING_KEY, Capture
from tests.support.job import Job, Life
from tests.support.plain import EXPERTS, LAYERS

SEED = int(os.environ.get("MOC_CRASH_SEED", "20251125"))


@pytest.mark.parametrize("size", [2, 3])
def test_counters_equal_a_log_of_every_route_over_five_faults(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(SEED)
    with capsys.disabled():
        print(f" seed={SEED}", end="")
    with Job(size=size, persist_every=3, step_s=0.001, routes=True) as job:
        for fault in range(5):
            life = job.start()
            reached = life.attached()["step"] + chance.randrange(1, 9)
            for rank in range(size):
                life.event("step", rank=rank, step=reached)
            if fault % 2:  # memory is gone too: the next life goes back to the newest checkpoint, with its counts
                job.kill_agent()
            life.kill(*([] if fault % 3 else [chance.randrange(size)]))
            life.ended()
        last = job.start(steps=60)
        last.finished()

        captures = newest_captures(job)

        expected = routed_on_the_lineage(job.lives)
        for capture in captures:
            assert [list(row) for row in capture.routing.routed] == expected
            assert capture.captured == capture.routing.learned == capture.routing.routed
            assert {step for row in capture.steps for step in row} == {60}
        assert len(captures) == size


def routed_on_the_lineage(lives: list[Life]) -> list[list[int]]:
    """Return the sum of what all ranks have logged, of every life for the steps that its successor kept."""
    logged: dict[int, list[list[list[int]]]] = {}
    for life in lives:
        resumed = life.events(0, "attached")[0]["step"]
        logged = {step: rows for step, rows in logged.items() if step <= resumed}
        for rank in range(life.size):
            for event in life.events(rank, "step"):
                logged.setdefault(event["step"], []).append(event["routes"])
    assert sorted(logged) == list(range(1, len(logged) + 1))
    rows = [routes for step in logged.values() for routes in step]
    return [[sum(routes[layer][index] for routes in rows) for index in range(EXPERTS)] for layer in range(LAYERS)]


def newest_captures(job: Job) -> list[Capture]:
    """Return what the state of each rank says in the newest checkpoint."""
    repository = job.repository()
    manifest = repository.read_manifest(max(checkpoint.name for checkpoint in repository.checkpoints()))
    captures = []
    for row in manifest.objects:
        header = repository.read_header(row)
        if header.state is None:
            continue
        position, length, _ = header.state
        blob = bytearray(length)
        repository.read_range(row, position, memoryview(blob))
        tree = decode_state(bytes(blob))
        assert isinstance(tree, dict)
        captures.append(Capture.from_tree(tree[ROUTING_KEY]))
    repository.close()
    return captures
