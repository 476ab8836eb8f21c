"""Extraction: the copy stands alone, is the same byte for byte, and a crash never leaves one that looks whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moc.errors import ShardCorruptError, UsageError
from moc.extract import extract
from moc.format.keys import CheckpointName
from moc.plan.lineage import STORAGE, Candidate, candidates
from moc.repository import Repository
from moc.store.local import LocalStore
from moc.store.memory import MemoryStore
from moc.trace import Trace
from moc.verify import verify_repository
from tests.cli.console import flip_bit, shard_place
from tests.support.kill import died_within
from tests.support.repository import build_history

KILL_LIMIT = 400  # far above the number of spans


def test_the_copy_is_sound_alone_and_equal_byte_for_byte() -> None:
    builder = build_history(MemoryStore())
    name = builder.name(2, 30)
    target = Repository(MemoryStore())
    seen: list[int] = []

    report = extract(builder.repository, name, target, seen.append)

    checked = verify_repository(target, read_data_fraction=1.0)
    assert (checked.all_findings, checked.notes) == ((), ())
    manifest = builder.repository.read_manifest(name)
    assert target.read_manifest(name) == manifest
    for row in manifest.objects:
        assert _content(target, row.key) == _content(builder.repository, row.key)
    assert sum(seen) == report.bytes_copied == manifest.size_bytes
    assert report.expert_steps == {0: (30,) * 4, 1: (30,) * 4}


def test_recovery_takes_the_copied_step() -> None:
    builder = build_history(MemoryStore())
    name = builder.name(1, 20)
    target = Repository(MemoryStore())

    extract(builder.repository, name, target)

    known = [
        Candidate(
            source=STORAGE, run=c.name.run, incarnation=c.name.incarnation, step=c.name.step, attempt=c.name.attempt
        )
        for c in target.checkpoints()
    ]
    (chosen,) = candidates(target.lineage(), known)
    assert (chosen.incarnation, chosen.step, chosen.attempt) == (1, 20, name.attempt)


def test_large_objects_go_through_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moc.extract.MEMORY_BYTES", 1)
    monkeypatch.setattr("moc.extract.PIECE_BYTES", 10_000)
    builder = build_history(MemoryStore())
    target = Repository(LocalStore(tmp_path / "out"))

    extract(builder.repository, builder.name(1, 20), target, spool=str(tmp_path))

    assert verify_repository(target, read_data_fraction=1.0).all_findings == ()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_extraction_can_be_repeated() -> None:
    builder = build_history(MemoryStore())
    target = Repository(MemoryStore())
    extract(builder.repository, builder.name(1, 20), target)
    before = {entry.key: _content(target, entry.key) for entry in target.store.list("")}

    extract(builder.repository, builder.name(1, 20), target)

    assert {entry.key: _content(target, entry.key) for entry in target.store.list("")} == before


@pytest.mark.parametrize("other", [(1, 10), (2, 30)])
def test_a_target_with_anything_else_is_refused(other: tuple[int, int]) -> None:
    builder = build_history(MemoryStore())
    target = Repository(MemoryStore())
    extract(builder.repository, builder.name(1, 20), target)

    with pytest.raises(UsageError, match="target is not empty"):
        extract(builder.repository, builder.name(*other), target)
    with pytest.raises(UsageError, match="target is not empty"):
        extract(builder.repository, builder.name(*other), builder.repository)

    assert [stored.name for stored in target.checkpoints()] == [builder.name(1, 20)]


def test_a_corrupt_shard_is_named_and_nothing_stays(tmp_path: Path) -> None:
    builder = build_history(LocalStore(tmp_path / "source"))
    path, shard, offset = shard_place(tmp_path / "source", 2, 30, rank=1, piece="e00", index=5)
    flip_bit(path, offset)
    target = Repository(LocalStore(tmp_path / "target"))

    with pytest.raises(ShardCorruptError) as caught:
        extract(builder.repository, builder.name(2, 30), target)

    assert shard in str(caught.value)
    assert target.store.list("") == []


def test_a_kill_at_any_span_leaves_no_checkpoint_and_can_be_continued(tmp_path: Path) -> None:
    builder = build_history(LocalStore(tmp_path / "source"))
    name = builder.name(2, 30)
    expected = builder.repository.read_manifest(name)
    root = tmp_path / "target"
    kills = 0
    for count in range(1, KILL_LIMIT):
        if not _extract_and_die(tmp_path / "source", root, name, count):
            break
        kills += 1
        target = Repository(LocalStore(root))
        for stored in target.checkpoints():
            assert target.read_manifest(stored.name) == expected
            assert verify_repository(target, read_data_fraction=1.0).all_findings == ()
        if count % 10 == 0:  # half of the later kills hit a fresh folder, half a begun one
            root = tmp_path / f"target-{count}"

    assert 40 < kills < KILL_LIMIT - 1
    report = verify_repository(Repository(LocalStore(root)), read_data_fraction=1.0)
    assert [r.name for r in report.checkpoints] == [name]
    assert report.all_findings == ()


def _extract_and_die(source: Path, target: Path, name: CheckpointName, count: int) -> bool:
    """Extract in a child that kills itself at its trace event number `count`; return whether it came to that."""

    def work(kill_at: Callable[..., None]) -> None:
        trace = Trace(kill_at)
        extract(Repository(LocalStore(source)), name, Repository(LocalStore(target, trace=trace)), trace=trace)

    return died_within(work, count=count, is_counted=lambda _: True)


def _content(repository: Repository, key: str) -> bytes:
    return repository.store.read(key, limit_bytes=1 << 30)
