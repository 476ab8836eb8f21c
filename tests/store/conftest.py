"""The stores that the conformance suite runs against; another kind of store is another entry in `OPENERS`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from moc.store.local import LocalStore
from moc.store.memory import MemoryStore
from moc.store.port import Store
from moc.store.remote import RemoteStore

OPENERS: dict[str, Callable[[Path], Store]] = {
    "local": lambda folder: LocalStore(folder / "repository"),
    "memory": lambda _: MemoryStore(),
    "fsspec-memory": lambda _: RemoteStore(f"memory://{uuid4().hex}/repository"),
    "fsspec-file": lambda folder: RemoteStore(f"file://{folder}/repository"),
}


@pytest.fixture(params=sorted(OPENERS))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Open one store of each kind, empty."""
    opened = OPENERS[request.param](tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a real filesystem of 4 MiB."""
    if os.geteuid() != 0:
        pytest.fail("this test mounts a tmpfs of 4 MiB and therefore needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "moc-test", str(folder)], check=True)
    yield folder
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
