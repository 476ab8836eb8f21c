"""The agent's log: bounded, private, one line per event whatever foreign text holds, and without secrets.

Standard output and error go to the same file, because a crash of the interpreter writes there.
"""

from __future__ import annotations

import logging
import os
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from moc.agent.runtime import open_private
from moc.store.redact import scrub

__all__ = ["LOG_LIMIT_BYTES", "log_to_file", "log_to_stderr"]

LOG_LIMIT_BYTES = 8 << 20  # of the file and of the one before it; some 80,000 lines each
LINE_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class PlainFormatter(logging.Formatter):
    """Scrubs secrets, and escapes what would forge a line or steer the terminal of whoever reads it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return _escape(scrub(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "\n".join(map(_escape, scrub(super().formatException(ei)).split("\n")))


class PrivateRotation(RotatingFileHandler):
    """A log that is renamed when it is full; the standard streams follow it."""

    def _open(self) -> TextIOWrapper:
        file = open_private(Path(self.baseFilename), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return TextIOWrapper(file, encoding="utf-8", errors="replace")

    def doRollover(self) -> None:  # noqa: N802 - logging's name
        super().doRollover()
        assert self.stream is not None, "rolling over opens the next file"
        for number in (1, 2):
            os.dup2(self.stream.fileno(), number)


def log_to_file(path: Path, *, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
    """Append to a file that is renamed to `<name>.1` when it is full."""
    _begin(PrivateRotation(path, maxBytes=limit_bytes, backupCount=1))


def log_to_stderr() -> None:
    """Write to standard error, for an agent in the foreground: its container keeps the log."""
    _begin(logging.StreamHandler(sys.stderr))


def _begin(handler: logging.Handler) -> None:
    handler.setFormatter(PlainFormatter(LINE_FORMAT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])  # libraries may tell more than is good to keep
    logging.getLogger("moc").setLevel(logging.INFO)


def _escape(line: str) -> str:
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in line)
