"""What tests of several areas share and start only when one of them asks for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.s3_server import S3Server
from tests.support.zygote import Zygote

# How long an example takes on a busy machine says nothing about the property that is tested.
settings.register_profile("moc", deadline=None)
settings.load_profile("moc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files whose worlds run longest, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Run one real S3 server for all tests that ask for it."""
    with tempfile.TemporaryDirectory(prefix="moc-s3-") as folder, S3Server(Path(folder)) as server:
        yield server


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    """Return a bucket for tests that use a prefix of their own in it."""
    return s3_server.make_bucket()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Run one process that has imported what the ranks of every world need."""
    with Zygote(tmp_path_factory.mktemp("zygote") / "zygote.log") as zygote:
        yield zygote
