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
from tests.support.model_disk import Disk
from tests.support.model_files import ModelFilesystem
from tests.support.s3_server import S3Server

OPENERS: dict[str, Callable[[pytest.FixtureRequest, Path], Store]] = {
    "local": lambda _, folder: LocalStore(folder / "repository"),
    "local-model": lambda *_: LocalStore(Path("/disk/repository"), filesystem=ModelFilesystem(Disk("/disk"))),
    "memory": lambda *_: MemoryStore(),
    "fsspec-memory": lambda *_: RemoteStore(f"memory://{uuid4().hex}/repository"),
    "fsspec-file": lambda _, folder: RemoteStore(f"file://{folder}/repository"),
    "s3": lambda request, _: open_s3(request),
}


@pytest.fixture(params=sorted(OPENERS))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Open one store of each kind, empty."""
    opened = OPENERS[request.param](request, tmp_path)
    yield opened
    opened.close()


def open_s3(request: pytest.FixtureRequest) -> Store:
    """Open an empty place on the real S3 server, which is started by the first test that asks for it."""
    server: S3Server = request.getfixturevalue("s3_server")
    bucket: str = request.getfixturevalue("s3_bucket")
    return RemoteStore(f"s3://{bucket}/{uuid4().hex}/repository", server.options())


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
