"""A store on local or mounted files: whole objects appear by rename, after their bytes are durable.

Put: temporary file in the object's directory, preallocate, write, fsync, rename (or link, which fails where the name
exists), then fsync of the directory and of every directory above it up to the root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from moc.errors import (
    ClosedError,
    FencedError,
    IntegrityError,
    ObjectMissingError,
    StoreDeniedError,
    StoreUnavailableError,
    UsageError,
)
from moc.store.filesystem import Filesystem, PosixFilesystem
from moc.store.key import byte_views, is_key, require_key, require_prefix
from moc.store.pieces import ALIGNMENT_BYTES, Piece, batch_pieces, split_pieces
from moc.store.port import Entry, Segment, StoreProperties
from moc.store.translate import translate_os_error
from moc.store.tree import Tree, require_kind
from moc.trace import Trace

__all__ = ["DIRECT_MINIMUM_BYTES", "LocalStore"]

DIRECT_MINIMUM_BYTES = 2**20  # below, opening a second handle costs more than the copy through the page cache
READ_BYTES = 16 * 2**20  # one call stays below a second on a slow disk
CREATE_ATTEMPTS = 5  # a delete may remove the empty directory that a put has just made

_TEMPORARY = re.compile(r"\.[A-Za-z0-9._-]+~[0-9]+-[0-9a-f]{8}")


class LocalStore:
    """Objects as files below `root`, which is created by the first put where it does not exist. Thread: any."""

    def __init__(self, root: Path, *, trace: Trace | None = None, filesystem: Filesystem | None = None) -> None:
        self._root = os.path.abspath(root)
        if os.path.dirname(self._root) == self._root:
            raise UsageError(f"a repository needs a folder of its own path={self._root} allowed=a folder below it")
        self._trace = trace or Trace()
        self._files: Filesystem = filesystem or PosixFilesystem()
        self._properties = StoreProperties(url=self._root, create_only=True, is_local=True)
        self._is_closed = False
        with self._translated("open"):
            self._tree = Tree(self._root, self._files, self._trace)

    @property
    def properties(self) -> StoreProperties:
        return self._properties

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        views = byte_views(segments)
        path = self._path(key)
        with self._translated("put", key), self._placed(path):
            temporary, handle = self._create(key)
            try:
                self._fill(handle, temporary, key, views)
                with self._trace.span("store.rename", key=key):
                    if create_only:
                        self._link(temporary, path, key, views)
                    else:
                        self._files.rename(temporary, path)
            except BaseException:
                # A file that cannot be removed now is left to sweep: the first error is the one to report.
                with contextlib.suppress(OSError):
                    self._files.unlink(temporary)
                raise
            self._tree.sync_directories(key)

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        with self._opened(key, "read") as handle:
            size_bytes = self._files.size_bytes(handle)
            if size_bytes > limit_bytes:
                raise IntegrityError(f"object is too large {self._subject(key)} {size_bytes=} {limit_bytes=}")
            content = bytearray(size_bytes)
            self._read_fully(handle, key, 0, memoryview(content))
            return bytes(content)

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        if offset < 0 or view.readonly or not view.c_contiguous:
            raise UsageError(
                f"cannot read into this view {offset=} readonly={view.readonly} allowed=writable, contiguous"
            )
        with self._opened(key, "read") as handle:
            self._read_fully(handle, key, offset, view.cast("B"))

    def size_bytes(self, key: str) -> int:
        with self._opened(key, "stat") as handle:
            return self._files.size_bytes(handle)

    def list(self, prefix: str) -> list[Entry]:
        require_prefix(prefix)
        self._require_open()
        with self._translated("list", prefix):
            if not self._tree.is_present() or (prefix and self._tree.find(prefix) is None):
                return []
            entries = [
                Entry(key=key, size_bytes=facts.size_bytes, modified_s=facts.modified_s)
                for key, facts in self._tree.walk(prefix)
                if is_key(key)
            ]
            self._tree.is_present()  # a root that went away in the meantime must not look like an empty one
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._translated("delete", key):
            if not self._tree.is_present():
                return
            if self._tree.find(key) is None:
                self._tree.sync_nearest(key)  # whoever removed it may have died, or failed, before it synced that
                return
            with self._trace.span("store.delete", key=key):
                # Another process may delete the same key: missing is what was asked for.
                with contextlib.suppress(FileNotFoundError):
                    self._files.unlink(path)
                # Deletes come in an order that matters (a manifest before its objects), so each is durable by itself.
                self._tree.sync_nearest(key)
                self._tree.remove_empty_directories(key)

    def sync(self, prefix: str) -> None:
        require_prefix(prefix)
        self._require_open()
        with self._translated("sync", prefix):
            if self._tree.is_present():
                self._tree.sync_below(prefix)

    def free_bytes(self) -> int | None:
        self._require_open()
        with self._translated("statvfs"):
            present = self._tree.is_present()
            return self._files.free_bytes(self._root if present else self._tree.nearest_directory())

    def close(self) -> None:
        self._is_closed = True

    def sweep(self, *, older_than_s: float, is_dry_run: bool = False) -> int:
        """Remove what crashed puts left behind, and return how many files that were.

        `older_than_s` counts from the last write, so a minute is plenty of time for a writer that is alive.
        """
        self._require_open()
        removed = 0
        with self._translated("sweep"):
            if not self._tree.is_present():
                return 0
            newest_s = self._files.now_epoch_s() - older_than_s
            for name, facts in list(self._tree.walk("")):
                if _TEMPORARY.fullmatch(facts.name) and facts.modified_s <= newest_s:
                    with contextlib.suppress(FileNotFoundError):
                        if not is_dry_run:
                            self._files.unlink(f"{self._root}/{name}")
                        removed += 1
        return removed

    # Writing

    def _create(self, key: str) -> tuple[str, int]:
        """Make the key's directories and a temporary file; returns its path and handle."""
        directory, name = os.path.split(self._path(key))
        temporary = f"{directory}/.{name}~{os.getpid()}-{secrets.token_hex(4)}"
        with self._trace.span("store.create", key=key):
            for attempt in range(1, CREATE_ATTEMPTS + 1):
                try:
                    self._tree.make_directories(key)
                    return temporary, self._files.create(temporary)
                except FileNotFoundError:
                    if attempt == CREATE_ATTEMPTS:
                        raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _fill(self, handle: int, temporary: str, key: str, views: Sequence[memoryview]) -> None:
        """Write all bytes and make them durable; closes `handle`."""
        total_bytes = sum(view.nbytes for view in views)
        try:
            with self._trace.span("store.write", key=key, bytes=total_bytes):
                if total_bytes:
                    self._files.preallocate(handle, total_bytes)
                self._write(handle, temporary, views, total_bytes)
                written_bytes = self._files.size_bytes(handle)
                if written_bytes != total_bytes:
                    raise StoreUnavailableError(
                        f"wrong length after write {self._subject(key)} {total_bytes=} {written_bytes=}"
                    )
            with self._trace.span("store.fsync", key=key):
                self._files.fsync(handle)
        finally:
            self._files.close(handle)

    def _write(self, handle: int, temporary: str, views: Sequence[memoryview], total_bytes: int) -> None:
        is_large = total_bytes >= DIRECT_MINIMUM_BYTES
        # Address 1 is aligned for nothing, so nothing of a small object is direct.
        pieces = split_pieces(views, _addresses(views) if is_large else [1] * len(views))
        direct = self._files.open_direct(temporary) if any(piece.is_direct for piece in pieces) else None
        try:
            for batch in batch_pieces(pieces):
                self._write_batch(handle, direct if batch[0].is_direct else None, batch)
        finally:
            if direct is not None:
                self._files.close(direct)

    def _write_batch(self, handle: int, direct: int | None, batch: Sequence[Piece]) -> None:
        """Write one batch whole, past the page cache while `direct` takes it."""
        offset = batch[0].offset
        views = [piece.view for piece in batch]
        while views:
            try:
                count = self._files.write(handle if direct is None else direct, offset, views)
            except OSError as error:
                if direct is None or error.errno != errno.EINVAL:
                    raise
                direct = None  # this disk wants a larger alignment
                continue
            if count <= 0:
                raise OSError(errno.EIO, "write made no progress")
            if count % ALIGNMENT_BYTES:
                direct = None
            offset += count
            views = _without_first(views, count)

    def _link(self, temporary: str, path: str, key: str, views: Sequence[memoryview]) -> None:
        """Give the object its name unless it exists with other bytes."""
        try:
            self._files.link(temporary, path)
        except FileExistsError:
            if not self._has_content(key, views):
                raise FencedError(f"object exists with other bytes {self._subject(key)}") from None
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}:
                raise
            raise StoreDeniedError(
                f"filesystem refuses hard links, which create-only puts need {self._subject(key)} errno={error.errno}"
            ) from error
        self._files.unlink(temporary)

    def _has_content(self, key: str, views: Sequence[memoryview]) -> bool:
        with self._opened(key, "compare") as handle:
            if self._files.size_bytes(handle) != sum(view.nbytes for view in views):
                return False
            offset = 0
            for view in views:
                for begin in range(0, view.nbytes, READ_BYTES):
                    expected = view[begin : begin + READ_BYTES]
                    found = bytearray(expected.nbytes)
                    self._read_fully(handle, key, offset, memoryview(found))
                    if found != expected:
                        return False
                    offset += expected.nbytes
        return True

    # Reading

    @contextlib.contextmanager
    def _opened(self, key: str, action: str) -> Iterator[int]:
        path = self._path(key)
        with self._translated(action, key):
            facts = self._tree.find(key) if self._tree.is_present() else None
            if facts is None or facts.kind == "directory":
                raise ObjectMissingError(f"object does not exist {self._subject(key)}")
            require_kind(facts, path, "file")
            handle = self._files.open_read(path)
            try:
                yield handle
            finally:
                self._files.close(handle)

    def _read_fully(self, handle: int, key: str, offset: int, view: memoryview) -> None:
        wanted_bytes = offset + view.nbytes
        size_bytes = self._files.size_bytes(handle)
        done = 0 if wanted_bytes <= size_bytes else -1
        while 0 <= done < view.nbytes:
            count = self._files.read(handle, offset + done, view[done : done + READ_BYTES])
            done = done + count if count else -1
        if done < 0:
            raise IntegrityError(f"object ends early {self._subject(key)} {wanted_bytes=} {size_bytes=}")

    # Checks

    @contextlib.contextmanager
    def _placed(self, path: str) -> Iterator[None]:
        """Report what a missing or occupied path means for a put."""
        try:
            yield
        except IsADirectoryError as error:
            raise UsageError(
                f"path is occupied {path=} kind=directory allowed=a key that no other key begins with"
            ) from error
        except FileNotFoundError as error:
            raise StoreUnavailableError(f"folder was removed during the put {path=}") from error

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"store is closed url={self._root}")

    def _path(self, key: str) -> str:
        require_key(key)
        self._require_open()
        return f"{self._root}/{key}"

    def _subject(self, key: str) -> str:
        return f"{key=} root={self._root}"

    @contextlib.contextmanager
    def _translated(self, action: str, key: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise translate_os_error(error, action=action, subject=self._subject(key)) from error


def _addresses(views: Sequence[memoryview]) -> list[int]:
    """Return where each view's bytes lie in memory."""
    import numpy as np  # only for large puts: listing a repository stays quick

    return [int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) for view in views]


def _without_first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the views without their first `count` bytes."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
        count -= view.nbytes
    return []
