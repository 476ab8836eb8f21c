"""A lock is removed only when its builder is gone."""

import os
from pathlib import Path

import pytest

from moc_train.build_locks import DEAD_AFTER_S, clear_dead_locks, is_local

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/me/fast\\040disk tmpfs rw 0 0
bridge /bridge fuse.sshfs rw 0 0
"""


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


def test_a_new_lock_is_a_dead_ones_too_where_every_builder_can_be_seen(lock: Path, tmp_path: Path) -> None:
    assert is_local(lock), "a disk of this machine"

    assert clear_dead_locks((tmp_path,), now_s=lock.stat().st_mtime) == (lock,)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/root/.cache/op/lock", True),
        ("/home/me/op/lock", False),
        ("/home/me/fast disk/op/lock", True),
        ("/bridge/op/lock", False),
    ],
)
def test_a_folder_that_other_machines_may_share_is_told_by_its_mount(path: str, expected: bool) -> None:
    assert is_local(Path(path), MOUNTS) is expected


def test_the_lock_of_a_living_builder_stays(lock: Path, tmp_path: Path) -> None:
    descriptor = os.open(lock, os.O_RDONLY)

    removed = clear_dead_locks((tmp_path,), now_s=lock.stat().st_mtime + DEAD_AFTER_S + 1)
    os.close(descriptor)

    assert removed == ()
    assert lock.exists()
