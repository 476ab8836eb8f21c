"""Exit codes: the one table from error classes to numbers, and the hints that go with them."""

from __future__ import annotations

from moc.errors import (
    FormatUnsupportedError,
    IntegrityError,
    MocError,
    NoCheckpointError,
    ObjectMissingError,
    StorageError,
    StoreDeniedError,
    StoreFullError,
    StoreUnavailableError,
    UsageError,
)

__all__ = ["EXIT_HELP", "FAILURE", "INTEGRITY", "INTERRUPTED", "NO_CHECKPOINT", "OK", "USAGE", "exit_code", "hint"]

OK = 0
FAILURE = 1
USAGE = 2
NO_CHECKPOINT = 3
INTEGRITY = 4
STORAGE = 5
FORMAT = 6
INTERRUPTED = 130

EXIT_HELP = """exit codes:
  0  ok                        4  integrity problem
  1  failure                   5  storage unavailable, denied or full
  2  wrong command line        6  format not supported
  3  no (such) checkpoint      130  interrupted"""

# The first class that fits decides, so subclasses stand before their parents.
_CODES: tuple[tuple[type[MocError], int], ...] = (
    (FormatUnsupportedError, FORMAT),
    (IntegrityError, INTEGRITY),
    (ObjectMissingError, INTEGRITY),  # commands name only keys that a listing or a manifest promised
    (StorageError, STORAGE),
    (NoCheckpointError, NO_CHECKPOINT),
    (UsageError, USAGE),
    (MocError, FAILURE),
)

_HINTS: tuple[tuple[type[MocError], str], ...] = (
    (FormatUnsupportedError, "use the version of moc that wrote it"),
    (IntegrityError, "'moc verify' names everything that is wrong"),
    (ObjectMissingError, "'moc verify' names everything that is wrong"),
    (StoreDeniedError, "check the rights of this user and the credentials"),
    (StoreFullError, "make room or choose another folder"),
    (StoreUnavailableError, "try again later"),
    (NoCheckpointError, "choose the repository with -r or MOC_STORAGE"),
)


def exit_code(error: MocError) -> int:
    """Return the exit code for an error."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def hint(error: MocError) -> str | None:
    """Return what the user can do about an error, or None where the message already says it."""
    return next((text for kind, text in _HINTS if isinstance(error, kind)), None)
