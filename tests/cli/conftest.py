"""Repositories for the command line's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moc.store.local import LocalStore
from tests.support.repository import build_history


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with three lives; read-only."""
    root = tmp_path_factory.mktemp("history") / "repository"
    build_history(LocalStore(root))
    return root


@pytest.fixture
def damaged(history: Path, tmp_path: Path) -> Path:
    """A copy of `history` to be damaged."""
    return Path(shutil.copytree(history, tmp_path / "damaged"))
