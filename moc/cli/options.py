"""Options that verbs share, and the repository they name."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

from moc.repository import Repository

__all__ = [
    "DEFAULT_REPOSITORY",
    "STORAGE_VARIABLE",
    "TRACE_VARIABLE",
    "add_json",
    "add_repository",
    "opened",
    "repository_url",
]

STORAGE_VARIABLE = "MOC_STORAGE"
TRACE_VARIABLE = "MOC_TRACE"
DEFAULT_REPOSITORY = "checkpoints"


def add_repository(parser: argparse.ArgumentParser) -> None:
    """Add -r/--repo."""
    parser.add_argument(
        "-r",
        "--repo",
        metavar="URL",
        help=f"repository: a folder or URL (default: ${STORAGE_VARIABLE}, else {DEFAULT_REPOSITORY}/ here)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON value on stdout, also for errors")


def repository_url(args: argparse.Namespace) -> str:
    """Return the URL that the command line, the environment or the default names."""
    given: str | None = args.repo
    return given if given is not None else os.environ.get(STORAGE_VARIABLE) or DEFAULT_REPOSITORY


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[Repository]:
    """Open the repository, which must exist: raises NoCheckpointError, FormatUnsupportedError, StorageError."""
    from moc.store.open import open_store

    repository = Repository(open_store(repository_url(args)))
    try:
        repository.require()
        yield repository
    finally:
        repository.close()
