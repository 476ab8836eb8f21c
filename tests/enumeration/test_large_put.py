"""A put past the page cache: its bytes are on the disk at once, and yet only an fsync brings them within reach."""

from __future__ import annotations

import mmap
from pathlib import Path

from moc.errors import ObjectMissingError
from moc.store.local import DIRECT_MINIMUM_BYTES, LocalStore
from tests.support.faulty_files import FaultyFilesystem, Operation, Phase
from tests.support.model_disk import SURVIVALS, Disk
from tests.support.model_files import ModelFilesystem

ROOT = Path("/disk/repository")
KEY = "objects/large"
SIZE_BYTES = DIRECT_MINIMUM_BYTES + 3 * mmap.PAGESIZE + 77  # the rest after whole pages goes through the cache


def test_a_power_loss_at_any_operation_of_a_direct_put_leaves_all_or_nothing() -> None:
    memory = mmap.mmap(-1, SIZE_BYTES)  # aligned, as an arena is
    memory[:] = bytes(index % 251 for index in range(SIZE_BYTES))
    disk = Disk("/disk")
    moments: list[tuple[Operation, Phase, Disk]] = []

    def look(operation: Operation, phase: Phase) -> None:
        if operation.is_change:
            moments.append((operation, phase, disk.copy()))

    files = FaultyFilesystem(ModelFilesystem(disk), observe=look)
    with memoryview(memory) as view:
        LocalStore(ROOT, filesystem=files).put(KEY, [view])

    assert "open_direct" in {operation.name for operation in files.operations}
    assert {phase for _, phase, _ in moments} == {"before", "torn", "after"}
    for operation, phase, before in moments:
        for survival in SURVIVALS:
            found = _content(before.after_power_loss(survival))
            assert found in (None, memory[:]), f"half an object: {operation} ({phase}) {survival.name}"
    assert _content(disk.after_power_loss(SURVIVALS[0])) == memory[:], "what was put is there"


def _content(disk: Disk) -> bytes | None:
    try:
        return LocalStore(ROOT, filesystem=ModelFilesystem(disk)).read(KEY, limit_bytes=SIZE_BYTES)
    except ObjectMissingError:
        return None
