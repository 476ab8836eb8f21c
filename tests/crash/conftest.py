"""What the crash tests share: a disk that can fail."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disk import FailingDisk


@pytest.fixture
def disk() -> Iterator[FailingDisk]:
    with tempfile.TemporaryDirectory(prefix="moc-disk-") as folder, FailingDisk(Path(folder)) as made:
        yield made
