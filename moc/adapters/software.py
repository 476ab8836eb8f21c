"""The versions on which a bit-exact resume depends."""

from __future__ import annotations

import platform
from importlib.metadata import version

import moc

__all__ = ["software_versions"]


def software_versions() -> dict[str, str]:
    """Return the versions of moc and of what it captures, by name."""
    return {
        "moc": moc.__version__,
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }
