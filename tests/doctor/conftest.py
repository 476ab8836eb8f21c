"""Repositories for the doctor."""

from tests.cli.conftest import damaged, history

__all__ = ["damaged", "history"]
