"""What a test world does in each case; every function runs on all ranks and raises if something is wrong."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from engines import build, differences, observe, train
from scenarios import DEFAULT, SLOW, Scenario

from moc import _native
from moc.adapters.deepspeed import DeepSpeedState
from moc.format.tagged import decode_state, encode_state
from moc.state import Shard, check_coverage

SCENARIOS = {scenario.name: scenario for scenario in (*DEFAULT, *SLOW)}
CAPTURED_STEP, LAST_STEP = 4, 7


def gathered(value: object) -> list:
    """Return every rank's value."""
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, value)
    return rows


def snapshot(state: DeepSpeedState) -> tuple[dict[Shard, bytes], bytes]:
    """Copy the state as a manager does: encode the tree at the boundary, then copy the shards; checks every crc."""
    blob = encode_state(state.capture()).to_bytes()
    assert len(blob) <= state.catalog.state_capacity_bytes
    shards = state.catalog.shards
    memory = [np.full(shard.size_bytes + 1, 0xA5, dtype=np.uint8) for shard in shards]
    crcs = array("I", bytes(4 * len(shards)))
    state.copy_shards(array("Q", [m.ctypes.data for m in memory]), crcs)
    for shard, crc, m in zip(shards, crcs, memory, strict=True):
        assert m[-1] == 0xA5, f"written past the end: {shard.name}"
        assert crc == _native.crc32c(m[:-1]), shard.name
    return {shard: m[:-1].tobytes() for shard, m in zip(shards, memory, strict=True)}, blob


def restore(state: DeepSpeedState, copies: list[dict[Shard, bytes]], blob: bytes, *, exact_rank: bool = True) -> None:
    """Write every needed shard from whoever copied its elements, in small pieces, then finish."""
    pieces: dict[tuple[str, str], list[tuple[Shard, bytes]]] = {}
    for held in copies:
        for shard, data in held.items():
            pieces.setdefault((shard.tensor, shard.part), []).append((shard, data))
    state.begin_restore()
    for index, shard in enumerate(state.needed):
        received = 0
        for source, data in pieces[shard.tensor, shard.part]:
            first = max(shard.offset, source.offset)
            end = min(shard.offset + shard.length, source.offset + source.length)
            width = len(data) // source.length
            for start in range(first, end, 11):
                stop = min(end, start + 11)
                view = memoryview(data)[(start - source.offset) * width : (stop - source.offset) * width]
                state.write_shard(index, start - shard.offset, view)
                received += stop - start
        assert received == shard.length, f"incomplete: {shard.name} {received} of {shard.length}"
    state.finish_restore(decode_state(blob), exact_rank=exact_rank)


def expect_same(expected: dict, actual: dict, what: str) -> None:
    found = differences(expected, actual)
    assert not found, f"{what}: differing: {found}"


def resume(name: str, _: Path) -> None:
    """Attached equals plain training, and a fresh engine restored at a step continues exactly as the first went on."""
    scenario = SCENARIOS[name]
    plain = build(scenario)
    plain_losses = train(plain, scenario, LAST_STEP)
    expected = observe(plain)
    plain.destroy()

    engine = build(scenario)
    state = DeepSpeedState(engine, {}, extra_fingerprint={})
    catalogs = gathered(state.catalog)
    check_coverage(shard for catalog in catalogs for shard in catalog.shards)
    assert gathered(state.fingerprint) == [state.fingerprint] * dist.get_world_size()
    losses = train(engine, scenario, CAPTURED_STEP)
    assert state.step == CAPTURED_STEP
    held, blob = snapshot(state)
    later_losses = train(engine, scenario, LAST_STEP - CAPTURED_STEP)
    assert losses + later_losses == plain_losses
    expect_same(expected, observe(engine), "attached against plain")
    assert engine.skipped_steps == int(scenario.is_skipping)
    engine.destroy()

    fresh = build(scenario, seed=99)
    restored = DeepSpeedState(fresh, {}, extra_fingerprint={})
    assert restored.catalog == state.catalog
    assert restored.fingerprint == state.fingerprint
    restore(restored, gathered(held), blob)
    assert restored.step == CAPTURED_STEP
    again, again_blob = snapshot(restored)
    assert again == held
    assert again_blob == blob
    assert train(fresh, scenario, LAST_STEP - CAPTURED_STEP) == later_losses
    expect_same(expected, observe(fresh), "restored against plain")
    fresh.destroy()


CASES: dict[str, Callable[[str, Path], None]] = {"resume": resume}
