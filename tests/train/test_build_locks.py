"""A lock is removed only when its builder is gone."""

import os
from pathlib import Path

import pytest

from moc_train.build_locks import DEAD_AFTER_S, clear_dead_locks


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "py311_cpu" / "some_op" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_the_lock_of_a_dead_builder_is_removed(lock: Path, tmp_path: Path) -> None:
    removed = clear_dead_locks((tmp_path,), now_s=lock.stat().st_mtime + DEAD_AFTER_S + 1)

    assert removed == (lock,)
    assert not lock.exists()


def test_a_new_lock_stays(lock: Path, tmp_path: Path) -> None:
    assert clear_dead_locks((tmp_path,), now_s=lock.stat().st_mtime + DEAD_AFTER_S - 1) == ()
    assert lock.exists()


def test_the_lock_of_a_living_builder_stays(lock: Path, tmp_path: Path) -> None:
    descriptor = os.open(lock, os.O_RDONLY)

    removed = clear_dead_locks((tmp_path,), now_s=lock.stat().st_mtime + DEAD_AFTER_S + 1)
    os.close(descriptor)

    assert removed == ()
    assert lock.exists()
