"""The storage port: what every store promises, and what moc assumes of it (docs/format.md, "Assumptions").

Keys are relative, ``/``-separated, made of ``[A-Za-z0-9._-]`` segments, none of which is empty, ``.`` or ``..``; limits
stand in key.py. A key is written with one content only; writing it again means a retry with the same bytes. No key is
another key's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Entry", "Progress", "Segment", "Store", "StoreProperties"]

Segment = memoryview
"""A contiguous, byte-typed, read-only-used view; an object's bytes are the concatenation of its segments."""

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call; thread: any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One listed key; `modified_s` is the store's own time in seconds since the epoch, 0.0 where it has none."""

    key: str
    size_bytes: int
    modified_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreProperties:
    """Facts that workflows branch on, instead of asking for a type."""

    url: str
    create_only: bool
    """`put(..., create_only=True)` is enforced by the store itself."""
    is_local: bool
    """Objects are files on a local or mounted filesystem."""


class Store(Protocol):
    """Bytes in, bytes out. Thread: any method from any thread.

    Every method raises only StorageError and UsageError, and where it says so IntegrityError or FencedError.
    """

    @property
    def properties(self) -> StoreProperties:
        """Return the facts about this store; never blocks."""

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        """Store the concatenated segments; when this returns, the whole object survives a power loss.

        A reader sees the whole object or nothing. Blocks: until durable. Keeps no reference to a segment afterwards.
        With `create_only`, raises FencedError if the key exists with other bytes (where `properties.create_only`).
        """

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        """Return a whole small object; raises ObjectMissingError, or IntegrityError above `limit_bytes`."""

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        """Fill `view` (writable, contiguous, bytes) from the object at byte `offset`.

        Raises ObjectMissingError, or IntegrityError when the object ends before the view is full.
        """

    def size_bytes(self, key: str) -> int:
        """Return the object's size; raises ObjectMissingError."""

    def list(self, prefix: str) -> list[Entry]:
        """Return every object whose key starts with `prefix` + "/" (all when ""), sorted by key, never from a cache."""

    def delete(self, key: str) -> None:
        """Remove the object; removing a missing key is no error."""

    def sweep(self, *, older_than_s: float, is_dry_run: bool = False) -> int:
        """Remove what interrupted puts left behind and nobody can see, if older than this; return how many.

        With `is_dry_run` only count them.
        """

    def sync(self, prefix: str) -> None:
        """Make what a listing of `prefix` has shown survive a power loss, names that are missing from it included.

        Puts and deletes do that for themselves; this is for what a process has left that died before its put or delete
        returned. Call before anything irreversible, or anything announced, is based on a listing.
        """

    def free_bytes(self) -> int | None:
        """Return the space left for this user, or None where the store cannot say."""

    def close(self) -> None:
        """Release connections; later calls raise ClosedError."""
