"""One flipped bit in memory, in an object, in a manifest, in a record: named, and the next source is used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moc.snapshot.arena import Arena
from tests.support.job import Event, Job, Life


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte[0] ^ 0x10]))


def _arena(job: Job) -> tuple[Arena, Path]:
    """Map the agent's arena as a stranger with its rights would: through /proc."""
    pid = job.agent_pid()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # descriptors of connections come and go
            if "memfd:moc-" not in os.readlink(path):
                continue
            return Arena.attach(os.open(path, os.O_RDWR)), path
    raise AssertionError("the agent has no arena")


def _killed(job: Job, step: int = 7) -> Life:
    life = job.start()
    life.event("committed", step=5)
    life.event("global", step=max(step, life.newest_step("committed") + 2))
    life.kill()
    return life


def _recovered(job: Job) -> Event:
    life = job.start()
    attached = life.attached()
    life.event("global", step=attached["step"] + 2)
    life.kill()
    life.exact()
    return attached


@pytest.mark.parametrize("what", ["shard", "state"])
def test_a_bit_in_a_sealed_slot(what: str) -> None:
    with Job(size=2, persist_every=5) as job:
        first = _killed(job)
        arena, path = _arena(job)
        complete = {record.attempt for record in arena.seals(0).values()}
        record = max((r for r in arena.seals(1).values() if r.attempt in complete), key=lambda r: r.step)
        if what == "shard":
            shard = arena.catalog(1).shards[-1]
            offset, name = arena.shard_offsets(1, record.slots)[-1] + 17, shard.name
        else:
            offset, name = arena.state_offset(1, record.slots) + 9, "state"
        arena.close()
        _flip(path, offset)

        attached = _recovered(job)
        rejected = [words for words in attached["rejected"] if f"step={record.step}" in words]
        assert rejected, attached
        assert name in rejected[0]
        assert attached["step"] < record.step or attached["source"] == "storage"
        assert attached["step"] >= first.newest_step("committed")


def test_a_rotten_snapshot_is_never_stored() -> None:
    # No step is saved but the fifth: the save of the newest one might else be under way before the bit flips.
    with Job(size=2, persist_every=1000, save_at=5) as job:
        first = _killed(job)
        committed = job.committed_steps()
        arena, path = _arena(job)
        held = [{r.step for r in arena.seals(rank).values()} for rank in range(2)]
        step = max(held[0] & held[1])
        record = next(r for r in arena.seals(1).values() if r.step == step)
        shard, offset = arena.catalog(1).shards[-1], arena.shard_offsets(1, record.slots)[-1] + 17
        arena.close()
        assert step not in committed, "the newest snapshot is not stored yet"
        _flip(path, offset)

        reply, _ = job.ask_agent("drain")  # it would persist the newest global snapshot

        assert shard.name in str(reply["last_error"]), reply
        assert step not in job.committed_steps()
        job.sound()
        attached = job.start(steps=step + 5).attached()
        assert attached["source"] == "storage"
        assert attached["step"] >= first.newest_step("committed")


def test_a_bit_in_a_seal_record() -> None:
    with Job(size=2, persist_every=5) as job:
        first = _killed(job)
        arena, path = _arena(job)
        offset = arena._record_offset(1, 0)
        offsets = [offset + i * arena.rank_layout(1).record_bytes for i in range(arena.rank_layout(1).versions)]
        arena.close()
        for offset in offsets:
            _flip(path, offset + 60)
        attached = _recovered(job)
        assert attached["source"] == "storage"
        assert attached["step"] >= first.newest_step("committed")


def test_a_bit_in_the_arenas_descriptor() -> None:
    with Job(size=2, persist_every=5) as job:
        first = _killed(job)
        arena, path = _arena(job)
        arena.close()
        for offset in (4096 + 40, 4096 + 40 + 4096 * 17):
            _flip(path, offset)
        life = job.start()
        attached = life.attached()
        assert attached["step"] >= first.newest_step("committed")


def _object(job: Job, step: int, piece: str) -> Path:
    return next(path for path in sorted(job.storage.rglob(f"*{step:012d}-*/r00001-{piece}.safetensors")))


def _data(job: Job, step: int) -> tuple[Path, int]:
    return _object(job, step, "e00"), -4096


def _header(job: Job, step: int) -> tuple[Path, int]:
    return _object(job, step, "d"), 700


def _manifest(job: Job, step: int) -> tuple[Path, int]:
    return next(job.storage.glob(f"manifests/*/{step:012d}-*.json")), 300


@pytest.mark.parametrize("place", [_data, _header, _manifest])
def test_a_bit_in_storage(place: Callable[[Job, int], tuple[Path, int]]) -> None:
    with Job(size=2, persist_every=5, keep_last=50) as job:
        life = job.start(step_s=0.002)
        life.until(lambda: len(job.committed_steps()) >= 2, "two commits")
        job.kill_agent()
        life.kill()
        steps = job.committed_steps()
        path, position = place(job, steps[-1])
        _flip(path, position if position >= 0 else path.stat().st_size + position)

        attached = _recovered(job)
        assert (attached["source"], attached["step"]) == ("storage", steps[-2])
        assert len(attached["rejected"]) == 1
        named = path.name if place is not _data else "layers."
        assert named in attached["rejected"][0], attached["rejected"]


def test_a_missing_object_and_a_short_one() -> None:
    with Job(size=1, persist_every=5, keep_last=50, step_s=0.002) as job:
        life = job.start()
        life.until(lambda: len(job.committed_steps()) >= 3, "three commits")
        job.kill_agent()
        life.kill()
        steps = job.committed_steps()
        next(iter(job.storage.glob(f"objects/*/{steps[-1]:012d}-*/r00000-d.safetensors"))).unlink()
        short = next(iter(job.storage.glob(f"objects/*/{steps[-2]:012d}-*/r00000-e00.safetensors")))
        with short.open("r+b") as stream:
            stream.truncate(short.stat().st_size - 4096)
        attached = _recovered(job)
        assert attached["step"] == steps[-3]
        assert len(attached["rejected"]) == 2


def test_a_bit_in_the_newest_incarnation_record_stops_the_recovery() -> None:
    with Job(size=1, persist_every=5) as job:
        _killed(job)
        job.kill_agent()
        _recovered(job)
        job.kill_agent()
        newest = max(job.storage.glob("incarnations/*.json"))
        _flip(newest, 60)
        before = job.listing()
        life = job.start()
        life.ended()
        refused = life.last(0, "refused")
        assert refused is not None, life.story()
        assert newest.name in refused["words"]
        assert job.listing() == before


def test_every_object_opens_with_safetensors() -> None:
    from safetensors import safe_open

    with Job(size=2, persist_every=5) as job:
        job.start(steps=10).finished()
        paths = list(job.storage.rglob("*.safetensors"))
        assert paths
        for path in paths:
            with safe_open(path, framework="numpy") as opened:
                names = [name for name in opened.keys() if not name.startswith("__pad__")]  # noqa: SIM118  # not a mapping
                assert names
                for name in names:
                    opened.get_tensor(name)
