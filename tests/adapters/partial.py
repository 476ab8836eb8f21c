"""Partial snapshots of a real engine into a real arena; a case of a world, as in `cases`."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from moc.adapters.deepspeed import DeepSpeedState
from moc.host import SystemHost
from moc.plan.layout import arrange_arena
from moc.plan.rotation import expert_counts, rotation_of
from moc.plan.turns import Turns
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.snapshotter import Begun, Setbacks, Snapshotter
from moc.trace import Trace
from tests.adapters.cases import Copies, attach, gathered, snapshot
from tests.adapters.engines import build, train
from tests.adapters.scenarios import Scenario

__all__ = ["CASES"]

DEADLINE_S = 60.0
STEPS = 5
UNTOUCHED = 0xA5A5A5A5


def partial(_: str, __: Path) -> None:
    """Every unit of every snapshot has the engine's bytes at the step that its seal names."""
    scenario = Scenario(ranks=2, dtype="bf16", zero=2, base="foreach", model="native")
    engine = build(scenario)
    state = attach(engine)
    experts = {s.expert for row in gathered(state.catalog) for s in row.shards if s.expert is not None}
    turns = Turns(rotation_of(expert_counts(experts), state.ep_sizes), k=1, every=1)
    arena = _arena(state)
    snapshotter = Snapshotter(
        state,
        arena,
        rank=dist.get_rank(),
        run="run-7",
        incarnation=1,
        digest="0" * 16,
        turns=turns,
        on_sealed=lambda _step: None,
        host=SystemHost(),
        trace=Trace(),
    )
    history: dict[int, Copies] = {}
    for step in range(1, STEPS + 1):
        train(engine, scenario, 1)
        history[step], _blob = snapshot(state)
        chosen = turns.everything() if step == 1 else turns.window(step)
        assert snapshotter.begin(step, flags=0, attempt="00abcdef", experts=chosen) is Begun.STARTED
        assert snapshotter.wait_finished(DEADLINE_S)
    assert snapshotter.setbacks == Setbacks()
    _expect_history(arena, history)
    _expect_left_out(state, history[STEPS])
    snapshotter.close()
    arena.close()
    engine.destroy()


def _arena(state: DeepSpeedState) -> Arena:
    descriptor = {"versions": STEPS, "catalogs": [state.catalog.to_json()]}
    layout = arrange_arena((state.catalog,), versions=STEPS, descriptor_bytes=descriptor_room(descriptor))
    return Arena.create(descriptor, layout, name="partial")


def _expect_history(arena: Arena, history: dict[int, Copies]) -> None:
    rank = dist.get_rank()
    records = arena.seals(rank).values()
    assert sorted(record.step for record in records) == list(range(1, STEPS + 1))
    for record in records:
        arena.check(record)
        offsets, first = arena.shard_offsets(rank, record.slots), 0
        for number, unit in enumerate(arena.rank_layout(rank).units):
            for index in range(first, first + unit.count):
                shard = arena.catalog(rank).shards[index]
                with arena.view(offsets[index], shard.size_bytes) as view:
                    assert bytes(view) == history[record.steps[number]][shard], (record.step, shard.name)
            first += unit.count
    newest = max(records, key=lambda record: record.step)
    assert newest.steps[0] == STEPS
    assert min(newest.steps) < STEPS, "nothing was left out"


def _expect_left_out(state: DeepSpeedState, expected: Copies) -> None:
    """A shard without a target is not read, and its checksum stays."""
    shards = state.catalog.shards
    wanted = [shard for shard in shards if shard.expert is None or shard.expert.index % 2 == 0]
    memory = [np.zeros(shard.size_bytes, dtype=np.uint8) for shard in shards]
    targets = array("Q", [m.ctypes.data if s in wanted else 0 for s, m in zip(shards, memory, strict=True)])
    crcs = array("I", [UNTOUCHED] * len(shards))
    state.copy_shards(targets, crcs)
    assert 0 < len(wanted) < len(shards)
    for shard, m, crc in zip(shards, memory, crcs, strict=True):
        assert shard not in wanted or m.tobytes() == expected[shard], shard.name
        assert (crc == UNTOUCHED) == (shard not in wanted), shard.name


CASES: dict[str, Callable[[str, Path], None]] = {"partial": partial}
